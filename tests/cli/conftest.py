# SPDX-License-Identifier: Apache-2.0
"""What tests of the command line share: an export, a bundle whose stages cost nothing, and a way to run commands."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from cli_runs import LABELS, STUB
from exports import write_labels, write_nifti

from monai_salm import cli, workflows


@pytest.fixture(autouse=True)
def _own_logs():
    """A run applies the bundle's logging.conf; put back what was there."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def export(tmp_path) -> Path:
    for index in range(4):
        write_nifti(tmp_path / "in" / "images" / f"v{index}.nii.gz", index)
    write_labels(tmp_path / "in", LABELS)
    return tmp_path / "in"


@pytest.fixture
def stub(tmp_path) -> str:
    folder = workflows.copy_bundle("salm_3d_classification", tmp_path / "stub")
    (folder / "configs" / "train.yaml").write_text(STUB)
    return str(folder)


@pytest.fixture
def run(capsys):
    """Run a command; its exit code and what it printed on both streams."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run


@pytest.fixture
def started(monkeypatch) -> list[tuple[str, tuple[str, ...], dict[str, object]]]:
    """What would have been run: bundle, stages and overrides."""
    calls: list[tuple[str, tuple[str, ...], dict[str, object]]] = []
    monkeypatch.setattr(
        workflows, "run_bundle", lambda name, stages, overrides: calls.append((name, tuple(stages), dict(overrides)))
    )
    return calls
