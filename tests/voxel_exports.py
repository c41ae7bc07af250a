# SPDX-License-Identifier: Apache-2.0
"""Exports with voxel labels for tests: NIfTI pairs, Decathlon folders, DICOM series with segmentations."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from exports import SIZE, class_map, edit_dicom, write_label, write_nifti, write_segmentation, write_series
from pydicom import dcmread

from monai_salm.io.base import Case
from monai_salm.release.catalog import Catalog
from monai_salm.release.labels import Cohort

SHAPE = (6, 7, 5)


def reasons(cohort: Cohort | Catalog) -> dict[str, int]:
    return dict(Counter(refusal.reason for refusal in cohort.refusals))


def names(cases: tuple[Case, ...]) -> list[str]:
    return [case.names[0] for case in cases]


def edit_dataset(root: Path, **changes: Any) -> None:
    path = root / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_pairs(root: Path, count: int = 4, values: int = 3) -> list[str]:
    """NIfTI pairs without ``dataset.json``; rows of a table that names them."""
    for index in range(count):
        write_nifti(root / "images" / f"v{index}.nii.gz", index)
        write_label(root / "masks" / f"m{index}.nii.gz", class_map(SHAPE, index, values))
    return [f"images/v{index}.nii.gz,masks/m{index}.nii.gz" for index in range(count)]


def write_segmented(root: Path, patients: str = "AB", slices: int = 4) -> dict[str, np.ndarray]:
    """A series with its SEG file in one folder per patient; the class indices by patient."""
    truth = {}
    for patient in patients:
        paths = write_series(root / patient, patient, slices, patient=patient)
        classes = np.random.default_rng(ord(patient)).integers(0, 3, (slices, SIZE, SIZE))
        truth[patient] = classes.astype(np.uint8)
        pixels = np.stack([classes == 1, classes == 2], -1).astype(np.uint8)
        write_segmentation(root / patient / "seg", paths, pixels)
    return truth


def name_only_the_series(dataset: Any) -> None:
    del dataset.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        del frame.DerivationImageSequence


def write_one_for_two_series(root: Path, shift: float = 0.0, sources: bool = True) -> dict[str, np.ndarray]:
    """Patient Z with two series and one segmentation of both; the class indices by series.

    Args:
        root: where to.
        shift: mm that the second series lies higher than the first one.
        sources: whether frames name their source images.
    """
    truth = {}
    for name in "XY":
        paths = write_series(root / "Z" / name, name, 4, patient="Z")
        for index, path in enumerate(paths if name == "Y" else ()):
            edit_dicom(path, lambda dataset, z=2.5 * index + shift: setattr(dataset, "ImagePositionPatient", [0, 0, z]))
        truth[name] = np.random.default_rng(ord(name)).integers(0, 3, (4, SIZE, SIZE)).astype(np.uint8)
        pixels = np.stack([truth[name] == 1, truth[name] == 2], -1).astype(np.uint8)
        write_segmentation(root / "Z" / f"seg{name}", paths, pixels)
    other = dcmread(root / "Z" / "segY")
    (root / "Z" / "segY").unlink()

    def join(dataset: Any) -> None:
        for keyword in ("ReferencedSeriesSequence", "PerFrameFunctionalGroupsSequence"):
            dataset[keyword].value.extend(other[keyword].value)
        for frame in () if sources else dataset.PerFrameFunctionalGroupsSequence:
            del frame.DerivationImageSequence
        dataset.NumberOfFrames += other.NumberOfFrames
        dataset.PixelData += other.PixelData

    edit_dicom(root / "Z" / "segX", join)
    return truth


def move_last_frame(dataset: Any) -> None:
    dataset.PerFrameFunctionalGroupsSequence[-1].PlanePositionSequence[0].ImagePositionPatient = [0, 0, 99]
