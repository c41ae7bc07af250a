# SPDX-License-Identifier: Apache-2.0
"""Finished trainings of a benchmark, kept in a file, so that a run that was killed goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai_salm.verification.jobs import Job

__all__ = ["Rows"]


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
