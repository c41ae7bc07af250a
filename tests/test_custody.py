# SPDX-License-Identifier: Apache-2.0
"""One writer at a time, runs that are killed, plans that write nothing, and what is kept out of a release."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from exports import edit_dicom, write_decathlon, write_labels, write_nifti, write_segmentation, write_series
from test_protect import bank_of, nifti_cohort, protect, tree

from monai_salm.io import formats
from monai_salm.io.base import RefusedError
from monai_salm.release import commit as door
from monai_salm.release import lock
from monai_salm.release.catalog import scan
from monai_salm.release.integrity import check
from monai_salm.release.labels import find_labels, load_cohort
from monai_salm.release.lock import LockedError
from monai_salm.release.manifest import read_manifest
from monai_salm.release.plan import make_plan
from monai_salm.release.protect import prepare_output
from monai_salm.release.shards import Shard


@pytest.fixture(autouse=True)
def _fixed_time(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


def in_child(work: Callable[[], None]) -> int:
    """Run in a process of its own; its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ------------------------------------------------------------------------- kills


def killed_at(call: int, work: Callable[[], None]) -> Callable[[], None]:
    """``work``, killed at the n-th call that writes, flushes or moves something."""

    def run() -> None:
        left = [call]

        def counted(real: Callable) -> Callable:
            def wrapper(*arguments, **options):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            return wrapper

        for name in ("write", "fsync", "replace", "pwrite", "ftruncate", "link", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        work()

    return run


@pytest.mark.parametrize("seed", [1, 7])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path, seed):
    for index, name in enumerate("ABC"):
        write_series(tmp_path / "in" / name, name, 3, patient=f"P{index}")
    write_nifti(tmp_path / "in" / "v.nii.gz")
    write_labels(tmp_path / "in", ["A,ill", "B,well", "C,ill", "v.nii.gz,well"])
    cohort = load_cohort(tmp_path / "in", spatial_dims=3)
    bank, key, out = bank_of(cohort), tmp_path / "release.key", tmp_path / "out"
    whole = protect(cohort, bank, tmp_path / "whole", key_file=key)
    codes, random_ = [], random.Random(seed)
    while 0 not in codes:
        assert len(codes) < 40, "the run never ends"
        work = killed_at(random_.randint(1, 60), lambda: protect(cohort, bank, out, key_file=key) and None)
        codes.append(in_child(work))
        assert codes[-1] in (0, -signal.SIGKILL)
        series = {path.parent for path in (out / "protected").rglob("*.dcm")}
        assert all(path.stat().st_mode & 0o077 == 0 for path in out.rglob("*")), "closed to others at any time"
        assert len(series) <= 3
    assert codes.count(-signal.SIGKILL) >= 3, "the test killed too little"
    assert tree(out) == tree(tmp_path / "whole") and read_manifest(out) == whole and not check(out).problems


# ------------------------------------------------------------------------- locks


@pytest.fixture
def out(tmp_path) -> Path:
    door.open_output(tmp_path / "out")
    return tmp_path / "out"


def test_two_processes_cannot_write_one_folder(out):
    with lock.holding(out):
        with lock.holding(out):
            pass
        assert in_child(lambda: _expect_locked(out)) == 0, "an inner block must not give the folder back"
    assert in_child(lambda: lock.take(out) and None) == 0
    with lock.holding(out):
        pass
    assert (out / door.LOCK).read_text() == ""


def _expect_locked(out: Path) -> None:
    with pytest.raises(LockedError, match=f"process {os.getppid()} on this machine"):
        lock.take(out)


def test_what_a_killed_process_held_is_taken_over(out):
    def die() -> None:
        lock.take(out)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == -signal.SIGKILL
    assert json.loads((out / door.LOCK).read_text())["pid"] != os.getpid()
    assert lock.take(out) and not lock.take(out)
    lock.give_back(out)
    shutil.rmtree(out)
    lock.give_back(out)  # of a folder that is gone by the end of the process


