# SPDX-License-Identifier: Apache-2.0
"""The check of a release: everything that was changed, taken away, added or moved is found, without torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from exports import write_decathlon
from test_protect import bank_of, protect

from monai_salm import cli
from monai_salm.cli.codes import BAD_INPUT, INTEGRITY, NOT_PROTECTED
from monai_salm.release import commit as door
from monai_salm.release import signature
from monai_salm.release.integrity import check
from monai_salm.release.labels import load_cohort
from monai_salm.release.manifest import GENESIS, IntegrityError, link, read_chain
from monai_salm.release.shards import Shard


def write_release(folder: Path, shards: int = 1) -> Path:
    """A release of three volumes with voxel labels: 3 protected, 3 labels, 2 tables."""
    cohort = load_cohort(write_decathlon(folder / "in", 3), spatial_dims=3)
    for index in range(1, shards + 1):
        protect(cohort, bank_of(cohort), folder / "out", shard=Shard(index, shards))
    return folder / "out"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return write_release(tmp_path_factory.mktemp("release"))


@pytest.fixture
def out(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "copy")


def kinds(out: Path, **options) -> set[str]:
    return {problem.kind for problem in check(out, **options).problems}


def edit(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


def swap(text: bytes) -> bytes:
    lines = text.splitlines(keepends=True)
    return b"".join([lines[0], lines[2], lines[1], *lines[3:]])


def relinked(text: bytes) -> bytes:
    """A row dropped, and the chain made anew by somebody without the key."""
    records = [{k: v for k, v in json.loads(line).items() if k != "prev"} for line in text.splitlines()]
    return link([*records[:2], *records[3:]])[0].encode()


def test_what_was_written_is_in_order(out):
    found = check(out)
    assert found.files == {"protected": 3, "label": 3, "table": 2} and not found.problems and found.conclusive
    assert found.size == sum(path.stat().st_size for path in (out / "protected").rglob("*") if path.is_file())
    assert len(found.fingerprint) == 64


def test_a_recipient_checks_a_copy_without_the_private_folder(out):
    shutil.rmtree(out / "private")
    assert not check(out).problems and sum(check(out).files.values()) == 8
    assert not check(out, public_key=out / signature.PUBLIC_KEY).problems


def test_a_user_who_may_not_look_into_the_private_folder_checks_what_is_shared(out, monkeypatch, capsys):
    """The tests may run as root, who may look into everything."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "private")
    monkeypatch.setattr(Path, "read_bytes", _denying("private", Path.read_bytes))
    assert cli.main(["verify", str(out), "--files-only"]) == 0
    assert "not checked: private/, which you may not read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("manifest.jsonl", [], "unreadable: manifest.jsonl (Permission denied)"),
        ("release.json", [], "unreadable: release.json (Permission denied)"),
        ("private/manifest.jsonl", [], "unreadable: private/manifest.jsonl (Permission denied)"),
        ("protected/imagesTr/v00.nii.gz", [], "unreadable: the file of line 3 of manifest.jsonl cannot be opened\n"),
        ("protected/imagesTr/v00.nii.gz", ["--names"], "opened (protected/imagesTr/v00.nii.gz)"),
    ],
)
def test_what_cannot_be_read_is_named_and_the_rest_is_checked(out, name, arguments, told, monkeypatch, capsys):
    for method in ("read_bytes", "open"):
        monkeypatch.setattr(Path, method, _denying(name, getattr(Path, method)))
    assert cli.main(["verify", str(out), "--files-only", *arguments]) == BAD_INPUT
    said = capsys.readouterr().out
    assert told in said and (arguments or "v00" not in said) and str(out) not in said
    assert said.count("unreadable: ") == 1 and "added" not in said
    (out / "protected" / "imagesTr" / "v01.nii.gz").unlink()
    assert cli.main(["verify", str(out), "--files-only"]) == (BAD_INPUT if name == "manifest.jsonl" else INTEGRITY)
    said = capsys.readouterr().out
    assert "unreadable: " in said and ("missing: the file of " in said or name == "manifest.jsonl")


