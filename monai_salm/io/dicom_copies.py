# SPDX-License-Identifier: Apache-2.0
"""Does a file hold its picture once more, besides the pixel data? Such a copy would leave unprotected.

Only by what is cheap and certain: makers' own headers are large too, and must stay. What is looked for is listed in
docs/dicom.md; a copy that is encoded in another way is not found.
"""

from __future__ import annotations

import binascii
import io
import re
import string
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pydicom.charset import default_encoding
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.filereader import read_sequence
from pydicom.sequence import Sequence as Items
from pydicom.tag import BaseTag

from monai_salm.io.base import RefusedError
from monai_salm.io.dicom_parse import ICON, ITEM, LARGE_PRIVATE_BYTES, MAX_DEPTH, PIXEL_TAGS, holds_pixels, too_deep
from monai_salm.io.dicom_pixels import decode

__all__ = ["check_copies"]

_IMAGE = re.compile(
    rb"(?:\xfe\xff\0\xe0.{4}(?:\0{4})?){0,2}"  # items, as of encapsulated pixel data; the first one may hold an offset
    rb"(?:\xff\xd8\xff|\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n"  # JPEG and JPEG-LS, JPEG 2000, JP2
    rb"|[\x01\x02]\0\0\0\x40\0\0\0.{4}\0{52}"  # RLE of DICOM, of 8 and 16 bits
    rb"|\x89PNG\r\n|II[*+]\0|MM\0[*+]|GIF8[79]a"
    rb"|PK\x03\x04|BZh[1-9]1AY&SY|\xfd7zXZ\0|7z\xbc\xaf\x27\x1c|.{128}DICM)",
    re.DOTALL,
)
"""How images and archives begin; gzip is not among them, for makers write short texts with it."""
_TEXT = string.printable.encode()
_SPACE = string.whitespace.encode()
_BASE64 = (string.ascii_letters + string.digits + "+/=").encode() + _SPACE + b"\0"
_ZLIB_OR_GZIP = 47
_MIN_PART = 64
"""Bytes of an element that may be part of a copy; a part is a row at least."""


class _Value(NamedTuple):
    """An element that nobody has decoded, and whether it or a sequence around it is private."""

    tag: BaseTag
    private: bool
    content: bytes


def check_copies(header: Dataset) -> None:
    """Raise where an element besides the pixel data is a copy of the image, or looks like one.

    Args:
        header: of a supported image; with the pixel data, these are looked for too.

    Raises:
        RefusedError: ``pixel_copy``; ``nested_too_deep``; of pixel data that are broken as ``dicom_pixels.decode``.
    """
    if holds_pixels(header):
        raise RefusedError("pixel_copy", "a sequence holds another image; remove it first")
    pixels, frames = int(header.Rows) * int(header.Columns), int(header.get("NumberOfFrames") or 1)
    size = pixels * int(header.BitsAllocated) // 8
    if size * frames < LARGE_PRIVATE_BYTES:
        return
    values = list(_values(header))
    large = [value for value in values if len(value.content) >= LARGE_PRIVATE_BYTES]
    for tag, private, content in large:
        rule = _rule(content, pixels)
        if rule is None and private and _is_as_long(len(content), pixels, frames) and content.strip(content[:1]):
            rule = "is as long as the pixels, of 8 or 16 bits"
        if rule is not None:
            raise RefusedError("pixel_copy", f"element {tag} {rule}; remove it first")
    lengths = Counter(len(content) for _, private, content in values if private)
    for length, count in lengths.items():
        if (
            count > 1
            and length >= max(header.Columns, _MIN_PART)
            and _is_as_long(count * length, pixels, frames, spare=count)
        ):
            raise RefusedError(
                "pixel_copy", f"{count} private elements of {length} bytes are as long as the pixels; remove them first"
            )
    if "PixelData" in header and any(len(value.content) >= min(size, len(header.PixelData)) for value in large):
        _check_pixels(header, large, frames)


def _check_pixels(dataset: Dataset, values: Sequence[_Value], frames: int) -> None:
    """The pixel data as they stand in the file, and one decoded frame, wherever they stand in another element."""
    plane = decode(dataset, frames // 2)
    copies = [dataset.PixelData] if plane.min() == plane.max() else [dataset.PixelData, plane.tobytes()]
    for tag, _, content in values:
        if any(copy in content for copy in copies):
            raise RefusedError("pixel_copy", f"element {tag} holds the pixels; remove it first")


def _values(dataset: Dataset, private: bool = False, depth: int = 0) -> Iterator[_Value]:
    """What nobody has decoded, at any depth, save icons, which no copy keeps, and the pixels themselves."""
    if depth > MAX_DEPTH:
        raise too_deep()
    for tag, element in dataset.items():
        if tag == ICON or tag in PIXEL_TAGS:
            continue
        inside = private or tag.is_private
        if isinstance(element.value, bytes):
            yield _Value(tag, inside, element.value)
        for item in element.value if isinstance(element.value, Items) else _items(element):
            yield from _values(item, inside, depth + 1)


def _items(element: RawDataElement | DataElement) -> Sequence[Dataset]:
    """What stands in bytes that may be a sequence; they stay as they are."""
    value = element.value
    if not isinstance(value, bytes) or len(value) < LARGE_PRIVATE_BYTES or not value.startswith(ITEM):
        return ()
    try:
        return read_sequence(io.BytesIO(value), element.VR != "SQ", True, len(value), default_encoding)
    except Exception:
        return ()


def _is_as_long(length: int, pixels: int, frames: int, spare: int = 1) -> bool:
    """Whether so many bytes are those of a frame or of all, of one or two bytes per pixel, padded or not."""
    return any(0 <= length - size <= spare for n in (1, frames) for size in (n * pixels, 2 * n * pixels))


def _rule(value: bytes, pixels: int) -> str | None:
    """Why a value is taken for a copy of an image with so many pixels, if it is."""
    if _IMAGE.match(value):
        return "begins as an image file or an archive does"
    if any(_unpacks(value[start:], pixels) for start in (0, 4)):
        return "is packed and holds at least as many bytes as there are pixels"
    text = b"" if value.strip(_BASE64) else value.translate(None, _SPACE + b"=\0")
    if text:
        decoded = binascii.a2b_base64(text[: len(text) // 4 * 4])
        if len(decoded) >= pixels or _rule(decoded, pixels):
            return "is base64 of an image, or of as many bytes as there are pixels"
    return None


def _unpacks(value: bytes, least: int) -> bool:
    """Whether zlib or gzip makes at least so many bytes of it, and no text, which is what makers pack."""
    head = value[:2]
    if head != b"\x1f\x8b" and (head[:1] != b"\x78" or int.from_bytes(head, "big") % 31):
        return False
    try:
        unpacked = zlib.decompressobj(_ZLIB_OR_GZIP).decompress(value, least)
    except zlib.error:
        return False
    told = unpacked.translate(None, b"\0")
    return len(unpacked) >= least and len(told.translate(None, _TEXT)) > len(told) / 8
