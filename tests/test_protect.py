# SPDX-License-Identifier: Apache-2.0
"""The release: what is written, what is never written, and that a killed run ends with the same bytes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from dicom_files import fitting_delta
from exports import write_labels, write_nifti, write_npz, write_series
from pydicom import dcmread

from monai_salm.bank import PerturbationBank
from monai_salm.io import formats
from monai_salm.perturbations.budget import Budget
from monai_salm.records import Record, image_digest
from monai_salm.release import commit as door
from monai_salm.release.commit import OutputError, Staged, check_output, commit
from monai_salm.release.custody import read_refusals
from monai_salm.release.labels import Cohort, load_cohort
from monai_salm.release.manifest import IntegrityError, ManifestRow, read_manifest
from monai_salm.release.protect import protect_cohort, read_protected

BUDGET = "2 stored"
DATA = Path(os.environ.get("MONAI_SALM_DATA", ""))
needs_data = pytest.mark.skipif("MONAI_SALM_DATA" not in os.environ, reason="MONAI_SALM_DATA is not set")


@pytest.fixture(autouse=True)
def _fixed_time(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


def nifti_cohort(root: Path, count: int = 4, splits: tuple[str, ...] = ()) -> Cohort:
    for index in range(count):
        write_nifti(root / "images" / f"v{index:02d}.nii.gz", index)
    rows = [f"images/v{i:02d}.nii.gz,{'ab'[i % 2]}" + (f",{splits[i]}" if splits else "") for i in range(count)]
    write_labels(root, rows)
    return load_cohort(root, spatial_dims=3)


def bank_of(cohort: Cohort, spatial_dims: int = 3) -> dict[str, np.ndarray]:
    """Two steps up at every seventh voxel, where there is room for them."""
    bank = {}
    for case in cohort.cases:
        image = formats.read(case, spatial_dims)
        low, high = sorted((edge - image.codec.intercept) / image.codec.slope for edge in image.codec.window)
        room = (image.stored >= low) & (image.stored + 2.0 * image.codec.step <= high)
        room.flat[np.arange(room.size) % 7 != 0] = False
        bank[case.sample_id] = (2 * room).astype(np.int8)
    return bank


def protect(
    cohort: Cohort, bank: dict[str, np.ndarray], out: Path, spatial_dims: int = 3, **options
) -> list[ManifestRow]:
    return protect_cohort(cohort, bank, **{"budget": BUDGET, **options}, output_dir=out, spatial_dims=spatial_dims)


def tree(folder: Path) -> dict[str, str]:
    """Digest of every file of a release but its keys, and what is signed with them."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".key", ".sig", ".pub")]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_released_case_is_written_and_no_other(tmp_path):
    cohort = nifti_cohort(tmp_path / "in", 5, ("train", "train", "val", "val", "test"))
    out = tmp_path / "out"
    rows = protect(cohort, bank_of(cohort), out)
    assert [row.file for row in rows] == [*(f"images/v0{i}.nii.gz" for i in range(4)), "labels.csv"]
    assert {path.name for path in (out / "protected" / "images").iterdir()} == {f"v0{i}.nii.gz" for i in range(4)}
    assert (out / "protected" / "labels.csv").read_text().splitlines() == [
        "case,label,split",
        "images/v00.nii.gz,a,train",
        "images/v01.nii.gz,b,train",
        "images/v02.nii.gz,a,val",
        "images/v03.nii.gz,b,val",
    ]
    assert read_manifest(out) == rows
    assert rows[-1].state == "table"
    for row in rows[:-1]:
        assert (row.state, row.source) == ("protected", row.file)
        assert (row.levels, row.max_abs, row.voxels) == (2, 2.0, 6 * 7 * 5) and 0 < row.changed <= row.voxels / 7 + 1
    for row in rows:
        assert row.sha256 == hashlib.sha256((out / "protected" / row.file).read_bytes()).hexdigest()
    assert not (out / door.STAGING).exists()


