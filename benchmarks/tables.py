# SPDX-License-Identifier: Apache-2.0
"""Prints the README's tables of the demo runs from their result files; `leaderboard.py` prints the arena's.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
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


def main() -> None:
    """Every report in the results folder."""
    for path in sorted(RESULTS.glob("demo_*.json")):
        demo(path)


if __name__ == "__main__":
    main()
