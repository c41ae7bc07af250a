# SPDX-License-Identifier: Apache-2.0
"""Bytes of a file -> pydicom ``Dataset``, for files that may be broken or hostile.

Sizes are checked before anything is allocated, deflated files are refused, and what pydicom says about values is
suppressed (``dicom_guard``).
"""

from __future__ import annotations

import io
import os
import stat
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from pydicom import uid
from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.dataset import Dataset, FileDataset
from pydicom.filereader import read_dataset, read_partial
from pydicom.sequence import Sequence as Items
from pydicom.tag import BaseTag

from monai_salm.io.base import RefusedError
from monai_salm.io.dicom_elements import ITEM, Elements, Stop, read_elements, read_rest, to_dataset, to_meta
from monai_salm.io.dicom_endian import to_little_endian
from monai_salm.io.dicom_guard import MAX_DEPTH, refusing, too_deep
from monai_salm.io.dicom_syntax import check_syntax

MAX_FILE_BYTES = 512 << 20
MAX_PIXEL_BYTES = 256 << 20
"""Decoded size of one image; the largest mammograms have about 40 MiB."""
MAX_FRAMES_BYTES = 1 << 30
"""Decoded size of an image with many frames; 1,000 frames of 512 x 512 have 500 MiB."""
MAX_EXPANSION = 1000
"""Largest believable ratio of decoded to encoded pixel data."""
MAX_HEADER_BYTES = 64 << 20
HEAD_BYTES = 1 << 16
"""Read of a file first, to find its header; few headers are larger."""
MAX_KEPT_BYTES = 16 << 20
"""Largest file whose elements are kept for the next time that it is parsed."""
LARGE_PRIVATE_BYTES = 4096
"""A private element of at least this size may be a copy of the pixels."""
META_TAGS, IMAGE_TAGS = range(0x00020000, 0x00030000), range(0x7FE00008)
PIXEL_TAGS = {0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData", 0x7FE00010: "PixelData"}
ICON = 0x00880200
STANDARD_ROOT = "1.2.840.10008."
"""UIDs below it are defined by the DICOM standard itself; they name no instance."""
_ITEM_OR_END = (ITEM, b"\xfe\xff\xdd\xe0")
"""How the value of a sequence begins: with an item, or with the end of an empty sequence."""
_NESTED_PIXELS = b"\xe0\x7f\x10\x00"
_UIDS = ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
_LAST_UID = 0x0020000E
"""Tag of SeriesInstanceUID, the last of them in a file."""
_UIDS_WITHIN = 1 << 20
_IDENTITY = ("SOPClassUID", *_UIDS, "PatientID")

_last: tuple[bytes, Elements, Elements, bool] | None = None
"""The file that was parsed last: its bytes, elements of the file meta and of the data set, whether it is implicit."""


def looks_like_dicom(path: str | os.PathLike[str]) -> bool:
    """Whether the file has the DICOM mark (``DICM`` at byte 128), whatever its name.

    Raises:
        RefusedError: ``unreadable`` when it is not a regular file or may not be read.
    """
    with refusing("unreadable", "the file cannot be opened; check its permissions"), _open_regular(Path(path)) as file:
        return _kind(file.read(132)) == "dicom"


def _open_regular(path: Path) -> BinaryIO:
    """Open a regular file; pipes and devices are refused without waiting for them."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RefusedError("unreadable", "not a regular file; export images as ordinary files")
    return open(descriptor, "rb")


def _kind(head: bytes) -> str:
    """``dicom``, ``bare`` (DICOM without its file header) or ``other``, by the first 132 bytes."""
    if head[128:132] == b"DICM":
        return "dicom"
    # Without a preamble the first element is of group 0002 or 0008, little endian.
    return "bare" if len(head) >= 132 and head[:2] in (b"\x02\0", b"\x08\0") else "other"


def read_header(path: str | os.PathLike[str], *, least_private: int = 0) -> Dataset:
    """The data set up to the pixel data, which are not read; budgets and ``least_private`` as in :py:func:`parse`.

    ``header.pixel_element`` is the keyword of the pixel element that follows (``"PixelData"``, ``"FloatPixelData"``,
    ``"DoubleFloatPixelData"``), or None. The attributes that identify patient, study, series and instance are decoded.

    Raises:
        RefusedError: ``not_dicom``, ``no_file_meta``, ``missing_transfer_syntax``, ``unsupported_transfer_syntax``,
            ``over_budget``, ``nested_too_deep`` or ``unreadable``; never with a value from the file.
    """
    with refusing("unreadable", "the file cannot be opened or its header is broken; export it again"):
        with _open_regular(Path(path)) as file:
            header = _parse_header(file, os.fstat(file.fileno()).st_size, least_private)
        for keyword in _IDENTITY:
            header.get(keyword)  # decodes it, which fails here or never
        header.file_meta.get("MediaStorageSOPClassUID")
        _check_depth(header)
        return header


def read_scan_header(path: str | os.PathLike[str]) -> Dataset:
    """As :py:func:`read_header`, but without small private elements: a scan keeps many headers, and these are half."""
    header = read_header(path, least_private=LARGE_PRIVATE_BYTES)
    for tag, element in list(header.items()):
        if tag.is_private and len(element.value or ()) < LARGE_PRIVATE_BYTES:
            header.pop(tag)
    return header


def holds_items(value: object) -> bool:
    """Whether a value can be that of a sequence: it is decoded or empty, or its bytes begin as a sequence does.

    Dictionaries may be wrong about private elements and those without a type. pydicom would decode their bytes as a
    sequence all the same, and write other bytes.
    """
    return not (isinstance(value, bytes) and value) or value.startswith(_ITEM_OR_END)


def holds_pixels(dataset: Dataset, *, nested: bool = False) -> bool:
    """Whether an item of any sequence has pixel data; icons, which no copy keeps, do not count.

    Args:
        dataset: only sequences whose bytes may hold such an item are decoded.
        nested: whether ``dataset`` is itself an item.
    """
    if nested and any(tag in dataset for tag in PIXEL_TAGS):
        return True
    for tag, element in list(dataset.items()):
        value = element.value
        if isinstance(value, bytes):
            if not (value.startswith(_ITEM_OR_END) and _NESTED_PIXELS in value) or tag == ICON or tag in PIXEL_TAGS:
                continue
            value = dataset[tag].value
            if isinstance(value, bytes):  # of unknown type, but with items, and the tag of pixels in its bytes
                return True
        if isinstance(value, Items) and tag != ICON and any(holds_pixels(item, nested=True) for item in value):
            return True
    return False


def _check_depth(dataset: Dataset, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise too_deep()
    for tag, element in list(dataset.items()):
        vr = element.VR
        if vr == "SQ" or (vr is None and dictionary_has_tag(tag) and dictionary_VR(tag) == "SQ"):
            for item in dataset[tag].value or ():
                _check_depth(item, depth + 1)


def _read_meta(file: BinaryIO) -> Dataset:
    """The file meta (group 0002), from the position behind the mark on."""
    return read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)


def identify(path: str | os.PathLike[str]) -> tuple[str, str]:
    """SOP class and instance UID of the file meta; empty where it has none or the file cannot be read."""
    try:
        with _open_regular(Path(path)) as file:
            if _kind(file.read(132)) != "dicom":
                return "", ""
            with refusing("unreadable", "the file meta is broken"):
                meta = _read_meta(file)
                return str(meta.get("MediaStorageSOPClassUID") or ""), str(meta.get("MediaStorageSOPInstanceUID") or "")
    except (OSError, RefusedError):
        return "", ""


def read_uids(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """UIDs of instance, series and study, as far as they stand at the beginning of a file; else empty.

    Works for files of any transfer syntax; of a deflated one no more is inflated than is looked at.
    """
    unknown = ("",) * len(_UIDS)
    try:
        with refusing("unreadable", "the file is broken"), _open_regular(Path(path)) as file:
            content = file.read(_UIDS_WITHIN)
            kind = _kind(content)
            if kind == "other":
                return unknown
            data = io.BytesIO(content[132:] if kind == "dicom" else content)
            meta = _read_meta(data)
            syntax = meta.get("TransferSyntaxUID")
            if syntax == uid.DeflatedExplicitVRLittleEndian:
                data = io.BytesIO(zlib.decompressobj(-zlib.MAX_WBITS).decompress(data.read(), _UIDS_WITHIN))
            order = syntax == uid.ImplicitVRLittleEndian, syntax != uid.ExplicitVRBigEndian
            found = read_dataset(data, *order, stop_when=lambda tag, vr, length: tag > _LAST_UID)
            return tuple(str(found.get(keyword) or "") for keyword in _UIDS)
    except (OSError, RefusedError):
        return unknown


def identify_all(paths: Iterable[str | os.PathLike[str]]) -> list[tuple[str, str]]:
    """:py:func:`identify` of each."""
    return [identify(path) for path in paths]


def parse(data: bytes, *, by_pydicom: bool = False, least_private: int = 0) -> Dataset:
    """The whole data set of a file's bytes.

    A big endian file comes back as Explicit VR Little Endian, which is also how its copy is written.

    Args:
        data: bytes of the file.
        by_pydicom: let pydicom alone find the elements, for a check that shares no code with the writer.
        least_private: private elements with fewer bytes may be left out, save sequences. In many files they are most
            of all elements, so this is faster.

    Raises:
        RefusedError: As :py:func:`read_header`.
    """
    with refusing("unreadable", "the file is broken; export it again"):
        _check_file(data, len(data))
        dataset = None if by_pydicom else _read_plain(data, None, least_private)
        if dataset is None:
            dataset = _read_by_pydicom(io.BytesIO(data), None)
        return _finished(dataset, next((name for name in PIXEL_TAGS.values() if name in dataset), None), len(data))


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """A file's bytes, within the size budget."""
    with refusing("unreadable", "the file cannot be opened"), _open_regular(Path(path)) as file:
        size = os.fstat(file.fileno()).st_size
        _check_size(size)
        return file.read(size)


def _check_size(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise RefusedError("over_budget", f"the file is larger than {MAX_FILE_BYTES >> 20} MiB")


def _check_file(start: bytes, size: int) -> None:
    _check_size(size)
    kind = _kind(start)
    if kind == "bare":
        raise RefusedError("no_file_meta", "DICOM without its file header (part 10); export it as DICOM files")
    if kind == "other":
        raise RefusedError("not_dicom", "not a DICOM file")


def _parse_header(file: BinaryIO, size: int, least_private: int) -> Dataset:
    head = file.read(HEAD_BYTES)
    _check_file(head, size)
    stop = _Stop(size)
    dataset = _read_plain(head, stop, least_private)
    if dataset is None or stop.found is None and len(head) < size:  # the header goes on behind the head
        stop = _Stop(size)
        dataset = _read_by_pydicom(file, stop)
    return _finished(dataset, stop.found, stop.left)


def _finished(dataset: FileDataset, pixels: str | None, encoded: int) -> Dataset:
    """The data set, checked against the budgets and turned to little endian.

    Args:
        dataset: freshly parsed.
        pixels: keyword of its pixel element, if it has one.
        encoded: most bytes that the pixel element can have.
    """
    dataset.filename = dataset.buffer = dataset.fileobj_type = None  # it would hold on to the file
    dataset.pixel_element = pixels
    check_budget(dataset, encoded)
    if dataset.file_meta.TransferSyntaxUID == uid.ExplicitVRBigEndian:
        to_little_endian(dataset)
    return dataset


def _read_plain(data: bytes, stop: Stop | None, least_private: int = 0) -> FileDataset | None:
    """The data set of a file that is encoded as most are, many times faster than by pydicom; None for all others.

    The elements of the last whole file are kept, for an original is parsed twice: to be written, and to be compared
    with its copy. Only undecoded elements are kept, which cannot change, and each caller gets a data set of its own.
    """
    global _last
    last = _last
    if last is not None and stop is None and last[0] == data:
        _, meta, elements, implicit = last
        file_meta = to_meta(dict(meta))
    else:
        try:
            found = read_elements(data, 132, META_TAGS, implicit=False)
            if found is None:
                return None
            meta, position = found
            file_meta = to_meta(dict(meta))
            syntax = check_syntax(file_meta)
            if syntax == uid.ExplicitVRBigEndian:
                return None
            implicit = syntax == uid.ImplicitVRLittleEndian
            found = read_elements(data, position, IMAGE_TAGS, implicit=implicit, least_private=least_private)
            if found is None:
                return None
            elements, position = found
            read_rest(data, position, elements, stop, implicit=implicit)
        except Exception:  # pydicom decides what it can make of it; a head, too, can end in the middle of an element
            return None
        if stop is None and not least_private:
            plain = len(data) <= MAX_KEPT_BYTES and all(element.is_raw for element in elements.values())
            _last = (data, meta, elements, implicit) if plain else None
    return to_dataset(data[:128], file_meta, dict(elements), implicit=implicit)


def _read_by_pydicom(file: BinaryIO, stop: Stop | None) -> FileDataset:
    file.seek(132)
    meta = _read_meta(file)
    check_syntax(meta)  # before the body: pydicom would inflate a deflated one without any limit
    file.seek(0)
    dataset = read_partial(file, stop)
    if not dataset:  # what pydicom gives where it meets the end of the file too early
        detail = "the file has no elements, ends within one, or goes on behind the last; export it again"
        raise RefusedError("unreadable", detail)
    return dataset


class _Stop:
    """Asked by pydicom before each value: stops at the pixel data, and limits the size of the header.

    ``found`` is the keyword of the pixel element, ``left`` the most bytes that it can have.
    """

    def __init__(self, size: int) -> None:
        self.found: str | None = None
        self.left = size
        self._header = 0

    def __call__(self, tag: BaseTag, vr: str | None, length: int) -> bool:
        if tag in PIXEL_TAGS:
            self.found = PIXEL_TAGS[tag]
            self.left = min(self.left, length)  # 0xFFFFFFFF, the undefined length, leaves the file's size
        elif length != 0xFFFFFFFF:
            self._header += length
            if self._header > MAX_HEADER_BYTES:
                raise RefusedError("over_budget", f"the header has more than {MAX_HEADER_BYTES >> 20} MiB")
        return self.found is not None


def check_budget(dataset: Dataset, encoded: int) -> None:
    """Raise when the header promises more pixels than an image can have, or than ``encoded`` bytes can give."""
    if dataset.pixel_element is None or "Rows" not in dataset:
        return
    pixels = int(dataset.Rows) * int(dataset.Columns) * int(dataset.get("SamplesPerPixel") or 1)
    frames = int(dataset.get("NumberOfFrames") or 1)
    decoded = pixels * frames * int(dataset.get("BitsAllocated") or 8) // 8
    limit = MAX_PIXEL_BYTES if frames == 1 else MAX_FRAMES_BYTES
    if decoded > limit:
        raise RefusedError("over_budget", f"the header promises more than {limit >> 20} MiB of pixels")
    if dataset.file_meta.TransferSyntaxUID.is_compressed and decoded > MAX_EXPANSION * encoded:
        raise RefusedError("over_budget", f"the header promises over {MAX_EXPANSION} times the encoded pixel data")
