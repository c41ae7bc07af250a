# SPDX-License-Identifier: Apache-2.0
"""The objective of voxel labels: the surrogate's loss on a volume of any size, tile by tile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from monai_salm.convolution import mean_nearby
from monai_salm.errors import check_number, check_size
from monai_salm.perturbations.base import Loss, Objective, mean_size, unreduced

IGNORED = 255
"""Class index of voxels that have no part in the loss: the halo of a tile, and what lies outside of a volume."""
_NO_LOSS = -100  # what PyTorch's losses ignore

Span = tuple[Any, ...]
"""An index of the spatial axes of a (B, C, *spatial) tensor: an ellipsis, then a slice for each."""


def require_voxel_labels(image: Tensor, label: Tensor) -> None:
    """Check that (B, C, *spatial) images have one class index per voxel, (B, 1, *spatial).

    Raises:
        ValueError: When they have not.
    """
    if label.shape != (len(image), 1, *image.shape[2:]):
        raise ValueError(
            f"images {tuple(image.shape)} and labels {tuple(label.shape)} differ; "
            "each voxel needs one class index: voxel labels, (B, 1, *spatial)"
        )


class VoxelObjective(Objective):
    """What a perturbation is to minimize where every voxel has a label.

    The loss of an image is the mean over its classes of the mean loss over the voxels of a class: a lesion of a few
    voxels weighs as much as its background. It is a sum over voxels and can be had tile by tile: the gradient is
    that of the whole volume if the network is local (no normalization over the image; batch normalization in evaluation
    mode is local), ``halo`` is at least the radius of its receptive field, both sizes are multiples of the network's
    total stride, and there is no random view (tiles draw their own). Memory of the network is then bounded by
    ``(tile_size + 2 * halo)`` voxels per axis, whatever the volume.

    With a guard, a network that learned the task from clean images, the gradient also has a part that lowers the
    guard's loss: what is done to an image must not keep such a network from segmenting it. Of that part the mean nearby
    is taken off, since a brighter lesion would be easier to learn for others too, and each part is scaled by its mean
    absolute value over the image. A guard that is not local sees no farther than the halo.

    Args:
        network: the surrogate; ``network.network`` maps (B, C, *tile) to (B, n_classes, *tile) logits, and so does
            ``network.guard``.
        loss: one value per voxel from (B, n_classes, *tile) logits and (B, *tile) class indices, such as
            ``torch.nn.CrossEntropyLoss(reduction="none")``.
        view: random view, which must also know how to move labels (:py:class:`monai_salm.surrogates.RandomView`).
        tile_size: voxels per axis of a tile; smaller volumes are one tile.
        halo: voxels around a tile that the network sees but the tile's loss leaves out.
        guard_weight: size of the guard's part of the gradient, relative to the surrogate's; 0 asks no guard.

    Raises:
        ValueError: When ``tile_size`` is no size, the halo or the weight is negative, the halo is smaller than the
            network's ``reach`` (where it tells one), there is no guard to weigh, or in a call images and labels differ
            in shape.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        *,
        view: nn.Module | None = None,
        tile_size: Sequence[int] = (64, 64, 64),
        halo: int = 16,
        guard_weight: float = 0.0,
    ) -> None:
        super().__init__(network, loss, view=view)
        check_number("halo", halo, least=0, whole=True)
        check_number("guard_weight", guard_weight, least=0)
        reach = getattr(getattr(network, "network", None), "reach", 0)
        if halo < reach:
            raise ValueError(f"halo is {halo}; the surrogate reads voxels up to {reach} away, so use {reach} or more")
        if guard_weight and getattr(network, "guard", None) is None:
            raise ValueError(f"guard_weight is {guard_weight}, but the surrogate has no guard; give it one, or use 0")
        self.tile_size, self.halo = tuple(check_size("tile_size", tile_size)), int(halo)
        self.guard_weight = float(guard_weight)

    def extra_repr(self) -> str:
        guarded = f", guard_weight={self.guard_weight:g}" if self.guard_weight else ""
        return f"tile_size={self.tile_size}, halo={self.halo}{guarded}"

    def forward(self, image: Tensor, delta: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        """(B,) losses of (B, C, *spatial) images and perturbations with (B, 1, *spatial) class indices."""
        seen = self._seen(image + delta, label, generator)
        losses = self._losses(self.network.network, *seen, self._weights(image, label))
        self._note(losses)
        return losses

    def guard_loss(self, image: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        """(B,) losses of the guard on clean images."""
        self.passes += len(image)
        return self._losses(self.network.guard, *self._seen(image, label, generator), self._weights(image, label))

    def gradient(self, image: Tensor, delta: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        """Gradient of the sum of the losses by ``delta``, accumulated over tiles, with the guard's part."""
        gradient, losses = torch.zeros_like(delta), torch.zeros(len(image), device=image.device)
        guarding = torch.zeros_like(delta) if self.guard_weight else None
        weights = self._weights(image, label)
        for inner, outer in self.tiles(image.shape[2:]):
            truth = torch.full_like(label[outer], IGNORED)
            truth[_within(inner, outer)] = label[inner]
            part = delta[outer].detach().requires_grad_(True)
            with torch.enable_grad():
                seen = self._seen(image[outer] + part, truth, generator)
                loss = self._losses(self.network.network, *seen, weights)
                gradient[outer] += torch.autograd.grad(loss.sum(), part, retain_graph=guarding is not None)[0]
                if guarding is not None:
                    guard_loss = self._losses(self.network.guard, *seen, weights)
                    guarding[outer] += torch.autograd.grad(guard_loss.sum(), part)[0]
            losses += loss.detach()
        self._note(losses)
        if guarding is None:
            return gradient
        self.passes += len(image)
        guarding = guarding - mean_nearby(guarding)
        return gradient + self.guard_weight * mean_size(gradient) * (guarding / mean_size(guarding))

    def tiles(self, size: Sequence[int]) -> Iterator[tuple[Span, Span]]:
        """Spans of each tile, without and with its halo; together the tiles cover a volume of ``size`` once."""
        axes = [range(0, length, tile) for length, tile in zip(size, self.tile_size, strict=True)]
        for corner in product(*axes):
            ends = [min(at + tile, length) for at, tile, length in zip(corner, self.tile_size, size, strict=True)]
            outer = (
                slice(max(0, at - self.halo), min(end + self.halo, length))
                for at, end, length in zip(corner, ends, size, strict=True)
            )
            yield (..., *map(slice, corner, ends)), (..., *outer)

    def _seen(self, image: Tensor, label: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images and labels after the same random view."""
        if self.view is None:
            return image, label
        drawn = self.view.draw(len(image), generator)
        return self.view(image, drawn), self.view.move_labels(label, drawn)

    def _losses(self, network: nn.Module, seen: Tensor, label: Tensor, weights: Tensor) -> Tensor:
        """(B,) sums over the voxels of (B, 1, *spatial) labels, each with the weight of its class."""
        truth = label[:, 0].long()
        share = weights.gather(1, truth.flatten(1).clamp(max=weights.shape[1] - 1)).reshape(truth.shape)
        truth = truth.masked_fill(truth == IGNORED, _NO_LOSS)
        return (unreduced(self.loss(network(seen), truth), truth.shape) * share).flatten(1).sum(1)

    @staticmethod
    def _weights(image: Tensor, label: Tensor) -> Tensor:
        """(B, n_classes) weight of a voxel of each class: the classes of an image share its loss evenly."""
        require_voxel_labels(image, label)
        n_classes = 1 + int(label.masked_fill(label == IGNORED, 0).max())
        counts = torch.stack([(label == index).flatten(1).sum(1) for index in range(n_classes)], 1).float()
        present = counts > 0
        return present / (counts.clamp(min=1) * present.sum(1, keepdim=True).clamp(min=1))


def _within(inner: Span, outer: Span) -> Span:
    """``inner`` as an index of what ``outer`` cuts out."""
    pairs = zip(inner[1:], outer[1:], strict=True)
    return (..., *(slice(own.start - around.start, own.stop - around.start) for own, around in pairs))
