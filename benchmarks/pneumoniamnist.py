# SPDX-License-Identifier: Apache-2.0
"""SALM, dense error-minimizing noise and controls on PneumoniaMNIST, under the shipped configuration.

    python benchmarks/pneumoniamnist.py --data pneumoniamnist.npz --output benchmarks/results/pneumoniamnist.json

Victims train on a balanced subset, seen through each method, and are tested on clean images of another split. What
is finished is kept, trainings beside the output (``.rows.jsonl``) and fits in the work folder; ``--resume`` goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arena_cells import NO_DEFENSE, PLAIN, Cell
from arena_data import DataSet, Part, load
from arena_field import MEASURED, Field, fidelity
from methods import FITTED, METHODS, Fitted
from setting import configured, machine, versions

from monai_salm.perturbations.budget import Budget
from monai_salm.verification.jobs import default_workers
from monai_salm.verification.results import write_atomically
from monai_salm.verification.strength import closed_gap, summarize
from monai_salm.verification.victims import METRIC

NAME = "pneumoniamnist"
SIZE = (28, 28)
VICTIMS = ("small_cnn", "resnet10", "densenet")
COMPARED = (
    "clean",
    "random_noise",
    "random_mask_0.4",
    "em",
    "salm_1.0",
    "salm_0.4",
    "salm_0.2",
    "salm_0.1",
    "blind",
)
"""What is compared unless ``--methods`` names others."""
NOTE = (
    "A balanced subset of the training images is used; victims and fits see no other images of the training split.",
    "Clean training is noisy on the test split, which differs from train and val: 38 % are normal, of those 26 %.",
    "Choices are to be made with --split val; the test split is to be reported once.",
    "8 images occur both in train and in val of the archive at hand, none in train and test.",
    "Seed s of a victim decides its start, order and augmentation in every arm, and is trained on fit s modulo fits.",
    "Seconds are of surrogate and perturbation steps of one fit, on the machine and with the threads below.",
    "PSNR, SSIM and the changed fraction are over all fits of a method.",
)


class Benchmark:
    """One run: arms, trainings, results.

    Args:
        data: the archive.
        output: JSON file to write.
        work: folder of the fits.
        split: ``"val"`` or ``"test"``.
        seeds: trainings of every victim in every arm.
        fits: fits of every method, with different seeds.
        train_size: training images, over all classes.
        epochs: of a victim; None: as in the shipped study.
        workers: training processes; None: one per core.
        methods: what to compare; names of ``methods.METHODS``.
        overrides: of the configuration, in all fits.
    """

    def __init__(
        self,
        data: Path,
        output: Path,
        work: Path,
        *,
        split: str = "val",
        seeds: int = 5,
        fits: int = 3,
        train_size: int = 1200,
        epochs: int | None = None,
        workers: int | None = None,
        methods: Sequence[str] = COMPARED,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        self.data, self.output, self.work = data, output, work
        self.split, self.seeds, self.fits, self.train_size = split, seeds, min(fits, seeds), train_size
        self.workers = default_workers(torch.device("cpu")) if workers is None else workers
        self.methods, self.overrides = tuple(methods), dict(overrides or {})
        config = configured("salm_2d_classification", self.overrides)
        self.epsilon = str(config["epsilon"])
        self.epochs = config.get_parsed_content("study::epochs") if epochs is None else epochs

    def run(self) -> dict[str, Any]:
        """Do what is not done yet; write and return the results."""
        started = time.monotonic()
        settings = {"archive": self.data.name, "size": SIZE, "train": self.train_size, "split": self.split, "spare": 0}
        data = load(settings, self.data.parent, self.work)
        field = Field(NAME, {"epochs": {NAME: self.epochs}, "fits": self.fits, "fit": self.overrides}, data, self.work)
        fitted: dict[str, list[Fitted]] = {name: [] for name in self.methods}
        for name in FITTED:
            for seed in range(self.fits if name in fitted else 0):
                fitted[name].append(field.fitted(self.epsilon, name, seed)[0])
                print(f"{name}, fit {seed}: {fitted[name][-1].seconds:.1f} s", flush=True)
        cells = [
            Cell(NAME, self.epsilon, method, PLAIN, NO_DEFENSE, victim, seed)
            for victim in VICTIMS
            for seed in range(self.seeds)
            for method in self.methods
        ]
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            scored = field.scored(cells, Path(folder), self.output.with_suffix(".rows.jsonl"), self.workers)
        rows = [{"arm": cell.method, "victim": cell.victim, "seed": cell.seed, **row} for cell, row in scored.items()]
        results = self._results(field, rows, fitted, time.monotonic() - started)
        write_atomically(json.dumps(results, indent=1, allow_nan=False) + "\n", self.output)
        return results

    def _results(
        self, field: Field, rows: Sequence[Mapping[str, Any]], fitted: Mapping[str, Sequence[Fitted]], seconds: float
    ) -> dict[str, Any]:
        data: DataSet = field.data
        chance, described = 1 / len(data.classes), summarize(rows, METRIC)
        methods = {}
        for name, own in fitted.items():
            spent = [one.seconds for one in own]
            gaps = {metric: _gap(closed_gap(rows, metric, name, chance=chance)) for metric in (METRIC, "auc")}
            methods[name] = {
                **described[name],
                "closed_gap": None if name in ("clean", "blind") else gaps,
                "fidelity": fidelity(data.train, *own, ratio=METHODS[name].ratio) if own else None,
                "generation_seconds": {"mean": float(np.mean(spent)), "each": spent} if own else None,
                "passes_per_image": own[0].passes if own else None,
                "settings": own[0].settings if own else None,
            }
        shown = ("arm", "victim", "seed", *MEASURED)
        return {
            "benchmark": NAME,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "task": f"PneumoniaMNIST 28x28, {len(data.train.labels)} training images, as many of each class",
            "split": self.split,
            "data_sha256": hashlib.sha256(self.data.read_bytes()).hexdigest(),
            "images": {"train": _per_class(data, data.train), self.split: _per_class(data, data.test)},
            "seeds": {"victims": list(range(self.seeds)), "fits": list(range(self.fits)), "subset": 0},
            "budget": str(Budget.parse(self.epsilon)),
            "chance": chance,
            "methods": methods,
            "victim_recipe": {**field.recipe, "augment": str(field.task.augment)},
            "rows": {"columns": shown, "values": [[row[column] for column in shown] for row in rows]},
            "overrides": self.overrides,
            "seconds": seconds,
            "versions": versions(),
            "machine": machine(),
            "note": NOTE,
        }


def _gap(gap: Mapping[str, Any]) -> dict[str, Any]:
    by_victim = {
        victim: {key: found[key] for key in ("mean", "low", "high")} for victim, found in gap["by_victim"].items()
    }
    return {**gap, "by_victim": by_victim}


def _per_class(data: DataSet, part: Part) -> dict[str, int]:
    return {name: int((part.labels == index).sum()) for index, name in enumerate(data.classes)}


def table(results: Mapping[str, Any]) -> str:
    """The results in Markdown."""
    lines = ["| method | balanced accuracy | AUC | closed gap | PSNR | SSIM | changed | seconds | passes per image |"]
    lines.append("| --- " * 9 + "|")
    for name, found in results["methods"].items():
        cells = [name]
        for metric in (METRIC, "auc"):
            mean, std = (found["all"][metric][key] for key in ("mean", "std"))
            cells.append(_number(mean, ".3f") + (f" +- {std:.3f}" if std is not None else ""))
        gap, kept = (found["closed_gap"] or {}).get(METRIC), found["fidelity"]
        cells.append("" if gap is None or gap["mean"] is None else "{mean:.2f} ({low:.2f} to {high:.2f})".format(**gap))
        cells += [_number(kept["psnr"]["mean"], ".1f"), _number(kept["ssim"]["mean"], ".3f")] if kept else ["", ""]
        cells.append(_number(kept["mask_fraction"]["mean"], ".3f") if kept else "")
        cells.append(_number(found["generation_seconds"]["mean"], ".1f") if kept else "")
        cells.append(_number(found["passes_per_image"].get("total"), ".1f") if kept else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="pneumoniamnist.npz")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks/pneumoniamnist"), help="folder of the fits")
    parser.add_argument(
        "--split", choices=("val", "test"), default="val", help="clean images that victims are tested on"
    )
    parser.add_argument("--seeds", type=int, default=5, help="trainings of every victim in every arm")
    parser.add_argument("--fits", type=int, default=3, help="fits of every method, with different seeds")
    parser.add_argument("--train-size", type=int, default=1200, help="training images, as many of each class")
    parser.add_argument("--epochs", type=int, help="of a victim; default: as in the shipped study")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=COMPARED, metavar="NAME", help="what to compare"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of a fit; more only on an idle machine")
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run finished")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    if not asked.resume:
        shutil.rmtree(asked.work, ignore_errors=True)
        asked.output.with_suffix(".rows.jsonl").unlink(missing_ok=True)
    asked.work.mkdir(parents=True, exist_ok=True)
    options = {name: getattr(asked, name) for name in ("split", "seeds", "fits", "train_size", "epochs", "methods")}
    print(table(Benchmark(asked.data, asked.output, asked.work, **options).run()))


if __name__ == "__main__":
    main()