def test_threads_of_a_process_hold_one_lock_and_a_full_disk_does_not_keep_it(out, monkeypatch):
    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(lambda _: lock.take(out), range(16))) == [*[False] * 15, True]
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(lock, "_write", lambda *_: (_ for _ in ()).throw(OSError("full")))
        lock.give_back(out)
    assert lock.take(out), "it was given back all the same"
    lock.give_back(out)


@pytest.mark.parametrize(
    ("change", "free"),
    [
        ({"boot": "another"}, True),
        ({"started": "1"}, True),
        ({"pid": None}, True),
        ({"host": "another"}, False),
        (None, False),  # the parent of this process; which it is may change until the test runs
    ],
)
def test_only_a_process_that_may_live_keeps_its_lock(out, change, free):
    if change is None:
        change = {"pid": os.getppid(), "started": lock._started(os.getppid())}
    (out / door.LOCK).write_text(json.dumps(lock._myself() | {"pid": 1} | change))
    if free:
        assert lock.take(out)
        lock.give_back(out)
    else:
        with pytest.raises(LockedError, match="remove private/lock"):
            lock.take(out)


def test_a_process_that_is_not_seen_from_here_keeps_its_lock_as_long_as_it_lives(out):
    """As in a container: its number is that of nobody here."""
    (out / door.LOCK).write_text(json.dumps(lock._myself() | {"pid": 999999999}))
    with (out / door.LOCK).open("r+") as elsewhere:
        fcntl.flock(elsewhere, fcntl.LOCK_EX)
        with pytest.raises(LockedError, match="process 999999999 on this machine .*; wait for it$"):
            lock.take(out)
    assert lock.take(out)
    lock.give_back(out)


def test_a_child_keeps_no_lock_of_its_parent(out):
    def die() -> None:
        lock.take(out)
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == -signal.SIGKILL
    assert lock.take(out, wait_s=10)
    lock.give_back(out)


def test_of_processes_that_are_killed_at_any_time_never_two_hold_the_folder(out):
    marks, ends = out / "marks", time.monotonic() + 4

    def hold() -> None:
        while True:
            try:
                lock.take(out)
            except LockedError:
                continue
            with (out / "alone").open("w") as alone:  # unlocked by the system, as the processes are killed
                fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
                door.append_line(out, marks.name, ".")
            lock.give_back(out)

    def start() -> int:
        pid = os.fork()
        if pid == 0:
            try:
                hold()
            finally:
                os._exit(1)  # two held it
        return pid

    pids = [start() for _ in range(6)]
    while time.monotonic() < ends:
        time.sleep(0.02)
        at = random.randrange(len(pids))
        os.kill(pids[at], signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pids[at], 0)[1]) == -signal.SIGKILL
        pids[at] = start()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids} == {-signal.SIGKILL}
    assert marks.stat().st_size > 10


@pytest.mark.parametrize("text", ["", "{", "[]", "\0\0"])
def test_a_lock_that_a_crash_left_half_written_names_nobody(out, text):
    (out / door.LOCK).write_text(text)
    assert lock.take(out)
    lock.give_back(out)


def test_a_lock_is_waited_for(out):
    ready = out / "ready"

    def hold() -> None:
        with lock.holding(out):
            ready.write_text("")
            time.sleep(0.5)

    pid = os.fork()
    if pid == 0:
        hold()
        os._exit(0)
    while not ready.exists():
        time.sleep(0.01)
    with pytest.raises(LockedError):
        lock.take(out)
    assert lock.take(out, wait_s=30)
    lock.give_back(out)
    os.waitpid(pid, 0)


def test_a_folder_that_is_being_written_is_refused_before_the_fit_and_before_the_writing(tmp_path):
    cohort = nifti_cohort(tmp_path / "in")
    prepare_output(tmp_path / "in", tmp_path / "out")
    assert in_child(lambda: _expect_busy(cohort, tmp_path)) == 0
    lock.give_back(tmp_path / "out")
    assert in_child(lambda: protect(cohort, bank_of(cohort), tmp_path / "out") and None) == 0


def _expect_busy(cohort, folder: Path) -> None:
    with pytest.raises(LockedError):
        prepare_output(folder / "in", folder / "out")
    with pytest.raises(LockedError):
        protect(cohort, bank_of(cohort), folder / "out")