@pytest.mark.parametrize(
    ("folder", "told"),
    [
        ("protected", "unreadable: a folder cannot be opened"),
        ("protected/imagesTr", "unreadable: a folder cannot be opened"),
        (".staging", "unreadable: .staging (Permission denied)"),
    ],
)
@pytest.mark.parametrize("signed", [True, False])
def test_a_folder_that_cannot_be_opened_is_named_once(out, folder, told, signed, monkeypatch, capsys):
    closed, scandir = out / folder, os.scandir
    closed.mkdir(exist_ok=True)
    if not signed:
        for path in (*out.glob("release.*"), *out.rglob("manifest*")):
            path.unlink()

    def denying(path):
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denying)
    assert cli.main(["verify", str(out), "--files-only"]) == (BAD_INPUT if signed else INTEGRITY)
    said = capsys.readouterr().out
    assert said.count(told) == 1 and "\nmissing" not in said


def _denying(name: str, real):
    """A method of paths that may not be used on what has this name."""

    def denying(self: Path, *arguments, **options):
        if self.as_posix().endswith(f"copy/{name}") or f"copy/{name}/" in self.as_posix():
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *arguments, **options)

    return denying


@pytest.mark.parametrize(
    ("name", "change", "kind"),
    [
        ("protected/imagesTr/v00.nii.gz", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "changed"),
        ("protected/imagesTr/v01.nii.gz", lambda b: b[:-1], "changed"),
        ("protected/labelsTr/v01.nii.gz", lambda b: b + b"x", "changed"),
        ("protected/labels.csv", lambda b: b.replace(b"train", b"val"), "changed"),
        ("protected/dataset.json", lambda b: b + b" ", "changed"),
        ("manifest.jsonl", lambda b: b.replace(b'"levels": 2', b'"levels": 1', 1), "edited"),
        ("manifest.jsonl", swap, "edited"),
        ("manifest.jsonl", relinked, "edited"),
        ("manifest.jsonl", lambda b: b[: b[:-1].rfind(b"\n") + 1], "edited"),
        ("manifest.jsonl", lambda b: b[:-5], "edited"),
        ("manifest.jsonl", lambda b: b + b"{}", "edited"),
        ("manifest.jsonl", lambda b: b"", "edited"),
        ("private/manifest.jsonl", lambda b: b.replace(b"v00", b"v09", 1), "edited"),
        ("private/refusals.jsonl", lambda b: b + b"{}\n", "edited"),
        ("release.json", lambda b: b.replace(b'"shards": 1', b'"shards": 2'), "unsigned"),
        ("release.sig", lambda b: bytes(64), "unsigned"),
        ("release.pub", lambda b: b"-----BEGIN PUBLIC KEY-----", "unsigned"),
        ("release.pub", lambda b: b + b"Erika", "unsigned"),
        ("release.pub", lambda b: b"Erika\n" + b, "unsigned"),
    ],
)
def test_every_edit_is_found(out, name, change, kind):
    before = (out / name).read_bytes()
    edit(out / name, change)
    assert (out / name).read_bytes() != before, "the test changes nothing"
    assert kind in kinds(out)


def test_an_edit_of_the_owners_journal_is_told_apart_from_one_of_the_public_manifest(out):
    edit(out / "private" / "manifest.jsonl", lambda b: b.replace(b"v00", b"v09", 1))
    assert ["of private/manifest.jsonl" in problem.detail for problem in check(out).problems] == [True]


def test_every_deletion_is_found(out):
    files = [path for path in out.rglob("*") if path.is_file() and path.parent.name != "private"]
    assert len(files) == 12
    for path in [*files, out / "private" / "manifest.jsonl"]:
        content = path.read_bytes()
        path.unlink()
        assert kinds(out) & {"missing", "unsigned"}, path.name
        path.write_bytes(content)
    assert not check(out).problems


@pytest.mark.parametrize("name", ["protected/imagesTr/v9.nii", "protected/.hidden", "notes.txt", "manifest-2.jsonl"])
def test_every_addition_is_found(out, name):
    (out / name).write_text("x")
    assert kinds(out) == {"added"}


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "desktop.ini"])
@pytest.mark.parametrize("folder", ["", "protected", "protected/imagesTr"])
def test_what_an_operating_system_leaves_is_named_and_still_counts(out, folder, name):
    (out / folder / name).write_text("x")
    (problem,) = check(out).problems
    where = "in no manifest" if folder else "beside the protected files"
    assert problem.kind == "added"
    assert problem.detail == f"{name}, which an operating system leaves (delete it), {where}"


