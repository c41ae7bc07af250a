# SPDX-License-Identifier: Apache-2.0
"""The methods that ``pneumoniamnist.py`` compares, how they are fitted, and the victims."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from monai.data import CacheDataset
from monai.networks.nets import DenseNet
from monai.utils import set_determinism
from setting import configured
from torch import nn

from monai_salm.io.base import StoredImage
from monai_salm.perturbations.budget import Budget
from monai_salm.verification.arms import Deltas, generator_of, random_signs

SIZE = (28, 28)
EM_AS_PUBLISHED = {
    "mask_ratio": 1.0,
    "transplant": False,
    "rounds": 15,
    "surrogate_steps": 20,
    "perturbation_steps": 20,
    "perturbation::step_size": 0.1,
    "perturbation::momentum": 0.0,
    "perturbation::refresh": "call",
}
"""Alternating min-min steps with the 20 plain sign steps of a tenth of the budget of arXiv 2101.04898; surrogate and
perturbation see the same random views as in all other fits. A mask of "once" would keep voxels that a round left at 0
out of all later rounds."""


@dataclass(frozen=True)
class Method:
    """How an arm comes about: a trainer of the configuration with other values, or a function of image and seed."""

    overrides: Mapping[str, Any] | None = None
    trainer: str = "train::trainer"

    @property
    def ratio(self) -> float | None:
        return None if self.overrides is None else self.overrides["mask_ratio"]


METHODS: dict[str, Method] = {
    "clean": Method(),
    "random_noise": Method(),
    "random_mask_0.4": Method({"mask_ratio": 0.4}, "control::trainer"),
    "em": Method(EM_AS_PUBLISHED),
    "salm_1.0": Method({"mask_ratio": 1.0}),
    "salm_0.4": Method({"mask_ratio": 0.4}),
    "salm_0.2": Method({"mask_ratio": 0.2}),
    "salm_0.1": Method({"mask_ratio": 0.1}),
    "blind": Method(),
}
"""``random_noise``: random signs of the full budget in every voxel; ``blind``: uniform noise with the true labels."""


@dataclass(frozen=True)
class Fitted:
    """Perturbations by ``sample_id``, and what they cost."""

    deltas: Deltas
    seconds: float
    passes: dict[str, float]
    settings: dict[str, Any]


def fit(
    method: Method, dataset: CacheDataset, classes: int, seed: int, work: Path, overrides: Mapping[str, Any]
) -> Fitted:
    """Perturbations of the training cases; a finished fit of the same configuration is read from the work folder."""
    values = {"device": "cpu", "spatial_size": list(SIZE), "num_classes": classes, "seed": seed}
    values |= {**(method.overrides or {}), **overrides}
    name = hashlib.sha256(json.dumps([values, method.trainer], sort_keys=True).encode()).hexdigest()[:16]
    parser = configured("salm_2d_classification", {**values, "output_dir": str(work / name), "train::dataset": dataset})
    set_determinism(seed=seed)
    trainer = parser.get_parsed_content(method.trainer)
    trainer.run()
    asked = (
        "mask_ratio",
        "rounds",
        "surrogate_steps",
        "perturbation_steps",
        "batch_size",
        "learning_rate",
        "transplant",
    )
    settings = {key: parser.get_parsed_content(key) for key in asked}
    settings |= {"perturbation": repr(trainer.perturbation), "view": str(trainer.objective.view)}
    return Fitted(trainer.bank, trainer.seconds, trainer.passes_per_image, settings)


def random_noise(images: Mapping[str, StoredImage], budget: Budget, seed: int) -> Fitted:
    """Random signs of the full budget in every voxel."""
    start = time.monotonic()
    deltas = {name: random_signs(image, budget, generator_of(seed, "noise", name)) for name, image in images.items()}
    return Fitted(deltas, time.monotonic() - start, {}, {"method": "random signs"})


def victims(overrides: Mapping[str, Any]) -> dict[str, Callable[[], nn.Module]]:
    """Those of the shipped study, and a small DenseNet."""
    parser = configured("salm_2d_classification", overrides)
    shipped = {name: parser.get_parsed_content(f"study::victims::{name}") for name in parser["study::victims"]}
    sizes = {"init_features": 16, "growth_rate": 8, "block_config": (2, 2, 2)}
    dense = partial(DenseNet, spatial_dims=2, in_channels=1, out_channels=parser["num_classes"], **sizes)
    return {**shipped, "densenet": dense}
