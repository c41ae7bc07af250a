# SPDX-License-Identifier: Apache-2.0
"""NIfTI: reads exact stored values, and writes the same file with some voxels changed.

nibabel's and MONAI's writers are not used, because both rewrite the header (scaling, qform and sform codes). Here voxel
bytes are changed in place, and every other byte of the (decompressed) file stays. ``nifti_layout`` tells where they are
and what the axes mean.

A file of several volumes (a time series, diffusion, several contrasts) is written as a whole. Each volume is a case
with its own window and budget.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from monai_salm.io.base import (
    Case,
    FileCheck,
    RefusedError,
    StoredImage,
    Window,
    compare,
    move,
    room_for_notes,
    window_of,
)
from monai_salm.io.kept import while_unchanged
from monai_salm.io.nifti_layout import (
    HEADER_BYTES,
    LABEL_TYPES,
    SUPPORTED_TYPES,
    Axes,
    Layout,
    gzip_names,
    is_gzip,
    is_plain_gzip,
    layout_of,
    open_plain,
    read_head,
    sniff,
    texts,
)
from monai_salm.stored import StoredCodec

__all__ = [
    "MAX_TRAILING_BYTES",
    "SUPPORTED_TYPES",
    "Grid",
    "check_copied",
    "check_no_text",
    "count_volumes",
    "protect",
    "read",
    "read_grid",
    "read_head",
    "read_labels",
    "sniff",
    "verify",
    "volume_names",
]

MAX_TRAILING_BYTES = 2**20
"""Most bytes after the last voxel; fewer are kept."""


def count_volumes(path: Path, spatial_dims: int) -> int:
    """Number of volumes (or slices) along the fourth axis; the file is judged by its header and size alone.

    Raises:
        RefusedError: When it cannot be protected.
    """
    return layout_of(path, read_head(path), spatial_dims).volumes


def check_no_text(path: Path) -> None:
    """Raise when the header holds what may name a person: text, or extensions.

    Raises:
        RefusedError: ``not_deidentified``.
    """
    found = texts(read_head(path))
    if found:
        raise RefusedError("not_deidentified", f"the header holds {', '.join(found)}, which may name persons; clear it")


def check_copied(path: Path, deidentified: bool) -> None:
    """Raise when a label file, which is to be released byte by byte, must not be.

    Args:
        path: the file.
        deidentified: whether its header, and that of ``gzip``, may hold no text either.

    Raises:
        RefusedError: ``embedded_preview`` when ``gzip`` left room for more than the content, an extra field or several
            members (RFC 1952, 2.2 and 2.3.1); ``not_deidentified``.
    """
    if is_gzip(path) and not is_plain_gzip(path):
        detail = "the gzip file has extra fields, several members or bytes behind them; pack it again with gzip -n"
        raise RefusedError("embedded_preview", detail)
    if deidentified and gzip_names(path):
        raise RefusedError("not_deidentified", "its gzip header holds a name or a comment; pack it with gzip -n")
    if deidentified:
        check_no_text(path)


def volume_names(file: PurePosixPath, index: int) -> tuple[str, str]:
    """Names of one volume of several: ``"x.nii/volume/12"``, and the file's own, which names them all."""
    return f"{file}/volume/{index}", str(file)


def read(case: Case, spatial_dims: int, window: Window) -> StoredImage:
    """Stored values in canonical axes.

    Args:
        case: one NIfTI file, or one volume of it.
        spatial_dims: 2 for files of shape (H, W) or (H, W, 1), 3 for volumes.
        window: ``"auto"`` (the whole range of uint8, else percentiles 0.5 and 99.5, of this volume) or (low, high) in
            physical units.

    Raises:
        RefusedError: When the file is broken, constant, or of a kind that is not supported.
    """
    path = case.files[0]
    content, layout = (_load if case.index is None else _load_once)(path, spatial_dims)
    return _image(content, layout, case.index, window)


