# SPDX-License-Identifier: Apache-2.0
"""The bundles as a stranger runs them: MONAI's own commands in processes of their own, on small files."""

from __future__ import annotations

import ast
import gzip
import importlib.util
import json
import math
import os
import pydoc
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from exports import write_decathlon, write_labels, write_nifti, write_npz, write_series
from monai.bundle import ConfigParser, ConfigWorkflow
from pydicom import dcmread
from voxel_exports import write_segmented

from monai_salm import workflows
from monai_salm.bank import PerturbationBank
from monai_salm.io import formats
from monai_salm.io.masks import read_mask
from monai_salm.perturbations.budget import Budget
from monai_salm.release import lock
from monai_salm.release.custody import read_refusals
from monai_salm.release.labels import load_cohort
from monai_salm.release.manifest import read_manifest
from monai_salm.release.protect import read_protected
from monai_salm.verification.results import validate_results
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


@pytest.fixture(autouse=True)
def _fail_on_duplicate_keys(monkeypatch):
    monkeypatch.setenv("MONAI_FAIL_ON_DUPLICATE_CONFIG", "1")


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


# ------------------------------------------------------------------------------------- configs, read and not run


def targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)


@each_bundle
@pytest.mark.parametrize("which", ["train.yaml", "inference.yaml"])
def test_every_target_is_a_full_dotted_path_that_imports(name, which):
    found = set(targets(ConfigParser.load_config_file(config_file(name, which))))
    assert len(found) > 5
    for target in found:
        assert "." in target and pydoc.locate(target) is not None, f"{name}/{which}: {target} does not import"


def test_a_key_that_is_there_twice_is_noticed(tmp_path):
    """MONAI_FAIL_ON_DUPLICATE_CONFIG is set for every test here; this one shows that it works."""
    text = Path(config_file(FLAT, "train.yaml")).read_text()
    (tmp_path / "twice.yaml").write_text(text + "\nepsilon: 4/255\n")
    with pytest.raises(ValueError, match="epsilon"):
        ConfigParser.load_config_file(str(tmp_path / "twice.yaml"))


@each_bundle
def test_training_and_inference_agree(name):
    train, inference = (
        ConfigParser.load_config_file(config_file(name, which)) for which in ("train.yaml", "inference.yaml")
    )
    meta = json.loads(Path(config_file(name, "metadata.json")).read_text())
    size = "tile_size" if name == VOXELS else "spatial_size"  # of what the surrogate sees
    shared = {*train} & {*inference} - {"imports", "initialize", "run", "batch_size"}
    assert shared >= {"network_def", "cohort", "protect_cohort", "epsilon", size}
    for key in shared:
        assert train[key] == inference[key], f"{name}: {key} differs"
    assert inference["initialize"] == [*train["initialize"], *train["protect"]]
    parsed = ConfigParser(train).get_parsed_content(size)
    assert parsed == meta["network_data_format"]["inputs"]["image"]["spatial_shape"]
    assert train["study"]["config"]["bundle"] == name
    assert set(train["study"]["config"]) >= {"epsilon", "seeds", "epochs", "window"}


@pytest.mark.parametrize("which", ["train.yaml", "inference.yaml"])
def test_the_classification_bundles_differ_only_where_images_and_volumes_do(which):
    """They are one configuration twice, since a bundle has to stand alone."""
    texts = [Path(config_file(name, which)).read_text() for name in (FLAT, VOLUME)]
    gray = [text.replace('"@in_channels"', "1").replace("@in_channels", "1").replace(FLAT, VOLUME) for text in texts]
    flat, volume = map(yaml.safe_load, gray)
    differ = {key for key in {*flat, *volume} if flat.get(key) != volume.get(key)}
    assert differ <= {
        "imports",
        "in_channels",
        "spatial_dims",
        "spatial_size",
        "batch_size",
        "epochs",
        "victim_batch_size",
    }


