# SPDX-License-Identifier: Apache-2.0
"""What a benchmark runs with (the shipped configuration), how it is called, and the file that it writes."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from monai_salm.release.commit import write_atomically
from monai_salm.verification.setting import machine, versions
from monai_salm.workflows import bundle_path

__all__ = ["command_line", "configured", "machine", "versions", "write"]


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


def command_line(description: str | None) -> argparse.ArgumentParser:
    """A parser that knows ``--output``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    return parser


def write(benchmark: str, found: Mapping[str, Any], output: Path, device: str = "cpu") -> None:
    """Write a result file: what was found, and what it depends on (time, versions, machine)."""
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    around = {"versions": versions(), "machine": machine(device)}
    content = {"benchmark": benchmark, "created": created, **found, **around}
    write_atomically(json.dumps(content, indent=1, allow_nan=False) + "\n", output)
