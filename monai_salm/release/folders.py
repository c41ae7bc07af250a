# SPDX-License-Identifier: Apache-2.0
"""Folders of PNG and TIFF images: classes by folder, and whether an export is one of grayscale or of RGB images.

Class folders are ``benign/a.png``, or ``train/benign/a.png`` where folders name the splits, in any of the usual words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from monai_salm.io import nifti, raster, worker
from monai_salm.io.base import Case, RefusedError
from monai_salm.release.table import LabelRow

SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Split by the name of a folder, in lower case."""
_LIKE_A_SPLIT = re.compile(
    r"(?<![a-z])(train|training|val|valid|validation|test|testing|eval|evaluation|holdout|fold|split)(?![a-z])"
)
OTHER_CHANNELS = RefusedError(
    "other_channels", "a network takes either grayscale or RGB images, and most of this export are of the other kind"
)


def class_folders(dataset_dir: Path) -> list[LabelRow] | None:
    """Labels by folder, one row per image; None unless all images are PNG and TIFF, in two or more class folders.

    Args:
        dataset_dir: the export.

    Raises:
        ValueError: When the folder of a split holds images outside of class folders; or when a folder is named like a
            split, but not as one that is known (``test_set``), and has folders in it or splits beside it: taken for a
            class, it would release images that are meant to test on.
    """
    rows: list[LabelRow] = []
    for path, head in _heads(dataset_dir):
        if _is_other(head):
            return None
        if not raster.sniff(head):
            continue
        *folders, _ = path.relative_to(dataset_dir).parts
        split = SPLIT_FOLDERS.get(folders[0].lower()) if len(folders) > 1 else None
        folders = folders[1:] if split else folders
        if not folders:
            return None
        name = path.relative_to(dataset_dir).as_posix()
        rows.append(LabelRow(len(rows) + 1, name, folders[0], split, source="the class folders"))
    _refuse_splits_taken_for_classes(rows)
    return rows if len({row.label for row in rows}) > 1 else None


def _refuse_splits_taken_for_classes(rows: Sequence[LabelRow]) -> None:
    """Raise where what was taken for a class may be a split, see :py:func:`class_folders`."""
    if any(row.label.lower() in SPLIT_FOLDERS for row in rows):
        raise ValueError(
            "the folder of a split holds images that lie in no class folder, so nothing tells their class; move them "
            "into class folders, or write a label table"
        )
    splits = any(row.split for row in rows)
    first = [row.case.split("/")[0] for row in rows if row.split is None and (splits or row.case.count("/") > 1)]
    if any(_LIKE_A_SPLIT.search(name.lower()) for name in first):
        raise ValueError(
            "a folder is named like a split, but not as one that is known; call splits train, val and test, with class "
            "folders in them, or write a label table"
        )


def count_channels(dataset_dir: Path | str) -> int:
    """3 where most of the images of an export are RGB, else 1.

    It sizes a network before the scan, which refuses the images of the other kind.
    """
    rgb = others = 0
    for path, head in _heads(Path(dataset_dir)):
        if raster.sniff(head):
            with suppress(RefusedError, OSError):  # the scan reports it
                found = worker.call(raster.count_colors, path, 2)
                rgb, others = rgb + (found == 3), others + (found == 1)
        else:
            others += _is_other(head)
    return 3 if rgb > others else 1


def other_channels(root: Path, cases: Sequence[Case], colors: Mapping[Path, int]) -> list[Case]:
    """Cases that a network for most images of an export cannot take.

    Args:
        root: the export.
        cases: of the export.
        colors: 1 or 3 for each PNG and TIFF image.
    """
    wanted = count_channels(root) if 3 in colors.values() else 1
    return [case for case in cases if colors.get(case.files[0], 1) != wanted]


def _heads(dataset_dir: Path) -> Iterator[tuple[Path, bytes]]:
    """Every regular file of a folder that can be read, and how it starts."""
    for path in sorted(dataset_dir.rglob("*")) if dataset_dir.is_dir() else ():
        if path.is_file() and not path.is_symlink():
            with suppress(OSError):  # the catalog refuses it
                yield path, nifti.read_head(path)


def _is_other(head: bytes) -> bool:
    return head[128:132] == b"DICM" or nifti.sniff(head)