@each_bundle
@pytest.mark.parametrize("kind", ["train", "infer"])
@pytest.mark.filterwarnings("ignore:parsing config_file")
def test_no_property_is_missing(request, tmp_path, name, kind):
    """MONAI evaluates each property for this, so an inference needs a run that was fitted."""
    made = request.getfixturevalue({FLAT: "whole", VOLUME: "volumes", VOXELS: "voxels"}[name])
    workflow = ConfigWorkflow(
        config_file=config_file(name, {"train": "train.yaml", "infer": "inference.yaml"}[kind]),
        meta_file=config_file(name, "metadata.json"),
        logging_file=False,
        workflow_type=kind,
        dataset_dir=str(made.export),
        output_dir=str(made.out if kind == "infer" else tmp_path / "out"),
        device="cpu",
        **SIZES[name],
        **({"train::trainer::max_epochs": 2} if kind == "train" else {"key_file": made.key} if name == FLAT else {}),
    )
    workflow.initialize()
    lock.give_back(Path(workflow.parser["output_dir"]))  # or this process would keep it from all that follow
    assert workflow.check_properties() == []
    also = {"train": ("network_def", "train_dataset_data", "train_handlers"), "infer": ("dataset_data", "handlers")}
    assert all(getattr(workflow, prop) is not None for prop in (*also[kind], "device"))
    if kind == "train":
        control = workflow.parser.get_parsed_content("control::trainer")
        assert workflow.max_epochs == control.state.max_epochs == fit_settings(workflow.trainer)["rounds"] == 2


# ------------------------------------------------------------------------------------- the network alone


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, tuple[Result[str], Result[str], Path, torch.nn.Module]]:
    """verify_net_in_out and ckpt_export of every bundle, with random weights."""
    folder, jobs, networks = tmp_path_factory.mktemp("networks"), [], {}
    for name in BUNDLES:
        parser = ConfigParser()
        parser.read_config(config_file(name, "inference.yaml"))
        networks[name] = parser.get_parsed_content("network_def").eval()
        torch.save(networks[name].state_dict(), folder / f"{name}.pt")
        files = ["--config_file", config_file(name, "inference.yaml")]
        files += ["--meta_file", config_file(name, "metadata.json")]
        base = [sys.executable, "-m", "monai.bundle"]
        jobs.append([*base, "verify_net_in_out", "network_def", *files, "--device", "cpu"])
        paths = ["--filepath", str(folder / f"{name}.ts"), "--ckpt_file", str(folder / f"{name}.pt")]
        jobs.append([*base, "ckpt_export", "network_def", *paths, *files])
    done = one_by_one(jobs, folder)
    return {
        name: (done[2 * i], done[2 * i + 1], folder / f"{name}.ts", networks[name]) for i, name in enumerate(BUNDLES)
    }


@each_bundle
def test_the_network_has_the_input_and_output_of_the_metadata(exports, name):
    result = exports[name][0]
    assert result.returncode == 0, result.stderr


@each_bundle
def test_the_network_exports_to_torchscript_and_says_the_same(exports, name):
    _, result, path, network = exports[name]
    assert result.returncode == 0, result.stderr
    exported = torch.jit.load(path)
    usual = SIZES[name]["spatial_size"]
    for size in (usual, [40, 29, 22][: len(usual)]):  # resizing or padding is part of the network
        image = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(exported(image), network(image))


# ------------------------------------------------------------------------------------- the whole job, 2D


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


# ------------------------------------------------------------------------------------- the whole job, 3D


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


def check_nifti_header(before: Path, after: Path) -> None:
    one, other = (gzip.open(path).read() for path in (before, after))
    start = int(np.frombuffer(one[108:112], "<f4")[0])  # vox_offset
    assert one[:start] == other[:start] and len(one) == len(other) and one[start:] != other[start:]


def check_twins(cohort: Any, out: Path) -> None:
    """The protected series and NIfTI volumes of a cohort."""
    twins = read_protected(cohort, out)
    for case in cohort.released:
        files = twins[case.sample_id].files
        if case.format == "dicom":
            check_series(case.files, files[0].parent, RATIOS[VOLUME] + 0.01)
        else:
            check_nifti_header(case.files[0], files[0])
            assert files[0] == out / "protected" / case.files[0].relative_to(cohort.root)


