# SPDX-License-Identifier: Apache-2.0
"""Voxel labels of an export: which label file belongs to which image, and what its values mean.

Three things tell, and may be combined: a ``dataset.json`` of the Medical Segmentation Decathlon names pairs and
classes; a label table ``case,mask[,split]`` names pairs and splits; DICOM SEG files name the series that they belong
to. Where a table is there, it has the last word on which cases count and on their splits.

Classes are known by name: values of NIfTI files by that of ``dataset.json`` (by the number itself where there is
none), segments of SEG files by their SegmentLabel. Class 0 is the background.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from monai_salm.io import dicom, formats, masks, worker
from monai_salm.io.base import Case, Mask, RefusedError
from monai_salm.io.dicom import SegHeader
from monai_salm.release.decathlon import DATASET_FILE, Names, read_pairs
from monai_salm.release.gates import Refused, summary, tally, uids_of
from monai_salm.release.table import LabelRow, match, natural, where

logger = logging.getLogger(__name__)

BACKGROUND = "background"
MAX_CLASSES = 255
"""Class indices are bytes, and 255 stands for voxels that have no part in the loss."""
MAX_UNNAMED = 32
"""Without ``dataset.json`` a label file with more distinct values names no classes: it may be an image."""


def other_classes(names: Iterable[str]) -> str:
    """What is said of labels that name classes which an earlier release does not have."""
    return (
        f"the labels name classes that the earlier release does not have ({', '.join(sorted(names, key=natural))}); "
        "name them as it does, or protect these cases in a release of their own"
    )


def shared_mask(case: Case, cause: str = "") -> RefusedError:
    """The refusal of a case whose label file is also that of one that is not released; ``cause``: why, if known."""
    because = f" ({cause})" if cause else ""
    dicom_seg = f"refers to images that are not released{because}, and a copy would name them"
    others = dicom_seg if case.format == "dicom" else f"also labels an image that is not released{because}"
    detail = f"the label file {others}; release all of them, or give each its own label file"
    return RefusedError("mask_shared_with_unreleased", detail)


@dataclass(frozen=True)
class VoxelLabels:
    """What an export says about its voxel labels before an image is read.

    Args:
        root: the export, a folder.
        rows: what is said of each case; None where only SEG files tell.
        names: class of each voxel value, from ``dataset.json``; None without.
        left_out: label files that ``dataset.json`` names for images that the table leaves out.
    """

    root: Path
    rows: tuple[LabelRow, ...] | None
    names: Names | None
    left_out: frozenset[str] = frozenset()

    @property
    def mask_names(self) -> frozenset[str]:
        """Names of the label files, which are no cases."""
        rows = self.rows or ()
        return self.left_out | {row.mask for row in rows if row.mask} - {row.case for row in rows}


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


def find_voxel_labels(dataset_dir: Path, rows: Sequence[LabelRow] | None) -> VoxelLabels | None:
    """What tells the voxel labels of an export, or None where it has none.

    Args:
        dataset_dir: the export.
        rows: the label table, if there is one.

    Raises:
        ValueError: When ``dataset.json`` is broken, or contradicts the table.
    """
    if rows is not None and all(row.mask is None for row in rows):
        return None
    root = dataset_dir.absolute()
    path = root / DATASET_FILE
    if path.is_file():
        names, pairs, unlabeled = read_pairs(path)
        if not pairs and rows is None:
            raise ValueError(
                f"{DATASET_FILE} lists no pair of image and label under 'training'; list them there, or in a table "
                "case,mask"
            )
        merged = tuple(_merge(rows, pairs)) if rows is not None else tuple(pairs)
        left_out = unlabeled | {pair.mask for pair in pairs if pair.mask} - {row.mask for row in merged}
        return VoxelLabels(root, merged, names, frozenset(left_out - {row.case for row in merged}))
    if rows is not None:
        return VoxelLabels(root, tuple(rows), None)
    if root.is_dir() and _segmentations(root):
        return VoxelLabels(root, None, None)
    return None


def _merge(rows: Sequence[LabelRow], pairs: Sequence[LabelRow]) -> Iterator[LabelRow]:
    """The table's rows, with the masks that ``dataset.json`` names where the table leaves them out."""
    known = {pair.case: pair for pair in pairs}
    conflicts = []
    for row in rows:
        pair = known.get(row.case)
        if pair and row.mask and row.mask != pair.mask:
            conflicts.append(row)
        yield replace(row, mask=row.mask or pair.mask, split=row.split or pair.split) if pair else row
    if conflicts:
        raise ValueError(f"{where(conflicts)}: the mask is another than in {DATASET_FILE}; correct one of them")


