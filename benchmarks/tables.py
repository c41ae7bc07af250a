# SPDX-License-Identifier: Apache-2.0
"""Prints the tables of README.md and docs/limits.md from the result files; `leaderboard.py` ranks the arena's.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from arena_cells import NO_DEFENSE, PLAIN
from leaderboard import Board, read

from monai_salm.verification.victims import METRIC

RESULTS = Path(__file__).parent / "results"
DEFAULT = "salm_0.4"


def spread(cell: dict[str, Any] | None) -> str:
    """``mean ± std`` of a summary's cell."""
    return "n/a" if not cell or cell["mean"] is None else f"{cell['mean']:.3f} ± {cell['std'] or 0:.3f}"


def gap(cell: dict[str, Any] | None) -> str:
    """``mean (low to high)`` of a closed gap."""
    return "" if not cell or cell["mean"] is None else f"{cell['mean']:.2f} ({cell['low']:.2f} to {cell['high']:.2f})"


def demo(path: Path) -> None:
    """Arms of one kept report."""
    results = json.loads(path.read_text())
    gaps = {"protected": results["closed_gap"]} | results.get("closed_gap_controls", {})
    fidelity, budget = results["fidelity"], results["budget"]
    quality = f"SSIM {fidelity['ssim']['mean']:.3f}, PSNR {fidelity['psnr']['mean']:.1f} dB"
    stored = f"budget {budget['stored']['min']:g} to {budget['stored']['max']:g} stored units"
    print(f"\n{path.stem}: {results['verdict']}, {quality}, {stored}, {results['passes_per_image']}")
    differences = [row["difference"] for row in results["utility"]]
    print(f"frozen clean model: {min(differences):+.3f} to {max(differences):+.3f}, seconds {results['timing']}\n")
    print("| arm | balanced accuracy | AUC | closed gap |\n| --- | --- | --- | --- |")
    for arm, cells in results["summary"].items():
        cell = cells["all"]
        print(f"| {arm} | {spread(cell['balanced_accuracy'])} | {spread(cell['auc'])} | {gap(gaps.get(arm))} |")


def boards(name: str) -> Iterator[tuple[str, Board]]:
    """Each data set of one of the arena's tables."""
    rows = read(RESULTS / f"{name}.csv")
    for data in dict.fromkeys(row["data"] for row in rows):
        yield data, Board([row for row in rows if row["data"] == data])


def arena(board: Board, level: str) -> None:
    """Closed gaps of each method by victim at one budget."""
    clean = board.of(method="clean", defense=NO_DEFENSE, release=PLAIN)
    victims = list(dict.fromkeys(row["victim"] for row in clean))
    print(f"\n| method | {' | '.join(victims)} | PSNR | passes |\n|{' --- |' * (len(victims) + 3)}")
    learned = [[row[METRIC] for row in clean if row["victim"] == victim] for victim in victims]
    shown = (spread({"mean": mean(each), "std": stdev(each)}) for each in learned)
    print(f"| clean | {' | '.join(shown)} |  |  |")
    for row in board.ranking:
        if row["level"] == level and (found := board.gap(level, row["method"])):
            gaps = (gap(found["by_victim"].get(victim)) for victim in victims)
            print(f"| {row['method']} | {' | '.join(gaps)} | {row['psnr']:.1f} | {row['passes']:.1f} |")


def resistance(board: Board) -> None:
    """Closed gaps of the default by victim under each defense and each release; "?": clean victims did not learn."""
    level = board.levels[0]
    found = {name: board.gap(level, DEFAULT, defense=name) for name in (NO_DEFENSE, *board.defenses)}
    found |= {name: board.gap(level, DEFAULT, release=name) for name in board.releases}
    others = [part for name, part in found.items() if name != NO_DEFENSE]
    victims = list(dict.fromkeys(victim for part in others for victim in part["by_victim"]))
    print(f"\n| third party | {' | '.join(victims)} |\n|{' --- |' * (len(victims) + 1)}")
    for name, part in found.items():
        unsure = "" if part["conclusive"] else "?"
        print(f"| {name} | {' | '.join(unsure + gap(part['by_victim'][victim]) for victim in victims)} |")


def main() -> None:
    """Every report in the results folder."""
    for path in sorted(RESULTS.glob("demo_*.json")):
        demo(path)
    for name in ("arena", "arena_psnr", "arena_classes", "arena_volumes"):
        for data, board in boards(name):
            for level in board.levels:
                print(f"\n{name}, {data}, {level}")
                arena(board, level)
    for name in ("arena", "arena_defenses"):
        for _, board in boards(name):
            resistance(board)


if __name__ == "__main__":
    main()