BOTH = ["$@train::trainer.run()", "$@protect_cohort()"]
"""Fit and protect in one process."""


@dataclass(frozen=True)
class Volumes:
    """An export of volumes that was fitted and written, and what it held before that."""

    export: Path
    out: Path
    before: dict[str, bytes]


@pytest.fixture(scope="module")
def volumes(tmp_path_factory) -> Volumes:
    folder = tmp_path_factory.mktemp("volumes")
    export, out, rows = folder / "in", folder / "out", []
    for index in range(3):
        write_series(export / "mr" / f"s{index}", f"s{index}", 6 + index, patient=f"P{index}")
        write_nifti(export / "nifti" / f"v{index}.nii.gz", index, (14, 15, 9))
        rows += [f"mr/s{index},{'ab'[index % 2]}", f"nifti/v{index}.nii.gz,{'ba'[index % 2]}"]
    write_labels(export, rows)
    before = contents(export)
    for stage in ("fit", "protect"):
        run(VOLUME, stage, folder, dataset_dir=export, output_dir=out)
    return Volumes(export, out, before)


def test_dicom_series_and_nifti_volumes_are_fitted_and_written_together(volumes):
    export, out = volumes.export, volumes.out
    assert contents(export) == volumes.before, "the export is only read"
    cohort = load_cohort(export, spatial_dims=3)
    assert len(exact_deltas(cohort, out, 3)) == 6 and not read_refusals(out)
    check_twins(cohort, out)
    assert (out / "protected" / "labels.csv").is_file()


@pytest.mark.data
def test_a_real_mr_series_and_real_nifti_volumes_are_fitted_and_written(data_dir, tmp_path):
    export = tmp_path / "in"
    (series,) = (path for path in (data_dir / "dicom_series").iterdir() if path.is_dir())
    shutil.copytree(series, export / "mr")
    rows = ["mr,head"]
    for path in sorted((data_dir / "Task04_Hippocampus" / "imagesTr").glob("*.nii.gz"))[:4]:
        shutil.copy(path, export)
        rows.append(f"{path.name},hippocampus")
    write_labels(export, rows)
    out = tmp_path / "out"
    run(VOLUME, "both", tmp_path, both=BOTH, dataset_dir=export, output_dir=out)
    cohort = load_cohort(export, spatial_dims=3)
    assert len(exact_deltas(cohort, out, 3)) == 5 and not read_refusals(out)
    assert sorted(len(case.files) for case in cohort.released) == [1, 1, 1, 1, 130]
    check_twins(cohort, out)


@pytest.mark.data
def test_pneumoniamnist_is_fitted_and_written(data_dir, tmp_path):
    export, out = tmp_path / "part.npz", tmp_path / "out"
    with np.load(data_dir / "pneumoniamnist.npz") as archive:
        np.savez(export, **{key: archive[key][:400] for key in archive.files})
    run(FLAT, "both", tmp_path, both=BOTH, dataset_dir=export, output_dir=out, batch_size=64, spatial_size=[28, 28])
    check_archive(export, out)


# ------------------------------------------------------------------------------------- the whole job, voxel labels

FEW: dict[str, Any] = SMALL | {"batch_size": 4, "victim_batch_size": 4, "workers": 1}


def splits_of(export: Path, splits: str) -> Path:
    """A Decathlon export of noise, split by first letters (train, val, x for test)."""
    named = {"t": "train", "v": "val", "x": "test"}
    write_labels(export, [f"imagesTr/v{at:02d}.nii.gz,,{named[each]}" for at, each in enumerate(splits)], "mask")
    return export


