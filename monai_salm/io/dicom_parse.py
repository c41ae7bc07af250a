# SPDX-License-Identifier: Apache-2.0
"""Bytes -> pydicom Dataset, for files that may be broken or hostile: budgets, no deflate, nothing said about values."""

from __future__ import annotations

import io
import logging
import os
import stat
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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

MAX_FILE_BYTES = 512 << 20
MAX_PIXEL_BYTES = 256 << 20
"""Decoded size of one image; the largest mammograms have about 40 MiB."""
MAX_FRAMES_BYTES = 1 << 30
"""Decoded size of an image with many frames; 1,000 frames of 512 x 512 have 500 MiB."""
MAX_EXPANSION = 1000
"""Largest believable ratio of decoded to encoded pixel data."""
MAX_HEADER_BYTES = 64 << 20
HEAD_BYTES = 1 << 16
"""What is read of a file at first for its header; few headers are larger."""
MAX_KEPT_BYTES = 16 << 20
"""Of a larger file the elements are not kept until it is read again."""
LARGE_PRIVATE_BYTES = 4096
"""From this size on a private element may be a copy of the pixels."""
MAX_DEPTH = 32
"""Sequences nested deeper than this are an attack, not an image (pydicom issue 2330)."""
_ITEMS = (ITEM, b"\xfe\xff\xdd\xe0")
"""How an item and the end of a sequence begin."""
_NESTED_PIXELS = b"\xe0\x7f\x10\x00"
ICON = 0x00880200
_LOGGERS = tuple(map(logging.getLogger, ("pydicom", "highdicom", "pylibjpeg", "openjpeg", "jpeg_ls")))
_UIDS = ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
_SERIES_UID = 0x0020000E
"""The last of them in a file."""
_UIDS_WITHIN = 1 << 20
_IDENTITY = ("SOPClassUID", *_UIDS, "PatientID")

_last: tuple[bytes, Elements, Elements, bool] | None = None
"""Of the file that was read last: bytes, elements of its meta and of its data set, whether they tell no types."""

META_TAGS, IMAGE_TAGS = range(0x00020000, 0x00030000), range(0x7FE00008)
PIXEL_TAGS = {0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData", 0x7FE00010: "PixelData"}
STANDARD_ROOT = "1.2.840.10008."
"""UIDs that the DICOM standard itself defines; they name no instance."""
NATIVE = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian)
KEPT_LOSSLESS = {uid.RLELossless: "pylibjpeg", uid.JPEGLSLossless: "pyjpegls", uid.JPEG2000Lossless: "pylibjpeg"}
"""Lossless syntaxes that can be written, with the plugin (python-gdcm, if present, can abort the interpreter)."""
LOSSLESS = (uid.JPEGLossless, uid.JPEGLosslessSV1, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL)
LOSSY_METHODS = {
    uid.JPEGBaseline8Bit: "ISO_10918_1",
    uid.JPEGExtended12Bit: "ISO_10918_1",
    uid.JPEGLSNearLossless: "ISO_14495_1",
    uid.JPEG2000: "ISO_15444_1",
    uid.HTJ2K: "ISO_15444_15",
}
"""Syntaxes that may be lossy, with the term for LossyImageCompressionMethod (PS3.3 C.7.6.1.1.5.1)."""
SYNTAXES = frozenset([*NATIVE, uid.ExplicitVRBigEndian, *KEPT_LOSSLESS, *LOSSLESS, *LOSSY_METHODS])


@contextmanager
def refusing(reason: str, detail: str) -> Iterator[None]:
    """Turn any exception into a refusal with a fixed text: pydicom's own texts quote values and so leak identities."""
    silence_parsers()
    try:
        yield
    except RefusedError:
        raise
    except BaseException as error:  # a broken file can raise anything, RecursionError and MemoryError included
        # A panic of the RLE codec, which is Rust, is no Exception; neither is KeyboardInterrupt, which must pass.
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        if isinstance(error, MemoryError):
            raise RefusedError("too_large", "the file takes more memory than there is") from None
        if isinstance(error, RecursionError):
            raise too_deep() from None
        raise RefusedError(reason, detail) from None  # else a traceback would print the original's text


def too_deep() -> RefusedError:
    """The refusal of a file whose sequences are nested deeper than :py:data:`MAX_DEPTH`."""
    return RefusedError("nested_too_deep", f"sequences are nested more than {MAX_DEPTH} deep; repair the file")


