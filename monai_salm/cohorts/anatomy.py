# SPDX-License-Identifier: Apache-2.0
"""Simulated T1-weighted heads: the MNI152 template, varied by MONAI's random transforms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from monai.transforms import (
    Compose,
    DistanceTransformEDT,
    Rand2DElastic,
    Rand3DElastic,
    RandAdjustContrast,
    RandBiasField,
    RandRicianNoise,
    Resize,
)
from numpy.typing import NDArray

__all__ = ["Geometry", "acquire", "deform", "load_template"]

FULL_SCALE = 2600.0  # physical value of template intensity 1
SCALP = (8.0, 2.5, 1.4)  # distance from the brain and thickness in millimeters, template intensity


@dataclass(frozen=True)
class Geometry:
    """Where the images of one form lie in the template, and what a lesion looks like. Lengths are in millimeters.

    Volumes have `level_step` 1; the slices of a 2D study lie `level_step` slices of `shape` apart.
    """

    dim: int
    box: tuple[tuple[int, int], ...]  # begin and end in voxels of the 1 mm template
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    level_step: int
    radius: tuple[float, float]
    contrast: tuple[float, float]  # in template intensity, where white matter is about 0.85
    noise: float
    scalp: bool = False  # whether the fat around the head is drawn too


def load_template(geometry: Geometry) -> NDArray[np.float32]:
    """T1 intensity, gray and white matter fractions of the MNI152 template on the grid of the export: (3, X, Y, Z)."""
    try:
        from nilearn import datasets
    except ImportError as error:
        raise ImportError(
            "the demo cohort is made from the MNI152 template in nilearn, which is not installed; "
            "run: pip install 'monai-salm[demo]'"
        ) from error
    loaders = (datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    box = tuple(slice(begin, end) for begin, end in geometry.box)
    maps = np.stack([np.asarray(load(resolution=1).dataobj, dtype=np.float32)[box] for load in loaders])
    template = np.asarray(Resize(geometry.shape, mode="area")(maps), dtype=np.float32)
    return _add_scalp(template, geometry) if geometry.scalp else template


def deform(
    template: NDArray[np.float32], geometry: Geometry, n_slices: int, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Draw one person: the T1 intensity and the brain tissue fraction (gray and white matter) of a study.

    Args:
        template: what `load_template` returns; slices lie in its third axis.
        geometry: that of the template.
        n_slices: slices of a 2D study; a volume has all of them.
        rng: decides everything random.

    Returns:
        Two arrays of shape (X, Y, n_slices), axes pointing right, anterior, superior.
    """
    move = _deform_volume(template, rng) if geometry.dim == 3 else _deform_slices(template, geometry, n_slices, rng)
    t1, gray, white = move
    t1 = t1 * (1 + rng.uniform(-0.06, 0.06) * gray + rng.uniform(-0.06, 0.06) * white)
    return t1, np.clip(gray + white, 0, 1)


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


def _add_scalp(template: NDArray[np.float32], geometry: Geometry) -> NDArray[np.float32]:
    """`template` with the fat that its makers removed: the brightest tissue of a T1-weighted head.

    Without it a bright lesion would be the brightest thing in the image, above any window that percentiles give.
    """
    outside = (template[:1] < 0.1).astype(np.float32)
    distance = np.asarray(DistanceTransformEDT(sampling=geometry.spacing)(outside), dtype=np.float32)[0]
    center, thickness, intensity = SCALP
    scalp = np.exp(-(((distance - center) / thickness) ** 2)) * (distance > 0)
    return np.concatenate([template[:1] + intensity * scalp, template[1:]]).astype(np.float32)


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


def _deform_slices(
    template: NDArray[np.float32], geometry: Geometry, n_slices: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Some levels of the template, equally far apart, all deformed alike in their plane."""
    step = geometry.level_step
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


def acquire(t1: NDArray[np.float32], geometry: Geometry, rng: np.random.Generator) -> NDArray[np.float32]:
    """The physical values of a scan: contrast, coil shading and Rician noise; the air is not zero afterwards."""
    t1 = np.clip(t1, 0, None)
    scanner = Compose(
        [
            RandAdjustContrast(prob=1, gamma=(0.88, 1.15)),
            RandBiasField(prob=1, degree=3 if geometry.dim == 2 else 2, coeff_range=(-0.05, 0.05)),
            RandRicianNoise(prob=1, std=float(rng.uniform(0.6, 1.4)) * geometry.noise, sample_std=False),
        ]
    ).set_random_state(_seed(rng))
    channels = t1[None] if geometry.dim == 3 else t1.transpose(2, 0, 1)
    image = np.asarray(scanner(channels), dtype=np.float32)
    image = image[0] if geometry.dim == 3 else image.transpose(1, 2, 0)
    return image * np.float32(FULL_SCALE * rng.uniform(0.8, 1.1))
