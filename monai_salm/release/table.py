# SPDX-License-Identifier: Apache-2.0
"""The label table, CSV ``case,label[,split]`` or ``case,mask[,split]``. Errors name lines and never their content."""

from __future__ import annotations

import csv
import io
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from monai_salm.io.base import SPLITS, Case

LABELS_FILE = "labels.csv"


@dataclass(frozen=True)
class LabelRow:
    """What is said of one case.

    Args:
        line: number of the line in the table, or of the entry in a list of ``dataset.json``, from 1.
        case: path relative to the export (file or series folder) or UID.
        label: the class; empty where each voxel has its own.
        split: None where none is given.
        mask: path of the label file relative to the export; empty where it is found without (see ``voxels``); None
            where the case is labeled as a whole.
        source: where the row comes from, for messages.
    """

    line: int
    case: str
    label: str
    split: str | None = None
    mask: str | None = None
    source: str = "the label table"


def read_labels(table: Path) -> list[LabelRow]:
    """Rows of a CSV file (UTF-8, a byte order mark is fine) with the header ``case,label[,split]`` or
    ``case,mask[,split]``.

    Raises:
        ValueError: When the file is missing or a line is not as described; the text names lines, never their content.
    """
    try:
        text = table.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"label table {table} cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"label table {table} is not UTF-8; save it as 'CSV UTF-8'") from error
    rows = _parse(text)
    refuse_conflicts(rows, lambda row: [row.case])
    return rows


def match(rows: Sequence[LabelRow], cases: Iterable[Case], refused: Iterable[str]) -> dict[str, LabelRow]:
    """Row of each case by sample id; a row that names a folder or a series may have several cases.

    Args:
        rows: the table.
        cases: the cases of the export.
        refused: names of what the export holds besides; rows may name it without effect.

    Raises:
        ValueError: When a row names nothing in the export, or rows contradict each other.
    """
    ids: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        for name in case.names:
            ids[composed(name)].append(case.sample_id)
    known = ids.keys() | set(map(composed, refused))
    unknown = [row for row in rows if composed(row.case) not in known]
    if unknown:
        raise ValueError(
            f"nothing in the export has the names in {where(unknown)}; write a path relative to the export (a file, or "
            "a folder that holds one series) or a UID, or remove the line"
        )
    refuse_conflicts(rows, lambda row: ids.get(composed(row.case), []))
    return {sample_id: row for row in rows for sample_id in ids.get(composed(row.case), ())}


def refuse_conflicts(rows: Iterable[LabelRow], keys_of: Callable[[LabelRow], list[str]]) -> None:
    """Make sure that rows of the same case agree.

    Args:
        rows: of the table.
        keys_of: which cases a row is of.

    Raises:
        ValueError: When rows of one case differ; the text has their lines.
    """
    first: dict[str, LabelRow] = {}
    bad: list[LabelRow] = []
    for row in rows:
        for key in keys_of(row):
            seen = first.setdefault(key, row)
            if (seen.label, seen.split, seen.mask) != (row.label, row.split, row.mask):
                bad += [seen, row]
    if bad:
        raise ValueError(f"one case has different labels or splits: {where(bad)}; keep one of them")


def where(rows: Sequence[LabelRow]) -> str:
    """The lines of some rows, for messages: ``"lines 3, 4 of the label table"``."""
    return f"{_lines([row.line for row in rows])} of {rows[0].source}"


def plain(name: str) -> str:
    """A relative path in the form of the names of cases."""
    return posixpath.normpath(name.replace("\\", "/"))


def composed(name: str) -> str:
    """A name in the form in which names are compared (NFC): macOS decomposes accents, tables mostly do not."""
    return unicodedata.normalize("NFC", name)


def natural(label: str) -> tuple[bool, int, str]:
    """Sorting key of class names: numbers by value and before words."""
    number = label.isascii() and label.isdigit()
    return (not number, int(label) if number else 0, label)


def alike(labels: Iterable[str]) -> str:
    """A warning of labels that differ only in capital letters, or as the same number is written; empty if none do.

    Example:
        >>> alike(["Ill", "ill", "1", "1.0", "2"])
        'names of classes differ ... count as different: Ill, ill, 1, 1.0'
    """
    groups: dict[str | Decimal, list[str]] = defaultdict(list)
    for label in labels:
        try:
            number = Decimal(label)
        except InvalidOperation:
            number = Decimal("NaN")
        groups[number if number.is_finite() else label.casefold()].append(label)
    names = ", ".join(label for group in groups.values() if len(group) > 1 for label in group)
    told = "names of classes differ in capital letters or in the form of a number alone, and count as different"
    return names and f"{told}: {names}"


def _parse(text: str) -> list[LabelRow]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[LabelRow] = []
    bad: dict[str, list[int]] = defaultdict(list)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        if header[:1] != ["case"] or header[1:2] not in (["label"], ["mask"]) or header[2:] not in ([], ["split"]):
            raise ValueError(
                "line 1 of the label table must be 'case,label' or 'case,label,split' (for voxel labels: mask instead "
                "of label), separated by commas"
            )
        masks = header[1] == "mask"
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            values = [cell.strip() for cell in cells]
            if problem := _problem(values, len(header), masks):
                bad[problem].append(reader.line_num)
            else:
                rows.append(_row(reader.line_num, values, masks))
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} of the label table is not CSV ({error})") from error
    if bad:
        problems = "; ".join(f"{problem}: {_lines(lines)}" for problem, lines in bad.items())
        raise ValueError(f"{problems} of the label table")
    if not rows:
        raise ValueError("the label table has no rows; add one for every case")
    return rows


def _row(line: int, values: Sequence[str], masks: bool) -> LabelRow:
    case, label, *split = values
    if not masks:
        return LabelRow(line, plain(case), label, *split)
    return LabelRow(line, plain(case), "", *(split or [None]), mask=plain(label) if label else "")


def _problem(values: Sequence[str], columns: int, masks: bool) -> str:
    """What is wrong with a line; empty if nothing is."""
    if len(values) != columns:
        return f"there must be {columns} columns (quote a comma inside a name)"
    if not values[0]:
        return "the case is empty"
    if not values[1] and not masks:
        return "the label is empty"
    if columns == 3 and values[2] not in SPLITS:
        return "the split must be train, val or test"
    return ""


def _lines(numbers: Sequence[int]) -> str:
    listed = sorted(set(numbers))
    shown = ", ".join(map(str, listed[:10]))
    more = f" and {len(listed) - 10} more" if len(listed) > 10 else ""
    return f"line{'s' if len(listed) > 1 else ''} {shown}{more}"
