# SPDX-License-Identifier: Apache-2.0
"""The command line: what inspect tells of an export, and where its output may go."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import ROOT, assert_refused
from exports import write_decathlon, write_npz, write_series
from pydicom.data import get_testdata_file

from monai_salm.cli.codes import BAD_INPUT, DONE, NOT_PROTECTED, UNREAD


def test_inspect_needs_no_torch(export):
    script = (
        "import sys\nfrom monai_salm import cli\nassert cli.main(sys.argv[1:]) == 0\n"
        "heavy = {'torch', 'monai', 'matplotlib', 'itk'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script, "inspect", export, "--dim", "3"], check=True, timeout=60)


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


def test_inspect_takes_volumes_where_voxels_have_labels(run, tmp_path):
    code, out, _ = run("inspect", write_decathlon(tmp_path / "in", 3))
    assert code == DONE and "3 cases of 3 patients" in out
    (tmp_path / "in" / "a.txt").write_text("x")
    code, out, err = run("inspect", tmp_path / "in", "--dim", 2)
    assert code == BAD_INPUT and "holds no 2D image" in err
    assert "1 unknown_file; not_2d: " in err and "use --dim 3" in err, "what befell most files is explained"
