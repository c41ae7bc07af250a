# SPDX-License-Identifier: Apache-2.0
"""The exact stored integers and the codec of a slice or a volume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset

from monai_salm.io.base import Case, Outline, RefusedError, StoredImage, Window
from monai_salm.io.dicom_copies import LEAST_PART
from monai_salm.io.dicom_frames import ENHANCED_CT, frame_headers, headers_of
from monai_salm.io.dicom_guard import refusing
from monai_salm.io.dicom_parse import parse, read_bytes
from monai_salm.io.dicom_pixels import decode, stored_dtype, stored_range
from monai_salm.io.dicom_support import check_supported
from monai_salm.io.dicom_volume import (
    from_canonical,
    order_volume,
    orientation_of,
    rescale_of,
    spacing_of,
    to_canonical,
)
from monai_salm.io.kept import Kept, state_of
from monai_salm.records import contiguous, image_digest
from monai_salm.stored import SliceScaling, StoredCodec, auto_window

CT_WINDOW = (-160.0, 240.0)
"""HU, soft tissue; for CT files that name no window."""

_MODALITIES = frozenset({"CT", "MR", "CR", "DX", "MG", "IO", "XA", "RF", "US", "NM", "PT", "OT"})
_READ_IN_THEIR_WINDOW = ("CT", "CR", "DX")
"""Modalities whose files mostly list the window for display. MR files list what the scanner made up."""


@dataclass(frozen=True)
class Layout:
    """How the image of a case is put together from its files, and so how to split it again.

    Args:
        outline: of the image.
        windows: that its files list.
        files: the file that each frame came from, in the order of reading.
        order: index into ``files`` of each slice, in spatial order.
        scalings: slope and intercept of each frame, in the order of reading.
        orientation: nibabel orientation of (columns, rows, slices); None for 2D.
    """

    outline: Outline
    windows: tuple[tuple[float, float], ...]
    files: tuple[Path, ...]
    order: tuple[int, ...]
    scalings: tuple[tuple[float, float], ...]
    orientation: NDArray[Any] | None

    def frames(self, values: NDArray[Any]) -> dict[Path, list[tuple[NDArray[Any], StoredCodec]]]:
        """Split (1, *spatial) values on canonical axes into the frames of each file, each with its own codec."""
        planes = values if self.orientation is None else from_canonical(values[0], self.orientation)
        found: dict[Path, list[tuple[NDArray[Any], StoredCodec]]] = {}
        places = np.argsort(self.order)
        for file, place, (slope, intercept) in zip(self.files, places, self.scalings, strict=True):
            codec = self.outline.codec
            if codec.slices is not None:
                codec = replace(codec, slices=None, slope=slope, intercept=intercept)
            found.setdefault(file, []).append((planes[place], codec))
        return found


_LAYOUTS: Kept[Layout] = Kept(1 << 14, drop_newest=True)
"""Of cases that were read, as long as their files do not change: a case is read before it is written, and cases are
written in the order in which they were read. The limit counts slices, of about 1 KB each; a layout counts two more."""


def read(case: Case, spatial_dims: int, window: Window = "auto") -> StoredImage:
    """The stored integers of one slice, (1, rows, columns), or of a series as a RAS+ volume, (1, x, y, z).

    A volume is a view of the slices as they were decoded, permuted and flipped.

    Args:
        case: one file for 2D, all slices of the volume in any order for 3D.
        spatial_dims: 2 or 3.
        window: ``"auto"`` or (low, high) in physical units. ``"auto"`` for CT, CR and DX: the first linear window of
            the file (for a volume: of its lowest slice), for CT without one -160..240 HU; for all others: percentiles
            0.5 and 99.5.

    Raises:
        RefusedError: See :py:func:`check_supported`, ``order_volume`` and ``dicom_pixels.decode``; and
            ``constant_image``.
    """
    return _load(case, spatial_dims, window)[0]


def read_slices(case: Case, spatial_dims: int, window: Window, axis: int, indices: Sequence[int]) -> StoredImage:
    """Some slices of an image, ascending along a canonical axis; only their files are read, where each has its own.

    Raises:
        RefusedError: As :py:func:`read`.
    """
    layout = layout_of(case, spatial_dims, window)
    orientation = layout.orientation
    if orientation is None or orientation[2][0] != axis or len(case.files) < len(layout.files):
        return read(case, spatial_dims, window).slices(axis, indices)
    direction = int(orientation[2][1])
    planes = []
    for place in [layout.order[::direction][index] for index in indices][::direction]:
        dataset = parse(read_bytes(layout.files[place]))
        check_supported(dataset, spatial_dims, allow_protected=True)
        planes.append(decode(dataset))
    stored = contiguous(to_canonical(np.stack(planes), orientation)[None])
    return StoredImage(stored, layout.outline.codec.of_slices(indices), layout.outline.spacing, layout.windows)


def read_spacing(case: Case, spatial_dims: int) -> tuple[float, ...]:
    """mm along each canonical axis, from the headers.

    Raises:
        RefusedError: As ``headers_of``.
    """
    headers = headers_of(case.files, spatial_dims)
    return spacing_of(headers, None if spatial_dims == 2 else orientation_of(headers[0], headers[-1]))


def layout_of(case: Case, spatial_dims: int, window: Window = "auto") -> Layout:
    """The layout of a case: cached since it was read, as long as its files are the same, else read anew.

    Raises:
        RefusedError: As :py:func:`read`.
    """
    return _LAYOUTS.get(_key(case, spatial_dims, window)) or _load(case, spatial_dims, window)[1]


def _key(case: Case, spatial_dims: int, window: Window) -> Any:
    with refusing("unreadable", "a file cannot be opened; check its permissions"):
        return case.files, spatial_dims, window, tuple(map(state_of, case.files))


def _load(case: Case, spatial_dims: int, window: Window) -> tuple[StoredImage, Layout]:
    if spatial_dims not in (2, 3) or (spatial_dims == 2 and len(case.files) != 1):
        raise ValueError(f"spatial_dims is {spatial_dims} for {len(case.files)} files; 2 takes one file, 3 a series")
    key = _key(case, spatial_dims, window)
    files, headers, stored = _decode(case, spatial_dims)
    order = order_volume(headers) if spatial_dims == 3 else [0]
    scalings = tuple(map(rescale_of, headers))
    headers = [headers[index] for index in order]
    if order != sorted(order):  # a scan has ordered them already
        stored = stored[order]
    orientation = orientation_of(headers[0], headers[-1]) if spatial_dims == 3 else None
    if orientation is not None:
        stored = to_canonical(stored, orientation)[None]
    codec = _codec(headers, stored, orientation, window)
    windows = tuple(dict.fromkeys(each for header in headers for each in _listed_windows(header)))
    image = StoredImage(stored, codec, spacing_of(headers, orientation), windows)
    outline = Outline(stored.shape, codec, image.spacing, image_digest(stored))
    layout = Layout(outline, windows, tuple(files), tuple(order), scalings, orientation)
    return image, _LAYOUTS.keep(key, layout, len(files) + 2)


def _decode(case: Case, spatial_dims: int) -> tuple[list[Path], list[Dataset], NDArray[Any]]:
    """File, header and plane of each frame, in the order of the files."""
    headers: list[Dataset] = []
    files: list[Path] = []
    stored = np.empty(0)
    for path in case.files:
        dataset = parse(read_bytes(path), least_private=LEAST_PART)
        check_supported(dataset, spatial_dims, allow_protected=True)
        frames = frame_headers(dataset)
        if headers and len(frames) * len(case.files) != len(stored):
            raise RefusedError(
                "mixed_geometry", "files of one volume differ in their number of frames; split the series"
            )
        for index, frame in enumerate(frames):
            plane = decode(dataset, index)
            if not headers:
                stored = np.empty((len(frames) * len(case.files), *plane.shape), plane.dtype)
            headers.append(frame)
            if (plane.shape, plane.dtype) != (stored.shape[1:], stored.dtype):
                order_volume(headers)  # says how they differ, as it refuses them
            stored[len(headers) - 1] = plane
        del dataset.PixelData
        files += [path] * len(frames)
    return files, headers, stored


def _codec(
    headers: Sequence[Dataset], stored: NDArray[Any], orientation: NDArray[Any] | None, window: Window
) -> StoredCodec:
    header, padding = headers[0], _padding(headers[0])
    inside = ... if padding is None else (stored < padding[0]) | (stored > padding[1])
    values = stored[inside]
    if values.size == 0 or values.min() == values.max():
        raise RefusedError("constant_image", "all pixels outside the padding are equal: there is nothing to protect")
    slices = _slice_scaling(headers, orientation)
    slope, intercept = min(map(rescale_of, headers), key=lambda scaling: abs(scaling[0]))
    enhanced_ct = header.SOPClassUID in ENHANCED_CT and header.get("RescaleType") == "HU"
    is_ct = enhanced_ct or header.SOPClassUID == uid.CTImageStorage
    modality = "CT" if is_ct else _modality(header)
    if isinstance(window, str):
        listed = _file_windows(header) if modality in _READ_IN_THEIR_WINDOW else ()
        if listed or is_ct:
            window = listed[0] if listed else CT_WINDOW
        elif slices:
            window = auto_window(slices.to_physical(stored)[inside], 1.0, 0.0)
        else:
            window = auto_window(values, slope, intercept)
    return StoredCodec(
        dtype=stored_dtype(header).name,
        window=window,
        slope=slope,
        intercept=intercept,
        stored_range=stored_range(header),
        padding=padding,
        inverted=header.PhotometricInterpretation == "MONOCHROME1",
        unit="HU" if is_ct else "a.u.",
        modality=modality,
        slices=slices,
    )


def _modality(header: Dataset) -> str:
    """Modality of a file, if it is a known one; else empty, because the value is shown in messages.

    Raises:
        RefusedError: ``unreadable`` when there are several: as an unknown one they would pass a budget for another.
    """
    with refusing("unreadable", "the modality is broken; repair the header"):
        value = header.get("Modality")
        return str(value) if value in _MODALITIES else ""  # of several values pydicom makes a list, which has no hash


def _slice_scaling(headers: Sequence[Dataset], orientation: NDArray[Any] | None) -> SliceScaling | None:
    """Slope and intercept of each slice on canonical axes; None where they are the same for all."""
    scalings = [rescale_of(header) for header in headers]
    if orientation is None or len(set(scalings)) == 1:
        return None
    axis, direction = orientation[2]
    slopes, intercepts = zip(*scalings[:: int(direction)], strict=True)
    return SliceScaling(int(axis), slopes, intercepts)


def _padding(header: Dataset) -> tuple[float, float] | None:
    """Inclusive range of stored values that are padding (PS3.3 C.7.5.1.1.2)."""
    with refusing("unreadable", "the pixel padding value is broken; repair the header"):
        ends = [header.get(keyword) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
        if ends[0] is None:
            return None
        # Some scanners write the value of a signed image as unsigned: only its bits are right.
        bits = [_bits(end) for end in ends if end is not None]
        values = np.array(bits, dtype=np.uint16).astype(stored_dtype(header)).tolist()
        return float(min(values)), float(max(values))


def _bits(value: int | bytes) -> int:
    return (int.from_bytes(value, "little") if isinstance(value, bytes) else int(value)) & 0xFFFF


def _file_windows(header: Dataset) -> list[tuple[float, float]]:
    """The linear windows of the file in physical units (PS3.3 C.11.2.1.2)."""
    with refusing("unreadable", "the display window is broken; name a window instead of 'auto'"):
        shrink = {"LINEAR": 1.0, "LINEAR_EXACT": 0.0}.get(header.get("VOILUTFunction") or "LINEAR")
        if shrink is None:
            return []
        centers, widths = (_numbers(header.get(keyword)) for keyword in ("WindowCenter", "WindowWidth"))
        ends = [
            (center - shrink / 2 - (width - shrink) / 2, center - shrink / 2 + (width - shrink) / 2)
            for center, width in zip(centers, widths, strict=False)
            if width > shrink
        ]
        return [(low, high) for low, high in ends if np.isfinite([low, high]).all()]


def _listed_windows(header: Dataset) -> list[tuple[float, float]]:
    """As :py:func:`_file_windows`, but none where they are broken: nothing depends on these."""
    try:
        return _file_windows(header)
    except RefusedError:
        return []


def _numbers(value: float | Sequence[float] | None) -> list[float]:
    if value is None or value == "":
        return []
    return [float(each) for each in (value if isinstance(value, Sequence) else [value])]
