# SPDX-License-Identifier: Apache-2.0
"""The class of each voxel of an image, from a DICOM Segmentation object (SEG).

A frame belongs to the slice that it names as its source and that lies where the frame lies; where both are told they
must agree. The order of frames means nothing, and a slice without a frame has no label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from monai_salm.io.base import Case, Mask, RefusedError
from monai_salm.io.dicom_frames import headers_of
from monai_salm.io.dicom_guard import refusing
from monai_salm.io.dicom_parse import identify
from monai_salm.io.dicom_seg import SEG_BROKEN, Frame, SegFile, Source, is_segmentation, load_seg
from monai_salm.io.dicom_volume import DIRECTION_TOLERANCE, GAP_TOLERANCE, orientation_of, to_canonical

POSITION_TOLERANCE_MM = 0.01
"""A frame lies on a slice when no coordinate differs by more: positions are often written with two decimals.
Where it names one slice as its source, they may also differ by ``GAP_TOLERANCE`` of the gap between slices: tools write
regular grids, scanners do not."""
SPACING_TOLERANCE = 1e-4
"""Of the pixel spacing, relative; as for the slices of a volume."""


def read(case: Case, mask: Mask, spatial_dims: int) -> NDArray[np.uint8]:
    """Class index of each voxel of a slice or a series, on the axes of ``dicom.read``.

    A fractional segment counts above half of its maximum (of more than 100: rounded up, so that probabilities which add
    up to 1 never overlap).

    Args:
        case: one file for 2D, all slices of the volume in any order for 3D.
        mask: a SEG file and its segment numbers by class.
        spatial_dims: 2 or 3.

    Returns:
        (1, rows, columns) or (1, x, y, z).

    Raises:
        RefusedError: ``mask_format``, ``mask_is_image``, ``mask_unreadable``; ``mask_shape``, ``mask_affine`` and
            ``mask_frame_of_reference``, where grids differ; ``mask_missing_slices``, ``mask_unplaced``,
            ``mask_repeated_frame``, ``mask_overlap`` and ``unknown_label_value``.
    """
    if not is_segmentation(mask.file):
        reason = "mask_is_image" if identify(mask.file)[0] else "mask_format"
        raise RefusedError(reason, "the label file of a DICOM image must be a DICOM SEG file; convert it to one")
    segmentation = load_seg(mask.file)
    headers = headers_of(case.files, spatial_dims)
    with refusing("mask_unreadable", SEG_BROKEN):
        _check_grid(segmentation, headers[0])
        slices = _place(segmentation, headers, _gap(headers), complete=spatial_dims == 3)
        classes = _classes(segmentation, mask.values)
        labels = _paint(segmentation, slices, classes, (len(headers), int(headers[0].Rows), int(headers[0].Columns)))
    if spatial_dims == 2:
        return labels
    return np.ascontiguousarray(to_canonical(labels, orientation_of(headers[0], headers[-1])))[None]


def check_frames(file: Path, slices: Sequence[Path]) -> None:
    """Raise when a frame belongs to no slice. (When slices are read one by one, it could belong to another slice.)

    Args:
        file: a SEG file.
        slices: all slices that it is the label file of, in any order.

    Raises:
        RefusedError: As :py:func:`read`.
    """
    headers = headers_of(slices, 2)
    with refusing("mask_unreadable", SEG_BROKEN):
        _place(load_seg(file), headers, _gap(headers[:1]), complete=True)


def _check_grid(segmentation: SegFile, header: Dataset) -> None:
    dataset, frames = segmentation.dataset, segmentation.frames
    own, other = (f"{each.Rows} x {each.Columns}" for each in (header, dataset))
    if own != other:
        raise RefusedError("mask_shape", f"slices have {own} pixels and frames {other}; segment the original grid")
    own, other = (str(each.get("FrameOfReferenceUID") or "") for each in (header, dataset))
    if own and other and own != other:
        raise RefusedError(
            "mask_frame_of_reference",
            "image and segmentation have different frames of reference, so positions cannot be compared; pair the "
            "segmentation with the series it was made on",
        )
    turned = _apart(header.get("ImageOrientationPatient"), [frame.orientation for frame in frames])
    if turned.max() > DIRECTION_TOLERANCE:
        raise RefusedError(
            "mask_affine",
            f"direction cosines of slices and frames of the segmentation differ by up to {turned.max():.4g} "
            f"({DIRECTION_TOLERANCE:g} is tolerated); segment the original grid",
        )
    scaled = _apart(header.get("PixelSpacing"), [frame.spacing for frame in frames])
    if (scaled > SPACING_TOLERANCE * np.array(header.get("PixelSpacing") or 1, np.float64)).any():
        raise RefusedError(
            "mask_affine",
            f"pixel spacings of slices and frames of the segmentation differ by up to {scaled.max():.4g} mm; segment "
            "the original grid",
        )


def _apart(own: Sequence[float] | None, frames: Sequence[NDArray[np.float64] | None]) -> NDArray[np.float64]:
    """Absolute differences between the image's numbers and those of each frame; 0 where either has none."""
    told = [numbers for numbers in frames if numbers is not None]
    return np.abs(np.stack(told) - np.array(own, np.float64)) if told and own else np.zeros((1, 1))


