# SPDX-License-Identifier: Apache-2.0
"""The one door into the output folder: a file is there whole, verified and on disk, or not there at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Generic, TypeVar

PROTECTED = "protected"
"""Folder of the output folder that is meant to be shared."""
MANIFEST = "manifest.jsonl"
"""Shared with the files: what each file is now, and nothing of what it was."""
MANIFESTS = "manifest*.jsonl"
"""Pattern of the manifests of all shards, and in ``PRIVATE`` of their journals."""
PRIVATE = "private"
JOURNAL = f"{PRIVATE}/manifest.jsonl"
"""The owner's own manifest, which names the original of each file; it grows while files are written."""
RUN = f"{PRIVATE}/run.json"
REFUSALS = f"{PRIVATE}/refusals.jsonl"
LOCK = f"{PRIVATE}/lock"
STAGING = ".staging"
DEMO_EXPORT = "export"
_MARKERS = (MANIFEST, RUN)
"""A folder with any of these is one of our output folders."""
_CHUNK = 1 << 17
"""Bytes read at a time: memory for a whole file costs more than to read it."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)

Result = TypeVar("Result")


class OutputError(RuntimeError):
    """The output folder cannot be written to; everything committed before is whole and verified."""


@dataclass(frozen=True)
class Staged(Generic[Result]):
    """A file that wants to be written.

    Args:
        name: path relative to the output folder.
        content: its bytes.
        verify: called with the path of the staged bytes before anything is visible; raises to keep them out.
    """

    name: PurePosixPath
    content: bytes | memoryview
    verify: Callable[[Path], Result]


@dataclass(frozen=True)
class Committed(Generic[Result]):
    """A file that was written: its name, the sha256 of the bytes read back, and what ``verify`` returned."""

    name: PurePosixPath
    sha256: str
    result: Result


def check_output(source: Path, output_dir: Path) -> None:
    """Refuse an output folder that could harm the export, or in which protected files would be mixed with others.

    An export at ``output_dir/export`` is allowed: that is the demo's layout.

    Args:
        source: the export, a folder or a file.
        output_dir: folder to write to; it need not exist.

    Raises:
        ValueError: When the two overlap, or the output folder is a link, a file, may not be written to, or holds what
            is not ours.
    """
    if output_dir.is_symlink():
        raise ValueError(f"output folder {output_dir} is a symbolic link; name the folder itself")
    old, new = source.resolve(), output_dir.resolve()
    if new == old:
        raise ValueError(f"output folder {output_dir} is the export itself; choose another folder")
    if new.is_relative_to(old):
        raise ValueError(f"output folder {output_dir} lies inside the export; choose a folder outside of it")
    if old.is_relative_to(new) and not old.is_relative_to(new / DEMO_EXPORT):
        raise ValueError(f"the export lies inside output folder {output_dir}; choose a folder that does not hold it")
    if new.exists() and not new.is_dir():
        raise ValueError(f"output folder {output_dir} is a file; choose a folder")
    there = next(path for path in (new, *new.parents) if path.is_dir())
    for place in (there, *(new / name for name in (PRIVATE, PROTECTED) if (new / name).is_dir())):
        if not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(f"no permission to write in {place}; allow it, or name another output folder")
    if not new.is_dir() or any((new / marker).is_file() for marker in _MARKERS):
        return
    only_locks = all(path.name.startswith(PurePosixPath(LOCK).name) for path in (new / PRIVATE).glob("*"))
    ours = [new / PRIVATE, new / STAGING] if only_locks else []  # what a run leaves that is killed at once
    foreign = [entry for entry in new.iterdir() if not (old.is_relative_to(entry) or entry in ours)]
    if foreign:
        raise ValueError(
            f"output folder {output_dir} holds {len(foreign)} entries and no manifest of monai_salm; "
            "choose an empty or new folder"
        )


def commit(output_dir: Path, files: Iterable[Staged[Result]], part: str = "") -> list[Committed[Result]]:
    """Write a group of files, all or none: stage, flush to disk, read back, verify, and only then move into place.

    A process killed in the moving leaves whole files only; running it again completes the group with the same bytes.

    Args:
        output_dir: an existing folder of ours.
        files: the group; may be a generator, so that one file at a time is in memory.
        part: folder of its own in the staging folder, for a process that is not the only one.

    Raises:
        OutputError: When there is no space or no permission. Nothing of the group is left behind.
        Exception: Whatever ``verify`` or the generator raises. Nothing of the group is left behind.
    """
    staged: list[tuple[Path, PurePosixPath, str, Result]] = []
    path = Path()
    staging = PurePosixPath(STAGING, part)
    with _explained():
        _make_folders(output_dir, staging)
    try:
        for file in files:
            path = output_dir / staging / f"{uuid.uuid4().hex}.part"
            with _explained():
                digest = _stage(path, file.content)
            staged.append((path, file.name, digest, file.verify(path)))
            del file  # frees its bytes before those of the next one are made
        with _explained():
            _move(output_dir, [(path, name) for path, name, _, _ in staged])
    finally:
        for left in [path, *(path for path, _, _, _ in staged)]:
            if left.name:
                left.unlink(missing_ok=True)
    return [Committed(name, digest, result) for _, name, digest, result in staged]


def write(output_dir: Path, texts: Mapping[str, str | bytes], part: str = "") -> None:
    """Commit files that need no check, given their content by name; those that are there already are left alone."""
    contents = {name: text.encode() if isinstance(text, str) else text for name, text in texts.items()}
    new = [name for name, content in contents.items() if not holds(output_dir / name, sha256(content))]
    if new:
        commit(output_dir, [Staged(PurePosixPath(name), contents[name], lambda _: None) for name in new], part)


def write_atomically(content: str | bytes, path: Path | str, mode: int = 0o666) -> None:
    """Write one file, without a check: ``path`` holds its old content, or all of the new one, which is on disk then.

    Args:
        content: bytes, or a text that is written as UTF-8.
        path: file to create or replace; its folder is created if needed.
        mode: permissions of the file, less those that the process takes away (umask).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def append_line(output_dir: Path, name: str, lines: str) -> None:
    """Append whole lines to a journal and flush them; on failure the journal is as it was.

    Raises:
        OutputError: When there is no space or no permission.
    """
    with _explained():
        handle = os.open(output_dir / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        size = os.fstat(handle).st_size
        try:
            _write_all(handle, lines.encode())
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, size)
            raise
        finally:
            os.close(handle)


