# SPDX-License-Identifier: Apache-2.0
"""Finds a second copy of the image in a file, besides the pixel data: it would be released unprotected.

Only by tests that are cheap and certain, because manufacturers' private elements are large too and must not be refused.
docs/dicom.md lists what is looked for; a copy that is encoded in another way is not found.
"""

from __future__ import annotations

import binascii
import re
import string
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.tag import BaseTag

from monai_salm.io.base import RefusedError
from monai_salm.io.dicom_elements import ITEM, decode_items
from monai_salm.io.dicom_guard import MAX_DEPTH, too_deep
from monai_salm.io.dicom_parse import ICON, LARGE_PRIVATE_BYTES, MAX_HEADER_BYTES, PIXEL_TAGS, holds_pixels
from monai_salm.io.dicom_pixels import decode

_IMAGE = re.compile(
    rb"(?:\xff\xd8\xff|\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n"  # JPEG and JPEG-LS, JPEG 2000, JP2
    rb"|[\x01\x02]\0\0\0\x40\0\0\0.{4}\0{52}"  # RLE of DICOM, of 8 and 16 bits
    rb"|\x89PNG\r\n|II[*+]\0|MM\0[*+]|GIF8[79]a"
    rb"|PK\x03\x04|BZh[1-9]1AY&SY|\xfd7zXZ\0|7z\xbc\xaf\x27\x1c|.{128}DICM)",
    re.DOTALL,
)
"""How image files and archives begin; not gzip, which manufacturers use for short texts."""
_TEXT = string.printable.encode()
_SPACE = string.whitespace.encode()
_HEX = string.hexdigits.encode()
_BASE64 = (string.ascii_letters + string.digits + "+/-_=").encode() + _SPACE + b"\0"
_FROM_URLS = bytes.maketrans(b"-_", b"+/")
_GZIP = b"\x1f\x8b"
_ZLIB_OR_GZIP = 47
_CHUNK = 1 << 14
"""Bytes unpacked at a time: zlib copies what follows the end of a member, and a hostile value has many members."""
_WRAPPINGS = 3
"""Layers of encoding that are removed: 3 for base64 of gzip of gzip."""
LEAST_PART = 64
"""Fewest bytes of an element that may be one part of a copy; a part is at least a row of the image."""
_LEFT_OUT = frozenset({ICON, *PIXEL_TAGS})
_LIKE = 0.9
"""Correlation above which values are a picture's, whatever their scale; tables and texts stay far below."""
_KINDS = {1: ["u1"], 2: ["<u2", ">u2", "<i2", ">i2"], 4: ["<f4", ">f4", "<i4", ">i4"], 8: ["<f8", ">f8"]}
"""numpy types that a picture may have been converted to, by bytes per pixel."""
_NUMBERS = (1e-9, 1e9)
"""Range of magnitudes in tables of floating point numbers; the bytes of a picture, read as such, leave it."""


class Value(NamedTuple):
    """The bytes of an undecoded element.

    Args:
        tag: of the element; of one inside a value that only looks like a sequence, that of the value.
        private: whether it, or a sequence around it, is private.
        content: its bytes.
    """

    tag: BaseTag
    private: bool
    content: bytes