def test_a_part_is_written_by_one_process_and_other_parts_beside_it(tmp_path):
    cohort, out = nifti_cohort(tmp_path / "in"), tmp_path / "out"
    door.open_output(out)
    with lock.holding(out, Shard(1, 2).lock):
        for part, code in (("1/2", 1), ("2/2", 0)):
            assert in_child(lambda part=part: protect(cohort, bank_of(cohort), out, shard=part) and None) == code
    found = check(out).problems
    assert [(problem.kind, problem.name) for problem in found] == [("missing_shard", "manifest-1-of-2.jsonl")]


def test_parts_that_are_written_at_the_same_time_make_one_release(tmp_path):
    cohort, out = nifti_cohort(tmp_path / "in", 6), tmp_path / "out"
    prepare_output(tmp_path / "in", out)
    lock.give_back(out)
    pids = []
    for index in (1, 2, 3):
        pids.append(os.fork())
        if pids[-1] == 0:
            try:
                protect(cohort, bank_of(cohort), out, shard=Shard(index, 3))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0, 0]
    assert not check(out).problems and check(out).files == {"protected": 6, "table": 1}


def test_what_a_part_refused_is_where_its_message_says(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "note.txt").write_text("x")
    cohort, out = nifti_cohort(tmp_path / "in", 6), tmp_path / "out"
    protect(cohort, bank_of(cohort), out, shard="1/2")
    said = capsys.readouterr().out.strip().rpartition("see ")[2]
    assert Path(said).read_text().count("unknown_file") == 1
    protect(cohort, bank_of(cohort), out, shard="2/2")
    said = capsys.readouterr().out.strip().rpartition("see ")[2]
    assert said == f"{out}/private/refusals*.jsonl" and len(list(out.glob("private/refusals*.jsonl"))) == 2


# ----------------------------------------------------------------------- hostile


def test_a_hostile_uid_names_no_file(tmp_path):
    for name in ("A", "B", "C"):
        paths = write_series(tmp_path / "in" / name, name, 3)
    series, instance = "../../../../tmp/evil", "../../evil/../x"

    def change(dataset) -> None:
        dataset.SeriesInstanceUID = series
        dataset.SOPInstanceUID = f"{instance}{dataset.InstanceNumber}"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID

    for path in paths:
        edit_dicom(path, change)
    write_labels(tmp_path / "in", ["A,a", "B,b", "C,b"])
    cohort = load_cohort(tmp_path / "in", spatial_dims=3)
    assert {refusal.reason for refusal in cohort.refusals} == {"missing_uid"} and len(cohort.released) == 2
    protect(cohort, bank_of(cohort), tmp_path / "out")
    names = [path.relative_to(tmp_path / "out" / "protected").as_posix() for path in tmp_path.rglob("*.dcm")]
    assert len(names) == 6 and all(re.fullmatch(r"([0-9.]{1,64}/){2}[0-9.]{1,64}\.dcm", name) for name in names)
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name] and not check(tmp_path / "out").problems


# ------------------------------------------------------------------- permissions


