# SPDX-License-Identifier: Apache-2.0
"""The command line: what it says, what it exits with, and what it does not import."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exports import write_decathlon, write_labels, write_nifti, write_npz, write_series
from pydicom.data import get_testdata_file

from monai_salm import cli, run_settings, workflows
from monai_salm.bank import PerturbationBank, Record
from monai_salm.cli.arguments import setting
from monai_salm.cli.codes import BAD_INPUT, DONE, FAILED, INTEGRITY, INTERRUPTED, LOCKED, NOT_PROTECTED, UNREAD
from monai_salm.release import labels, lock

ROOT = Path(__file__).resolve().parents[1]
LABELS = [f"images/v{index}.nii.gz,{'ab'[index % 2]}" for index in range(4)]
# The ids that the bundles promise, with stages that cost nothing.
STUB = """\
imports:
  - $import sys
  - $import pathlib
  - $import test_protect
  - $import monai_salm
  - $import monai_salm.release.protect
bundle_root: .
dataset_dir: null
labels: null
output_dir: null
epsilon: 2 stored
mask_ratio: 0.4
window: auto
seed: 0
at_fit: null
at_verify: null
verdict: protected
shard: null
rename: false
defenses: null
cohort:
  _target_: monai_salm.release.labels.load_cohort
  dataset_dir: "@dataset_dir"
  labels: "@labels"
  spatial_dims: 3
  window: "@window"
  seed: "@seed"
written:
  _target_: monai_salm.release.protect.protect_cohort
  cohort: "@cohort"
  bank: $test_protect.bank_of(@cohort)
  budget: "@epsilon"
  output_dir: "@output_dir"
  spatial_dims: 3
  shard: "@shard"
  rename: "@rename"
fit: ["$@at_fit", "$@cohort"]
protect: ["$@written"]
verify:
  - $@at_verify
  - '$pathlib.Path(@output_dir, "report.json").write_text(''{"verdict": "%s"}'' % @verdict)'
run: ["$@at_fit", "$@cohort", "$@written", "$@at_verify",
  '$pathlib.Path(@output_dir, "report.json").write_text(''{"verdict": "%s"}'' % @verdict)']
