# SPDX-License-Identifier: Apache-2.0
"""The command line: protect and verify from end to end, interrupted or not, and what they exit with."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from cli_runs import assert_refused
from exports import write_labels, write_nifti, write_series

from monai_salm import cli, run_settings, workflows
from monai_salm.cli.codes import BAD_INPUT, DONE, FAILED, INTEGRITY, INTERRUPTED, LOCKED, NOT_PROTECTED
from monai_salm.release import lock

pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file")


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
