# SPDX-License-Identifier: Apache-2.0
"""What an export holds, as lines and tables for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from monai_salm.io.base import Case
from monai_salm.release.catalog import Catalog
from monai_salm.release.gates import Refusal
from monai_salm.release.identity import mask_id
from monai_salm.release.labels import Cohort


def counts_line(catalog: Catalog, cohort: Cohort | None) -> str:
    """How many cases of how many patients, by format, and in how many files."""
    cases = cohort.cases if cohort else catalog.cases
    patients = len({case.group for case in cases})
    formats = sorted(Counter(case.format for case in cases).items())
    line = f"{len(cases)} cases of {patients} patients: {', '.join(f'{count} {form}' for form, count in formats)}"
    line += f", in {len({path for case in cases for path in case.files})} files"
    if cohort and all(case.split != "test" for case in cases):
        line += f"; no test split, verification holds {len(cohort.held_out)} back"
    if catalog.companions:
        line += f"; {len(catalog.companions)} companions go along with them"
    return line


def counts_table(catalog: Catalog, cohort: Cohort | None) -> Table:
    """Cases by class and split where there are labels (with voxel labels: and voxels), else by format."""
    cases = cohort.cases if cohort else catalog.cases
    if cohort is None:
        return _table(["format", "cases"], Counter(case.format for case in cases).items())
    splits = [name for name in ("train", "val", "test") if any(case.split == name for case in cases)]
    rows = []
    for label, name in enumerate(cohort.classes):
        cells = [_count(cohort, label, [case for case in cases if case.split == split]) for split in splits]
        rows.append((name, *(number for cell in [*cells, _count(cohort, label, cases)] for number in cell)))
    kinds = ("{}", "{} voxels") if cohort.voxelwise else ("{}",)
    return _table(["class", *(kind.format(split) for split in (*splits, "all") for kind in kinds)], rows)


def _count(cohort: Cohort, label: int, cases: Sequence[Case]) -> tuple[int, ...]:
    """Cases of a class; with voxel labels those that have the class, and its voxels in them."""
    if not cohort.voxelwise:
        return (sum(case.label == label for case in cases),)
    voxels = [cohort.class_voxels[case.sample_id][label] for case in cases]
    return sum(count > 0 for count in voxels), sum(voxels)


def cases_table(catalog: Catalog, cohort: Cohort | None, names: bool = False) -> Table:
    """A row for each case; with the names of its files only where they are asked for, for they may be personal."""
    cases = cohort.cases if cohort else catalog.cases
    rows = []
    for case in cases:
        label = cohort.classes[case.label] if cohort and case.mask is None else ""
        if case.mask is not None:
            label = case.mask.name if names else mask_id(case.mask)
        row = (case.sample_id, case.format, len(case.files), label, case.split)
        rows.append((*row, case.names[0]) if names else row)
    label = "mask" if cohort and cohort.voxelwise else "class"
    return _table(["case", "format", "files", label, "split", *(["name"] if names else [])], rows)


def refusals_table(refusals: Sequence[Refusal], catalog: Catalog, names: bool = False) -> Table:
    """A row for each refusal, with the reason and what to do; names as in :py:func:`cases_table`."""
    real = {case.sample_id: case.names for case in catalog.cases} | catalog.refused_names if names else {}
    rows = [(each.reason, real.get(each.name, (each.name,))[0], each.detail) for each in refusals]
    return _table(["reason", "what", "found, and what to do"], rows)


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_printable(str(cell))) for cell in row))
    return table


def _printable(text: str) -> str:
    """A file's name may hold anything, control codes of the terminal included."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
