# SPDX-License-Identifier: Apache-2.0
"""What all file formats share: a case, its stored image, a refusal with a reason, and the check of a written image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from monai_salm.stored import StoredCodec, auto_window

Window = str | tuple[float, float]
"""``"auto"`` (see each format) or (low, high) in physical units."""
SPLITS = ("train", "val", "test")
"""What a case may be for; those for ``"test"`` are held out, see :py:class:`Case`."""

MAX_RASTER_BYTES = 2**31
"""Largest unpacked PNG or TIFF image that is read."""

MAX_NOTES_BYTES = 2**14
"""Most bytes of notes, or of unknown data, beside an image of any size; see :py:func:`room_for_notes`."""
DEFLATE_RATIO = 1032
"""Most bytes that one byte of a deflate stream can become; a header that promises more lies (zlib's notes)."""


def room_for_notes(size: int) -> int:
    """Most bytes of notes, or of unknown data, in a file whose image has ``size`` bytes: too few for a copy of it."""
    return min(MAX_NOTES_BYTES, max(2**10, size // 16))


class RefusedError(Exception):
    """A file or case that cannot be protected and must therefore never reach the output.

    Args:
        reason: stable snake_case code, such as ``"unsupported_transfer_syntax"``.
        detail: one sentence saying what was found and what to do. Never a patient's name, id, date, UID or path.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class StoredImage:
    """An image as its file holds it.

    Args:
        stored: (1, *spatial) array of the file's own type in native byte order. Axes are canonical, so that
            formats mix in one cohort: volumes are RAS+ (x, y, z) where the file tells its orientation, 2D images
            (rows, columns) as displayed.
        codec: how to read the values.
        spacing: mm from voxel to voxel along each spatial axis of ``stored``; empty where the file does not tell.
        windows: the display windows that the file lists, (low, high) in physical units.
    """

    stored: np.ndarray
    codec: StoredCodec
    spacing: tuple[float, ...] = ()
    windows: tuple[tuple[float, float], ...] = ()

    def slices(self, axis: int, indices: Sequence[int]) -> StoredImage:
        """Some slices, ascending, along a spatial axis: that of ``codec.slices`` where there is one."""
        chosen = np.moveaxis(self.stored, axis + 1, 0)[list(indices)]  # ndarray.take would copy the whole image first
        stored = np.ascontiguousarray(np.moveaxis(chosen, 0, axis + 1))
        return replace(self, stored=stored, codec=self.codec.of_slices(indices))


@dataclass(frozen=True)
class Outline:
    """All that must be known of an image to write it, except its voxels.

    Args:
        shape: (1, *spatial), as of ``StoredImage.stored``.
        codec: how to read the values.
        spacing: as of ``StoredImage``.
        digest: ``records.image_digest`` of the voxels; empty where nobody needs it.
    """

    shape: tuple[int, ...]
    codec: StoredCodec
    spacing: tuple[float, ...] = ()
    digest: str = ""


@dataclass(frozen=True)
class Pixels:
    """A PNG or TIFF image as its file holds it.

    Args:
        samples: (H, W, C) uint8 or uint16 in the file's byte order: the colors, then alpha where there is one.
        colors: 1 (grayscale) or 3 (RGB).
        kept: the other bytes of the file, which protection must not change.
        inverted: low values are bright.
    """

    samples: np.ndarray
    colors: int
    kept: bytes
    inverted: bool = False


@dataclass(frozen=True)
class Mask:
    """The voxel labels of one case; :py:func:`monai_salm.io.masks.read_mask` reads them.

    Args:
        file: absolute path of a NIfTI label file or a DICOM SEG file.
        name: its POSIX path relative to the export.
        values: what stands for each class in this file, by class index (0 is the background): a voxel value of a
            NIfTI file; a segment number of a SEG file, 0 for the background; -1 for a class that the file lacks.
    """

    file: Path
    name: str
    values: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One image or volume that is protected as a whole.

    Args:
        sample_id: stable pseudonym, ``"case-" + 16 hex digits`` (keyless digest of the UID or relative path).
        format: ``"dicom"``, ``"nifti"``, ``"npz"``, ``"png"`` or ``"tiff"``.
        files: absolute paths; the slices of a DICOM volume in spatial order.
        names: the names a label table may use: relative POSIX path of file and series folder, UIDs, npz key.
        group: pseudonym of the patient, for splits that keep patients together.
        index: position in a file of several cases: in an npz archive, with ``split`` naming its array; of a volume in
            a NIfTI file of several. Such a file is protected as a whole, all its cases at once.
        label: class index, -1 while unknown and where each voxel has its own.
        split: ``"train"``, ``"val"`` (both are released) or ``"test"`` (held out: never fitted on, never written).
        mask: voxel labels, None where the case is labeled as a whole.
        target: path of its file in a protected copy, where that differs from the path in the export.
    """

    sample_id: str
    format: str
    files: tuple[Path, ...]
    names: tuple[str, ...]
    group: str
    index: int | None = None
    label: int = -1
    split: str = "train"
    mask: Mask | None = None
    target: str = ""

    @property
    def file_name(self) -> PurePosixPath:
        """Path of the case's first file relative to the export; where the file has several cases, without the part."""
        name = PurePosixPath(self.names[0])
        return name if self.index is None else name.parent.parent

    @property
    def released_name(self) -> PurePosixPath:
        """Path of that file in a protected copy."""
        return PurePosixPath(self.target) if self.target else self.file_name


@dataclass(frozen=True)
class FileCheck:
    """How a written file differs from its source.

    Args:
        changed: number of voxels whose stored value differs.
        max_abs: largest difference in stored units.
        allowed: largest difference allowed in this file, in stored units, if it has a bound of its own.
    """

    changed: int
    max_abs: float
    allowed: float = math.inf


def window_of(stored: np.ndarray, window: Window, slope: float = 1.0, intercept: float = 0.0) -> tuple[float, float]:
    """A window in physical units; ``"auto"`` is the whole range of uint8, else percentiles (``stored.auto_window``).

    Raises:
        ValueError: As ``auto_window``.
    """
    if not isinstance(window, str):
        return window
    if stored.dtype == np.uint8:
        low, high = sorted(edge * slope + intercept for edge in (0.0, 255.0))
        return low, high
    return auto_window(stored, slope, intercept)


def move(stored: np.ndarray, delta: np.ndarray, codec: StoredCodec) -> np.ndarray:
    """Add a perturbation: the stored values of the protected image, or of a part of it.

    Args:
        stored: original values.
        delta: lattice steps, integers of the same shape.
        codec: of these values.

    Raises:
        RefusedError: ``delta_outside_bounds`` when padding or a voxel outside the window moves, or one moves there.
        ValueError: When ``delta`` does not fit.
    """
    if stored.shape == delta.shape and not codec.allows(stored, delta):
        raise RefusedError(
            "delta_outside_bounds", "the perturbation moves padding or leaves the window; fit again with this window"
        )
    return codec.add(stored, delta)


def compare(before: np.ndarray, after: np.ndarray, limit: float, *, allow_unchanged: bool = False) -> FileCheck:
    """Count the voxels that differ between two arrays of one type, and check by how much; NaN equals itself.

    Args:
        before: the original values.
        after: the protected ones.
        limit: largest difference allowed.
        allow_unchanged: accept equal arrays.

    Raises:
        RefusedError: When the difference exceeds ``limit`` (plus a float's own rounding), or is nowhere.
    """
    if before.dtype.kind in "iu" and before.dtype.itemsize < 4:
        # The larger minus the smaller: as an unsigned number of the same width it cannot overflow.
        change = np.maximum(before, after)
        change -= np.minimum(before, after)
        change = change.view(f"u{before.dtype.itemsize}")
        changed, excess = np.count_nonzero(change), int(change.max(initial=0)) - limit
    else:
        bits = np.dtype(f"u{before.dtype.itemsize}")
        moved = before.view(bits) != after.view(bits)
        new = after[moved].astype(np.float64)
        change = np.abs(new - before[moved].astype(np.float64))
        rounding = np.abs(np.spacing(after[moved])).astype(np.float64) if before.dtype.kind == "f" else 0.0
        changed, excess = moved.sum(), (change - (limit + rounding)).max(initial=-np.inf)
    if not (changed or allow_unchanged):
        raise RefusedError("verification_failed", "the written file equals its source: nothing was protected")
    if not excess <= 0:  # NaN neither
        raise RefusedError("verification_failed", f"a voxel moved by {change.max():g}, the budget allows {limit:g}")
    return FileCheck(int(changed), float(change.max(initial=0)))
