# SPDX-License-Identifier: Apache-2.0
"""Which label file belongs to which image: what a table or ``dataset.json`` says, or the SEG file that refers to it.

Fail closed: a case without a label file is refused, and so are all cases whose label file is not released with all of
the images that it labels.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from monai_salm.io import dicom, formats, worker
from monai_salm.io.base import Case, Mask, RefusedError
from monai_salm.io.dicom import SegHeader
from monai_salm.release.decathlon import DATASET_FILE
from monai_salm.release.gates import Refused, tally
from monai_salm.release.table import LabelRow, match
from monai_salm.release.voxels import VoxelLabels

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """What a scan found that has to do with voxel labels.

    Args:
        files: path of each named label file that is there, by name.
        broken: why a SEG file, or another label file that is named, cannot be used, by name.
        segmentations: path and header of each SEG file, by name.
        instances: series of each DICOM image, refused ones included, by instance UID.
    """

    files: dict[str, Path] = field(default_factory=dict)
    broken: dict[str, RefusedError] = field(default_factory=dict)
    segmentations: dict[str, tuple[Path, SegHeader]] = field(default_factory=dict)
    instances: dict[str, str] = field(default_factory=dict)


def shared_mask(case: Case, cause: str = "") -> RefusedError:
    """The refusal of a case that shares its label file with one that is not released; ``cause`` is why, if known."""
    because = f" ({cause})" if cause else ""
    dicom_seg = f"refers to images that are not released{because}, and a copy would name them"
    others = dicom_seg if case.format == "dicom" else f"also labels an image that is not released{because}"
    detail = f"the label file {others}; release all of them, or give each its own label file"
    return RefusedError("mask_shared_with_unreleased", detail)


def pair(
    voxels: VoxelLabels,
    classes: Sequence[str],
    cases: Sequence[Case],
    found: Found,
    refused: Iterable[str],
    spatial_dims: int,
) -> tuple[list[Case], list[Refused]]:
    """Give every case its mask and split.

    Args:
        voxels: what is said about the labels.
        classes: from :py:func:`class_names`.
        cases: the images of the export.
        found: the label files of the export.
        refused: names of what is refused already.
        spatial_dims: 2 or 3.

    Returns:
        The cases that have a mask, and what is refused.

    Raises:
        ValueError: When a row names nothing in the export, or rows contradict each other.
    """
    gone = frozenset(refused)
    others = {*gone, *found.segmentations, *found.files, *found.broken}
    rows = None if voxels.rows is None else match(voxels.rows, cases, others)
    paired: list[Case] = []
    refusals: list[Refused] = []
    finder = _Finder(voxels, classes, found)
    for case in cases:
        row = rows.get(case.sample_id) if rows is not None else None
        try:
            if rows is not None and row is None:
                raise RefusedError("no_label", f"{voxels.told_by} names no label for this case; add one")
            mask = finder.find(case, row.mask if row else "")
            paired.append(replace(case, mask=mask, split=(row.split if row else None) or case.split))
        except RefusedError as error:
            refusals.append((case.names, error, case.sample_id))
    used = {case.mask.name for case in paired if case.mask} & found.segmentations.keys()
    if fractional := sum(found.segmentations[name][1].fractional for name in used):
        logger.warning("%d segmentations have fractions: a voxel counts above half of the maximum", fractional)
    paired, incomplete = _split_incomplete(paired, found, spatial_dims)
    refusals += incomplete
    refusals += _unused(finder, found, rows or {}, cases, gone)
    return paired, refusals


def _unused(
    finder: _Finder, found: Found, rows: Mapping[str, LabelRow], cases: Sequence[Case], gone: Collection[str]
) -> Iterator[Refused]:
    """Refuse the segmentations that no case has asked for, unless a table names other label files for their series."""
    chosen = {name for case in cases if (row := rows.get(case.sample_id)) and row.mask for name in case.names}
    for name in sorted(found.segmentations.keys() - finder.seen):
        series = finder.referred(name)
        if series and series <= chosen:
            continue
        detail = "no image of the export uses this segmentation; add its series, or leave it out"
        if not series.isdisjoint(gone):
            detail = "the images that it refers to were refused; see the reason there"
        yield (name,), RefusedError("mask_unused", detail), ""


def _split_incomplete(cases: Sequence[Case], found: Found, spatial_dims: int) -> tuple[list[Case], list[Refused]]:
    """Refuse cases whose segmentation refers to more than them (other slices, or another series), if some of that is
    not among the cases: a copy of the segmentation would name images that are not released."""
    kept: list[Case] = []
    refusals: list[Refused] = []
    for unit in formats.units(cases):
        try:
            if unit[0].mask and unit[0].mask.name in found.segmentations:
                path, header = found.segmentations[unit[0].mask.name]
                if spatial_dims == 2 or len(header.series) > 1:
                    _check_complete(unit, found, path, header, spatial_dims)
            kept += unit
        except RefusedError as error:
            refusals += [(case.names, error, case.sample_id) for case in unit]
    return kept, refusals


def _check_complete(unit: Sequence[Case], found: Found, path: Path, header: SegHeader, spatial_dims: int) -> None:
    """Raise RefusedError unless all images that a segmentation refers to are in the unit."""
    missing = len(header.instances - found.instances.keys())
    if missing:
        raise dicom.missing_slices(missing, len(header.instances))
    names = {name for case in unit for name in case.names}
    if spatial_dims == 3:  # all slices of a series are in one case
        names |= {uid for uid, series in found.instances.items() if series in names}
    if header.instances - names:
        raise shared_mask(unit[0])
    try:
        worker.call(dicom.check_frames, path, [file for case in unit for file in case.files])
    except RefusedError:
        if any(series in header.series and uid not in names for uid, series in found.instances.items()):
            raise shared_mask(unit[0]) from None  # the frames may be of these slices
        raise


class _Finder:
    """Finds the label file of a case."""

    def __init__(self, voxels: VoxelLabels, classes: Sequence[str], found: Found) -> None:
        self._classes = classes
        self._told = "the labels" if voxels.names is None else DATASET_FILE
        self._found = found
        self._cases = {row.case for row in voxels.rows or ()}
        self.seen: set[str] = set()
        """Names of label files that a case has asked for."""
        numbers = {name: value for value, name in (voxels.names or {}).items()}
        self._values = (0, *(_number(name) if voxels.names is None else numbers.get(name, -1) for name in classes[1:]))
        self._referring_to: dict[str, set[str]] = defaultdict(set)
        for name, (_, header) in found.segmentations.items():
            for uid in header.instances | self.referred(name):
                self._referring_to[uid].add(name)

    def referred(self, name: str) -> set[str]:
        """UIDs of all series that a segmentation refers to; of an image that is not in the export, its instance UID."""
        header = self._found.segmentations[name][1]
        return header.series.keys() | {self._found.instances.get(uid, uid) for uid in header.instances}

    def find(self, case: Case, name: str) -> Mask:
        """The mask of a case, by name or (DICOM) because it refers to the case.

        Raises:
            RefusedError: When there is none that can be used, or more than one.
        """
        if name in self._cases:
            raise RefusedError(
                "mask_is_image", "the label file is named as an image too; name each image with its own label file"
            )
        name = name or self._referring(case)
        self.seen.add(name)
        if name in self._found.segmentations:
            path, header = self._found.segmentations[name]
            return Mask(path, name, self._segments(header))
        if name in self._found.files:
            return Mask(self._found.files[name], name, self._values)
        if error := self._found.broken.get(name):
            raise RefusedError(error.reason, f"its label file: {error.detail}")
        raise RefusedError("mask_missing", "the label file of this case is not in the export; add it")

    def _referring(self, case: Case) -> str:
        """Name of the SEG file that refers to a case, by its instance or its series (then all slices are labeled)."""
        names = set().union(*(self._referring_to.get(name, ()) for name in case.names))
        self.seen |= names
        if not names:
            reasons = tally(each.reason for each in self._found.broken.values())
            broken = f" (refused: {reasons})" if reasons else ""
            dicom_seg = f"no SEG file that can be used refers to this case{broken}; add one, or name its label file"
            nothing = dicom_seg if case.format == "dicom" else "no label file is named for this case; name it"
            raise RefusedError("no_label", f"{nothing} in a table case,mask")
        if len(names) > 1:
            raise RefusedError(
                "several_masks", f"{len(names)} segmentations refer to this series; choose one in a table case,mask"
            )
        return next(iter(names))

    def _segments(self, header: SegHeader) -> tuple[int, ...]:
        """Segment number of each class, see ``Mask.values``."""
        numbers = {name: number for number, name in reversed(header.segments)}
        unknown = numbers.keys() - set(self._classes)
        if unknown:
            raise RefusedError(
                "unknown_label_value",
                f"{len(unknown)} of {len(numbers)} segment labels are no classes of {self._told} "
                f"({', '.join(self._classes[1:])}); add them there, or correct the SegmentLabel",
            )
        return (0, *(numbers.get(name, -1) for name in self._classes[1:]))


def _number(name: str) -> int:
    """Voxel value of a class that is called by its number; -1 for any other class, which only SEG files have."""
    return int(name) if name.isascii() and name.isdigit() else -1