def _place(segmentation: SegFile, headers: Sequence[Dataset], gap: float, *, complete: bool) -> list[int | None]:
    """Index of the slice that each frame belongs to; None for a frame of another slice.

    Args:
        segmentation: the frames.
        headers: of the slices.
        gap: mm between slices.
        complete: whether these are all slices of the series, so that every frame must belong to one of them.

    Raises:
        RefusedError: ``mask_missing_slices`` when ``complete`` and one does not; as :py:func:`_place_frame`.
    """
    images = [(str(header.SOPInstanceUID), header.get("ReferencedFrameNumber", 1)) for header in headers]
    positions = _positions(headers)
    tolerance = max(POSITION_TOLERANCE_MM, GAP_TOLERANCE * gap)
    places = [_place_frame(frame, images, positions, tolerance, complete) for frame in segmentation.frames]
    if complete:
        own = {instance for instance, _ in images}
        elsewhere = segmentation.header.of_others(own)
        lost: set[Any] = segmentation.header.instances - elsewhere - own
        unplaced = [frame for frame, place in zip(segmentation.frames, places, strict=True) if place is None]
        lost |= {source for frame in unplaced for source in frame.sources if source[0] not in lost | elsewhere}
        alone = [frame.position for frame in unplaced if not frame.sources and not elsewhere]
        adrift = {tuple(position): float(np.abs(positions - position).max(axis=1).min()) for position in alone}
        if lost or adrift:
            referred = len(segmentation.header.instances | lost) + len(adrift)
            raise missing_slices(len(lost) + len(adrift), referred, max(adrift.values(), default=0))
    return places


def _positions(headers: Sequence[Dataset]) -> NDArray[np.float64] | None:
    known = [header.get("ImagePositionPatient") for header in headers]
    return np.array([[float(each) for each in position] for position in known]) if all(known) else None


def _gap(headers: Sequence[Dataset]) -> float:
    """mm between slices in spatial order; of a single slice as its header says, 0 where it does not."""
    positions = _positions(headers)
    if positions is not None and len(positions) > 1:
        return float(np.median(np.linalg.norm(np.diff(positions, axis=0), axis=1)))
    return max(0.0, float(headers[0].get("SpacingBetweenSlices") or headers[0].get("SliceThickness") or 0))


def _place_frame(
    frame: Frame, images: Sequence[Source], positions: NDArray[np.float64] | None, tolerance: float, complete: bool
) -> int | None:
    """Index of the slice that a frame names as its source, or else lies on; None where there is none.

    Raises:
        RefusedError: ``mask_affine`` when it does not lie on its source; ``mask_unplaced`` when it tells neither.
    """
    named = [index for index, each in enumerate(images) if each in frame.sources or (each[0], None) in frame.sources]
    if frame.sources and not named:
        return None
    if frame.position is not None and positions is not None:
        apart = np.abs(positions - frame.position).max(axis=1)
        nearest = min(named or range(len(images)), key=apart.__getitem__)
        tolerance = tolerance if len(named) == len(frame.sources) == 1 else POSITION_TOLERANCE_MM
        if apart[nearest] <= tolerance:
            return nearest
        if named and (complete or len(frame.sources) == 1):
            raise RefusedError(
                "mask_affine",
                f"a frame of the segmentation lies {apart[nearest]:.4g} mm from the slice that it names as its "
                f"source ({tolerance:.4g} mm are tolerated); segment the original slices",
            )
        return None
    if len(named) == 1:
        return named[0]
    raise RefusedError(
        "mask_unplaced", "a frame of the segmentation tells neither its position nor one source image; export it again"
    )


