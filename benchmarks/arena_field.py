# SPDX-License-Identifier: Apache-2.0
"""One data set of the arena: its fits at the asked budgets, what third parties train on, and their trainings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arena_cells import AGAIN, ELSEWHERE, NO_DEFENSE, WITHOUT_FIT, Cell
from arena_data import DataSet, Part, VoxelPart
from methods import UNBOUNDED, Fitted, fit, methods_of, trained, victims
from releases import RELEASES, TURNED, Copies, separable, turned
from setting import versions
from torch import Tensor

from monai_salm.io.base import StoredImage
from monai_salm.verification.arms import Arm, Deltas, VolumeArm
from monai_salm.verification.defenses import DEFENSES
from monai_salm.verification.description import described
from monai_salm.verification.fidelity import SSIM_CASES, Fidelity, ssim_sample
from monai_salm.verification.jobs import Job, Ledger, run_jobs
from monai_salm.verification.leakage import LEAKAGE_CASES, Leakage
from monai_salm.verification.training import Recipe, victim_digest

__all__ = ["MEASURED", "OF_FIT", "OF_VOXELS", "Field", "fidelity"]

BASE_255THS = 8
"""Budget that the search for a PSNR starts from."""
PSNR_FITS = 4
"""Most fits of one search."""
MEASURED = ("balanced_accuracy", "auc", "accuracy", "dice", "hd95", "dice_per_class", "seconds")
"""Columns of a training."""
OF_FIT = ("epsilon", "psnr", "ssim", "changed", "fit_seconds", "passes", "linear_images", "linear_delta", "leakage")
"""Columns of the fit that a training saw. ``linear_*``: how well a logistic regression reads classes off one half of
the training cases after it was fitted to the other half: from the protected images (clean ones for the clean method),
and from the perturbations alone. ``leakage``: Dice of the best simple guess of the labels from these."""
OF_VOXELS = ("dice", "hd95", "dice_per_class", "leakage")
"""Those of data sets with voxel labels; their others are empty."""


class Field:
    """One data set with its fits, arms and trainings.

    Args:
        name: of the data set.
        config: as in ``arena.yaml``, and the ``device`` that fits and trainings compute on (default: CPU).
        data: the data set.
        work: folder of the fits.
    """

    def __init__(self, name: str, config: Mapping[str, Any], data: DataSet, work: Path) -> None:
        self.name, self.config, self.data, self.work = name, config, data, work
        self.device = str(config.get("device", "cpu"))
        self._fits: dict[tuple[str, str, int], tuple[Fitted, str]] = {}
        self._described: dict[tuple[str, str, int], dict[str, Any]] = {}
        self.task, recipe = trained(data.classes, data.train.size, data.voxelwise)
        self.recipe = recipe | {"epochs": config["epochs"][name]}

    # -------------------------------------------------------------------- fits

    def fitted(self, level: str, method: str, seed: int) -> tuple[Fitted, str]:
        """Perturbations, and the budget that they were fitted with.

        Args:
            level: a budget, or a mean PSNR such as ``"36 dB"``: methods with the setting ``psnr`` keep it in each
                image, for others the budget is chosen.
            method: of ``methods.methods_of``.
            seed: of the fit; with ``AGAIN`` the same images once more, with ``ELSEWHERE`` the spare images, both at
                the budget of the seed without it.
        """
        key = level, method, seed
        if key not in self._fits:
            self._fits[key] = self._fit(level, method, seed)
        return self._fits[key]

    def _fit(self, level: str, method: str, seed: int) -> tuple[Fitted, str]:
        part = self.data.spare if seed >= ELSEWHERE else self.data.fitted
        wanted = float(level.removesuffix("dB")) if level.endswith("dB") else None
        own, voxelwise = methods_of(self.data.voxelwise)[method].overrides, self.data.voxelwise
        shared = {**self.config["fit"], **({} if wanted is None or voxelwise else {"psnr": wanted})}
        shared = {name: value for name, value in shared.items() if name not in own}

        def at(epsilon: str) -> Fitted:
            overrides = {**shared, "device": self.device}
            given = part.dataset, len(self.data.classes), self.data.fit_size, seed, epsilon, self.work
            return fit(method, *given, overrides, voxelwise)

        if method in UNBOUNDED:
            epsilon = own["epsilon"]
            return at(epsilon), epsilon
        if seed >= AGAIN:
            epsilon = self.fitted(level, method, seed % AGAIN)[1]
            return at(epsilon), epsilon
        if wanted is None:
            return at(level), level
        levels = BASE_255THS
        tried: dict[int, tuple[float, Fitted]] = {}
        # Whole 255ths: what an image of 8 bits can hold. What keeps a PSNR by itself is there at once.
        while levels not in tried and len(tried) < PSNR_FITS:
            found = at(f"{levels}/255")
            psnr = fidelity(part, found, ssim=False)["psnr"]["mean"]
            tried[levels] = abs(psnr - wanted), found
            levels = max(1, round(levels * 10 ** ((psnr - wanted) / 20)))
        best = min(tried, key=lambda each: tried[each][0])
        return tried[best][1], f"{best}/255"

    # -------------------------------------------------------------------- arms

    @cached_property
    def _clean(self) -> Tensor | list[Tensor]:
        return self.data.train.seen()

    def _released(self, cell: Cell) -> Tensor | list[Tensor]:
        """What a cell's third party trains on, before its defense."""
        if cell.method == "clean":
            return self._clean
        if cell.method == "blind":
            return self.data.train.noise(self._seed(cell))
        seed = self._seed(cell)

        def seen(part: Part, offset: int) -> Tensor:
            return part.seen(self.fitted(cell.level, cell.method, seed + offset)[0].deltas)

        if self.data.voxelwise:  # images of a size of their own, which are released as they are
            return seen(self.data.train, 0)
        copies = Copies(
            self._clean,
            seen(self.data.train, 0),
            self.data.train.labels,
            seed,
            lambda: seen(self.data.train, AGAIN),
            lambda: (self.data.spare.seen(), seen(self.data.spare, ELSEWHERE)),
            self.work,
        )
        return RELEASES[cell.release](copies)

    def _seed(self, cell: Cell) -> int:
        return cell.seed % self.config["fits"]

    def _arm(self, cell: Cell, path: Path) -> Arm | VolumeArm:
        if cell.method == "own_clean":
            return self._write(path, cell.release, (self.data.spare.seen(), self.data.spare.truths))
        return self._write(path, cell.release, (self._released(cell), self.data.train.truths))

    def _test(self, release: str, path: Path) -> Arm | VolumeArm:
        """Test cases, then the third party's own clean ones."""
        return self._write(path, release, *((part.seen(), part.truths) for part in (self.data.test, self.data.spare)))

    def _write(self, path: Path, release: str, *parts: tuple[Any, Sequence[Any]]) -> Arm | VolumeArm:
        """An arm of (images, what is kept beside each)."""
        writer = self.task.writer(path)
        for images, truths in parts:
            if release == TURNED:
                images, labels = turned(images)
                truths = labels.tolist()
            for image, truth in zip(images, truths, strict=True):
                writer.add(image, truth)
        return writer.close()

    # --------------------------------------------------------------- trainings

    def train(self, asked: Sequence[Cell], folder: Path, rows: Path, workers: int) -> list[dict[str, Any]]:
        """Do the trainings that are not done, and give a row of the table for each.

        Args:
            asked: cells of this data set.
            folder: an empty folder for arms.
            rows: where finished trainings are kept.
            workers: processes.
        """
        jobs = self._jobs(asked, folder)
        done = Rows(rows, {job.key: "/".join(map(str, asdict(cell).values())) for cell, job in jobs.items()})
        print(f"{self.name}: {_estimate(jobs, done, workers)}", flush=True)
        run_jobs(list(jobs.values()), done, workers)
        return [
            asdict(cell) | {name: _plain(done[job].get(name)) for name in MEASURED} | self._of_fit(cell)
            for cell, job in jobs.items()
        ]

    def _jobs(self, asked: Sequence[Cell], folder: Path) -> dict[Cell, Job]:
        channels, kinds = len(self._clean[0]), dict[str, str]()
        makers = victims(len(self.data.classes), self.data.train.size, channels, self.data.voxelwise)
        recipes: dict[str, Callable[..., Recipe]] = {each.name: each.recipe for each in DEFENSES}
        recipes[NO_DEFENSE] = Recipe
        arms: dict[tuple[Any, ...], Arm | VolumeArm] = {}
        tests: dict[bool, Arm | VolumeArm] = {}
        n_test = len(self.data.test.images)
        found = {}
        for cell in asked:
            shown = (cell.level, cell.method, cell.release, self._seed(cell))
            if shown not in arms:
                arms[shown] = self._arm(cell, folder / f"{len(arms)}.f32")
            other = cell.release == TURNED
            if other not in tests:
                tests[other] = self._test(cell.release, folder / f"test{len(tests)}.f32")
            arm, test, make, recipe = arms[shown], tests[other], makers[cell.victim], recipes[cell.defense]
            spare = tuple(range(n_test, test.count))
            if cell.victim not in kinds:
                probe = torch.zeros(2, channels, *self.data.train.size)
                kinds[cell.victim] = victim_digest(make, probe, *self.task.output)
            training = self.recipe | self.config.get("recipes", {}).get(cell.victim, {})
            decisive = [arm.digest, test.digest, spare, kinds[cell.victim], cell.seed, training, self.task.describe()]
            decisive += [described(recipe), versions(), torch.device(self.device).type]
            key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
            options = {**training, "seed": cell.seed, "curve_points": 1, "device": self.device}
            found[cell] = Job(key, make, arm, test, self.task, options, False, recipe, spare)
        return found

    def _of_fit(self, cell: Cell) -> dict[str, Any]:
        """Columns of the fit that a training saw."""
        key = cell.level, cell.method, self._seed(cell)
        if key not in self._described:
            self._described[key] = self._measured(*key)
        return self._described[key]

    def _measured(self, level: str, method: str, seed: int) -> dict[str, Any]:
        part, voxelwise = self.data.train, self.data.voxelwise
        if method == "clean" and not voxelwise:
            return {"linear_images": separable(self._clean, part.labels)}
        if method in WITHOUT_FIT:
            return {}
        found, epsilon = self.fitted(level, method, seed)
        kept = fidelity(self.data.fitted, found)
        row = {
            "epsilon": epsilon,
            "psnr": kept["psnr"]["mean"],
            "ssim": kept["ssim"]["mean"],
            "changed": kept["mask_fraction"]["mean"],
            "fit_seconds": found.seconds,
            "passes": found.passes.get("total"),
        }
        if voxelwise:
            return row | {"leakage": leakage(part, found.deltas)}
        protected = part.seen(found.deltas)
        linear = {"images": separable(protected, part.labels), "delta": separable(protected - self._clean, part.labels)}
        return row | {f"linear_{name}": accuracy for name, accuracy in linear.items()}


