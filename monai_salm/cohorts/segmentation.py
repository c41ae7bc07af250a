# SPDX-License-Identifier: Apache-2.0
"""The segmentation task: lesions of random place, size and contrast, with voxel labels, in the Decathlon layout.

``imagesTr`` and ``labelsTr`` hold NIfTI files of equal names, ``dataset.json`` pairs them, and ``labels.csv``
(``case,mask,split``) splits them by patient. A lesion may lie anywhere in the brain and be darker or brighter than it,
so that neither place nor intensity alone tells where it is. The files differ in stored type, scaling, orientation and
in which header field tells their place, as exports from several scanners do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from monai_salm.cohorts.anatomy import Geometry, acquire, deform
from monai_salm.cohorts.export import Plan, Study, digest, table, to_stored, write_nifti
from monai_salm.cohorts.lesions import add_lesions

__all__ = ["plan", "simulate"]

LESIONS = {"radius": (8, 18), "contrast": (0.22, 0.42), "noise": 0.03, "scalp": True}  # alike in slices and volumes
GEOMETRY = {
    2: Geometry(
        dim=2,
        box=((14, 182), (16, 220), (48, 126)),
        shape=(80, 96, 26),
        spacing=(2.1, 2.125, 3.0),
        level_step=4,
        **LESIONS,
    ),
    3: Geometry(
        dim=3,
        box=((14, 110), (60, 172), (44, 140)),
        shape=(48, 56, 48),
        spacing=(2.0, 2.0, 2.0),
        level_step=1,
        **LESIONS,
    ),
}
DEFAULT_PATIENTS = {2: 96, 3: 160}
SLICES = 3  # of a 2D study
FRACTIONS = {"test": 0.25, "val": 0.125}  # of the patients; the others are for training
MAX_LESIONS = 3
EMPTY_PERIOD = 20  # every twentieth image of a split has no lesion
# What the files of a patient hold, and slope and intercept of their header; 8-bit files are scaled to their study.
STORED = (
    (np.int16, (1.1, -16.0)),
    (np.uint8, None),
    (np.int16, (0.625, 0.0)),
    (np.float32, None),
)
CODES = ((1, 1), (2, 0), (0, 1))  # sform and qform code of a patient's headers
TURNED_PERIOD = 5  # every fifth patient's files run to the left and to posterior; the others to right and anterior


def plan(spatial_dims: int, seed: int, n_patients: int | None = None) -> Plan:
    """Decide all studies, files and splits, and how many lesions each image has.

    Args:
        spatial_dims: 2 for three single-slice files of shape (80, 96, 1) per patient, 3 for a volume of shape
            (48, 56, 48).
        seed: decides everything random.
        n_patients: at least 6; by default 96 in 2D (288 cases) and 160 in 3D.
    """
    n_patients = DEFAULT_PATIENTS[spatial_dims] if n_patients is None else n_patients
    rng = np.random.default_rng([spatial_dims, seed, n_patients])
    left, splits = rng.permutation(n_patients), {}
    for split, fraction in FRACTIONS.items():
        splits[split], left = np.split(left, [max(1, round(fraction * n_patients))])
    studies = []
    for split, patients in {**splits, "train": left}.items():
        per_patient = SLICES if spatial_dims == 2 else 1
        deal = np.arange(per_patient * len(patients))
        counts = rng.permutation(np.where(deal % EMPTY_PERIOD == EMPTY_PERIOD - 1, 0, 1 + deal % MAX_LESIONS))
        for patient, n_lesions in zip(sorted(patients.tolist()), counts.reshape(-1, per_patient), strict=True):
            names = _names(spatial_dims, seed, patient)
            files = tuple(f"{folder}/{name}" for folder in ("imagesTr", "labelsTr") for name in names)
            own = tuple(n_lesions.tolist())
            studies.append(_Study(GEOMETRY[spatial_dims], seed, patient, 0, files, split, own))
    studies.sort(key=lambda study: study.patient)
    rows = [(*pair, study.split) for study in studies for pair in study.pairs]
    tables = {
        "dataset.json": _dataset_json(spatial_dims, rows),
        "labels.csv": table(("case", "mask", "split"), rows),
    }
    return Plan(GEOMETRY[spatial_dims], tuple(studies), tables)


def simulate(
    template: NDArray[np.float32], n_lesions: Sequence[int], geometry: Geometry, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Draw the magnitude image of one study, and which of its voxels are lesion.

    Args:
        template: what `load_template` returns.
        n_lesions: one number for a volume; in 2D one for each slice of the result.
        geometry: that of the template.
        rng: decides everything random.

    Returns:
        Physical values and mask, shape (X, Y, Z), axes pointing right, anterior, superior; in 2D, Z is the length of
        `n_lesions`.
    """
    t1, tissue = deform(template, geometry, len(n_lesions), rng)
    mask = np.zeros(t1.shape, dtype=np.uint8)
    for index, count in enumerate(n_lesions):
        target = ... if geometry.dim == 3 else np.s_[:, :, index]
        t1[target], mask[target] = add_lesions(t1[target], tissue[target], count, geometry, rng)
    return acquire(t1, geometry, rng), mask


