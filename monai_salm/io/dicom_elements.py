# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the undecoded elements of a little endian data set, much faster than pydicom.

A scanner writes hundreds of elements in front of the pixels, and nearly all of them stay as they are. Most are plain:
a known type, a defined length. One loop reads these; all others (undefined lengths, odd types, files that end too
early) are left to pydicom, so that the result is always what pydicom makes of the file.

Source: PS3.5 7.1 (structure of a data element).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

from pydicom.charset import convert_encodings, default_encoding
from pydicom.datadict import dictionary_has_tag, dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement, convert_raw_data_element, empty_value_for_VR
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import data_element_generator, read_sequence
from pydicom.filewriter import write_data_element, write_sequence
from pydicom.sequence import Sequence as Items
from pydicom.tag import BaseTag
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32, STR_VR, VR

Elements = dict[BaseTag, RawDataElement | DataElement]
Stop = Callable[[BaseTag, str | None, int], bool]
"""Whether to stop in front of an element, by its tag, type and length; pydicom's ``stop_when``."""

UNDEFINED = 0xFFFFFFFF
ITEM = b"\xfe\xff\x00\xe0"
"""The tag of an item of a sequence (PS3.5 7.5), little endian."""
_CHARACTER_SET = BaseTag(0x00080005)
_PIXEL_DATA = BaseTag(0x7FE00010)
_SEQUENCE_END = b"\xfe\xff\xdd\xe0\0\0\0\0"
_TEXT = STR_VR - {VR.UI}
_SHORT, _IMPLICIT, _LONG, _WORD = map(struct.Struct, ("<HH2sH", "<HHL", "<L", "<H"))
_tag = lru_cache(maxsize=1 << 14)(BaseTag)
"""Making a tag takes longer than all else that is done with an element, and files of a kind have the same tags."""
_TYPES = {
    vr.encode(): (str(vr), vr in EXPLICIT_VR_LENGTH_32, empty_value_for_VR(vr, raw=True)) for vr in VR if len(vr) == 2
}
"""Value representation by its two bytes: name, whether lengths have four bytes, and the value of an empty element."""


def read_elements(
    data: bytes, position: int, tags: range, *, implicit: bool, least_private: int = 0
) -> tuple[Elements, int] | None:
    """The elements from a position on, up to the first whose tag is outside ``tags``.

    Args:
        data: a file, or its beginning.
        position: where the first element begins.
        tags: range of tags to read.
        implicit: whether the transfer syntax is implicit, so that elements do not tell their type.
        least_private: private elements with fewer bytes are left out, save sequences and what looks like one.

    Returns:
        The elements, none of them decoded, and the position behind them; None where ``data`` ends in the middle of an
        element, or is so odd that only pydicom can tell what it holds.
    """
    found: Elements = {}
    size = len(data)
    if size < position + 8 or data[position : position + 2] == b"\0\0":
        return None  # nothing, or elements of a command (group 0000)
    if implicit == all(0x40 < byte < 0x5B for byte in data[position + 4 : position + 6]):
        return None  # the first element shows that the file lies about ``implicit``
    first, last = tags[0], tags[-1]
    while position + 8 <= size:
        value_at = position + 8
        kind: tuple[str | None, bool, bytes | None] | None = None, False, None
        if implicit:
            group, number, length = _IMPLICIT.unpack_from(data, position)
        else:
            group, number, code, length = _SHORT.unpack_from(data, position)
            kind = _TYPES.get(code)
        if not first <= group << 16 | number <= last:
            break
        if kind is None:
            return None
        tag, (name, long, empty) = _tag(group << 16 | number), kind
        if long:
            value_at += 4
            length = int.from_bytes(data[position + 8 : value_at], "little")
        if length == UNDEFINED:
            file = io.BytesIO(data)
            file.seek(position)
            element = next(data_element_generator(file, implicit, True, encoding=_character_set(found)))
            position = file.tell()
        else:
            position = value_at + length
            if group & 1 and length < least_private and name != "SQ" and not data.startswith(ITEM, value_at):
                continue
            value = data[value_at:position] if length else empty
            element = RawDataElement(tag, name, length, value, value_at, implicit, True)
        found[tag] = element
    return (found, position) if position <= size else None


def read_rest(data: bytes, position: int, elements: Elements, stop: Stop | None, *, implicit: bool) -> None:
    """Let pydicom add the elements from a position on, until ``stop`` says so."""
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
    """The data set that pydicom would make of a file with these elements."""
    dataset = FileDataset(io.BytesIO(), Dataset(elements), preamble, meta, implicit, True)
    dataset.set_original_encoding(implicit, True, _character_set(elements))
    return dataset


def replace_elements(dataset: Dataset, elements: Iterable[DataElement | RawDataElement]) -> None:
    """Give a data set these elements in place of its own, none of them decoded."""
    dataset.clear()
    # Private creators last: once one is there, pydicom decodes the elements of its block as they are set.
    for element in sorted(elements, key=lambda element: (element.tag.is_private_creator, element.tag)):
        dataset[element.tag] = element