def protect(
    cases: Sequence[Case],
    deltas: Callable[[Case], np.ndarray],
    *,
    spatial_dims: int,
    window: Window,
) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Yield each protected file: its path in the protected copy, and its bytes.

    Args:
        cases: files, or every volume of files.
        deltas: (1, *spatial) lattice steps of a case in canonical axes.
        spatial_dims: 2 or 3.
        window: as for :py:func:`read`.

    Raises:
        RefusedError: When a file cannot be read, or one of its volumes is not among the cases.
        ValueError: When a perturbation does not fit its image.
    """
    for source in dict.fromkeys(case.files[0] for case in cases):
        content, layout = _load(source, spatial_dims)
        inside = [case for case in cases if case.files[0] == source]
        if len({case.index for case in inside}) != layout.volumes:
            raise RefusedError("incomplete_file", f"the file has {layout.volumes} volumes; fit and release all of them")
        for case in inside:
            image, delta = _image(content, layout, case.index, window), np.asarray(deltas(case))
            protected = layout.axes.to_file(move(image.stored, delta, image.codec)[0])
            moved = layout.axes.to_file(delta[0]) != 0
            layout.voxels(content, case.index or 0)[moved] = protected[moved]
        yield inside[0].released_name, _compress(content) if is_gzip(source) else bytes(content)


def verify(source: Path, written: Path, limit: float) -> FileCheck:
    """Compare a written file with its source, both parsed afresh.

    Args:
        source: the original.
        written: the protected file, under any name.
        limit: largest change allowed, in stored units.

    Raises:
        RefusedError: When anything but voxels differs, a voxel moved by more than ``limit``, or none moved.
    """
    if is_gzip(source) != is_gzip(written):
        raise RefusedError("verification_failed", "the written file is not compressed as its source is")
    before, layout = _load(source, None)
    after, other = _load(written, None)
    if before[: layout.offset] != after[: other.offset] or before[layout.end :] != after[other.end :]:
        raise RefusedError("verification_failed", "bytes outside the voxels differ from the source")
    checks = [compare(layout.voxels(before, at), layout.voxels(after, at), limit) for at in range(layout.volumes)]
    return FileCheck(sum(check.changed for check in checks), max(check.max_abs for check in checks))


def read_spacing(case: Case, spatial_dims: int) -> tuple[float, ...]:
    """mm along each canonical axis, from the header.

    Raises:
        RefusedError: As :py:func:`count_volumes`.
    """
    return layout_of(case.files[0], read_head(case.files[0]), spatial_dims).spacing


@dataclass(frozen=True)
class Grid:
    """Where a file's voxels lie: shape and (4, 4) affine from voxel index to mm, both on canonical axes.

    ``axes`` is how the file stores them, ``transforms`` what its sform and qform say of that.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    axes: Axes
    transforms: tuple[str, ...]


def read_grid(path: Path, spatial_dims: int) -> Grid:
    """The grid of a file, from its header.

    Raises:
        RefusedError: As :py:func:`count_volumes`.
    """
    return _grid(layout_of(path, read_head(path), spatial_dims, LABEL_TYPES))


def _grid(layout: Layout) -> Grid:
    axes, shape = layout.axes, layout.shape
    affine = layout.affine @ axes.to_file_index(shape)
    return Grid(tuple(shape[axis] for axis in axes.order), affine, axes, layout.transforms)


def read_labels(path: Path, spatial_dims: int | None) -> tuple[np.ndarray, Grid]:
    """The voxels of a label file on canonical axes, (*spatial), and their grid.

    Voxels are scaled if the header says so; scaled values that are whole numbers except for rounding are rounded.

    Args:
        path: the label file.
        spatial_dims: 2 or 3, as of its image; None takes either (then a slice is not turned to canonical axes).

    Raises:
        RefusedError: When the file is broken or of a kind that is not supported.
    """
    content, layout = _load(path, spatial_dims, LABEL_TYPES)
    if layout.volumes > 1:
        raise RefusedError(
            "multi_volume",
            f"the label file has {layout.volumes} volumes; split it into files, or make one map of class numbers of "
            "one-hot channels",
        )
    voxels = layout.axes.to_canonical(layout.voxels(content).astype(layout.dtype.newbyteorder("=")))
    if (layout.slope, layout.intercept) != (1.0, 0.0):
        voxels = _scaled(voxels, layout.slope, layout.intercept)
    return np.ascontiguousarray(voxels), _grid(layout)


