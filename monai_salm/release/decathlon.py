# SPDX-License-Identifier: Apache-2.0
"""The ``dataset.json`` of the Medical Segmentation Decathlon: classes, and pairs of image and label."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai_salm.io.worker import isolated
from monai_salm.release.table import LabelRow, plain, where

DATASET_FILE = "dataset.json"
LISTS = {"training": None, "validation": "val", "test": "test"}
"""Lists of cases in ``dataset.json``, and the split that each means (None: any that is released)."""

Names = Mapping[int, str]
"""Name of the class of each voxel value."""


@isolated
def read_dataset(path: Path) -> dict[str, Any]:
    """Content of a ``dataset.json``.

    Raises:
        ValueError: When it is not JSON, or no object.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{DATASET_FILE} of the export cannot be read ({type(error).__name__}); repair it") from None
    if not isinstance(content, dict):
        raise ValueError(f"{DATASET_FILE} of the export must be an object with 'labels' and 'training'")
    return content


def read_pairs(path: Path) -> tuple[Names, list[LabelRow], set[str]]:
    """Read a ``dataset.json``.

    Returns:
        Names of the classes; the pairs, of which nnU-Net lists none; and the test images without a label, which are no
        cases.

    Raises:
        ValueError: When something of it is broken.
    """
    content = read_dataset(path)
    names = _read_names(content.get("labels"))
    rows: list[LabelRow] = []
    bad: list[int] = []
    unlabeled: set[str] = set()
    for key, split in LISTS.items():
        entries = content.get(key) or []
        if not isinstance(entries, list):
            raise ValueError(f"{key!r} in {DATASET_FILE} must be a list of pairs of image and label")
        for number, entry in enumerate(entries, 1):
            pair = (entry.get("image"), entry.get("label")) if isinstance(entry, dict) else (entry, None)
            if all(isinstance(name, str) and name for name in pair):
                source = f"{key!r} in {DATASET_FILE}"
                rows.append(LabelRow(number, plain(pair[0]), "", split, plain(pair[1]), source))
            elif not isinstance(pair[0], str) or pair[1] is not None:
                bad.append(number)
            elif split == "test":
                unlabeled.add(plain(pair[0]))
    if bad:
        raise ValueError(f"entry {bad[0]} of {DATASET_FILE} is no pair {{'image': path, 'label': path}}; correct it")
    twice = [row for row in rows if row.case in unlabeled]
    if twice:
        raise ValueError(f"{where(twice)}: the image is listed under 'test' too; keep one of them")
    return names, rows, unlabeled


def _read_names(labels: Any) -> dict[int, str]:
    """Name of each voxel value, from either form in use: ``{"0": "background", ...}`` or ``{"background": 0, ...}``."""
    if not isinstance(labels, dict) or not labels:
        raise ValueError(f"{DATASET_FILE} needs 'labels', such as {{'0': 'background', '1': 'tumor'}}")
    pairs = list(labels.items())
    if not all(_is_number(key) for key, _ in pairs):
        pairs = [(value, key) for key, value in pairs]
    if not all(_is_number(value) and isinstance(name, str) and name.strip() for value, name in pairs):
        raise ValueError(f"'labels' in {DATASET_FILE} must map numbers to names or names to single numbers")
    names = {int(value): name.strip() for value, name in sorted(pairs, key=lambda pair: int(pair[0]))}
    if 0 not in names or min(names) < 0:
        raise ValueError(f"'labels' in {DATASET_FILE} must give 0 to the background, and other classes numbers above 0")
    if "ignore" in map(str.casefold, names.values()):
        raise ValueError(
            f"'labels' in {DATASET_FILE} has voxels to ignore ('ignore'), and every voxel must have a class here; give "
            "them one in the label files, and take 'ignore' out"
        )
    if len(set(names.values())) < len(pairs):
        raise ValueError(f"'labels' in {DATASET_FILE} gives one name or number twice; make them differ")
    return names


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().removeprefix("-").isdecimal()
    return isinstance(value, int) and not isinstance(value, bool)
