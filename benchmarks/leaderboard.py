# SPDX-License-Identifier: Apache-2.0
"""One page of the arena's table: sortable rankings, and heat maps of what each defense and release leaves of a method.

python benchmarks/leaderboard.py build/arena/arena.csv --output build/arena/leaderboard.html
"""

from __future__ import annotations

import argparse
import csv
import html
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from arena_cells import NO_DEFENSE, PLAIN, WITHOUT_FIT
from releases import TURNED

from monai_salm.release.commit import write_atomically
from monai_salm.verification.defenses import DEFENSES
from monai_salm.verification.segmenters import Segmentation
from monai_salm.verification.strength import closed_gap, closed_gap_auc, closed_gap_per_class, mean_of, values_of
from monai_salm.verification.verdict import VerdictRules, learning_checks
from monai_salm.verification.victims import METRIC

Row = Mapping[str, Any]
TEXT = ("data", "level", "method", "release", "defense", "victim", "epsilon")
DICE, BY_CLASS = Segmentation.metric, f"{Segmentation.metric}_per_class"
RANKING = {
    "level": "budget",
    "method": "method",
    "epsilon": "bound",
    METRIC: "balanced accuracy",
    "auc": "AUC",
    DICE: "Dice",
    BY_CLASS: "Dice by class",
    "hd95": "HD95",
    "gap": "closed gap",
    "low": "low",
    "high": "high",
    "gap_auc": "closed gap, AUC",
    "gap_by_class": "closed gap by class",
    "n": "pairs",
    "standard": "mean over standard defenses",
    "worst": "least over all defenses",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "changed": "changed",
    "passes": "passes",
    "fit_seconds": "seconds",
    "linear_images": "linear, images",
    "linear_delta": "linear, noise",
    "leakage": "leakage",
}
"""Columns and their heads; but for the gap, those without a value are left out."""
_SCRIPT = """
for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], at = [...head.parentNode.children].indexOf(head);
  const key = row => (row.children[at].dataset.v ?? row.children[at].textContent) || null;
  const up = head.dataset.up = head.dataset.up === "1" ? "0" : "1";
  body.append(...[...body.rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return up === "1" ? -order : order;
  }));
};
"""
_STYLE = """
body { font: 14px/1.5 "Helvetica Neue", Arial, sans-serif; margin: 28px; color: #1b2430; max-width: 1500px; }
table { border-collapse: collapse; margin: 8px 0 22px; font-variant-numeric: tabular-nums; font-size: 13px; }
th { cursor: pointer; text-align: left; vertical-align: bottom; border-bottom: 1.5px solid; padding: 3px 9px 3px 0; }
td { border-bottom: 1px solid #e5e8ec; padding: 3px 9px 3px 0; white-space: nowrap; }
.heat td + td { padding: 3px 7px; text-align: right; } .unsure { color: #566172; font-style: italic; }
.heat th + th { writing-mode: vertical-rl; transform: rotate(180deg); }
"""


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of the table; numbers are numbers, what is empty is None, values by class are a dictionary."""

    def value(name: str, text: str) -> Any:
        if name == BY_CLASS:
            pairs = (part.rsplit("=", 1) for part in text.split(";") if part)
            return {which: float(number) for which, number in pairs}
        return text if name in TEXT else float(text) if text else None

    with path.open(newline="") as stream:
        return [{name: value(name, text) for name, text in row.items()} for row in csv.DictReader(stream)]


class Board:
    """What the table says of one data set.

    Args:
        rows: its trainings.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows, self.metric = rows, DICE if any(row.get(DICE) is not None for row in rows) else METRIC
        fitted = [row for row in rows if row["method"] not in WITHOUT_FIT]
        self.methods = list(dict.fromkeys(row["method"] for row in fitted))
        self.levels = list(dict.fromkeys(row["level"] for row in fitted))
        self.defenses = [d.name for d in DEFENSES if any(row["defense"] == d.name for row in fitted)]
        self.releases = [name for name in dict.fromkeys(row["release"] for row in fitted) if name != PLAIN]
        self.victims = list(dict.fromkeys(row["victim"] for row in fitted))
        self._gaps: dict[tuple[Any, ...], dict[str, Any] | None] = {}

    def of(self, **wanted: str) -> list[Row]:
        """Trainings with these values."""
        return [row for row in self.rows if all(row[name] == value for name, value in wanted.items())]

    def gap(
        self,
        level: str,
        method: str,
        release: str = PLAIN,
        defense: str = NO_DEFENSE,
        victims: Collection[str] | None = None,
    ) -> dict[str, Any] | None:
        """Closed gap of a cell, ``conclusive`` if clean victims with the same defense have learned; None: not run.

        ``victims``: the only ones to look at, since cells of different ones cannot be compared; default: all.
        """
        key = level, method, release, defense, tuple(self.victims if victims is None else victims)
        if key not in self._gaps:
            self._gaps[key] = self._gap(*key)
        return self._gaps[key]

    def shared(self, cells: Iterable[tuple[str, str, str, str]]) -> list[str]:
        """Victims that all of these cells (level, method, release, defense) have, of those that were run."""
        names = ("level", "method", "release", "defense")
        parts = [self.of(**dict(zip(names, cell, strict=True))) for cell in cells]
        found = [{row["victim"] for row in part} for part in parts if part]
        return [victim for victim in self.victims if found and all(victim in each for each in found)]

    def _gap(
        self, level: str, method: str, release: str, defense: str, victims: Collection[str]
    ) -> dict[str, Any] | None:
        mine = self.of(level=level, method=method, release=release, defense=defense)
        if not any(row["victim"] in victims for row in mine):
            return None
        other = release == TURNED
        clean = self.of(method="clean", release=release if other else PLAIN, defense=defense)
        parts = {"clean": clean, "protected": mine, "blind": [] if other else self.of(method="blind")}
        rows = [{**row, "arm": arm} for arm, part in parts.items() for row in part if row["victim"] in victims]
        chance = 0.5 if other else None  # turned or not; other labels have blind victims
        found = closed_gap(rows, self.metric, chance=chance)
        checks = learning_checks(rows, self.metric, list(found["by_victim"]), chance, VerdictRules())
        known = found["mean"] is not None and all(check.passed for check in checks)
        arm = mean_of(values_of(rows, self.metric, "protected"))
        by_class = {name: part["mean"] for name, part in closed_gap_per_class(rows, self.metric).items()}
        return {**found, "conclusive": known, "arm": arm, "by_auc": closed_gap_auc(rows), "by_class": by_class}

    @cached_property
    def ranking(self) -> list[dict[str, Any]]:
        """One row per method and budget, the strongest first; those without a fit last. ``gap`` and the like are over
        the victims that all methods of a budget have, ``gap_<victim>`` is of one."""
        found = []
        for level in self.levels:
            # Where there is no common one, each method is shown with its own.
            plain = self.shared((level, method, PLAIN, NO_DEFENSE) for method in self.methods) or None
            fought = (
                self.shared((level, method, PLAIN, name) for method in self.methods for name in self.defenses) or None
            )
            for method in self.methods:
                gap, mine = self.gap(level, method, victims=plain), self.of(level=level, method=method, release=PLAIN)
                if gap is None:
                    continue
                withstood = {name: self.gap(level, method, defense=name, victims=fought) for name in self.defenses}
                told = {name: part["mean"] for name, part in withstood.items() if part and part["conclusive"]}
                standard = [told[d.name] for d in DEFENSES if d.standard and d.name in told]
                row = {name: gap[name] for name in ("low", "high", "n")}
                row |= {"gap": gap["mean"], "gap_auc": gap["by_auc"].get("mean"), "conclusive": gap["conclusive"]}
                row |= {"gap_by_class": _by_class(gap["by_class"]) if len(gap["by_class"]) > 1 else None}
                row |= {"standard": _mean(standard), "worst": min(told.values(), default=None)}
                each = {victim: self.gap(level, method, victims=[victim]) for victim in self.victims}
                row |= {f"gap_{victim}": part["mean"] for victim, part in each.items() if part}
                found.append(self._described(level, method, mine) | row)
        found.sort(key=lambda row: (self.levels.index(row["level"]), -(row["gap"] if row["gap"] is not None else -9)))
        others = ((name, self.of(method=name, release=PLAIN)) for name in WITHOUT_FIT)
        return found + [self._described("", name, rows) for name, rows in others if rows]

    def _described(self, level: str, method: str, rows: Sequence[Row]) -> dict[str, Any]:
        plain = [row for row in rows if row["defense"] == NO_DEFENSE]
        names = ("psnr", "ssim", "changed", "passes", "fit_seconds", "linear_images", "linear_delta", "hd95", "leakage")
        values = {name: [row[name] for row in plain if row.get(name) is not None] for name in (self.metric, "auc")}
        spread = {
            f"{name}_std": float(np.std(each, ddof=1)) if len(each) > 1 else None for name, each in values.items()
        }
        means = {name: _mean([row.get(name) for row in plain]) for name in (self.metric, "auc", *names)}
        bounds = ", ".join(dict.fromkeys(row["epsilon"] for row in rows))
        parts = [row.get(BY_CLASS) or {} for row in plain]
        dice = {name: _mean([part.get(name) for part in parts]) for name in dict.fromkeys(itertools.chain(*parts))}
        return {"level": level, "method": method, "epsilon": bounds, **means, **spread, BY_CLASS: _by_class(dice)}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _by_class(values: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {'?' if value is None else f'{value:.2f}'}" for name, value in values.items())


def _shown(row: Row, name: str) -> str:
    value = row.get(name)
    if value is None or isinstance(value, str):
        return value or ""
    digits = {"psnr": 1, "hd95": 1, "passes": 1, "fit_seconds": 1, "n": 0, "low": 2, "high": 2}.get(name, 3)
    digits = 2 if name.startswith("gap") else digits
    std = row.get(f"{name}_std")
    return f"{value:.{digits}f}" + (f" ± {std:.3f}" if std is not None else "")


def table_html(board: Board) -> str:
    """The ranking."""
    columns = RANKING | {f"gap_{victim}": f"gap, {victim}" for victim in board.victims}
    told = {"gap", *(name for row in board.ranking for name, value in row.items() if value not in (None, ""))}
    columns = {name: text for name, text in columns.items() if name in told}
    heads = "".join(f"<th>{html.escape(text)}</th>" for text in columns.values())
    lines = []
    for row in board.ranking:
        raw = {name: "" if row.get(name) is None else str(row[name]) for name in columns}
        cells = [f'<td data-v="{html.escape(raw[name])}">{html.escape(_shown(row, name))}</td>' for name in columns]
        lines.append(f"<tr{'' if row.get('conclusive', True) else ' class=unsure'}>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def heat_html(board: Board, level: str, columns: Sequence[tuple[str, str, str]], by_auc: bool = False) -> str:
    """Closed gaps of each method (rows) in each (head, release, defense), over the victims that all of them have; empty
    where nothing was run. ``by_auc``: of the AUC."""
    rest = [(level, method, *column[1:]) for method in board.methods for column in columns[1:]]
    victims = board.shared(rest) or board.victims
    heads = "".join(f"<th>{html.escape(head)}</th>" for head, _, _ in columns)
    lines = []
    for method in board.methods:
        gaps = [board.gap(level, method, release, defense, victims) for _, release, defense in columns]
        if by_auc:
            gaps = [gap and _by_auc(gap) for gap in gaps]
        if any(gap is not None for gap in gaps[1:]):
            lines.append(f"<tr><td>{html.escape(method)}</td>{''.join(map(_heat, gaps))}</tr>")
    if not lines:
        return ""
    table = f'<table class="heat"><thead><tr><th>method</th>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    return f"<p>Networks: {html.escape(', '.join(victims))}.</p>{table}"


def _by_auc(gap: Mapping[str, Any]) -> dict[str, Any]:
    found = {"mean": None, **gap["by_auc"]}
    return {**found, "conclusive": gap["conclusive"] and found["mean"] is not None}


def _heat(gap: Mapping[str, Any] | None) -> str:
    if gap is None:
        return "<td></td>"
    if not gap["conclusive"]:
        return '<td class="unsure" title="the clean victims did not learn">?</td>'
    strength = min(1.0, max(0.0, gap["mean"]))
    color = f"rgb({round(240 - 200 * strength)},{round(245 - 110 * strength)},{round(250 - 50 * strength)})"
    interval = "" if gap["low"] is None else f"{gap['low']:.2f} to {gap['high']:.2f}"
    ink = "#fff" if strength > 0.6 else "#1b2430"
    return (
        f'<td style="background:{color};color:{ink}" title="{interval}" data-v="{gap["mean"]}">{gap["mean"]:.2f}</td>'
    )


def page(rows: Sequence[Row]) -> str:
    """The leaderboard as one HTML file that loads nothing."""
    parts = [
        "<!DOCTYPE html><html lang=en><meta charset=utf-8><title>monai_salm: the arena</title>",
        f"<style>{_STYLE}</style><h1>The arena</h1><p>Closed gap: (clean − protected) / (clean − blind) in balanced "
        "accuracy (of voxel labels: Dice), or in AUC with 0.5 as floor, clean with the same defense; 0 is no "
        "protection, at 1 the images teach as little as noise. Intervals: 95 %, two-level bootstrap of paired seeds. "
        "In italics, or “?”: the clean victims did not learn, so nothing can be said. Methods are ranked over the "
        "networks that all of them were tried on; the last columns are of one network each. Click a head to sort.</p>",
    ]
    for name in dict.fromkeys(row["data"] for row in rows):
        board = Board([row for row in rows if row["data"] == name])
        parts.append(f"<h2>{html.escape(name)}</h2>{table_html(board)}")
        for level in board.levels:
            plain = [(NO_DEFENSE, PLAIN, NO_DEFENSE)]
            defenses = plain + [(name, PLAIN, name) for name in board.defenses]
            releases = [(PLAIN, PLAIN, NO_DEFENSE)] + [(name, name, NO_DEFENSE) for name in board.releases]
            for title, columns in (("defenses", defenses), ("releases", releases)):
                for by_auc in (False, True) if board.metric == METRIC else (False,):
                    found = heat_html(board, level, columns, by_auc)
                    head = f"{html.escape(level)}, {title}{', by AUC' if by_auc else ''}"
                    parts.append(f"<h3>{head}</h3>{found}" if found else "")
    return "\n".join([*parts, f"<script>{_SCRIPT}</script></html>\n"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="CSV file of arena.py")
    parser.add_argument("--output", type=Path, required=True, help="HTML file to write")
    asked = parser.parse_args(arguments)
    write_atomically(page(read(asked.table)), asked.output)


if __name__ == "__main__":
    main()
