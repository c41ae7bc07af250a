# SPDX-License-Identifier: Apache-2.0
"""Rivals whose perturbation of a class is found by looking at all of its images, in :py:meth:`Perturbation.learn`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_salm.perturbations.base import Batch, Objective, Perturbation
from monai_salm.perturbations.patterns import ClassPattern, require_class_labels


def _resized(values: Tensor, size: Sequence[int]) -> Tensor:
    """(N, C, *spatial) values at another size, by the nearest voxel; images of one class need not be of one size."""
    return values if values.shape[2:] == tuple(size) else F.interpolate(values, size=tuple(size))


class ClasswiseErrorMinimizing(ClassPattern):
    """Error-minimizing noise that is the same for all images of a class (class-wise EM, arXiv 2101.04898).

    Before the cases of a round are perturbed, the patterns take one signed step per batch, along the mean gradient of
    the batch's images of the class. Patterns have the size of the first image, and are resized for others.

    Args:
        step_size: of one step, as a fraction of the budget.

    Raises:
        ValueError: When ``step_size`` is not above 0.
    """

    def __init__(self, *, step_size: float = 0.1) -> None:
        if step_size <= 0:
            raise ValueError(f"step_size is {step_size}; it must be above 0")
        self.step_size = step_size

    def learn(self, objective: Objective, batches: Iterator[Batch], generator: torch.Generator) -> dict[int, Tensor]:
        self.learned = dict(self.learned or {})
        for batch in batches:
            image, label, lattice = batch
            require_class_labels(label)
            for index in label.unique().tolist():
                first = next(iter(self.learned.values()), image[0])
                self.learned.setdefault(index, torch.zeros_like(first))
            steps = lattice.project(self.compute(objective, batch, image, generator))
            gradient = self.gradient(objective, batch, steps, generator) * lattice.unit_step.sign()
            for index in label.unique().tolist():
                pattern, own = self.learned[index], gradient[label == index].mean(0, keepdim=True)
                step = self.step_size * _resized(own, pattern.shape[1:])[0].sign()
                self.learned[index] = (pattern - step).clamp(-1, 1)
        return self.learned

    def patterns(self, label: int, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return _resized(_known(self.learned, label)[None], shape[2:])


class OnePixelShortcut(Perturbation):
    """The voxels that tell a class best, set to one value in all of its images (OPS, arXiv 2205.12141).

    For each class the voxel and the extreme (black or white, per channel) are searched at which the mean distance of
    the class's images from that extreme is largest beside its standard deviation; no two classes get the same pair. It
    asks no network. As published: a budget of the whole window, ``255/255``, and a ``ratio`` of 0. Within a smaller
    budget the voxels move towards the extreme as far as they may, and ``ratio`` makes up for that. Voxels are found on
    the grid of the first image, and lie at the same fraction of others.

    Args:
        ratio: fraction of voxels that are set, at least one.

    Raises:
        ValueError: When ``ratio`` is outside [0, 1].
    """

    def __init__(self, *, ratio: float = 0.0) -> None:
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio is {ratio}; it must be in [0, 1]")
        self.ratio = ratio

    def learn(self, objective: Objective, batches: Iterator[Batch], generator: torch.Generator) -> dict[int, Tensor]:
        """Rows by class: a place as a fraction of each axis, then the extreme in each channel."""
        sums: dict[int, Tensor] = {}
        for image, label, _ in batches:
            require_class_labels(label)
            size = next(iter(sums.values())).shape[2:] if sums else image.shape[2:]
            extremes = torch.tensor(list(product((1.0, 0.0), repeat=image.shape[1])), device=image.device)
            shown = extremes.reshape(1, *extremes.shape, *[1] * len(size))
            distance = (_resized(image, size)[:, None] - shown).abs().double()  # (B, 2**C, C, *spatial)
            for index in label.unique().tolist():
                own = distance[label == index]
                moments = torch.stack([torch.ones_like(own), own, own.square()]).sum((1, 3))
                sums[index] = sums.get(index, 0) + moments  # (3, 2**C, *spatial)
        taken = torch.zeros_like(next(iter(sums.values()))[0], dtype=torch.bool)
        return {index: self._best(sums[index], taken, extremes) for index in sorted(sums)}

    def _best(self, moments: Tensor, taken: Tensor, extremes: Tensor) -> Tensor:
        """Rows of one class; what they use is marked in ``taken``, (2**C, *spatial)."""
        mean, square = moments[1:] / moments[0]
        score = mean / ((square - mean.square()).clamp(min=0).sqrt() + 1e-6)
        best, extreme = score.masked_fill(taken, -1).max(0)
        at = best.flatten().topk(max(1, round(self.ratio * best.numel()))).indices
        chosen = extreme.flatten()[at]
        taken.flatten(1)[chosen, at] = True
        places = torch.stack(torch.unravel_index(at, best.shape), 1)
        fractions = (places + 0.5) / torch.tensor(best.shape, device=places.device)
        return torch.cat([fractions, extremes[chosen]], 1)

    def compute(self, objective: Objective, batch: Batch, start: Tensor, generator: torch.Generator) -> Tensor:
        image, label, lattice = batch
        require_class_labels(label)
        size, goal = torch.tensor(image.shape[2:], device=image.device), image.clone()
        for index in label.unique().tolist():
            rows, own = _known(self.learned, index), (label == index).nonzero()[:, 0]
            places = (rows[:, : len(size)] * size).long().unbind(1)
            for channel, values in enumerate(rows[:, len(size) :].unbind(1)):
                goal[(own[:, None], channel, *places)] = values
        return (goal - image) / lattice.unit_step


def _known(learned: Mapping[int, Tensor] | None, label: int) -> Tensor:
    if learned is None or label not in learned:
        raise ValueError(f"nothing was learned of class labels {label}; call survey with cases of every class first")
    return learned[label]
