# SPDX-License-Identifier: Apache-2.0
"""What protection does to networks that were trained on clean images and see protected ones: those in use already.

    python benchmarks/utility.py --data $MONAI_SALM_DATA --output benchmarks/results/utility.json

PneumoniaMNIST, as in the arena: networks are trained on 1,200 clean images, and tested on the test split, clean and as
each method perturbs it, and on their own training images. With a finished fit in ``--work`` nothing is fitted again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from arena_data import Part, load
from methods import fit, trained, victims
from setting import command_line, write
from torch import Tensor

from monai_salm.verification.strength import spread
from monai_salm.verification.training import train_network
from monai_salm.verification.victims import METRIC

DATA = {"archive": "pneumoniamnist.npz", "size": [28, 28], "train": 1200, "split": "test", "spare": 2}
METHODS = (
    ("salm_0.4", "8/255"),
    ("salm_0.4_full", "8/255"),
    ("salm_0.4_full", "12/255"),
    ("salm_0.4_full", "16/255"),
    ("tap", "8/255"),
)
"""Each with its budget."""
VICTIMS = ("small_cnn", "resnet10")
SEEDS = 2
"""Fits of each method, and networks of each kind; a network is tested on the images of every fit."""
EPOCHS = 4


def measure(data: Path, work: Path) -> dict[str, Any]:
    """Fit, train and compare."""
    images = load({**DATA, "spare_split": "val"}, data, work)
    size = images.train.size
    task, recipe = trained(images.classes, size)
    recipe["epochs"] = EPOCHS
    makers = victims(len(images.classes), size)
    parts = {"test": images.test, "training": images.train}
    clean = {name: _seen(part) for name, part in parts.items()}
    networks = {
        (victim, seed): train_network(
            task, makers[victim], clean["training"], clean["test"], seed=seed, curve_points=1, **recipe
        ).network
        for victim in VICTIMS
        for seed in range(SEEDS)
    }
    rows = []
    for method, epsilon in METHODS:
        for of_fit in range(SEEDS):
            fitted = fit(method, images.train.dataset, len(images.classes), size, of_fit, epsilon, work)
            deltas = {"training": fitted.deltas, "test": fitted.perturb(images.test.dataset)}
            for name, part in parts.items():
                protected = _seen(part, deltas[name])
                for (victim, seed), network in networks.items():
                    before, after = (task.evaluate(network, shown, 32) for shown in (clean[name], protected))
                    row = {"method": method, "budget": epsilon, "fit": of_fit, "images": name}
                    row |= {"victim": victim, "seed": seed}
                    rows.append(row | {"clean": before[METRIC], "protected": after[METRIC]})
                    rows[-1] |= {"clean_auc": before["auc"], "protected_auc": after["auc"]}
                    print(*rows[-1].values(), flush=True)
    return {
        "task": "PneumoniaMNIST, test split",
        "metric": METRIC,
        "seeds": {"fits": SEEDS, "victims": SEEDS},
        "victim_recipe": recipe,
        "change": [
            {"method": method, "budget": epsilon, **{name: _change(rows, method, epsilon, name) for name in parts}}
            for method, epsilon in METHODS
        ],
        "rows": rows,
    }


def _seen(part: Part, deltas: Any = None) -> tuple[Tensor, Tensor]:
    return part.seen(deltas), part.labels


def _change(rows: Sequence[dict[str, Any]], *of: str) -> dict[str, float | None]:
    """Protected minus clean, over networks and fits, of a method, a budget and a part of the images."""
    found = [row for row in rows if (row["method"], row["budget"], row["images"]) == of]
    return spread([row["protected"] - row["clean"] for row in found])


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the archive")
    parser.add_argument("--work", type=Path, help="folder to keep fits in (default: a temporary one)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write("utility", measure(options.data, options.work or Path(folder)), options.output)


if __name__ == "__main__":
    main()
