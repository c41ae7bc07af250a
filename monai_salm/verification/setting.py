# SPDX-License-Identifier: Apache-2.0
"""What a study ran on, and what no study here tests: the parts of a report that are not measured."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

import torch

from monai_salm import __version__

__all__ = ["NOT_TESTED", "machine", "versions"]

NOT_TESTED = (
    "Defenses: JPEG compression, resampling, blurring and other filters that a third party may apply before training.",
    "Adversarial training and other training methods that are made to withstand perturbations.",
    "Networks that were pre-trained on other data, large networks, and long training schedules.",
    "Training on a mixture of protected and clean images, and images of the same patients from elsewhere.",
    "Detection or removal of the perturbation by someone who knows the method, or who has some of the clean images.",
    "Readers: no physician has compared the images; SSIM and PSNR do not stand for diagnostic quality.",
    "Other tasks on the same images, other cohorts and other scanners.",
)
"""What no study tests, whatever its victims learn."""


def versions() -> dict[str, str]:
    """Versions of what decides a result, by package."""
    packages = {name: version(name) for name in ("monai", "torch", "numpy")}
    return {"monai_salm": __version__, **packages, "python": platform.python_version()}


def machine(device: torch.device) -> dict[str, Any]:
    """What the study runs on."""
    machine: dict[str, Any] = {"system": platform.platform(), "cores": os.cpu_count(), "device": str(device)}
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine
