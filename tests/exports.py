# SPDX-License-Identifier: Apache-2.0
"""Small exports on disk for the tests of ``release``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom as hd
import nibabel as nib
import numpy as np
from pydicom import Dataset, dcmread
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
        template.StudyInstanceUID = generate_uid(entropy_srcs=[patient, "study"])
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


def write_label(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """A NIfTI label file on the grid of ``write_nifti``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([1, 1, 2, 1]) if affine is None else affine), path)
    return path


def class_map(shape: tuple[int, ...] = (6, 7, 5), seed: int = 0, classes: int = 3) -> np.ndarray:
    """uint8 voxel labels of noise; every class occurs."""
    voxels = np.random.default_rng(seed).integers(0, classes, shape).astype(np.uint8)
    voxels.flat[:classes] = np.arange(classes)
    return voxels


def write_decathlon(root: Path, count: int = 4, shape: tuple[int, ...] = (6, 7, 5), test: int = 0) -> Path:
    """A Decathlon folder of ``count`` pairs with classes background, Core, Rim, and ``test`` images without label."""
    names = [f"v{index:02d}.nii.gz" for index in range(count + test)]
    for index, name in enumerate(names):
        write_nifti(root / ("imagesTr" if index < count else "imagesTs") / name, index, shape)
        if index < count:
            write_label(root / "labelsTr" / name, class_map(shape, index))
    content = {
        "name": "Noise",
        "labels": {"0": "background", "1": "Core", "2": "Rim"},
        "numTraining": count,
        "numTest": test,
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names[:count]],
        "test": [f"./imagesTs/{name}" for name in names[count:]],
    }
    (root / "dataset.json").write_text(json.dumps(content, indent=1))
    return root


def write_segmentation(
    path: Path,
    sources: list[Path],
    pixels: np.ndarray,
    labels: tuple[str, ...] = ("Liver", "Tumor"),
    kind: str = "BINARY",
    **options: Any,
) -> Path:
    """A DICOM SEG file of a series, made by highdicom.

    Args:
        path: where to.
        sources: the slices.
        pixels: (slices, rows, columns, segments) booleans or fractions, or (slices, rows, columns) segment numbers.
        labels: of the segments.
        kind: ``BINARY``, ``FRACTIONAL`` or ``LABELMAP``.
        **options: of ``highdicom.seg.Segmentation``.
    """
    code = hd.sr.CodedConcept("85756007", "SCT", "Tissue")
    segments = [
        hd.seg.SegmentDescription(number, label, code, code, hd.seg.SegmentAlgorithmTypeValues.MANUAL)
        for number, label in enumerate(labels, 1)
    ]
    segmentation = hd.seg.Segmentation(
        [dcmread(source) for source in sources],
        pixels,
        kind,
        segments,
        series_instance_uid=generate_uid(entropy_srcs=[path.parent.name, path.name, "series"]),
        series_number=9,
        sop_instance_uid=generate_uid(entropy_srcs=[path.parent.name, path.name]),
        instance_number=1,
        manufacturer="Test",
        manufacturer_model_name="Test",
        software_versions="1",
        device_serial_number="1",
        **options,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    segmentation.save_as(path)
    return path


def edit_dicom(path: Path, change: Callable[[Dataset], None]) -> None:
    """Change a DICOM file in place."""
    dataset = dcmread(path)
    change(dataset)
    dataset.save_as(path)


def write_labels(folder: Path, rows: list[str], what: str = "label") -> Path:
    """``labels.csv`` with the given lines; ``what`` is ``"label"`` or ``"mask"``."""
    header = f"case,{what},split" if rows[0].count(",") == 2 else f"case,{what}"
    (folder / "labels.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder / "labels.csv"
