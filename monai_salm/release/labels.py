# SPDX-License-Identifier: Apache-2.0
"""Labels and splits: from a table ``case,label[,split]``, or from the archive that brings its own."""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import posixpath
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from monai_salm.io import npz
from monai_salm.io.base import Case, Window
from monai_salm.release.catalog import Catalog, Refusal, scan

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
LABELS_FILE = "labels.csv"
HELD_OUT_FRACTION = 0.25
"""Part of each class that the study keeps from its victims when the table names no test cases."""


@dataclass(frozen=True)
class LabelRow:
    """One row of a label table: its line in the file, what it names, the class, and the split if the table has one."""

    line: int
    case: str
    label: str
    split: str | None = None


@dataclass(frozen=True)
class Cohort:
    """Labelled cases of an export.

    Args:
        cases: all of them, in the catalog's order, with class index and split.
        classes: names of the classes; ``case.label`` is a position in it.
        refusals: files and cases that are left out.
        root: the export.
        held_out_ids: cases the study tests on. They are the ``test`` cases where the table names some; otherwise a
            seeded part of the released cases (which are released nonetheless).
    """

    cases: tuple[Case, ...]
    classes: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    root: Path
    held_out_ids: frozenset[str] = field(default_factory=frozenset)

    @property
    def released(self) -> tuple[Case, ...]:
        """Cases that are fitted on, protected and written: all but split ``test``."""
        return tuple(case for case in self.cases if case.split != "test")

    @property
    def held_out(self) -> tuple[Case, ...]:
        """Cases the study tests its victims on, always on their clean files."""
        return tuple(case for case in self.cases if case.sample_id in self.held_out_ids)

    @property
    def train(self) -> tuple[Case, ...]:
        """Cases the study trains its victims on: released, not held out, not split ``val``."""
        return tuple(case for case in self.cases if case.split == "train" and case.sample_id not in self.held_out_ids)

    @property
    def val(self) -> tuple[Case, ...]:
        """Released cases for choices during the study; empty where the table names none."""
        return tuple(case for case in self.cases if case.split == "val" and case.sample_id not in self.held_out_ids)


def load_cohort(
    dataset_dir: Path | str,
    labels: Path | str | None = None,
    spatial_dims: int = 2,
    window: Window = "auto",
    seed: int = 0,
) -> Cohort:
    """Scan an export and label its cases.

    Args:
        dataset_dir: the export, a folder or one archive.
        labels: label table; default: ``labels.csv`` in the export, if there is one.
        spatial_dims: 2 or 3, see :py:func:`monai_salm.release.catalog.scan`.
        window: ``"auto"`` or (low, high) in physical units.
        seed: decides which cases are held out where the table does not.

    Raises:
        ValueError: When the export holds nothing usable, or the table does not fit it.
    """
    default = Path(dataset_dir) / LABELS_FILE
    table = Path(labels) if labels else default if default.is_file() else None
    rows = read_labels(table) if table else None  # before the scan: a typing error should not cost a scan
    window = window if isinstance(window, str) else (float(window[0]), float(window[1]))
    return label_cases(scan(dataset_dir, spatial_dims, window=window), rows, seed=seed)


def count_classes(dataset_dir: Path | str, labels: Path | str | None = None, spatial_dims: int = 2) -> int:
    """Number of classes that a table or archive names, without reading an image; sizes a network before the scan.

    Raises:
        ValueError: When the export does not exist, or there is neither a table nor an archive.
    """
    if not Path(dataset_dir).exists():
        raise ValueError(f"there is no export at {dataset_dir}; check dataset_dir")
    table = Path(labels) if labels else Path(dataset_dir) / LABELS_FILE
    if table.is_file():
        return len({row.label for row in read_labels(table)})
    archives = [Path(dataset_dir)] if Path(dataset_dir).is_file() else sorted(Path(dataset_dir).rglob("*.npz"))
    splits = [values for archive in archives for values in npz.labels(archive, spatial_dims).values()]
    found = {int(label) for values in splits for label in values}
    if not found:
        raise ValueError(f"no label table at {table} and no archive: name the table with labels=...")
    return len(found)


