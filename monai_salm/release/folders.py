# SPDX-License-Identifier: Apache-2.0
"""Class folders of PNG and TIFF images: ``benign/a.png``, or ``train/benign/a.png`` where folders name the splits."""

from __future__ import annotations

from pathlib import Path

from monai_salm.io import raster
from monai_salm.release.table import SPLITS, LabelRow

SOURCE = "the class folders"


def class_folders(dataset_dir: Path) -> list[LabelRow] | None:
    """Labels by folder, one row per image; None unless every PNG and TIFF file is in one of two or more class folders.

    Args:
        dataset_dir: the export.
    """
    rows: list[LabelRow] = []
    for path in sorted(dataset_dir.rglob("*")) if dataset_dir.is_dir() else ():
        if path.is_symlink() or not path.is_file() or not _is_image(path):
            continue
        *folders, _ = path.relative_to(dataset_dir).parts
        split = folders.pop(0) if len(folders) > 1 and folders[0] in SPLITS else None
        if not folders:
            return None
        name = path.relative_to(dataset_dir).as_posix()
        rows.append(LabelRow(len(rows) + 1, name, folders[0], split, source=SOURCE))
    return rows if len({row.label for row in rows}) > 1 else None


def _is_image(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return raster.sniff(stream.read(132)) is not None
    except OSError:
        return False  # told by the scan
