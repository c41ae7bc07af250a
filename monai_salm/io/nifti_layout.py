# SPDX-License-Identifier: Apache-2.0
"""Where the voxels of a NIfTI file are and how to read them, from its header and size alone.

Axes: volumes are turned to RAS+ without resampling. A single slice is shown as a DICOM viewer would show it, so that
both formats mix in one cohort: columns run to the patient's left (sagittal plane: to posterior), rows to posterior
(coronal and sagittal plane: to inferior). A file that does not tell its orientation (both codes 0, or an affine that
cannot be inverted) is taken as stored; a slice of such a file is transposed, NIfTI's first axis being the column.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from monai_salm.io.base import DEFLATE_RATIO, RefusedError
from monai_salm.io.worker import isolated

SUPPORTED_TYPES = ("uint8", "int8", "int16", "uint16", "int32", "uint32", "float32", "float64")
LABEL_TYPES = (*SUPPORTED_TYPES, "int64", "uint64")
"""Of label files, which are never changed."""
MAX_BYTES = 2**32
"""Largest decompressed file that is read."""
HEADER_BYTES = 544
"""Of NIfTI-2. NIfTI-1's is shorter, so up to 192 bytes of its extensions are not counted as notes."""
_GZIP = b"\x1f\x8b"
_HEAD_BYTES = 1 << 16
_CHUNK_BYTES = 1 << 24
_HEADERS = {348: (nib.Nifti1Header, 344, b"n+1\0"), 540: (nib.Nifti2Header, 4, b"n+2\0")}
_PAIRS = (b"ni1\0", b"ni2\0")


@dataclass(frozen=True)
class Axes:
    """canonical = transpose(flip(file array, flips), order)."""

    order: tuple[int, ...]
    flips: tuple[int, ...]

    def to_canonical(self, voxels: np.ndarray) -> np.ndarray:
        return np.transpose(np.flip(voxels, self.flips), self.order)

    def to_file(self, canonical: np.ndarray) -> np.ndarray:
        return np.flip(np.transpose(canonical, np.argsort(self.order)), self.flips)

    def to_file_index(self, shape: tuple[int, ...]) -> np.ndarray:
        """(4, 4) matrix from a voxel's index on canonical axes to that in a file of this shape."""
        matrix = np.eye(4)
        matrix[:, : len(self.order)] = matrix[:, list(self.order)]
        for axis in self.flips:
            matrix[axis] *= -1
            matrix[axis, 3] = shape[axis] - 1
        return matrix


@dataclass(frozen=True)
class Layout:
    """Where a file's voxels are and how to read them."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    intercept: float
    axes: Axes
    affine: np.ndarray
    """(4, 4) voxel index to mm; NaN where the header's numbers make none."""
    transforms: tuple[str, ...]
    """Axes by sform and qform, as far as their codes are set: ``("RAS", "LAS")`` contradict each other."""
    volumes: int
    """Along the fourth axis, one behind the other; ``shape`` is that of one."""

    @property
    def spacing(self) -> tuple[float, ...]:
        """mm along each canonical axis; empty where the affine is degenerate."""
        norms = np.linalg.norm(self.affine[:3, : len(self.shape)], axis=0)[list(self.axes.order)]
        return tuple(map(float, norms)) if np.isfinite(norms).all() and norms.all() else ()

    @property
    def end(self) -> int:
        return self.offset + self._count * self.volumes * self.dtype.itemsize

    @property
    def _count(self) -> int:
        return math.prod(self.shape)

    def voxels(self, content: bytes | bytearray, volume: int = 0) -> np.ndarray:
        """View of a volume's voxels inside ``content``, in the file's axes and byte order."""
        start = self.offset + volume * self._count * self.dtype.itemsize
        return np.frombuffer(content, self.dtype, self._count, start).reshape(self.shape, order="F")


def sniff(head: bytes) -> bool:
    """True if a file that starts with ``head`` (540 decompressed bytes) is NIfTI, supported or not, or the header of an
    Analyze pair."""
    return _is_analyze(head) or any(
        head[at : at + 4] in (magic, _PAIRS[0], _PAIRS[1]) for _, at, magic in _HEADERS.values()
    )


