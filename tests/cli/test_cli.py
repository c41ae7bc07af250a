# SPDX-License-Identifier: Apache-2.0
"""The command line: what it does not import, which bundle and which settings a run has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_runs import assert_refused
from exports import write_decathlon, write_labels, write_series

from monai_salm import run_settings, workflows
from monai_salm.bank import PerturbationBank, Record
from monai_salm.cli.codes import BAD_INPUT, DONE, FAILED

pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file")


@pytest.mark.parametrize("arguments", (["--help"], ["--version"], ["bundle", "list"], ["protect", "--help"]))
def test_answers_without_heavy_imports(arguments, tmp_path):
    script = (
        "import sys\nfrom monai_salm import cli\n"
        "try: cli.main(sys.argv[1:])\nexcept SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'monai', 'numpy', 'pydicom', 'nibabel', 'rich', 'itk'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, cwd=tmp_path, timeout=60)


def test_usage_errors_exit_with_2(run, export):
    for arguments in ([], ["fly"], ["protect", export], ["protect", export, "out", "--dim", "4"]):
        assert run(*arguments)[0] == BAD_INPUT
    code, _, err = run("protect", export, "out", "--dim", "2", "--bundle", "salm_2d_classification")
    assert code == BAD_INPUT and "not allowed with" in err


def test_other_settings_for_the_same_folder_are_refused_and_change_nothing(run, export, stub, tmp_path):
    out = tmp_path / "out"
    command = ("protect", export, out, "--bundle", stub, "--no-verify")
    assert run(*command)[0] == DONE
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    changed = ("--epsilon", "3 stored", "--set", "seed=1", "--set", "rename=false")
    named = "Of the settings, epsilon was 2 stored and is 3 stored, seed was 0 and is 1"
    code, _, err = run(*command, *changed)
    assert_refused((code, "", err), "choose a new output folder", named)
    assert "rename was" not in err, "that is what it was"
    assert_refused(run(*command, "--rename"), "rename was False and is True")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert run(*command)[0] == DONE
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_fit_with_another_budget_or_mask_ratio_is_told_before_the_scan(run, started, export, tmp_path):
    out = tmp_path / "out"
    command = ("protect", export, out, "--no-verify", "--dim", 3)
    (out / "private").mkdir(parents=True)
    (out / "private" / "run.json").touch()
    assert run(*command, "--mask-ratio", 0.2)[0] == DONE
    # No fit is run here.
    perturbed = Record("case", torch.zeros(1, 2, 2, dtype=torch.int32), "digest", 1)
    PerturbationBank(out / run_settings.BANK, create=True).commit([perturbed], round_=1, score=0.0, state=b"")
    (out / "manifest.jsonl").touch()
    started.clear()
    assert_refused(run(*command), "mask_ratio was 0.2 and is 0.4", "another output folder")
    other = run(*command, "--mask-ratio", 0.2, "--epsilon", "5 stored", "--dry-run")
    assert_refused(other, "epsilon was 8/255 and is 5 stored")
    assert_refused(run(*command, "--dim", 2), "bundle was salm_3d_classification and is salm_2d_classification")
    assert not started
    assert run(*command, "--mask-ratio", 0.2, "--epsilon", "8/255 window", "--set", "epochs=1")[0] == DONE


def test_settings_are_free_until_a_round_of_the_fit_is_there(run, started, export, tmp_path):
    out = tmp_path / "out"
    command = ("protect", export, out, "--no-verify", "--dim", 3)
    assert run(*command, "--mask-ratio", 0.2)[0] == DONE
    for name in ("private/run.json", run_settings.BANK):  # as a fit leaves them that was killed in its first round
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
    run_settings.save_run(out, "salm_3d_classification", {"mask_ratio": 0.2})
    assert run(*command, "--mask-ratio", 0.3)[0] == DONE
    assert run_settings.load_run(out)[1]["mask_ratio"] == 0.3


@pytest.mark.parametrize(
    "part",
    [
        "{_target_: monai_salm.verification.asked.gone, _mode_: callable}",
        "{_target_: monai_salm.verification.study.VictimStudy, gone: 1}",
    ],
)
def test_a_bundle_of_another_version_is_told(run, export, stub, tmp_path, part):
    config = Path(stub) / "configs" / "train.yaml"
    config.write_text(config.read_text() + f"gone: {part}\n")
    result = run("protect", export, tmp_path / "out", "--bundle", stub, "--set", "at_fit=$@gone")
    assert_refused(result, "this version of monai_salm does not have; copy it anew", "gone")


def test_settings_that_nothing_was_made_with_are_forgotten(run, export, stub, tmp_path):
    prepare = "monai_salm.release.protect.prepare_output(@dataset_dir, @output_dir)"
    command = ("protect", export, tmp_path / "out", "--bundle", stub)
    for seed in (1, 2):
        assert run(*command, "--set", f"at_fit=$[{prepare}, {{}}['no']]", "--set", f"seed={seed}")[0] == FAILED
    assert run_settings.load_run(tmp_path / "out")[1]["seed"] == 2


@pytest.mark.parametrize(
    ("arguments", "bundle", "spatial_dims"),
    [
        ([], "salm_3d_segmentation", None),
        (["--dim", 3], "salm_3d_segmentation", 3),
        (["--dim", 2], "salm_3d_segmentation", 2),
        (["--set", "spatial_dims=2"], "salm_3d_segmentation", 2),
        (["--bundle", "salm_2d_classification"], "salm_2d_classification", None),
    ],
)
def test_voxel_labels_choose_the_segmentation_bundle(run, started, tmp_path, arguments, bundle, spatial_dims):
    export, out = write_decathlon(tmp_path / "in"), tmp_path / "out"
    code, _, err = run("protect", export, out, "--no-verify", *arguments)
    assert code == DONE, err
    overrides = {"dataset_dir": str(export), "output_dir": str(out)}
    overrides |= {} if spatial_dims is None else {"spatial_dims": spatial_dims}
    assert started == [(bundle, workflows.FIT + workflows.WRITE, overrides)]


@pytest.mark.parametrize(("arguments", "dim"), [([], 2), (["--dim", 2], 2), (["--dim", 3], 3)])
def test_labels_of_whole_cases_choose_a_classification_bundle(run, started, export, tmp_path, arguments, dim):
    (export / "dataset.json").write_text("{}")  # a table case,label has the last word
    assert run("protect", export, tmp_path / "out", "--no-verify", *arguments)[0] == DONE
    overrides = {"dataset_dir": str(export), "output_dir": str(tmp_path / "out")}
    assert started == [(f"salm_{dim}d_classification", workflows.FIT + workflows.WRITE, overrides)]


def test_a_broken_dataset_json_is_told_before_anything_is_written(run, started, tmp_path):
    export = write_decathlon(tmp_path / "in", 3)
    (export / "dataset.json").write_text('{"labels": {"0": "background"}}')
    assert_refused(run("protect", export, tmp_path / "out"), "dataset.json")
    assert not started and not (tmp_path / "out").exists()


@pytest.mark.parametrize("dim", [2, 3])
def test_the_shipped_bundles_refuse_one_class_before_they_fit(run, tmp_path, dim):
    export, rows = tmp_path / "in", []
    for name in ("one", "two"):
        paths = write_series(export / name, name, 3, patient=name)
        rows += [f"{path.relative_to(export).as_posix()},a" for path in paths] if dim == 2 else [f"{name},a"]
    write_labels(export, rows)
    assert_refused(run("protect", export, tmp_path / "out", "--dim", dim), "one class")
    assert not (tmp_path / "out" / "protected").exists()


@pytest.mark.parametrize("part", ["--dry-run", "--fit-only", "--dim=3"])
def test_a_patch_that_victims_cannot_take_is_told_before_the_fit(run, tmp_path, part):
    size = "spatial_size=[20, 20, 20]"
    command = ("protect", write_decathlon(tmp_path / "in", 4), tmp_path / "out", "--set", size, part)
    assert_refused(run(*command), "victim 'unet' cannot be trained on images of (20, 20, 20)", "must be multiples")
    assert not (tmp_path / "out" / run_settings.BANK).exists()
    assert_refused(run(*command, "--set", "spatial_sise=1"), "did you mean 'spatial_size'?")
