# SPDX-License-Identifier: Apache-2.0
"""Rivals that follow the class and never look at the image: patterns that are easy to learn. They ask no network."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_salm.perturbations.autoregression import processes, run
from monai_salm.perturbations.base import Batch, Objective, Perturbation, per_image

SPREAD = 0.1
"""Standard deviation of an image's separable patches around their corner, as a fraction of the budget."""
CUT = 1.4
"""Standard deviations of autoregressive noise that the budget stands for."""


def require_class_labels(label: Tensor) -> None:
    """Check that there is one class index per image, (B,).

    Raises:
        ValueError: When there is not.
    """
    if label.ndim != 1:
        raise ValueError(f"labels are {tuple(label.shape)}; this method needs one class per image: class labels, (B,)")


class ClassPattern(Perturbation):
    """A pattern of its own for every class, in the direction of rising intensity whatever the sign of the slope."""

    @abstractmethod
    def patterns(self, label: int, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Values of ``shape``, or that broadcast to it, in which 1 is the whole budget.

        Args:
            label: class of the images.
            shape: of the images, (n, C, *spatial).
            generator: of what differs from image to image.
        """

    def compute(self, objective: Objective, batch: Batch, start: Tensor, generator: torch.Generator) -> Tensor:
        image, label, lattice = batch
        require_class_labels(label)
        patterns = torch.empty_like(image)
        for index in label.unique():
            own = label == index
            patterns[own] = self.patterns(int(index), image[own].shape, generator).to(image.device)
        return patterns * lattice.levels * lattice.unit_step.sign()


class _SeededPattern(ClassPattern):
    def __init__(self, *, seed: int) -> None:
        self.seed = seed

    def of_class(self, label: int) -> torch.Generator:
        """A generator of what all images of a class share."""
        return torch.Generator().manual_seed((self.seed << 20) + label)


class ClasswiseNoise(_SeededPattern):
    """Random signs of the full budget, the same ones in every image of a class: the class-wise random noise of
    arXiv 2101.04898, in signs in place of uniform values.

    Args:
        seed: of the patterns; the ``generator`` of a call differs from batch to batch and cannot decide them.
    """

    def patterns(self, label: int, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return torch.where(torch.rand(shape[1:], generator=self.of_class(label)) < 0.5, -1.0, 1.0)


class SeparablePatches(_SeededPattern):
    """Linearly separable patches (LSP, arXiv 2111.00898): each class is a corner of a cube, each image a point near it.

    Different from the original: corners at the full budget with Gaussian spread, cut off at the budget, in place of
    points with random covariance that are scaled to an L2 norm; patches are a fraction of the image, not 8 pixels, so
    that images may differ in size.

    Args:
        seed: of the corners.
        cells: patches per axis.

    Raises:
        ValueError: When ``cells`` is below 1.
    """

    def __init__(self, *, seed: int, cells: int = 4) -> None:
        super().__init__(seed=seed)
        if cells < 1:
            raise ValueError(f"cells is {cells}; use 1 patch or more")
        self.cells = cells

    def patterns(self, label: int, shape: torch.Size, generator: torch.Generator) -> Tensor:
        grid = (shape[1], *[self.cells] * (len(shape) - 2))
        corner = torch.where(torch.rand(grid, generator=self.of_class(label)) < 0.5, -1.0, 1.0)
        points = corner + SPREAD * torch.randn(shape[0], *grid, generator=generator)
        return F.interpolate(points.clamp(-1, 1), size=shape[2:])


class AutoregressiveNoise(_SeededPattern):
    """Autoregressive noise (AR, arXiv 2206.03693): each class has a linear rule by which a voxel follows from those
    before it, each image a random beginning. A convolution with the rule leaves nothing of its class, and something of
    others.

    Different from the original: bounded in L-infinity (what exceeds :py:data:`CUT` standard deviations is cut off) in
    place of L2; rules are the best of random ones by a farthest-point search in place of the first that are good
    enough; volumes have rules of 3 voxels per axis, of which 26 precede. Rounding to stored integers blurs the rule.

    Args:
        seed: of the rules.
        count: number of rules, no fewer than classes.

    Raises:
        ValueError: When ``count`` is below 1, or a label of a call is ``count`` or more.
    """

    def __init__(self, *, seed: int, count: int) -> None:
        super().__init__(seed=seed)
        if count < 1:
            raise ValueError(f"count is {count}; use a rule for every class")
        self.count = count

    def patterns(self, label: int, shape: torch.Size, generator: torch.Generator) -> Tensor:
        if label >= self.count:
            raise ValueError(f"a label is {label}, and there are rules for {self.count} classes; raise count")
        rule = processes(self.seed, self.count, shape[1], len(shape) - 2)[label]
        noise = run(rule.expand(shape[0], *rule.shape), shape[2:], generator)
        deviation = noise.square().flatten(1).mean(1).sqrt()
        return (noise / (CUT * per_image(deviation, noise))).clamp(-1, 1)
