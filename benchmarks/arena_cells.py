# SPDX-License-Identifier: Apache-2.0
"""What the arena has to train: the product of the lists of each grid, each training once, and what has to be fitted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from methods import UNBOUNDED
from releases import RELEASES, TURNED

from monai_salm.verification.defenses import defenses_of

__all__ = ["AGAIN", "ELSEWHERE", "NO_DEFENSE", "PLAIN", "WITHOUT_FIT", "Cell", "cells", "fit_groups", "needed_fits"]

AGAIN, ELSEWHERE = 1000, 2000
"""Added to a fit's seed: the same images once more; other images of the same kind."""
PLAIN, NO_DEFENSE = "all", "none"
WITHOUT_FIT = ("clean", "blind", "own_clean")
"""``own_clean``: trained on the third party's own clean cases alone."""


@dataclass(frozen=True, order=True)
class Cell:
    """One training of the grid; the columns that a row of the table starts with."""

    data: str
    level: str
    method: str
    release: str
    defense: str
    victim: str
    seed: int


def cells(config: Mapping[str, Any], only: Sequence[str] = ()) -> list[Cell]:
    """Every training that the grids ask for, with the clean and blind ones that each is compared with.

    Args:
        config: as in ``arena.yaml``.
        only: names of grids; empty: all.

    Raises:
        ValueError: When a grid, a defense or a release is unknown.
    """
    unknown = sorted(set(only) - set(config["grids"]))
    if unknown:
        raise ValueError(f"there is no grid {', '.join(unknown)}; there are {', '.join(config['grids'])}")
    found: dict[Cell, None] = {}
    for name in only or config["grids"]:
        grid = config["grids"][name]
        asked, releases = grid.get("defenses"), grid.get("releases", [PLAIN])
        defenses = [NO_DEFENSE, *(each.name for each in defenses_of(asked))] if asked else [NO_DEFENSE]
        if not set(releases) <= set(RELEASES):
            raise ValueError(f"grid {name} asks for releases {releases}; there are {', '.join(RELEASES)}")
        shared = itertools.product(grid.get("data", config["data"]), grid["victims"], range(grid["seeds"]))
        for data, victim, seed in shared:
            for level, method, release, defense in itertools.product(
                grid["levels"], grid["methods"], releases, defenses
            ):
                if method in UNBOUNDED and level.endswith("dB"):
                    continue  # has a budget of its own
                plain = release if release == TURNED else PLAIN
                for cell in (
                    Cell(data, "", "blind", PLAIN, NO_DEFENSE, victim, seed),
                    Cell(data, "", "own_clean", PLAIN, NO_DEFENSE, victim, seed),
                    Cell(data, "", "clean", plain, defense, victim, seed),
                    Cell(data, level, method, release, defense, victim, seed),
                ):
                    found[cell] = None
    return sorted(found)


def needed_fits(cell: Cell, fits: int) -> Iterator[tuple[str, str, str, int]]:
    """(data, level, method, seed) of the fits that a training needs."""
    if cell.method in WITHOUT_FIT:
        return
    seed = cell.seed % fits
    yield cell.data, cell.level, cell.method, seed
    if cell.release in ("averaged", "compared"):
        yield cell.data, cell.level, cell.method, seed + AGAIN
    if cell.release == "removed":
        yield cell.data, cell.level, cell.method, seed + ELSEWHERE


def fit_groups(asked: Sequence[Cell], fits: int) -> list[list[tuple[str, str, str, int]]]:
    """Needed fits, those together that must not run side by side: a search for a PSNR tries budgets of other levels."""
    groups: dict[tuple[str, str, int], list[tuple[str, str, str, int]]] = {}
    for each in dict.fromkeys(needed for cell in asked for needed in needed_fits(cell, fits)):
        data, _, method, seed = each
        groups.setdefault((data, method, seed % AGAIN), []).append(each)
    return list(groups.values())
