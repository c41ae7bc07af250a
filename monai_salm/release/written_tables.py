# SPDX-License-Identifier: Apache-2.0
"""The tables that are shared with the protected files, so that these are a labeled data set in their turn."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from monai_salm.io.base import Case
from monai_salm.release.decathlon import DATASET_FILE, LISTS, read_dataset
from monai_salm.release.identity import mask_id, owner_id
from monai_salm.release.labels import Cohort
from monai_salm.release.manifest import ManifestRow
from monai_salm.release.table import plain

_PAIR = ("image", "label")
_KEPT = (*LISTS, "labels", "modality", "channel_names")
"""Lists and objects that a ``dataset.json`` keeps when files get new names; others may hold names of the export."""
Written = Mapping[str, Sequence[ManifestRow]]
"""Rows of the manifest by ``sample_id``."""


def labels_table(cases: Sequence[Case], written: Written, cohort: Cohort) -> str:
    """``labels.csv``: labels of cases under their new names; empty for archives, which carry their own.

    Sorted by these names, so that the order tells nothing.

    Args:
        cases: what was written.
        written: the files of each case and of each label file.
        cohort: what the labels mean.
    """
    rows = []
    labeled = {owner_id(case): case for case in cases if case.format != "npz"}
    for owner, case in labeled.items():
        files = written[owner]
        folders = {PurePosixPath(row.file).parent for row in files}
        name = folders.pop().as_posix() if len(files) > 1 and len(folders) == 1 else files[0].file
        label = written[mask_id(case.mask)][0].file if case.mask else cohort.classes[case.label]
        rows.append([name, label, case.split])
    text = io.StringIO()
    header = ["case", "mask" if cohort.voxelwise else "label", "split"]
    csv.writer(text, lineterminator="\n").writerows([header, *sorted(rows)])
    return text.getvalue() if rows else ""


def dataset_json(cases: Sequence[Case], root: Path, files: Mapping[str, str]) -> str:
    """``dataset.json`` of the export, with the pairs that were written and no others; empty if the export has none.

    Args:
        cases: what was written.
        root: the export.
        files: name of each file in the copy, by its name in the export.
    """
    path = root / DATASET_FILE
    if not path.is_file():
        return ""
    names = {name for case in cases for name in case.names}
    is_renamed = any(files.get(name, name) != name for name in names)
    content = read_dataset(path)
    for key in LISTS:
        if key in content:
            entries = content[key] if key != "test" and isinstance(content[key], list) else []
            kept = [entry for entry in entries if isinstance(entry, dict) and plain(entry["image"]) in names]
            pairs = [_renamed(entry, files) for entry in kept]
            if is_renamed:  # other keys may hold names of the export, and the order would tell theirs
                pairs = [{part: pair[part] for part in _PAIR if part in pair} for pair in pairs]
                pairs.sort(key=lambda pair: pair["image"])
            content[key] = pairs
    if is_renamed:
        content = {key: value for key, value in content.items() if key in _KEPT or not isinstance(value, list | dict)}
    for key, count in (("numTraining", len(content.get("training", cases))), ("numTest", 0)):
        if key in content:
            content[key] = count
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _renamed(entry: dict[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    """A pair with the names of the copy; a name that is the same stays as it was written."""
    new = {key: files.get(plain(entry[key])) for key in _PAIR if isinstance(entry.get(key), str)}
    return entry | {key: f"./{name}" for key, name in new.items() if name and name != plain(entry[key])}