@pytest.fixture(scope="module")
def voxels(tmp_path_factory) -> Volumes:
    """Everything in one command; the volumes are neither multiples of the network's stride nor of one shape."""
    folder = tmp_path_factory.mktemp("voxels")
    export, out = folder / "in", folder / "out"
    splits_of(write_decathlon(export, 7, (21, 18, 17)), "tttttvx")
    before = contents(export)
    result = execute(command(VOXELS, None, **(FEW | SIZES[VOXELS]), dataset_dir=export, output_dir=out), folder, 3)
    assert "Verdict: inconclusive" in result.stdout and "Traceback" not in result.stderr
    return Volumes(export, out, before)


def test_volumes_with_voxel_labels_are_written_and_their_label_files_are_the_same(voxels):
    assert contents(voxels.export) == voxels.before, "the export is only read"
    cohort = load_cohort(voxels.export, spatial_dims=3)
    assert len(exact_deltas(cohort, voxels.out, 3, RATIOS[VOXELS])) == 6 and not read_refusals(voxels.out)
    written = contents(voxels.out / "protected")
    names = [f"v{at:02d}.nii.gz" for at in range(6)]
    assert set(written) == {
        "dataset.json",
        "labels.csv",
        *(f"{folder}/{name}" for name in names for folder in ("imagesTr", "labelsTr")),
    }
    for name in names:
        assert written[f"labelsTr/{name}"] == voxels.before[f"labelsTr/{name}"]
        check_nifti_header(voxels.export / "imagesTr" / name, voxels.out / "protected" / "imagesTr" / name)


def test_the_report_of_voxel_labels_tells_each_class_the_marker_and_leakage(voxels):
    report = json.loads((voxels.out / "report.json").read_text())
    validate_results(report)
    assert report["metric"] == "dice" and report["verdict"] == "inconclusive"
    arms = {"clean", "protected", "random_noise", "random_mask", "label_marker", "blind"}
    assert {row["arm"] for row in report["arms"]} == arms
    assert {row["victim"] for row in report["arms"]} == {"unet", "segresnet", "attention_unet"}
    assert all(set(row["dice_per_class"]) == {"Core", "Rim"} for row in report["arms"])
    assert set(report["leakage"]) >= {"protected", "label_marker", "random_mask"}
    assert {row["victim"] for row in report["utility"]} == {"unet", "segresnet", "attention_unet"}
    assert report["config"]["bundle"] == VOXELS and report["config"]["tile_size"] == [16, 16, 16]
    assert "criterion='gradient'" in report["config"]["mask"] and report["passes_per_image"]["total"] > 0
    assert "Core" in (voxels.out / "report.html").read_text()


CHANGES: dict[str, Any] = {
    "epsilon": "4/255",
    "mask_ratio": 0.3,
    "mask_criterion": "label",
    "perturbation_steps": 4,
    "surrogate_steps": 3,
    "spatial_size": [8, 8, 8],
    "kernel_size": 3,
    "tile_size": [24, 24, 24],
    "halo": 12,
    "seed": 1,
}


def test_another_setting_on_the_same_output_is_an_error_and_inference_goes_on(voxels):
    before = contents(voxels.out / "protected")
    places = {"dataset_dir": voxels.export, "output_dir": voxels.out}
    jobs = [command(VOXELS, "fit", **(FEW | SIZES[VOXELS] | places | {name: value})) for name, value in CHANGES.items()]
    sizes = {"tile_size": SIZES[VOXELS]["tile_size"], "device": "cpu"}
    jobs.append(command(VOXELS, None, config="inference.yaml", **sizes, **places))
    *changed, inference = one_by_one(jobs, voxels.export.parent)
    for name, result in zip(CHANGES, changed, strict=True):
        assert result.returncode == 1, name
        assert "the configuration, the images or monai_salm changed" in result.stderr, f"{name}:\n{result.stderr}"
    assert inference.returncode == 0, inference.stderr
    said = [line for line in inference.stdout.splitlines() if line.startswith("Dice of the surrogate")]
    assert len(said) == 1 and 0 <= float(said[0].rsplit(":")[1]) <= 1
    assert contents(voxels.out / "protected") == before


