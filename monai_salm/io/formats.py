# SPDX-License-Identifier: Apache-2.0
"""The table of formats, and their functions as other rooms call them, which all run in the child process.

A release consists of units, each released as a whole or not at all: a DICOM series or image, a PNG or TIFF file, a
NIfTI file with all its volumes, an archive with all its images, or all images that share a label file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path, PurePosixPath
from pickle import PickleBuffer
from typing import Any

import numpy as np

from monai_salm.io import dicom, nifti, npz, raster, worker
from monai_salm.io.base import Case, FileCheck, Outline, StoredImage, Window
from monai_salm.records import contiguous, image_digest

Deltas = Callable[[Case], np.ndarray]
"""(1, *spatial) lattice steps of a case, integers, in canonical axes."""


@dataclass(frozen=True)
class ProtectedFile:
    """One file of a release, not yet written.

    Args:
        source: the original it derives from.
        name: where it belongs, relative to the released folder.
        content: its bytes.
    """

    source: Path
    name: PurePosixPath
    content: bytes | memoryview

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the bytes as a separate buffer, as arrays are; inside the pickle they would be copied three times."""
        return ProtectedFile, (self.source, self.name, PickleBuffer(self.content))


@dataclass(frozen=True)
class Format:
    """The functions of one format: ``protect`` takes the cases of one unit, ``verify`` a file and its source."""

    read: Callable[[Case, int, Window], StoredImage]
    protect: Callable[..., Iterator[tuple[PurePosixPath, bytes]]]
    verify: Callable[..., FileCheck]


def _each_case(protect: Callable[..., Iterator[tuple[PurePosixPath, bytes]]]) -> Callable[..., Any]:
    """Make a function of one case and its delta one of a unit and its deltas."""

    def protect_unit(unit: Sequence[Case], deltas: Deltas, **options: Any) -> Iterator[tuple[PurePosixPath, bytes]]:
        for case in unit:
            yield from protect(case, deltas(case), **options)

    return protect_unit


FORMATS: Mapping[str, Format] = {
    "dicom": Format(dicom.read, _each_case(dicom.protect), partial(dicom.verify, allow_unchanged=True)),
    "nifti": Format(nifti.read, nifti.protect, nifti.verify),
    "npz": Format(npz.read, npz.protect, npz.verify),
    "png": Format(raster.read, _each_case(raster.protect), raster.verify),
    "tiff": Format(raster.read, _each_case(raster.protect), raster.verify),
}


@worker.isolated
def read(case: Case, spatial_dims: int, window: Window = "auto") -> StoredImage:
    """Stored image of a case of any format.

    Args:
        case: the case.
        spatial_dims: 2 or 3.
        window: ``"auto"`` or (low, high) in physical units.

    Raises:
        RefusedError: When the case cannot be protected.
    """
    image = FORMATS[case.format].read(case, spatial_dims, window)
    return replace(image, stored=contiguous(image.stored))


@worker.isolated
def read_outline(case: Case, spatial_dims: int, window: Window = "auto") -> Outline:
    """As :py:func:`read`, but all except the voxels, which are large and stay in the child process.

    Args:
        case: the case.
        spatial_dims: 2 or 3.
        window: ``"auto"`` or (low, high) in physical units.

    Raises:
        RefusedError: When the case cannot be protected.
    """
    if case.format == "dicom":  # cached since the scan, unless the files changed
        return dicom.layout_of(case, spatial_dims, window).outline
    image = FORMATS[case.format].read(case, spatial_dims, window)
    return Outline(image.stored.shape, image.codec, image.spacing, image_digest(image.stored))


@worker.isolated
def read_spacing(case: Case, spatial_dims: int) -> tuple[float, ...]:
    """``spacing`` of the image of a case, from headers alone.

    Args:
        case: the case.
        spatial_dims: 2 or 3.

    Raises:
        RefusedError: When a header is broken.
    """
    if case.format not in ("dicom", "nifti"):
        return ()
    return (dicom if case.format == "dicom" else nifti).read_spacing(case, spatial_dims)


@worker.isolated
def read_slices(case: Case, spatial_dims: int, window: Window, axis: int, indices: Sequence[int]) -> StoredImage:
    """As :py:func:`read`, some slices of the image only.

    Args:
        case: the case.
        spatial_dims: 2 or 3.
        window: ``"auto"`` or (low, high) in physical units.
        axis: spatial axis along which they lie, 0 for x; that of ``codec.slices`` where there is one.
        indices: of the slices, ascending.

    Raises:
        RefusedError: When the case cannot be protected.
    """
    if case.format == "dicom":
        return dicom.read_slices(case, spatial_dims, window, axis, indices)
    return FORMATS[case.format].read(case, spatial_dims, window).slices(axis, indices)


def units(cases: Iterable[Case]) -> list[tuple[Case, ...]]:
    """Cases grouped into what is released as a whole, in order of first appearance."""
    grouped: dict[tuple[Path, ...], list[Case]] = {}
    for case in cases:
        grouped.setdefault((case.mask.file,) if case.mask else case.files, []).append(case)
    return [tuple(unit) for unit in grouped.values()]


def files_of(unit: Iterable[Case]) -> tuple[Path, ...]:
    """The image files of a unit, each once."""
    return tuple(dict.fromkeys(path for case in unit for path in case.files))


def protect(
    unit: Sequence[Case], deltas: Deltas, *, spatial_dims: int, window: Window, uids: Any, when: datetime
) -> Iterator[ProtectedFile]:
    """Yield the protected images of one unit, in the order of its source files (labels: see ``masks.protect``).

    Args:
        unit: cases that share their files, see :py:func:`units`.
        deltas: lattice steps of each case.
        spatial_dims: 2 or 3.
        window: ``"auto"`` or (low, high) in physical units.
        uids: :py:class:`monai_salm.release.identity.UidMap` of the release.
        when: start of the release, written into files that carry a date.

    Raises:
        RefusedError: When the unit cannot be protected.
        ValueError: When a perturbation does not fit its image.
    """
    options = {"spatial_dims": spatial_dims, "window": window}
    options |= {"uids": uids, "when": when} if unit[0].format == "dicom" else {}  # no other has either
    return worker.stream(_protect, tuple(unit), [deltas(case) for case in unit], options)


def _protect(
    unit: tuple[Case, ...], deltas: Sequence[np.ndarray], options: Mapping[str, Any]
) -> Iterator[ProtectedFile]:
    of_case = dict(zip((case.sample_id for case in unit), deltas, strict=True))
    written = FORMATS[unit[0].format].protect(unit, lambda case: of_case[case.sample_id], **options)
    for source, (name, content) in zip(files_of(unit), written, strict=True):
        yield ProtectedFile(source, name, content)


@worker.isolated
def verify(form: str, source: Path, written: Path, limit: float, physical: float = math.inf) -> FileCheck:
    """Parse a written file afresh and compare it with its source.

    Args:
        form: name of the format.
        source: the original file.
        written: the protected file, under any name.
        limit: largest change allowed, in stored units.
        physical: largest change allowed, in physical units, where files of a unit are scaled differently.

    Raises:
        RefusedError: When anything changed that must not, or a voxel by too much; and when nothing changed, save in
            DICOM, where single slices of a volume may stay as they are (so sum ``changed`` over a unit).
    """
    extra = {} if math.isinf(physical) else {"physical": physical}
    return FORMATS[form].verify(source, written, limit, **extra)
