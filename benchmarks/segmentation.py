# SPDX-License-Identifier: Apache-2.0
"""SALM, its controls and its rivals on a cohort with voxel labels, in one study of the segmentation bundle.

python benchmarks/segmentation.py --data FOLDER --output benchmarks/results/NAME.json

See benchmarks/README.md for the runs that wrote the files in ``results``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from keep_report import write
from methods import VOXEL_METHODS
from monai.bundle import ConfigParser
from monai.utils import set_determinism
from setting import configured, machine, versions

from monai_salm.bank import PerturbationBank
from monai_salm.io import formats
from monai_salm.io.masks import read_mask
from monai_salm.release.protect import prepare_output
from monai_salm.verification.fidelity import SSIM_CASES, Fidelity, ssim_sample

BUNDLE = "salm_3d_segmentation"
METHODS: dict[str, Mapping[str, Any]] = {
    "protected": VOXEL_METHODS["salm"].overrides,
    **{name: VOXEL_METHODS[name].overrides for name in ("random_mask", "em", "contour_interior", "slice_spectrum")},
}
"""What differs from the bundle's configuration in the fit of an arm."""


def fit(method: str, settings: Mapping[str, Any], bank: Path) -> dict[str, Any]:
    """Fit a method into ``bank``, or take what is there; its cost and fidelity. To be run in a process of its own."""
    torch.set_num_threads(1)
    kept = bank.exists()
    files = {"train::trainer::bank_file": str(bank), "train::trainer::model_file": None}
    parser = configured(BUNDLE, {**settings, **METHODS[method], **files})
    set_determinism(seed=parser["seed"])
    trainer = parser.get_parsed_content("train::trainer")
    before = _peak_memory()
    trainer.run()
    return {
        "seconds": trainer.seconds,
        "seconds_per_case": trainer.seconds / len(trainer.cases),
        "passes_per_case": trainer.passes_per_image,
        "peak_memory_mib": None if kept else (_peak_memory() - before) / 2**20,
        "fidelity": fidelity(parser, PerturbationBank(bank)),
    }


def fidelity(parser: ConfigParser, bank: PerturbationBank) -> dict[str, Any]:
    """What a bank does to a sample of the released images, as the study measures it of written files."""
    cases, dims, window = parser.get_parsed_content("cohort").released, parser["spatial_dims"], parser["window"]
    measured, sample = Fidelity(), ssim_sample((case.sample_id for case in cases), SSIM_CASES[dims])
    for case in cases:
        if case.sample_id in sample:
            clean = formats.read(case, dims, window)
            delta = bank.load(case.sample_id, clean.stored, step=clean.codec.step)
            copy = dataclasses.replace(clean, stored=clean.codec.add(clean.stored, delta.numpy()))
            measured.add(clean, copy, foreground=read_mask(case, dims) > 0)
    result = measured.result()
    return {name: result[name] for name in ("n_cases", "ssim", "psnr", "psnr_foreground", "mask_fraction")}


def _peak_memory() -> int:
    """Bytes that this process has had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(settings: dict[str, Any], methods: Sequence[str], victims: Sequence[str], workers: int) -> dict[str, Any]:
    """Fit, protect and verify; the report, with the cost of each fit."""
    private = Path(settings["output_dir"]) / "private"
    prepare_output(settings["dataset_dir"], settings["output_dir"])
    banks = {name: private / ("bank.sqlite" if name == "protected" else f"{name}.sqlite") for name in methods}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        running = {name: pool.submit(fit, name, settings, bank) for name, bank in banks.items()}
        costs = {name: future.result() for name, future in running.items()}
    parser = configured(BUNDLE, settings)
    set_determinism(seed=parser["seed"])
    parser["study::victims"] = {name: parser["study::victims"][name] for name in victims}
    parser["study::workers"] = workers
    parser["study::rules"] = {"min_victims": min(2, len(victims))}
    parser.get_parsed_content("protect_cohort")()
    study, trainer, held_out = (parser.get_parsed_content(name) for name in ("study", "train::trainer", "held_out"))
    controls = {name: PerturbationBank(bank) for name, bank in banks.items() if name != "protected"}
    results = study.run(trainer, controls, held_out)
    return {**results, "fits": costs, "config": {**results["config"], **{k: str(v) for k, v in settings.items()}}}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Decathlon folder, or an export with labels.csv")
    parser.add_argument("--labels", type=Path, help="table case,mask,split; default: labels.csv in the folder")
    parser.add_argument("--split", choices=("val", "test"), default="val", help="cases that victims are tested on")
    parser.add_argument("--epsilon", default="8/255")
    parser.add_argument("--resample", type=float, default=1.0, help="voxel size of the study, relative to the files'")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--victims", nargs="+", default=["unet", "segresnet", "attention_unet"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="another setting of the bundle")
    parser.add_argument("--work", type=Path, required=True, help="folder for fits and trainings; they are kept there")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    if "protected" not in options.methods:
        parser.error("--methods must name 'protected'")
    settings: dict[str, Any] = {
        "dataset_dir": str(options.data),
        "output_dir": str(options.work.absolute()),
        "epsilon": options.epsilon,
        "resample": options.resample,
        "seeds": options.seeds,
        "eval_split": options.split,
        **{key: json.loads(value) for key, value in (each.split("=", 1) for each in options.set)},
    }
    if options.labels:
        settings["labels"] = str(options.labels)
    start = time.monotonic()
    results = measure(settings, options.methods, options.victims, options.workers)
    for personal in ("dataset_dir", "output_dir", "labels"):
        results["config"].pop(personal, None)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # as in the bundle
    results |= {"wall_seconds": time.monotonic() - start, "versions": versions(), "machine": machine(device)}
    write(results, options.output)


if __name__ == "__main__":
    main()
