# SPDX-License-Identifier: Apache-2.0
"""Rivals that need voxel labels: perturbations that exist only where a label is, with and without optimization.

All of them draw the label into the perturbation: whoever sees |delta| sees the label.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_salm.perturbations.base import Batch, Objective, Perturbation, per_image
from monai_salm.perturbations.voxels import require_voxel_labels

STEP = 0.25
"""One descent step, as a fraction of the budget."""


def checkerboard(image: Tensor, cell: int) -> Tensor:
    """+1 and -1 in cells of ``cell`` voxels, of the shape of (B, C, *spatial) images."""
    places = (torch.arange(size, device=image.device) for size in image.shape[2:])
    cells = torch.stack(torch.meshgrid(*(place // cell for place in places), indexing="ij"))
    return (1.0 - 2.0 * (cells.sum(0) % 2)).expand(image.shape)


class LabelMarker(Perturbation):
    """Control of every method that follows the label: a checkerboard of the full budget in each labeled voxel.

    Uses no network and no optimization.

    Args:
        cell: side of a cell in voxels.

    Raises:
        ValueError: When ``cell`` is below 1.
    """

    def __init__(self, *, cell: int = 2) -> None:
        if cell < 1:
            raise ValueError(f"cell is {cell}; use 1 voxel or more")
        self.cell = cell

    def compute(self, objective: Objective, batch: Batch, start: Tensor, generator: torch.Generator) -> Tensor:
        image, label, lattice = batch
        require_voxel_labels(image, label)
        return checkerboard(image, self.cell) * lattice.levels * (label > 0)


class ContourInterior(Perturbation):
    """Error-minimizing noise on the contour of the label and inside of it, weaker where the inside is smooth.

    After UMed (arXiv 2403.14250). Different from the original: signed gradient descent against the shared surrogate in
    place of two generator networks; the contour is the morphological gradient of the label; inside, the bound follows
    the local contrast (largest minus least intensity in 3 voxels per axis) in place of local binary patterns.

    Args:
        steps: descent steps.
        interior: least bound inside, as a fraction of the budget.
    """

    def __init__(self, *, steps: int = 8, interior: float = 0.25) -> None:
        self.steps, self.interior = steps, interior

    def compute(self, objective: Objective, batch: Batch, start: Tensor, generator: torch.Generator) -> Tensor:
        image, label, lattice = batch
        require_voxel_labels(image, label)
        contour, inside = self._regions(label)
        bound = (contour + inside * self._texture(image).clamp(min=self.interior)) * lattice.levels
        steps = start
        for _ in range(self.steps):
            gradient = self.gradient(objective, batch, steps, generator)
            steps = steps - STEP * lattice.levels * gradient.sign()
            steps = lattice.project(torch.maximum(torch.minimum(steps, bound), -bound))
        return steps

    @staticmethod
    def _regions(label: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, *spatial) 1 on the contour of what is labeled, and 1 inside of it."""
        pool = F.max_pool2d if label.ndim == 4 else F.max_pool3d
        labeled = (label > 0).float()
        grown, shrunk = pool(labeled, 3, 1, 1), 1 - pool(1 - labeled, 3, 1, 1)
        return grown - shrunk, shrunk

    @staticmethod
    def _texture(image: Tensor) -> Tensor:
        """Local contrast as a fraction of the image's largest, of the image's shape."""
        pool = F.max_pool2d if image.ndim == 4 else F.max_pool3d
        contrast = pool(image, 3, 1, 1) + pool(-image, 3, 1, 1)
        return contrast / per_image(contrast.flatten(1).amax(1).clamp(min=1e-6), image)


class SliceSpectrum(Perturbation):
    """Error-minimizing noise in labeled voxels, with spectra that differ from slice to slice and logits that move.

    After VoxShield (arXiv 2605.17345): loss minus ``spectrum`` times the distance between the amplitude spectra of
    adjacent slices' perturbations, minus ``logits`` times the mean change of the logits. Different from the original:
    signed gradient descent per case against the shared surrogate in place of a generator network, cross-entropy over
    evenly weighing classes in place of DiceCE, the file's own grid in place of a resampled one. Volumes only; the whole
    volume goes through the network at once.

    Args:
        steps: descent steps.
        spectrum: weight of the distance of spectra.
        logits: weight of the change of the logits.
    """

    def __init__(self, *, steps: int = 8, spectrum: float = 0.2, logits: float = 0.05) -> None:
        self.steps, self.spectrum, self.logits = steps, spectrum, logits

    def compute(self, objective: Objective, batch: Batch, start: Tensor, generator: torch.Generator) -> Tensor:
        image, label, lattice = batch
        if image.ndim != 5:
            raise ValueError(f"slices differ in volumes only, (B, C, H, W, D); the images are {tuple(image.shape)}")
        require_voxel_labels(image, label)
        labeled = (label > 0).float()
        noise = (torch.rand(image.shape, generator=generator) * 2 - 1).to(image.device)
        steps = lattice.project(start + labeled * noise)
        with torch.no_grad():
            before = objective.network.network(image)
        for _ in range(self.steps):
            diversity = self._diversity_gradient(objective, image, steps.round() * lattice.unit_step, before)
            objective.passes += len(image)  # the second one of this step, through the network itself
            gradient = self.gradient(objective, batch, steps, generator)
            gradient = gradient + diversity * lattice.unit_step.sign()
            steps = steps - STEP * lattice.levels * gradient.sign() * labeled
            steps = lattice.project(steps)
        return steps * labeled

    def _diversity_gradient(self, objective: Objective, image: Tensor, delta: Tensor, before: Tensor) -> Tensor:
        """Gradient by ``delta`` of the two terms that are subtracted from the loss; ``before``: logits of the image."""
        delta = delta.detach().requires_grad_(True)
        with torch.enable_grad():
            amplitude = torch.fft.fft2(delta.movedim(-1, 2)).abs()
            distance = (amplitude[:, :, 1:] - amplitude[:, :, :-1]).flatten(2).norm(dim=2).mean()
            moved = (objective.network.network(image + delta) - before).abs().mean()
            loss = -len(image) * (self.spectrum * distance + self.logits * moved)
            (gradient,) = torch.autograd.grad(loss, delta)
        return gradient