def test_slices_that_are_scaled_differently_have_levels_of_their_own(tmp_path):
    slopes = [0.5, 1.0, 2.0, 0.7]
    for index, path in enumerate(write_series(tmp_path / "in" / "s", "s")):
        dataset = dcmread(path)
        dataset.RescaleSlope = slopes[index]
        dataset.save_as(path)
    write_series(tmp_path / "in" / "t", "t")
    write_labels(tmp_path / "in", ["s,a", "t,b"])
    cohort = load_cohort(tmp_path / "in", spatial_dims=3)
    window = (-2000.0, 3000.0)
    bank = {case.sample_id: fitting_delta(formats.read(case, 3, window)) for case in cohort.cases}
    rows = protect(cohort, bank, tmp_path / "out", budget="4 physical", window=window)
    rows = [row for row in rows if row.state == "protected"]
    found = [(float(dcmread(tmp_path / "out/protected" / row.file).RescaleSlope), row.levels) for row in rows]
    assert sorted(found) == [(0.5, 8), (0.7, 5), *[(1.0, 4)] * 5, (2.0, 2)]


def test_what_is_private_is_closed_to_others(tmp_path):
    cohort = nifti_cohort(tmp_path / "in")
    protect(cohort, bank_of(cohort), tmp_path / "out")
    assert (tmp_path / "out" / "private").stat().st_mode & 0o777 == 0o700
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert json.loads((tmp_path / "out" / "private" / "run.json").read_text())["started"] == "2023-11-14T22:13:20+00:00"


def test_the_protected_files_are_read_back_by_sample_id(tmp_path):
    cohort = nifti_cohort(tmp_path / "in", 4, ("train", "train", "train", "test"))
    bank = bank_of(cohort)
    protect(cohort, bank, tmp_path / "out")
    twins = read_protected(cohort, tmp_path / "out")
    assert twins.keys() == {case.sample_id for case in cohort.released}
    for case in cohort.released:
        twin = twins[case.sample_id]
        assert (twin.label, twin.split, twin.group) == (case.label, case.split, case.group)
        clean, protected = formats.read(case, 3).stored, formats.read(twin, 3).stored
        np.testing.assert_array_equal(protected, clean + bank[case.sample_id])


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_dicom_is_written_under_new_uids_and_read_back(tmp_path, spatial_dims):
    write_series(tmp_path / "in" / "A", "one", 4)
    write_series(tmp_path / "in" / "B", "two", 3, patient="P2")
    write_labels(tmp_path / "in", ["A,ill", "B,well"])
    cohort = load_cohort(tmp_path / "in", spatial_dims=spatial_dims)
    bank = bank_of(cohort, spatial_dims)
    rows = protect(cohort, bank, tmp_path / "out", spatial_dims)
    images = [row for row in rows if row.levels]
    assert len(images) == 7 and len({row.sample_id for row in images}) == (7 if spatial_dims == 2 else 2)
    twins = read_protected(cohort, tmp_path / "out")
    for case in cohort.released:
        clean, protected = formats.read(case, spatial_dims), formats.read(twins[case.sample_id], spatial_dims)
        np.testing.assert_array_equal(protected.stored, clean.stored + bank[case.sample_id])
    times = {path.stat().st_mtime for path in (tmp_path / "out" / "protected").rglob("*")}
    assert len(times) == 1, "the order of writing would tell it too"
    table = (tmp_path / "out" / "protected" / "labels.csv").read_text().splitlines()
    assert len(table) == len(cohort.cases) + 1
    assert table[1:] == sorted(table[1:]), "the order of the export's names would tell who comes after whom"
    for line in table[1:]:
        named = tmp_path / "out" / "protected" / line.split(",")[0]
        assert named.is_dir() if spatial_dims == 3 else named.is_file()


def test_an_archive_is_one_file_with_the_same_name(tmp_path):
    (tmp_path / "in").mkdir()
    cohort = load_cohort(write_npz(tmp_path / "in" / "a.npz"))
    bank = bank_of(cohort, 2)
    (row,) = protect(cohort, bank, tmp_path / "out", 2)
    assert (row.file, row.voxels) == ("a.npz", 12 * 64)
    assert not (tmp_path / "out" / "protected" / "labels.csv").exists(), "an archive carries its own labels"
    twins = read_protected(cohort, tmp_path / "out")
    assert len(twins) == 12
    with pytest.raises(ValueError, match="already_protected"):
        load_cohort(tmp_path / "out" / "protected")
    again = load_cohort(tmp_path / "out" / "protected" / "a.npz")
    assert {case.sample_id for case in again.cases} == {case.sample_id for case in cohort.released}
    before, after = np.load(tmp_path / "in" / "a.npz"), np.load(tmp_path / "out" / "protected" / "a.npz")
    assert len(before["test_images"]) == 4 and len(after["test_images"]) == len(after["test_labels"]) == 0
    protect(cohort, bank, tmp_path / "out", 2)


