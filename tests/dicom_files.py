# SPDX-License-Identifier: Apache-2.0
"""DICOM files for the tests of ``io.dicom``, and what every such test does with them."""

from __future__ import annotations

import io
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset

from monai_salm.io import dicom
from monai_salm.io.base import Case, RefusedError, StoredImage
from monai_salm.release.identity import UidMap

WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
UIDS = UidMap(bytes(range(32)))
ORIENTATIONS = {
    "axial": [1, 0, 0, 0, 1, 0],
    "axial flipped": [-1, 0, 0, 0, -1, 0],
    "coronal": [1, 0, 0, 0, 0, -1],
    "sagittal": [0, 1, 0, 0, 0, -1],
    "oblique": [0.9848, 0.1736, 0, -0.1677, 0.9511, 0.2588],
}


def bundled(name: str) -> Path:
    return Path(get_testdata_file(name, download=False))


def case_of(*paths: Path) -> Case:
    return Case("case-0", "dicom", paths, (), "group")


def parse(content: bytes) -> Dataset:
    return pydicom.dcmread(io.BytesIO(content))


def rewritten(content: bytes, change: Callable[[Dataset], None]) -> bytes:
    """A file with some attributes changed, written by pydicom."""
    dataset, buffer = parse(content), io.BytesIO()
    change(dataset)
    dataset.save_as(buffer)
    return buffer.getvalue()


def edited(path: Path, change: Callable[[Dataset], None], name: str = "CT_small.dcm", **options: bool) -> Path:
    """A copy of a bundled file with some attributes changed, written by pydicom."""
    dataset = pydicom.dcmread(bundled(name))
    change(dataset)
    dataset.save_as(path, **options)
    return path


def fitting_delta(image: StoredImage, levels: int = 1, density: float = 0.3) -> np.ndarray:
    """A sparse perturbation of exactly ``levels`` that every rule allows."""
    stored = torch.from_numpy(image.stored.astype(np.int64))
    allowed = image.codec.movable(stored) & image.codec.movable(stored + levels)
    chosen = np.random.default_rng(0).random(image.stored.shape) < density
    return np.where(allowed.numpy() & chosen, levels, 0).astype(np.int16)


def protect(path: Path, levels: int = 1, **options: Any) -> tuple[PurePosixPath, bytes, np.ndarray]:
    delta = fitting_delta(dicom.read(case_of(path), 2, options.get("window", "auto")), levels)
    options = {"spatial_dims": 2, "window": "auto", "uids": UIDS, "when": WHEN} | options
    ((name, content),) = dicom.protect(case_of(path), delta, **options)
    return name, content, delta


def reason(action: Callable[[], Any]) -> str:
    with pytest.raises(RefusedError) as caught:
        action()
    assert caught.value.__context__ is None or caught.value.__suppress_context__  # tracebacks show nothing else
    return caught.value.reason


def refusal(path: Path) -> str:
    return reason(lambda: dicom.read(case_of(path), 2))


def write_mr_series(
    folder: Path,
    orientation: list[float] = ORIENTATIONS["axial"],
    change: Callable[[Dataset, int], None] | None = None,
    n: int = 5,
) -> list[Path]:
    """A synthetic MR series of slices with 6 rows and 7 columns, in shuffled files; ``change`` edits slice k."""
    values = np.random.default_rng(1).integers(100, 1000, (n, 6, 7)).astype("<i2")
    normal = np.cross(orientation[:3], orientation[3:])
    paths = []
    for k in range(n):
        dataset = pydicom.dcmread(bundled("MR_small.dcm"))
        dataset.Rows, dataset.Columns, dataset.PixelData = 6, 7, values[k].tobytes()
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{k + 1}"
        dataset.PixelSpacing, dataset.ImageOrientationPatient = [0.5, 0.75], orientation
        dataset.ImagePositionPatient = [round(float(x), 4) for x in np.array([10, -20, 30]) + 2.5 * k * normal]
        if change:
            change(dataset, k)
        paths.append(folder / f"{(k * 3 + 1) % n}.{k}")
        dataset.save_as(paths[-1])
    return sorted(paths)


def headers_of(paths: list[Path]) -> list[Dataset]:
    return [dicom.read_header(path) for path in paths]


def write_enhanced(
    path: Path,
    orientation: list[float] = ORIENTATIONS["axial"],
    change: Callable[[Dataset], None] | None = None,
    *,
    frames: int = 5,
    sop_class: str = uid.EnhancedMRImageStorage,
    syntax: str = uid.ExplicitVRLittleEndian,
) -> Path:
    """An enhanced MR or CT image: frames of 32 rows and 36 columns that are not in spatial order."""
    kind = "CT" if sop_class == uid.EnhancedCTImageStorage else "MR"
    dataset = pydicom.dcmread(bundled(f"{kind}_small.dcm"))
    for keyword in (
        "ImagePositionPatient ImageOrientationPatient PixelSpacing SliceThickness RescaleSlope RescaleIntercept "
        "WindowCenter WindowWidth PixelPaddingValue SliceLocation"
    ).split():
        dataset.pop(keyword, None)
    values = np.random.default_rng(2).integers(900, 1200, (frames, 32, 36)).astype("<i2")
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = sop_class
    dataset.Rows, dataset.Columns, dataset.NumberOfFrames = 32, 36, frames
    dataset.PixelData, dataset.ContentQualification = values.tobytes(), "PRODUCT"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    shared = Dataset()
    shared.PlaneOrientationSequence = [_item(ImageOrientationPatient=orientation)]
    shared.PixelMeasuresSequence = [_item(PixelSpacing=[0.5, 0.75], SliceThickness=2.5)]
    own = []
    normal = np.cross(orientation[:3], orientation[3:])
    for k in range(frames):
        frame = Dataset()
        place = (k * 2) % frames  # frames need not be in spatial order
        position = [round(float(x), 4) for x in np.array([10, -20, 30]) + 2.5 * place * normal]
        frame.PlanePositionSequence = [_item(ImagePositionPatient=position)]
        setattr(frame, f"{kind}ImageFrameTypeSequence", [_item(FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"])])
        rescale = _item(RescaleSlope=1, RescaleIntercept=-1024 if kind == "CT" else 0)
        rescale.RescaleType = "HU" if kind == "CT" else "US"
        frame.PixelValueTransformationSequence = [rescale]
        own.append(frame)
    dataset.SharedFunctionalGroupsSequence, dataset.PerFrameFunctionalGroupsSequence = [shared], own
    if change:
        change(dataset)
    if syntax not in (uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian):
        plugin = "pyjpegls" if syntax == uid.JPEGLSLossless else "pylibjpeg"
        dataset.compress(syntax, encoding_plugin=plugin, generate_instance_uid=False)
    dataset.save_as(path)
    return path


def _item(**attributes: Any) -> Dataset:
    item = Dataset()
    for keyword, value in attributes.items():
        setattr(item, keyword, value)
    return item
