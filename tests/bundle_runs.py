# SPDX-License-Identifier: Apache-2.0
"""The bundles as a stranger runs them: MONAI's own commands in processes of their own, on small files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from monai.bundle import ConfigWorkflow
from pydicom import dcmread

from monai_salm import workflows
from monai_salm.bank import PerturbationBank
from monai_salm.io import formats
from monai_salm.perturbations.budget import Budget
from monai_salm.release import lock
from monai_salm.release.manifest import read_manifest
from monai_salm.release.protect import read_protected
from monai_salm.verification.setting import fit_settings

BUNDLES = ("salm_2d_classification", "salm_3d_classification", "salm_3d_segmentation")
FLAT, VOLUME, VOXELS = BUNDLES
SMALL: dict[str, Any] = {
    "rounds": 1,
    "surrogate_steps": 2,
    "perturbation_steps": 3,
    "batch_size": 8,
    "seeds": 1,
    "epochs": 1,
    "device": "cpu",
}
"""Enough to go through every line of a run, and nothing else."""
SIZES: dict[str, dict[str, Any]] = {
    FLAT: {"spatial_size": [16, 16]},
    VOLUME: {"spatial_size": [16, 16, 16]},
    VOXELS: {"spatial_size": [16, 16, 16], "tile_size": [16, 16, 16]},
}
RATIOS = {FLAT: 0.4, VOLUME: 0.4, VOXELS: 0.2}
LEVELS = 8
"""8/255 of 256 gray values."""

each_bundle = pytest.mark.parametrize("name", BUNDLES)
Result = subprocess.CompletedProcess


def config_file(name: str, which: str) -> str:
    return str(workflows.bundle_path(name) / "configs" / which)


def command(name: str, run_id: str | None, *, config: str = "train.yaml", **overrides: Any) -> list[str]:
    """``python -m monai.bundle run [run_id] ...`` as the README has it."""
    arguments = [sys.executable, "-m", "monai.bundle", "run", *([run_id] if run_id else [])]
    files = {"config_file": config, "meta_file": "metadata.json", "logging_file": "logging.conf"}
    for key, value in ({key: config_file(name, file) for key, file in files.items()} | overrides).items():
        arguments += [f"--{key}", value if isinstance(value, str) else str(value)]
    return arguments


def start(arguments: Sequence[str], cwd: Path) -> subprocess.Popen[str]:
    env = os.environ | {"MONAI_FAIL_ON_DUPLICATE_CONFIG": "1", "OMP_NUM_THREADS": "1"}  # processes side by side
    return subprocess.Popen(arguments, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def execute(arguments: Sequence[str], cwd: Path, expected: int | None = 0) -> Result[str]:
    process = start(arguments, cwd)
    out, err = process.communicate(timeout=300)
    assert expected is None or process.returncode == expected, f"exit code {process.returncode}:\n{out}\n{err}"
    return Result(arguments, process.returncode, out, err)


ONE_BY_ONE = """
import contextlib, io, json, runpy, sys, traceback
done = []
for arguments in json.load(open(sys.argv[1])):
    sys.argv, code = ["monai.bundle", *arguments], 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            runpy.run_module("monai.bundle", run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        except Exception:
            traceback.print_exc()
            code = 1
    done.append(json.dumps([code, out.getvalue(), err.getvalue()]))
print(*done, sep="\\n")
"""
"""``python -m monai.bundle`` for many command lines; the imports, which take most of the time, are done once."""


def one_by_one(commands: Sequence[Sequence[str]], cwd: Path) -> list[Result[str]]:
    """Run several commands of :py:func:`command` in one process."""
    jobs = [list(arguments[3:]) for arguments in commands]
    (cwd / "jobs.json").write_text(json.dumps(jobs))
    out = execute([sys.executable, "-c", ONE_BY_ONE, "jobs.json"], cwd).stdout
    (cwd / "jobs.json").unlink()
    return [Result(job, *json.loads(line)) for job, line in zip(jobs, out.splitlines()[-len(jobs) :], strict=True)]


def run(name: str, run_id: str | None, cwd: Path, expected: int | None = 0, **overrides: Any) -> Result[str]:
    return execute(command(name, run_id, **(SMALL | SIZES[name] | overrides)), cwd, expected)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def exact_deltas(cohort: Any, out: Path, spatial_dims: int, ratio: float = 0.4) -> dict[str, np.ndarray]:
    """Stored differences by case, after checking that they are the bank's perturbations and nothing else."""
    bank, found = PerturbationBank(out / "private" / "bank.sqlite"), {}
    twins = read_protected(cohort, out)
    assert set(twins) == {case.sample_id for case in cohort.released} == set(bank)
    for case in cohort.released:
        before, after = formats.read(case, spatial_dims), formats.read(twins[case.sample_id], spatial_dims)
        delta = after.stored.astype(np.float64) - before.stored
        rounding = np.spacing(abs(after.stored)) if after.stored.dtype.kind == "f" else 0
        assert (abs(delta - bank[case.sample_id].numpy() * before.codec.step) <= rounding).all()
        levels = before.codec.levels(Budget.parse("8/255"))
        assert 0 < abs(delta).max() <= levels * before.codec.step * (1 + 1e-6)
        assert (delta != 0).mean() <= ratio + 1 / delta.size
        found[case.sample_id] = delta
    changed = Counter()  # of the files of a case: one slice of a volume may stay as it was
    for row in read_manifest(out):
        if row.levels:
            assert (row.max_abs > 0) == (row.changed > 0)
            changed[row.sample_id] += row.changed
    assert changed and all(changed.values())
    return found


def check_properties(name: str, kind: str, export: Path, out: Path, **overrides: Any) -> None:
    """MONAI evaluates each property for this, so an inference ("infer") needs a run that was fitted."""
    if kind == "train":
        overrides["train::trainer::max_epochs"] = 2
    workflow = ConfigWorkflow(
        config_file=config_file(name, {"train": "train.yaml", "infer": "inference.yaml"}[kind]),
        meta_file=config_file(name, "metadata.json"),
        logging_file=False,
        workflow_type=kind,
        dataset_dir=str(export),
        output_dir=str(out),
        device="cpu",
        **SIZES[name],
        **overrides,
    )
    workflow.initialize()
    lock.give_back(out)  # or this process would keep it from all that follow
    assert workflow.check_properties() == []
    also = {"train": ("network_def", "train_dataset_data", "train_handlers"), "infer": ("dataset_data", "handlers")}
    assert all(getattr(workflow, prop) is not None for prop in (*also[kind], "device"))
    if kind == "train":
        control = workflow.parser.get_parsed_content("control::trainer")
        assert workflow.max_epochs == control.state.max_epochs == fit_settings(workflow.trainer)["rounds"] == 2


def check_series(files: Sequence[Path], protected: Path, changed_at_most: float) -> None:
    """A protected series with pydicom alone: its length, its places, its pixels."""

    def by_place(paths: Sequence[Path]) -> list[Any]:
        return sorted((dcmread(path) for path in paths), key=lambda one: float(one.ImagePositionPatient[2]))

    before, after = by_place(files), by_place([path for path in protected.iterdir() if path.is_file()])
    assert len(before) == len(after)
    assert len({one.SeriesInstanceUID for one in after}) == 1
    assert after[0].SeriesInstanceUID != before[0].SeriesInstanceUID
    assert not {one.SOPInstanceUID for one in before} & {one.SOPInstanceUID for one in after}
    changed = voxels = 0
    for one, other in zip(before, after, strict=True):
        assert one.ImagePositionPatient == other.ImagePositionPatient
        assert one.file_meta.TransferSyntaxUID == other.file_meta.TransferSyntaxUID
        assert one.pixel_array.dtype == other.pixel_array.dtype
        changed += int((one.pixel_array != other.pixel_array).sum())
        voxels += one.pixel_array.size
    assert 0 < changed <= changed_at_most * voxels


BOTH = ["$@train::trainer.run()", "$@protect_cohort()"]
"""Fit and protect in one process."""


@dataclass(frozen=True)
class Volumes:
    """An export of volumes that was fitted and written, and what it held before that."""

    export: Path
    out: Path
    before: dict[str, bytes]