def test_a_case_without_perturbation_is_refused_and_never_copied(tmp_path, capsys):
    cohort = nifti_cohort(tmp_path / "in", 6)
    bank = bank_of(cohort)
    names = [case.sample_id for case in cohort.cases]
    del bank[names[0]]
    bank[names[1]] = np.zeros_like(bank[names[1]])
    bank[names[2]] = bank[names[2]][:, 1:]
    bank[names[3]] = bank[names[3]] * 2
    bank[names[4]] = np.full_like(bank[names[4]], 2)
    rows = protect(cohort, bank, tmp_path / "out")
    assert [row.sample_id for row in rows if row.levels] == [names[5]]
    assert {refusal.name: refusal.reason for refusal in read_refusals(tmp_path / "out")} == {
        names[0]: "no_perturbation",
        names[1]: "empty_perturbation",
        names[2]: "other_image",
        names[3]: "outside_budget",
        names[4]: "delta_outside_bounds",
    }
    reasons = "delta_outside_bounds, 1 empty_perturbation, 1 no_perturbation, 1 other_image, 1 outside_budget"
    assert capsys.readouterr().out.count(f"5 refused (1 {reasons}), 1 files protected: see {tmp_path}") == 1
    assert len(list((tmp_path / "out" / "protected").rglob("*.nii.gz"))) == 1


def test_a_fit_of_another_budget_or_window_is_refused(tmp_path):
    cohort = nifti_cohort(tmp_path / "in", 2)
    deltas, budget, records = bank_of(cohort), "8/255", []
    for case in cohort.cases:
        image = formats.read(case, 3)
        levels = image.codec.levels(Budget.parse(budget))
        delta = torch.from_numpy(deltas[case.sample_id])
        records.append(Record(case.sample_id, delta, image_digest(image.stored), levels))
    bank = PerturbationBank(tmp_path / "bank.sqlite", create=True)
    bank.commit(records, round_=0, score=0.0, state=b"", final=True)
    wider = (image.codec.window[0], image.codec.window[1] + image.codec.width)
    for index, other in enumerate(({"budget": "16/255"}, {"budget": budget, "window": wider})):
        with pytest.raises(ValueError, match=r"every case was refused \(outside_budget\)"):
            protect(cohort, bank, tmp_path / str(index), **other)
        assert "steps in this image, those of now" in read_refusals(tmp_path / str(index))[0].detail
    assert protect(cohort, bank, tmp_path / "out", budget=budget)