def test_what_was_added_is_called_what_it_is(out):
    (out / "protected" / "folder").mkdir()
    (out / "protected" / "link").symlink_to(out)
    (out / "other").mkdir()
    (out / "note.txt").write_text("x")
    told = sorted(problem.detail for problem in check(out).problems)
    beside = [f"{what} beside the protected files" for what in ("a file", "a folder")]
    assert told == sorted([*beside, "a folder in no manifest", "a link in no manifest"])


def test_whose_key_it_is_is_told_to_be_unknown_without_a_key_to_compare(out):
    (line,) = [line for line in check(out).lines() if line.startswith("signed")]
    assert "whose key that is was not checked" in line and "--public-key" in line
    (line,) = [line for line in check(out, out / signature.PUBLIC_KEY).lines() if line.startswith("signed")]
    assert "not checked" not in line


def test_folders_that_hold_nothing_or_stand_for_files_are_found(out):
    (out / "protected" / "empty").mkdir()
    assert kinds(out) == {"added"}
    (out / "protected" / "empty").rmdir()
    (out / "report.html").mkdir()
    assert kinds(out) == {"changed"}


def test_a_lost_signing_key_is_not_replaced(tmp_path):
    out = write_release(tmp_path)
    assert (out / "private" / "signing.key").is_file()
    (out / "private" / "signing.key").unlink()
    with pytest.raises(ValueError, match="recipients know its public key"):
        write_release(tmp_path)
    assert not (out / "private" / "signing.key").exists()


def test_links_and_pipes_in_place_of_files_are_found(out):
    path = out / "protected" / "imagesTr" / "v00.nii.gz"
    kept = path.rename(out.parent / "kept")
    path.symlink_to(kept)
    assert kinds(out) == {"changed"}
    path.unlink()
    os.mkfifo(path)
    assert kinds(out) == {"changed"}
    path.unlink()
    kept.rename(path)
    (out / "protected" / "more").symlink_to(out.parent)
    assert kinds(out) == {"added"}


def test_two_files_that_changed_places_are_found(out):
    a, b = (out / "protected" / "imagesTr" / f"v0{index}.nii.gz" for index in range(2))
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    assert [problem.kind for problem in check(out).problems] == ["changed"] * 2


def test_a_manifest_cannot_point_outside(out):
    records, _ = read_chain(out / "manifest.jsonl")
    for name in ("/etc/passwd", "../private/release.key", "", 5):
        (out / "manifest.jsonl").write_text(link([*records, records[1] | {"file": name}])[0])
        problems = check(out).problems
        assert any("is not one that this version writes" in problem.detail for problem in problems)


def test_a_release_that_another_key_signed_is_found(out, tmp_path):
    chains = {
        name: signature.Chain(read_chain(out / name)[1], len(read_chain(out / name)[0]))
        for name in ("manifest.jsonl", "private/manifest.jsonl")
    }
    trusted = tmp_path / "owner.pub"
    trusted.write_bytes((out / signature.PUBLIC_KEY).read_bytes())
    for name, content in signature.sign(bytes(range(32)), chains, 1).items():
        (out / name).write_bytes(content)
    assert not kinds(out), "by itself the forgery is consistent: that is what a trusted key is for"
    assert "unsigned" in kinds(out, public_key=trusted)
    trusted.write_text("no key")
    with pytest.raises(ValueError, match="no Ed25519"):
        check(out, trusted)


@pytest.mark.parametrize(("name", "shards"), [("../secret.jsonl", 1), ("/etc/passwd", 1), ("manifest.jsonl", 10**9)])
def test_a_forged_list_of_chains_leads_nowhere(out, name, shards):
    for file, content in signature.sign(bytes(32), {name: signature.Chain(GENESIS, 0)}, shards).items():
        (out / file).write_bytes(content)
    assert "unsigned" in kinds(out)


