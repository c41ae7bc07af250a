# SPDX-License-Identifier: Apache-2.0
"""The arena: methods x budgets x releases x defenses x victims x seeds x data sets, from one YAML.

    python benchmarks/arena.py benchmarks/arena.yaml --data $MONAI_SALM_DATA --output build/arena/arena.csv
    python benchmarks/leaderboard.py build/arena/arena.csv --output build/arena/leaderboard.html

A training is known by the content of what it is trained and tested on, so none is done twice, whatever grid asks for
it. A killed run goes on from where it was; ``--only GRID`` runs a piece and tables it alone, and a run without it then
makes the whole table of what is there. A JSON file beside the table tells its configuration, versions and machine.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from arena_cells import Cell, cells, fit_groups
from arena_data import load
from arena_field import MEASURED, OF_FIT, OF_VOXELS, Field
from setting import write

from monai_salm.release.commit import write_atomically
from monai_salm.release.progress import track
from monai_salm.verification.jobs import default_workers, start_worker

COLUMNS = (*Cell.__dataclass_fields__, *MEASURED, *OF_FIT)


class Arena:
    """One run.

    Args:
        config: as in ``arena.yaml``.
        data: folder of the archives.
        work: folder of the fits and demo cohorts.
        output: CSV file to write; finished trainings are kept beside it.
        workers: processes that fit and train side by side.
    """

    def __init__(self, config: Mapping[str, Any], data: Path, work: Path, output: Path, workers: int = 1) -> None:
        self.config, self.data, self.work, self.output, self.workers = config, data, work, output, workers

    def run(self, only: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Do what is not done yet; write and return the rows of the table."""
        asked, rows = cells(self.config, only), []
        self.work.mkdir(parents=True, exist_ok=True)
        for left in self.work.glob("arms-*"):
            owner = Path("/proc", left.name.split("-")[1])
            if owner.parent.is_dir() and not owner.exists():  # a run that was killed
                shutil.rmtree(left)
        place = json.dumps(self.config), self.data, self.work
        fields = {name: _field(name, *place) for name in dict.fromkeys(cell.data for cell in asked)}
        self._fit_ahead(asked)
        for name, field in fields.items():
            own = [cell for cell in asked if cell.data == name]
            with tempfile.TemporaryDirectory(prefix=f"arms-{os.getpid()}-", dir=self.work) as folder:
                rows += field.train(own, Path(folder), self.output.with_suffix(".rows.jsonl"), self.workers)
            write_table(rows, self.output)
        return rows

    def _fit_ahead(self, asked: Sequence[Cell]) -> None:
        """All fits, side by side; they are kept in the work folder, where the trainings find them."""
        groups = fit_groups(asked, self.config["fits"])
        if self.workers == 1 or len(groups) < 2:
            return  # the trainings make them one by one
        job = partial(_fit_alone, json.dumps(self.config), self.data, self.work)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.workers, spawn, start_worker) as pool:
            for _ in zip(track(groups, "fitting groups"), pool.map(job, groups), strict=False):
                pass


@lru_cache
def _field(name: str, config: str, data: Path, work: Path) -> Field:
    """A data set; ``config`` is JSON, so that a process reads each data set once."""
    settings = json.loads(config)
    return Field(name, settings, load(settings["data"][name], data, work), work)


def _fit_alone(config: str, data: Path, work: Path, asked: Sequence[tuple[str, str, str, int]]) -> None:
    for name, *rest in asked:
        _field(name, config, data, work).fitted(*rest)


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One line per training, empty where something does not apply; columns of voxel labels where there are some."""
    stream = io.StringIO()
    known = {name for row in rows for name, value in row.items() if value is not None}
    columns = [name for name in COLUMNS if name not in OF_VOXELS or name in known]
    writer = csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(stream.getvalue(), path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML, such as benchmarks/arena.yaml")
    parser.add_argument("--data", type=Path, required=True, help="folder of the archives that it names")
    parser.add_argument("--output", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks/arena"), help="folder of the fits")
    parser.add_argument("--only", nargs="+", default=[], metavar="GRID", help="only these grids")
    parser.add_argument(
        "--workers", type=int, default=default_workers(torch.device("cpu")), help="default: one per core"
    )
    parser.add_argument("--device", default="cpu", help="that fits and trainings compute on, such as cuda")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config = yaml.safe_load(asked.config.read_text()) | {"device": asked.device}
    rows = Arena(config, asked.data, asked.work, asked.output, asked.workers).run(asked.only)
    write("arena", {"table": asked.output.name, "config": config}, asked.output.with_suffix(".json"), asked.device)
    print(f"{len(rows)} trainings: {asked.output}")


if __name__ == "__main__":
    main()
