# SPDX-License-Identifier: Apache-2.0
"""A bank of random perturbations for tests of transforms, and what they compare."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from monai_salm.bank import PerturbationBank, Record, image_digest
from monai_salm.io import formats
from monai_salm.io.base import Case
from monai_salm.perturbations.budget import Budget
from monai_salm.release.catalog import Catalog
from monai_salm.stored import StoredCodec

BUDGET = Budget.parse("8/255")


CODEC = StoredCodec("int16", window=(0.0, 255.0))


def save_nifti(path: Path, voxels: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(voxels, np.diag([-1, 1, 2, 1])), path)
    return path


def delta_of(image: formats.StoredImage, seed: int) -> torch.Tensor:
    """A random change of every voxel that may move, within the budget."""
    stored = image.stored.astype(np.int64) if image.stored.dtype.kind in "iu" else image.stored
    lower, upper = image.codec.bounds(torch.from_numpy(stored), BUDGET)
    up = torch.rand(lower.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return torch.where(up, upper, lower)


def fit(cases: tuple[Case, ...], path: Path, spatial_dims: int) -> PerturbationBank:
    bank = PerturbationBank(path, create=True)
    records = []
    for seed, case in enumerate(cases):
        image = formats.read(case, spatial_dims)
        levels = image.codec.levels(BUDGET)
        records.append(
            Record(case.sample_id, delta_of(image, seed), image_digest(image.stored), levels, image.codec.step)
        )
    bank.commit(records, round_=0, score=0.0, state=b"")
    return bank


def items(export: Catalog) -> list[dict]:
    return [{"image": case, "label": index} for index, case in enumerate(export.cases)]


def equal(image: torch.Tensor | np.ndarray, expected: np.ndarray) -> bool:
    return np.array_equal(np.asarray(image), expected)
