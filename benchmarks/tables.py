# SPDX-License-Identifier: Apache-2.0
"""Prints the tables of README.md and of docs from the result files; `leaderboard.py` ranks those of the arena.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from arena_cells import NO_DEFENSE, PLAIN
from leaderboard import Board, read

from monai_salm.verification.defenses import DEFENSES
from monai_salm.verification.victims import METRIC

RESULTS = Path(__file__).parent / "results"
DEFAULT, UNBOUND = "salm_0.4", "salm_0.4_full"
Column = Callable[[dict[str, Any]], str]
"""What a table shows of an arm."""


def spread(cell: dict[str, Any] | None) -> str:
    """``mean ± std`` of a summary's cell."""
    return "n/a" if not cell or cell["mean"] is None else f"{cell['mean']:.3f} ± {cell['std'] or 0:.3f}"


def gap(cell: dict[str, Any] | None) -> str:
    """``mean (low to high)`` of a closed gap."""
    return "" if not cell or cell["mean"] is None else f"{cell['mean']:.2f} ({cell['low']:.2f} to {cell['high']:.2f})"


def line(*cells: str) -> None:
    """One line of a table."""
    print(f"| {' | '.join(cells)} |")


def head(*names: str) -> None:
    """The lines that a table begins with."""
    line(*names)
    print(f"|{' --- |' * len(names)}")


def demo(path: Path) -> None:
    """Arms of one kept report."""
    results = json.loads(path.read_text())
    gaps = {"protected": results["closed_gap"]} | results.get("closed_gap_controls", {})
    fidelity, budget = results["fidelity"], results["budget"]
    quality = f"SSIM {fidelity['ssim']['mean']:.3f}, PSNR {fidelity['psnr']['mean']:.1f} dB"
    stored = f"budget {budget['stored']['min']:g} to {budget['stored']['max']:g} stored units"
    print(f"\n{path.stem}: {results['verdict']}, {quality}, {stored}, {results['passes_per_image']}")
    differences = [row["difference"] for row in results["utility"]]
    print(f"frozen clean model: {min(differences):+.3f} to {max(differences):+.3f}, seconds {results['timing']}")
    by_victim = (f"{victim} {gap(part)}" for victim, part in results["closed_gap"]["by_victim"].items())
    print(f"closed gap by network: {', '.join(by_victim)}\n")
    columns = of_voxels(results) if results["metric"] == "dice" else of_cases()
    by_auc = results.get("closed_gap_auc")
    heads = [*columns, "closed gap", *(["closed gap, AUC"] if by_auc else [])]
    head("arm", *heads)
    for arm, cells in results["summary"].items():
        shown = [*(show(cells) for show in columns.values()), gap(gaps.get(arm))]
        line(arm, *shown, *([gap(by_auc.get(arm))] if by_auc else []))


def fits(paths: Sequence[Path]) -> None:
    """Closed gaps of one demo over several fits: mean and standard deviation."""
    for arm in ("protected", "random_mask"):
        for name in ("closed gap", "by AUC"):
            values = []
            for path in paths:
                results = json.loads(path.read_text())
                gaps = {"protected": results["closed_gap"]} | results["closed_gap_controls"]
                values.append((gaps if name == "closed gap" else results["closed_gap_auc"])[arm]["mean"])
            shown = ", ".join(f"{value:.2f}" for value in values)
            print(f"{arm}, {name} of {len(paths)} fits: {mean(values):.2f} ± {stdev(values):.2f} ({shown})")


def methods(path: Path) -> None:
    """Every method of a study with voxel labels: what it takes from whom, what it gives away, what it costs."""
    results = json.loads(path.read_text())
    gaps = {"protected": results["closed_gap"], **results["closed_gap_controls"]}
    networks = list(gaps["protected"]["by_victim"])
    print(f"\n{path.name}")
    costs = ["leakage", "PSNR (in the label)", "SSIM", "passes", "s per case", "peak MiB"]
    scored = [f"{what}, {name}" for name in networks for what in ("Dice by class", "HD95")]
    heads = ["method", *networks, *scored, *costs]
    head(*heads)
    for name, found in gaps.items():
        row = [name, *(gap(found["by_victim"][network]) for network in networks)]
        for network in networks:
            scores = results["summary"][name]["by_victim"][network]
            row.append(", ".join(map(spread, scores["dice_per_class"].values())))
            row.append(f"{scores['hd95']['mean']:.1f} ± {scores['hd95']['std']:.1f}")
        row.append(f"{results['leakage'][name]['best']['mean']:.2f}" if name in results["leakage"] else "")
        fit = results["fits"].get(name)
        if fit:
            kept = {part: fit["fidelity"][part]["mean"] for part in ("psnr", "psnr_foreground", "ssim")}
            row += ["{psnr:.1f} ({psnr_foreground:.1f})".format(**kept), f"{kept['ssim']:.3f}"]
            row += [f"{fit['passes_per_case']['total']:.0f}", f"{fit['seconds_per_case']:.1f}"]
            row.append("" if fit["peak_memory_mib"] is None else f"{fit['peak_memory_mib']:.0f}")
        line(*row, *[""] * (len(heads) - len(row)))


