# SPDX-License-Identifier: Apache-2.0
"""NIfTI: exact stored values in, the same file with some voxels patched out.

Neither nibabel's nor MONAI's writer is used: both rewrite the header (scaling, qform and sform codes). Here the voxel
bytes are changed in place, so that every other byte of the (decompressed) file stays what it was.

Axes. Volumes are turned to RAS+ without resampling. A single slice is shown as a DICOM viewer would show it, so that
both formats mix in one cohort: columns run to the patient's left (sagittal plane: to posterior), rows to posterior
(coronal and sagittal plane: to inferior). A file that does not tell its orientation (both codes 0, or an affine that
cannot be inverted) is taken as stored; a slice of such a file is transposed, NIfTI's first axis being the column.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from monai_salm.io.base import Case, FileCheck, RefusedError, StoredImage, Window, compare
from monai_salm.stored import StoredCodec, auto_window

SUPPORTED_TYPES = ("uint8", "int8", "int16", "uint16", "int32", "uint32", "float32", "float64")
LABEL_TYPES = (*SUPPORTED_TYPES, "int64", "uint64")
"""Of label files, which are never changed."""
MAX_BYTES = 2**32
"""Largest decompressed file that is read."""
MAX_TRAILING_BYTES = 2**20
"""Bytes after the last voxel; they are kept, but a file with more of them is not what its header says."""
_DEFLATE_RATIO = 1032
"""No deflate stream grows by more than this, so a header that promises more is lying (zlib's technical notes)."""
_HEADERS = {348: (nib.Nifti1Header, 344, b"n+1\0"), 540: (nib.Nifti2Header, 4, b"n+2\0")}
_PAIRS = (b"ni1\0", b"ni2\0")


@dataclass(frozen=True)
class _Axes:
    """canonical = transpose(flip(file array, flips), order)."""

    order: tuple[int, ...]
    flips: tuple[int, ...]

    def to_canonical(self, voxels: np.ndarray) -> np.ndarray:
        return np.transpose(np.flip(voxels, self.flips), self.order)

    def to_file(self, canonical: np.ndarray) -> np.ndarray:
        return np.flip(np.transpose(canonical, np.argsort(self.order)), self.flips)


@dataclass(frozen=True)
class _Layout:
    """Where a file's voxels are and how to read them."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    intercept: float
    axes: _Axes
    affine: np.ndarray
    """(4, 4) voxel index to mm; NaN where the header's numbers make none."""

    @property
    def spacing(self) -> tuple[float, ...]:
        """mm along each canonical axis; empty where the affine is degenerate."""
        norms = np.linalg.norm(self.affine[:3, : len(self.shape)], axis=0)[list(self.axes.order)]
        return tuple(map(float, norms)) if np.isfinite(norms).all() and norms.all() else ()

    @property
    def end(self) -> int:
        return self.offset + int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize

    def voxels(self, content: bytes | bytearray) -> np.ndarray:
        """View of the voxels inside ``content``, in the file's axes and byte order."""
        flat = np.frombuffer(content, self.dtype, (self.end - self.offset) // self.dtype.itemsize, self.offset)
        return flat.reshape(self.shape, order="F")


def sniff(head: bytes) -> bool:
    """True if a file that starts with ``head`` (decompressed, 352 bytes are enough) is NIfTI, supported or not."""
    return any(head[at : at + 4] in (magic, _PAIRS[0], _PAIRS[1]) for _, at, magic in _HEADERS.values())


def read_head(path: Path, count: int = 540) -> bytes:
    """First ``count`` decompressed bytes, fewer if the file is shorter or its compression broken."""
    try:
        with _open(path) as stream:
            return stream.read(count)
    except (OSError, EOFError, zlib.error):
        return b""


def check_supported(path: Path, spatial_dims: int) -> None:
    """Judge a file by its header and size, without reading its voxels.

    Raises:
        RefusedError: When it cannot be protected.
    """
    _layout(path, read_head(path), spatial_dims)


def read(case: Case, spatial_dims: int, window: Window) -> StoredImage:
    """Stored values in canonical axes.

    Args:
        case: one NIfTI file.
        spatial_dims: 2 for files of shape (H, W) or (H, W, 1), 3 for volumes.
        window: ``"auto"`` (the whole range of uint8, else percentiles 0.5 and 99.5) or (low, high) in physical units.

    Raises:
        RefusedError: When the file is broken, constant, or of a kind that is not supported.
    """
    content, layout = _load(case.files[0], spatial_dims)
    return _image(content, layout, window)


def protect(
    case: Case,
    delta: np.ndarray,
    *,
    spatial_dims: int,
    window: Window,
    uids: object = None,
    when: datetime | None = None,
) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Yield the one protected file: its path relative to the export, unchanged, and its bytes.

    Args:
        case: one NIfTI file.
        delta: (1, *spatial) lattice steps in canonical axes.
        spatial_dims: 2 or 3.
        window: as for :py:func:`read`.
        uids: unused, NIfTI has no identifiers.
        when: unused, the file carries no date of its own.

    Raises:
        RefusedError: When the file cannot be read.
        ValueError: When the perturbation does not fit the image.
    """
    source = case.files[0]
    content, layout = _load(source, spatial_dims)
    image = _image(content, layout, window)
    protected = layout.axes.to_file(image.codec.add(image.stored, delta)[0])
    moved = layout.axes.to_file(np.asarray(delta)[0]) != 0
    layout.voxels(content)[moved] = protected[moved]
    yield PurePosixPath(case.names[0]), _compress(content) if _is_gzip(source) else bytes(content)


def verify(source: Path, written: Path, limit: float) -> FileCheck:
    """Compare a written file with its source, both parsed afresh.

    Args:
        source: the original.
        written: the protected file, under any name.
        limit: largest change allowed, in stored units.

    Raises:
        RefusedError: When anything but voxels differs, a voxel moved by more than ``limit``, or none moved.
    """
    if _is_gzip(source) != _is_gzip(written):
        raise RefusedError("verification_failed", "the written file is not compressed as its source is")
    before, layout = _load(source, None)
    after, other = _load(written, None)
    if before[: layout.offset] != after[: other.offset] or before[layout.end :] != after[other.end :]:
        raise RefusedError("verification_failed", "bytes outside the voxels differ from the source")
    return compare(layout.voxels(before), layout.voxels(after), limit)


@dataclass(frozen=True)
class Grid:
    """Where a file's voxels lie: shape in the file's own axes, and the (4, 4) affine from voxel index to mm."""

    shape: tuple[int, ...]
    affine: np.ndarray


def read_grid(path: Path, spatial_dims: int) -> Grid:
    """The grid of a file, from its header.

    Raises:
        RefusedError: As :py:func:`check_supported`.
    """
    layout = _layout(path, read_head(path), spatial_dims, LABEL_TYPES)
    return Grid(layout.shape, layout.affine)


def read_labels(path: Path, spatial_dims: int | None) -> tuple[np.ndarray, Grid]:
    """The voxels of a label file on canonical axes, (*spatial), scaled if the header scales them, and their grid.

    Args:
        path: the label file.
        spatial_dims: 2 or 3, as of its image; None takes either (then a slice is not turned to canonical axes).

    Raises:
        RefusedError: When the file is broken or of a kind that is not supported.
    """
    content, layout = _load(path, spatial_dims, LABEL_TYPES)
    voxels = layout.axes.to_canonical(layout.voxels(content).astype(layout.dtype.newbyteorder("=")))
    if (layout.slope, layout.intercept) != (1.0, 0.0):
        voxels = voxels * layout.slope + layout.intercept
    return np.ascontiguousarray(voxels), Grid(layout.shape, layout.affine)


def constant(stored: np.ndarray) -> bool:
    """True if all finite values are one and the same."""
    values = stored[np.isfinite(stored)] if stored.dtype.kind == "f" else stored
    return bool(values.size and values.min() == values.max())


def _image(content: bytearray, layout: _Layout, window: Window) -> StoredImage:
    native = layout.voxels(content).astype(layout.dtype.newbyteorder("="))
    stored = np.ascontiguousarray(layout.axes.to_canonical(native))[None]
    if constant(stored):
        raise RefusedError(
            "constant_image", "all voxels have one value: there is nothing to protect; leave the file out"
        )
    try:
        codec = StoredCodec(layout.dtype.name, _window(stored, layout, window), layout.slope, layout.intercept)
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


def _window(stored: np.ndarray, layout: _Layout, window: Window) -> tuple[float, float]:
    if not isinstance(window, str):
        return window
    if stored.dtype == np.uint8:
        low, high = sorted(edge * layout.slope + layout.intercept for edge in (0.0, 255.0))
        return low, high
    return auto_window(stored, layout.slope, layout.intercept)


def _load(path: Path, spatial_dims: int | None, types: Sequence[str] = SUPPORTED_TYPES) -> tuple[bytearray, _Layout]:
    """The decompressed file and its layout; never more bytes than the header promises."""
    layout = _layout(path, read_head(path), spatial_dims, types)
    content = bytearray()
    try:
        with _open(path) as stream:
            while len(content) < layout.end and (chunk := stream.read(min(2**24, layout.end - len(content)))):
                content += chunk
            trailing = stream.read(MAX_TRAILING_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise RefusedError("broken_file", "the file cannot be read to its end; export it again") from error
    if len(content) < layout.end:
        raise RefusedError("truncated_file", f"the file has {len(content)} bytes, its header promises {layout.end}")
    if len(trailing) > MAX_TRAILING_BYTES:
        raise RefusedError("trailing_data", "the file goes on after the last voxel; save it again without the rest")
    return content + trailing, layout


def _layout(path: Path, head: bytes, spatial_dims: int | None, types: Sequence[str] = SUPPORTED_TYPES) -> _Layout:
    header = _header(head)
    try:
        shape, dtype = header.get_data_shape(), header.get_data_dtype()
        slope, intercept = header.get_slope_inter()
        least = len(header.binaryblock) + 4
        offset = int(header["vox_offset"]) or least
    except KeyError as error:
        raise RefusedError(
            "unsupported_type", f"the header's type code {int(header['datatype'])} is unknown"
        ) from error
    except (HeaderDataError, ValueError, OverflowError) as error:
        raise RefusedError("broken_header", "shape, type or scaling of the header cannot be read") from error
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    _check_type(dtype, types)
    _check_shape(shape, spatial_dims)
    slope, intercept = (1.0, 0.0) if slope is None else (float(slope), float(intercept))
    if offset < least:
        raise RefusedError("broken_header", f"the header puts the voxels at byte {offset}, inside itself")
    plane = spatial_dims == 2
    if plane:
        shape = shape[:2]
    axes = _axes(header, len(shape), plane)
    layout = _Layout(tuple(map(int, shape)), dtype, offset, slope, intercept, axes, _affine(header))
    size = path.stat().st_size
    if layout.end > (size * _DEFLATE_RATIO if _is_gzip(path) else size):
        raise RefusedError("truncated_file", f"the header promises {layout.end} bytes, more than the file can hold")
    if layout.end > MAX_BYTES:
        raise RefusedError("too_large", f"the volume has {layout.end} bytes; files above {MAX_BYTES} are not supported")
    return layout


def _header(head: bytes) -> Any:
    for size, (kind, at, magic) in _HEADERS.items():
        found = head[at : at + 4]
        if found in _PAIRS:
            raise RefusedError("nifti_pair", ".hdr/.img pairs are not supported; convert to a single .nii file")
        if found == magic and len(head) >= size:
            return kind(head[:size], check=False)
    raise RefusedError("broken_header", "this is not a complete NIfTI header")


def _check_type(dtype: np.dtype[Any], types: Sequence[str]) -> None:
    name = dtype.newbyteorder("=").name
    if dtype.names:
        raise RefusedError("color_image", "the file holds RGB colors; only grayscale images can be protected")
    if dtype.kind == "c":
        raise RefusedError("complex_image", f"the file holds {name}; save the magnitude image instead")
    if name not in types:
        raise RefusedError("unsupported_type", f"the file holds {name}; save it as one of {', '.join(types)}")


def _check_shape(shape: tuple[int, ...], spatial_dims: int | None) -> None:
    if not shape or min(shape) < 1:
        raise RefusedError("broken_header", f"the header's shape {shape} has no voxels")
    if len(shape) > 3:
        raise RefusedError("multi_volume", f"the file has shape {shape}, several volumes; split it into one file each")
    flat = len(shape) == 2 or (len(shape) == 3 and shape[2] == 1)
    if spatial_dims == 2 and not flat:
        raise RefusedError("not_2d", f"the file has shape {shape}; use spatial_dims=3 (the 3D bundle) for volumes")
    if spatial_dims == 3 and (len(shape) != 3 or flat):
        raise RefusedError(
            "not_3d", f"the file has shape {shape}; use spatial_dims=2 (the 2D bundle) for single slices"
        )


def _axes(header: Any, ndim: int, plane: bool) -> _Axes:
    """How the file's axes become canonical ones (see the module's docstring)."""
    as_stored = _Axes((1, 0) if plane else tuple(range(ndim)), ())
    if ndim < 2 or (int(header["sform_code"]) <= 0 and int(header["qform_code"]) <= 0):
        return as_stored
    try:
        world = nib.orientations.io_orientation(header.get_best_affine())
    except (HeaderDataError, ValueError, np.linalg.LinAlgError):
        return as_stored
    if not np.isfinite(world).all() or len(world) < ndim:
        return as_stored
    # A slice is displayed towards left, posterior, inferior: the negative directions of RAS+.
    away = 1 if plane else -1
    order = tuple(int(axis) for axis in np.argsort(world[:ndim, 0]))
    flips = tuple(axis for axis in range(ndim) if world[axis, 1] == away)
    return _Axes(order[::-1] if plane else order, flips)


def _affine(header: Any) -> np.ndarray:
    unit = {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)  # meter, micrometer; else taken for mm
    try:
        return np.diag([unit, unit, unit, 1.0]) @ np.asarray(header.get_best_affine(), dtype=np.float64)
    except (HeaderDataError, ValueError, np.linalg.LinAlgError):
        return np.full((4, 4), np.nan)


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if _is_gzip(path) else path.open("rb")


def _compress(content: bytearray) -> bytes:
    """gzip without name and time, so that equal images give equal files."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, compresslevel=6, mtime=0) as stream:
        stream.write(content)
    return buffer.getvalue()