def test_openssl_agrees(out):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "release.pub", "-rawin", "-in", "release.json"]
    done = subprocess.run([*command, "-sigfile", "release.sig"], cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unfinished_release_is_not_in_order(out):
    for name in (*signature.SIGNED, "manifest.jsonl"):
        (out / name).unlink()
    assert {"unsigned", "added"} <= kinds(out)


def test_nothing_to_check_is_inconclusive(out, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert cli.main(["verify", str(tmp_path / "empty")]) == NOT_PROTECTED
    assert "inconclusive" in capsys.readouterr().out
    with pytest.raises(ValueError, match="there is no folder"):
        check(tmp_path / "nope")


def test_a_chain_goes_on_where_it_stopped():
    whole, head = link({"n": n} for n in range(3))
    first, middle = link({"n": n} for n in range(2))
    rest, end = link([{"n": 2}], middle)
    assert first + rest == whole and end == head != GENESIS


def test_a_journal_that_was_edited_is_an_error_and_a_torn_line_is_not(tmp_path):
    path = tmp_path / "j.jsonl"
    text, head = link({"n": n} for n in range(3))
    path.write_text(text + '{"torn')
    assert read_chain(path) == ([{"n": 0}, {"n": 1}, {"n": 2}], head)
    path.write_text(text.replace('"n": 1', '"n": 7'))
    with pytest.raises(IntegrityError, match="line 3 of j.jsonl"):
        read_chain(path)


def test_verify_needs_neither_torch_nor_monai(out):
    code = """
        import sys, time
        start = time.monotonic()
        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {"torch", "monai", "numpy", "pydicom", "nibabel"}:
                    raise ImportError(name)
        sys.meta_path.insert(0, Block())
        from monai_salm.cli import main
        assert main(sys.argv[1:]) == 0
        print("seconds", time.monotonic() - start)
    """
    shutil.rmtree(out / "private")
    for arguments in ([], ["--files-only"], ["--public-key", out / signature.PUBLIC_KEY]):
        command = [sys.executable, "-c", textwrap.dedent(code), "verify", out, *arguments]
        start = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "3 protected" in done.stdout and time.monotonic() - start < 10


# ------------------------------------------------------------------------ shards


def test_shards_give_the_same_files_and_a_missing_one_is_told(original, tmp_path):
    cohort = load_cohort(write_decathlon(tmp_path / "in", 3), spatial_dims=3)
    out = tmp_path / "out"
    options = {"key_file": original / "private" / "release.key"}
    protect(cohort, bank_of(cohort), out, shard="2/2", **options)
    found = check(out)
    assert [(problem.kind, problem.name) for problem in found.problems] == [("missing_shard", "manifest-1-of-2.jsonl")]
    protect(cohort, bank_of(cohort), out, shard="1/2", **options)
    assert not check(out).problems and check(out).files == check(original).files
    content = {path.name: path.read_bytes() for path in (out / "protected").rglob("*") if path.is_file()}
    assert content == {path.name: path.read_bytes() for path in (original / "protected").rglob("*") if path.is_file()}
    sizes = [len(read_chain(out / f"manifest-{index}-of-2.jsonl")[0]) - 1 for index in (1, 2)]
    assert sum(sizes) == 6
    for name in ("manifest-1-of-2.jsonl", "manifest.jsonl", f"{door.PRIVATE}/manifest-2-of-2.jsonl"):
        kept = (out / name).read_bytes()
        (out / name).unlink()
        assert "missing" in kinds(out)
        (out / name).write_bytes(kept)
    for other in (None, "1/3"):
        with pytest.raises(ValueError, match="another number of shards"):
            protect(cohort, bank_of(cohort), out, shard=other, **options)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    for shard in ("1/2", "2/2"):
        protect(cohort, bank_of(cohort), out, shard=shard, **options)
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert {path.name for path in before if before[path] != after[path]} <= {"lock", "lock-1-of-2", "lock-2-of-2"}


@pytest.mark.parametrize("text", ["0/2", "3/2", "1/0", "a/b", "1", "1/2/3", "-1/2", ""])
def test_a_shard_that_does_not_exist_is_an_error(text):
    with pytest.raises(ValueError, match="shard"):
        Shard.parse(text)
