# SPDX-License-Identifier: Apache-2.0
"""Small exports on disk for the tests of ``release``."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid

SIZE = 16


def write_nifti(path: Path, seed: int = 0, shape: tuple[int, ...] = (6, 7, 5)) -> Path:
    """An int16 volume of noise around 500."""
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(seed).integers(0, 1000, shape).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.diag([1, 1, 2, 1])), path)
    return path


def write_series(folder: Path, name: str, n_slices: int = 4, *, patient: str = "P1", prefix: str = "") -> list[Path]:
    """A CT series of small slices; its UIDs follow from ``name``, the files are not in slice order."""
    folder.mkdir(parents=True, exist_ok=True)
    template = dcmread(get_testdata_file("CT_small.dcm", download=False))
    for keyword in ("PixelPaddingValue", "SmallestImagePixelValue", "LargestImagePixelValue"):
        if keyword in template:
            delattr(template, keyword)
    paths = []
    for index in range(n_slices):
        rng = np.random.default_rng([index, *name.encode()])
        template.Rows = template.Columns = SIZE
        template.PixelData = rng.integers(900, 1200, (SIZE, SIZE)).astype(np.int16).tobytes()
        template.PatientID, template.PatientName = patient, f"Name^{patient}"
        template.StudyInstanceUID = generate_uid(entropy_srcs=[patient])
        template.SeriesInstanceUID = generate_uid(entropy_srcs=[name])
        template.SOPInstanceUID = generate_uid(entropy_srcs=[name, str(index)])
        template.file_meta.MediaStorageSOPInstanceUID = template.SOPInstanceUID
        template.ImagePositionPatient = [0, 0, 2.5 * index]
        template.InstanceNumber = index + 1
        paths.append(folder / f"{prefix}IM{(index * 37 + 50) % 97:02d}")
        template.save_as(paths[-1])
    return paths


def write_npz(path: Path, shape: tuple[int, ...] = (8, 8), counts: tuple[int, ...] = (8, 4, 4)) -> Path:
    """A MedMNIST archive of noise with two classes."""
    rng = np.random.default_rng(0)
    content = {}
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        content[f"{split}_images"] = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        content[f"{split}_labels"] = (np.arange(count, dtype=np.uint8) % 2)[:, None]
    np.savez_compressed(path, **content)
    return path


def write_labels(folder: Path, rows: list[str]) -> Path:
    """``labels.csv`` with the given lines."""
    header = "case,label,split" if rows[0].count(",") == 2 else "case,label"
    (folder / "labels.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder / "labels.csv"
