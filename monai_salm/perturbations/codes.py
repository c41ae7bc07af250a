# SPDX-License-Identifier: Apache-2.0
"""Class codes: one texture per class that a surrogate learns to read before there are any perturbations."""

from __future__ import annotations

import torch
from torch import Tensor

CYCLES = (4.0, 8.0)
"""Cycles per image: coarse enough to survive resampling, and the same whatever size a network sees. The second is used
only when there are more classes than directions of the first keep apart."""
BANDWIDTH = 2.0
"""Standard deviation of a code's spectrum around its center, in cycles per image."""
CANDIDATES = 1024


def class_codes(spatial_size: tuple[int, ...], classes: int, seed: int) -> Tensor:
    """Band-limited random textures of +1 and -1 that flips and small rotations leave recognizable.

    Each class has a direction and a fineness of its own; a farthest-point search, which starts at the first axis,
    spreads them. All lie in the positive orthant: a flip maps a texture to one of the same class.

    Args:
        spatial_size: size of the network's input.
        classes: number of codes.
        seed: secret of the release; another seed gives other textures.

    Returns:
        (classes, 1, *spatial_size) float tensor.

    Example:
        >>> codes = class_codes((32, 32), 3, seed=0)
        >>> codes.shape, sorted(codes.unique().tolist())
        (torch.Size([3, 1, 32, 32]), [-1.0, 1.0])
    """
    generator = torch.Generator().manual_seed(seed)
    axes = [torch.fft.fftfreq(size) * size for size in spatial_size]
    frequency = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).abs()
    codes = []
    for center in _centers(len(spatial_size), classes):
        band = torch.exp(-((frequency - center) ** 2).sum(-1) / (2 * BANDWIDTH**2))
        noise = torch.randn(spatial_size, generator=generator)
        texture = torch.fft.ifftn(torch.fft.fftn(noise) * band).real
        codes.append(torch.where(texture >= 0, 1.0, -1.0))
    return torch.stack(codes)[:, None]


def _centers(dims: int, count: int) -> Tensor:
    """(count, dims) frequencies in cycles per image, far from each other."""
    directions = torch.randn(CANDIDATES, dims, generator=torch.Generator().manual_seed(0)).abs()
    directions = torch.cat([torch.eye(dims), torch.ones(1, dims), directions])
    directions = directions / directions.norm(dim=1, keepdim=True)
    shells = CYCLES if count > dims + 1 else CYCLES[:1]
    candidates = torch.cat([directions * cycles for cycles in shells])
    chosen = candidates[:1]
    while len(chosen) < count:
        farthest = torch.cdist(candidates, chosen).amin(1).argmax()
        chosen = torch.cat([chosen, candidates[farthest][None]])
    return chosen
