# SPDX-License-Identifier: Apache-2.0
"""Class codes: one texture per class that a surrogate learns to read before there are any perturbations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
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
EXCHANGE_GAIN = 0.1
"""Two classes exchange their codes where that lowers :py:func:`worth` by so much; smaller differences say little."""


class Examples(NamedTuple):
    """Images that tell which class gets which code.

    Args:
        images: N images (C, *spatial_size) in unit intensities; they are not read where they can tell nothing.
        labels: (N,) class indices.
        rms: root mean square of what a perturbation will change, in unit intensity.
    """

    images: Iterable[Tensor]
    labels: Tensor
    rms: float


def class_codes(spatial_size: tuple[int, ...], classes: int, seed: int, examples: Examples | None = None) -> Tensor:
    """Band-limited random textures of +1 and -1 that flips and small rotations leave recognizable.

    Each class has a direction and a fineness of its own; a farthest-point search, which starts at the first axis,
    spreads them. All lie in the positive orthant: a flip maps a texture to one of the same class. With examples,
    classes exchange codes until those who read them learn little that helps on clean images (:py:func:`worth`): a code
    that a class resembles by nature teaches what it is meant to hide.

    Args:
        spatial_size: size of the network's input.
        classes: number of codes.
        seed: secret of the release; another seed gives other textures.
        examples: clean images, two of each class or more. They tell nothing of 40 classes or more: no two of them
            are in enough pairs for an exchange to gain :py:data:`EXCHANGE_GAIN`.

    Returns:
        (classes, 1, *spatial_size) float tensor.

    Example:
        >>> codes = class_codes((32, 32), 3, seed=0)
        >>> codes.shape, sorted(codes.unique().tolist())
        (torch.Size([3, 1, 32, 32]), [-1.0, 1.0])
    """
    centers = _far_apart(_leveled(len(spatial_size), classes), classes)
    few = 1 < classes and EXCHANGE_GAIN < 4 / classes  # an exchange is of less than 4 / classes of all pairs
    if few and examples is not None and int(examples.labels.bincount(minlength=classes).min()) > 1:
        centers = centers[_order(spatial_size, centers, examples)]
    return _textures(spatial_size, centers, BANDWIDTH, seed)


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


def worth(plain: Tensor, own: Tensor, labels: Tensor, codes: Tensor) -> float:
    """What a reader of class codes is worth on clean images: 1.0 tells all classes apart, 0.5 none, 0.0 takes each for
    the other.

    The reader is linear (Fisher's discriminant) in the logarithm of an image's power at the frequencies of the codes.
    It learns from images that have the code of their class on them. The worth is the area under the ROC curve, as of
    normally distributed values, mean over all pairs of classes.

    Args:
        plain: (N, n) logarithm of the power of clean images at n frequencies.
        own: (N, n) the same with a code of this frequency on the image.
        labels: (N,) class indices; two or more of each class.
        codes: (classes,) which of the frequencies is that of each class.

    Example:
        >>> power = torch.tensor([[1.0, 2.0], [1.2, 2.3], [2.0, 1.0], [2.3, 1.2]]).log()
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> [round(worth(power, power + 1, labels, torch.tensor(codes)), 2) for codes in ((0, 1), (1, 0))]
        [0.0, 1.0]
    """
    clean = plain[:, codes]
    coded = clean.scatter(1, labels[:, None], own.gather(1, codes[labels][:, None]))
    (natural, spread), (learned, within) = (_moments(values, labels) for values in (clean, coded))
    reader = torch.linalg.solve(within, learned.T).T
    gain = _of_pairs(reader @ natural.T) / (2 * _of_pairs(reader @ spread @ reader.T)).sqrt()
    return float(torch.special.ndtr(gain).mean())


def _order(spatial_size: tuple[int, ...], centers: Tensor, examples: Examples) -> Tensor:
    """(classes,) which of the centers each class gets: exchanges, the best first, as long as one gains enough."""
    plain, own = _log_powers(spatial_size, centers, examples)
    order = torch.arange(len(centers))
    least = worth(plain, own, examples.labels, order)
    while True:
        options = [_exchanged(order, *pair) for pair in itertools.combinations(range(len(order)), 2)]
        found = [worth(plain, own, examples.labels, option) for option in options]
        if not min(found) <= least - EXCHANGE_GAIN:  # so that NaN is no reason either
            return order
        order, least = options[found.index(min(found))], min(found)


def _exchanged(order: Tensor, first: int, second: int) -> Tensor:
    other = order.clone()
    other[[first, second]] = order[[second, first]]
    return other


def _log_powers(spatial_size: tuple[int, ...], centers: Tensor, examples: Examples) -> tuple[Tensor, Tensor]:
    """(N, n) logarithms of the power of each image around n centers, without and with a code of that frequency."""
    axes, count = tuple(range(1, 1 + len(spatial_size))), math.prod(spatial_size)
    bands = torch.stack([_band(spatial_size, center, BANDWIDTH).square().flatten() for center in centers]).double()
    bands /= bands.sum(1, keepdim=True)
    powers = []
    for image in examples.images:
        values = image.cpu().double()
        spectrum = torch.fft.fftn(values - values.mean(axes, keepdim=True), dim=axes)
        powers.append(bands @ spectrum.abs().square().mean(0).flatten() / count)
    plain = torch.stack(powers) + 1e-6 * examples.rms**2  # that of a blank image is 0
    return plain.log(), (plain + examples.rms**2 * count * bands.square().sum(1)).log()


def _moments(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(classes, n) means of (N, n) values by class, and their (n, n) covariance within classes."""
    members = F.one_hot(labels).to(values)
    means = members.T @ values / members.sum(0)[:, None]
    rest = values - means[labels]
    within = rest.T @ rest / len(rest)
    return means, within + 1e-6 * torch.eye(len(within)).to(within)  # blank images do not differ


def _of_pairs(products: Tensor) -> Tensor:
    """(a - b) x (a - b) for all pairs of classes a and b, of their products a x b."""
    own = products.diagonal()
    differences = own[:, None] + own[None] - products - products.T
    return differences[torch.triu_indices(len(own), len(own), 1).unbind()]


def _band(spatial_size: tuple[int, ...], center: Tensor, bandwidth: float) -> Tensor:
    """(*spatial_size) amplitude of a texture at each frequency, 1 at most."""
    frequency = torch.stack(torch.meshgrid(*map(torch.fft.fftfreq, spatial_size), indexing="ij"), -1).abs()
    distance = ((frequency - center) ** 2).sum(-1)
    return torch.exp((distance.min() - distance) / (2 * bandwidth**2))  # small images have few frequencies


def _textures(spatial_size: tuple[int, ...], centers: Tensor, bandwidth: float, seed: int) -> Tensor:
    """(count, 1, *spatial_size) noise of +1 and -1, each with a spectrum around one of (count, dims) ``centers``."""
    generator = torch.Generator().manual_seed(seed)
    codes = []
    for center in centers:
        noise = torch.randn(spatial_size, generator=generator)
        texture = torch.fft.ifftn(torch.fft.fftn(noise) * _band(spatial_size, center, bandwidth)).real
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