@dataclass(frozen=True)
class _Study(Study):
    """A study and the number of lesions in each of its images. Its files are the images, then their masks."""

    split: str
    n_lesions: tuple[int, ...]

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Relative paths of each image and its mask."""
        half = len(self.files) // 2
        return tuple(zip(self.files[:half], self.files[half:], strict=True))

    def write(self, root: Path, template: NDArray[np.float32]) -> None:
        physical, mask = simulate(template, self.n_lesions, self.geometry, self.generator("lesions"))
        stored, scaling = _store(physical, self.patient)
        codes = CODES[self.patient % len(CODES)]
        turned = self.patient % TURNED_PERIOD == TURNED_PERIOD - 1
        for index, names in enumerate(self.pairs):
            affine = self.slice_affine(index)
            if turned:
                affine = affine @ _turn(mask.shape)
            for name, voxels, its_scaling in zip(names, (stored, mask), (scaling, None), strict=True):
                part = voxels if self.geometry.dim == 3 else voxels[:, :, index : index + 1]
                write_nifti(root / name, part[::-1, ::-1] if turned else part, affine, its_scaling, codes)


def _names(dim: int, seed: int, patient: int) -> list[str]:
    tag = digest(dim, seed, patient, "lesions").hex()[:6].upper()
    endings = [f"_{index:02d}" for index in range(SLICES)] if dim == 2 else [""]
    return [f"PAT{patient:03d}_{tag}{ending}.nii.gz" for ending in endings]


def _dataset_json(dim: int, rows: Sequence[tuple[str, str, str]]) -> bytes:
    content = {
        "name": "DemoLesions",
        "description": "Simulated lesions in deformed copies of the MNI152 template",
        "reference": "monai_salm demo",
        "licence": "Apache-2.0; template: see nilearn",
        "release": "1.0",
        "tensorImageSize": f"{dim}D",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "lesion"},
        "numTraining": len(rows),
        "numTest": 0,
        "training": [{"image": f"./{image}", "label": f"./{mask}"} for image, mask, _ in rows],
        "test": [],
    }
    return (json.dumps(content, indent=1) + "\n").encode()


def _store(physical: NDArray[np.float32], patient: int) -> tuple[NDArray[np.generic], tuple[float, float] | None]:
    """The voxels of a patient's file, and the scaling of its header."""
    dtype, scaling = STORED[patient % len(STORED)]
    if dtype == np.float32:
        return physical, None
    if scaling is None:
        low, high = np.percentile(physical, (0.5, 99.5)).astype(np.float32).tolist()
        scaling = (float(np.float32((high - low) / 255)), low)
    limits = np.iinfo(dtype)
    return to_stored(physical, *scaling, limits.min, limits.max).astype(dtype), scaling


def _turn(shape: Sequence[int]) -> NDArray[np.float64]:
    """Voxel indices counted from the other end of the first two axes, as indices counted from this one."""
    turn = np.diag([-1.0, -1.0, 1.0, 1.0])
    turn[:2, 3] = shape[0] - 1, shape[1] - 1
    return turn
