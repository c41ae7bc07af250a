# SPDX-License-Identifier: Apache-2.0
"""The bundle of slices, run: whole, stage by stage, tracked, and killed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from bundle_runs import (
    BOTH,
    FLAT,
    LEVELS,
    RATIOS,
    SIZES,
    SMALL,
    check_properties,
    command,
    config_file,
    contents,
    exact_deltas,
    execute,
    names_in,
    run,
    start,
)
from exports import write_npz
from monai.bundle import ConfigWorkflow

from monai_salm import workflows
from monai_salm.bank import PerturbationBank
from monai_salm.release import lock
from monai_salm.release.labels import load_cohort
from monai_salm.verification.results import validate_results


class Whole:
    """One whole run on an archive, and what was there before it."""

    def __init__(self, folder: Path) -> None:
        self.cwd, self.export, self.out, self.key = folder, folder / "in.npz", folder / "out", folder / "my.key"
        write_npz(self.export, (16, 16), (16, 6, 6))
        shelf = workflows.bundle_path(FLAT)
        before = names_in(shelf)
        arguments = {"dataset_dir": self.export, "output_dir": self.out, "key_file": self.key}
        self.result = run(FLAT, None, folder, None, **arguments)
        self.left_in_bundle = names_in(shelf) - before


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole"))


def test_a_whole_run_ends_with_a_verdict_and_its_exit_code(whole):
    assert whole.result.returncode == 3, whole.result.stderr
    report = json.loads((whole.out / "report.json").read_text())
    validate_results(report)
    assert report["verdict"] == "inconclusive" and "Verdict: inconclusive" in whole.result.stdout
    assert f"Report: {whole.out / 'report.html'}" in whole.result.stdout
    assert "inconclusive: " in whole.result.stderr and "Traceback" not in whole.result.stderr
    assert {row["arm"] for row in report["arms"]} == {"clean", "protected", "random_noise", "random_mask", "blind"}
    assert report["config"]["rounds"] == 1 and report["config"]["bundle"] == FLAT
    assert report["budget"]["stored"] == {"min": LEVELS, "max": LEVELS}
    assert report["fidelity"]["max_error_stored"] <= LEVELS
    assert report["passes_per_image"]["total"] > 0 and set(report["timing"]) > {"fit", "verify"}
    html = (whole.out / "report.html").read_text().lower()
    assert html.startswith("<!doctype html>") and "inconclusive" in html


def check_archive(export: Path, out: Path) -> None:
    """A protected archive of 2D images with NumPy alone: its layout, its labels, its pixels."""
    with np.load(export) as before, np.load(out / "protected" / export.name) as after:
        assert before.files == after.files
        for key in before.files:
            kept = 0 if key.startswith("test") else len(before[key])  # test images are not released
            assert before[key].dtype == after[key].dtype and (kept, *before[key].shape[1:]) == after[key].shape
            if kept and key.endswith("_labels"):
                assert before[key].tobytes() == after[key].tobytes()
            elif kept:
                change = after[key].astype(int) - before[key]
                assert abs(change).max() <= LEVELS
                assert (change != 0).any(axis=(1, 2)).all(), f"an image of {key} was not perturbed"
                assert (change != 0).mean(axis=(1, 2)).max() <= RATIOS[FLAT] + 1 / change[0].size


def test_a_whole_run_keeps_the_archive_but_for_the_perturbations(whole):
    check_archive(whole.export, whole.out)
    exact_deltas(load_cohort(whole.export), whole.out, 2)


def test_a_run_writes_into_its_output_folder_and_nowhere_else(whole):
    assert not whole.left_in_bundle
    assert {path.name for path in whole.cwd.iterdir()} == {"in.npz", "out", "my.key"}
    assert {path.name for path in whole.out.iterdir()} == {
        *("protected", "private", "models", "manifest.jsonl", "report.html", "report.json"),
        *("release.json", "release.sig", "release.pub"),
    }
    assert [path.name for path in (whole.out / "protected").iterdir()] == ["in.npz"]
    shared = b"".join(contents(whole.out / "protected").values())
    assert whole.key.read_bytes() not in shared


def test_stages_one_by_one_do_the_same_as_the_whole_run(whole, tmp_path):
    arguments = {"dataset_dir": whole.export, "output_dir": tmp_path / "out", "key_file": whole.key}
    run(FLAT, "fit", tmp_path, **arguments)
    assert not (tmp_path / "out" / "protected").exists()
    banks = [PerturbationBank(out / "private" / "bank.sqlite") for out in (whole.out, tmp_path / "out")]
    assert banks[0].revision == banks[1].revision != ""
    run(FLAT, "protect", tmp_path, **arguments)
    assert contents(tmp_path / "out" / "protected") == contents(whole.out / "protected")
    assert not (tmp_path / "out" / "report.json").exists()
    result = run(FLAT, "verify", tmp_path, 3, **arguments, **{"study::workers": 1})
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    validate_results(report)
    assert report["verdict"] == "inconclusive" and "Verdict: inconclusive" in result.stdout
    assert contents(tmp_path / "out" / "protected") == contents(whole.out / "protected")


def test_inference_says_how_well_the_surrogate_reads_the_written_files(whole):
    before = contents(whole.out / "protected")
    overrides = {"dataset_dir": whole.export, "output_dir": whole.out, "key_file": whole.key}
    overrides |= SIZES[FLAT] | {"device": "cpu"}
    result = execute(command(FLAT, None, config="inference.yaml", **overrides), whole.cwd)
    said = [line for line in result.stdout.splitlines() if line.startswith("accuracy of the surrogate")]
    assert len(said) == 1 and 0 <= float(said[0].rsplit(":")[1]) <= 1
    assert contents(whole.out / "protected") == before
    del overrides["spatial_size"]  # the surrogate would see another size than in the fit
    result = execute(command(FLAT, None, config="inference.yaml", **overrides), whole.cwd, 1)
    assert "the weights are of a network with spatial_size [16, 16], this one has [64, 64]" in result.stderr


@pytest.mark.filterwarnings("ignore:parsing config_file")
def test_inference_after_a_fit_alone_can_be_asked_for_its_properties_first(whole, tmp_path, capsys):
    shutil.copytree(whole.out / "models", tmp_path / "out" / "models")
    (tmp_path / "out" / "private").mkdir()
    for name in ("bank.sqlite", "run.json"):
        shutil.copy(whole.out / "private" / name, tmp_path / "out" / "private")
    workflow = ConfigWorkflow(
        config_file=config_file(FLAT, "inference.yaml"),
        meta_file=config_file(FLAT, "metadata.json"),
        logging_file=False,
        workflow_type="infer",
        dataset_dir=str(whole.export),
        output_dir=str(tmp_path / "out"),
        key_file=str(whole.key),
        **SIZES[FLAT],
        device="cpu",
    )
    workflow.initialize()
    lock.give_back(tmp_path / "out")
    assert workflow.check_properties() == []
    workflow.run()
    assert "accuracy of the surrogate on the written files:" in capsys.readouterr().out


@pytest.mark.data
def test_pneumoniamnist_is_fitted_and_written(data_dir, tmp_path):
    export, out = tmp_path / "part.npz", tmp_path / "out"
    with np.load(data_dir / "pneumoniamnist.npz") as archive:
        np.savez(export, **{key: archive[key][:400] for key in archive.files})
    run(FLAT, "both", tmp_path, both=BOTH, dataset_dir=export, output_dir=out, batch_size=64, spatial_size=[28, 28])
    check_archive(export, out)


TRACKERS = ("mlflow", "sqlalchemy", "alembic")


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in TRACKERS), reason="the extra 'mlflow' is not installed"
)
def test_a_fit_can_be_tracked_with_mlflow(tmp_path):
    write_npz(tmp_path / "in.npz", (16, 16))
    arguments = {"dataset_dir": tmp_path / "in.npz", "output_dir": tmp_path / "out", "tracking": "mlflow"}
    run(FLAT, "fit", tmp_path, **arguments)
    with sqlite3.connect(tmp_path / "out" / "private" / "mlruns.db") as db:
        assert db.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)]
        losses = db.execute("SELECT value FROM metrics WHERE key = 'train_loss'").fetchall()
    assert len(losses) == SMALL["rounds"] * SMALL["surrogate_steps"]
    assert {path.name for path in tmp_path.iterdir()} == {"in.npz", "out"}
    shared = {path.name for path in (tmp_path / "out").iterdir()} - {"private", "models"}
    assert not shared, "a tracker knows the seed and the owner's folders, which recipients must not get"


def test_a_killed_fit_ends_with_the_same_perturbations(tmp_path):
    export = write_npz(tmp_path / "in.npz", (16, 16), (24, 8, 8))
    longer = SMALL | SIZES[FLAT] | {"rounds": 3, "surrogate_steps": 60, "dataset_dir": export}
    killed, straight = (command(FLAT, "fit", output_dir=tmp_path / name, **longer) for name in ("a", "b"))
    process = start(killed, tmp_path)
    bank_file = tmp_path / "a" / "private" / "bank.sqlite"
    wait_for(lambda: committed_round(bank_file) >= 1, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    bank = PerturbationBank(bank_file)
    assert not bank.finished, "it was killed too late for this test to say anything"
    assert not (tmp_path / "a" / "models").exists()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda arguments: execute(arguments, tmp_path), (killed, straight)))
    other = PerturbationBank(tmp_path / "b" / "private" / "bank.sqlite")
    assert bank.finished and bank.verify() == other.verify() == 32
    assert bank.revision == other.revision != ""
    one, two = (torch.load(tmp_path / name / "models" / "model.pt", weights_only=True) for name in ("a", "b"))
    assert all(torch.equal(one[key], two[key]) for key in two)


def committed_round(bank_file: Path) -> int:
    """Rounds that the file of a running fit holds; 0 while there is no bank."""
    if not bank_file.is_file():
        return 0
    try:
        state = PerturbationBank(bank_file).state()
    except (ValueError, sqlite3.Error):  # it is just being made
        return 0
    return state[0] if state else 0


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, f"the run ended before: {process.communicate()[1]}"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore:parsing config_file")
def test_no_property_of_a_training_is_missing(whole, tmp_path):
    check_properties(FLAT, "train", whole.export, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:parsing config_file")
def test_no_property_of_an_inference_is_missing(whole):
    check_properties(FLAT, "infer", whole.export, whole.out, key_file=whole.key)
