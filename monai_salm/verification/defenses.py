# SPDX-License-Identifier: Apache-2.0
"""What a third party does to get rid of a perturbation. No defense knows how the images were made.

A filter goes before the network for good: training images pass it once, and so do those that the network is given
later. Everything else is a way of training, a :py:class:`monai_salm.verification.training.Recipe`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_salm.verification import augmentations, filters
from monai_salm.verification.augmentations import Change
from monai_salm.verification.pretraining import SelfSupervised, last_linear
from monai_salm.verification.training import Learn, Recipe, Task

__all__ = ["DEFENSES", "LEVELS", "Defense", "defenses_of"]

LEVELS = ("standard", "full")
"""``standard``: some cheap ones; ``full``: all."""
CLEAN_SHARE = 0.2
"""Share of clean cases among those that :py:class:`CleanMixed` trains on."""


class Filtered(Recipe):
    """Every image passes a filter, those that the network is given later too.

    Args:
        change: one (C, *spatial) image; see :py:mod:`monai_salm.verification.filters`.
        clean: as of :py:class:`Recipe`.
    """

    def __init__(self, change: Callable[[Tensor], Tensor], clean: Any = None) -> None:
        super().__init__(clean)
        self.change = change

    def data(self, task: Task, train: Any, test: Any) -> tuple[Any, Any]:
        return task.mapped(train, self.change), task.mapped(test, self.change)


class Augmented(Recipe):
    """Every batch is changed at random, after the augmentation that the victim has anyway.

    Args:
        change: what is done to a batch.
        clean: as of :py:class:`Recipe`.
    """

    def __init__(self, change: Change, clean: Any = None) -> None:
        super().__init__(clean)
        self.change = change

    def losses(
        self, task: Task, network: nn.Module, images: Tensor, truth: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        images, truth = self.change(images, truth, generator)
        return task.losses(network(images), truth)


class MixedUp(Recipe):
    """Mixup: batches of weighted means of two images, and of their losses (arXiv 1710.09412, alpha 1)."""

    def losses(
        self, task: Task, network: nn.Module, images: Tensor, truth: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        order = torch.randperm(len(images), generator=generator).to(images.device)
        weight = self.weight(images, generator)
        output, share = network(weight * images + (1 - weight) * images[order]), float(weight.mean())
        pairs = task.losses(output, truth), task.losses(output, truth[order])
        return {name: share * value + (1 - share) * pairs[1][name] for name, value in pairs[0].items()}

    def weight(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """What each voxel keeps of its own image, broadcast over the batch."""
        return torch.rand((), generator=generator).to(images)


class CutMixed(MixedUp):
    """CutMix: a box of another image is pasted in, and the losses are weighted by its size (arXiv 1905.04899)."""

    def weight(self, images: Tensor, generator: torch.Generator) -> Tensor:
        size = images.shape[2:]
        side = float(torch.rand((), generator=generator)) ** (1 / len(size))
        center = torch.rand(len(size), generator=generator).tolist()
        kept = images.new_ones(1, 1, *size)
        ends = [(round((at - side / 2) * n), round((at + side / 2) * n)) for at, n in zip(center, size, strict=True)]
        kept[(..., *[slice(max(0, low), max(0, high)) for low, high in ends])] = 0
        return kept


class WorstOf(Recipe):
    """Of several strong augmentations of an image the one with the largest loss is trained on in the first half of the
    epochs, then any one (after UEraser, arXiv 2303.15127; its plasma noise is replaced by bias field, gamma and
    histogram shift). A network that sees only the worst ones to the end has its threshold in a wrong place.

    Args:
        count: augmentations.
        clean: as of :py:class:`Recipe`.
    """

    def __init__(self, count: int, clean: Any = None) -> None:
        super().__init__(clean)
        self.count = count

    def losses(
        self, task: Task, network: nn.Module, images: Tensor, truth: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        seen = [
            augmentations.intensity(*augmentations.strong_affine(images, truth, generator), generator)[0]
            for _ in range(self.count)
        ]
        with torch.no_grad():
            loss = torch.stack([F.cross_entropy(network(each), truth, reduction="none") for each in seen])
        worst = torch.stack(seen)[loss.argmax(0), torch.arange(len(images), device=images.device)]
        return task.losses(network(worst), truth)

    def end_epoch(self, task: Task, network: nn.Module, done: float) -> None:
        if done >= 0.5:
            self.count = 1


class Adversarial(Recipe):
    """Adversarial training: projected gradient ascent before every step (Madry et al., arXiv 1706.06083).

    Args:
        epsilon: bound of the attack in unit intensity.
        steps: of the attack, 2.5 / steps of the bound each.
        clean: as of :py:class:`Recipe`.
    """

    def __init__(self, epsilon: float = 8 / 255, steps: int = 3, clean: Any = None) -> None:
        super().__init__(clean)
        self.epsilon, self.steps = epsilon, steps

    def losses(
        self, task: Task, network: nn.Module, images: Tensor, truth: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        bound = self.epsilon
        delta = ((torch.rand(images.shape, generator=generator) * 2 - 1) * bound).to(images)
        for _ in range(self.steps):
            delta.requires_grad_(True)
            (slope,) = torch.autograd.grad(task.losses(network(images + delta), truth)["train_loss"], delta)
            delta = (delta.detach() + 2.5 * bound / self.steps * slope.sign()).clamp(-bound, bound)
        return task.losses(network(images + delta), truth)


class Orthogonal(Recipe):
    """Images without the directions that a linear classifier reads the classes from (orthogonal projection,
    arXiv 2305.19254). Those that the network is given later lose them too."""

    def data(self, task: Task, train: Any, test: Any) -> tuple[Any, Any]:
        flat, labels = train[0].flatten(1), train[1]
        mean = flat.mean(0)
        weight, _ = linear_classifier(flat - mean, labels)
        basis, _ = torch.linalg.qr(weight[1:].T)  # rows add up to 0: one of them says nothing that the others do not

        def without(image: Tensor) -> Tensor:
            away = image.flatten() - mean
            return (mean + away - basis @ (basis.T @ away)).reshape(image.shape)

        return task.mapped(train, without), task.mapped(test, without)


def linear_classifier(flat: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """A logistic regression with a weak L2 penalty, a thousandth of the mean square norm of ``flat``.

    Args:
        flat: (N, n) values with zero mean.
        labels: (N,) class indices, each class present.

    Returns:
        (n_classes, n) weights, which add up to 0 over the classes, and (n_classes,) biases.
    """
    weight = torch.zeros(int(labels.max()) + 1, flat.shape[1], requires_grad=True)
    bias = torch.zeros(len(weight), requires_grad=True)
    penalty = 1e-3 * float(flat.square().sum(1).mean())
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(flat @ weight.T + bias, labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


class CleanMixed(Recipe):
    """Clean cases of the third party's own are mixed in: spread over all of them, since cases often come sorted by
    class, and repeated where they are too few."""

    def data(self, task: Task, train: Any, test: Any) -> tuple[Any, Any]:
        wanted = max(1, round(CLEAN_SHARE / (1 - CLEAN_SHARE) * task.count(train)))
        places = [at * task.count(self.clean) // wanted for at in range(wanted)]
        return task.joined(train, task.part(self.clean, places)), test


class EarlyStopped(Recipe):
    """The epoch that is best on the third party's own clean cases counts."""

    def __init__(self, clean: Any = None) -> None:
        super().__init__(clean)
        self.best: tuple[float, dict[str, Tensor]] | None = None

    def end_epoch(self, task: Task, network: nn.Module, done: float) -> None:
        score = task.evaluate(network, self.clean, 32, full=False)[task.metric]
        if score is not None and (self.best is None or score > self.best[0]):
            self.best = score, deepcopy(network.state_dict())
        if done == 1 and self.best is not None:
            network.load_state_dict(self.best[1])


