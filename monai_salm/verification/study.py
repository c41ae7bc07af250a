# SPDX-License-Identifier: Apache-2.0
"""The study: victims trained on clean, protected and control images, all tested on the same clean held-out cases."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.utils.data import Dataset

from monai_salm.engines import PerturbationTrainer
from monai_salm.io.base import Case, Window
from monai_salm.perturbations.budget import Budget, as_window
from monai_salm.release import commit as door
from monai_salm.release.custody import read_refusals
from monai_salm.release.identity import owner_id
from monai_salm.release.labels import Cohort
from monai_salm.release.manifest import IntegrityError
from monai_salm.release.protect import read_protected
from monai_salm.release.visibility import read_visibility
from monai_salm.surrogates import RandomView
from monai_salm.verification.arms import Arm, Deltas, VolumeArm
from monai_salm.verification.asked import check_settings, check_victims, seeds_of, task_of
from monai_salm.verification.defenses import defenses_of
from monai_salm.verification.jobs import Job, Ledger, default_workers, run_jobs
from monai_salm.verification.material import Material, Settings, own_arms
from monai_salm.verification.report import verdict_table, write_report
from monai_salm.verification.resistance import (
    Training,
    announcement,
    clean_part,
    defended,
    expected_seconds,
    resistance,
)
from monai_salm.verification.results import build_results, write_json
from monai_salm.verification.segmenters import Transforms
from monai_salm.verification.setting import fit_settings, machine, not_tested, seconds_of, versions
from monai_salm.verification.training import victim_digest
from monai_salm.verification.utility import utility_rows
from monai_salm.verification.verdict import PROTECTED, VerdictRules

__all__ = ["VictimStudy"]

EXIT_NOT_PROTECTED = 3
SCRATCH = f"{door.PRIVATE}/arms"


class VictimStudy:
    """Trains victims, measures fidelity and utility, writes ``report.json`` and ``report.html``.

    What victims learn follows from the cohort: to classify images, or to segment them where voxels have labels (then
    label leakage is measured too).

    Arms, all of the training cases that were written:

    - ``clean``: the originals.
    - ``protected``: the written files, read again from disk.
    - ``random_noise``: random signs of the full budget in every voxel.
    - ``label_marker``, in segmentation: a checkerboard of the full budget where the labels are, which every method that
      looks at the labels has to beat.
    - each of the ``controls`` of :py:meth:`run`, such as ``random_mask``.
    - ``blind``: uniform noise with the true labels.

    Written files are read with a window of their own, as a third party would, all other arms with the original's.

    Args:
        cohort: the labeled cases.
        output_dir: folder of the release: ``protected/`` and its manifest are read, the report is written.
        spatial_dims: 2 or 3.
        spatial_size: size of the victims' input in voxels. In classification images are resized to it once; in
            segmentation it is the size of a patch, and images keep their grid.
        victims: functions that build an untrained network of (B, C, *spatial_size) images, by name.
        budget: the bound that the perturbations were fitted with.
        window: ``"auto"`` or (low, high) in physical units, as for the fit.
        seeds: of each victim's trainings in each arm, or how many there are (0, 1, ...).
        epochs, batch_size, learning_rate, weight_decay: see
            :py:func:`monai_salm.verification.training.train_network`.
        augment: random views of the training images; classification.
        transforms: makes training patches of a labeled image, such as a ``Compose`` of random crops and MONAI's usual
            augmentation; segmentation, see :py:class:`monai_salm.verification.segmenters.Segmentation`.
        resample: voxel size of the study relative to the files'; segmentation.
        config: settings that the report shows, besides those that the trainer knows.
        eval_split: ``"test"``, or ``"val"`` to make choices without a look at the test cases.
        defenses: ``"standard"``, ``"full"``, or names of defenses that victims are trained with too, on the clean and
            the protected arm, see :py:mod:`monai_salm.verification.defenses`; they do not change the verdict.
        rules: arguments of :py:class:`monai_salm.verification.verdict.VerdictRules` that differ from the task's own.
        device: default: CUDA where there is one.
        workers: processes that train side by side on CPU; default one per core. They are started by ``spawn``: a
            script that runs a study needs ``if __name__ == "__main__":``.
        seed: of the arms that are random, such as ``random_noise`` and ``blind``.

    Raises:
        ValueError: When an argument is out of range.
    """

    def __init__(
        self,
        *,
        cohort: Cohort,
        output_dir: Path | str,
        spatial_dims: int,
        spatial_size: Sequence[int],
        victims: Mapping[str, Callable[[], nn.Module]],
        budget: Budget | str | float,
        window: Window = "auto",
        seeds: Sequence[int] | int = 3,
        epochs: int = 30,
        batch_size: int = 32,
        learning_rate: float = 3e-3,
        weight_decay: float = 1e-2,
        augment: RandomView | None = None,
        transforms: Transforms | None = None,
        resample: float = 1.0,
        config: Mapping[str, Any] | None = None,
        eval_split: str = "test",
        defenses: str | Sequence[str] | None = None,
        rules: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        workers: int | None = None,
        seed: int = 0,
    ) -> None:
        self.window, self.seeds = as_window(window), seeds_of(seeds)
        rates = {"learning_rate": learning_rate, "weight_decay": weight_decay}
        self.recipe: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, **rates}
        check_settings(spatial_dims, spatial_size, victims, self.seeds, self.recipe, workers)
        self.cohort, self.output_dir = cohort, Path(output_dir).absolute()
        self.tested = cohort.tested(eval_split)
        self.spatial_dims, self.spatial_size = spatial_dims, tuple(int(size) for size in spatial_size)
        self.victims, self.budget = dict(victims), Budget.parse(budget)
        self.learning = task_of(cohort, self.spatial_size, augment, transforms, resample)
        self.config, self.eval_split, self.seed = dict(config or {}), eval_split, seed
        self.defenses = defenses_of(defenses, self.cohort.voxelwise) if defenses else ()
        self.rules = VerdictRules(**{**self.learning.rules, **(rules or {})})
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.workers = default_workers(self.device) if workers is None else workers
        self.results: dict[str, Any] | None = None

    def check(self, in_channels: int) -> None:
        """Try each victim once on images of ``in_channels`` colors, before hours of a fit are spent for the study.

        Raises:
            ValueError: When one cannot be trained on images of this size, or its output does not fit the classes.
        """
        size = (in_channels, *self.spatial_size)
        check_victims(self.victims, size, len(self.cohort.classes), self.cohort.voxelwise)

    def run(
        self,
        trainer: PerturbationTrainer | None = None,
        controls: Mapping[str, PerturbationTrainer | Deltas] | None = None,
        held_out: Dataset | None = None,
    ) -> dict[str, Any]:
        """Do what is not done yet, write the report and print the verdict.

        Args:
            trainer: made the perturbations; the report shows its settings, passes and seconds.
            controls: further arms by name, as trainers or as perturbations by ``sample_id``; None is no arm.
            held_out: items, as for the trainer, of cases that were not released: it perturbs them to measure what
                protection does to a model that was trained on clean images.

        Returns:
            The contents of ``report.json``.

        Raises:
            ValueError: When nothing was protected, a class is missing among training or held-out cases, or a control
                has the name of an arm that the study makes itself.
            IntegrityError: When a protected file is missing or changed.
        """
        start = time.monotonic()
        controls = {name: made for name, made in (controls or {}).items() if made is not None}
        if taken := sorted(set(controls) & set(own_arms(self.learning))):
            raise ValueError(f"control arms may not be called {', '.join(taken)}; the study makes these itself")
        mask = None if trainer is None else trainer.perturbation.mask
        twins = self._twins()
        door.open_output(self.output_dir)
        door.clear_staging(self.output_dir)
        with self._scratch() as folder:
            deltas = {name: made if isinstance(made, Mapping) else made.bank for name, made in controls.items()}
            perturb = None if trainer is None or held_out is None else partial(trainer.perturb, held_out)
            material = self._material(twins, deltas, perturb, folder)
            jobs, ledger = self._jobs(material.arms, material.test), Ledger(self.output_dir)
            if self.defenses:
                print(announcement(jobs, self.defenses), flush=True)
            run_jobs(list(jobs.values()), ledger, self.workers)
            networks = {key[1:]: partial(ledger.network, job) for key, job in jobs.items() if job.keep}
            utility = utility_rows(networks, material, self.learning, self.recipe["batch_size"], self.device)
            resisted = self._resistance(jobs, ledger, material)
        rows = _rows(jobs, ledger)
        self.results = build_results(
            task=self._heading() + self.learning.note,
            metric=self.learning.metric,
            rows=rows,
            classes=list(self.cohort.classes),
            chance=self.learning.chance,
            fidelity=material.fidelity.result(None if mask is None else mask.ratio, read_visibility(self.output_dir)),
            budget=material.budget(),
            utility=utility,
            defenses=resistance(rows, resisted, self.defenses, self.learning.metric, self.learning.chance, self.rules),
            leakage=material.leakage.result(),
            passes_per_image=None if trainer is None else trainer.passes_per_image,
            timing={**seconds_of(trainer, controls), "verify": time.monotonic() - start},
            cohort=self._describe_cohort(len(twins), material.present),
            config=self.config | fit_settings(trainer),
            versions=versions(),
            machine=machine(self.device),
            not_tested=self._not_tested(utility, resisted, controls),
            warnings=material.warnings,
            rules=self.rules,
        )
        write_json(self.results, self.output_dir / "report.json")
        write_report(self.results, material.examples, self.output_dir / "report.html")
        self._show(self.results)
        return self.results

    def raise_for_verdict(self) -> None:
        """Leave with exit code 3, after the reasons, unless the verdict is "protected".

        Raises:
            ValueError: When the study was not run.
            SystemExit: When the verdict is "not protected" or "inconclusive".
        """
        if (results := self.results) is None:
            raise ValueError("the study was not run, so that it has no verdict; call run() first")
        if results["verdict"] != PROTECTED:
            console = Console(stderr=True)
            for reason in results["verdict_reasons"]:
                console.print(f"{results['verdict']}: {reason}", soft_wrap=True, markup=False, highlight=False)
            raise SystemExit(EXIT_NOT_PROTECTED)

    # ---------------------------------------------------------------- checks

    def _twins(self) -> dict[str, Case]:
        """Written files of the released cases.

        Raises:
            ValueError: When there are none.
            IntegrityError: When a released case has neither files nor a refusal.
        """
        twins = read_protected(self.cohort, self.output_dir)
        if not twins:
            raise ValueError(f"{self.output_dir} holds no protected case; run protect first")
        found = {*twins, *(refusal.name for refusal in read_refusals(self.output_dir))}
        if lost := [case for case in self.cohort.released if not found & {case.sample_id, owner_id(case)}]:
            raise IntegrityError(
                f"{len(lost)} released cases have no protected file and no refusal (first: {lost[0].sample_id}); "
                "the cohort changed or protect did not finish, run protect again"
            )
        return twins

    def _material(
        self,
        twins: Mapping[str, Case],
        controls: Mapping[str, Deltas],
        held_out_deltas: Callable[[], Deltas] | None,
        folder: Path,
    ) -> Material:
        """All that is read from image files; then tells what is wrong with it before hours are spent on victims."""
        train = [case for case in self.cohort.train if case.sample_id in twins]
        settings = Settings(
            cohort=self.cohort,
            task=self.learning,
            spatial_dims=self.spatial_dims,
            window=self.window,
            budget=self.budget,
            controls=controls,
            held_out_deltas=held_out_deltas,
            device=self.device,
            seed=self.seed,
        )
        material = Material(settings, train, self.tested, twins, folder)
        self._check_classes(train, material.present)
        self._warn_of_ssim(material.fidelity.mean_ssim)
        return material

    def _check_classes(self, cases: Sequence[Case], present: Mapping[str, frozenset[int]]) -> None:
        found = frozenset().union(*(present[case.sample_id] for case in cases))
        if missing := [self.cohort.classes[index] for index in self.learning.learned if index not in found]:
            raise ValueError(
                f"there are no training cases that were protected of class {', '.join(missing)} ({len(cases)} cases in "
                "all); add cases, or leave the class out of the labels"
            )

    # ---------------------------------------------------------------- trainings

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """An empty folder for the arms; what a killed run left there goes first."""
        folder = self.output_dir / SCRATCH
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        try:
            yield folder
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise door.OutputError(
                "no space left in the output folder for the study's scratch files. Free some space and run the same "
                "command again: finished trainings are kept"
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            door.clear_staging(self.output_dir)

    def _jobs(self, arms: Mapping[str, Arm | VolumeArm], test: Arm | VolumeArm) -> dict[Training, Job]:
        """Trainings by arm, victim and seed, in the report's order, with what tells each from all others."""
        probe = self.learning.probe(test.load())
        common = [test.digest, self.recipe, self.learning.describe(), self.device.type, versions()]
        jobs = {}
        for victim, make in self.victims.items():
            kind = victim_digest(make, probe, *self.learning.output)
            for seed in self.seeds:
                options = {**self.recipe, "seed": seed, "device": str(self.device)}
                for name, arm in arms.items():
                    decisive = [arm.digest, kind, seed, self.cohort.classes, *common]
                    key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
                    jobs[name, victim, seed] = Job(key, make, arm, test, self.learning, options, name == "clean")
        return jobs

    def _warn_of_ssim(self, mean: float | None) -> None:
        """Say so where the images alone decide that the verdict is not "protected", whatever the victims learn."""
        least = self.rules.ssim_mean
        if mean is not None and mean < least:
            print(
                f"mean SSIM is {mean:.3f}, and the verdict asks for {least:g}: "
                "a fit with a bound on it (ssim) keeps that, and protects less",
                flush=True,
            )

    def _resistance(
        self, jobs: Mapping[Training, Job], ledger: Ledger, material: Material
    ) -> dict[str, list[dict[str, Any]]]:
        """Rows of the trainings with each defense, by its name; says first how long these will take."""
        if not self.defenses:
            return {}
        spare = clean_part(self.tested, material.present, self.learning.learned)
        names, epsilon = [defense.name for defense in self.defenses], material.budget()["window_fraction"]["max"]
        todo = defended(jobs, defenses_of(names, self.cohort.voxelwise, epsilon), spare)
        costs = {defense.name: defense.cost for defense in self.defenses}
        count, seconds = expected_seconds(todo, jobs, ledger, costs, self.workers)
        print(f"{len(todo)} defenses: {count} trainings to do, about {seconds / 60:.0f} min", flush=True)
        if left_out := [name for name in costs if name not in todo]:
            print(f"left out, too few held-out patients: {', '.join(left_out)}", flush=True)
        run_jobs([job for mine in todo.values() for job in mine.values()], ledger, self.workers)
        return {name: _rows(mine, ledger) for name, mine in todo.items()}

    # ---------------------------------------------------------------- report

    def _heading(self) -> str:
        images = f"{len(self.cohort.cases)} {'volumes' if self.spatial_dims == 3 else 'images'}"
        count = len(self.learning.learned)
        classes = "1 class" if count == 1 else f"{count} classes"
        parts = f"{classes} in {images}" if self.cohort.voxelwise else f"{images} into {classes}"
        return f"{self.learning.name} of {parts}"

    def _describe_cohort(self, released: int, present: Mapping[str, frozenset[int]]) -> dict[str, Any]:
        """``per_class`` counts the cases that have a class; in segmentation only those that were read."""
        classes = [present.get(case.sample_id, {case.label}) for case in self.cohort.cases]
        counts = {self.cohort.classes[at]: sum(at in each for each in classes) for at in self.learning.learned}
        refusals = read_refusals(self.output_dir)
        return {
            "cases": len(classes),
            "released": released,
            "held_out": len(self.tested),
            "per_class": counts,
            "refused": [{"case": refusal.name, "reason": refusal.reason} for refusal in refusals],
        }

    def _not_tested(self, utility: Sequence[Any], defenses: Collection[str], controls: Collection[str]) -> list[str]:
        known = [*not_tested(defenses), *self.learning.not_tested]
        if not utility:
            known.append("What protection does to a model trained on clean images: no held-out case was protected.")
        if "random_mask" not in controls:
            known.append("The control with a random mask of the same ratio: whether the choice of voxels matters.")
        if self.eval_split == "val":
            known.append("Test cases: this report is on validation cases, which choices may have been made by.")
        return known

    def _show(self, results: Mapping[str, Any]) -> None:
        """The verdict on the terminal, and where the report is."""
        console = Console()
        console.print(verdict_table(results))
        for warning in results.get("warnings", ()):
            console.print(f"Warning: {warning}", soft_wrap=True, markup=False, highlight=False)
        console.print(f"Report: {self.output_dir / 'report.html'}", soft_wrap=True, markup=False, highlight=False)


def _rows(jobs: Mapping[Training, Job], ledger: Ledger) -> list[dict[str, Any]]:
    return [{"arm": arm, "victim": victim, "seed": seed, **ledger[job]} for (arm, victim, seed), job in jobs.items()]
