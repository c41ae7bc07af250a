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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods import FITTED, METHODS, Fitted, fit, victims
from monai.data import CacheDataset
from setting import configured, machine, versions

from monai_salm.io.base import Case, StoredImage
from monai_salm.perturbations.budget import Budget
from monai_salm.release.labels import Cohort, load_cohort
from monai_salm.surrogates import ResizeView
from monai_salm.transforms import LoadStoredd
from monai_salm.transforms.meta import codec_of, meta_of, stored_array
from monai_salm.verification.arms import Arm, ArmWriter, Deltas, generator_of, perturbed
from monai_salm.verification.fidelity import SSIM_CASES, Fidelity, ssim_sample
from monai_salm.verification.jobs import Job, default_workers, run_jobs
from monai_salm.verification.results import write_atomically
from monai_salm.verification.strength import closed_gap, summarize
from monai_salm.verification.training import victim_digest
from monai_salm.verification.victims import METRIC, Classification

SIZE = (28, 28)
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
METRICS = ("auc", "accuracy", "balanced_accuracy")
NOTE = (
    "A balanced subset of the training images is used; victims and fits see no other images of the training split.",
    "Clean training is noisy on the test split, which differs from train and val: 38 % are normal, of those 26 %.",
    "Choices are to be made with --split val; the test split is to be reported once.",
    "8 images occur both in train and in val of the archive at hand, none in train and test.",
    "Seed s of a victim decides its start, order and augmentation in every arm, and is trained on fit s modulo fits.",
    "Seconds are of surrogate and perturbation steps of one fit, on the machine and with the threads below.",
    "PSNR, SSIM and the changed fraction are over all fits of a method.",
)


class Rows:
    """Finished trainings, one JSON line each; stands in for :py:class:`monai_salm.verification.jobs.Ledger`."""

    def __init__(self, path: Path, names: Mapping[str, str]) -> None:
        self._path, self._names = path, names
        self._rows: dict[str, dict[str, Any]] = {}
        text = path.read_text() if path.is_file() else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the last line of a killed run
                continue
            self._rows[entry["key"]] = entry["row"]
        if text and not text.endswith("\n"):
            self._append("\n")

    def __contains__(self, job: Job) -> bool:
        return job.key in self._rows

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._rows[key]

    def add(self, key: str, row: Mapping[str, Any], weights: bytes | None) -> None:
        kept = {name: value for name, value in row.items() if name != "curve"}
        self._append(json.dumps({"key": key, "training": self._names[key], "row": kept}) + "\n")
        self._rows[key] = kept

    def _append(self, text: str) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as stream:
            stream.write(text)


def drawn(cohort: Cohort, count: int, split: str, seed: int = 0) -> list[Case]:
    """``count`` cases of a split, as many of each class, in the cohort's order.

    Raises:
        ValueError: When a class has too few cases.
    """
    each, generator = count // len(cohort.classes), np.random.default_rng(seed)
    chosen = set()
    for label, name in enumerate(cohort.classes):
        members = [case for case in cohort.cases if case.split == split and case.label == label]
        if len(members) < each or each < 1:
            raise ValueError(f"class {name} has {len(members)} {split} cases, {each} are asked for; ask for fewer")
        chosen |= {members[at].sample_id for at in generator.permutation(len(members))[:each]}
    return [case for case in cohort.cases if case.sample_id in chosen]


def balanced(cohort: Cohort, count: int, split: str, seed: int = 0) -> Cohort:
    """``count`` training cases, as many of each class, and the cases of ``split`` to test on.

    Raises:
        ValueError: When a class has too few cases.
    """
    tested = [case for case in cohort.cases if case.split == split]
    cases = (*drawn(cohort, count, "train", seed), *tested)
    return replace(cohort, cases=cases, held_out_ids=frozenset(case.sample_id for case in tested))


