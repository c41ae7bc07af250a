# SPDX-License-Identifier: Apache-2.0
"""DICOM Segmentation objects (SEG): the images, segments and frames of a file (PS3.3 A.51, C.8.20)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset

from monai_salm.io.base import RefusedError
from monai_salm.io.dicom_frames import groups, macro_of
from monai_salm.io.dicom_guard import refusing
from monai_salm.io.dicom_parse import identify, parse, read_bytes, read_header
from monai_salm.io.dicom_pixels import check_codestream
from monai_salm.io.dicom_syntax import NATIVE
from monai_salm.io.kept import while_unchanged

if TYPE_CHECKING:
    from highdicom.seg import Segmentation

SEG_CLASSES = (uid.SegmentationStorage, "1.2.840.10008.5.1.4.1.1.66.7")
"""Segmentation Storage, and Label Map Segmentation Storage, which pydicom does not name yet."""
SEG_BROKEN = "the segmentation is broken or of a kind that is not supported; export it again as DICOM SEG"


@dataclass(frozen=True)
class SegHeader:
    """What a SEG file refers to.

    Args:
        series: UIDs of the images that it refers to, by series UID.
        instances: UIDs of all images that it refers to, in its list of series or as the source of a frame.
        segments: number and label of each segment; segments called "background" are left out.
        fractional: whether voxels hold fractions; those above half of the maximum count.
    """

    series: Mapping[str, frozenset[str]]
    instances: frozenset[str]
    segments: tuple[tuple[int, str], ...]
    fractional: bool = False

    def of_others(self, own: set[str]) -> frozenset[str]:
        """Images of the series in ``series`` that contain none of ``own``; empty where no series contains any.

        A segmentation may belong to several series: each of them takes only its own frames.
        """
        others = [images for images in self.series.values() if not images & own]
        return frozenset().union(*others) if len(others) < len(self.series) else frozenset()


def is_segmentation(source: Dataset | Path) -> bool:
    """Whether a header, or a file by its file meta alone, is a segmentation."""
    found = identify(source)[0] if isinstance(source, Path) else str(source.get("SOPClassUID") or "")
    return found in SEG_CLASSES


def read_seg_header(path: Path) -> SegHeader:
    """What a SEG file refers to, see :py:func:`seg_header`."""
    return seg_header(read_header(path))


def seg_header(header: Dataset) -> SegHeader:
    """What a segmentation refers to.

    Args:
        header: from ``read_header``.

    Raises:
        RefusedError: ``mask_unreadable``.
    """
    with refusing("mask_unreadable", SEG_BROKEN):
        series = {}
        for item in header.get("ReferencedSeriesSequence") or ():
            named = (str(each.ReferencedSOPInstanceUID) for each in item.get("ReferencedInstanceSequence") or ())
            series[str(item.SeriesInstanceUID)] = frozenset(named)
        instances = frozenset(instance for pair in _frame_groups(header) for instance, _ in _sources(*pair))
        fractional = header.get("SegmentationType") == "FRACTIONAL"
        return SegHeader(series, instances.union(*series.values()), tuple(_segments(header)), fractional)


def _segments(header: Dataset) -> Iterator[tuple[int, str]]:
    for item in header.SegmentSequence:
        number = int(item.SegmentNumber)
        label = str(item.get("SegmentLabel") or "").strip() or f"segment {number}"
        if label.casefold() != "background":
            yield number, label


Source: TypeAlias = tuple[str, int | None]
"""UID of an image, and the number of one of its frames; None stands for any frame."""


@dataclass(frozen=True)
class Frame:
    """What a frame says of where it belongs; None for what it does not say."""

    segment: int | None
    position: NDArray[np.float64] | None
    orientation: NDArray[np.float64] | None
    spacing: NDArray[np.float64] | None
    sources: frozenset[Source]


def _frame_groups(header: Dataset) -> Iterator[tuple[Dataset, Dataset]]:
    """The functional groups of each frame: its own, and those that all frames share (PS3.3 C.7.6.16)."""
    shared, frames = groups(header)
    of_all = shared[0] if shared else Dataset()
    for own in frames or [Dataset()]:
        yield own, of_all


def _sources(own: Dataset, shared: Dataset) -> frozenset[Source]:
    """The images that a frame was derived from."""
    return frozenset(
        (str(source.ReferencedSOPInstanceUID), number)
        for item in own.get("DerivationImageSequence") or shared.get("DerivationImageSequence") or ()
        for source in item.get("SourceImageSequence") or ()
        for number in np.atleast_1d(source.get("ReferencedFrameNumber")).tolist()
    )


def _frame(own: Dataset, shared: Dataset) -> Frame:
    def numbers(macro: str, keyword: str) -> NDArray[np.float64] | None:
        item = macro_of(macro, own, shared)
        value = None if item is None else item.get(keyword)
        return None if value is None else np.array([float(each) for each in value])

    segment = macro_of("SegmentIdentificationSequence", own, shared)
    return Frame(
        None if segment is None else int(segment.ReferencedSegmentNumber),
        numbers("PlanePositionSequence", "ImagePositionPatient"),
        numbers("PlaneOrientationSequence", "ImageOrientationPatient"),
        numbers("PixelMeasuresSequence", "PixelSpacing"),
        _sources(own, shared),
    )


@dataclass(frozen=True)
class SegFile:
    """A parsed file; its frames are decoded on demand."""

    dataset: Segmentation
    header: SegHeader
    frames: tuple[Frame, ...]

    def values(self, index: int) -> NDArray[Any]:
        """(rows, columns) of one frame: 1 in the segment, or (LABELMAP) the segment number."""
        stored = self.dataset.get_stored_frame(index, as_index=True)
        if self.dataset.SegmentationType == "FRACTIONAL":
            largest = int(self.dataset.MaximumFractionalValue)
            return 2 * stored.astype(np.int64) > largest + (largest > 100)  # 128 of 255 is a half, 1 of 1 is none
        return stored


@while_unchanged(2)
def load_seg(path: Path) -> SegFile:
    """A parsed file; cached, because the slices of a series share it."""
    from highdicom.seg import Segmentation

    with refusing("mask_unreadable", SEG_BROKEN):
        dataset = parse(read_bytes(path))
        header, frames = seg_header(dataset), tuple(_frame(*pair) for pair in _frame_groups(dataset))
        syntax, shape = dataset.file_meta.TransferSyntaxUID, (int(dataset.Rows), int(dataset.Columns))
        segmentation = SegFile(Segmentation.from_dataset(dataset, copy=False), header, frames)
        if len(frames) != int(dataset.get("NumberOfFrames") or 1) or "PixelData" not in dataset:
            raise RefusedError("mask_unreadable", SEG_BROKEN)
        if syntax not in (*NATIVE, uid.RLELossless):
            for index in range(len(frames)):
                check_codestream(segmentation.dataset.get_raw_frame(index, as_index=True), syntax, shape)
        return segmentation
