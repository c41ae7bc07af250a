# SPDX-License-Identifier: Apache-2.0
"""What a study ran on, with which fit, and what no study here tests: what is not measured of a report."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from monai_salm import __version__
from monai_salm.engines import PerturbationTrainer
from monai_salm.verification.arms import Deltas

__all__ = ["cores", "fit_settings", "machine", "not_tested", "seconds_of", "versions"]

_NOT_TESTED: dict[str, frozenset[str]] = {
    "Defenses: JPEG compression, resampling, blurring and other filters that may be used before training.": frozenset(
        {"jpeg_30", "respaced_1.25", "blur_1"}
    ),
    "Adversarial training and other training methods that are made to withstand perturbations.": frozenset(
        {"adversarial"}
    ),
    "Networks that were pre-trained on other data, large ones, other input sizes, and long training schedules.": (
        frozenset()
    ),
    "Training on a mixture of protected and clean images, and images of the same patients from elsewhere.": frozenset(
        {"clean_20"}
    ),
    "Detection or removal of the perturbation by someone who knows the method, or who has some of the clean images.": (
        frozenset()
    ),
    "Readers: no physician has compared the images; SSIM and PSNR do not stand for diagnostic quality.": frozenset(),
    "Other tasks on the same images, other cohorts and other scanners.": frozenset(),
}
"""What no ordinary study tests, with the defenses that together do; none: nothing here tests it."""


def not_tested(defenses: Collection[str] = ()) -> list[str]:
    """What a study with these defenses says nothing about, whatever its victims learn.

    Args:
        defenses: names, see :py:mod:`monai_salm.verification.defenses`.
    """
    left = [text for text, tests in _NOT_TESTED.items() if not tests or not tests <= set(defenses)]
    if defenses:
        left.insert(0, "Defenses other than the listed ones, other strengths of these, and several at once.")
    return left


def fit_settings(trainer: PerturbationTrainer | None) -> dict[str, Any]:
    """What a trainer was made with."""
    if trainer is None:
        return {}
    return {
        "seed": trainer.seed,
        "mask": str(trainer.perturbation),
        "rounds": trainer.state.max_epochs,
        "surrogate_steps": trainer.surrogate_steps,
        "batch_size": trainer.batch_size,
        "learning_rate": trainer.base_rates[0],
        "transplant": trainer.transplant,
        "view": str(trainer.objective.view),
    }


def seconds_of(
    trainer: PerturbationTrainer | None, controls: Mapping[str, PerturbationTrainer | Deltas]
) -> dict[str, float]:
    """Seconds of each fit whose trainer is at hand; of perturbations alone nobody knows how long they took."""
    fits = {"fit": trainer} | {f"fit of the {name.replace('_', '-')} control": made for name, made in controls.items()}
    return {name: fit.seconds for name, fit in fits.items() if fit is not None and not isinstance(fit, Mapping)}


def versions() -> dict[str, str]:
    """Versions of what decides a result, by package."""
    packages = {name: version(name) for name in ("monai", "torch", "numpy")}
    return {"monai_salm": __version__, **packages, "python": platform.python_version()}


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What the seconds depend on; nothing that names the machine or its user."""
    device = torch.device(device)
    return {
        **({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
        "cpu": _cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(device),
    }


def cores() -> int:
    """Processor cores that this process may use; a container has fewer than its host."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
