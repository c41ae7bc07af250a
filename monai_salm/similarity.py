# SPDX-License-Identifier: Apache-2.0
"""How alike two images look: structural similarity, fast and in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["structural_similarity"]

_WINDOW, _SIGMA = 11, 1.5  # of the Gaussian, in voxels
_C1, _C2 = 0.01**2, 0.03**2  # of the paper, for a data range of 1
_SLAB = 32
"""Places along the first axis that are computed at once."""


def structural_similarity(one: Tensor, other: Tensor) -> Tensor:
    """SSIM of pairs of images (Wang et al. 2004, doi:10.1109/TIP.2003.819861).

    The window has 11 voxels per axis (sigma 1.5), or the largest odd number that fits where the image is smaller. The
    mean of what MONAI's ``SSIMMetric`` computes, but axis by axis, since a Gaussian is a product of its axes': 33
    multiplications for each voxel of a volume in place of 1,331. A volume is read in slabs, so that memory is bounded.

    Args:
        one: (B, C, *spatial) unit intensities.
        other: of the same shape.

    Returns:
        (B,) in [-1, 1], float64.

    Example:
        >>> ramp = torch.linspace(0, 1, 256).reshape(1, 1, 16, 16)
        >>> float(structural_similarity(ramp, ramp)), bool(structural_similarity(ramp, 1 - ramp) < 0)
        (1.0, True)
    """
    kernels = [_gaussian(min(_WINDOW, length - (length + 1) % 2)) for length in one.shape[2:]]
    rows, count = one.shape[2] - len(kernels[0]) + 1, 0
    total = torch.zeros(len(one), dtype=torch.float64, device=one.device)
    for start in range(0, rows, _SLAB):
        depth = min(_SLAB, rows - start) + len(kernels[0]) - 1
        alike = _similarity(one.narrow(2, start, depth), other.narrow(2, start, depth), kernels)
        total, count = total + alike.double().flatten(1).sum(1), count + alike[0].numel()
    return total / count


def _similarity(one: Tensor, other: Tensor, kernels: Sequence[list[float]]) -> Tensor:
    """SSIM in every place where the window lies inside."""
    mean, mean_other = _smooth(one, kernels), _smooth(other, kernels)
    variance = _smooth(one * one, kernels) - mean * mean
    variance_other = _smooth(other * other, kernels) - mean_other * mean_other
    covariance = _smooth(one * other, kernels) - mean * mean_other
    luminance = (2 * mean * mean_other + _C1) / (mean * mean + mean_other * mean_other + _C1)
    return luminance * (2 * covariance + _C2) / (variance + variance_other + _C2)


def _smooth(image: Tensor, kernels: Sequence[list[float]]) -> Tensor:
    """Weighted means of (B, C, *spatial) over the window, one kernel per axis, where the window lies inside."""
    for axis, kernel in enumerate(kernels, 2):
        length = image.shape[axis] - len(kernel) + 1
        parts = [image.narrow(axis, start, length) for start in range(len(kernel))]
        image = parts[0] * kernel[0]
        for part, weight in zip(parts[1:], kernel[1:], strict=True):
            image.add_(part, alpha=weight)
    return image


def _gaussian(size: int) -> list[float]:
    place = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weight = torch.exp(-place.square() / (2 * _SIGMA**2))
    return (weight / weight.sum()).tolist()  # type: ignore[no-any-return]