"""


pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file")


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


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    """Bad input: code 2 and one sentence that has the words, without a traceback."""
    code, _, err = result
    said = [line for line in err.splitlines() if line.startswith("monai-salm: ")]
    assert code == BAD_INPUT, err
    assert "Traceback" not in err and len(said) == 1, err
    for word in words:
        assert word in said[0]


# ------------------------------------------------------------------- at a glance


@pytest.mark.parametrize("arguments", (["--help"], ["--version"], ["bundle", "list"], ["protect", "--help"]))
def test_answers_without_heavy_imports(arguments, tmp_path):
    script = (
        "import sys\nfrom monai_salm import cli\n"
        "try: cli.main(sys.argv[1:])\nexcept SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'monai', 'numpy', 'pydicom', 'nibabel', 'rich', 'itk'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, cwd=tmp_path, timeout=60)


def test_inspect_needs_no_torch(export):
    script = (
        "import sys\nfrom monai_salm import cli\nassert cli.main(sys.argv[1:]) == 0\n"
        "heavy = {'torch', 'monai', 'matplotlib', 'itk'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script, "inspect", export, "--dim", "3"], check=True, timeout=60)


def test_usage_errors_exit_with_2(run, export):
    for arguments in ([], ["fly"], ["protect", export], ["protect", export, "out", "--dim", "4"]):
        assert run(*arguments)[0] == BAD_INPUT
    code, _, err = run("protect", export, "out", "--dim", "2", "--bundle", "salm_2d_classification")
    assert code == BAD_INPUT and "not allowed with" in err


@pytest.mark.parametrize(
    ("text", "value"),
    [("8/255", "8/255"), ("3", 3), ("true", True), ("True", True), ("null", None), ("[1, 2]", [1, 2]), ("a=b", "a=b")],
)
def test_set_reads_values_as_json_or_python_else_as_text(text, value):
    assert setting(f"train::x={text}") == ("train::x", value)


@pytest.mark.parametrize("text", ["epochs", "=3", "output_dir=/tmp/x", "dataset_dir=/tmp/x"])
def test_set_refuses_what_is_no_setting(run, export, tmp_path, text):
    assert run("protect", export, tmp_path / "out", "--set", text)[0] == BAD_INPUT


# ----------------------------------------------------------------------- inspect


def test_inspect_counts_cases_by_class_and_split(run, export):
    code, out, _ = run("inspect", export, "--dim", 3)
    assert code == DONE
    assert "4 cases of 4 patients: 4 nifti, in 4 files; no test split, verification holds 2 back" in out
    code, out, _ = run("inspect", write_npz(export.parent / "m.npz"))
    assert code == DONE and [cell.strip() for cell in out.splitlines()[2].split("┃")[1:-1]] == [
        "class",
        "train",
        "val",
        "test",
        "all",
    ]


def test_inspect_lists_refusals_with_reason_name_and_fix(run, export):
    (export / "Notes on Jane.txt").write_text("x")
    write_series(export / "S1", "one")
    code, out, err = run("inspect", export, "--dim", 3)
    assert code == NOT_PROTECTED and "Jane" not in out + err and "case-" in out
    code, out, err = run("inspect", export, "--dim", 3, "--names")
    assert code == NOT_PROTECTED
    assert "2 refused: 1 no_label, 1 unknown_file" in out
    assert (
        "Notes on Jane.txt" in out and "neither DICOM nor NIfTI" in out and "has no row for this case; add one" in out
    )
    assert "Jane" not in err, "names are for the screen and not for logs"


def test_inspect_shows_the_first_refusals_and_all_on_request(run, export):
    for index in range(30):
        (export / f"note{index:02d}.txt").write_text("x")
    _, out, _ = run("inspect", export, "--dim", 3, "--names")
    assert "and 10 more; --all lists them" in out and "note29.txt" not in out
    _, out, _ = run("inspect", export, "--dim", 3, "--all")
    assert "note" not in out and "v0.nii.gz" not in out and out.count("inspect EXPORT --all --names") == 1
    _, out, _ = run("inspect", export, "--dim", 3, "--all", "--names")
    assert "note29.txt" in out and "images/v0.nii.gz" in out and "inspect EXPORT" not in out


def test_inspect_shows_names_without_control_codes(run, export):
    (export / "evil\x1b[2Jname").write_text("x")
    _, out, _ = run("inspect", export, "--dim", 3, "--names")
    assert "\x1b" not in out and "evil" in out


def test_inspect_needs_neither_an_open_screen_nor_one_that_has_all_letters(export):
    (export / "prénom.txt").write_text("x")
    command = [sys.executable, "-m", "monai_salm", "inspect", export, "--dim", "3", "--names"]
    ascii_only = {"env": os.environ | {"PYTHONIOENCODING": "ascii"}, "cwd": ROOT, "timeout": 120}
    done = subprocess.run(command, capture_output=True, text=True, **ascii_only)
    assert done.returncode == NOT_PROTECTED and r"pr\xe9nom.txt" in done.stdout and not done.stderr
    closed = ["bash", "-c", '"$@" >&-', "-", *command]
    done = subprocess.run(closed, capture_output=True, text=True, **ascii_only)
    assert (done.returncode, done.stdout, done.stderr) == (NOT_PROTECTED, "", "")


def test_output_that_nobody_reads_ends_a_command_quietly_and_as_no_bad_result(run, export, stub, tmp_path):
    out = tmp_path / "out"
    assert run("protect", export, out, "--bundle", stub, "--no-verify")[0] == DONE
    shown = "at_verify=$__import__('rich.console').console.Console().print('x')"  # as the study does
    protect = ("protect", export, tmp_path / "new", "--bundle", stub, "--set", shown)
    inspect, verify = ("inspect", export, "--dim", "3"), ("verify", out, "--files-only")
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    for unbuffered, commands in (("", (["--help"], verify)), ("1", (inspect, verify, protect))):
        for command in commands:
            reads, writes = os.pipe()
            os.close(reads)
            done = subprocess.run(
                [sys.executable, "-m", "monai_salm", *command],
                stdout=writes,
                stderr=subprocess.PIPE,
                text=True,
                timeout=240,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": unbuffered},
            )
            os.close(writes)
            assert done.returncode == UNREAD, (command, done.stderr)
            assert "Traceback" not in done.stderr and "monai-salm: " not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_that_a_full_disk_cannot_take_is_told_in_a_sentence():
    for command, codes in ((["bundle", "list"], {BAD_INPUT}), (["inspect", "not-there"], {BAD_INPUT})):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "monai_salm", *command], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT
            )
        assert done.returncode in codes and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    with open("/dev/full", "w") as full:  # nothing can be said at all
        done = subprocess.run([sys.executable, "-m", "monai_salm", "inspect", "not-there"], stdout=full, stderr=full)
    assert done.returncode == BAD_INPUT


def test_inspect_works_without_labels_and_says_so(run, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "CT").write_bytes(Path(get_testdata_file("CT_small.dcm", download=False)).read_bytes())
    code, out, _ = run("inspect", tmp_path / "in")
    assert code == DONE and "1 cases of 1 patients: 1 dicom" in out and "No label table" in out


def test_inspect_shows_what_was_found_before_it_complains_of_labels(run, export):
    write_series(export / "S1", "one")
    result = run("inspect", export, "--dim", 2)
    assert_refused(result, "no case has a label")
    assert "4 not_2d" in result[1] and "--dim 3 (spatial_dims=3)" in result[1].replace("\n", " ")


def test_inspect_reads_real_files(run, data_dir):
    code, out, _ = run("inspect", data_dir / "pneumoniamnist.npz", "--labels", data_dir / "nope.csv")
    assert code == BAD_INPUT
    code, out, _ = run("inspect", data_dir / "dicom_awkward")
    assert code == NOT_PROTECTED and "duplicate_uid" in out and "unsupported_photometric" in out


# --------------------------------------------------------------------- bad input


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


# --------------------------------------------------- protect and verify, end to end


def test_protect_writes_and_verify_alone_works_from_what_it_kept(run, export, stub, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    code, said, err = run("protect", "in", "out", "--bundle", "stub", "--no-verify", "--set", "seed=7")
    assert code == DONE, err
    assert (out / "protected" / "labels.csv").is_file()
    assert {path.stem for path in out.iterdir()} == {"manifest", "private", "protected", "release"}
    kept = json.loads((out / "private" / "run-config.json").read_text())
    assert kept["overrides"] == {"seed": 7, "dataset_dir": str(export), "output_dir": str(out)}
    monkeypatch.chdir("/")
    code, said, _ = run("verify", out)
    assert code == DONE and "verdict: protected" in said and "report.html" in said


def test_a_setting_of_null_is_no_longer_the_one_of_the_bundle(run, export, stub, tmp_path):
    run("protect", export, tmp_path / "out", "--bundle", stub, "--set", "verdict=null")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == {"verdict": "None"}


@pytest.mark.parametrize("value", [["a#1", None], {"at": "1 @::a%::b", "all": ["#"]}])
def test_texts_in_lists_and_dictionaries_may_have_the_signs_of_configs(run, export, stub, tmp_path, value):
    run("protect", export, tmp_path / "out", "--bundle", stub, "--set", f"verdict={json.dumps(value)}")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == {"verdict": str(value)}


def test_verify_hands_the_defenses_to_the_study(run, export, stub, tmp_path, monkeypatch):
    out, given = tmp_path / "out", []
    assert run("protect", export, out, "--bundle", stub, "--no-verify")[0] == DONE
    monkeypatch.setattr(workflows, "run_bundle", lambda name, ids, overrides: given.append(overrides.get("defenses")))
    for arguments in ((), ("--defenses", "standard")):
        run("verify", out, *arguments)
    assert given == [None, "standard"]
    assert run("verify", out, "--defenses", "some")[0] == BAD_INPUT
    assert_refused(run("verify", out, "--defenses", "full", "--set", "defenses=blur"), "leave one of the two out")


def test_a_verdict_other_than_protected_exits_with_3(run, export, stub, tmp_path):
    for verdict in ("not protected", "inconclusive"):
        arguments = ("protect", export, tmp_path / verdict, "--bundle", stub, "--set", f"verdict={verdict}")
        code, out, _ = run(*arguments)
        assert code == NOT_PROTECTED and f"verdict: {verdict}" in out


def test_a_refused_file_exits_with_3_and_says_where_the_reasons_are(run, export, stub, tmp_path):
    (export / "note.txt").write_text("x")
    code, out, _ = run("protect", export, tmp_path / "out", "--bundle", stub)
    said = f"1 refused (1 unknown_file), 4 files protected: see {tmp_path / 'out' / 'private' / 'refusals.jsonl'}"
    hint = "'monai-salm inspect EXPORT --all --names'"
    assert code == NOT_PROTECTED and out.count(said) == out.count("refused (") == out.count(hint) == 1
    code, out, _ = run("verify", tmp_path / "out")
    assert code == NOT_PROTECTED and f"\n{said}\n" in out and hint in out


def test_the_code_that_a_stage_exits_with_is_kept(run, export, stub, tmp_path):
    for code in (3, 5):
        arguments = (
            "protect",
            export,
            tmp_path / f"out{code}",
            "--bundle",
            stub,
            "--set",
            f"at_verify=$sys.exit({code})",
        )
        assert run(*arguments)[0] == code


def test_a_changed_file_exits_with_4(run, export, stub, tmp_path):
    out = tmp_path / "out"
    assert run("protect", export, out, "--bundle", stub)[0] == DONE
    (out / "protected" / "images" / "v0.nii.gz").write_bytes(b"other")
    code, said, err = run("verify", out)
    assert code == INTEGRITY and "changed: the file of line 2 of manifest.jsonl" in said and "v0" not in said + err
    code, said, _ = run("verify", out, "--names")
    assert code == INTEGRITY and "protected/images/v0.nii.gz" in said


@pytest.fixture
def ordinary_signals():
    """As of a process that was not started by nohup."""
    before = {end: signal.signal(end, signal.SIG_DFL) for end in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for end, handler in before.items():
        assert signal.signal(end, handler) is signal.SIG_DFL, "the command gave it back"


def test_a_signal_that_is_ignored_stays_so(run, export, stub, tmp_path, ordinary_signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    hangup = "$__import__('os').kill(__import__('os').getpid(), 1)"
    assert run("protect", export, tmp_path / "out", "--bundle", stub, "--set", f"at_verify={hangup}")[0] == DONE
    assert signal.signal(signal.SIGHUP, signal.SIG_DFL) is signal.SIG_IGN


@pytest.mark.parametrize(
    "stop",
    [
        "$(_ for _ in ()).throw(KeyboardInterrupt)",
        "$__import__('os').kill(__import__('os').getpid(), 15)",
        "$__import__('os').kill(__import__('os').getpid(), 1)",
    ],
)
def test_an_interrupted_run_exits_with_130_and_goes_on(run, export, stub, tmp_path, stop, ordinary_signals):
    code, _, err = run("protect", export, tmp_path / "out", "--bundle", stub, "--set", f"at_verify={stop}")
    assert code == INTERRUPTED and "same command again" in err
    code, _, err = run("protect", export, tmp_path / "out", "--bundle", stub)
    assert code == DONE, err


def test_a_run_that_is_interrupted_before_it_marks_its_folder_goes_on(run, export, stub, tmp_path, monkeypatch):
    command = ("protect", export, tmp_path / "out", "--bundle", stub)
    with monkeypatch.context() as patch:
        patch.setattr("monai_salm.release.lock.take", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*command)[0] == INTERRUPTED
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["private"]
    code, _, err = run(*command)
    assert code == DONE, err


def test_a_fault_of_the_program_says_where_but_not_what_it_read(run, export, stub, tmp_path):
    arguments = ["protect", export, tmp_path / "out", "--bundle", stub, "--set"]
    for fault in ("torch.dot(torch.ones(2), torch.ones(3))", "{}['Jane Doe']"):
        code, out, err = run(*arguments, f"at_fit=${fault}")
        assert code == FAILED and "Traceback" in err and "--debug" in err
        assert "inconsistent tensor size" not in out + err and "Jane" not in out + err
    with pytest.raises(KeyError, match="Jane"):
        cli.main(["--debug", *map(str, arguments), "at_fit=${}['Jane Doe']"])


def test_what_could_not_be_imported_is_told(run, export, stub, tmp_path):
    code, _, err = run("protect", export, tmp_path / "out", "--bundle", stub, "--set", "at_fit=$__import__('no_such')")
    assert code == FAILED and "No module named 'no_such'" in err


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        cli.main(["--debug", "inspect", str(tmp_path / "nope")])


def test_verify_of_a_folder_without_a_release_is_inconclusive(run, tmp_path):
    code, out, _ = run("verify", tmp_path)
    assert code == NOT_PROTECTED and "inconclusive" in out
    assert_refused(run("verify", tmp_path / "nope"), "there is no folder")


def test_verify_without_the_settings_of_protect_checks_the_files_or_says_what_to_do(run, export, stub, tmp_path):
    out = tmp_path / "out"
    assert run("protect", export, out, "--bundle", stub, "--no-verify")[0] == DONE
    (out / "private" / "run-config.json").write_text("{")
    assert_refused(run("verify", out), "cannot be understood")
    assert run("verify", out, "--files-only")[0] == DONE
    (out / "private" / "run-config.json").unlink()
    code, said, _ = run("verify", out)
    assert code == DONE and "only files were checked" in said
    assert_refused(run("verify", out, "--export", export), "run-config.json is missing", "monai-salm protect")


def test_verify_wants_the_export_where_it_was_or_its_new_place(run, export, stub, tmp_path):
    out = tmp_path / "out"
    assert run("protect", export, out, "--bundle", stub, "--no-verify")[0] == DONE
    export.rename(tmp_path / "moved")
    assert_refused(run("verify", out), "--export")
    assert run("verify", out, "--export", tmp_path / "moved")[0] == DONE


def test_a_label_table_outside_the_export_is_found_from_anywhere(run, export, stub, tmp_path, monkeypatch):
    (export / "labels.csv").rename(tmp_path / "table.csv")
    monkeypatch.chdir(tmp_path)
    assert run("protect", "in", "out", "--labels", "table.csv", "--bundle", stub, "--no-verify")[0] == DONE
    monkeypatch.chdir("/")
    assert run("verify", tmp_path / "out")[0] == DONE


def test_parts_are_written_by_themselves_after_a_fit(run, export, stub, tmp_path):
    out = tmp_path / "out"
    command = ("protect", export, out, "--bundle", stub)
    assert_refused(run(*command, "--shard", "1/2"), "no perturbations yet", "--fit-only")
    assert_refused(run(*command, "--fit-only", "--push", "A@localhost:4242"), "--push sends a whole release")
    assert run(*command, "--shard", "3/2")[0] == BAD_INPUT
    assert "is not I/N" in run(*command, "--shard", "")[2], "a variable that is not set asks for no whole release"
    prepare = "at_fit=$monai_salm.release.protect.prepare_output(@dataset_dir, @output_dir)"
    command = (*command, "--set", prepare)
    assert run(*command, "--fit-only")[0] == DONE
    assert not (out / "protected").exists()
    (out / "private" / "bank.sqlite").write_text("")  # the stub's fit makes none
    assert_refused(run(*command, "--shard", "2/2", "--epsilon", "3 stored"), "other settings")
    code, said, err = run(*command, "--shard", "2/2")
    assert code == DONE, err
    code, said, _ = run("verify", out)
    assert code == INTEGRITY and "missing_shard: shard 1 of 2" in said
    assert run(*command, "--shard", "1/2")[0] == DONE
    assert run("verify", out, "--files-only")[0] == DONE
    code, said, _ = run("verify", out)
    assert code == DONE and "4 protected" in said and "verdict: protected" in said


def test_a_dry_run_tells_and_writes_nothing(run, export, tmp_path):
    (export / "note.txt").write_text("x")
    code, said, _ = run("protect", export, tmp_path / "out", "--dim", 3, "--dry-run")
    assert code == NOT_PROTECTED and "nifti protected: 4 cases in 4 files" in said and "1 unknown_file" in said
    assert not (tmp_path / "out").exists()


def test_cases_and_files_are_told_apart_everywhere(run, stub, tmp_path):
    """A volume with a fourth axis holds one case for each of its parts."""
    export, out = tmp_path / "in", tmp_path / "out"
    for index in range(2):
        write_nifti(export / f"v{index}.nii.gz", index, (6, 7, 5, 3))
    (export / "note.txt").write_text("x")
    write_labels(export, [f"v{index}.nii.gz,{'ab'[index]}" for index in range(2)])
    assert "6 cases of 2 patients: 6 nifti, in 2 files;" in run("inspect", export, "--dim", 3)[1]
    plan = run("protect", export, out, "--dim", 3, "--dry-run", "--no-verify")[1]
    assert "nifti protected: 6 cases in 2 files" in plan
    command = ("protect", export, out, "--bundle", stub, "--no-verify")
    assert "1 refused (1 unknown_file), 2 files protected: see" in run(*command)[1]
    assert "files in the manifest: 2 protected" in run("verify", out, "--files-only")[1]


def test_a_plan_needs_to_know_the_budget(run, export, stub, tmp_path):
    train = Path(stub) / "configs" / "train.yaml"
    train.write_text(train.read_text().replace("epsilon: 2 stored", "epsilon: $str(2) + ' stored'"))
    plan = ("protect", export, tmp_path / "out", "--bundle", stub, "--set", "spatial_dims=3", "--dry-run")
    assert_refused(run(*plan), "give --epsilon")
    assert run(*plan, "--epsilon", "2 stored")[0] == DONE


def test_the_gate_reaches_the_bundle(run, started, export, tmp_path):
    assert run("protect", export, tmp_path / "out", "--no-verify", "--require-deidentified")[0] == DONE
    assert started[0][2]["require_deidentified"] is True
    folder = write_series(tmp_path / "dcm", "A")[0].parent
    assert_refused(run("inspect", folder, "--require-deidentified"), "4 not_deidentified")


def test_a_folder_that_another_process_writes_exits_with_5(run, export, stub, tmp_path):
    out = tmp_path / "out"
    assert run("protect", export, out, "--bundle", stub, "--no-verify")[0] == DONE
    parent = json.dumps(lock._myself() | {"pid": os.getppid(), "started": lock._started(os.getppid())})
    (out / "private" / "lock").write_text(parent)
    code, _, err = run("protect", export, out, "--bundle", stub, "--no-verify")
    assert code == LOCKED and f"process {os.getppid()}" in err
    (out / "private" / "lock").write_text(parent.replace(str(os.getppid()), "999999999"))
    assert run("protect", export, out, "--bundle", stub, "--no-verify")[0] == DONE


def test_who_may_not_write_into_a_folder_leaves_the_settings_of_who_does(run, export, stub, tmp_path):
    out = tmp_path / "out"
    fail = "at_fit=$[monai_salm.release.protect.prepare_output(@dataset_dir, @output_dir), {}['no']]"
    assert run("protect", export, out, "--bundle", stub, "--set", fail)[0] == FAILED
    kept = (out / run_settings.RUN_CONFIG).read_bytes()
    lock.give_back(out)  # which the end of the process does
    parent = {"pid": os.getppid(), "started": lock._started(os.getppid())}
    (out / "private" / "lock").write_text(json.dumps(lock._myself() | parent))
    assert run("protect", export, out, "--bundle", stub, "--epsilon", "3 stored")[0] == LOCKED
    early = "at_fit=$(_ for _ in ()).throw(KeyboardInterrupt)"
    assert run("protect", export, out, "--bundle", stub, "--set", early)[0] == INTERRUPTED
    assert (out / run_settings.RUN_CONFIG).read_bytes() == kept


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


# ------------------------------------------------------------------ which bundle


@pytest.fixture
def started(monkeypatch) -> list[tuple[str, tuple[str, ...], dict[str, object]]]:
    """What would have been run: bundle, stages and overrides."""
    calls: list[tuple[str, tuple[str, ...], dict[str, object]]] = []
    monkeypatch.setattr(
        workflows, "run_bundle", lambda name, stages, overrides: calls.append((name, tuple(stages), dict(overrides)))
    )
    return calls


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


def test_inspect_takes_volumes_where_voxels_have_labels(run, tmp_path):
    code, out, _ = run("inspect", write_decathlon(tmp_path / "in", 3))
    assert code == DONE and "3 cases of 3 patients" in out
    (tmp_path / "in" / "a.txt").write_text("x")
    code, out, err = run("inspect", tmp_path / "in", "--dim", 2)
    assert code == BAD_INPUT and "holds no 2D image" in err
    assert "1 unknown_file; not_2d: " in err and "use --dim 3" in err, "what befell most files is explained"


def test_a_broken_dataset_json_is_told_before_anything_is_written(run, started, tmp_path):
    export = write_decathlon(tmp_path / "in", 3)
    (export / "dataset.json").write_text('{"labels": {"0": "background"}}')
    assert_refused(run("protect", export, tmp_path / "out"), "dataset.json")
    assert not started and not (tmp_path / "out").exists()


# ------------------------------------------------------------------ the real bundles


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
