# SPDX-License-Identifier: Apache-2.0
"""TIFF: reads 8- and 16-bit samples of a single page in strips, and writes the same file with other samples.

Uncompressed strips are patched in place. Deflate and LZW strips are packed anew, both as Deflate; one that has grown
moves to the end of the file, and zeros fill its old place. Besides the strips only the tags of their places, sizes and
compression change. Sources: TIFF 6.0 (layout, LZW), Adobe Photoshop's TIFF technical notes (Deflate).
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from monai_salm.io.base import DEFLATE_RATIO, MAX_RASTER_BYTES, Pixels, RefusedError, room_for_notes
from monai_salm.io.tiff_directory import NUMBERS, PREVIEW_MARK, SIZES, Directory, read_directory

_NONE, _LZW, _DEFLATE = 1, 5, 8
_PACKED_RATIO = {_NONE: 1, _LZW: 4096, _DEFLATE: DEFLATE_RATIO, 32946: DEFLATE_RATIO}
"""Supported compression -> most bytes that one packed byte can become."""
_OTHER_IMAGES = {330: "further images", 513: "a JPEG preview", 34377: "Photoshop's preview", 37724: "layers"}
_TEXTS = (269, 270, 285, 306, 315, 316, 700, 33432, 33723, 34665, 34853)
"""Names, descriptions, dates, XMP, copyright, IPTC, Exif and GPS."""
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_OFFSETS, _SAMPLES, _ROWS, _COUNTS, _PLANAR, _PREDICTOR = 273, 277, 278, 279, 284, 317
_KNOWN = {33432, 33550, 33723, 33922, 34665, 34675, 34735, 34736, 34737, 34853}
"""Private tags (from 32768 on) that hold no image."""
_TILES, _EXTRA, _FORMAT, _XMP = 322, 338, 339, 700
_COLORS = {0: 1, 1: 1, 2: 3}


@dataclass(frozen=True)
class _Layout:
    directory: Directory
    shape: tuple[int, int, int]
    dtype: np.dtype
    colors: int
    inverted: bool
    compression: int
    predictor: bool
    strips: tuple[tuple[int, int, int], ...]
    """Offset, packed size and unpacked size of each, in bytes."""


def sniff(head: bytes) -> bool:
    """True if a file that starts with ``head`` is TIFF, supported or not."""
    return head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def colors(content: bytes) -> int:
    """1 for grayscale, 3 for RGB, judged by all that can be told without unpacking the pixels.

    Raises:
        RefusedError: When the file cannot be protected.
    """
    return _layout(content).colors


def texts(content: bytes) -> list[str]:
    """Tags with text, dates or Exif data, and all private tags, which may hold some, except color profiles."""
    tags = read_directory(content).fields
    return [f"tag {tag}" for tag in sorted(tags) if tag in _TEXTS or (tag >= 32768 and tag != 34675)]


def decode(content: bytes) -> Pixels:
    """The samples of a file, and its other bytes (without those that say where the strips are and how long).

    Raises:
        RefusedError: When the file is broken, larger than it may be, or of a kind that is not supported.
    """
    layout = _layout(content)
    raw = b"".join(_unpacked(layout))
    samples = np.frombuffer(raw, layout.dtype).reshape(layout.shape)
    if layout.predictor:
        samples = np.add.accumulate(samples, axis=1, dtype=layout.dtype.newbyteorder("=")).astype(layout.dtype)
    return Pixels(samples, layout.colors, _kept(layout), layout.inverted)


def encode(content: bytes, samples: np.ndarray) -> bytes:
    """The file ``content`` with other samples.

    Args:
        content: the source.
        samples: of the shape and type that :py:func:`decode` gives.

    Raises:
        RefusedError: As :py:func:`decode`.
    """
    layout = _layout(content)
    samples = samples.astype(layout.dtype)
    if layout.predictor:
        samples[:, 1:] = samples[:, 1:] - samples[:, :-1]
    raw, written = io.BytesIO(samples.tobytes()), bytearray(content)
    strips = [raw.read(size) for _, _, size in layout.strips]
    if layout.compression == _NONE:
        for (offset, count, _), strip in zip(layout.strips, strips, strict=True):
            written[offset : offset + count] = strip
        return bytes(written)
    packed = [zlib.compress(strip, 6) for strip in strips]
    offsets = [offset for offset, _, _ in layout.strips]
    moved: list[int] = []  # strips that do not fit in their old place
    for index, (offset, count, _) in enumerate(layout.strips):
        fits = len(packed[index]) <= count
        if offset + count == len(content):  # nothing follows
            written[offset:] = packed[index]
        else:
            written[offset : offset + count] = (packed[index] if fits else b"").ljust(count, b"\0")
            moved += [] if fits else [index]
    for index in moved:
        written += bytes(len(written) % 2)
        offsets[index] = len(written)
        written += packed[index]
    _put(written, layout, _OFFSETS, offsets)
    _put(written, layout, _COUNTS, [len(strip) for strip in packed])
    if layout.compression == _LZW:
        _put(written, layout, _COMPRESSION, [_DEFLATE])
    return bytes(written)


def _put(written: bytearray, layout: _Layout, tag: int, values: list[int]) -> None:
    """Overwrite the values of a tag."""
    field = layout.directory.fields[tag]
    limit = 2 ** (8 * SIZES[field.type])
    if max(values) >= limit:
        raise RefusedError(
            "unsupported_type", f"tag {tag} of the TIFF file is too small for the new strips; save it anew"
        )
    struct.pack_into(f"{layout.directory.order}{len(values)}{NUMBERS[field.type]}", written, field.at, *values)


def _kept(layout: _Layout) -> bytes:
    """The file with zeros in place of the strips, of their places and sizes, and of how they are packed."""
    kept = bytearray(layout.directory.content)
    packed = layout.compression != _NONE
    for tag in (_OFFSETS, _COUNTS, _COMPRESSION) if packed else ():
        field = layout.directory.fields[tag]
        kept[field.at : field.at + field.size] = bytes(field.size)
    for offset, count, _ in layout.strips:
        kept[offset : offset + count] = bytes(count)
    return bytes(kept).rstrip(b"\0") if packed else bytes(kept)


# ------------------------------------------------------------------- layout


def _layout(content: bytes) -> _Layout:
    directory = read_directory(content)
    if directory.following:
        raise RefusedError("several_pages", "the TIFF file has several pages; save each as a file of its own")
    for tag, what in _OTHER_IMAGES.items():
        if tag in directory.fields:
            raise RefusedError("embedded_preview", f"the file holds {what}; save it flat, without a preview")
    _check_xmp(directory)
    _check_kind(directory)
    height, width = (directory.number(tag, 0) for tag in (_HEIGHT, _WIDTH))
    samples = directory.number(_SAMPLES, 1)
    bits = directory.number(_BITS, 1)
    photometric = directory.number(_PHOTOMETRIC, -1)
    number = _COLORS[photometric]
    _check_samples(directory, samples, number)
    if bits not in (8, 16):
        raise RefusedError("unsupported_type", f"the samples have {bits} bits; 8 and 16 are supported")
    if not height or not width:
        raise RefusedError("broken_header", f"the header's shape {height} x {width} has no pixels")
    dtype = np.dtype(f"{directory.order}u{bits // 8}")
    compression = directory.number(_COMPRESSION, _NONE)
    predictor = compression != _NONE and directory.number(_PREDICTOR, 1) == 2
    row = width * samples * dtype.itemsize
    if height * row > MAX_RASTER_BYTES:
        raise RefusedError(
            "too_large", f"the image has {height * row} bytes; above {MAX_RASTER_BYTES} is not supported"
        )
    strips = _strips(directory, height, row, compression)
    shape = (height, width, samples)
    return _Layout(directory, shape, dtype, number, photometric == 0, compression, predictor, strips)


def _check_kind(directory: Directory) -> None:
    """Refuse kinds of images that are not supported."""
    if _TILES in directory.fields:
        raise RefusedError("tiled_image", "the pixels are in tiles; save the image in strips")
    compression = directory.number(_COMPRESSION, _NONE)
    if compression in (6, 7):
        raise RefusedError("jpeg_image", "the pixels are JPEG, which loses detail; export the image without loss")
    if compression not in _PACKED_RATIO:
        raise RefusedError("unsupported_compression", f"compression {compression} is not supported; save it as Deflate")
    photometric = directory.number(_PHOTOMETRIC, -1)
    if photometric == 3:
        raise RefusedError("palette_image", "the pixels are numbers of a palette; save the image as RGB or grayscale")
    if photometric not in _COLORS:
        raise RefusedError(
            "unsupported_color", f"color kind {photometric} is not supported; save it as RGB or grayscale"
        )
    if directory.number(_PLANAR, 1) != 1 and directory.number(_SAMPLES, 1) > 1:
        raise RefusedError("planar_image", "the colors are stored one after the other; save the image interleaved")
    if directory.number(_FORMAT, 1) != 1:
        raise RefusedError("unsupported_type", "the samples are no unsigned integers; save the image as 8 or 16 bit")
    if directory.number(_FILL_ORDER, 1) != 1:
        raise RefusedError("unsupported_type", "the bits are stored in reverse; save the image again")
    if directory.number(_PREDICTOR, 1) not in (1, 2):
        raise RefusedError("unsupported_compression", "the predictor is not supported; save the image as Deflate")


def _check_samples(directory: Directory, samples: int, number: int) -> None:
    extra = directory.numbers(_EXTRA) if samples > number else ()
    if samples not in (number, number + 1) or any(kind == 1 for kind in extra):
        raise RefusedError(
            "alpha_channel", f"a pixel has {samples} samples that depend on each other; save it without alpha"
        )


def _check_xmp(directory: Directory) -> None:
    field = directory.fields.get(_XMP)
    if field and PREVIEW_MARK in directory.content[field.at : field.at + field.count]:
        raise RefusedError("embedded_preview", "the metadata hold a preview of the image; save it without metadata")


def _strips(directory: Directory, height: int, row: int, compression: int) -> tuple[tuple[int, int, int], ...]:
    rows = min(directory.number(_ROWS, height), height)
    if not rows:
        raise RefusedError("broken_header", "a strip of the TIFF file has no rows; save the image again")
    sizes = [row * min(rows, height - first) for first in range(0, height, rows)]
    offsets, counts = (directory.numbers(tag) for tag in (_OFFSETS, _COUNTS))
    if not len(sizes) == len(offsets) == len(counts):
        raise RefusedError("broken_header", f"the TIFF file needs {len(sizes)} strips and tells of {len(offsets)}")
    strips = tuple(zip(offsets, counts, sizes, strict=True))
    if any(offset + count > len(directory.content) for offset, count, _ in strips):
        raise RefusedError("truncated_file", "a strip leaves the TIFF file; export the image again")
    if any(size > count * _PACKED_RATIO[compression] for _, count, size in strips):
        raise RefusedError("truncated_file", "the header promises more pixels than the strips can hold")
    if compression == _NONE and any(size != count for _, count, size in strips):
        raise RefusedError("broken_header", "a strip is longer than its pixels; save the image again")
    _check_places(directory, strips)
    return strips


def _check_places(directory: Directory, strips: tuple[tuple[int, int, int], ...]) -> None:
    """Refuse strips that overlap anything, and files with room for another image outside the known tags."""
    content = directory.content
    told = np.zeros(len(content), bool)
    others = [(field.at, field.at + field.size) for field in directory.fields.values()]
    for start, end in [(0, 8), (directory.start, directory.end), *others]:
        told[start:end] = True
    for offset, count, _ in strips:
        if told[offset : offset + count].any():
            raise RefusedError("broken_header", "strips of the TIFF file overlap; save the image again")
        told[offset : offset + count] = True
    unknown = int(np.count_nonzero(np.frombuffer(content, np.uint8)[~told]))  # zeros hold no image
    places = zip(directory.fields, others, strict=True)
    unknown += sum(end - start for tag, (start, end) in places if tag >= 32768 and tag not in _KNOWN)
    if unknown > room_for_notes(sum(size for _, _, size in strips)):
        raise RefusedError(
            "trailing_data", f"no known tag tells of {unknown} bytes of the file, another image perhaps; save it again"
        )


# --------------------------------------------------------------------- packing


def _unpacked(layout: _Layout) -> Iterator[bytes]:
    """The pixels of each strip."""
    content = layout.directory.content
    for offset, count, size in layout.strips:
        packed = content[offset : offset + count]
        if layout.compression == _NONE:
            strip = packed
        elif layout.compression == _LZW:
            strip = _unpack_lzw(packed, size)
        else:
            strip = _inflate(packed, size)
        if len(strip) != size:
            raise RefusedError("broken_file", f"a strip unpacks to {len(strip)} bytes, its rows have {size}")
        yield strip


def _inflate(packed: bytes, size: int) -> bytes:
    try:
        return zlib.decompressobj().decompress(packed, size + 1)
    except zlib.error as error:
        raise RefusedError("broken_file", "the pixels cannot be unpacked; export the image again") from error


def _unpack_lzw(packed: bytes, size: int) -> bytes:
    """LZW of TIFF 6.0, section 13: codes of 9 to 12 bits, most significant bit first, widened one code early."""
    clear, end = 256, 257
    table: list[bytes] = []
    out = bytearray()
    previous = b""
    width, bits, held = 9, 0, 0
    for byte in packed:
        bits, held = (bits << 8) | byte, held + 8
        if held < width:
            continue
        held -= width
        code, bits = bits >> held, bits & ((1 << held) - 1)
        if code == end or len(out) > size:
            break
        if code == clear:
            table, previous, width = [bytes([value]) for value in range(256)] + [b"", b""], b"", 9
            continue
        known = code < len(table)
        if not (known or (previous and code == len(table))):
            raise RefusedError("broken_file", "the pixels cannot be unpacked (LZW); export the image again")
        entry = table[code] if known else previous + previous[:1]
        out += entry
        if previous and len(table) < 4096:
            table.append(previous + entry[:1])
            width = min(12, (len(table) + 1).bit_length())
        previous = entry
    return bytes(out)