class _Image:
    """The image of a file, with which other elements are compared."""

    def __init__(self, header: Dataset) -> None:
        self._header = header
        self.pixels = int(header.Rows) * int(header.Columns)
        self.frames = int(header.get("NumberOfFrames") or 1)
        self.frame_bytes = self.pixels * int(header.BitsAllocated) // 8

    def lengths(self, length: int, spare: int = 1) -> Iterator[tuple[int, int]]:
        """Every (frames, bytes per pixel) whose pixels take ``length`` bytes, less up to ``spare`` of padding."""
        for frames in dict.fromkeys((1, self.frames)):
            for width in _KINDS:
                if 0 <= length - frames * width * self.pixels <= spare:
                    yield frames, width

    def is_as_long(self, length: int, spare: int = 1) -> bool:
        """Whether one frame, or all, take ``length`` bytes with one or two bytes per pixel."""
        return any(width <= 2 for _, width in self.lengths(length, spare))

    def is_like(self, content: bytes) -> bool:
        """Whether bytes as long as the pixels are the picture, of any type and scale, mirrored or turned."""
        for frames, width in self.lengths(len(content)):
            for index in [self.frames // 2] if frames > 1 else range(self.frames):
                plane = decode(self._header, index)
                start = index * width * self.pixels if frames > 1 else 0
                for kind in _KINDS[width]:
                    found = np.frombuffer(content, kind, self.pixels, start)
                    if any(_correlation(found, turned.ravel()) > _LIKE for turned in _turned(plane)):
                        return True
        return False


def check_copies(header: Dataset, values: Sequence[Value]) -> None:
    """Raise where an element besides the pixel data is a copy of the image, or looks like one.

    Args:
        header: of a supported image; if it has its pixel data, copies of these are looked for too.
        values: from :py:func:`undecoded`, called before any element was decoded.

    Raises:
        RefusedError: ``pixel_copy``; ``nested_too_deep``; of pixel data that are broken as ``dicom_pixels.decode``.
    """
    if holds_pixels(header):
        raise RefusedError("pixel_copy", "a sequence holds another image; remove it first")
    image = _Image(header)
    if image.frame_bytes * image.frames < LARGE_PRIVATE_BYTES:
        return
    large = [value for value in values if len(value.content) >= LARGE_PRIVATE_BYTES]
    for tag, private, content in large:
        rule = _rule(content, image.pixels)
        if rule is None and private and image.is_as_long(len(content)) and not _is_plain(content):
            rule = "is as long as the pixels, of 8 or 16 bits"
        if rule is not None:
            raise RefusedError("pixel_copy", f"element {tag} {rule}; remove it first")
    parts = list(_parts(values, image, max(int(header.Columns), LEAST_PART)))
    if "PixelData" in header:
        _check_pixels(header, image, large, parts)
    else:
        for each in parts:
            if image.is_as_long(sum(map(len, each)), spare=len(each)) and not all(map(_is_plain, each)):
                raise _in_parts(each)


def _parts(values: Sequence[Value], image: _Image, least: int) -> Iterator[list[bytes]]:
    """Groups of private elements of equal length that are as long as the pixels together: halves, or rows."""
    found: dict[int, list[bytes]] = defaultdict(list)
    for _, private, content in values:
        if private and len(content) >= least:
            found[len(content)].append(content)
    for length, parts in found.items():
        if len(parts) > 1 and any(image.lengths(len(parts) * length, spare=len(parts))):
            yield parts


def _in_parts(parts: Sequence[bytes]) -> RefusedError:
    told = f"{len(parts)} private elements of {len(parts[0])} bytes are as long as the pixels"
    return RefusedError("pixel_copy", f"{told}; remove them first")


def _check_pixels(dataset: Dataset, image: _Image, values: Sequence[Value], parts: Sequence[list[bytes]]) -> None:
    """Look for the encoded pixel data, for one decoded frame, and for anything that correlates with it."""
    least = min(image.frame_bytes, len(dataset.PixelData))
    limit = max(8 * image.pixels, min(8 * image.pixels * image.frames, MAX_HEADER_BYTES)) + LARGE_PRIVATE_BYTES
    plane, copies = None, []
    for tag, _, content in values:
        for _, form in _forms(content, limit):
            if len(form) < least and not any(image.lengths(len(form))):
                continue
            if plane is None:
                plane = decode(dataset, image.frames // 2)
                copies = [dataset.PixelData] + [plane.tobytes()] * bool(plane.min() < plane.max())
            if any(copy in form for copy in copies) or image.is_like(form):
                raise RefusedError("pixel_copy", f"element {tag} holds the pixels; remove it first")
    for each in parts:
        if any(image.is_like(joined) for joined in _joined(each, image)):
            raise _in_parts(each)


def _joined(parts: Sequence[bytes], image: _Image) -> Iterator[bytes]:
    """Parts joined one after the other, and interleaved byte by byte; without the padding of each."""
    count, length = len(parts), len(parts[0])
    for frames, width in image.lengths(count * length, spare=count):
        spare = count * length - frames * width * image.pixels
        table = np.frombuffer(b"".join(parts), np.uint8).reshape(count, length)[:, : length - spare // count]
        for order in (table, table.T):
            yield order.tobytes()[: frames * width * image.pixels]


def _turned(plane: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for rows in (plane, plane[::-1]):
        for columns in (rows, rows[:, ::-1]):
            yield from (columns, columns.T)


def _correlation(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Absolute correlation; 0 where either is constant."""
    with np.errstate(all="ignore"):  # of what is no number, which is like nothing
        one, other = (each.astype(np.float32) - np.float32(each.mean()) for each in (one, other))
        norm = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
        return abs(float(one @ other)) / norm if norm else 0.0


def undecoded(header: Dataset) -> list[Value]:
    """All undecoded values at any depth, except short ones, the pixel data, and icons, which no copy keeps.

    Elements that were decoded before are not among them.

    Raises:
        RefusedError: ``nested_too_deep``.
    """
    return list(_values(header))


def _values(dataset: Dataset, private: bool = False, depth: int = 0, around: BaseTag | None = None) -> Iterator[Value]:
    if depth > MAX_DEPTH:
        raise too_deep()
    for tag, element in dataset.items():
        value = element.value
        raw = isinstance(value, bytes)
        if raw and len(value) < LEAST_PART or around is None and tag in _LEFT_OUT:
            continue
        inside = private or tag.is_private
        if raw:
            yield Value(around or tag, inside, value)
            for item in _items(element):  # the bytes may only look like items: tell the tag of the value then
                yield from _values(item, inside, depth + 1, around or tag)
        elif isinstance(value, Items):
            for item in value:
                yield from _values(item, inside, depth + 1, around)


def _items(element: RawDataElement | DataElement) -> Sequence[Dataset]:
    """Items of a large undecoded value that looks like a sequence; the element itself stays undecoded."""
    value = element.value
    if not isinstance(value, bytes) or len(value) < LARGE_PRIVATE_BYTES or not value.startswith(ITEM):
        return ()
    try:
        return decode_items(value, implicit=element.VR != "SQ")
    except Exception:
        return ()


def _rule(value: bytes, pixels: int) -> str | None:
    """Why a value is taken for a copy of an image of ``pixels`` pixels; None where it is not."""
    for how, form in _forms(value, pixels):
        if any(_IMAGE.match(part) for part in _fragments(form)):
            return f"is {how} of an image or an archive" if how else "begins as an image file or an archive does"
        if how and len(form) >= pixels and not _is_text(form):
            return f"is {how} of at least as many bytes as there are pixels"
    return None


def _fragments(value: bytes) -> Iterator[bytes]:
    """A value, and the beginning of each of its fragments where it is encapsulated pixel data (PS3.5 A.4)."""
    yield value
    position = 0
    while value.startswith(ITEM, position) and position + 8 <= len(value):
        (length,) = struct.unpack_from("<L", value, position + 4)
        yield value[position + 8 : position + 8 + min(length, 256)]
        position += 8 + length


def _forms(value: bytes, limit: int, depth: int = 0) -> Iterator[tuple[str, bytes]]:
    """A value (with an empty name) and its decoded forms, each with the name of the outermost encoding."""
    yield "", value
    if depth == _WRAPPINGS:
        return
    for how, content in _unwrapped(value, limit):
        for _, form in _forms(content, limit, depth + 1):
            yield how, form


def _unwrapped(value: bytes, limit: int) -> Iterator[tuple[str, bytes]]:
    """Name and content of each encoding that a value may have; ``limit`` is the most bytes that zlib may unpack."""
    for start in (0, 4):  # behind a length, too
        if unpacked := _unpack(value[start:], limit):
            yield "zlib or gzip", unpacked
    if value.strip(_BASE64):
        return
    text = value.translate(_FROM_URLS, _SPACE + b"=\0")
    if not text.strip(_HEX):
        yield "hexadecimal text", bytes.fromhex(text[: len(text) // 2 * 2].decode("ascii"))
    if not text.strip(_BASE64):
        yield "base64", binascii.a2b_base64(text[: len(text) // 4 * 4])


def _unpack(value: bytes, limit: int) -> bytes:
    """Unpack zlib, or gzip of one or more members, up to ``limit`` bytes; empty where it is neither."""
    if value[:2] != _GZIP and (value[:1] != b"\x78" or int.from_bytes(value[:2], "big") % 31):
        return b""
    found: list[bytes] = []
    position, left, member = 0, limit, zlib.decompressobj(_ZLIB_OR_GZIP)
    while left > 0 and position < len(value):
        if member.eof:
            if not value.startswith(_GZIP, position):
                break
            member = zlib.decompressobj(_ZLIB_OR_GZIP)
        chunk = value[position : position + _CHUNK]
        try:
            found.append(member.decompress(chunk, left))
        except zlib.error:
            break
        position += len(chunk) - len(member.unused_data)
        left -= len(found[-1])
    return b"".join(found)


def _is_plain(value: bytes) -> bool:
    """Whether bytes are certainly no picture: constant, text, or a table of floating point numbers."""
    return not value.strip(value[:1]) or not value.rstrip(b"\0").translate(None, _TEXT) or _is_numbers(value)


def _is_text(value: bytes) -> bool:
    """Whether nearly all bytes are printable, or all are zero; zeros at the end are padding, others are no text."""
    told = value.rstrip(b"\0")
    return len(told.translate(None, _TEXT)) <= len(told) / 8


def _is_numbers(value: bytes) -> bool:
    """Whether bytes are a table of floating point numbers of believable size."""
    low, high = _NUMBERS
    for kind in ("<f8", "<f4", ">f8", ">f4"):
        if len(value) % np.dtype(kind).itemsize == 0:
            sizes = np.abs(np.frombuffer(value, kind))
            if bool(((sizes == 0) | (sizes >= low) & (sizes <= high)).all()):  # false of what is no number
                return True
    return False
