# SPDX-License-Identifier: Apache-2.0
"""What the arena has to train: the product of the lists of each grid, each training once, and what has to be fitted."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from arena_data import voxelwise
from methods import UNBOUNDED, VOLUMES_ONLY, bundle_of, methods_of, victims
from releases import RELEASES, TURNED
from setting import configured

from monai_salm.perturbations.budget import Budget
from monai_salm.verification.asked import check_victims
from monai_salm.verification.defenses import defenses_of

__all__ = ["AGAIN", "ELSEWHERE", "NO_DEFENSE", "PLAIN", "WITHOUT_FIT", "Cell", "cells", "fit_groups", "needed_fits"]

AGAIN, ELSEWHERE = 1000, 2000
"""Added to a fit's seed: the same images once more; other images of the same kind."""
PLAIN, NO_DEFENSE = "all", "none"
_NEEDED = ("data", "epochs", "fits", "fit", "grids")
_GRID = ("methods", "levels", "victims", "seeds")
_OF_VOXELS = ("demo", "task", "patients", "decathlon", "size", "fit_size", "split", "spare", "spare_split")
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
        ValueError: When something is unknown or missing: hours later would be late to tell.
    """
    _known("grid", only, config.get("grids", {}))
    _check(config)
    found: dict[Cell, None] = {}
    for name in only or config["grids"]:
        grid = config["grids"][name]
        asked, releases = grid.get("defenses") or (), grid.get("releases", [PLAIN])
        shared = itertools.product(grid.get("data", config["data"]), grid["victims"], range(grid["seeds"]))
        for data, victim, seed in shared:
            settings = config["data"][data]
            defenses = [NO_DEFENSE, *(each.name for each in defenses_of(asked, voxelwise(settings)))]
            for level, method, release, defense in itertools.product(
                grid["levels"], grid["methods"], releases, defenses
            ):
                if method in UNBOUNDED and level.endswith("dB"):
                    continue  # has a budget of its own
                plain = release if release == TURNED else PLAIN
                if settings.get("spare"):
                    found[Cell(data, "", "own_clean", PLAIN, NO_DEFENSE, victim, seed)] = None
                for cell in (
                    Cell(data, "", "blind", PLAIN, NO_DEFENSE, victim, seed),
                    Cell(data, "", "clean", plain, defense, victim, seed),
                    Cell(data, level, method, release, defense, victim, seed),
                ):
                    found[cell] = None
    return sorted(found)


def _check(config: Mapping[str, Any]) -> None:
    _known("setting", config, (*_NEEDED, "recipes", "device"))
    missing = [name for name in _NEEDED if name not in config]
    if missing:
        raise ValueError(f"the YAML lacks {', '.join(missing)}")
    _known("data set in epochs", config["epochs"], config["data"])
    _known("data set with epochs", config["data"], config["epochs"])
    networks: dict[str, Any] = {}
    for data, settings in config["data"].items():
        if voxelwise(settings):
            _known(f"setting of data set {data} (voxel labels)", settings, _OF_VOXELS)
        bundle, _ = bundle_of(settings["size"], voxelwise(settings))
        _known("setting of the bundle in fit", config["fit"], configured(bundle, {}).get())
        networks |= _networks(len(settings["size"]), voxelwise(settings))
    _known("victim in recipes", config.get("recipes", {}), networks)
    for name, grid in config["grids"].items():
        _known(f"setting of grid {name}", grid, (*_GRID, "data", "defenses", "releases"))
        missing = [key for key in _GRID if key not in grid]
        if missing:
            raise ValueError(f"grid {name} lacks {', '.join(missing)}")
        _known(f"data of grid {name}", grid.get("data", ()), config["data"])
        for data in grid.get("data", config["data"]):
            _check_task(f"of grid {name}", grid, config["data"][data])
        for level in map(str, grid["levels"]):
            if not (level.endswith(" dB") and level.removesuffix(" dB").replace(".", "", 1).isdigit()):
                Budget.parse(level)


@lru_cache
def _networks(dims: int, voxels: bool) -> dict[str, Any]:
    return victims(2, (32,) * dims, voxelwise=voxels)


def _check_task(where: str, grid: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Check what depends on whether a data set has voxel labels."""
    dims, voxels, asked = len(settings["size"]), voxelwise(settings), grid.get("defenses") or ()
    names, networks = methods_of(voxels), _networks(dims, voxels)
    if voxels:
        where += f" (voxel labels, {dims}D)"
        names = [each for each in names if dims == 3 or each not in VOLUMES_ONLY]
    known = {"methods": names, "victims": networks, "releases": (PLAIN,) if voxels else RELEASES}
    for key, each in known.items():
        _known(f"{key} {where}", grid.get(key, ()), each)
    defenses = defenses_of(asked, voxels)
    if not isinstance(asked, str):
        _known(f"defenses {where}", asked, [each.name for each in defenses_of("full", voxels)])
    needing = [each.name for each in defenses if each.needs_clean]
    if needing and not settings.get("spare"):
        raise ValueError(
            f"defenses {where} need clean cases: {', '.join(needing)}; say with 'spare' how many there are"
        )
    if voxels:
        check_victims({name: networks[name] for name in grid["victims"]}, (1, *settings["size"]), 2, True)


def _known(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown {what}: {', '.join(unknown)}; there are {', '.join(known)}")


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
    """Needed fits, those together that must not run side by side: a search for a PSNR tries budgets of other levels,
    and data sets may differ in what victims see alone."""
    groups: dict[tuple[str, int], list[tuple[str, str, str, int]]] = {}
    for each in dict.fromkeys(needed for cell in asked for needed in needed_fits(cell, fits)):
        _, _, method, seed = each
        groups.setdefault((method, seed % AGAIN), []).append(each)
    return list(groups.values())
