# SPDX-License-Identifier: Apache-2.0
"""Prints the tables of README.md and docs/limits.md from the result files; `leaderboard.py` ranks the arena's.

python benchmarks/tables.py
"""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


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


class Arena:
    """Balanced accuracies of the arena's table, where all cases are released."""

    def __init__(self, path: Path) -> None:
        with path.open(newline="") as file:
            self.rows = [row for row in csv.DictReader(file) if row["release"] == "all"]

    def names(self, column: str, **cell: str) -> list[str]:
        """Values of a column in rows of a cell, in the table's order."""
        return list(dict.fromkeys(row[column] for row in self.of(**cell)))

    def of(self, **cell: str) -> list[dict[str, str]]:
        """Rows of a cell."""
        return [row for row in self.rows if all(row[column] == value for column, value in cell.items())]

    def mean(self, **cell: str) -> float:
        """Mean over seeds."""
        return statistics.mean(float(row["balanced_accuracy"]) for row in self.of(**cell))

    def gap(self, method: str, defense: str, victim: str) -> float:
        """Closed gap of the means, against clean victims with the same defense."""
        clean = self.mean(method="clean", defense=defense, victim=victim)
        lost = clean - self.mean(method=method, defense=defense, victim=victim)
        return lost / (clean - self.mean(method="blind", victim=victim))

    def methods(self) -> None:
        """Closed gap of every victim that has not fought a method."""
        victims = self.names("victim", method="salm_0.4", defense="none")
        plain = {"defense": "none"}
        accuracies = [f"{self.mean(method='clean', **plain, victim=victim):.3f}" for victim in victims]
        print(f"\n| method | {' | '.join(victims)} | PSNR | passes |\n|{' --- |' * (len(victims) + 3)}")
        print(f"| clean: accuracy | {' | '.join(accuracies)} |  |  |")
        for method in self.names("method", **plain):
            rows = self.of(method=method, **plain)
            if rows[0]["psnr"]:
                seen = {row["victim"] for row in rows}
                gaps = [f"{self.gap(method, 'none', victim):.2f}" if victim in seen else "" for victim in victims]
                psnr, passes = (statistics.mean(float(row[column]) for row in rows) for column in ("psnr", "passes"))
                print(f"| {method} | {' | '.join(gaps)} | {psnr:.1f} | {passes:.1f} |")

    def defenses(self) -> None:
        """What is left of the default under each defense, over the victims that tried it."""
        print("\n| defense | balanced accuracy, clean | protected | closed gap |\n| --- | --- | --- | --- |")
        for defense in self.names("defense", method="salm_0.4"):
            victims = self.names("victim", method="salm_0.4", defense="jpeg_30")
            clean, mine = (
                statistics.mean(self.mean(method=method, defense=defense, victim=victim) for victim in victims)
                for method in ("clean", "salm_0.4")
            )
            gaps = statistics.mean(self.gap("salm_0.4", defense, victim) for victim in victims)
            print(f"| {defense} | {clean:.3f} | {mine:.3f} | {gaps:.2f} |")


def main() -> None:
    """Every report in the results folder."""
    for path in sorted(RESULTS.glob("demo_*.json")):
        demo(path)
    arena = Arena(RESULTS / "arena.csv")
    arena.methods()
    arena.defenses()


if __name__ == "__main__":
    main()