def _classes(segmentation: SegFile, values: Sequence[int]) -> dict[int, int]:
    """Class index of each segment number; segments with the same label are one class, "background" is class 0."""
    labels = dict(segmentation.header.segments)
    of_label = {labels[number]: index for index, number in enumerate(values) if index and number in labels}
    classes = {int(item.SegmentNumber): 0 for item in segmentation.dataset.SegmentSequence}
    if any(label not in of_label for label in labels.values()):
        raise RefusedError("unknown_label_value", "the segmentation has a segment of an unknown class; scan it again")
    return classes | {number: of_label[label] for number, label in labels.items()}


def _paint(
    segmentation: SegFile, slices: Sequence[int | None], classes: Mapping[int, int], shape: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """Class index of each voxel, (slices, rows, columns), from all frames that belong to a slice."""
    labels = np.zeros(shape, np.uint8)
    overlap = 0
    seen: dict[tuple[int | None, int], int] = {}  # segment and slice -> frame
    for index, place in enumerate(slices):
        if place is None:
            continue
        segment = segmentation.frames[index].segment
        first = seen.setdefault((segment, place), index)
        if first != index:
            of = "" if segment is None else f" of segment {segment}"
            raise RefusedError(
                "mask_repeated_frame",
                f"frames {first + 1} and {index + 1} of the segmentation are both{of} for slice {place + 1} of "
                f"{len(labels)}, and which one counts is not told; export it again",
            )
        painted = _frame_classes(segmentation.values(index), segmentation.frames[index].segment, classes)
        plane = labels[place]
        overlap += int(((plane != 0) & (painted != 0) & (plane != painted)).sum())
        np.copyto(plane, painted, where=painted != 0)
    if overlap:
        raise RefusedError(
            "mask_overlap",
            f"segments of different classes overlap in {overlap} voxels; each voxel must have one class: edit the "
            "segmentation, or split it into several files and choose one",
        )
    return labels


def _frame_classes(values: NDArray[Any], segment: int | None, classes: Mapping[int, int]) -> NDArray[np.uint8]:
    """Class index of each pixel of a frame; without a segment of its own (LABELMAP) its values are segment numbers."""
    numbers = np.flatnonzero(np.bincount(values.reshape(-1))) if segment is None else np.array([0, segment])
    unknown = [number for number in numbers.tolist() if number and number not in classes]
    if unknown:
        raise RefusedError(
            "unknown_label_value",
            f"frames of the segmentation use {len(unknown)} segment numbers that it does not describe; export it again",
        )
    if segment is not None:
        return (values != 0).astype(np.uint8) * np.uint8(classes[segment])
    table = np.zeros(int(numbers.max()) + 1, np.uint8)
    table[numbers] = [classes.get(number, 0) for number in numbers.tolist()]
    return table[values]


def missing_slices(missing: int, referred: int, apart: float = 0) -> RefusedError:
    """The refusal of a segmentation that refers to slices that are missing.

    Args:
        missing: number of such slices.
        referred: number of slices that it refers to.
        apart: mm from a frame without a source to the nearest slice, where that is why a slice counts as missing.
    """
    tolerated = f"{POSITION_TOLERANCE_MM:g} mm are tolerated"
    lie = f" (frames without a source lie up to {apart:.4g} mm from the nearest one; {tolerated})" if apart else ""
    return RefusedError(
        "mask_missing_slices",
        f"{missing} of {referred} slices that the segmentation refers to are missing{lie}; complete the series (each "
        "that it labels), or pair the segmentation with the series it was made on",
    )
