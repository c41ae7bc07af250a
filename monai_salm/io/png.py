# SPDX-License-Identifier: Apache-2.0
"""PNG: reads 8- and 16-bit samples, and writes the same file with other samples.

Only the compressed pixels (IDAT) are written anew, with the row filters of the source (PNG specification, third
edition, section 9); every other chunk keeps its bytes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from monai_salm.io.base import DEFLATE_RATIO, MAX_RASTER_BYTES, Pixels, RefusedError, room_for_notes
from monai_salm.io.tiff_directory import PREVIEW_MARK, check_exif

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLORS = {0: (1, 1), 2: (3, 3), 4: (1, 2), 6: (3, 4)}
"""Color type -> colors, samples per pixel (the rest is alpha)."""
_KNOWN = frozenset("cHRM gAMA iCCP sBIT sRGB cICP mDCV cLLI bKGD sPLT pHYs tIME tEXt zTXt iTXt eXIf".split())
"""Chunks that are still right when pixels change by a few levels."""
_IMAGE = frozenset(("IHDR", "IDAT", "IEND", "PLTE"))
"""Chunks of the image itself; PLTE of an RGB image only suggests colors."""
_TEXTS = frozenset(("tEXt", "zTXt", "iTXt", "eXIf", "tIME"))
MAX_TEXT_BYTES = 2**20
"""Longest text, unpacked; a longer one is taken for a picture."""
_FILTERS = 5


@dataclass(frozen=True)
class _Layout:
    """What a file holds: ``before`` and ``after`` are the bytes around the IDAT chunks."""

    height: int
    width: int
    colors: int
    samples: int
    depth: int
    before: bytes
    after: bytes
    packed: bytes

    @property
    def pixel_bytes(self) -> int:
        return self.samples * self.depth // 8

    @property
    def row_bytes(self) -> int:
        return self.width * self.pixel_bytes


def sniff(head: bytes) -> bool:
    """True if a file that starts with ``head`` is PNG, supported or not."""
    return head[:8] == SIGNATURE


def colors(content: bytes) -> int:
    """1 for grayscale, 3 for RGB, judged by all that can be told without unpacking the pixels.

    Raises:
        RefusedError: When the file cannot be protected.
    """
    return _layout(content).colors


def texts(content: bytes) -> list[str]:
    """Kinds of the chunks with text, dates or Exif data, and private ones, which may hold some."""
    return sorted({name for name, _, _ in _chunks(content)} - ((_KNOWN | _IMAGE) - _TEXTS))


def decode(content: bytes) -> Pixels:
    """The samples of a file, and its other bytes.

    Raises:
        RefusedError: When the file is broken, larger than it may be, or of a kind that is not supported.
    """
    layout = _layout(content)
    filters, filtered = _unpack(layout)
    raw = _unfilter(filters, filtered)
    samples = raw.reshape(-1).view(f">u{layout.depth // 8}").reshape(layout.height, layout.width, layout.samples)
    return Pixels(samples, layout.colors, layout.before + b"IDAT" + layout.after)


def encode(content: bytes, samples: np.ndarray) -> bytes:
    """The file ``content`` with other samples.

    Args:
        content: the source.
        samples: of the shape and type that :py:func:`decode` gives.

    Raises:
        RefusedError: As :py:func:`decode`.
    """
    layout = _layout(content)
    filters, _ = _unpack(layout)
    raw = np.ascontiguousarray(samples, f">u{layout.depth // 8}").reshape(-1).view(np.uint8)
    filtered = _filter(filters, raw.reshape(layout.height, layout.width, layout.pixel_bytes))
    rows = np.concatenate([filters[:, None], filtered.reshape(layout.height, -1)], axis=1)
    return layout.before + _chunk(b"IDAT", zlib.compress(rows.tobytes(), 6)) + layout.after


def _layout(content: bytes) -> _Layout:
    chunks = _chunks(content)
    names = [name for name, _, _ in chunks]
    data = [index for index, name in enumerate(names) if name == "IDAT"]
    if names[0] != "IHDR" or names[-1] != "IEND" or not data or data != list(range(data[0], data[-1] + 1)):
        raise RefusedError("broken_file", "the chunks of the PNG file are not in order; save the image again")
    if names.count("IHDR") > 1 or chunks[0][2] - chunks[0][1] != 13:
        raise RefusedError("broken_header", "this is not a complete PNG header")
    start = chunks[0][1]
    width, height, depth, color, compression, filtering, interlace = struct.unpack_from(">IIBBBBB", content, start)
    _check_header(color, depth, compression or filtering, interlace)
    if not width or not height:
        raise RefusedError("broken_header", f"the header's shape {height} x {width} has no pixels")
    for name, first, end in chunks:
        _check_chunk(name, content[first:end])
    _check_room(chunks, height * width * _COLORS[color][1] * depth // 8)
    packed = b"".join(content[chunks[index][1] : chunks[index][2]] for index in data)
    number, samples = _COLORS[color]
    before, after = content[: chunks[data[0]][1] - 8], content[chunks[data[-1]][2] + 4 :]
    layout = _Layout(height, width, number, samples, depth, before, after, packed)
    size = height * (layout.row_bytes + 1)
    if size > len(packed) * DEFLATE_RATIO:
        raise RefusedError("truncated_file", f"the header promises {size} bytes, more than the file can hold")
    if size > MAX_RASTER_BYTES:
        raise RefusedError("too_large", f"the image has {size} bytes; above {MAX_RASTER_BYTES} is not supported")
    return layout


def _chunks(content: bytes) -> list[tuple[str, int, int]]:
    """Name of every chunk, and start and end of its data; checksums are compared."""
    found: list[tuple[str, int, int]] = []
    position = len(SIGNATURE)
    while not found or found[-1][0] != "IEND":
        start = position + 8
        end = start + int.from_bytes(content[position : position + 4], "big")
        position = end + 4
        if position > len(content):
            raise RefusedError("truncated_file", "the PNG file ends too early; export it again")
        if zlib.crc32(content[start - 4 : end]) != int.from_bytes(content[end:position], "big"):
            raise RefusedError("broken_file", "a checksum of the PNG file is wrong; export it again")
        found.append((content[start - 4 : start].decode("latin-1"), start, end))
    if position != len(content):
        raise RefusedError("trailing_data", "the file goes on after the PNG image; save it again without the rest")
    return found


def _check_header(color: int, depth: int, method: int, interlace: int) -> None:
    if color == 3:
        raise RefusedError("palette_image", "the pixels are numbers of a palette; save the image as RGB or grayscale")
    if color not in _COLORS or method or interlace > 1 or depth not in (1, 2, 4, 8, 16):
        raise RefusedError("broken_header", "the PNG header holds values that do not exist; save the image again")
    if depth < 8:
        raise RefusedError("unsupported_type", f"the samples have {depth} bits; 8 and 16 are supported")
    if interlace:
        raise RefusedError("interlaced_image", "the PNG file is interlaced; save it without (Adam7)")


def _check_chunk(name: str, data: bytes) -> None:
    """Refuse chunks that may hold a copy of the image, or that would be wrong with other pixels."""
    if name in _IMAGE:
        return
    if name == "tRNS":
        raise RefusedError(
            "transparent_color", "one color of the image means transparent; save it with an alpha channel"
        )
    if name in ("acTL", "fcTL", "fdAT"):
        raise RefusedError("animation", "the file holds several frames; save each as a file of its own")
    if name == "eXIf":
        check_exif(data)
    if name in ("iTXt", "zTXt", "tEXt") and _may_hold_preview(name, data):
        raise RefusedError("embedded_preview", "the text of the file holds a preview; save the image without metadata")
    # The fourth letter is large where a chunk depends on the pixels (specification, section 5.4).
    if name not in _KNOWN and not (name.isalpha() and name[0].islower() and name[3].islower()):
        raise RefusedError(
            "unsupported_chunk", f"a chunk may depend on the pixels ({len(data)} bytes); save it without"
        )


def _check_room(chunks: list[tuple[str, int, int]], size: int) -> None:
    """Refuse texts and private chunks that are large enough for a copy of the image, however it is packed."""
    closed = (_KNOWN | _IMAGE) - {"tEXt", "zTXt", "iTXt"}
    free = sum(end - start for name, start, end in chunks if name not in closed)
    if free > room_for_notes(size):
        detail = f"texts and private chunks have {free} bytes, enough for a copy of the image"
        raise RefusedError("embedded_preview", f"{detail}; save it without metadata")


def _may_hold_preview(name: str, data: bytes) -> bool:
    """Whether a text chunk holds XMP data with a picture, Exif data, or more text than is searched."""
    keyword, _, rest = data.partition(b"\0")
    if keyword.lower().startswith(b"raw profile type") and keyword.lower().split()[-1] not in (b"icc", b"icm"):
        return True  # Exif and Photoshop's data as text, as ImageMagick writes them
    packed = rest[1:] if name == "zTXt" else rest[2:].split(b"\0", 2)[-1] if rest[:1] == b"\1" else b""
    try:
        text = zlib.decompressobj().decompress(packed, MAX_TEXT_BYTES) if packed else data
    except zlib.error as error:
        raise RefusedError("broken_file", "a text of the PNG file cannot be unpacked; save it without") from error
    return PREVIEW_MARK in text or len(text) >= MAX_TEXT_BYTES


def _unpack(layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    """Filter of each row (H), and the filtered bytes (H, W, pixel_bytes); never more than the header promises."""
    size = layout.height * (layout.row_bytes + 1)
    stream = zlib.decompressobj()
    try:
        unpacked = stream.decompress(layout.packed, size + 1)
    except zlib.error as error:
        raise RefusedError("broken_file", "the pixels cannot be unpacked; export the image again") from error
    if len(unpacked) != size:
        raise RefusedError("broken_file", f"the pixels do not fill the {layout.height} rows of the header")
    if not stream.eof and (stream.decompress(stream.unconsumed_tail, 1) or not stream.eof):
        raise RefusedError("broken_file", "the packed pixels do not end where the image does; export it again")
    if stream.unused_data:
        raise RefusedError("trailing_data", "bytes follow the packed pixels; save the image again")
    rows = np.frombuffer(unpacked, np.uint8).reshape(layout.height, layout.row_bytes + 1)
    if (rows[:, 0] >= _FILTERS).any():
        raise RefusedError("broken_file", "a row of the image has an unknown filter; export it again")
    return rows[:, 0], rows[:, 1:].reshape(layout.height, layout.width, layout.pixel_bytes)


def _filter(filters: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """The raw bytes (H, W, pixel_bytes) after the filter of each row (H)."""
    around = np.pad(raw, ((1, 0), (1, 0), (0, 0))).astype(np.int16)
    predicted = _predict(filters[:, None, None], around[1:, :-1], around[:-1, 1:], around[:-1, :-1])
    return (raw - predicted).astype(np.uint8)


def _unfilter(filters: np.ndarray, filtered: np.ndarray) -> np.ndarray:
    """Inverse of :py:func:`_filter`, one anti-diagonal at a time, whose pixels do not depend on each other."""
    height, width, size = filtered.shape
    raw = np.empty_like(filtered)
    last, before_last = np.zeros((2, height + 1, size), np.int16)  # position row + 1: the row above the first is 0
    for diagonal in range(height + width - 1):
        rows = np.arange(max(0, diagonal - width + 1), min(height, diagonal + 1))
        first, end = int(rows[0]), int(rows[-1]) + 1
        left, up, corner = last[first + 1 : end + 1], last[first:end], before_last[first:end]
        predicted = _predict(filters[first:end, None], left, up, corner)
        pixels = (filtered[rows, diagonal - rows] + predicted).astype(np.uint8)
        raw[rows, diagonal - rows] = pixels
        before_last, last = last, np.zeros_like(last)
        last[first + 1 : end + 1] = pixels
    return raw


def _predict(filters: np.ndarray, left: np.ndarray, up: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """What each of the five filters expects a byte to be, from its neighbors (int16)."""
    to_left, to_up = np.abs(up - corner), np.abs(left - corner)
    to_corner = np.abs(left + up - 2 * corner)
    paeth = np.where((to_left <= to_up) & (to_left <= to_corner), left, np.where(to_up <= to_corner, up, corner))
    choices: Sequence[np.ndarray] = [np.zeros_like(left), left, up, (left + up) >> 1, paeth]
    return np.choose(np.broadcast_to(filters, left.shape), choices)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
