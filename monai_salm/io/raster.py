# SPDX-License-Identifier: Apache-2.0
"""Single images in PNG and TIFF files: dermatology, fundus, X-ray exports.

Only the color samples change. Alpha stays, and so does every other byte that need not change (see ``png`` and
``tiff``), text and Exif data included: they may name persons, so remove them before.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import ModuleType

import numpy as np

from monai_salm.io import png, tiff
from monai_salm.io.base import (
    MAX_RASTER_BYTES,
    Case,
    FileCheck,
    Pixels,
    RefusedError,
    StoredImage,
    Window,
    compare,
    move,
    window_of,
)
from monai_salm.stored import StoredCodec

_MODULES = {"png": png, "tiff": tiff}


def sniff(head: bytes) -> str | None:
    """``"png"`` or ``"tiff"`` for a file that starts with ``head`` (132 bytes are enough), supported or not; else None.

    A DICOM file whose preamble is a TIFF header is DICOM.
    """
    if head[128:132] == b"DICM":
        return None
    return next((name for name, module in _MODULES.items() if module.sniff(head)), None)


def count_colors(path: Path, spatial_dims: int) -> int:
    """1 for a grayscale file, 3 for RGB; the file is judged by all but its packed pixels.

    Raises:
        RefusedError: When it cannot be protected.
    """
    _check_dims(spatial_dims)
    module, content = _open(path)
    return module.colors(content)


def _check_dims(spatial_dims: int) -> None:
    if spatial_dims != 2:
        raise RefusedError("not_3d", "the file holds a single image; use --dim 2 (spatial_dims=2)")


def check_no_text(path: Path) -> None:
    """Raise when the file holds what may name a person: text, dates, Exif or other metadata.

    Raises:
        RefusedError: ``not_deidentified``, and when the file cannot be protected.
    """
    module, content = _open(path)
    found = module.texts(content)
    if found:
        raise RefusedError("not_deidentified", f"the file holds {', '.join(found)}, which may name persons; remove it")


def read(case: Case, spatial_dims: int, window: Window) -> StoredImage:
    """Stored samples (1, H, W), or (3, H, W) of RGB.

    Args:
        case: one PNG or TIFF file.
        spatial_dims: 2.
        window: ``"auto"`` (the whole range of 8 bits, else percentiles 0.5 and 99.5) or (low, high) in stored values.

    Raises:
        RefusedError: When the file is broken, constant, or of a kind that is not supported.
    """
    _check_dims(spatial_dims)
    return _image(_decode(case.files[0]), window)


def protect(
    case: Case,
    delta: np.ndarray,
    *,
    spatial_dims: int,
    window: Window,
) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Yield the one protected file: its path relative to the export, unchanged, and its bytes.

    Args:
        case: one PNG or TIFF file.
        delta: (C, H, W) lattice steps.
        spatial_dims: 2.
        window: as for :py:func:`read`.

    Raises:
        RefusedError: When the file cannot be read.
        ValueError: When the perturbation does not fit the image.
    """
    _check_dims(spatial_dims)
    module, content = _open(case.files[0])
    pixels = module.decode(content)
    image = _image(pixels, window)
    samples = pixels.samples.copy()
    samples[..., : pixels.colors] = move(image.stored, delta, image.codec).transpose(1, 2, 0)
    yield PurePosixPath(case.names[0]), module.encode(content, samples)


def verify(source: Path, written: Path, limit: float) -> FileCheck:
    """Compare a written file with its source, both parsed afresh.

    Args:
        source: the original.
        written: the protected file, under any name.
        limit: largest change allowed, in stored units.

    Raises:
        RefusedError: When anything but the colors differs, a sample moved by more than ``limit``, or none moved.
    """
    before, after = _decode(source), _decode(written)
    same = before.kept == after.kept and (before.colors, before.inverted) == (after.colors, after.inverted)
    if not same or (before.samples.shape, before.samples.dtype) != (after.samples.shape, after.samples.dtype):
        raise RefusedError("verification_failed", "bytes outside the pixels differ from the source")
    number = before.colors
    if not np.array_equal(before.samples[..., number:], after.samples[..., number:]):
        raise RefusedError("verification_failed", "the alpha channel differs from the source")
    return compare(_colors(before), _colors(after), limit)


def _colors(pixels: Pixels) -> np.ndarray:
    """(C, H, W) in native byte order."""
    native = pixels.samples[..., : pixels.colors].astype(pixels.samples.dtype.newbyteorder("="))
    return np.ascontiguousarray(native.transpose(2, 0, 1))


def _image(pixels: Pixels, window: Window) -> StoredImage:
    stored = _colors(pixels)
    if stored.min() == stored.max():
        raise RefusedError(
            "constant_image", "all pixels have one value: there is nothing to protect; leave the file out"
        )
    return StoredImage(stored, StoredCodec(stored.dtype.name, window_of(stored, window), inverted=pixels.inverted))


def _decode(path: Path) -> Pixels:
    module, content = _open(path)
    return module.decode(content)


def _open(path: Path) -> tuple[ModuleType, bytes]:
    if path.stat().st_size > MAX_RASTER_BYTES:
        raise RefusedError("too_large", f"files above {MAX_RASTER_BYTES} bytes are not supported")
    content = path.read_bytes()
    form = sniff(content[:132])
    if form is None:
        raise RefusedError("broken_header", "this is no PNG or TIFF file")
    return _MODULES[form], content
