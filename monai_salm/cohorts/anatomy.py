# SPDX-License-Identifier: Apache-2.0
"""Simulated T1-weighted heads with a focal lesion: the MNI152 template, varied by MONAI's random transforms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from monai.transforms import (
    Compose,
    Rand2DElastic,
    Rand3DElastic,
    RandAdjustContrast,
    RandBiasField,
    RandRicianNoise,
    Resize,
)
from numpy.typing import NDArray

__all__ = ["GEOMETRY", "LABELS", "Geometry", "load_template", "simulate"]

LABELS = ("none", "lesion")
FULL_SCALE = 2600.0  # physical value of template intensity 1


@dataclass(frozen=True)
class Geometry:
    """Where the images of one form lie in the template, and what a lesion looks like. Lengths are in millimeters."""

    box: tuple[tuple[int, int], ...]  # begin and end in voxels of the 1 mm template
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    level_step: int  # slices of `shape` from one exported slice to the next
    radius: tuple[float, float]
    contrast: tuple[float, float]  # in template intensity, where white matter is about 0.85
    noise: float


GEOMETRY = {
    2: Geometry(((14, 182), (22, 214), (57, 114)), (112, 128, 19), (1.5, 1.5, 3.0), 3, (13, 19), (0.27, 0.39), 0.025),
    3: Geometry(((20, 176), (24, 210), (0, 156)), (52, 62, 52), (3.0, 3.0, 3.0), 1, (24, 31), (0.46, 0.62), 0.02),
}


def load_template(dim: int) -> NDArray[np.float32]:
    """T1 intensity, gray and white matter fractions of the MNI152 template on the grid of the export: (3, X, Y, Z)."""
    try:
        from nilearn import datasets
    except ImportError as error:
        raise ImportError(
            "the demo cohort is made from the MNI152 template in nilearn, which is not installed; "
            "run: pip install 'monai-salm[demo]'"
        ) from error
    loaders = (datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    box = tuple(slice(begin, end) for begin, end in GEOMETRY[dim].box)
    maps = np.stack([np.asarray(load(resolution=1).dataobj, dtype=np.float32)[box] for load in loaders])
    return np.asarray(Resize(GEOMETRY[dim].shape, mode="area")(maps), dtype=np.float32)


def simulate(template: NDArray[np.float32], labels: Sequence[str], rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw the magnitude image of one study.

    Args:
        template: what `load_template` returns; slices lie in its third axis if it has the geometry of 2D.
        labels: one label for a volume; in 2D one for each slice of the result.
        rng: decides everything random.

    Returns:
        Physical values, shape (X, Y, Z), axes pointing right, anterior, superior; in 2D, Z is the number of labels.
    """
    dim = 3 if template.shape[1:] == GEOMETRY[3].shape else 2
    t1, gray, white = _deform_volume(template, rng) if dim == 3 else _deform_slices(template, len(labels), rng)
    t1 = t1 * (1 + rng.uniform(-0.06, 0.06) * gray + rng.uniform(-0.06, 0.06) * white)
    tissue = np.clip(gray + white, 0, 1)
    for index, label in enumerate(labels):
        if label != "none":
            target = ... if dim == 3 else np.s_[:, :, index]
            contrast = -rng.uniform(*GEOMETRY[dim].contrast)
            t1[target] = _add_lesion(t1[target], tissue[target], GEOMETRY[dim], contrast, rng)
    return _acquire(np.clip(t1, 0, None), dim, rng)


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


def _deform_volume(template: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    warp = Rand3DElastic(
        sigma_range=(4, 5),
        magnitude_range=(40, 110),  # before smoothing: about one voxel is left
        prob=1,
        rotate_range=(0.12, 0.12, 0.12),
        translate_range=(2, 2, 2),
        scale_range=(0.08, 0.08, 0.08),
        padding_mode="zeros",
    )
    return np.asarray(warp.set_random_state(_seed(rng))(template), dtype=np.float32)


def _deform_slices(template: NDArray[np.float32], n_slices: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Some levels of the template, equally far apart, all deformed alike in their plane."""
    step = GEOMETRY[2].level_step
    first = int(rng.integers(template.shape[3] - step * (n_slices - 1)))
    levels = template[..., first : first + step * n_slices : step]
    warp = Rand2DElastic(
        spacing=(24, 24),
        magnitude_range=(0.5, 1.8),
        prob=1,
        rotate_range=0.15,
        translate_range=(4, 4),
        scale_range=(0.08, 0.08),
        padding_mode="zeros",
    )
    channels = levels.transpose(0, 3, 1, 2).reshape(-1, *levels.shape[1:3])
    moved = np.asarray(warp.set_random_state(_seed(rng))(channels), dtype=np.float32)
    return moved.reshape(3, n_slices, *levels.shape[1:3]).transpose(0, 2, 3, 1)


def _add_lesion(
    image: NDArray[np.float32],
    tissue: NDArray[np.float32],
    geometry: Geometry,
    contrast: float,
    rng: np.random.Generator,
) -> NDArray[np.float32]:
    """`image` with a soft ellipsoid of even intensity, `contrast` off that of its tissue, inside the brain."""
    points = np.argwhere(tissue > 0.8)
    # A solid ellipsoid with half axis R has standard deviation R / sqrt(n + 2) along it: keep the inner 70 percent.
    offset = (points - points.mean(axis=0)) / (points.std(axis=0) * np.sqrt(tissue.ndim + 2))
    inner = points[np.linalg.norm(offset, axis=1) < 0.7]
    center = rng.choice(inner)
    radii = rng.uniform(*geometry.radius) / geometry.spacing[0] * rng.uniform(0.8, 1.25, tissue.ndim)
    grid = np.ogrid[tuple(slice(n) for n in tissue.shape)]
    distance = np.sqrt(sum(((x - c) / r) ** 2 for x, c, r in zip(grid, center, radii, strict=True)))
    weight = 0.85 / (1 + np.exp(np.clip((distance - 1) / rng.uniform(0.08, 0.2), -30, 30)))
    weight = weight * np.clip(image / 0.3, 0, 1)  # the air stays as it is
    return (image + weight * (image[tuple(inner.T)].mean() + contrast - image)).astype(np.float32)


def _acquire(t1: NDArray[np.float32], dim: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Contrast, coil shading and Rician noise of a scan; the air is not zero afterwards."""
    scanner = Compose(
        [
            RandAdjustContrast(prob=1, gamma=(0.88, 1.15)),
            RandBiasField(prob=1, degree=3 if dim == 2 else 2, coeff_range=(-0.05, 0.05)),
            RandRicianNoise(prob=1, std=float(rng.uniform(0.6, 1.4)) * GEOMETRY[dim].noise, sample_std=False),
        ]
    ).set_random_state(_seed(rng))
    channels = t1[None] if dim == 3 else t1.transpose(2, 0, 1)
    image = np.asarray(scanner(channels), dtype=np.float32)
    image = image[0] if dim == 3 else image.transpose(1, 2, 0)
    return image * np.float32(FULL_SCALE * rng.uniform(0.8, 1.1))