def write_arm(
    path: Path, images: Mapping[str, StoredImage], labels: Mapping[str, int], unit: Callable[..., Any]
) -> Arm:
    """An arm of ``unit(sample_id, image)``, (1, *spatial) unit intensities, at the victims' size."""
    writer, resize = ArmWriter(path), ResizeView(SIZE)
    for name, image in images.items():
        writer.add(resize(unit(name, image)[None])[0], labels[name])
    return writer.close()


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
        shipped = ("epochs", "batch_size", "learning_rate", "weight_decay")
        self.recipe = {name: config.get_parsed_content(f"study::{name}") for name in shipped}
        if epochs is not None:
            self.recipe["epochs"] = epochs
        self.augment = config.get_parsed_content("study::augment")

    def run(self) -> dict[str, Any]:
        """Do what is not done yet; write and return the results."""
        started = time.monotonic()
        cohort = balanced(load_cohort(self.data, spatial_dims=2), self.train_size, self.split)
        load = LoadStoredd("image", spatial_dims=2)
        dataset, held_out = (
            CacheDataset(
                [{"image": case, "label": case.label} for case in cases], load, copy_cache=False, progress=False
            )
            for cases in (cohort.train, cohort.held_out)
        )
        fitted = self._fit_all(dataset, len(cohort.classes))
        images, labels = _images(dataset)
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            arms, fidelity = self._arms(Path(folder), images, labels, fitted)
            test_images, test_labels = _images(held_out)
            test = write_arm(Path(folder, "test.f32"), test_images, test_labels, _clean)
            rows = self._train(arms, test, cohort.classes)
        results = self._results(cohort, rows, fitted, fidelity, time.monotonic() - started)
        write_atomically(json.dumps(results, indent=1, allow_nan=False) + "\n", self.output)
        return results

    def _fit_all(self, dataset: CacheDataset, classes: int) -> dict[tuple[str, int], Fitted]:
        fitted = {}
        for name in self.methods:
            for seed in range(self.fits if name in FITTED else 0):
                found = fit(name, dataset, classes, SIZE, seed, self.epsilon, self.work, self.overrides)
                print(f"{name}, fit {seed}: {found.seconds:.1f} s", flush=True)
                fitted[name, seed] = found
        return fitted

    def _arms(
        self,
        folder: Path,
        images: Mapping[str, StoredImage],
        labels: Mapping[str, int],
        fitted: Mapping[tuple[str, int], Fitted],
    ) -> tuple[dict[tuple[str, int], Arm], dict[str, dict[str, Any]]]:
        """Arms by method and fit, and fidelity by method."""
        arms, fidelity, sample = {}, {}, ssim_sample(images, SSIM_CASES[2])
        for name in self.methods:
            kept = Fidelity()
            for seed in range(self.fits):
                path, found = folder / f"{len(arms)}.f32", fitted.get((name, seed))
                if found is not None:
                    deltas = {case: np.asarray(found.deltas[case]) for case in images}
                    for case, image in images.items():
                        moved = StoredImage(image.codec.add(image.stored, deltas[case]), image.codec)
                        kept.add(image, moved, ssim=case in sample)
                    shown = partial(_moved, deltas)
                else:
                    shown = partial(_noise, seed) if name == "blind" else _clean
                arms[name, seed] = write_arm(path, images, labels, shown)
            if (name, 0) in fitted:
                fidelity[name] = kept.result(METHODS[name].ratio)
        return arms, fidelity

    def _train(self, arms: Mapping[tuple[str, int], Arm], test: Arm, classes: Sequence[str]) -> list[dict[str, Any]]:
        jobs: dict[tuple[str, str, int], Job] = {}
        names: dict[str, str] = {}
        probe, task = test.load()[0][:2], Classification(tuple(classes), self.augment)
        for victim, make in victims({"num_classes": len(classes)}).items():
            kind = victim_digest(make, probe, len(classes))
            for seed in range(self.seeds):
                for method in self.methods:
                    arm = arms[method, seed % self.fits]
                    decisive = [arm.digest, test.digest, kind, seed, self.recipe, str(self.augment), versions()]
                    key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
                    options = {**self.recipe, "seed": seed, "curve_points": 1}
                    jobs[method, victim, seed] = Job(key, make, arm, test, task, options, False)
                    names.setdefault(key, f"{method}/{victim}/{seed}")
        rows = Rows(self.output.with_suffix(".rows.jsonl"), names)
        run_jobs(list(jobs.values()), rows, self.workers)  # type: ignore[arg-type]
        return [
            {"arm": arm, "victim": victim, "seed": seed, **rows[job.key]} for (arm, victim, seed), job in jobs.items()
        ]

    def _results(
        self,
        cohort: Cohort,
        rows: Sequence[Mapping[str, Any]],
        fitted: Mapping[tuple[str, int], Fitted],
        fidelity: Mapping[str, Mapping[str, Any]],
        seconds: float,
    ) -> dict[str, Any]:
        chance, described = 1 / len(cohort.classes), summarize(rows, METRIC)
        methods = {}
        for name in self.methods:
            own = [fitted[name, seed] for seed in range(self.fits) if (name, seed) in fitted]
            spent = [one.seconds for one in own]
            gaps = {metric: _gap(closed_gap(rows, metric, name, chance=chance)) for metric in (METRIC, "auc")}
            methods[name] = {
                **described[name],
                "closed_gap": None if name in ("clean", "blind") else gaps,
                "fidelity": fidelity.get(name),
                "generation_seconds": {"mean": float(np.mean(spent)), "each": spent} if own else None,
                "passes_per_image": own[0].passes if own else None,
                "settings": own[0].settings if own else None,
            }
        shown = ("arm", "victim", "seed", *METRICS, "seconds")
        return {
            "benchmark": "pneumoniamnist",
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "task": f"PneumoniaMNIST 28x28, {len(cohort.train)} training images, as many of each class",
            "split": self.split,
            "data_sha256": hashlib.sha256(self.data.read_bytes()).hexdigest(),
            "images": {"train": _per_class(cohort, cohort.train), self.split: _per_class(cohort, cohort.held_out)},
            "seeds": {"victims": list(range(self.seeds)), "fits": list(range(self.fits)), "subset": 0},
            "budget": str(Budget.parse(self.epsilon)),
            "chance": chance,
            "methods": methods,
            "victim_recipe": {**self.recipe, "augment": str(self.augment)},
            "rows": {"columns": shown, "values": [[row[column] for column in shown] for row in rows]},
            "overrides": self.overrides,
            "seconds": seconds,
            "versions": versions(),
            "machine": machine(),
            "note": NOTE,
        }


def _images(dataset: CacheDataset) -> tuple[dict[str, StoredImage], dict[str, int]]:
    images, labels = {}, {}
    for item in dataset:
        codec, name = codec_of(item["image"], None), meta_of(item["image"], "sample_id")
        images[name], labels[name] = StoredImage(stored_array(item["image"], codec), codec), item["label"]
    return images, labels


def _clean(_: str, image: StoredImage) -> torch.Tensor:
    return image.codec.to_unit(torch.from_numpy(image.stored))


def _moved(deltas: Deltas, name: str, image: StoredImage) -> torch.Tensor:
    return perturbed(image, deltas[name])


def _noise(seed: int, name: str, image: StoredImage) -> torch.Tensor:
    return torch.rand(1, *SIZE, generator=generator_of(seed, "blind", name))


def _gap(gap: Mapping[str, Any]) -> dict[str, Any]:
    by_victim = {
        victim: {key: found[key] for key in ("mean", "low", "high")} for victim, found in gap["by_victim"].items()
    }
    return {**gap, "by_victim": by_victim}


def _per_class(cohort: Cohort, cases: Sequence[Any]) -> dict[str, int]:
    labels = [case.label for case in cases]
    return {name: labels.count(index) for index, name in enumerate(cohort.classes)}


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
