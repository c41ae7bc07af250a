# SPDX-License-Identifier: Apache-2.0
"""Small fits for tests: cases, trainers of either task, and what ends them early."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from ignite.engine import Events
from monai.data import MetaTensor
from torch import nn

from monai_salm.engines import PerturbationTrainer
from monai_salm.perturbations.base import Objective
from monai_salm.perturbations.masks import SparsityMask
from monai_salm.perturbations.salm import SALM
from monai_salm.perturbations.voxels import VoxelObjective
from monai_salm.stored import StoredCodec
from monai_salm.surrogates import PaddedNetwork, RandomView, SmallCNN, Surrogate


class Killed(BaseException):
    """Stands for a kill between two rounds."""


def stored(image: torch.Tensor, name: str, codec: StoredCodec | None = None) -> MetaTensor:
    """A stored image as LoadStored gives it."""
    codec = codec or StoredCodec("uint8", (0.0, 255.0))
    return MetaTensor(image, meta={"sample_id": name, "stored_codec": codec.to_meta(), "intensity": "stored"})


def cases(count: int = 10, shapes=((12, 12), (10, 14)), label=lambda at: at % 2) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    items = []
    for at in range(count):
        image = torch.randint(120, 136, (1, *shapes[at % len(shapes)]), generator=generator).to(torch.uint8)
        items.append({"image": stored(image, f"case-{at}"), "label": label(at)})
    return items


def trainer(folder, dataset=None, rounds=3, steps=2, **options) -> PerturbationTrainer:
    torch.manual_seed(0)
    surrogate = Surrogate(SmallCNN(2, 1, 2, (4, 8)), (12, 12))
    given = {
        "objective": Objective(surrogate, nn.CrossEntropyLoss(reduction="none"), view=RandomView(2)),
        "device": "cpu",
        "max_epochs": rounds,
        "surrogate_steps": 3,
        "batch_size": 4,
        "perturbation": SALM(mask=SparsityMask(ratio=0.4), steps=steps),
        "budget": "8/255",
    } | options
    given.setdefault("optimizer", torch.optim.Adam(given["objective"].network.parameters(), 1e-2))
    return PerturbationTrainer(
        dataset=cases() if dataset is None else dataset, bank_file=folder / "bank.sqlite", **given
    )


VOLUMES = {2: ((14, 12), (10, 16), (6, 7)), 3: ((10, 8, 7), (8, 9, 10), (12, 6, 1))}


def volumes(dims: int, count: int = 7, classes: int = 3, shapes=None) -> list[dict]:
    """Cases with voxel labels; the last one has no foreground."""
    items = cases(count, shapes or VOLUMES[dims])
    for at, item in enumerate(items):
        label = torch.zeros(item["image"].shape, dtype=torch.uint8)
        for index in range(1, classes if at < count - 1 else 1):
            label[(..., *[slice(2 * index, 2 * index + 2), slice(3, 6), slice(0, 3)][:dims])] = index
        item["label"] = MetaTensor(label, meta={"sample_id": item["image"].meta["sample_id"]})
    return items


def segmenter(dims: int, classes: int = 3, guarded: bool = False) -> Surrogate:
    torch.manual_seed(0)
    conv, norm = ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[dims - 2]

    def network() -> nn.Module:
        layers = [conv(1, 6, 3, padding=1), norm(6), nn.ReLU(), conv(6, classes, 3, padding=1)]
        return PaddedNetwork(nn.Sequential(*layers), 2)

    return Surrogate(network(), guard=network() if guarded else None)


def voxel_trainer(
    folder, dims=2, dataset=None, steps=2, tile=8, halo=2, method=None, surrogate=None, guard=0.0, axes=None, **options
):
    surrogate = surrogate or segmenter(dims, guarded=guard > 0)
    given = {"view": RandomView(dims), "tile_size": (tile,) * (axes or dims), "halo": halo, "guard_weight": guard}
    options["objective"] = VoxelObjective(surrogate, nn.CrossEntropyLoss(reduction="none"), **given)
    options["perturbation"] = method or SALM(mask=SparsityMask(ratio=0.3, scope="class"), steps=steps)
    return trainer(folder, volumes(dims) if dataset is None else dataset, rounds=2, **options)


class Kill:
    """Ends a fit before its second round, or within it."""

    def __init__(self, event: Events, at: int) -> None:
        self.event, self.at = event, at

    def attach(self, engine):
        engine.add_event_handler(self.event(once=self.at), self)

    def __call__(self, engine):
        raise Killed


EACH_KIND = {"classes": trainer, "slices": voxel_trainer, "volumes": partial(voxel_trainer, dims=3)}
each_kind = pytest.mark.parametrize("make", EACH_KIND.values(), ids=EACH_KIND)
