# SPDX-License-Identifier: Apache-2.0
"""The objective of voxel labels: the surrogate's loss on a volume of any size, tile by tile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor, nn

from monai_salm.perturbations.base import Loss, Objective

IGNORED = 255
"""Class index of voxels that have no part in the loss: the halo of a tile, and what lies outside of a volume."""
_NO_LOSS = -100  # what PyTorch's losses ignore

Span = tuple[slice, ...]


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

    Args:
        network: the surrogate; ``network.network`` maps (B, C, *tile) to (B, n_classes, *tile) logits.
        loss: one value per voxel from (B, n_classes, *tile) logits and (B, *tile) class indices, such as
            ``torch.nn.CrossEntropyLoss(reduction="none")``.
        view: random view, which must also know how to move labels (:py:class:`monai_salm.surrogates.RandomView`).
        tile_size: voxels per axis of a tile; smaller volumes are one tile.
        halo: voxels around a tile that the network sees but the tile's loss leaves out.

    Raises:
        ValueError: When a tile has no voxels, the halo is negative, or in a call images and labels differ in shape.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        *,
        view: nn.Module | None = None,
        tile_size: Sequence[int] = (64, 64, 64),
        halo: int = 16,
    ) -> None:
        super().__init__(network, loss, view=view)
        if min(tile_size) < 1 or halo < 0:
            raise ValueError(f"tile_size is {tuple(tile_size)} and halo {halo}; tiles are 1 or more, halos 0 or more")
        self.tile_size, self.halo = tuple(int(size) for size in tile_size), int(halo)

    def extra_repr(self) -> str:
        return f"tile_size={self.tile_size}, halo={self.halo}"

    def forward(self, image: Tensor, delta: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        """(B,) losses of (B, C, *spatial) images and perturbations with (B, 1, *spatial) class indices."""
        losses = self._losses(image, delta, label, self._weights(image, label), generator)
        self._note(losses, len(image))
        return losses

    def gradient(self, image: Tensor, delta: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        """Gradient of the sum of the losses by ``delta``, accumulated over tiles."""
        gradient, losses = torch.zeros_like(delta), torch.zeros(len(image), device=image.device)
        weights = self._weights(image, label)
        for inner, outer in self.tiles(image.shape[2:]):
            truth = torch.full_like(label[outer], IGNORED)
            within = (..., *(slice(i.start - o.start, i.stop - o.start) for i, o in zip(inner, outer[1:], strict=True)))
            truth[within] = label[(..., *inner)]
            part = delta[outer].detach().requires_grad_(True)
            with torch.enable_grad():
                loss = self._losses(image[outer], part, truth, weights, generator)
                gradient[outer] += torch.autograd.grad(loss.sum(), part)[0]
            losses += loss.detach()
        self._note(losses, len(image))
        return gradient

    def tiles(self, size: Sequence[int]) -> Iterator[tuple[Span, Span]]:
        """Spans of each tile and of the tile with its halo; the tiles cover ``size`` once."""
        axes = [range(0, length, tile) for length, tile in zip(size, self.tile_size, strict=True)]
        for corner in product(*axes):
            ends = [min(at + tile, length) for at, tile, length in zip(corner, self.tile_size, size, strict=True)]
            outer = (
                slice(max(0, at - self.halo), min(end + self.halo, length))
                for at, end, length in zip(corner, ends, size, strict=True)
            )
            yield tuple(map(slice, corner, ends)), (..., *outer)

    def _losses(
        self, image: Tensor, delta: Tensor, label: Tensor, weights: Tensor, generator: torch.Generator
    ) -> Tensor:
        seen = image + delta
        if self.view is not None:
            drawn = self.view.draw(len(seen), generator)
            seen, label = self.view(seen, drawn), self.view.move_labels(label, drawn)
        truth = label[:, 0].long()
        share = weights.gather(1, truth.flatten(1).clamp(max=weights.shape[1] - 1)).reshape(truth.shape)
        truth = truth.masked_fill(truth == IGNORED, _NO_LOSS)
        return (self.loss(self.network.network(seen), truth) * share).flatten(1).sum(1)

    @staticmethod
    def _weights(image: Tensor, label: Tensor) -> Tensor:
        """(B, n_classes) weight of a voxel of each class: the classes of an image share its loss evenly."""
        require_voxel_labels(image, label)
        n_classes = 1 + int(label.masked_fill(label == IGNORED, 0).max())
        counts = torch.stack([(label == index).flatten(1).sum(1) for index in range(n_classes)], 1).float()
        present = counts > 0
        return present / (counts.clamp(min=1) * present.sum(1, keepdim=True).clamp(min=1))
