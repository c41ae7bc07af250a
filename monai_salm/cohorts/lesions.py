# SPDX-License-Identifier: Apache-2.0
"""Simulated lesions: one dark spot near the middle of the brain, or some of either sign anywhere, with their mask."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from monai_salm.cohorts.anatomy import Geometry

__all__ = ["add_lesions", "add_spot"]

OPACITY = 0.85  # the rest of the tissue shows through
WAVES = 4  # plane waves that bend the surface of a lesion


def add_spot(
    image: NDArray[np.float32], tissue: NDArray[np.float32], geometry: Geometry, rng: np.random.Generator
) -> NDArray[np.float32]:
    """`image` with a dark, soft ellipsoid of even intensity inside the brain.

    Args:
        image: T1 intensity of a volume or a slice.
        tissue: brain tissue fraction, of the same shape.
        geometry: range of the lesion's radius and of its contrast, and the spacing.
        rng: decides everything random.
    """
    contrast = -rng.uniform(*geometry.contrast)
    points = np.argwhere(tissue > 0.8)
    # A solid ellipsoid with half axis R has standard deviation R / sqrt(n + 2) along it: keep the inner 70 percent.
    offset = (points - points.mean(axis=0)) / (points.std(axis=0) * np.sqrt(tissue.ndim + 2))
    inner = points[np.linalg.norm(offset, axis=1) < 0.7]
    center = rng.choice(inner)
    radii = rng.uniform(*geometry.radius) / geometry.spacing[0] * rng.uniform(0.8, 1.25, tissue.ndim)
    grid = np.ogrid[tuple(slice(n) for n in tissue.shape)]
    distance = np.sqrt(sum(((x - c) / r) ** 2 for x, c, r in zip(grid, center, radii, strict=True)))
    weight = _soft_ball(distance, rng.uniform(0.08, 0.2), OPACITY)
    weight = weight * np.clip(image / 0.3, 0, 1)  # the air stays as it is
    return (image + weight * (image[tuple(inner.T)].mean() + contrast - image)).astype(np.float32)


def add_lesions(
    image: NDArray[np.float32],
    tissue: NDArray[np.float32],
    n_lesions: int,
    geometry: Geometry,
    rng: np.random.Generator,
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """`image` with dark or bright, irregular, soft lesions anywhere in the brain, and where they are.

    A lesion differs from the mean of the tissue that it replaces by its contrast. Its mask is where its weight is
    above one half; lesions may touch or overlap.

    Args:
        image: T1 intensity of a volume or a slice.
        tissue: brain tissue fraction, of the same shape.
        n_lesions: how many; with 0 the mask is empty.
        geometry: range of the lesions' radius and of their contrast (without its sign), and the spacing.
        rng: decides everything random.
    """
    mask = np.zeros(image.shape, dtype=np.uint8)
    points = np.argwhere(tissue > 0.8)
    for _ in range(n_lesions):
        weight = _irregular_ball(image.shape, rng.choice(points), geometry, rng) * np.clip(2 * tissue, 0, 1)
        mask[weight > 0.5] = 1
        contrast = rng.choice((-1.0, 1.0)) * rng.uniform(*geometry.contrast)
        intensity = np.average(image, weights=weight) + contrast
        image = (image + OPACITY * weight * (intensity - image)).astype(np.float32)
    return image, mask


def _irregular_ball(
    shape: tuple[int, ...], center: NDArray[np.int64], geometry: Geometry, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Weight of an ellipsoid that lies obliquely, its surface bent a little by plane waves."""
    n = len(shape)
    axes, _ = np.linalg.qr(rng.normal(size=(n, n)))
    radii = rng.uniform(*geometry.radius) * rng.uniform(0.75, 1.3, n)
    place = np.moveaxis(np.indices(shape), 0, -1) - center
    place = place * np.array(geometry.spacing[:n]) @ axes / radii  # 1 at the end of each half axis
    distance = np.linalg.norm(place, axis=-1)
    waves = np.cos(place @ rng.normal(scale=2.0, size=(n, WAVES)) + rng.uniform(0, 2 * np.pi, WAVES))
    return _soft_ball(distance * (1 + 0.25 * waves.mean(axis=-1)), rng.uniform(0.06, 0.16))


def _soft_ball(distance: NDArray[np.float64], softness: float, height: float = 1.0) -> NDArray[np.float64]:
    """`height` inside, 0 outside, half of it at distance 1; `softness` is the width of the edge."""
    return height / (1 + np.exp(np.clip((distance - 1) / softness, -30, 30)))
