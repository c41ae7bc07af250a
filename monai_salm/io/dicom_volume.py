# SPDX-License-Identifier: Apache-2.0
"""Decides with stated tolerances whether a series is a volume, and turns its slices to canonical axes and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from monai_salm.io.base import RefusedError
from monai_salm.io.dicom_guard import refusing
from monai_salm.records import contiguous

DIRECTION_TOLERANCE = 1e-4
"""Of direction cosines: exporters round them, and not equally in all slices of a series."""
DUPLICATE_MM = 1e-3
GAP_TOLERANCE = 0.05
SPACING_TOLERANCE_MM = 0.01
"""A gap may differ from the median gap by 5 % of it, or by 0.01 mm where that is more. Positions only say in which
order slices lie; scanners round them, some to 0.02 mm and more. A missing slice is off by 100 %."""

_AS_SLICES = "use 2D if its slices are files of their own"
_KIND_KEYWORDS = ("PatientID", "StudyInstanceUID", "SOPClassUID", "FrameOfReferenceUID", "Rows", "Columns")
_FORMAT_KEYWORDS = ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PhotometricInterpretation")
_PADDING_KEYWORDS = ("PixelPaddingValue", "PixelPaddingRangeLimit")
_CANONICAL = np.array([[0, 1], [1, 1], [2, 1]])
_LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])


def order_volume(headers: Sequence[Dataset]) -> list[int]:
    """Indices of the slices in spatial order, if the headers are one volume.

    A volume has one SOP class, frame of reference, image size, pixel spacing and orientation (within 1e-4), one
    pixel format, and slices that are shifted by one and the same vector. (A tilted gantry, which shifts them also
    within the plane, is a volume: nothing is resampled here. Slices may have slopes of their own, as in PET.)

    Raises:
        RefusedError: ``single_slice``, ``mixed_geometry``, ``mixed_pixel_format``, ``varying_rescale``,
            ``invalid_geometry``, ``duplicate_position`` or ``irregular_spacing``.
    """
    with refusing("invalid_geometry", f"position, orientation or pixel spacing is missing or broken; {_AS_SLICES}"):
        if len(headers) < 2:
            raise RefusedError("single_slice", "a volume needs at least two slices; use 2D for single images")
        _check_same(headers)
        directions = _directions(headers)
        positions = np.array([_numbers(header, "ImagePositionPatient", 3) for header in headers])
        heights = positions @ np.cross(directions[0, :3], directions[0, 3:])
        order = np.argsort(heights, kind="stable")
        _check_gaps(positions[order], heights[order])
        return [int(index) for index in order]


def _check_same(headers: Sequence[Dataset]) -> None:
    first_kind, first_format, (first_slope, _) = _kind(headers[0]), _format(headers[0]), rescale_of(headers[0])
    for header in headers[1:]:
        if _kind(header) != first_kind:
            detail = "slices differ in patient, study, kind, frame of reference or size; split the series"
            raise RefusedError("mixed_geometry", detail)
        if _format(header) != first_format:
            raise RefusedError("mixed_pixel_format", "slices differ in pixel format or padding value; split the series")
        if rescale_of(header)[0] * first_slope < 0:
            raise RefusedError("varying_rescale", f"rescale slopes of slices differ in sign; {_AS_SLICES}")
    spacings = np.array([_numbers(header, "PixelSpacing", 2) for header in headers])
    if not np.allclose(spacings, spacings[0], rtol=DIRECTION_TOLERANCE, atol=0):
        raise RefusedError("mixed_geometry", "pixel spacing varies between slices; split the series")


def _kind(header: Dataset) -> list[Any]:
    return [header.get(key) for key in _KIND_KEYWORDS]


def _format(header: Dataset) -> list[Any]:
    return [header.get(key) for key in (*_FORMAT_KEYWORDS, *_PADDING_KEYWORDS)]


def rescale_of(header: Dataset) -> tuple[float, float]:
    """RescaleSlope and RescaleIntercept; 1 and 0 where the file has none."""
    slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
    return 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)


def _directions(headers: Sequence[Dataset]) -> NDArray[np.float64]:
    directions = np.array([_numbers(header, "ImageOrientationPatient", 6) for header in headers])
    rows, columns = directions[:, :3], directions[:, 3:]
    products = np.stack([(rows * rows).sum(1) - 1, (columns * columns).sum(1) - 1, (rows * columns).sum(1)])
    if np.abs(products).max() > 1e-2:
        detail = f"the image orientation is not two perpendicular unit vectors; {_AS_SLICES}"
        raise RefusedError("invalid_geometry", detail)
    if np.abs(directions - directions[0]).max() > DIRECTION_TOLERANCE:
        raise RefusedError("mixed_geometry", "orientation varies between slices (a localizer?); split the series")
    return directions


def _numbers(header: Dataset, keyword: str, count: int) -> list[float]:
    values = [float(value) for value in header[keyword].value]
    if len(values) != count or not np.isfinite(values).all():
        raise RefusedError("invalid_geometry", f"{keyword} does not hold {count} finite numbers; {_AS_SLICES}")
    return values


def _check_gaps(positions: NDArray[np.float64], heights: NDArray[np.float64]) -> None:
    if np.diff(heights).min() <= DUPLICATE_MM:
        raise RefusedError("duplicate_position", "slices share a position (several echoes or times?); split the series")
    steps = np.diff(positions, axis=0)
    median = np.median(steps, axis=0)
    tolerance = max(GAP_TOLERANCE * float(np.linalg.norm(median)), SPACING_TOLERANCE_MM)
    excess = np.linalg.norm(steps - median, axis=1)
    if excess.max() > tolerance:
        worst = int(excess.argmax())
        gap, usual = np.linalg.norm(steps[worst]), np.linalg.norm(median)
        raise RefusedError(
            "irregular_spacing",
            f"between slices {worst + 1} and {worst + 2} in space: {gap:.4g} mm where others have {usual:.4g} mm; "
            f"complete or split the series, or where no segmentation belongs to it {_AS_SLICES}",
        )


def orientation_of(first: Dataset, last: Dataset) -> NDArray[Any]:
    """nibabel orientation of the array (columns, rows, slices); obliques get the closest axes.

    Sources: PS3.3 C.7.6.2.1.1 (row and column direction), nibabel ``io_orientation``.
    """
    directions = np.array(_numbers(first, "ImageOrientationPatient", 6))
    step = np.subtract(_numbers(last, "ImagePositionPatient", 3), _numbers(first, "ImagePositionPatient", 3))
    affine = np.eye(4)
    affine[:3, :3] = _LPS_TO_RAS[:, None] * np.stack([directions[:3], directions[3:], step], axis=1)
    return np.asarray(io_orientation(affine))


def spacing_of(headers: Sequence[Dataset], orientation: NDArray[Any] | None) -> tuple[float, ...]:
    """mm along each canonical axis of a volume, or along (rows, columns) of a slice; empty where headers do not tell.

    Args:
        headers: one slice, or all slices in spatial order.
        orientation: of the volume, from :py:func:`orientation_of`; None for a slice.
    """
    try:
        down, right = _numbers(headers[0], "PixelSpacing", 2)
        if orientation is None:
            return (down, right) if min(down, right) > 0 else ()
        first, last = (np.array(_numbers(headers[index], "ImagePositionPatient", 3)) for index in (0, -1))
    except Exception:  # a broken element can raise anything; an image of one slice needs no spacing
        return ()
    spacing = np.zeros(3)
    spacing[orientation[:, 0].astype(int)] = right, down, np.linalg.norm(last - first) / (len(headers) - 1)
    return tuple(spacing.tolist()) if spacing.all() else ()


def to_canonical(slices: NDArray[Any], orientation: NDArray[Any]) -> NDArray[Any]:
    """(slices, rows, columns) -> (x, y, z) pointing right, anterior, superior; a view, permuted and flipped."""
    return apply_orientation(slices.transpose(2, 1, 0), orientation)


def from_canonical(volume: NDArray[Any], orientation: NDArray[Any]) -> NDArray[Any]:
    """Exact inverse of :py:func:`to_canonical`."""
    back = ornt_transform(_CANONICAL, orientation)
    return contiguous(apply_orientation(volume, back).transpose(2, 1, 0))
