# SPDX-License-Identifier: Apache-2.0
"""Voxel labels of an export, as far as they are known before an image is read: what names label files and classes.

Three things tell, and may be combined: a ``dataset.json`` of the Medical Segmentation Decathlon names pairs and
classes; a label table ``case,mask[,split]`` names pairs and splits; DICOM SEG files name the series that they belong
to. Where a table is there, it has the last word on which cases count and on their splits.

Classes are known by name: values of NIfTI files by that of ``dataset.json`` (by the number itself where there is
none), segments of SEG files by their SegmentLabel. Class 0 is the background.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from monai_salm.io import dicom, masks, worker
from monai_salm.io.base import RefusedError
from monai_salm.release.decathlon import DATASET_FILE, Names, read_pairs
from monai_salm.release.gates import summary, uids_of
from monai_salm.release.table import LabelRow, natural, where

BACKGROUND = "background"
MAX_CLASSES = 255
"""Class indices are bytes, and 255 stands for voxels that have no part in the loss."""
MAX_UNNAMED = 32
"""Without ``dataset.json`` a label file with more distinct values names no classes: it may be an image."""


def other_classes(names: Iterable[str]) -> str:
    """The message on labels that name classes which an earlier release does not have."""
    return (
        f"the labels name classes that the earlier release does not have ({', '.join(sorted(names, key=natural))}); "
        "name them as it does, or protect these cases in a release of their own"
    )


@dataclass(frozen=True)
class VoxelLabels:
    """What an export says about its voxel labels before an image is read.

    Args:
        root: the export, a folder.
        rows: label file and split of each case; None where only SEG files tell.
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

    @property
    def told_by(self) -> str:
        """What names the label files, for messages."""
        is_table = self.rows and not self.rows[0].source.endswith(DATASET_FILE)
        return "the label table" if is_table else DATASET_FILE


def find_voxel_labels(dataset_dir: Path, rows: Sequence[LabelRow] | None) -> VoxelLabels | None:
    """What an export says about voxel labels, or None where it has none.

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
    """The table's rows; ``dataset.json`` fills in the masks and splits that these leave out."""
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
    """SEG files below a folder that refer to an image there; files are known by their file meta information."""
    found = {path: _identity(path) for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink()}
    referred = {path: _referred(path) for path, (kind, _) in found.items() if kind in dicom.SEG_CLASSES}
    known = {instance for _, instance in found.values()}
    if not all(names & known for names in referred.values()):  # some may refer to a series: more of each file is read
        images = [path for path, (kind, _) in found.items() if kind and path not in referred]
        known.update(*(filter(None, uids_of(path)) for path in images))
    return [path for path, names in referred.items() if names & known]


def _identity(path: Path) -> tuple[str, str]:
    try:
        return worker.call(dicom.identify, path)
    except RefusedError:
        return "", ""  # the scan reports it


def _referred(path: Path) -> frozenset[str]:
    try:
        header = worker.call(dicom.read_seg_header, path)
        return header.instances or frozenset(header.series)
    except RefusedError:
        return frozenset()  # the scan reports it


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
            of them is not among the earlier ones.
    """
    broken: list[RefusedError] = []
    if voxels.names is not None:
        names = list(voxels.names.values())
    else:
        files = _label_files(voxels)
        if voxels.mask_names and not files:
            raise ValueError(
                f"none of the {len(voxels.mask_names)} label files that {voxels.told_by} names is there; write their "
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
    """The named label files that are there, and all SEG files unless every row names its mask."""
    named = [voxels.root / name for name in sorted(voxels.mask_names) if not name.startswith(("..", "/"))]
    present = [path for path in named if path.is_file() and not path.is_symlink()]
    if voxels.rows is None or any(not row.mask for row in voxels.rows):
        present += _segmentations(voxels.root)
    return present


def _names_in(path: Path, broken: list[RefusedError]) -> list[str]:
    try:
        if worker.call(dicom.is_segmentation, path):
            return [name for _, name in worker.call(dicom.read_seg_header, path).segments]
        values = masks.label_values(path)
        return [str(value) for value in values if value > 0] if len(values) <= MAX_UNNAMED else []
    except RefusedError as error:
        broken.append(error)  # reported with its case, if there are other classes
    except OSError as error:
        broken.append(RefusedError("unreadable_file", f"the file cannot be opened ({error.strerror})"))
    return []