def _segmentations(root: Path) -> list[Path]:
    """SEG files below a folder that refer to an image there; what a file is, its file meta tells."""
    found = {path: _identity(path) for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink()}
    referred = {path: _referred(path) for path, (kind, _) in found.items() if kind in dicom.SEG_CLASSES}
    known = {instance for _, instance in found.values()}
    if not all(names & known for names in referred.values()):  # they may name a series, which takes longer to know
        images = [path for path, (kind, _) in found.items() if kind and path not in referred]
        known.update(*(filter(None, uids_of(path)) for path in images))
    return [path for path, names in referred.items() if names & known]


def _identity(path: Path) -> tuple[str, str]:
    try:
        return worker.call(dicom.identify, path)
    except RefusedError:
        return "", ""  # told by the scan


def _referred(path: Path) -> frozenset[str]:
    try:
        header = worker.call(dicom.read_seg_header, path)
        return header.instances or frozenset(header.series)
    except RefusedError:
        return frozenset()  # told by the scan


# ------------------------------------------------------------------- classes


def class_names(voxels: VoxelLabels, earlier: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of all classes that label files of the export may hold, the background first.

    Without ``dataset.json`` every label file is read for that (once: its values are remembered). Broken ones add none,
    nor do those with more than 32 values.

    Args:
        voxels: what is said about the labels.
        earlier: classes of an earlier release, which are then returned; the export may lack some, number and order
            them otherwise, and call the background something else.

    Raises:
        ValueError: When no label file is there, there are no classes besides the background, or more than 255, or one
            of them is none of the earlier ones.
    """
    broken: list[RefusedError] = []
    if voxels.names is not None:
        names = list(voxels.names.values())
    else:
        files = _label_files(voxels)
        if voxels.mask_names and not files:
            raise ValueError(
                f"none of the {len(voxels.mask_names)} label files that {_tables(voxels)} names is there; write their "
                "names relative to the export, and no links"
            )
        found = {name for path in files for name in _names_in(path, broken)}
        names = [BACKGROUND, *sorted(found - {BACKGROUND}, key=natural)]
    if not (1 if earlier else 2) <= len(names) <= MAX_CLASSES:
        raise ValueError(
            f"the label files name {len(names) - 1} classes besides the background; there must be 1 to "
            f"{MAX_CLASSES - 1}. Check that the masks are label files and not empty; values of label files with more "
            f"than {MAX_UNNAMED} must be named in a {DATASET_FILE}"
            + (f". Refused: {summary(broken)}" if broken else "")
        )
    if earlier and set(names[1:]) - set(earlier[1:]):
        raise ValueError(other_classes(set(names[1:]) - set(earlier[1:])))
    return tuple(earlier or names)


def _label_files(voxels: VoxelLabels) -> list[Path]:
    """Label files that are there, and with them all SEG files unless every row names its mask."""
    named = [voxels.root / name for name in sorted(voxels.mask_names) if not name.startswith(("..", "/"))]
    searched = voxels.rows is None or any(not row.mask for row in voxels.rows)
    present = [path for path in named if path.is_file() and not path.is_symlink()]
    return present + (_segmentations(voxels.root) if searched else [])


def _names_in(path: Path, broken: list[RefusedError]) -> list[str]:
    try:
        if worker.call(dicom.is_segmentation, path):
            return [name for _, name in worker.call(dicom.read_seg_header, path).segments]
        values = masks.label_values(path)
        return [str(value) for value in values if value > 0] if len(values) <= MAX_UNNAMED else []
    except RefusedError as error:
        broken.append(error)  # told when the case is read, if there are other classes
    except OSError as error:
        broken.append(RefusedError("unreadable_file", f"the file cannot be opened ({error.strerror})"))
    return []


# ------------------------------------------------------------------- pairing


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
                raise RefusedError("no_label", f"{_tables(voxels)} names no label for this case; add one")
            mask = finder.find(case, row.mask if row else "")
            paired.append(replace(case, mask=mask, split=row.split or case.split if row else case.split))
        except RefusedError as error:
            refusals.append((case.names, error, case.sample_id))
    used = {case.mask.name for case in paired if case.mask} & found.segmentations.keys()
    fractional = sum(found.segmentations[name][1].fractional for name in used)
    if fractional:
        logger.warning("%d segmentations have fractions: a voxel counts above half of the maximum", fractional)
    paired, incomplete = _split_incomplete(paired, found, spatial_dims)
    refusals += incomplete
    chosen = {name for case in cases if (row := (rows or {}).get(case.sample_id)) and row.mask for name in case.names}
    for name in sorted(found.segmentations.keys() - finder.seen):
        if (series := finder.referred(name)) and series <= chosen:
            continue  # the table names other label files for all of its series
        detail = "no image of the export uses this segmentation; add its series, or leave it out"
        if series & gone:
            detail = "the images that it refers to were refused; see the reason there"
        refusals.append(((name,), RefusedError("mask_unused", detail), ""))
    return paired, refusals


def _split_incomplete(cases: Sequence[Case], found: Found, spatial_dims: int) -> tuple[list[Case], list[Refused]]:
    """Take out cases that are parts of what their segmentation refers to, slices or one of several series, if some of
    that is not there, or not among the cases."""
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


def _tables(voxels: VoxelLabels) -> str:
    return "the label table" if voxels.rows and not voxels.rows[0].source.endswith(DATASET_FILE) else DATASET_FILE


class _Finder:
    """Finds the label file of a case."""

    def __init__(self, voxels: VoxelLabels, classes: Sequence[str], found: Found) -> None:
        self._classes = classes
        self._told = "the labels" if voxels.names is None else DATASET_FILE
        self._found = found
        self._cases = {row.case for row in voxels.rows or ()}
        self.seen: set[str] = set()
        """Names of label files that a case has asked for."""
        named = None if voxels.names is None else {name: value for value, name in voxels.names.items()}
        self._values = (0, *(_number(name) if named is None else named.get(name, -1) for name in classes[1:]))
        self._referring_to: dict[str, set[str]] = defaultdict(set)
        for name, (_, header) in found.segmentations.items():
            for uid in header.instances | self.referred(name):
                self._referring_to[uid].add(name)

    def referred(self, name: str) -> set[str]:
        """UIDs of all series that a segmentation refers to; of an image that is not there, its own."""
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
        """The SEG file that refers to the series (all its slices are then labeled) or the instance of a case."""
        names = set().union(*(self._referring_to.get(name, ()) for name in case.names))
        self.seen |= names
        if not names:
            broken = (
                f" (refused: {told})" if (told := tally(each.reason for each in self._found.broken.values())) else ""
            )
            dicom_seg = f"no SEG file that can be used refers to this case{broken}; add one, or name its label file"
            nothing = dicom_seg if case.format == "dicom" else "no label file is named for this case; name it"
            raise RefusedError("no_label", f"{nothing} in a table case,mask")
        if len(names) > 1:
            raise RefusedError(
                "several_masks", f"{len(names)} segmentations refer to this series; choose one in a table case,mask"
            )
        return next(iter(names))

    def _segments(self, header: SegHeader) -> tuple[int, ...]:
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
    return int(name) if name.isascii() and name.isdigit() else -1