def read_labels(table: Path) -> list[LabelRow]:
    """Rows of a CSV file (UTF-8, a byte order mark is fine) with the header ``case,label`` or ``case,label,split``.

    ``case`` is a path relative to the export (file or series folder) or a UID.

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
    _refuse_conflicts(rows, lambda row: [row.case])
    return rows


def label_cases(catalog: Catalog, rows: Sequence[LabelRow] | None, *, seed: int = 0) -> Cohort:
    """Give every case its class and split; cases without a row are refused (``no_label``).

    A row may name a file, a folder or a UID; one that covers several cases labels them all. Where no row names a case
    of an archive, the archive's own label counts.

    Args:
        catalog: the scanned export.
        rows: the label table, or None when the archive brings labels.
        seed: decides which cases are held out where the table names no ``test`` cases.

    Raises:
        ValueError: When rows name nothing in the export or contradict each other, or fewer than two classes remain.
    """
    by_case = _match(catalog, rows or ())
    if rows is None and all(case.label < 0 for case in catalog.cases):
        raise ValueError(f"the export has no {LABELS_FILE}; write one with the columns case,label[,split]")
    named, refusals = [], list(catalog.refusals)
    for case in catalog.cases:
        row = by_case.get(case.sample_id)
        if row is not None:
            named.append((replace(case, split=row.split or case.split), row.label))
        elif case.label >= 0:
            named.append((case, str(case.label)))
        else:
            refusals.append(Refusal(case.sample_id, "no_label", "the label table has no row for this case; add one"))
    classes = tuple(sorted({label for _, label in named}, key=_natural))
    _check_classes(named, classes)
    cases = tuple(replace(case, label=classes.index(label)) for case, label in named)
    _warn_of_shared_patients(cases)
    return Cohort(cases, classes, tuple(refusals), catalog.root, _held_out(cases, seed))


def _parse(text: str) -> list[LabelRow]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[LabelRow] = []
    bad: dict[str, list[int]] = defaultdict(list)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        if header not in (["case", "label"], ["case", "label", "split"]):
            raise ValueError(
                "line 1 of the label table must be 'case,label' or 'case,label,split', separated by commas"
            )
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            values = [cell.strip() for cell in cells]
            problem = _problem(values, len(header))
            if problem:
                bad[problem].append(reader.line_num)
            else:
                rows.append(LabelRow(reader.line_num, _plain(values[0]), *values[1:]))
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} of the label table is not CSV ({error})") from error
    if bad:
        raise ValueError(
            "; ".join(f"{problem}: {_lines(lines)}" for problem, lines in bad.items()) + " of the label table"
        )
    if not rows:
        raise ValueError("the label table has no rows; add one for every case")
    return rows


def _problem(values: Sequence[str], columns: int) -> str:
    if len(values) != columns:
        return f"there must be {columns} columns (quote a comma inside a name)"
    if not values[0]:
        return "the case is empty"
    if not values[1]:
        return "the label is empty"
    if columns == 3 and values[2] not in SPLITS:
        return "the split must be train, val or test"
    return ""


def _refuse_conflicts(rows: Iterable[LabelRow], keys_of: Callable[[LabelRow], list[str]]) -> None:
    first: dict[str, LabelRow] = {}
    bad: list[int] = []
    for row in rows:
        for key in keys_of(row):
            seen = first.setdefault(key, row)
            if (seen.label, seen.split) != (row.label, row.split):
                bad += [seen.line, row.line]
    if bad:
        raise ValueError(f"one case has different labels or splits: {_lines(bad)} of the label table; keep one of them")


def _match(catalog: Catalog, rows: Sequence[LabelRow]) -> dict[str, LabelRow]:
    """Row of each case by sample id."""
    ids: dict[str, list[str]] = defaultdict(list)
    for case in catalog.cases:
        for name in case.names:
            ids[name].append(case.sample_id)
    refused = {name for names in catalog.refused_names.values() for name in names}
    unknown = [row.line for row in rows if row.case not in ids and row.case not in refused]
    if unknown:
        raise ValueError(
            f"{_lines(unknown)} of the label table name nothing in the export; write a path relative to the export "
            "(a file, or a folder that holds one series) or a UID, or remove the line"
        )
    _refuse_conflicts(rows, lambda row: ids.get(row.case, []))
    return {sample_id: row for row in rows for sample_id in ids.get(row.case, ())}


def _check_classes(named: Sequence[tuple[Case, str]], classes: Sequence[str]) -> None:
    if len(classes) < 2:
        found = "no case has a label" if not classes else f"all {len(named)} labelled cases are of one class"
        raise ValueError(f"{found}; a classification cohort needs two or more classes with usable cases")
    released = {label for case, label in named if case.split != "test"}
    if len(released) < len(classes):
        missing = len(classes) - len(released)
        raise ValueError(f"{missing} of {len(classes)} classes have cases in split test only; move some to train")


def _held_out(cases: Sequence[Case], seed: int) -> frozenset[str]:
    """Test cases; else whole patients, taken until each class has lent its part, but never a class's last patient.

    The order of patients is a hash of the seed and the patient, so that it does not depend on the order of files.
    """
    test = frozenset(case.sample_id for case in cases if case.split == "test")
    if test:
        return test
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        if case.split == "train":
            groups[case.group].append(case)
    total = _count(case for members in groups.values() for case in members)
    taken: dict[int, int] = defaultdict(int)
    out: set[str] = set()
    for group in sorted(groups, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()):
        counts = _count(groups[group])
        wanted = any(taken[label] < max(1, round(HELD_OUT_FRACTION * total[label])) for label in counts)
        if wanted and all(taken[label] + count < total[label] for label, count in counts.items()):
            out |= {case.sample_id for case in groups[group]}
            for label, count in counts.items():
                taken[label] += count
    return frozenset(out)


def _count(cases: Iterable[Case]) -> dict[int, int]:
    counts: dict[int, int] = defaultdict(int)
    for case in cases:
        counts[case.label] += 1
    return counts


def _warn_of_shared_patients(cases: Sequence[Case]) -> None:
    test = {case.group for case in cases if case.split == "test"}
    shared = test & {case.group for case in cases if case.split != "test"}
    if shared:
        logger.warning("%d patients have cases both in split test and in a released split", len(shared))


def _natural(label: str) -> tuple[bool, int, str]:
    """Numbers by value and before words."""
    number = label.isascii() and label.isdigit()
    return (not number, int(label) if number else 0, label)


def _plain(name: str) -> str:
    return posixpath.normpath(name.replace("\\", "/"))


def _lines(numbers: Sequence[int]) -> str:
    listed = sorted(set(numbers))
    shown = ", ".join(map(str, listed[:10]))
    more = f" and {len(listed) - 10} more" if len(listed) > 10 else ""
    return f"line{'s' if len(listed) > 1 else ''} {shown}{more}"
