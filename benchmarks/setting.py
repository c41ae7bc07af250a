# SPDX-License-Identifier: Apache-2.0
"""What a benchmark runs with: the shipped configuration, and a description of the versions and the machine."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from monai.bundle import ConfigParser

from monai_salm.verification.setting import machine, versions
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
