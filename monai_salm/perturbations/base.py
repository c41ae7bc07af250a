# SPDX-License-Identifier: Apache-2.0
"""What every perturbation method shares: one call, and the invariants that hold when it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch
from torch import Tensor, nn

from monai_salm.perturbations.budget import Lattice

if TYPE_CHECKING:  # masks.py needs this module
    from monai_salm.perturbations.masks import SparsityMask

Loss = Callable[[Tensor, Tensor], Tensor]
"""(prediction, label) -> one loss per image, (B,)."""


class Batch(NamedTuple):
    """Images of one shape, their labels, and the changes that they allow.

    ``image`` is (B, C, *spatial) in unit intensity; ``label`` has (B,) classes, or (B, 1, *spatial) class indices.
    """

    image: Tensor
    label: Tensor
    lattice: Lattice


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Evaluation mode without parameter gradients; on leaving, modes, gradient flags and gradients are as before."""
    modes = [(module, module.training) for module in network.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    network.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def unreduced(losses: Tensor, shape: Sequence[int]) -> Tensor:
    """``losses`` as they are, once it is known that there is one for each label.

    Args:
        losses: what a loss returned.
        shape: of the labels.

    Raises:
        ValueError: When the shapes differ, as those of a loss with ``reduction="mean"`` do.
    """
    if losses.shape != tuple(shape):
        raise ValueError(
            f"the loss returned {tuple(losses.shape)} for {tuple(shape)} labels; give it reduction='none', so that it "
            "has one value for each"
        )
    return losses


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """(B,) values as (B, 1, ...), which broadcast over (B, C, *spatial) images."""
    return values.reshape(-1, *[1] * (images.ndim - 1))


def mean_size(gradient: Tensor) -> Tensor:
    """(B, 1, ...) mean absolute value of each image of a (B, C, *spatial) gradient; never 0, to divide by."""
    size = per_image(gradient.abs().flatten(1).mean(1), gradient)
    return size.clamp(min=torch.finfo(size.dtype).tiny)


class Objective(nn.Module):
    """What a perturbation is to minimize: the surrogate's loss on the protected image, seen as a third party would.

    Args:
        network: the surrogate: a module with a ``view`` from images of any size to one size, linear and differentiable,
            and a ``network`` from there to a prediction (:py:class:`monai_salm.surrogates.Surrogate`).
        loss: one value per image from prediction and label (``reduction="none"``).
        view: random view drawn anew for every evaluation (``draw(batch, generator)`` and ``forward(image, drawn)``).
            None: the image as it is.
    """

    network: Any  # not nn.Module, of which a type checker knows neither ``view`` nor ``network``
    view: Any
    guard_weight: float = 0.0
    """Weight of the guard's part of the gradient, see :py:class:`monai_salm.perturbations.voxels.VoxelObjective`."""

    def __init__(self, network: nn.Module, loss: Loss, *, view: nn.Module | None = None) -> None:
        super().__init__()
        self.network, self.loss, self.view = network, loss, view
        self.passes = 0
        self._sum, self._count = torch.tensor(0.0), 0

    def forward(self, image: Tensor, delta: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        """(B,) losses of (B, C, *spatial) images and perturbations in unit intensity."""
        seen = self.network.view(image) + self.network.view(delta)
        if self.view is not None:
            seen = self.view(seen, self.view.draw(len(seen), generator))
        losses = unreduced(self.loss(self.network.network(self.harden(seen, label)), label), label.shape[:1])
        self._note(losses)
        return losses

    def harden(self, seen: Tensor, label: Tensor) -> Tensor:
        """Hook: the images that the network gets, made of the ones after the view; here the same."""
        return seen

    def _note(self, losses: Tensor) -> None:
        """Count one pass per image, and its loss for the mean."""
        self.passes += len(losses)
        self._sum = self._sum + losses.detach().sum()
        self._count += len(losses)

    def gradient(self, image: Tensor, delta: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        """Gradient of the sum of the losses by ``delta``, of its shape; arguments as for the call."""
        delta = delta.detach().requires_grad_(True)
        with torch.enable_grad():
            loss = self(image, delta, label, generator).sum()
            (gradient,) = torch.autograd.grad(loss, delta)
        return gradient

    def reset_mean(self, total: float = 0.0, count: int = 0) -> None:
        """Begin a new :py:meth:`mean`, or go on with what :py:attr:`tally` was."""
        self._sum, self._count = torch.tensor(total), count

    @property
    def tally(self) -> tuple[float, int]:
        """Sum and number of the losses since :py:meth:`reset_mean`."""
        return float(self._sum), self._count

    def mean(self) -> float:
        """Mean loss over all images since :py:meth:`reset_mean`."""
        return float(self._sum) / max(self._count, 1)


class Perturbation(ABC):
    """A method that computes perturbations. Hyper-parameters go to ``__init__``, data to the call.

    On return of the call a perturbation is an integer number of lattice steps, inside the lattice's bounds (hence
    inside budget, window and stored range), finite and detached, and the objective's network is in the state it was in.
    """

    learned: Any = None
    """What :py:meth:`learn` returned, tensors that ``torch.save`` takes; None: nothing."""
    mask: SparsityMask | None = None
    """Which voxels may be touched; None: the method has no such choice."""

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if name != "learned")
        return f"{type(self).__name__}({settings})"

    def gradient(self, objective: Objective, batch: Batch, steps: Tensor, generator: torch.Generator) -> Tensor:
        """Gradient of the objective by lattice steps, at the perturbation that would be stored."""
        unit_step = batch.lattice.unit_step
        gradient = objective.gradient(batch.image, steps.round().mul_(unit_step), batch.label, generator)
        return gradient * unit_step.sign()

    @abstractmethod
    def compute(self, objective: Objective, batch: Batch, start: Tensor, generator: torch.Generator) -> Tensor:
        """(B, C, *spatial) real-valued lattice steps, from float ``start``; the caller projects and rounds."""

    def learn(self, objective: Objective, batches: Iterator[Batch], generator: torch.Generator) -> Any:
        """Hook: what ``compute`` has to know of the whole cohort, and then finds in ``learned``; here nothing new."""
        return self.learned

    @final
    def survey(self, objective: Objective, batches: Iterator[Batch], *, generator: torch.Generator) -> None:
        """Look at the whole cohort once, at the beginning of a round, before its cases are perturbed.

        Args:
            objective: what to minimize.
            batches: all cases of the cohort.
            generator: CPU generator of everything random.
        """
        with frozen(objective.network):
            self.learned = self.learn(objective, batches, generator)

    @final
    def __call__(
        self,
        objective: Objective,
        image: Tensor,
        label: Tensor,
        lattice: Lattice,
        start: Tensor | None = None,
        *,
        generator: torch.Generator,
    ) -> Tensor:
        """Perturbations of a batch.

        Args:
            objective: what to minimize.
            image: (B, C, *spatial) unit intensities.
            label: (B, ...) targets of the objective's loss.
            lattice: the changes that the images allow.
            start: integer perturbations to go on from; default none.
            generator: CPU generator of everything random.

        Returns:
            integers of the images' shape, of the lattice's type.

        Raises:
            ValueError: When shapes differ, an image is not finite, or the method returned non-finite values.
        """
        if image.shape != lattice.lower.shape or len(label) != len(image):
            raise ValueError(
                f"images {tuple(image.shape)}, labels {tuple(label.shape)} and lattice {tuple(lattice.lower.shape)} "
                "must agree; they differ"
            )
        if not torch.isfinite(image).all():
            raise ValueError("an image has values that are not finite; StoredCodec.to_unit replaces them")
        begin = torch.zeros_like(image) if start is None else start.to(image.dtype)
        with frozen(objective.network):
            steps = self.compute(objective, Batch(image.detach(), label, lattice), begin, generator).detach()
        if not torch.isfinite(steps).all():
            raise ValueError(
                f"{type(self).__name__} returned values that are not finite; the surrogate may have diverged"
            )
        return lattice.snap(steps)