def test_slices_with_voxel_labels_go_through_the_stages_with_spatial_dims_2_alone(tmp_path):
    export, out = splits_of(write_decathlon(tmp_path / "in", 6, (21, 18, 1)), "ttttvx"), tmp_path / "out"
    sizes = {"spatial_size": [16, 16], "tile_size": [16, 16]}
    settings = FEW | sizes | {"spatial_dims": 2, "dataset_dir": export, "output_dir": out}
    fit, protect, verify = one_by_one(
        [command(VOXELS, stage, **settings) for stage in ("fit", "protect", "verify")], tmp_path
    )
    assert (fit.returncode, protect.returncode, verify.returncode) == (0, 0, 3), verify.stderr
    exact_deltas(load_cohort(export, spatial_dims=2), out, 2, RATIOS[VOXELS])
    report = json.loads((out / "report.json").read_text())
    validate_results(report)
    assert {len(row["dice_per_class"]) for row in report["arms"]} == {2} and report["cohort"]["released"] == 5
    parser = ConfigParser()
    parser.read_config(config_file(VOXELS, "train.yaml"))
    parser["spatial_dims"] = 2
    for key in ("spatial_size", "tile_size"):
        assert len(parser.get_parsed_content(key)) == 2


@pytest.mark.data
def test_real_hippocampi_with_voxel_labels_are_fitted_and_written(data_dir, tmp_path):
    source, export, out = data_dir / "Task04_Hippocampus", tmp_path / "in", tmp_path / "out"
    content = json.loads((source / "dataset.json").read_text())
    content["training"] = content["training"][:4]
    for pair in content["training"]:
        for name in pair.values():
            (export / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, export / name)
    (export / "dataset.json").write_text(json.dumps(content))
    before = contents(export)
    settings = FEW | SIZES[VOXELS] | {"dataset_dir": export, "output_dir": out}
    execute(command(VOXELS, "both", both=BOTH, **settings), tmp_path)
    cohort = load_cohort(export, spatial_dims=3)
    assert len(exact_deltas(cohort, out, 3, RATIOS[VOXELS])) == 4 and not read_refusals(out)
    written = contents(out / "protected")
    labels = {name for name in before if name.startswith("labelsTr/")}
    assert len(labels) == 4 and all(written[name] == before[name] for name in labels)


def test_monai_salm_picks_the_bundle_and_writes_series_with_their_segmentations(tmp_path):
    export, out = tmp_path / "in", tmp_path / "out"
    truth = write_segmented(export, "ABCD", 17)
    sets = [f"--set={key}={value}" for key, value in (FEW | SIZES[VOXELS]).items()]
    base = [sys.executable, "-m", "monai_salm.cli"]
    result = execute([*base, "protect", str(export), str(out), *sets], tmp_path, None)
    assert result.returncode == 3 and "verdict: inconclusive" in result.stdout, result.stderr
    kept = json.loads((out / "private" / "run-config.json").read_text())
    assert kept["bundle"] == VOXELS and "spatial_dims" not in kept["overrides"]
    cohort = load_cohort(export, spatial_dims=3)
    assert len(exact_deltas(cohort, out, 3, RATIOS[VOXELS])) == len(truth) == 4
    for case in cohort.released:
        twin = read_protected(cohort, out)[case.sample_id]
        np.testing.assert_array_equal(read_mask(twin, 3), read_mask(case, 3))
        check_series(case.files, twin.files[0].parent, RATIOS[VOXELS] + 0.01)
    report = json.loads((out / "report.json").read_text())
    assert report["arms"][0]["dice_per_class"].keys() == {"Liver", "Tumor"}


# ------------------------------------------------------------------------------------- around the job

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