class Pretrained(Recipe):
    """Starts from a network that was trained on the third party's own clean cases, with their labels."""

    def network(self, make: Callable[[], nn.Module], learn: Learn) -> nn.Module:
        return learn(self.clean)


class FrozenEncoder(Pretrained):
    """Trains a new last layer on what such a network sees, and nothing else."""

    def network(self, make: Callable[[], nn.Module], learn: Learn) -> nn.Module:
        return _NewHead(super().network(make, learn))


class _NewHead(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        last_linear(network)[1].requires_grad_(True).reset_parameters()

    def train(self, mode: bool = True) -> _NewHead:
        """Evaluation mode always: the statistics of a frozen encoder stay as they are."""
        return super().train(False)

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image)


@dataclass(frozen=True)
class Defense:
    """One way to get rid of a perturbation.

    Args:
        name: in tables.
        what: in words, for those who read a report.
        recipe: makes it, of the third party's own clean cases.
        cost: about how many times as long as an ordinary training it takes.
        standard: part of the smaller set.
        voxels: carries over to voxel labels.
        needs_clean: nothing can be done without clean cases.
    """

    name: str
    what: str
    recipe: Callable[..., Recipe]
    cost: float = 1.0
    standard: bool = False
    voxels: bool = True
    needs_clean: bool = False


def _filter(name: str, what: str, change: Callable[..., Tensor], standard: bool = False, **options: float) -> Defense:
    return Defense(name, what, partial(Filtered, partial(change, **options)), 1.0, standard)