class Rows(Ledger):
    """Finished trainings with their names, without curves and weights, so that a run that was killed goes on."""

    def __init__(self, path: Path, names: Mapping[str, str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(path.parent, path.name)
        self._names = names

    def add(self, key: str, row: Mapping[str, Any], weights: bytes | None, **told: str) -> None:
        kept = {name: value for name, value in row.items() if name != "curve"}
        super().add(key, kept, None, training=self._names[key], **told)


def _estimate(jobs: Mapping[Cell, Job], done: Rows, workers: int) -> str:
    """How much is to be done and, once there are finished trainings to judge by, about how long it takes."""
    spent: dict[str, list[float]] = {}
    for cell, job in jobs.items():
        if job in done and cell.defense == NO_DEFENSE:
            spent.setdefault(cell.victim, []).append(done[job]["seconds"])
    left = {job.key: cell for cell, job in jobs.items() if job not in done}
    text = f"{len(left)} of {len(jobs)} trainings to do"
    if left and all(cell.victim in spent for cell in left.values()):
        costs = {defense.name: defense.cost for defense in DEFENSES}
        seconds = sum(costs.get(cell.defense, 1.0) * float(np.mean(spent[cell.victim])) for cell in left.values())
        text += f", about {seconds / workers / 60:.0f} min"
    return text


def fidelity(part: Part, fitted: Fitted, *, ssim: bool = True) -> dict[str, Any]:
    """What a fit keeps of the images, as :py:meth:`monai_salm.verification.fidelity.Fidelity.result`.

    Args:
        part: the images.
        fitted: perturbations of them.
        ssim: measure it, of a sample of the images.
    """
    kept, sample = Fidelity(), ssim_sample(part.images, SSIM_CASES[2] if ssim else 0)
    for name, image in part.images.items():
        moved = StoredImage(image.codec.add(image.stored, np.asarray(fitted.deltas[name])), image.codec)
        kept.add(image, moved, ssim=name in sample)
    return kept.result()


def leakage(part: VoxelPart, deltas: Deltas) -> float | None:
    """What perturbations give away of the labels, as a study measures it: Dice, mean over a sample of the cases."""
    found, sample = Leakage(), ssim_sample(part.images, LEAKAGE_CASES)
    for name, (label, _) in zip(part.images, part.truths, strict=True):
        if name in sample:
            found.add("all", deltas[name], label.numpy() > 0)
    return found.result()["all"]["best"]["mean"]


def _plain(value: Any) -> Any:
    """A cell of the table; one value per class is ``name=value;name=value``."""
    if not isinstance(value, Mapping):
        return value
    return ";".join(f"{name}={each:.4f}" for name, each in value.items() if each is not None)
