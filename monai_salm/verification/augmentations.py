# SPDX-License-Identifier: Apache-2.0
"""Random changes of a batch that a third party may train with, on top of the victims' own; voxel labels move along."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from monai.transforms import (
    Compose,
    RandAdjustContrast,
    RandBiasField,
    RandCoarseDropout,
    RandGaussianNoise,
    RandGaussianSmooth,
    RandHistogramShift,
    RandScaleIntensity,
    RandScaleIntensityFixedMean,
    RandSimulateLowResolution,
)
from monai.utils import convert_to_tensor
from torch import Tensor

from monai_salm.surrogates import RandomView

__all__ = ["Change", "cutout", "intensity", "nnunet", "strong_affine", "waves"]

Change = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""(B, C, *spatial) images and their truth, and what is random -> the same, augmented."""


def strong_affine(images: Tensor, truth: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rotations up to 45 degrees, zoom by up to 30 % and shifts by up to 15 % of the size."""
    view = RandomView(images.ndim - 2, rotate=math.pi / 4, scale=0.3, translate=0.15, contrast=0.0, noise=0.0)
    return _moved(view, images, truth, generator)


def intensity(images: Tensor, truth: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A smooth bias field, gamma, and a shifted histogram."""
    change = Compose(
        [
            RandBiasField(coeff_range=(-0.2, 0.2), prob=1.0),
            RandAdjustContrast(1.0, (0.6, 1.7)),
            RandHistogramShift(8, 1.0),
        ]
    )
    return _each(images, change, generator), truth


def cutout(images: Tensor, truth: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A box of half the size per axis is erased (arXiv 1708.04552)."""
    box = [max(1, size // 2) for size in images.shape[2:]]
    return _each(images, RandCoarseDropout(1, box, fill_value=0.0, prob=1.0), generator), truth


def nnunet(images: Tensor, truth: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What nnU-Net trains with (Isensee et al., Nature Methods 2021, supplement): rotation, zoom, mirroring, noise,
    blur, brightness, contrast, low resolution and gamma, at its rates and strengths, on images with zero mean and unit
    variance. Zoom ends at 1.3 in place of 1.4, and 36 % of the images are turned and zoomed, where it has 20 % each."""
    dims = images.ndim - 2
    turn = math.pi if dims == 2 else math.pi / 6
    view = RandomView(dims, rotate=turn, scale=0.3, translate=0.0, contrast=0.0, noise=0.0, affine_prob=0.36)
    images, truth = _moved(view, images, truth, generator)
    sigma = (0.5, 1.5)
    change = Compose(
        [
            RandGaussianNoise(0.15, std=math.sqrt(0.1)),
            RandGaussianSmooth(sigma, sigma, sigma, prob=0.2),
            RandScaleIntensity((-0.3, 0.3), 0.15),
            RandScaleIntensityFixedMean(0.15, (-0.35, 0.5), preserve_range=True),
            RandSimulateLowResolution(0.25, upsample_mode="bicubic" if dims == 2 else "trilinear"),
            RandAdjustContrast(0.15, (0.7, 1.5), invert_image=True, retain_stats=True),
            RandAdjustContrast(0.15, (0.7, 1.5), retain_stats=True),
        ]
    )
    axes = tuple(range(1, images.ndim))
    mean, scale = images.mean(axes, keepdim=True), images.std(axes, keepdim=True).clamp(min=1e-6)
    return mean + scale * _each((images - mean) / scale, change, generator), truth


def waves(images: Tensor, truth: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Four plane waves of any direction and length are added, each with an amplitude of at most 16/255: a network that
    is to see through them cannot rely on a texture."""
    each = (len(images), 4, *[1] * (images.ndim - 2))
    steps = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in images.shape[2:]), indexing="ij")
    cycles = torch.rand(len(steps), *each, generator=generator) - 0.5
    phase, height = torch.rand(each, generator=generator), 16 / 255 * torch.rand(each, generator=generator)
    turns = phase + sum(rate * step for rate, step in zip(cycles, steps, strict=True))
    added = (height * torch.sin(2 * math.pi * turns)).sum(1, keepdim=True)
    return images + added.to(images), truth


def _moved(view: RandomView, images: Tensor, truth: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    drawn = view.draw(len(images), generator)
    return view(images, drawn), truth if truth.ndim == 1 else view.move_labels(truth, drawn)


def _each(images: Tensor, change: Any, generator: torch.Generator) -> Tensor:
    change.set_random_state(seed=int(torch.randint(2**31, (), generator=generator)))
    return torch.stack([convert_to_tensor(change(image.clone()), track_meta=False) for image in images]).to(images)