def test_an_unfinished_fit_is_not_written(tmp_path):
    cohort = nifti_cohort(tmp_path / "in")
    bank = PerturbationBank(tmp_path / "bank.sqlite", create=True)
    bank.commit([Record("case", torch.zeros(1, 2, 2, dtype=torch.int32), "digest", 1)], round_=1, score=0.0, state=b"")
    with pytest.raises(ValueError, match="fit is not finished; run the stage 'fit' again"):
        protect(cohort, bank, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_budget_below_one_step_and_an_empty_bank_protect_nothing(tmp_path):
    cohort = nifti_cohort(tmp_path / "in")
    with pytest.raises(ValueError, match="nothing was protected.*budget"):
        protect(cohort, bank_of(cohort), tmp_path / "out", budget=Budget(0.5, "stored"))
    with pytest.raises(ValueError, match="nothing was protected.*no_perturbation"):
        protect(cohort, {}, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.nii.gz"))


def test_a_second_run_writes_nothing_anew(tmp_path):
    cohort = nifti_cohort(tmp_path / "in")
    bank = bank_of(cohort)
    rows = protect(cohort, bank, tmp_path / "out")
    files = sorted((tmp_path / "out" / "protected" / "images").iterdir())
    before, digests = [path.stat().st_mtime_ns for path in files], tree(tmp_path / "out")
    assert protect(cohort, bank, tmp_path / "out") == rows
    assert [path.stat().st_mtime_ns for path in files] == before and tree(tmp_path / "out") == digests
    files[1].write_bytes(b"damaged")
    files[2].unlink()
    assert protect(cohort, bank, tmp_path / "out") == rows and tree(tmp_path / "out") == digests


def test_another_perturbation_for_the_same_folder_is_an_error(tmp_path):
    cohort = nifti_cohort(tmp_path / "in")
    bank = bank_of(cohort)
    protect(cohort, bank, tmp_path / "out")
    digests = tree(tmp_path / "out")
    with pytest.raises(ValueError, match="choose a new output folder"):
        protect(cohort, {key: value // 2 for key, value in bank.items()}, tmp_path / "out")
    assert tree(tmp_path / "out") == digests


def test_a_file_that_we_did_not_write_fails_the_final_sweep(tmp_path):
    cohort = nifti_cohort(tmp_path / "in")
    protect(cohort, bank_of(cohort), tmp_path / "out")
    (tmp_path / "out" / "protected" / "images" / "leak.nii.gz").write_bytes(cohort.cases[0].files[0].read_bytes())
    with pytest.raises(IntegrityError, match="1 files"):
        protect(cohort, bank_of(cohort), tmp_path / "out")
    with pytest.raises(IntegrityError, match="1 files"):
        read_protected(cohort, tmp_path / "out")


def test_a_series_with_one_slice_that_does_not_verify_is_not_written_at_all(tmp_path, monkeypatch):
    for index, name in enumerate(("A", "B")):
        write_series(tmp_path / "in" / name, name, 4, patient=f"P{index}")
    write_labels(tmp_path / "in", ["A,ill", "B,well"])
    cohort = load_cohort(tmp_path / "in", spatial_dims=3)
    bad = cohort.cases[0].files[2]
    real = formats.verify.__wrapped__
    monkeypatch.setattr(
        formats, "verify", lambda form, src, new, limit, *more: real(form, src, new, 1 if src == bad else limit)
    )
    rows = protect(cohort, bank_of(cohort), tmp_path / "out")
    assert [row.sample_id for row in rows if row.levels] == [cohort.cases[1].sample_id] * 4
    assert len(list((tmp_path / "out" / "protected").rglob("*.dcm"))) == 4


SLOW_RUN = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_protect import bank_of, load_cohort, protect
replace = os.replace
def slow(source, target):
    replace(source, target)
    time.sleep(0.05)
os.replace = slow
cohort = load_cohort({root!r}, spatial_dims=3)
protect(cohort, bank_of(cohort), Path({out!r}), key_file={key!r})
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path):
    for index, name in enumerate(("A", "B", "C")):
        write_series(tmp_path / "in" / name, name, 5, patient=f"P{index}")
    write_labels(tmp_path / "in", ["A,ill", "B,well", "C,ill"])
    cohort, key = load_cohort(tmp_path / "in", spatial_dims=3), str(tmp_path / "release.key")
    bank = bank_of(cohort)
    whole = protect(cohort, bank, tmp_path / "whole", key_file=key)

    out = tmp_path / "killed"
    code = SLOW_RUN.format(tests=str(Path(__file__).parent), root=str(tmp_path / "in"), out=str(out), key=key)
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)]) as process:
        deadline = time.monotonic() + 60
        while len(read_manifest(out)) < 5 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.12)  # into the moving of the second series
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert 5 <= len(read_manifest(out)) < 15
    with (out / door.JOURNAL).open("a") as stream:
        stream.write('{"torn')
    (out / door.STAGING).mkdir(exist_ok=True)
    (out / door.STAGING / "left.part").write_bytes(b"half")
    assert protect(cohort, bank, out, key_file=key) == whole
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.parametrize(("code", "text"), [(errno.ENOSPC, "no space left"), (errno.EACCES, "no permission")])
def test_a_full_or_closed_disk_leaves_no_partial_file(tmp_path, monkeypatch, code, text):
    cohort = nifti_cohort(tmp_path / "in")
    bank, calls = bank_of(cohort), []
    whole = tree_after(cohort, bank, tmp_path / "whole")

    def write(handle: int, content: bytes, real=os.write) -> int:
        calls.append(handle)
        if len(calls) == 5:
            return real(handle, content[:10])
        if len(calls) > 5:
            raise OSError(code, os.strerror(code))
        return real(handle, content)

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(OutputError, match=text) as error:
        patch.setattr(os, "write", write)
        protect(cohort, bank, out, key_file=tmp_path / "key")
    assert "same command again" in str(error.value) and error.value.__cause__.errno == code
    assert not list((out / door.STAGING).iterdir())
    for row in read_manifest(out):
        assert hashlib.sha256((out / "protected" / row.file).read_bytes()).hexdigest() == row.sha256
    images = sum(row.levels > 0 for row in read_manifest(out))
    assert len(list((out / "protected").rglob("*.nii.gz"))) in (images, images + 1)
    assert tree_after(cohort, bank, out) == whole