def open_output(output_dir: Path) -> None:
    """Create the folder and ``private/``, both for their owner only; a folder that is ours keeps its permissions.

    Raises:
        OutputError: When there is no space or no permission.
    """
    with _explained():
        output_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not any((output_dir / marker).exists() for marker in _MARKERS):
            os.chmod(output_dir, 0o700)
        _make_folders(output_dir, PurePosixPath(PRIVATE))
        os.chmod(output_dir / PRIVATE, 0o700)


def clear_staging(output_dir: Path, part: str = "") -> None:
    """Remove the staging folder of a process, with what a killed run left in it."""
    shutil.rmtree(output_dir / STAGING / part, ignore_errors=True)
    if part:
        with suppress(OSError):  # others may be at work
            (output_dir / STAGING).rmdir()


def give_one_time(folder: Path, when: datetime) -> None:
    """Set the times of everything in a folder to one time: theirs would tell the order of the export's names."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in (*names, "."):
            os.utime(os.path.join(root, name), (when.timestamp(), when.timestamp()))


def _stage(part: Path, content: bytes | memoryview) -> str:
    """Write and flush a file, read it back, and return the sha256."""
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        _write_all(handle, content)
        os.fsync(handle)
    finally:
        os.close(handle)
    view = memoryview(content)
    with part.open("rb") as stream:
        for start in range(0, len(content) + 1, _CHUNK):  # + 1: reads past the end too, where nothing may follow
            if stream.read(_CHUNK) != bytes(view[start : start + _CHUNK]):
                raise OutputError("the disk gave back other bytes than were written; check the storage before going on")
    return sha256(content)


def _move(output_dir: Path, pairs: Sequence[tuple[Path, PurePosixPath]]) -> None:
    """Move staged files to their names, and flush the folders."""
    folders = dict.fromkeys(name.parent for _, name in pairs)
    for folder in folders:
        _make_folders(output_dir, folder)
    for part, name in pairs:
        os.replace(part, output_dir / name)
    for folder in folders:
        handle = os.open(output_dir / folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256(content: bytes | memoryview) -> str:
    """Hexadecimal sha256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def holds(path: Path, sha256: str) -> bool:
    """Whether a file, and no link, is there with this digest."""
    return path.is_file() and not path.is_symlink() and sha256_of(path) == sha256


def _write_all(handle: int, content: bytes | memoryview) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(handle, view) :]


def _make_folders(output_dir: Path, name: PurePosixPath) -> None:
    """Create ``name`` below the output folder, following no link and leaving it by no ``..``."""
    if name.is_absolute() or ".." in name.parts:
        raise ValueError("a protected file's name would leave the output folder; this is a bug, report it")
    folder = output_dir
    for part in name.parts:
        folder = folder / part
        if folder.is_symlink():
            raise ValueError(f"{folder} is a symbolic link; remove it and run again")
        folder.mkdir(mode=0o700, exist_ok=True)


@contextmanager
def _explained() -> Iterator[None]:
    """Turn an error of the disk into one that says what is safe and what to do."""
    try:
        yield
    except OSError as error:
        safe = "Files committed before are complete and verified, no partial file was left."
        if error.errno in _FULL:
            problem, fix = "no space left in the output folder", "Free some space"
        elif error.errno in _DENIED:
            problem, fix = "no permission to write in the output folder", "Allow writing"
        else:
            problem, fix = f"the output folder cannot be written to ({error.strerror})", "Repair that"
        raise OutputError(f"{problem}. {safe} {fix} and run the same command again.") from error
