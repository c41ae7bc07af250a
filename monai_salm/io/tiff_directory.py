# SPDX-License-Identifier: Apache-2.0
"""The directory of a TIFF file, and of an Exif block, which is a small one (TIFF 6.0, section 2)."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from monai_salm.io.base import RefusedError

PREVIEW_MARK = b"xmpGImg:image"
"""Name of the XMP property that holds a picture."""
MAX_ENTRIES = 512
"""Most entries of a directory; real ones have fewer than 100."""
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
"""Field type -> bytes of one value."""
NUMBERS = {1: "B", 3: "H", 4: "I"}
"""Types of unsigned integers, as ``struct`` calls them."""
_PREVIEWS = {513, 514, 37500}  # a JPEG preview; a maker's note, which may hold one


@dataclass(frozen=True)
class Field:
    """One entry of a directory: type and number of its values, and the position where they are."""

    type: int
    count: int
    at: int

    @property
    def size(self) -> int:
        """Bytes of all its values; 0 of an unknown type."""
        return SIZES.get(self.type, 0) * self.count


@dataclass(frozen=True)
class Directory:
    """The tags of an image.

    Args:
        content: the file.
        order: byte order, as ``struct`` writes it.
        fields: by tag.
        following: position of the next directory; 0 where there is none.
        start: position of the first byte of the directory.
        end: position behind its last byte.
    """

    content: bytes
    order: str
    fields: dict[int, Field]
    following: int
    start: int
    end: int

    def numbers(self, tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Unsigned integers of a tag."""
        field = self.fields.get(tag)
        if field is None:
            return default
        if field.type not in NUMBERS or not field.count:
            raise RefusedError("broken_header", f"tag {tag} of the TIFF file holds no number; save the image again")
        return struct.unpack_from(f"{self.order}{field.count}{NUMBERS[field.type]}", self.content, field.at)

    def number(self, tag: int, default: int) -> int:
        """The one value of a tag (the first of several equal ones)."""
        values = self.numbers(tag, (default,))
        if len(set(values)) > 1:
            raise RefusedError("unsupported_type", f"the samples of a pixel differ in tag {tag}; save the image again")
        return values[0]


def read_directory(content: bytes) -> Directory:
    """The first directory of a file.

    Raises:
        RefusedError: ``big_tiff``, ``broken_header`` or ``truncated_file``.
    """
    order = {b"II": "<", b"MM": ">"}.get(content[:2])
    if content[2:4] in (b"+\0", b"\0+"):
        raise RefusedError("big_tiff", "BigTIFF files are not supported; save the image as classic TIFF")
    if order is None or len(content) < 8 or struct.unpack_from(f"{order}H", content, 2)[0] != 42:
        raise RefusedError("broken_header", "this is not a complete TIFF header")
    try:
        start = struct.unpack_from(f"{order}I", content, 4)[0]
        entries = struct.unpack_from(f"{order}H", content, start)[0]
        if entries > MAX_ENTRIES:
            raise RefusedError("broken_header", f"the TIFF directory has {entries} entries; save the image again")
        end = start + 2 + 12 * entries
        fields = dict(_entry(content, order, at) for at in range(start + 2, end, 12))
        return Directory(content, order, fields, struct.unpack_from(f"{order}I", content, end)[0], start, end + 4)
    except struct.error as error:
        raise RefusedError("truncated_file", "the TIFF directory leaves the file; export the image again") from error


def _entry(content: bytes, order: str, at: int) -> tuple[int, Field]:
    tag, kind, count = struct.unpack_from(f"{order}HHI", content, at)
    field = Field(kind, count, at + 8)
    if field.size > 4:
        field = replace(field, at=struct.unpack_from(f"{order}I", content, at + 8)[0])
    if field.at + field.size > len(content):
        raise RefusedError("truncated_file", f"tag {tag} of the TIFF file leaves the file; export the image again")
    return tag, field


def check_exif(data: bytes) -> None:
    """Refuse an Exif block (a small TIFF file) that holds a preview of the image.

    Raises:
        RefusedError: When it does, or cannot be read.
    """
    found = read_directory(data)
    if found.following or _PREVIEWS & found.fields.keys():
        raise RefusedError("embedded_preview", "the Exif data hold a preview of the image; save it without metadata")
