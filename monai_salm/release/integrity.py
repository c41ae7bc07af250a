# SPDX-License-Identifier: Apache-2.0
"""Is every file of a release the one that was written? Checked against manifest, chain and signature alone.

Needs neither torch nor MONAI nor the export, so that a recipient can run it. Looked into: ``protected/``, the public
manifests and the signature, the names of everything beside them, and the owner's journal where ``private/`` is there.
Not covered: the rest of ``private/``, models and reports, which are not shared or are made later.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from monai_salm.release import commit as door
from monai_salm.release import signature
from monai_salm.release.manifest import (
    LEFT_BY_SYSTEMS,
    PROTECTED,
    PUBLIC,
    IntegrityError,
    differences,
    read_chain,
    walk,
)
from monai_salm.release.shards import shards_of

BESIDE = (door.PROTECTED, door.PRIVATE, door.DEMO_EXPORT, "models", "report.html", "report.json", *signature.SIGNED)
"""Names that a release's folder may hold, beside the manifests."""
UNREADABLE = "unreadable"
MAX_SHOWN = 20
Rows = dict[str, tuple[str, dict[str, Any]]]
"""Where each released file is listed, and its record, by name."""


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was written.

    Args:
        kind: ``edited``, ``missing``, ``changed``, ``added``, ``missing_shard``, ``unsigned`` or ``unreadable``.
        detail: where, in words that name no source.
        name: the file below the output folder. It may be personal: a file that was added can have any name.
    """

    kind: str
    detail: str
    name: str = ""


@dataclass(frozen=True)
class Integrity:
    """Result of a check.

    Args:
        files: files of the manifest by state.
        size: their bytes.
        fingerprint: sha256 of the public key, empty where there is no valid signature.
        problems: everything that is not as it was written.
        trusted: whether the key is one that the caller gave as the owner's.
        closed: whether ``private/`` is there and may not be read.
    """

    files: dict[str, int]
    size: int
    fingerprint: str
    problems: tuple[Problem, ...]
    trusted: bool = False
    closed: bool = False

    @property
    def unread(self) -> bool:
        """Whether the only problems are files that may not be read; somebody else may be able to."""
        return bool(self.problems) and all(problem.kind == UNREADABLE for problem in self.problems)

    @property
    def conclusive(self) -> bool:
        """Whether there was a protected file to check."""
        return bool(self.problems) or self.files.get(PROTECTED, 0) > 0

    def lines(self, names: bool = False) -> Iterator[str]:
        """The result for a terminal.

        Args:
            names: tell the names of files, which may be personal.
        """
        counts = ", ".join(f"{count} {state}" for state, count in sorted(self.files.items())) or "none"
        yield f"files in the manifest: {counts}; {self.size} bytes"
        for problem in self.problems[:MAX_SHOWN]:
            yield f"{problem.kind}: {problem.detail}" + (f" ({problem.name})" if names and problem.name else "")
        if len(self.problems) > MAX_SHOWN:
            yield f"and {len(self.problems) - MAX_SHOWN} more"
        if self.fingerprint:
            unknown = "; whose key that is was not checked: --public-key with a key that you have from the owner does"
            yield f"signed with the key {self.fingerprint}{', the one you gave' if self.trusted else unknown}"
        if self.closed:
            yield f"not checked: {door.PRIVATE}/, which you may not read; its owner may"
        if not self.conclusive:
            yield "inconclusive: there are 0 protected files to check; name the folder that protect wrote"
        elif not self.problems:
            yield "every file is the one that was written, and none is missing or added"


def check(output_dir: Path | str, public_key: Path | str | None = None) -> Integrity:
    """Hold a release against its manifests, their chains and the signature.

    Args:
        output_dir: what ``protect`` wrote, or a copy of it without ``private/``.
        public_key: the owner's public key from a trusted source; default: the one beside the files.

    Raises:
        ValueError: When there is no such folder, or ``public_key`` is no key.
        OSError: When ``public_key`` or the folder itself cannot be read.
    """
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        raise ValueError(f"there is no folder {output_dir}; name the folder that protect wrote")
    if not _holds_anything(output_dir):
        return Integrity({}, 0, "", ())
    problems: list[Problem] = []
    chains, shards, fingerprint = _read_signature(output_dir, Path(public_key) if public_key else None, problems)
    rows: Rows = {}
    for name, records in _read_chains(output_dir, chains, problems).items():
        for number, record in enumerate(records, 1):
            _take(record, f"line {number} of {name}", rows, problems)
    problems += _missing_shards(output_dir, chains, shards)
    problems += _differences(output_dir / door.PROTECTED, rows, problems)
    problems += _beside(output_dir, chains)
    files = [output_dir / door.PROTECTED / file for file in rows]
    present = [file for file in files if os.path.isfile(file)]  # which is false, and no error, in a closed folder
    return Integrity(
        files=dict(Counter(str(record["state"]) for _, record in rows.values())),
        size=sum(map(os.path.getsize, present)),
        fingerprint=fingerprint,
        problems=tuple(problems),
        trusted=public_key is not None,
        closed=(output_dir / door.PRIVATE).is_dir() and not _is_open(output_dir / door.PRIVATE),
    )


def _read_signature(
    output_dir: Path, public_key: Path | None, problems: list[Problem]
) -> tuple[dict[str, signature.Chain], int, str]:
    """As :py:func:`signature.read_signed`; no chains, one shard and no fingerprint where that is a problem."""
    try:
        return signature.read_signed(output_dir, public_key)
    except IntegrityError as error:
        problems.append(Problem("unsigned", str(error)))
    except OSError as error:
        if public_key and error.filename == str(public_key):
            raise
        problems.append(_unreadable(Path(str(error.filename)).name, error))
    return {}, 1, ""


def _unreadable(name: str, error: OSError) -> Problem:
    return Problem(UNREADABLE, f"{name} ({error.strerror})", name)


def _is_open(folder: Path) -> bool:
    """Whether a folder is there, and we may look into it."""
    return os.access(folder, os.R_OK | os.X_OK)


def _holds_anything(output_dir: Path) -> bool:
    """Whether there is a released file, or a manifest or signature of one."""
    if any(os.path.exists(output_dir / name) for name in (*signature.SIGNED, door.JOURNAL)):  # false in a closed folder
        return True
    if any(output_dir.glob(door.MANIFESTS)):
        return True
    try:
        return next(walk(output_dir / door.PROTECTED), None) is not None
    except OSError:  # which is told when its files are looked for
        return True


def _read_chains(
    output_dir: Path, chains: dict[str, signature.Chain], problems: list[Problem]
) -> dict[str, list[dict[str, Any]]]:
    """Records of the public manifests, by name; every chain that was signed is checked."""
    records = {}
    names = chains or {path.name: None for path in sorted(output_dir.glob(door.MANIFESTS))}
    for name, chain in names.items():
        path = output_dir / name
        private = PurePosixPath(name).parent.as_posix() == door.PRIVATE
        if private and not _is_open(output_dir / door.PRIVATE):
            continue  # a recipient does not get the owner's chains
        if path.is_symlink() or not path.is_file():
            problems.append(Problem("missing", name, name))
            continue
        try:
            found, head = read_chain(path, torn=False)
        except IntegrityError as error:
            problems.append(Problem("edited", str(error), name))
            continue
        except OSError as error:
            problems.append(_unreadable(name, error))
            continue
        if chain is not None and (head, len(found)) != (chain.head, chain.lines):
            detail = f"{name} has {len(found)} lines and was signed with {chain.lines}, or others"
            problems.append(Problem("edited", detail, name))
        if not private:
            records[name] = found
    return records


def _take(record: dict[str, Any], where: str, rows: Rows, problems: list[Problem]) -> None:
    """Add a record of a public manifest to the rows, if it is one that can be checked."""
    if "manifest" in record:
        return
    file = record.get("file")
    parts = PurePosixPath(file).parts if isinstance(file, str) else ()
    if set(record) != set(PUBLIC) or not parts or parts[0] == "/" or ".." in parts or file in rows:
        problems.append(Problem("edited", f"{where} is not one that this version writes"))
    else:
        rows[file] = where, record


def _differences(folder: Path, rows: Rows, problems: list[Problem]) -> list[Problem]:
    """How the protected files differ from the rows. Where a manifest could not be read, any file may be in it."""
    closed = [problem.name for problem in problems if problem.kind == UNREADABLE]
    all_listed = not any(name.endswith(".jsonl") and "/" not in name for name in closed)
    expected = {file: record["sha256"] for file, (_, record) in rows.items()}
    found = []
    for kind, name in differences(folder, expected, thorough=True):
        what = f"the file of {rows[name][0]}" if name in rows else _kind_of(folder / name)
        detail = {"added": f"{what} in no manifest", UNREADABLE: f"{what} cannot be opened"}.get(kind, what)
        if kind != "added" or all_listed:
            found.append(Problem(kind, detail, f"{door.PROTECTED}/{name}"))
    return found


def _missing_shards(output_dir: Path, chains: dict[str, signature.Chain], shards: int) -> list[Problem]:
    return [
        Problem("missing_shard", f"shard {shard.index} of {shards} was not written, or was taken away", shard.manifest)
        for shard in shards_of(shards)
        if shards > 1 and not (shard.manifest in chains and (output_dir / shard.manifest).is_file())
    ]


def _kind_of(path: Path) -> str:
    """What an entry is, in words, which have its name only if that is given by an operating system."""
    if os.path.islink(path):
        return "a link"
    if os.path.isdir(path):
        return "a folder"
    if path.name.lower() in LEFT_BY_SYSTEMS:
        return f"{path.name}, which an operating system leaves (delete it),"
    return "a file"


def _beside(output_dir: Path, chains: dict[str, signature.Chain]) -> list[Problem]:
    """What lies beside the protected files and was not written by a release."""
    problems = []
    for path in sorted(output_dir.iterdir()):
        try:
            if path.name == door.STAGING and next(walk(path), None) is None:
                continue
        except OSError as error:
            problems.append(_unreadable(path.name, error))
            continue
        # Without a signature it is not known which manifests there should be.
        is_ours = path.name in BESIDE or path.name in chains or (not chains and path.match(door.MANIFESTS))
        if not is_ours:
            problems.append(Problem("added", f"{_kind_of(path)} beside the protected files", path.name))
        elif path.is_symlink() or path.is_dir() == bool(path.suffix):  # what has an ending is a file here
            problems.append(Problem("changed", "a link or a folder in place of what was written", path.name))
    return problems
