# SPDX-License-Identifier: Apache-2.0
"""Is a cohort still protected when half of it was protected later, by the surrogate of the first half?

    python benchmarks/later_cases.py --output benchmarks/results/later_cases.json

The embedded 2D classification cohort under the shipped configuration. The training patients are halved; victims train
on all of them and are tested on the clean test split.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arena_data import Part, part_of
from methods import trained
from monai.utils import set_determinism
from setting import command_line, configured, write
from torch import Tensor

from monai_salm.cohorts.demo import write_demo_export
from monai_salm.engines import PerturbationTrainer
from monai_salm.io.base import Case
from monai_salm.release.labels import Cohort, load_cohort
from monai_salm.verification.strength import closed_gap, summarize
from monai_salm.verification.training import train_network
from monai_salm.verification.victims import METRIC

BUNDLE = "salm_2d_classification"
SEEDS = 3
"""Fits, and trainings of every victim in every arm."""
COLUMNS = ("arm", "victim", "seed", METRIC, "auc", "seconds")
NOTE = (
    "one_fit: all training cases in one fit. later: one half of the patients fitted, the other half perturbed by that "
    "surrogate. later_unprotected: the same, but the other half is released clean.",
    "Seed s of a victim decides its start, order and augmentation in every arm, and is trained on fit s.",
    "Fits and victims see no case of the splits val and test; nothing was chosen by this benchmark.",
    "Closed gaps are over chance.",
)


def halves(cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """The cases of every other patient, and the rest; patients in the order of their pseudonyms, which is none."""
    patients = sorted({case.group for case in cases})
    first = set(patients[::2])
    return [case for case in cases if case.group in first], [case for case in cases if case.group not in first]


def fit(work: Path, part: Part, values: Mapping[str, Any], surrogate: Path | None = None) -> PerturbationTrainer:
    """The trainer of a finished fit; what is in ``work`` is used again."""
    given = {"output_dir": str(work), "train::dataset": part.dataset}
    given["train::trainer::surrogate_file"] = None if surrogate is None else str(surrogate)
    set_determinism(seed=values["seed"])
    trainer = configured(BUNDLE, {**values, **given}).get_parsed_content("train::trainer")
    trainer.run()
    return trainer


def arms(
    work: Path, train: Part, old: Part, new: Part, values: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What victims see of all training cases in each arm, and what the fits of all and of the halves took."""
    seed, nothing = values["seed"], {name: np.zeros_like(image.stored, int) for name, image in new.images.items()}
    whole = fit(work / f"whole-{seed}", train, values)
    first = fit(work / f"first-{seed}", old, values)
    second = fit(work / f"second-{seed}", new, values, work / f"first-{seed}" / "models" / "model.pt")
    seconds = {"one_fit": whole.seconds, "first_half": first.seconds, "second_half": second.seconds}
    deltas = {"clean": None, "one_fit": whole.bank, "later": {**first.bank, **second.bank}}
    deltas["later_unprotected"] = {**first.bank, **nothing}
    return {arm: train.seen(own) for arm, own in deltas.items()}, seconds


def measure(cohort: Cohort, work: Path) -> dict[str, Any]:
    """Fit, train and describe."""
    started, rows, spent = time.monotonic(), [], {}
    values = {"device": "cpu", "num_classes": len(cohort.classes)}
    shipped = configured(BUNDLE, values)
    victims = {name: shipped.get_parsed_content(f"study::victims::{name}") for name in shipped["study::victims"]}
    size = tuple(shipped.get_parsed_content("spatial_size"))
    task, recipe = trained(cohort.classes, size)
    train, test, old, new = (part_of(each, size) for each in (cohort.train, cohort.held_out, *halves(cohort.train)))
    tested = test.seen(), test.labels
    for seed in range(SEEDS):
        shown, spent[seed] = arms(work, train, old, new, {**values, "seed": seed})
        for arm, images in shown.items():
            options = {"seed": seed, "curve_points": 1, **recipe}
            for victim, make in victims.items():
                found = train_network(task, make, (images, train.labels), tested, **options)
                rows.append({"arm": arm, "victim": victim, "seed": seed, **found.row})
                print(*(rows[-1][name] for name in COLUMNS), flush=True)
    described, chance = summarize(rows, METRIC), task.chance
    return {
        "task": "embedded 2D cohort, brain MR slices with or without a simulated lesion",
        "images": {"first_half": len(old.labels), "second_half": len(new.labels), "test": len(test.labels)},
        "seeds": {"victims": SEEDS, "fits": SEEDS},
        "budget": str(shipped["epsilon"]),
        "chance": chance,
        "arms": {arm: described[arm] for arm in shown},
        "closed_gap": {arm: closed_gap(rows, METRIC, arm, chance=chance) for arm in shown if arm != "clean"},
        "fit_seconds": spent,
        "victim_recipe": {**recipe, "augment": str(task.augment)},
        "rows": {"columns": COLUMNS, "values": [[row[name] for name in COLUMNS] for row in rows]},
        "seconds": time.monotonic() - started,
        "note": NOTE,
    }


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--work", type=Path, help="folder to keep cohort and fits in (default: a temporary one)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        write_demo_export(work / "export", 2, progress=False)
        results = measure(load_cohort(work / "export", spatial_dims=2), work)
    write("later_cases", results, options.output)
    for arm, found in results["arms"].items():
        print(arm, json.dumps(found["all"]))


if __name__ == "__main__":
    main()