def _augmented(name: str, what: str, change: Change, cost: float, standard: bool = False) -> Defense:
    return Defense(name, what, partial(Augmented, change), cost, standard)


def _of_classes(name: str, what: str, recipe: Callable[..., Recipe], cost: float = 1.0, **marks: bool) -> Defense:
    return Defense(name, what, recipe, cost, voxels=False, **marks)


DEFENSES: tuple[Defense, ...] = (
    *(
        _filter(f"jpeg_{quality}", f"JPEG at quality {quality}", filters.jpeg, quality == 30, quality=quality)
        for quality in (10, 30, 50, 75, 95)
    ),
    _filter("jpeg2000_10", "JPEG 2000 at 10:1 of 12 bits", filters.jpeg2000, ratio=10),
    _filter("bit_depth_4", "16 gray values", filters.bit_depth, bits=4),
    _filter("bit_depth_3", "8 gray values", filters.bit_depth, bits=3),
    _filter("window_0.6", "the middle 60 % of the intensity window", filters.narrowed, low=0.2, high=0.8),
    _filter("blur_1", "Gaussian blur, sigma 1 voxel", filters.blur, True, sigma=1.0),
    _filter("median_1", "median of 3 voxels per axis", filters.median, radius=1),
    _filter("low_pass_0.25", "no frequency above 0.25 cycles per voxel", filters.low_pass, cut=0.25),
    *(
        _filter(
            f"respaced_{factor:g}",
            f"voxels {factor:g} times as large, and back",
            filters.respaced,
            factor == 1.25,
            factor=factor,
        )
        for factor in (1.25, 1.5, 2.0)
    ),
    _augmented("strong_affine", "strong random rotation, zoom and shift", augmentations.strong_affine, 1.2, True),
    _augmented("intensity", "random bias field, gamma and histogram shift", augmentations.intensity, 1.5),
    _augmented("cutout", "a random box is erased (Cutout)", augmentations.cutout, 1.2),
    _augmented("nnunet", "the augmentation of nnU-Net", augmentations.nnunet, 2.0, True),
    _augmented("waves", "random plane waves are added", augmentations.waves, 1.2),
    _of_classes("mixup", "weighted means of two images (Mixup)", MixedUp),
    _of_classes("cutmix", "a random box of another image (CutMix)", CutMixed),
    _of_classes("worst_of_5", "at first the worst of 5 strong augmentations (UEraser)", partial(WorstOf, 5), 4.0),
    Defense("adversarial", "adversarial training (3 steps within the budget)", Adversarial, 4.0),
    _of_classes("orthogonal", "orthogonal projection of what a linear classifier reads", Orthogonal, standard=True),
    Defense("early_stop", "the epoch that is best on own clean cases", EarlyStopped, 1.3, needs_clean=True),
    Defense("clean_20", "20 % own clean cases mixed in", CleanMixed, 1.3, True, needs_clean=True),
    Defense("pretrained", "start from a network trained on own clean cases", Pretrained, 1.5, needs_clean=True),
    _of_classes("frozen_encoder", "a new last layer on such a network", FrozenEncoder, 1.5, needs_clean=True),
    _of_classes(
        "self_supervised", "start from a network that learned to tell how images are turned", SelfSupervised, 5.0
    ),
)


def defenses_of(
    level: str | Sequence[str], voxelwise: bool = False, epsilon: float | None = None
) -> tuple[Defense, ...]:
    """Defenses of a level, or those that are named.

    Args:
        level: one of :py:data:`LEVELS`, or names.
        voxelwise: only those that carry over to voxel labels.
        epsilon: budget of the perturbations in unit intensity, for whoever trains against changes of that size.

    Raises:
        ValueError: When there is no such level or name.

    Example:
        >>> [defense.name for defense in defenses_of("standard")]
        ['jpeg_30', 'blur_1', 'respaced_1.25', 'strong_affine', 'nnunet', 'orthogonal', 'clean_20']
    """
    names = {defense.name: defense for defense in DEFENSES}
    if isinstance(level, str):
        if level not in LEVELS:
            raise ValueError(f"there is no set of defenses {level!r}; use one of {', '.join(LEVELS)}")
        chosen = [defense for defense in DEFENSES if defense.standard or level == "full"]
    else:
        unknown = sorted(set(level) - names.keys())
        if unknown:
            raise ValueError(f"there is no defense {', '.join(unknown)}; there are {', '.join(names)}")
        chosen = [names[name] for name in level]
    if epsilon is not None:
        at = partial(Adversarial, epsilon)
        chosen = [replace(each, recipe=at) if each.recipe is Adversarial else each for each in chosen]
    return tuple(defense for defense in chosen if defense.voxels or not voxelwise)