def _scaled(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """Scaled labels, rounded where they are whole numbers except for the precision of the scaling.

    Slope and intercept of NIfTI-1 are 32-bit floats, and nibabel chooses fine slopes when it saves floats as integers.

    Raises:
        RefusedError: ``mask_is_image`` when different stored values become one: the scaling would hide an image.
    """
    scaled = stored * slope + intercept
    nearest = np.rint(scaled)
    rounding = np.finfo(np.float32).eps * (np.abs(scaled) + 2 * abs(intercept)) + abs(slope) / 2 * (abs(slope) < 1e-3)
    scaled = np.where((np.abs(scaled - nearest) <= rounding) & (rounding < 0.01), nearest, scaled)
    found, left = len(np.unique(stored)), len(np.unique(scaled))
    if left < found:
        raise RefusedError(
            "mask_is_image",
            f"the scaling of the label's header makes {left} values of {found}: is it an image? Save class numbers "
            "without slope and intercept",
        )
    return scaled


def _is_constant(stored: np.ndarray) -> bool:
    """Whether all finite values are one and the same."""
    values = stored[np.isfinite(stored)] if stored.dtype.kind == "f" else stored
    return bool(values.size and values.min() == values.max())


def _image(content: bytearray, layout: Layout, index: int | None, window: Window) -> StoredImage:
    at = 0 if index is None and layout.volumes == 1 else index
    if at is None or not 0 <= at < layout.volumes:
        raise RefusedError("no_such_image", f"the file has {layout.volumes} volumes, not one with index {index}")
    native = layout.voxels(content, at).astype(layout.dtype.newbyteorder("="))
    stored = np.ascontiguousarray(layout.axes.to_canonical(native))[None]
    if _is_constant(stored):
        raise RefusedError(
            "constant_image", "all voxels have one value: there is nothing to protect; leave the file out"
        )
    try:
        window = window_of(stored, window, layout.slope, layout.intercept)
        codec = StoredCodec(layout.dtype.name, window, layout.slope, layout.intercept)
    except ValueError as error:
        raise RefusedError("no_window", str(error)) from error
    if (
        stored.dtype.kind == "f"
        and np.spacing(np.abs(codec.window).max() / abs(codec.slope), dtype=stored.dtype) > codec.step
    ):
        raise RefusedError(
            "too_coarse", "the float type cannot hold small changes of values this large; rescale the image"
        )
    return StoredImage(stored, codec, layout.spacing)


def _load(path: Path, spatial_dims: int | None, types: Sequence[str] = SUPPORTED_TYPES) -> tuple[bytearray, Layout]:
    """The decompressed file and its layout; never more bytes than the header promises."""
    layout = layout_of(path, read_head(path), spatial_dims, types)
    content = bytearray()
    try:
        with open_plain(path) as stream:
            while len(content) < layout.end and (chunk := stream.read(min(2**24, layout.end - len(content)))):
                content += chunk
            trailing = stream.read(MAX_TRAILING_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise RefusedError("broken_file", "the file cannot be read to its end; export it again") from error
    if len(content) < layout.end:
        raise RefusedError("truncated_file", f"the file has {len(content)} bytes, its header promises {layout.end}")
    if len(trailing) > MAX_TRAILING_BYTES:
        raise RefusedError("trailing_data", "the file goes on after the last voxel; save it again without the rest")
    notes = content[HEADER_BYTES : layout.offset] + trailing
    found = len(notes.strip(b"\0"))
    if found > room_for_notes(layout.end - layout.offset):
        raise RefusedError(
            "embedded_preview",
            f"extensions have {found} bytes, enough for a copy of the image; remove them (nifti_tool -rm_ext ALL)",
        )
    return content + trailing, layout


_load_once = while_unchanged(1)(_load)
"""For the volumes of one file in turn."""


def _compress(content: bytearray) -> bytes:
    """gzip without name and time, so that equal images give equal files."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, compresslevel=6, mtime=0) as stream:
        stream.write(content)
    return buffer.getvalue()
