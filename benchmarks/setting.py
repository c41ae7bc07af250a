# SPDX-License-Identifier: Apache-2.0
"""What a benchmark runs with: the shipped configuration, and a description of the versions and the machine."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from monai_salm.verification.setting import versions
from monai_salm.workflows import bundle_path

__all__ = ["configured", "machine", "versions"]


def configured(bundle: str, overrides: Mapping[str, Any]) -> ConfigParser:
    """A bundle's ``train.yaml``, so that the shipped defaults are what is measured.

    Args:
        bundle: its name.
        overrides: values by config id, such as ``{"mask_ratio": 0.2, "train::dataset": dataset}``; later ones win.
    """
    parser = ConfigParser()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a config can run code: this one is part of the repository
        parser.read_config(bundle_path(bundle) / "configs" / "train.yaml")
    for name, value in overrides.items():
        parser[name] = value
    return parser


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the seconds depend on; nothing that names the machine or its user."""
    return {
        **({} if device == "cpu" else {"gpu": torch.cuda.get_device_name(device)}),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
