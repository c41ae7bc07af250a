# SPDX-License-Identifier: Apache-2.0
"""Pixel data <-> the exact stored integers of monochrome frames."""

from __future__ import annotations

import hashlib
import math
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import get_encoder, pixel_array

from monai_salm.io.base import RefusedError
from monai_salm.io.dicom_guard import refusing
from monai_salm.io.dicom_syntax import JPEG_2000, NATIVE, WRITTEN_COMPRESSED, plugin_of
from monai_salm.io.kept import Kept

_DECODED: Kept[NDArray[Any]] = Kept(256 << 20)
"""Decoded frames, of compressed ones only. A release decodes each original several times: to check, read, write and
verify it; that takes most of its time."""
_SIZ = struct.Struct(">4sHH4I16xH")  # SOC and SIZ markers, Lsiz, Rsiz, Xsiz, Ysiz, XOsiz, YOsiz, tiles, Csiz


def stored_dtype(header: Dataset) -> np.dtype[Any]:
    """numpy type of the stored integers, in native byte order."""
    return np.dtype(f"{'i' if header.PixelRepresentation else 'u'}{int(header.BitsAllocated) // 8}")


def stored_range(header: Dataset) -> tuple[int, int]:
    """Least and largest value that BitsStored and PixelRepresentation allow."""
    bits = int(header.BitsStored)
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if header.PixelRepresentation else (0, (1 << bits) - 1)


def decode(dataset: Dataset, frame: int = 0, *, afresh: bool = False) -> NDArray[Any]:
    """The stored integers, (rows, columns), of one frame of a data set that ``check_supported`` let pass.

    ``Dataset.decompress`` is never used: it changes the data set, and fails on some valid JPEG 2000.

    Args:
        dataset: the data set.
        frame: its index.
        afresh: decode a compressed frame even if it is in the cache, and do not put it there.

    Raises:
        RefusedError: ``truncated_pixel_data``; ``undecodable_pixel_data``; ``codestream_mismatch`` when the codestream
            has another size than the header, or more than zeros follow the last native frame; ``unused_bits_set`` when
            bits above BitsStored are in use (an embedded overlay, signed values that are not sign-extended), which the
            copy would not have.
    """
    syntax = dataset.file_meta.TransferSyntaxUID
    shape = (int(dataset.Rows), int(dataset.Columns))
    dtype, frames = stored_dtype(dataset), int(dataset.get("NumberOfFrames") or 1)
    with refusing("undecodable_pixel_data", "the pixel data cannot be decoded; export the image uncompressed"):
        limits = stored_range(dataset)
        if syntax in NATIVE:
            return _checked(_native(dataset.PixelData, frame, (frames, *shape), dtype), shape, dtype, limits)
        encoded = get_frame(dataset.PixelData, frame, number_of_frames=frames)
        if syntax != uid.RLELossless:
            check_codestream(encoded, syntax, shape)
        if afresh:
            return _checked(_decompressed(dataset, frame), shape, dtype, limits)
        key = hashlib.sha256(encoded).digest(), syntax, shape, dtype, limits
        plane = _DECODED.get(key)
        if plane is None:
            plane = _checked(_decompressed(dataset, frame), shape, dtype, limits)
            plane.flags.writeable = False
            _DECODED.keep(key, plane, plane.nbytes)
        return plane


def _decompressed(dataset: Dataset, frame: int) -> NDArray[Any]:
    """One frame of compressed pixel data, as the codec gives it."""
    syntax = dataset.file_meta.TransferSyntaxUID
    # Uncorrected, bits above BitsStored make values out of range, which are refused then.
    options = {"correct_unused_bits": False} if syntax == uid.RLELossless else {}
    return pixel_array(dataset, index=frame, raw=True, decoding_plugin=plugin_of(syntax), **options)


def _checked(
    plane: NDArray[Any], shape: tuple[int, int], dtype: np.dtype[Any], limits: tuple[int, int]
) -> NDArray[Any]:
    """A decoded frame in native byte order, if its size, type and values are those of the header."""
    if plane.shape != shape or plane.dtype.newbyteorder("=") != dtype:
        raise RefusedError("codestream_mismatch", "header and pixel data disagree about the image; export it again")
    low, high = limits
    if high - low < (1 << 8 * dtype.itemsize) - 1 and (plane.min() < low or plane.max() > high):
        raise RefusedError(
            "unused_bits_set",
            "bits above Bits Stored are in use: an embedded overlay, or signed values that are not sign-extended; "
            "convert the overlay, extend the signs, or correct Bits Stored",
        )
    return np.ascontiguousarray(plane, dtype=dtype)


def _native(data: bytes, frame: int, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """One frame of uncompressed pixel data; ``shape`` is (frames, rows, columns)."""
    size = dtype.itemsize * math.prod(shape)
    if len(data) < size:
        raise RefusedError("truncated_pixel_data", "the file ends before its pixels do; export it again")
    if frame == 0 and data[size + size % 2 :].strip(b"\0"):  # which no copy would have
        raise RefusedError(
            "codestream_mismatch", "there are more pixels than header and frames tell; repair the header"
        )
    pixels = math.prod(shape[1:])
    return np.frombuffer(data, dtype.newbyteorder("<"), pixels, frame * pixels * dtype.itemsize).reshape(shape[1:])


def check_codestream(frame: bytes, syntax: str, shape: tuple[int, int]) -> None:
    """Raise unless a codestream has the size that the header tells; decoders allocate what the codestream tells."""
    found = _jpeg_2000_size(frame) if syntax in JPEG_2000 else _jpeg_size(frame)
    if found != (*shape, 1):
        raise RefusedError("codestream_mismatch", "header and codestream disagree about the size; export it again")


def _jpeg_2000_size(frame: bytes) -> tuple[int, int, int] | None:
    """(rows, columns, components) of a JPEG 2000 codestream (ISO 15444-1 A.5.1)."""
    if not frame.startswith(b"\xff\x4f\xff\x51"):
        return None
    _, _, _, right, bottom, left, top, components = _SIZ.unpack_from(frame)
    return bottom - top, right - left, components


def _jpeg_size(frame: bytes) -> tuple[int, int, int] | None:
    """(rows, columns, components) of the frame header of a JPEG or JPEG-LS codestream (ISO 10918-1 B.2.2)."""
    position = 2
    while frame[position] == 0xFF:
        marker = frame[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        (length,) = struct.unpack_from(">H", frame, position + 2)
        if marker == 0xF7 or 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            rows, columns, components = struct.unpack_from(">HHB", frame, position + 5)
            return rows, columns, components
        position += 2 + length
    return None


def encode(planes: NDArray[Any], header: Dataset) -> tuple[bytes, str, str]:
    """Encode new pixels, (frames, rows, columns), for a copy: value and VR of PixelData, and transfer syntax UID.

    The syntax of the source is kept if it is native or one of ``WRITTEN_COMPRESSED``; all others, lossy ones too,
    become Explicit VR Little Endian.
    """
    syntax = header.file_meta.TransferSyntaxUID
    if syntax in WRITTEN_COMPRESSED:
        try:
            return encapsulate([_compress(plane, header, syntax) for plane in planes]), "OB", syntax
        except (RuntimeError, ValueError):
            pass  # the codecs refuse tiny images; uncompressed is always possible
    value = np.ascontiguousarray(planes, planes.dtype.newbyteorder("<")).tobytes()
    vr = "OW" if planes.dtype.itemsize > 1 or syntax == uid.ImplicitVRLittleEndian else "OB"
    return value + b"\0" * (len(value) % 2), vr, syntax if syntax in NATIVE else uid.ExplicitVRLittleEndian


def _compress(plane: NDArray[Any], header: Dataset, syntax: uid.UID) -> bytes:
    return get_encoder(syntax).encode(
        plane,
        encoding_plugin=plugin_of(syntax),
        rows=plane.shape[0],
        columns=plane.shape[1],
        samples_per_pixel=1,
        number_of_frames=1,
        bits_allocated=int(header.BitsAllocated),
        bits_stored=int(header.BitsStored),
        pixel_representation=int(header.PixelRepresentation),
        photometric_interpretation=header.PhotometricInterpretation,
        pixel_keyword="PixelData",
    )