def pad(dataset: Dataset) -> None:
    """Pad every undecoded value of odd length, at any depth, in place (PS3.5 7.1.1 and 6.2).

    The items in an element of unknown type stay as they are: a reader would take a padding byte for the beginning of
    another item.
    """
    odd = []
    for element in dataset.values():
        value = element.value
        if isinstance(value, bytes):
            if len(value) % 2:
                odd.append(element)
        elif isinstance(value, Items):
            for item in value:
                pad(item)
    padded = {element.tag: _padded(element) for element in odd}
    if any(padded[element.tag] is not element for element in odd):
        replace_elements(dataset, [padded.get(element.tag, element) for element in dataset.values()])


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
    """The bytes of a data set, encoded as it was read; undecoded elements stay as they are.

    Retired group lengths are left out (PS3.5 7.2).

    Raises:
        ValueError: When an element belongs into the file meta or a command; and as pydicom's writer does.
    """
    implicit = dataset.original_encoding[0]
    encodings = dataset.get("SpecificCharacterSet", default_encoding)
    if _PIXEL_DATA in dataset:
        dataset[_PIXEL_DATA].is_undefined_length = dataset.file_meta.TransferSyntaxUID.is_compressed
    elements = dict(dataset.items())
    for tag in sorted(elements, key=int):
        element, group, value = elements[tag], tag >> 16, elements[tag].value
        if not tag and not value:
            continue  # zeros behind the last element, with which some writers fill the last block of a file
        if group in (0, 2):
            raise ValueError("an element of the file meta or of a command is among those of the image")
        if tag & 0xFFFF == 0 and group > 6:
            continue
        if element.is_raw and value is not None:
            undefined = element.length == UNDEFINED
        elif tag == _PIXEL_DATA and element.VR in ("OB", "OW") and isinstance(value, bytes):
            undefined = element.is_undefined_length
            if undefined and not value.startswith(ITEM):
                raise ValueError("pixel data are not encapsulated, as their transfer syntax wants them")
            value += b"\0" * (len(value) % 2)
        else:
            buffer = _buffer(implicit)
            write_data_element(buffer, dataset.get_item(tag), encodings)
            yield buffer.getvalue()
            continue
        head, size = _head(tag, "" if implicit else element.VR)
        yield head + size.pack(UNDEFINED if undefined else len(value))
        yield value
        if undefined:
            yield _SEQUENCE_END


@lru_cache(maxsize=1 << 14)
def _head(tag: BaseTag, vr: str) -> tuple[bytes, struct.Struct]:
    """The bytes in front of an element's length, and the format of the length; ``vr`` is empty in implicit files."""
    begin = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr.encode(default_encoding)
    if not vr:
        return begin, _LONG
    return (begin + b"\0\0", _LONG) if vr in EXPLICIT_VR_LENGTH_32 else (begin, _WORD)


def _buffer(implicit: bool) -> DicomBytesIO:
    buffer = DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = implicit, True
    return buffer


def encode_element(keyword: str, value: str | bytes, *, implicit: bool) -> bytes:
    """The bytes of an element, from ASCII text or from a value that is encoded already."""
    tag, vr = _named(keyword)
    if isinstance(value, str):
        value = value.encode(default_encoding)
        value += (b"\0" if vr == "UI" else b" ") * (len(value) % 2)
    head, size = _head(tag, "" if implicit else vr)
    return head + size.pack(len(value)) + value


def encode_item(*, implicit: bool, **values: str | bytes) -> bytes:
    """The bytes of one item of a sequence, from values by keyword; these are as in :py:func:`encode_element`."""
    names = sorted(values, key=tag_for_keyword)
    content = b"".join(encode_element(name, values[name], implicit=implicit) for name in names)
    return ITEM + _LONG.pack(len(content)) + content


def decode_items(value: bytes, *, implicit: bool) -> Items:
    """The items of a sequence's bytes."""
    return read_sequence(io.BytesIO(value), implicit, True, len(value), default_encoding)


def encode_items(dataset: Dataset, keyword: str) -> bytes:
    """The bytes of a sequence's items, whose values are padded in place; nothing where it is empty or missing."""
    items = dataset.get(keyword)
    if not items:
        return b""
    for item in items:
        pad(item)
    buffer = _buffer(dataset.original_encoding[0])
    encodings = convert_encodings(dataset.get("SpecificCharacterSet", default_encoding) or [default_encoding])
    write_sequence(buffer, dataset[keyword], encodings)
    return buffer.getvalue()


@lru_cache(maxsize=1 << 10)
def _named(keyword: str) -> tuple[BaseTag, str]:
    tag = BaseTag(tag_for_keyword(keyword))
    return tag, str(dictionary_VR(tag))
