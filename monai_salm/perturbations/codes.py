# SPDX-License-Identifier: Apache-2.0
"""Class codes: one texture per class that a surrogate learns to read before there are any perturbations."""

from __future__ import annotations

import torch
from torch import Tensor

CYCLES = (0.25, 0.4)
"""Spatial frequency of the class codes, in cycles per voxel of the network's input. The first is finer than most
anatomy, and coarse enough to survive a resampling to voxels a quarter larger. The second is added where there are so
many classes that directions alone do not keep them apart."""
BANDWIDTH = 0.036
"""Standard deviation of the Gaussian spectrum of a class code, in cycles per voxel."""
VOXEL_CYCLES = 0.4
"""Spatial frequency of the codes of voxel labels along their main axis, in cycles per voxel: finer than most anatomy.
Still finer or oblique waves disturb clean networks less, but victims learn them less well (`docs/voxel_labels.md`)."""
VOXEL_SPREAD = 0.2
"""Largest frequency of such a code along its other axes, in cycles per voxel; that of the first code is 0."""
VOXEL_BANDWIDTH = 0.04
"""As :py:data:`BANDWIDTH`, of the codes of voxel labels."""
CANDIDATES = 1024
"""Random frequencies among which those of the codes are chosen, far from each other."""


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
    return _textures(spatial_size, _far_apart(_leveled(len(spatial_size), classes), classes), BANDWIDTH, seed)


def voxel_codes(spatial_size: tuple[int, ...], classes: int, seed: int) -> Tensor:
    """Textures as of :py:func:`class_codes`, but finer. In volumes the background, class 0, has none.

    In slices, a texture of the background too keeps the other ones from harming networks that were trained on clean
    images. In volumes these are harmed little anyway, and with a texture of the background victims learn the classes
    all the same (`docs/voxel_labels.md`).

    Args:
        spatial_size: size of a patch.
        classes: number of classes, background included.
        seed: secret of the release.

    Returns:
        (classes, 1, *spatial_size) float tensor; of volumes the first is zero.
    """
    blank = 1 if len(spatial_size) == 3 else 0
    centers = _far_apart(_fine(len(spatial_size)), max(1, classes - blank))
    codes = _textures(spatial_size, centers, VOXEL_BANDWIDTH, seed)[: classes - blank]
    return torch.cat([torch.zeros(blank, 1, *spatial_size), codes])


def _textures(spatial_size: tuple[int, ...], centers: Tensor, bandwidth: float, seed: int) -> Tensor:
    """(count, 1, *spatial_size) noise of +1 and -1, each with a spectrum around one of (count, dims) ``centers``."""
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.stack(torch.meshgrid(*map(torch.fft.fftfreq, spatial_size), indexing="ij"), -1).abs()
    codes = []
    for center in centers:
        distance = ((frequency - center) ** 2).sum(-1)
        band = torch.exp((distance.min() - distance) / (2 * bandwidth**2))  # small images have few frequencies
        noise = torch.randn(frequency.shape[:-1], generator=generator)
        texture = torch.fft.ifftn(torch.fft.fftn(noise) * band).real
        codes.append(torch.where(texture >= 0, 1.0, -1.0))
    return torch.stack(codes)[:, None]


def _leveled(dims: int, count: int) -> Tensor:
    """(n, dims) frequencies in many directions, as long as the first of :py:data:`CYCLES` (for many codes, as both)."""
    directions = torch.randn(CANDIDATES, dims, generator=torch.Generator().manual_seed(0)).abs()
    directions = torch.cat([torch.eye(dims), torch.ones(1, dims), directions])
    directions = directions / directions.norm(dim=1, keepdim=True)
    return torch.cat([directions * cycles for cycles in (CYCLES if count > dims + 1 else CYCLES[:1])])


def _fine(dims: int) -> Tensor:
    """(n, dims) frequencies of :py:data:`VOXEL_CYCLES` along one axis; the first is 0 along the others."""
    others = VOXEL_SPREAD * torch.rand(CANDIDATES, dims, generator=torch.Generator().manual_seed(0))
    others[0] = 0.0
    return others.scatter(1, torch.arange(CANDIDATES)[:, None] % dims, VOXEL_CYCLES)


def _far_apart(candidates: Tensor, count: int) -> Tensor:
    """(count, dims): the first of the candidates, then always the one that is farthest from all chosen before."""
    chosen = candidates[:1]
    while len(chosen) < count:
        farthest = torch.cdist(candidates, chosen).amin(1).argmax()
        chosen = torch.cat([chosen, candidates[farthest][None]])
    return chosen