def test_a_folder_that_is_new_to_us_is_closed_and_later_left_as_the_owner_wants_it(tmp_path):
    (tmp_path / "out").mkdir(mode=0o755)
    prepare_output(nifti_cohort(tmp_path / "in").root, tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700
    (tmp_path / "out").chmod(0o750)
    prepare_output(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out" / "private").stat().st_mode & 0o777 == 0o700
    lock.give_back(tmp_path / "out")


@pytest.mark.parametrize("name", ["release.key", "signing.key"])
def test_a_key_that_others_can_read_is_refused(tmp_path, name):
    cohort = nifti_cohort(tmp_path / "in")
    protect(cohort, bank_of(cohort), tmp_path / "out")
    (tmp_path / "out" / "private" / name).chmod(0o640)
    with pytest.raises(PermissionError, match="chmod 600"):
        protect(cohort, bank_of(cohort), tmp_path / "out")


# -------------------------------------------------------------------------- plan


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_a_plan_counts_and_writes_nothing(tmp_path):
    for index, name in enumerate(("A", "B")):
        write_series(tmp_path / "in" / name, name, 3, patient=f"P{index}")
    for index in range(4):
        write_nifti(tmp_path / "in" / f"v{index}.nii.gz", index)
    (tmp_path / "in" / "note.txt").write_text("x")
    rows = ["A,a,train", "B,b,train", *(f"v{i}.nii.gz,{'ab'[i % 2]},{'train' if i < 3 else 'test'}" for i in range(4))]
    write_labels(tmp_path / "in", rows)
    cohort = load_cohort(tmp_path / "in", spatial_dims=3)
    before = everything(tmp_path)
    plan = make_plan(
        cohort, tmp_path / "deep" / "out", spatial_dims=3, window="auto", budget="2 stored", mask_ratio=0.4
    )
    assert everything(tmp_path) == before
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "in").rglob("*") if path.is_file()}
    assert {key: count for key, (count, _) in plan.files.items()} == {
        ("dicom", "protected"): 6,
        ("nifti", "protected"): 3,
        ("nifti", "held out, not written"): 1,
    }
    assert plan.files["nifti", "protected"][1] == sum(sizes[f"v{index}.nii.gz"] for index in range(3))
    assert plan.refused == {"unknown_file": 1} and plan.tried[0] == 9 and plan.seconds > 0
    protect(cohort, bank_of(cohort), tmp_path / "out")
    written = sum(path.stat().st_size for path in (tmp_path / "out" / "protected").rglob("*.*") if path.is_file())
    assert 0.8 * written < plan.copy_bytes < 1.3 * written
    text = "\n".join(plan.lines())
    assert "nothing was written" in text and "Fit and study are not in it" in text and str(tmp_path) not in text


def test_a_plan_asks_the_disk_of_the_output_folder_itself(tmp_path, monkeypatch):
    cohort, out = nifti_cohort(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    asked = []
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(Path(path)) or real(path))
    make_plan(cohort, out, spatial_dims=3, window="auto", budget="2 stored", mask_ratio=0.4)
    make_plan(cohort, out / "deep" / "er", spatial_dims=3, window="auto", budget="2 stored", mask_ratio=0.4)
    assert asked == [out, out]


def test_a_plan_can_be_made_of_unsigned_images_whose_window_reaches_beyond_them(tmp_path):
    def change(dataset) -> None:
        dataset.PixelRepresentation = 0
        dataset.PixelData = (np.frombuffer(dataset.PixelData, "<u2") % 4096).tobytes()

    for name in ("A", "B"):
        for path in write_series(tmp_path / name, name, 3):
            edit_dicom(path, change)
    write_labels(tmp_path, ["A,a,train", "B,b,train"])
    window = (-2000.0, 70000.0)
    cohort = load_cohort(tmp_path, spatial_dims=3, window=window)
    plan = make_plan(cohort, tmp_path.parent / "out", spatial_dims=3, window=window, budget="2 stored", mask_ratio=0.4)
    assert plan.tried[0] == 6 and not plan.refused_at_writing


def test_a_plan_tells_what_could_not_be_written(tmp_path, monkeypatch):
    for name in ("A", "B"):
        write_series(tmp_path / name, name, 3)
    write_labels(tmp_path, ["A,a,train", "B,b,train"])
    cohort = load_cohort(tmp_path, spatial_dims=3)
    real = formats.protect

    def protect_but_one(unit, deltas, **options):
        if unit[0] == cohort.cases[0]:
            raise RefusedError("unwritable", "broken")
        return real(unit, deltas, **options)

    monkeypatch.setattr(formats, "protect", protect_but_one)
    plan = make_plan(cohort, tmp_path.parent / "out", spatial_dims=3, window="auto", budget="2 stored", mask_ratio=0.4)
    assert plan.refused_at_writing == {"unwritable": 1} and "1 unwritable" in "\n".join(plan.lines())


# ------------------------------------------------------------------------- gates


def deidentified(dataset) -> None:
    dataset.PatientIdentityRemoved, dataset.BurnedInAnnotation = "YES", "NO"


