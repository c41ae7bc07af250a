# SPDX-License-Identifier: Apache-2.0
"""Is a cohort still protected when half of it was protected later, by the surrogate of the first half?

    python benchmarks/later_cases.py --output benchmarks/results/later_cases.json

The embedded 2D classification cohort under the shipped configuration. The training patients are halved; victims train
on all of them and are tested on the clean test split.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset
from monai.utils import set_determinism
from setting import configured, machine, versions

from monai_salm.cohorts.demo import write_demo_export
from monai_salm.io import formats
from monai_salm.io.base import Case
from monai_salm.release.labels import load_cohort
from monai_salm.transforms import LoadStoredd
from monai_salm.verification.arms import Deltas, perturbed
from monai_salm.verification.results import write_atomically
from monai_salm.verification.strength import closed_gap, summarize
from monai_salm.verification.training import train_network
from monai_salm.verification.victims import METRIC, Classification

BUNDLE = "salm_2d_classification"
ARMS = ("clean", "one_fit", "later", "later_unprotected")
NOTE = (
    "one_fit: all training cases in one fit. later: one half of the patients fitted, the other half perturbed by that "
    "surrogate. later_unprotected: the same, but the other half is released clean.",
    "Seed s of a victim decides its start, order and augmentation in every arm, and is trained on fit s modulo fits.",
    "Fits and victims see no case of the splits val and test; nothing was chosen by this benchmark.",
    "Closed gaps are over chance.",
)


def halves(cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """The cases of every other patient, and the rest; patients in the order of their pseudonyms, which is none."""
    patients = sorted({case.group for case in cases})
    first = set(patients[::2])
    return [case for case in cases if case.group in first], [case for case in cases if case.group not in first]


class Benchmark:
    """One run.

    Args:
        work: folder of the cohort and the fits; what is finished there is used again.
        arms: what victims are trained on, ``clean`` among them.
        victims: those of the shipped study; None: all.
        seeds: trainings of every victim in every arm.
        fits: fits with different seeds.
        patients: of the cohort; None: as many as the demo has.
        epochs: of a victim; None: as in the shipped study.
    """

    def __init__(
        self,
        work: Path,
        *,
        arms: Sequence[str] = ARMS,
        victims: Sequence[str] | None = None,
        seeds: int = 3,
        fits: int = 3,
        patients: int | None = None,
        epochs: int | None = None,
    ) -> None:
        self.work, self.arms, self.seeds, self.fits = work, tuple(arms), seeds, min(fits, seeds)
        self.seconds: dict[int, dict[str, float]] = {}
        write_demo_export(work / "export", 2, n_patients=patients, progress=False)
        self.cohort = load_cohort(work / "export", spatial_dims=2)
        self.overrides = {"device": "cpu", "num_classes": len(self.cohort.classes)}
        config = configured(BUNDLE, self.overrides)
        shipped = ("epochs", "batch_size", "learning_rate", "weight_decay")
        self.recipe = {name: config.get_parsed_content(f"study::{name}") for name in shipped}
        if epochs is not None:
            self.recipe["epochs"] = epochs
        chosen = victims or tuple(config["study::victims"])
        self.victims = {name: config.get_parsed_content(f"study::victims::{name}") for name in chosen}
        size = config.get_parsed_content("spatial_size")
        self.task = Classification(self.cohort.classes, config.get_parsed_content("view"), tuple(size))
        self.budget = str(config["epsilon"])
        self._load = LoadStoredd("image", spatial_dims=2)

    def run(self, output: Path) -> dict[str, Any]:
        """Fit, train and describe; the results of the seeds so far are written after each."""
        started, rows, results = time.monotonic(), [], {}
        test = self._seen(self.cohort.held_out, {})
        for seed in range(self.seeds):
            for arm, data in self._data(seed % self.fits).items():
                for victim, make in self.victims.items():
                    options = {**self.recipe, "seed": seed, "curve_points": 1}
                    row = train_network(self.task, make, data, test, **options).row
                    rows.append({"arm": arm, "victim": victim, "seed": seed, **row})
                    print(arm, victim, seed, round(row[METRIC], 3), f"{time.monotonic() - started:.0f} s", flush=True)
            results = self._results(rows, time.monotonic() - started)
            write_atomically(json.dumps(results, indent=1, allow_nan=False) + "\n", output)
        return results

    def _data(self, fit: int) -> dict[str, Any]:
        old, new = halves(self.cohort.train)
        whole = self._perturbed(f"whole-{fit}", self.cohort.train, fit)
        first = self._perturbed(f"first-{fit}", old, fit)
        second = self._perturbed(f"second-{fit}", new, fit, self.work / f"first-{fit}" / "models" / "model.pt")
        of_old = {case.sample_id: first.bank[case.sample_id] for case in old}
        deltas: dict[str, Deltas] = {
            "clean": {},
            "one_fit": {case.sample_id: whole.bank[case.sample_id] for case in self.cohort.train},
            "later": of_old | {case.sample_id: second.bank[case.sample_id] for case in new},
            "later_unprotected": of_old,
        }
        self.seconds[fit] = {"one_fit": whole.seconds, "first_half": first.seconds, "second_half": second.seconds}
        return {name: self._seen(self.cohort.train, deltas[name]) for name in self.arms}

    def _perturbed(self, name: str, cases: Sequence[Case], seed: int, surrogate: Path | None = None) -> Any:
        values = {
            **self.overrides,
            "seed": seed,
            "output_dir": str(self.work / name),
            "train::dataset": self._read(cases),
        }
        if surrogate is not None:
            values["train::trainer::surrogate_file"] = str(surrogate)
        set_determinism(seed=seed)
        trainer = configured(BUNDLE, values).get_parsed_content("train::trainer")
        trainer.run()
        return trainer

    def _read(self, cases: Sequence[Case]) -> CacheDataset:
        items = [{"image": case, "label": case.label} for case in cases]
        return CacheDataset(items, self._load, copy_cache=False, progress=False)

    def _seen(self, cases: Sequence[Case], deltas: Deltas) -> tuple[torch.Tensor, torch.Tensor]:
        """What a victim sees of the cases, with the perturbations that there are."""
        images = []
        for case in cases:
            image = formats.read(case, 2)
            delta = deltas.get(case.sample_id, np.zeros_like(image.stored, int))
            images.append(self.task.view(perturbed(image, delta)))
        return torch.stack(images), torch.tensor([case.label for case in cases])

    def _results(self, rows: Sequence[dict[str, Any]], spent: float) -> dict[str, Any]:
        chance, described = self.task.chance, summarize(rows, METRIC)
        old, new = halves(self.cohort.train)
        shown = ("arm", "victim", "seed", METRIC, "auc", "seconds")
        return {
            "benchmark": "later_cases",
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "task": "embedded 2D cohort, brain MR slices with or without a simulated lesion",
            "images": {"first_half": len(old), "second_half": len(new), "test": len(self.cohort.held_out)},
            "seeds": {"victims": len({row["seed"] for row in rows}), "fits": len(self.seconds)},
            "budget": self.budget,
            "chance": chance,
            "arms": {arm: described[arm] for arm in self.arms},
            "closed_gap": {arm: closed_gap(rows, METRIC, arm, chance=chance) for arm in self.arms if arm != "clean"},
            "fit_seconds": self.seconds,
            "victim_recipe": {**self.recipe, "augment": str(self.task.augment)},
            "rows": {"columns": shown, "values": [[row[column] for column in shown] for row in rows]},
            "seconds": spent,
            "versions": versions(),
            "machine": machine(),
            "note": NOTE,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--work", type=Path, help="folder to keep cohort and fits in (default: a temporary one)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="what victims are trained on")
    parser.add_argument("--victims", nargs="+", help="of the shipped study (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of every victim in every arm")
    parser.add_argument("--fits", type=int, default=3, help="fits with different seeds")
    parser.add_argument("--patients", type=int, help="of the cohort (default: those of the demo)")
    parser.add_argument("--epochs", type=int, help="of a victim (default: those of the shipped study)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        choices = {name: getattr(options, name) for name in ("arms", "victims", "seeds", "fits", "patients", "epochs")}
        results = Benchmark(work, **choices).run(options.output)
    for arm, found in results["arms"].items():
        print(arm, json.dumps(found["all"]))


if __name__ == "__main__":
    main()