def tree_after(cohort: Cohort, bank: dict[str, np.ndarray], out: Path) -> dict[str, str]:
    protect(cohort, bank, out, key_file=out.parent / "key")
    return tree(out)


def test_a_real_file_size_limit_is_reported_as_a_full_disk(tmp_path):
    code = """
        import resource, signal, sys
        from pathlib import Path, PurePosixPath
        from monai_salm.release.commit import OutputError, Staged, commit
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            commit(Path(sys.argv[1]), [Staged(PurePosixPath("a"), bytes(9999), lambda path: None)])
        except OutputError as error:
            sys.exit(str(error))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and "no space left" in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_commit_is_all_or_nothing(tmp_path):
    def refuse(path: Path) -> None:
        raise ValueError("no")

    files = [Staged(PurePosixPath("x/a"), b"a", lambda path: None), Staged(PurePosixPath("x/b"), b"b", refuse)]
    with pytest.raises(ValueError, match="no"):
        commit(tmp_path, files)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    (done,) = commit(tmp_path, files[:1])
    assert (tmp_path / "x" / "a").read_bytes() == b"a" and done.sha256 == hashlib.sha256(b"a").hexdigest()


@pytest.mark.parametrize("name", ["../a", "/tmp/a", "x/../../a", "link/a"])
def test_no_name_leads_out_of_the_output_folder(tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="link|leave"):
        commit(out, [Staged(PurePosixPath(name), b"a", lambda path: None)])
    assert not (tmp_path / "a").exists()


def test_output_folders_that_could_do_harm_are_refused(tmp_path):
    source = tmp_path / "a" / "export"
    write_nifti(source / "v.nii")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    bad = {
        source: "is the export itself",
        source / "out": "inside the export",
        tmp_path: "export lies inside",
        tmp_path / "full": "no manifest",
        tmp_path / "file": "is a file",
        tmp_path / "link": "symbolic link",
    }
    for out, text in bad.items():
        with pytest.raises(ValueError, match=text):
            check_output(source, out)
    with pytest.raises(ValueError, match="export lies inside"):
        check_output(source / "v.nii", source)
    check_output(source / "v.nii", source / "out")  # an export of one file is that file, not its folder
    check_output(source, tmp_path / "new")
    check_output(source, tmp_path / "a")  # the demo's layout: a/export -> a/protected
    for marker in door._MARKERS:
        (tmp_path / "full" / marker).parent.mkdir(exist_ok=True)
        (tmp_path / "full" / marker).write_text("")
        check_output(source, tmp_path / "full")
        (tmp_path / "full" / marker).unlink()


@pytest.mark.data
@needs_data
def test_a_real_series_and_real_volumes_are_protected(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    (root / "mr").mkdir()
    for path in sorted((DATA / "dicom_series").rglob("*MRDC*"), key=lambda path: int(path.suffix[1:]))[:20]:
        (root / "mr" / path.name).write_bytes(path.read_bytes())
    for path in sorted((DATA / "Task04_Hippocampus" / "imagesTr").glob("*.nii.gz"))[:3]:
        (root / path.name).write_bytes(path.read_bytes())
    n_slices = len(list((root / "mr").iterdir()))
    names = ["mr", *(path.name for path in sorted(root.glob("*.nii.gz")))]
    write_labels(root, [f"{name},{'ab'[index % 2]}" for index, name in enumerate(names)])
    cohort = load_cohort(root, spatial_dims=3)
    bank = bank_of(cohort)
    rows = protect(cohort, bank, tmp_path / "out", budget="8/255")
    assert len(rows) == n_slices + 3 + 1 and not read_refusals(tmp_path / "out")
    for sample_id, twin in read_protected(cohort, tmp_path / "out").items():
        (clean,) = (case for case in cohort.cases if case.sample_id == sample_id)
        moved = formats.read(twin, 3).stored.astype(float) - formats.read(clean, 3).stored
        np.testing.assert_array_equal(moved != 0, bank[sample_id] != 0)