@pytest.mark.parametrize(
    ("removed", "burned", "passes"),
    [("YES", "NO", True), ("NO", "NO", False), ("", "NO", False), ("YES", "YES", False), ("YES", "", False)],
)
def test_the_gate_takes_only_what_says_that_it_is_deidentified(tmp_path, removed, burned, passes):
    def change(dataset) -> None:
        dataset.PatientIdentityRemoved, dataset.BurnedInAnnotation = removed, burned

    for name in ("A", "B"):
        for path in write_series(tmp_path / name, name, 3):
            edit_dicom(path, deidentified)
    edit_dicom(path, change)
    assert len(scan(tmp_path, 3).cases) == 2, "only where it is asked for"
    found = scan(tmp_path, 3, require_deidentified=True)
    assert len(found.cases) == 1 + passes
    assert [refusal.reason for refusal in found.refusals] == ["not_deidentified"] * (not passes)


def test_the_gate_asks_label_files_for_the_identity_alone(tmp_path):
    import numpy as np

    sources = write_series(tmp_path / "A", "A", 3)
    for path in sources:
        edit_dicom(path, deidentified)
    path = write_segmentation(tmp_path / "seg", sources, np.ones((3, 16, 16, 1), bool), ("Liver",))
    options = {"voxels": find_labels(tmp_path), "require_deidentified": True}
    edit_dicom(path, lambda dataset: setattr(dataset, "PatientIdentityRemoved", "NO"))
    with pytest.raises(ValueError, match="not_deidentified"):
        scan(tmp_path, 3, **options)
    edit_dicom(path, lambda dataset: setattr(dataset, "PatientIdentityRemoved", "YES"))
    assert len(scan(tmp_path, 3, **options).cases) == 1


@pytest.mark.parametrize("where", ["descrip", "extension", "gzip"])
def test_the_gate_looks_at_nifti_label_files_too(tmp_path, where):
    root = write_decathlon(tmp_path, 3)
    path = root / "labelsTr" / "v01.nii.gz"
    label = nib.load(path)
    if where == "descrip":
        label.header["descrip"] = b"Erika"
    elif where == "extension":
        label.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"Erika"))
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj), label.affine, label.header), path)
    if where == "gzip":
        content = gzip.decompress(path.read_bytes())
        with path.open("wb") as stream, gzip.GzipFile("Erika.nii", "wb", fileobj=stream) as packed:
            packed.write(content)
    assert len(scan(root, 3, voxels=find_labels(root)).cases) == 3, "only where it is asked for"
    found = scan(root, 3, voxels=find_labels(root), require_deidentified=True)
    assert len(found.cases) == 2
    assert [refusal.reason for refusal in found.refusals] == ["not_deidentified"]


def test_a_packed_label_file_with_room_for_a_copy_is_refused(tmp_path):
    root = write_decathlon(tmp_path, 3)
    path = root / "labelsTr" / "v01.nii.gz"
    path.write_bytes(path.read_bytes() + gzip.compress(b"", mtime=0))
    found = scan(root, 3, voxels=find_labels(root))
    assert [refusal.reason for refusal in found.refusals] == ["embedded_preview"]
    assert len(found.cases) == 2


def test_a_protected_copy_is_not_protected_again_while_its_manifest_is_near(tmp_path):
    cohort = nifti_cohort(tmp_path / "in")
    protect(cohort, bank_of(cohort), tmp_path / "out")
    for export in (tmp_path / "out" / "protected", tmp_path / "out"):
        with pytest.raises(ValueError, match="already_protected"):
            scan(export, 3)
    write_nifti(tmp_path / "out" / "protected" / "new.nii.gz", 77)
    assert [case.names[0] for case in scan(tmp_path / "out" / "protected", 3).cases] == ["new.nii.gz"]
    (tmp_path / "out" / "manifest.jsonl").write_text("not ours\n")
    assert len(scan(tmp_path / "out" / "protected", 3).cases) == 5, "nothing tells these files from originals"


if sys.platform != "linux":
    pytestmark = pytest.mark.skip(reason="locks are read from /proc")