def silence_parsers() -> None:
    """Keep the warnings and log records of pydicom, highdicom and codecs, which quote values, out of every output.

    For the whole process, and again at each use: ``warnings.catch_warnings`` is not safe with threads.
    """
    for logger in _LOGGERS:
        if logger.level <= logging.CRITICAL:  # setting it anew would empty the caches of all loggers, which takes time
            logger.setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module=r"(pydicom|highdicom)\b")


def looks_like_dicom(path: str | os.PathLike[str]) -> bool:
    """Whether the file carries the DICOM mark (``DICM`` at byte 128); its name does not matter.

    Raises:
        RefusedError: ``unreadable`` when it is not a regular file or may not be read.
    """
    with refusing("unreadable", "the file cannot be opened; check its permissions"), _open_regular(Path(path)) as file:
        return _kind(file.read(132)) == "dicom"


def _open_regular(path: Path) -> BinaryIO:
    """Open without waiting on a pipe and without accepting a device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RefusedError("unreadable", "not a regular file; export images as ordinary files")
    return open(descriptor, "rb")


def _kind(head: bytes) -> str:
    if head[128:132] == b"DICM":
        return "dicom"
    # Without a preamble the first element is of group 0002 or 0008, little endian.
    return "bare" if len(head) >= 132 and head[:2] in (b"\x02\0", b"\x08\0") else "other"


def read_header(path: str | os.PathLike[str], *, least_private: int = 0) -> Dataset:
    """Everything in front of the pixel data, within budgets; ``least_private`` as in :py:func:`parse`.

    ``header.pixel_element`` is the keyword of the pixel element that follows (``"PixelData"``, ``"FloatPixelData"``,
    ``"DoubleFloatPixelData"``), or None. What tells patient, study, series and instance can be read without errors.

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


def read_outline(path: str | os.PathLike[str]) -> Dataset:
    """As :py:func:`read_header`, without small private elements: half of a header, and a scan keeps many headers."""
    header = read_header(path, least_private=LARGE_PRIVATE_BYTES)
    for tag, element in list(header.items()):
        if tag.is_private and len(element.value or ()) < LARGE_PRIVATE_BYTES:
            header.pop(tag)
    return header


def holds_items(value: object) -> bool:
    """Whether the value of what is called a sequence can be one: bytes that nobody decoded begin with an item.

    Of private elements, and of those without a type, a dictionary tells only what others mean by the tag; pydicom would
    decode their bytes all the same, and write something else.
    """
    return not (isinstance(value, bytes) and value) or value.startswith(_ITEMS)


def holds_pixels(dataset: Dataset, *, nested: bool = False) -> bool:
    """Whether an item of a sequence has pixel data; icons, which no copy keeps, do not count.

    Args:
        dataset: with its sequences as they were read; those without such pixels stay so.
        nested: whether it is an item itself.
    """
    if nested and any(tag in dataset for tag in PIXEL_TAGS):
        return True
    for tag, element in list(dataset.items()):
        value = element.value
        if isinstance(value, bytes):
            if not (value.startswith(_ITEMS) and _NESTED_PIXELS in value) or tag == ICON or tag in PIXEL_TAGS:
                continue
            value = dataset[tag].value
            if isinstance(value, bytes):  # of a type that nobody knows, but with items, and such a tag among its bytes
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


def identify(path: str | os.PathLike[str]) -> tuple[str, str]:
    """SOP class and instance UID that the file meta names; empty where there are none or the file cannot be read."""
    try:
        with _open_regular(Path(path)) as file:
            if _kind(file.read(132)) != "dicom":
                return "", ""
            with refusing("unreadable", "the file meta is broken"):
                meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
                return str(meta.get("MediaStorageSOPClassUID") or ""), str(meta.get("MediaStorageSOPInstanceUID") or "")
    except (OSError, RefusedError):
        return "", ""


