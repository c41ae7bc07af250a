# SPDX-License-Identifier: Apache-2.0
"""Finished trainings of a benchmark, kept in a file, so that a run that was killed goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai_salm.verification.jobs import Ledger

__all__ = ["Rows"]


class Rows(Ledger):
    """Finished trainings with their names, without curves and weights."""

    def __init__(self, path: Path, names: Mapping[str, str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(path.parent, path.name)
        self._names = names

    def add(self, key: str, row: Mapping[str, Any], weights: bytes | None, **told: str) -> None:
        kept = {name: value for name, value in row.items() if name != "curve"}
        super().add(key, kept, None, training=self._names[key], **told)
