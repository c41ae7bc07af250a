# SPDX-License-Identifier: Apache-2.0
"""Slices of volumes as a data set of many classes: which part of an axis a slice was taken from."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

__all__ = ["write_slices"]

SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}
AXIS, SIDE = 1, 40
"""The axis of the classes, and the side of a slice in voxels: smaller ones are padded with zeros, larger cropped."""
MARGIN = 0.05
"""Left out at either end of the axis, as a fraction of it; so is a fifth of every class at either end of its part."""


def write_slices(folder: Path, path: Path, classes: int, train: int) -> None:
    """Write an archive in the MedMNIST layout.

    Volumes are split by a fixed seed, so that no patient is in two parts. Intensities from 0 to percentile 99.5 of a
    volume become 8 bits.

    Args:
        folder: Decathlon folder; the volumes of ``imagesTr`` are taken.
        path: ``.npz`` file to write.
        classes: number of parts of the axis.
        train: least number of training slices; every volume gives as many of each class.

    Raises:
        ValueError: When the folder has too few volumes for three parts.
    """
    volumes = sorted(folder.glob("imagesTr/[!.]*.nii.gz"))
    rng = np.random.default_rng(0)
    rng.shuffle(volumes)  # type: ignore[arg-type]
    ends = np.round(np.cumsum([0, *SHARES.values()]) * len(volumes)).astype(int)
    if len(set(ends)) < len(ends):
        raise ValueError(f"{folder.name} has {len(volumes)} volumes in imagesTr; five or more are needed")
    each = -(-train // (int(ends[1]) * classes))
    arrays = {}
    for split, start, end in zip(SHARES, ends, ends[1:], strict=False):
        found = [_slices(volume, classes, each, rng) for volume in volumes[start:end]]
        arrays[f"{split}_images"] = np.concatenate(found)
        arrays[f"{split}_labels"] = np.tile(np.arange(classes, dtype=np.uint8).repeat(each), len(found))[:, None]
    np.savez(path, **arrays)


def _slices(path: Path, classes: int, each: int, rng: np.random.Generator) -> np.ndarray:
    """(classes * each, SIDE, SIDE) uint8, class by class."""
    volume = np.asarray(nib.load(path).dataobj, np.float32)
    volume = np.moveaxis(np.clip(volume / np.percentile(volume, 99.5), 0, 1), AXIS, 0)[..., :SIDE, :SIDE]
    part = np.arange(classes).repeat(each) + rng.uniform(0.2, 0.8, classes * each)
    chosen = volume[((MARGIN + part / classes * (1 - 2 * MARGIN)) * len(volume)).astype(int)]
    missing = [(0, SIDE - size) for size in chosen.shape[1:]]
    return np.round(np.pad(chosen, [(0, 0), *missing]) * 255).astype(np.uint8)