def of_cases() -> dict[str, Column]:
    """Columns of a task with one class per image."""
    return {name.replace("_", " "): lambda cells, name=name: spread(cells["all"][name]) for name in (METRIC, "auc")}


def of_voxels(results: dict[str, Any]) -> dict[str, Column]:
    """Columns of a task with one class per voxel."""
    victims = results["closed_gap"]["by_victim"]
    dice = {
        f"Dice, {victim}": lambda cells, victim=victim: spread(cells["by_victim"][victim]["dice"]) for victim in victims
    }
    return {**dice, "HD95 (mm)": lambda cells: f"{cells['all']['hd95']['mean']:.0f}"}


def boards(name: str) -> Iterator[tuple[str, Board]]:
    """Each data set of one of the arena's tables."""
    rows = read(RESULTS / f"{name}.csv")
    for data in dict.fromkeys(row["data"] for row in rows):
        yield data, Board([row for row in rows if row["data"] == data])


def arena(board: Board, level: str) -> None:
    """Closed gaps of each method by victim at one budget, and what it costs: passes per image, seconds of a fit."""
    clean = board.of(method="clean", defense=NO_DEFENSE, release=PLAIN)
    victims = list(dict.fromkeys(row["victim"] for row in clean))
    print()
    head("method", *victims, "PSNR", "passes", "seconds")
    learned = [[row[board.metric] for row in clean if row["victim"] == victim] for victim in victims]
    shown = (spread({"mean": mean(each), "std": stdev(each)}) for each in learned)
    line("clean", *shown, "", "", "")
    for row in board.ranking:
        if row["level"] == level and (found := board.gap(level, row["method"])):
            gaps = (gap(found["by_victim"].get(victim)) for victim in victims)
            took = median({each["fit_seconds"] for each in board.of(level=level, method=row["method"], release=PLAIN)})
            line(row["method"], *gaps, f"{row['psnr']:.1f}", f"{row['passes']:.1f}", f"{took:.0f}")
            if board.metric != METRIC:
                continue
            gaps = (gap(found["by_auc"].get("by_victim", {}).get(victim)) for victim in victims)
            line(f"{row['method']}, by AUC", *gaps, "", "", "")


def resistance(board: Board, level: str, method: str) -> None:
    """Closed gaps of a method at one budget, by victim, under each defense and each release, by balanced accuracy and
    by AUC; "?": clean victims did not learn."""
    found = {name: board.gap(level, method, defense=name) for name in (NO_DEFENSE, *board.defenses)}
    found |= {name: board.gap(level, method, release=name) for name in board.releases}
    found = {name: part for name, part in found.items() if part}
    others = [part for name, part in found.items() if name != NO_DEFENSE]
    victims = list(dict.fromkeys(victim for part in others for victim in part["by_victim"]))
    if not victims:
        return
    print()
    named = {name: (part, part["by_auc"]) if board.metric == METRIC else (part,) for name, part in found.items()}
    head("third party", *victims, *(f"{victim}, AUC" for victim in victims if board.metric == METRIC))
    for name, part in found.items():
        unsure = "" if part["conclusive"] else "?"
        gaps = [kind["by_victim"][victim] for kind in named[name] for victim in victims]
        line(name, *(unsure + gap(each) for each in gaps))
    standard = [named[each.name] for each in DEFENSES if each.standard and each.name in found]
    if standard:
        means = (
            mean(kind["by_victim"][v]["mean"] for kind in kinds for v in victims)
            for kinds in zip(*standard, strict=True)
        )
        print(f"mean over standard defenses: {', by AUC '.join(f'{each:.2f}' for each in means)}")


def main() -> None:
    """Every report in the results folder."""
    for path in [*sorted(RESULTS.glob("demo_*.json")), RESULTS / "lesions_3d.json"]:
        demo(path)
    methods(RESULTS / "hippocampus.json")
    fits(sorted(RESULTS.glob("demo_2d*.json")))
    for name in (
        "arena_default",
        "arena",
        "arena_more",
        "arena_augmented",
        "arena_bounds",
        "arena_budget",
        "arena_masked",
        "arena_sizes",
        "arena_psnr",
        "arena_psnr_kept",
        "arena_classes",
        "arena_volumes",
        "arena_color",
        "arena_color_hues",
        "arena_order",
        "arena_order_before",
        "arena_fits",
        "arena_large",
        "arena_voxels",
    ):
        for data, board in boards(name):
            for level in board.levels:
                print(f"\n{name}, {data}, {level}")
                arena(board, level)
    several, color = ("arena_more", "arena_augmented"), ("arena_color", "arena_color_hues")
    for name in ("arena_default", "arena_budget", "arena", "arena_releases", *several, *color):
        for data, board in boards(name):
            for method in [each for each in board.methods if name in several or each in (DEFAULT, UNBOUND)]:
                for level in board.levels:
                    print(f"\n{name}, {data}, {method}, {level}")
                    resistance(board, level, method)


if __name__ == "__main__":
    main()
