# SPDX-License-Identifier: Apache-2.0
"""The command line: bad input is told at once, in one sentence, and nothing is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_runs import LABELS, ROOT, assert_refused
from exports import write_labels, write_nifti, write_npz

from monai_salm.cli.arguments import setting
from monai_salm.cli.codes import BAD_INPUT, DONE, NOT_PROTECTED
from monai_salm.release import labels

pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file")


@pytest.mark.parametrize(
    ("text", "value"),
    [("8/255", "8/255"), ("3", 3), ("true", True), ("True", True), ("null", None), ("[1, 2]", [1, 2]), ("a=b", "a=b")],
)
def test_set_reads_values_as_json_or_python_else_as_text(text, value):
    assert setting(f"train::x={text}") == ("train::x", value)


@pytest.mark.parametrize("text", ["epochs", "=3", "output_dir=/tmp/x", "dataset_dir=/tmp/x"])
def test_set_refuses_what_is_no_setting(run, export, tmp_path, text):
    assert run("protect", export, tmp_path / "out", "--set", text)[0] == BAD_INPUT


def test_a_wrong_folder_is_named(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("x")
    assert_refused(run("inspect", tmp_path / "nope"), "does not exist", "check the path")
    assert_refused(run("inspect", tmp_path / "empty"), "is empty")
    assert_refused(run("inspect", tmp_path / "text"), "holds no 2D image", "unknown_file")
    assert_refused(run("protect", tmp_path / "nope", tmp_path / "out"), "does not exist")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([*LABELS, "images/v9.nii.gz,a"], ["nothing in the export has the names in line 6 of"]),
        ([row.replace(",b", ",a") for row in LABELS], ["one class"]),
        ([f"{row},holdout" for row in LABELS], ["split must be train, val or test", "lines 2, 3, 4, 5"]),
        (["images/v0.nii.gz,a", "images/v0.nii.gz,b"], ["different labels", "lines 2, 3"]),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "protect"])
def test_a_label_table_that_does_not_fit_is_told_by_line(run, export, stub, tmp_path, command, rows, words):
    write_labels(export, rows)
    if command == "inspect":
        assert_refused(run("inspect", export, "--dim", 3), *words)
    else:
        assert_refused(run("protect", export, tmp_path / "out", "--bundle", stub), *words)
        assert not (tmp_path / "out").exists()


def test_a_missing_label_table_is_named(run, export, stub, tmp_path):
    out = tmp_path / "out"
    assert_refused(run("inspect", export, "--labels", tmp_path / "no.csv"), "no.csv cannot be read")
    assert_refused(run("protect", export, out, "--labels", tmp_path / "no.csv"), "no.csv cannot be read")
    (export / "labels.csv").unlink()
    assert_refused(run("protect", export, out, "--bundle", stub), "has no labels.csv", "case,label")


@pytest.mark.parametrize("epsilon", ["0", "-1", "nan", "2", "8/255 parsec", "1/0"])
def test_a_bad_epsilon_is_refused_at_once(run, export, tmp_path, epsilon):
    assert_refused(run("protect", export, tmp_path / "out", f"--epsilon={epsilon}"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ratio", ["0", "-0.1", "1.5", "nan"])
def test_a_bad_mask_ratio_is_refused_at_once(run, export, tmp_path, ratio):
    assert_refused(
        run("protect", export, tmp_path / "out", f"--mask-ratio={ratio}"), "mask_ratio is", "above 0 and at most 1"
    )


def test_an_output_folder_that_could_do_harm_is_refused(run, export, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.doc").write_text("x")
    assert_refused(run("protect", export, export / "out"), "lies inside the export")
    assert_refused(run("protect", export, export), "is the export itself")
    assert_refused(run("protect", export, full), "choose an empty or new folder")
    assert [path.name for path in full.iterdir()] == ["thesis.doc"]


@pytest.mark.parametrize("plan", [[], ["--dry-run"]])
@pytest.mark.parametrize("place", ["new", "out", "out/private", "out/protected"])
def test_a_place_that_cannot_be_written_to_is_told_before_the_export_is_read(
    run, export, started, tmp_path, monkeypatch, place, plan
):
    for name in ("private", "protected"):
        (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / "manifest.jsonl").touch()
    closed = tmp_path / (place if place != "new" else ".")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed)  # root may write everywhere
    monkeypatch.setattr(labels, "find_labels", lambda *_: pytest.fail("the export was read"))
    out = tmp_path / ("new/deep" if place == "new" else "out")
    assert_refused(run("protect", export, out, "--dim", 3, *plan), f"no permission to write in {closed}; allow it")


@pytest.mark.parametrize(
    ("place", "environment", "told"),
    [
        ("", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "set PYTHONUTF8=1"),
        ("gone", {}, "current folder is not there any more"),
    ],
)
def test_a_place_that_no_command_can_work_in_is_told_with_the_fix(export, tmp_path, place, environment, told):
    (tmp_path / "gone").mkdir()
    script = "import os, sys\nfrom monai_salm import cli\nos.path.exists('../gone') and os.rmdir('../gone')\n"
    command = [sys.executable, "-c", script + "sys.exit(cli.main(sys.argv[1:]))", "inspect", export, "--dim", "3"]
    options = {"cwd": tmp_path / place, "env": os.environ | {"PYTHONPATH": str(ROOT)} | environment}
    done = subprocess.run(command, timeout=60, capture_output=True, text=True, **options)
    assert_refused((done.returncode, done.stdout, done.stderr), told)


def test_a_missing_folder_for_temporary_files_is_told_before_the_fit(run, started, export, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: [str(tmp_path / "nope")])
    monkeypatch.setattr("tempfile.tempdir", None)
    assert_refused(run("protect", export, tmp_path / "out", "--dim", "3"), "TMPDIR")
    assert not started


def test_an_export_that_may_not_be_read_is_named(run, export, stub, tmp_path, monkeypatch):
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(export / "Jane Doe"))

    monkeypatch.setattr("monai_salm.release.labels.find_labels", denied)
    for command in (["inspect", export], ["protect", export, tmp_path / "out", "--bundle", stub]):
        result = run(*command)
        assert_refused(result, f"Permission denied: a file or folder in {export}")
        assert "Jane" not in result[2]


@pytest.mark.parametrize(
    ("name", "told"),
    [("../out/private/bank.sqlite", "private/bank.sqlite"), ("../out/protected/Jane", "a file in protected/")],
)
def test_what_is_beside_the_export_is_not_said_to_be_in_it(run, export, stub, monkeypatch, name, told):
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(Path(name).absolute()))

    monkeypatch.chdir(export)
    monkeypatch.setattr("monai_salm.release.labels.find_labels", denied)
    result = run("protect", ".", "../out", "--bundle", stub)
    assert_refused(result, f"Permission denied: {told}")
    assert "Jane" not in result[2]


def test_an_archive_that_may_not_be_read_is_named(run, tmp_path, monkeypatch):
    def denied(root: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(root.absolute()))

    monkeypatch.chdir(write_npz(tmp_path / "a.npz").parent)
    monkeypatch.setattr("monai_salm.release.labels.find_labels", denied)
    _, _, err = run("inspect", "a.npz")
    assert err == "monai-salm: Permission denied: a.npz\n"


def test_names_of_folders_may_have_the_signs_of_configs(run, export, tmp_path, stub):
    folder = tmp_path / "#1 @::a%::b \\#"
    folder.mkdir()
    export, stub = export.rename(folder / "in"), Path(stub).rename(folder / "stub")
    code, _, err = run("protect", export, folder / "out", "--bundle", stub)
    assert code == DONE, err
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]
    assert run("verify", folder / "out")[0] == DONE


def test_an_unknown_bundle_or_setting_is_told_with_what_there_is(run, export, stub, tmp_path):
    out = tmp_path / "out"
    assert_refused(run("protect", export, out, "--bundle", "nope"), "salm_2d_classification, salm_3d_classification")
    assert_refused(run("bundle", "path", "nope"), "salm_2d_classification, salm_3d_classification")
    assert_refused(run("protect", export, out, "--bundle", stub, "--set", "mask_rato=1"), "did you mean 'mask_ratio'")
    assert_refused(run("protect", export, out, "--bundle", stub, "--set", "train::nope=1"), "'train::nope'")


@pytest.mark.parametrize(
    ("chosen", "takes"),
    [
        ("learning_rate=abc", "a number, such as 0.005"),
        ("seed=x", "a number, such as 0"),
        ("surrogate_steps=many", "a number, such as 120"),  # an expression in the bundle
        ("transplant=no", "true or false, such as True"),
        ("transplant=2", "true or false, such as True"),
        ("transplant=null", "true or false, such as True"),
        ("batch_size=true", "a number, such as 16"),
        ("seed=NaN", "a number, such as 0"),
    ],
)
def test_a_word_for_a_setting_that_takes_none_is_told_with_what_it_takes(run, export, tmp_path, chosen, takes):
    name, value = setting(chosen)
    command = ("protect", export, tmp_path / "out", "--dim", 3, "--no-verify", "--set", chosen)
    assert_refused(run(*command), f"{name} is {value!r}; it takes {takes}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ("learning_rate=-1", "AdamW does not take the settings that it is given: Invalid learning rate: -1"),
        ("learning_rate=null", "AdamW does not take the settings that it is given"),
        ("learning_rate=0", "learning_rate is 0.0; it must be a number, above 0"),
        ("learning_rate=1e300", "learning_rate is 1e+300; it must be a number, above 0"),
        ("seed=null", "seed is None; it must be a whole number"),
        ("surrogate_steps=-3", "surrogate_steps is -3; it must be a whole number, 0 or more"),
        ("num_classes=1", "out_channels is 1 and there are 2 classes; set num_classes"),
        ("mask_ratio=2", "mask_ratio is 2; it must be a number, above 0 and at most 1"),
        ("spatial_size=-1", "spatial_size is -1; it must have 2 or 3 numbers"),
    ],
)
def test_a_number_out_of_range_is_one_clear_sentence(run, export, tmp_path, chosen, told):
    assert_refused(run("protect", export, tmp_path / "out", "--dim", 3, "--no-verify", "--set", chosen), told)
    assert not (tmp_path / "out" / "protected").exists()


def test_words_are_taken_where_a_bundle_has_a_number_or_computes_what_they_replace(run, export, stub, tmp_path):
    train = Path(stub) / "configs" / "train.yaml"
    computed = "labels: $@dataset_dir + '/labels.csv'"
    train.write_text(train.read_text().replace("labels: null", computed).replace("epsilon: 2 stored", "epsilon: 0.1"))
    said = ("--labels", export / "labels.csv", "--epsilon", "2 stored", "--set", "at_fit=$1")
    assert run("protect", export, tmp_path / "out", "--bundle", stub, *said)[0] == DONE


@pytest.mark.parametrize(
    ("chosen", "option"),
    [
        ("epsilon=1/255", ("--epsilon", "1/255")),
        ("mask_ratio=0.1", ("--mask-ratio", "0.2")),
        ("rename=false", ("--rename",)),
        ("window=[0, 1]", ("--window", "0", "2")),
        ("require_deidentified=false", ("--require-deidentified",)),
        ("spatial_dims=2", ("--dim", "2")),
    ],
)
def test_a_setting_that_is_given_twice_is_refused(run, started, export, tmp_path, chosen, option):
    command = ("protect", export, tmp_path / "out", "--no-verify", "--set", chosen)
    assert run(*command)[0] == DONE
    assert_refused(run(*command, *option), chosen.partition("=")[0], "by --set and by an option")
    assert len(started) == 1


def test_constant_and_broken_images_are_refused_with_a_reason(run, tmp_path):
    import nibabel as nib

    folder = tmp_path / "in"
    write_nifti(folder / "good.nii")
    nib.save(nib.Nifti1Image(np.full((5, 5, 5), 7, np.int16), np.eye(4)), folder / "flat.nii")
    (folder / "torn.nii").write_bytes((folder / "good.nii").read_bytes()[:500])
    code, out, _ = run("inspect", folder, "--dim", 3, "--names")
    assert code == NOT_PROTECTED and "flat.nii" in out and "torn.nii" in out and "1 cases" in out


def test_a_setting_of_null_is_no_longer_the_one_of_the_bundle(run, export, stub, tmp_path):
    run("protect", export, tmp_path / "out", "--bundle", stub, "--set", "verdict=null")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == {"verdict": "None"}


@pytest.mark.parametrize("value", [["a#1", None], {"at": "1 @::a%::b", "all": ["#"]}])
def test_texts_in_lists_and_dictionaries_may_have_the_signs_of_configs(run, export, stub, tmp_path, value):
    run("protect", export, tmp_path / "out", "--bundle", stub, "--set", f"verdict={json.dumps(value)}")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == {"verdict": str(value)}
