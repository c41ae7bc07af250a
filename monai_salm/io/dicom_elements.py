# SPDX-License-Identifier: Apache-2.0
"""The elements of a little endian data set as they stand in a file, read and written many at a time.

A scanner writes hundreds of elements in front of the pixels, and nearly all of them stay as they are. pydicom looks at
each with care that only few need: undefined lengths, odd types, files that end too early. Here the plain ones are taken
in one loop; the others are left to pydicom, so that what comes out is what pydicom makes of the file.

Source: PS3.5 7.1 (structure of a data element).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

from pydicom.charset import convert_encodings, default_encoding
from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement, convert_raw_data_element, empty_value_for_VR
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import data_element_generator
from pydicom.filewriter import write_data_element
from pydicom.sequence import Sequence as Items
from pydicom.tag import BaseTag
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32, STR_VR, VR

__all__ = [
    "ITEM",
    "Elements",
    "Stop",
    "pad",
    "read_elements",
    "read_rest",
    "replace_elements",
    "to_dataset",
    "to_meta",
    "write_elements",
]

Elements = dict[BaseTag, RawDataElement | DataElement]
Stop = Callable[[BaseTag, str | None, int], bool]
"""As pydicom asks before it reads a value, by tag, type and length."""

UNDEFINED = 0xFFFFFFFF
ITEM = b"\xfe\xff\x00\xe0"
"""How an item of a sequence begins (PS3.5 7.5), little endian."""
_CHARACTER_SET = BaseTag(0x00080005)
_PIXEL_DATA = BaseTag(0x7FE00010)
_SEQUENCE_END = b"\xfe\xff\xdd\xe0\0\0\0\0"
_TEXT = STR_VR - {VR.UI}
_SHORT, _IMPLICIT, _LONG = struct.Struct("<HH2sH"), struct.Struct("<HHL"), struct.Struct("<L")
_tag = lru_cache(maxsize=1 << 14)(BaseTag)
"""To make one takes longer than all else that is done with an element, and files of a kind have the same ones."""
_TYPE = struct.Struct("<2sH")
_LONG_HEADER = struct.Struct("<HH2s2xL")
_TYPES = {
    vr.encode(): (str(vr), vr in EXPLICIT_VR_LENGTH_32, empty_value_for_VR(vr, raw=True)) for vr in VR if len(vr) == 2
}
"""By the two bytes in the file: name, whether the length has four bytes, and the value of an empty element."""


def read_elements(data: bytes, position: int, tags: range, *, implicit: bool) -> tuple[Elements, int] | None:
    """The elements from a position on, up to the first that is not wanted.

    Args:
        data: a file, or as much of it as is there.
        position: of an element.
        tags: of the elements that are wanted.
        implicit: whether elements do not tell their type.

    Returns:
        The elements, none of them decoded, and the position of what comes next; None where ``data`` ends in the middle
        of an element, or is so odd that only pydicom can tell what it holds.
    """
    found: Elements = {}
    size = len(data)
    if size < position + 8 or data[position : position + 2] == b"\0\0":
        return None  # nothing, or elements of a command
    if implicit == all(0x40 < byte < 0x5B for byte in data[position + 4 : position + 6]):
        return None  # the first element tells its type, or does not, and the file says otherwise
    while position + 8 <= size:
        name, empty, value_at = None, None, position + 8
        group, number, length = _IMPLICIT.unpack_from(data, position)
        if (group << 16 | number) not in tags:  # of plain integers: a range looks for others one by one
            break
        tag = _tag(group << 16 | number)
        if not implicit:
            code, length = _TYPE.unpack_from(data, position + 4)
            if code not in _TYPES:
                return None
            name, long, empty = _TYPES[code]
            if long:
                value_at += 4
                if value_at > size:
                    return None
                (length,) = _LONG.unpack_from(data, position + 8)
        if length == UNDEFINED:
            file = io.BytesIO(data)
            file.seek(position)
            element = next(data_element_generator(file, implicit, True, encoding=_character_set(found)))
            position = file.tell()
        else:
            position = value_at + length
            value = data[value_at:position] if length else empty
            element = RawDataElement(tag, name, length, value, value_at, implicit, True)
        found[tag] = element
    return (found, position) if position <= size else None


def read_rest(data: bytes, position: int, elements: Elements, stop: Stop | None, *, implicit: bool) -> None:
    """Add what follows, by pydicom, until ``stop`` says so."""
    file = io.BytesIO(data)
    file.seek(position)
    for element in data_element_generator(file, implicit, True, stop, encoding=_character_set(elements)):
        elements[element.tag] = element


def _character_set(elements: Elements) -> str | list[str]:
    if _CHARACTER_SET not in elements:
        return default_encoding
    return convert_encodings(convert_raw_data_element(elements[_CHARACTER_SET]).value)


def to_meta(elements: Elements) -> FileMetaDataset:
    """The file meta of these elements."""
    meta = FileMetaDataset(Dataset(elements))
    meta.set_original_encoding(False, True, default_encoding)
    return meta


def to_dataset(preamble: bytes, meta: FileMetaDataset, elements: Elements, *, implicit: bool) -> FileDataset:
    """The data set that pydicom makes of a file with these elements."""
    dataset = FileDataset(io.BytesIO(), Dataset(elements), preamble, meta, implicit, True)
    dataset.set_original_encoding(implicit, True, _character_set(elements))
    return dataset


def replace_elements(dataset: Dataset, elements: Iterable[DataElement | RawDataElement]) -> None:
    """Let a data set have these elements in place of its own."""
    dataset.clear()
    # Private creators last: once they are there, pydicom decodes the elements of their block as they are set.
    for element in sorted(elements, key=lambda element: (element.tag.is_private_creator, element.tag)):
        dataset[element.tag] = element


def pad(dataset: Dataset) -> None:
    """Give each value that nobody has decoded, at any depth, an even length (PS3.5 7.1.1 and 6.2).

    Bytes that are items stay as they are, of types that nobody knows: who reads them takes what pads them for another
    item, which has no end.
    """
    elements = list(dataset.values())
    for element in elements:
        for item in element.value if isinstance(element.value, Items) else ():
            pad(item)
    padded = [_padded(element) for element in elements]
    if any(new is not old for new, old in zip(padded, elements, strict=True)):
        replace_elements(dataset, padded)


def _padded(element: DataElement | RawDataElement) -> DataElement | RawDataElement:
    value, vr = element.value, element.VR
    if not isinstance(value, bytes) or len(value) % 2 == 0 or value.startswith(ITEM):
        return element
    if element.is_raw and element.length == UNDEFINED:
        return element
    if vr in (None, "UN") and dictionary_has_tag(element.tag):
        vr = dictionary_VR(element.tag)
    value += b" " if vr in _TEXT else b"\0"
    if element.is_raw:
        return element._replace(value=value, length=len(value))
    return DataElement(element.tag, element.VR, value)


def write_elements(dataset: Dataset) -> Iterator[bytes]:
    """The bytes of a data set, encoded as it was read; elements that nobody decoded stay as they are.

    Retired group lengths are left out (PS3.5 7.2).

    Raises:
        ValueError: When an element belongs into the file meta or a command; and as pydicom's writer does.
    """
    implicit = dataset.original_encoding[0]
    encodings = dataset.get("SpecificCharacterSet", default_encoding)
    if _PIXEL_DATA in dataset:  # pydicom pads them, and refuses those that are not encapsulated where they must be
        dataset[_PIXEL_DATA].is_undefined_length = dataset.file_meta.TransferSyntaxUID.is_compressed
    elements = dict(dataset.items())
    for tag in sorted(elements, key=int):
        element, group = elements[tag], tag >> 16
        if tag == 0 and not element.value:
            continue  # zeros behind the last element, which fill a file up to whole blocks
        if group in (0, 2):
            raise ValueError("an element of the file meta or of a command is among those of the image")
        if tag & 0xFFFF == 0 and group > 6:
            continue
        if not element.is_raw or element.value is None:
            buffer = DicomBytesIO()
            buffer.is_implicit_VR, buffer.is_little_endian = implicit, True
            write_data_element(buffer, dataset.get_item(tag), encodings)
            yield buffer.getvalue()
            continue
        length = UNDEFINED if element.length == UNDEFINED else len(element.value)
        if implicit:
            yield _IMPLICIT.pack(group, tag & 0xFFFF, length)
        elif element.VR in EXPLICIT_VR_LENGTH_32:
            yield _LONG_HEADER.pack(group, tag & 0xFFFF, element.VR.encode(default_encoding), length)
        else:
            yield _SHORT.pack(group, tag & 0xFFFF, element.VR.encode(default_encoding), length)
        yield element.value
        if length == UNDEFINED:
            yield _SEQUENCE_END