BAD_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "no export named": ({"dataset_dir": None}, "dataset_dir is not set"),
    "wrong folder": ({"dataset_dir": "not_there"}, "not_there does not exist"),
    "empty folder": ({"dataset_dir": "empty"}, "empty is empty; name the folder"),
    "no images": ({"dataset_dir": "letters"}, "holds no 2D image"),
    "one class": ({"dataset_dir": "one"}, "one class"),
    "epsilon 0": ({"epsilon": "0"}, "above 0"),
    "epsilon over the window": ({"epsilon": "2"}, "window"),
    "epsilon below one step": ({"epsilon": "1/1000"}, "The smallest epsilon that works here"),
    "mask ratio above 1": ({"mask_ratio": 1.5}, "above 0 and at most 1"),
    "output inside the input": ({"dataset_dir": "good", "output_dir": "good/out"}, "lies inside the export"),
    "output not empty": ({"output_dir": "letters"}, "choose an empty or new folder"),
}
each_mistake = pytest.mark.parametrize("mistake", BAD_INPUT)


@pytest.fixture(scope="module")
def refused(tmp_path_factory) -> tuple[Path, dict[str, Result[str]]]:
    """Every mistake of the table, made once with the real command."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name in ("empty", "letters", "good", "one"):
        (folder / name).mkdir()
    write_npz(folder / "in.npz", (16, 16))
    write_npz(folder / "good" / "in.npz", (16, 16))
    (folder / "letters" / "letter.txt").write_text("To whom it may concern")
    write_labels(folder / "letters", ["letter.txt,a", "other.txt,b"])
    write_labels(folder / "one", [f"{path.name},a" for path in write_series(folder / "one", "one", 3)])

    jobs = []
    for index, (wrong, _) in enumerate(BAD_INPUT.values()):
        overrides = SMALL | SIZES[FLAT] | {"dataset_dir": "in.npz", "output_dir": f"out_{index}"} | wrong
        given = {key: value for key, value in overrides.items() if value is not None}
        jobs.append(command(FLAT, "fit", **given))
    return folder, dict(zip(BAD_INPUT, one_by_one(jobs, folder), strict=True))


@pytest.mark.parametrize("config", ["train.yaml", "inference.yaml"])
def test_a_wrong_path_ends_the_process_with_an_error(tmp_path, config):
    result = execute(command(FLAT, None, config=config, dataset_dir="not_there", output_dir="out"), tmp_path, 1)
    assert "ValueError: export not_there does not exist; check dataset_dir" in result.stderr
    assert not (tmp_path / "out").exists()


@each_mistake
def test_bad_input_ends_the_command_with_a_sentence(refused, mistake):
    folder, results = refused
    result = results[mistake]
    assert result.returncode not in (0, 3), f"{mistake}: exit code {result.returncode}"
    kinds = ("ValueError: ", "monai_salm.")
    sentences = [line for line in result.stderr.splitlines() if line.startswith(kinds)]
    assert any(BAD_INPUT[mistake][1] in line for line in sentences), f"{mistake}:\n{result.stderr}"
    assert not list(folder.glob("*/models")) and not list(folder.glob("*/protected"))
    assert not (folder / "good" / "out").exists()
    assert {path.name for path in (folder / "letters").iterdir()} == {"letter.txt", "labels.csv"}


def test_monai_salm_protects_and_verifies_with_the_bundle(tmp_path):
    for index in range(8):
        write_nifti(tmp_path / "in" / f"v{index}.nii.gz", index, (14, 15, 9))
    write_labels(
        tmp_path, [f"v{index}.nii.gz,{'ab'[index % 2]},{'test' if index > 5 else 'train'}" for index in range(8)]
    )
    sets = [f"--set={key}={value}" for key, value in (SMALL | SIZES[VOLUME]).items()]
    base = [sys.executable, "-m", "monai_salm.cli"]
    labels = ["--labels", str(tmp_path / "labels.csv")]
    protect = [*base, "protect", str(tmp_path / "in"), str(tmp_path / "out"), *labels, "--dim", "3", *sets]
    result = execute([*protect, "--no-verify"], tmp_path, 0)
    assert f"protected files: {tmp_path / 'out' / 'protected'}" in result.stdout
    written = contents(tmp_path / "out" / "protected")
    assert len(written) == 6 + 1 and not (tmp_path / "out" / "report.json").exists()
    result = execute([*base, "verify", str(tmp_path / "out")], tmp_path, None)
    assert result.returncode == 3, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    validate_results(report)
    assert f"verdict: {report['verdict']}" in result.stdout and report["cohort"]["released"] == 6
    assert contents(tmp_path / "out" / "protected") == written
    assert execute(protect, tmp_path, None).returncode == 3, "the same command again goes on, and verifies"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (VOXELS, {"spatial_size": [30, 30, 30]}, r"victim 'unet' .* images of \(30, 30, 30\).*multiples"),
        (VOXELS, {"num_classes": 5}, "victim 'unet' .* with 2 classes .*change it, num_classes"),
        (FLAT, {"num_classes": 5}, "victim 'small_cnn' .* with 3 classes"),
        (VOLUME, {"num_classes": 2}, "victim 'small_cnn' .* with 3 classes"),
        (FLAT, {"spatial_size": 64}, "spatial_size is 64; it must have 2 numbers"),
        (FLAT, {"defenses": "foo"}, "no set of defenses 'foo'"),
        (VOLUME, {"epochs": 0}, "epochs of victims is 0; it must be a whole number, 1 or more"),
        (VOLUME, {"seeds": 0}, "seeds is 0; it must be a whole number, 1 or more"),
        (FLAT, {"seeds": 10**21}, "seeds is 10+; .* at most 10000"),
        (FLAT, {"epochs": "abc"}, "epochs of victims is 'abc'; it must be a whole number"),
        (VOLUME, {"victim_batch_size": 2.5}, "batch_size of victims is 2.5; it must be a whole number"),
        (VOXELS, {"victim_learning_rate": "fast"}, "learning_rate of victims is 'fast'; it must be a number"),
        (FLAT, {"victim_learning_rate": math.inf}, "learning_rate of victims is inf; it must be a number"),
        (VOXELS, {"resample": 0}, "resample is 0; it must be a number, 0.1 or more and at most 10"),
        *((name, {"workers": 0}, "workers is 0; it must be a whole number, 1 or more") for name in BUNDLES),
        (FLAT, {"spatial_size": ["a", "b"]}, "a side of spatial_size is 'a'"),
        (FLAT, {"seeds": ["a"]}, "a seed is 'a'; it must be a whole number"),
        (FLAT, {"seeds": 1.5}, "seeds is 1.5; it must be a whole number"),
        *((name, {"workers": "abc"}, "workers is 'abc'; it must be a whole number") for name in BUNDLES),
        *((name, {}, "") for name in BUNDLES),
    ],
)
def test_a_study_that_cannot_be_is_told_before_the_fit(tmp_path, name, change, words):
    parser = ConfigParser()
    parser.read_config(config_file(name, "train.yaml"))
    classes = ["a", "b"] if name == VOXELS else ["a", "b", "c"]
    told = f"classes={classes}, voxelwise={name == VOXELS}, tested=lambda split: ()"
    cohort = f"$__import__('types').SimpleNamespace({told})"
    parser.update({"cohort": cohort, "output_dir": str(tmp_path), **change})
    check = "run::0"
    if not words:
        assert parser.get_parsed_content(check) is None
    else:
        with pytest.raises(RuntimeError) as error:
            parser.get_parsed_content(check)
        assert re.search(words, str(workflows._unwrapped(error.value)))
    assert not list(tmp_path.iterdir()), "neither bank nor control was opened"


def test_the_readme_of_a_bundle_names_run_ids_that_exist():
    for name in BUNDLES:
        ids = ConfigParser.load_config_file(config_file(name, "train.yaml"))
        text = (workflows.bundle_path(name) / "docs" / "README.md").read_text()
        for run_id in ("fit", "protect", "verify"):
            assert f"`{run_id}`" in text and isinstance(ids[run_id], list)
        first, *stages = ids["run"]
        assert first.startswith("$@study.check(") and ids["check"] == [first]
        assert stages == [*ids["fit"], *ids["protect"], *ids["verify"]], name
        for expression in ids["run"]:
            ast.parse(expression.removeprefix("$").replace("@", "").replace("::", "."))