def read_uids(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """UIDs of instance, series and study, empty where the file does not tell one at its beginning, broken as it may be.

    It makes no difference whether the file can be decoded: of a deflated one no more is inflated than is looked at.
    """
    unknown = ("",) * len(_UIDS)
    try:
        with refusing("unreadable", "the file is broken"), _open_regular(Path(path)) as file:
            content = file.read(_UIDS_WITHIN)
            kind = _kind(content)
            if kind == "other":
                return unknown
            data = io.BytesIO(content[132:] if kind == "dicom" else content)
            meta = read_dataset(data, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
            syntax = meta.get("TransferSyntaxUID")
            if syntax == uid.DeflatedExplicitVRLittleEndian:
                data = io.BytesIO(zlib.decompressobj(-zlib.MAX_WBITS).decompress(data.read(), _UIDS_WITHIN))
            order = syntax == uid.ImplicitVRLittleEndian, syntax != uid.ExplicitVRBigEndian
            found = read_dataset(data, *order, stop_when=lambda tag, vr, length: tag > _SERIES_UID)
            return tuple(str(found.get(keyword) or "") for keyword in _UIDS)
    except (OSError, RefusedError):
        return unknown


def identify_all(paths: Iterable[str | os.PathLike[str]]) -> list[tuple[str, str]]:
    """:py:func:`identify` of each."""
    return [identify(path) for path in paths]


def parse(data: bytes, *, by_pydicom: bool = False, least_private: int = 0) -> Dataset:
    """The whole data set of a file's bytes; budgets and refusals as in :py:func:`read_header`.

    A big endian file comes back as Explicit VR Little Endian, which is also how its copy is written.

    Args:
        data: of the file.
        by_pydicom: let pydicom alone find the elements, for a check that shares no code with the writer.
        least_private: private elements with fewer bytes (in many files most of all) may be left out, save sequences.
    """
    with refusing("unreadable", "the file is broken; export it again"):
        _check_file(data, len(data))
        dataset = None if by_pydicom else _read_plain(data, None, least_private)
        if dataset is None:
            dataset = _read_any(io.BytesIO(data), None)
        return _usual(dataset, next((name for name in PIXEL_TAGS.values() if name in dataset), None), len(data))


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
        dataset = _read_any(file, stop)
    return _usual(dataset, stop.found, stop.left)


def _usual(dataset: FileDataset, pixels: str | None, encoded: int) -> Dataset:
    """The data set within budgets and in little endian, with these pixels of so many bytes at most."""
    dataset.filename = dataset.buffer = dataset.fileobj_type = None  # it would hold on to the file
    dataset.pixel_element = pixels
    check_budget(dataset, encoded)
    if dataset.file_meta.TransferSyntaxUID == uid.ExplicitVRBigEndian:
        to_little_endian(dataset)
    return dataset


def _read_plain(data: bytes, stop: Stop | None, least_private: int = 0) -> FileDataset | None:
    """The data set, where it is encoded as most are; its elements are found many times faster than by pydicom alone.

    Those of the whole file that was read last are known, where all are plain bytes and not too many: an original is
    read to be written and again to be compared with its copy. They are bytes that nobody changes, so each caller has a
    data set of its own, as if parsed afresh; and they are of these very bytes, which are compared.
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
            implicit = syntax == uid.ImplicitVRLittleEndian
            found = read_elements(data, position, IMAGE_TAGS, implicit=implicit, least_private=least_private)
            if found is None or syntax == uid.ExplicitVRBigEndian:
                return None
            elements, position = found
            read_rest(data, position, elements, stop, implicit=implicit)
        except Exception:  # the rest is pydicom's, which makes the best of it or fails too; a head can end anywhere
            return None
        if stop is None and not least_private:
            plain = len(data) <= MAX_KEPT_BYTES and all(element.is_raw for element in elements.values())
            _last = (data, meta, elements, implicit) if plain else None
    return to_dataset(data[:128], file_meta, dict(elements), implicit=implicit)


def _read_any(file: BinaryIO, stop: Stop | None) -> FileDataset:
    file.seek(132)
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    check_syntax(meta)  # before the body: pydicom would inflate a deflated one without any limit
    file.seek(0)
    dataset = read_partial(file, stop)
    if not dataset:  # what pydicom gives where it meets the end of the file too early
        detail = "the file has no elements, ends within one, or goes on behind the last; export it again"
        raise RefusedError("unreadable", detail)
    return dataset


class _Stop:
    """Stops the parser at the pixel data and notes what is there."""

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


def check_syntax(meta: Dataset) -> uid.UID:
    """The transfer syntax that the file meta names; raise unless it can be decoded here."""
    syntax = meta.get("TransferSyntaxUID")
    if not syntax:
        raise RefusedError("missing_transfer_syntax", "the file does not say how it is encoded; export it again")
    if syntax not in SYNTAXES:
        deflated = syntax == uid.DeflatedExplicitVRLittleEndian
        name = "deflated" if deflated else "unknown, video or not decodable here"
        detail = f"transfer syntax is {name}; convert to Explicit VR Little Endian"
        raise RefusedError("unsupported_transfer_syntax", detail)
    return uid.UID(syntax)


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