def _is_analyze(head: bytes) -> bool:
    """True for the header of an Analyze 7.5 pair, which is a file of 348 bytes that starts with that number."""
    return len(head) == 348 and 348 in (int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big"))


def read_head(path: Path) -> bytes:
    """First decompressed bytes, as long as a header; fewer if the file is shorter or its compression broken.

    Reads no more than the first 64 KiB of the file, whatever is in there, and unpacks them in the child.

    Raises:
        OSError: When the file cannot be read.
    """
    with path.open("rb") as stream:
        if stream.peek(2)[:2] != _GZIP:
            return stream.read(HEADER_BYTES)
        try:
            return _unpacked(stream.read(_HEAD_BYTES))
        except RefusedError:
            return b""


@isolated
def _unpacked(packed: bytes) -> bytes:
    try:
        return zlib.decompressobj(wbits=31).decompress(packed, HEADER_BYTES)
    except zlib.error:
        return b""


def texts(head: bytes) -> list[str]:
    """Names of the fields of a header that hold free text, and ``extensions`` where there are some.

    Raises:
        RefusedError: When there is no complete header.
    """
    header = _header(head)
    size = len(header.binaryblock)
    fields = [name for name in ("descrip", "aux_file", "db_name", "intent_name") if name in header.keys()]
    found = [name for name in fields if bytes(header[name].item()).strip(b"\0 ")]
    extended = head[size : size + 1] not in (b"", b"\0") or int(header["vox_offset"]) > size + 4
    return found + (["extensions"] if extended else [])


def layout_of(path: Path, head: bytes, spatial_dims: int | None, types: Sequence[str] = SUPPORTED_TYPES) -> Layout:
    """Where the voxels of a file are.

    Args:
        path: the file, for its size.
        head: its first decompressed bytes, see :py:func:`read_head`.
        spatial_dims: 2 or 3; None takes either (then a slice is not turned to canonical axes).
        types: names of the voxel types that are taken.

    Raises:
        RefusedError: When the file is of a kind that is not supported, or its header promises what cannot be there.
    """
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
    if len(shape) > 4:
        raise RefusedError("vector_image", f"the file has shape {shape}, several values per voxel; split it into files")
    _check_type(dtype, types)
    _check_shape(shape, spatial_dims)
    shape, volumes = shape[:3], int(math.prod(shape[3:]))
    slope, intercept = (1.0, 0.0) if slope is None else (float(slope), float(intercept))
    if offset < least:
        raise RefusedError("broken_header", f"the header puts the voxels at byte {offset}, inside itself")
    plane = spatial_dims == 2
    if plane:
        shape = shape[:2]
    axes = _axes(header, len(shape), plane)
    affine, transforms = _affine(header), tuple(_transforms(header, len(shape)))
    layout = Layout(tuple(map(int, shape)), dtype, offset, slope, intercept, axes, affine, transforms, volumes)
    size = path.stat().st_size
    if layout.end > (size * DEFLATE_RATIO if is_gzip(path) else size):
        raise RefusedError("truncated_file", f"the header promises {layout.end} bytes, more than the file can hold")
    if layout.end > MAX_BYTES:
        raise RefusedError("too_large", f"the volume has {layout.end} bytes; files above {MAX_BYTES} are not supported")
    return layout


def _header(head: bytes) -> Any:
    if _is_analyze(head) and head[344:348] not in _PAIRS:
        raise RefusedError("analyze_pair", "Analyze pairs (.hdr/.img) are not supported; convert to a single .nii file")
    for size, (kind, at, magic) in _HEADERS.items():
        found = head[at : at + 4]
        if found in _PAIRS:
            raise RefusedError("nifti_pair", ".hdr/.img pairs are not supported; convert to a single .nii file")
        if found == magic and len(head) >= size:
            header = kind(head[:size], check=False)
            _repair(header["pixdim"])
            return header
    raise RefusedError("broken_header", "this is not a complete NIfTI header")


def _repair(pixdim: np.ndarray) -> None:
    """In memory, what every reader takes for granted: handedness 0 means 1 (nifti1.h), and sizes are positive."""
    if pixdim[0] not in (1, -1):
        pixdim[0] = 1
    pixdim[1:4] = np.abs(pixdim[1:4])


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
    flat = shape[2:3] in ((), (1,)) and len(shape) > 1
    if spatial_dims == 2 and not flat:
        raise RefusedError("not_2d", f"the file has shape {shape}; use --dim 3 (spatial_dims=3) for volumes")
    if spatial_dims == 3 and (len(shape) < 3 or flat):
        raise RefusedError("not_3d", f"the file has shape {shape}; use --dim 2 (spatial_dims=2) for single slices")


def _axes(header: Any, ndim: int, plane: bool) -> Axes:
    """How the file's axes become canonical ones (see the module's docstring)."""
    as_stored = Axes((1, 0) if plane else tuple(range(ndim)), ())
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
    return Axes(order[::-1] if plane else order, flips)


def _transforms(header: Any, ndim: int) -> Iterator[str]:
    first = None
    for code, affine in (("sform_code", header.get_sform), ("qform_code", header.get_qform)):
        if int(header[code]) > 0:
            with suppress(HeaderDataError, ValueError, np.linalg.LinAlgError):
                found = affine()
                if first is not None and np.allclose(found[:3, :3], first[:3, :3], rtol=0, atol=1e-3):
                    found = first  # oblique by 45 degrees, where rounding decides which axis is nearest
                first = found
                yield "".join(map(str, nib.orientations.aff2axcodes(found)[:ndim]))


def _affine(header: Any) -> np.ndarray:
    unit = {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)  # meter, micrometer; else taken for mm
    try:
        return np.diag([unit, unit, unit, 1.0]) @ np.asarray(header.get_best_affine(), dtype=np.float64)
    except (HeaderDataError, ValueError, np.linalg.LinAlgError):
        return np.full((4, 4), np.nan)


def is_gzip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(2) == _GZIP


def gzip_names(path: Path) -> bool:
    """Whether the first bytes of a gzip file hold a file name or a comment (RFC 1952, 2.3.1)."""
    with path.open("rb") as stream:
        head = stream.read(4)
    return head[:2] == _GZIP and head[3] & 0x18 != 0


def is_plain_gzip(path: Path) -> bool:
    """Whether a gzip file is one member without an extra field, and zeros at most behind it."""
    with path.open("rb") as stream:
        head = stream.read(4)
        if len(head) < 4 or head[3] & 0x04:
            return False
        stream.seek(0)
        unpack, rest = zlib.decompressobj(wbits=31), b""
        while not unpack.eof and (rest := rest or stream.read(_HEAD_BYTES)):
            try:
                unpack.decompress(rest, _CHUNK_BYTES)
            except zlib.error:
                return True  # told by whoever reads it
            rest = unpack.unconsumed_tail
        return not unpack.unused_data.strip(b"\0") and not stream.read().strip(b"\0")


def open_plain(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if is_gzip(path) else path.open("rb")
