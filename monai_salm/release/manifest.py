# SPDX-License-Identifier: Apache-2.0
"""What is written about the files of a release: the owner's journal, and the public manifest that is made from it.

Both are JSON lines, and each line holds the sha256 of the one before (``prev``), so that no line can be edited, dropped
or moved unseen; the last line's sha256, the head, is what gets signed. Standard library only: whoever checks a release
needs nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from monai_salm.release import commit as door

SCHEMA = 1
GENESIS = "0" * 64
"""``prev`` of a chain's first line."""
PROTECTED, COMPANION, LABEL, TABLE = "protected", "companion", "label", "table"
"""States of a released file: perturbed; copied with new references; voxel labels; made by the release."""
PUBLIC = ("file", "sha256", "state", "epsilon", "levels", "max_abs", "changed", "voxels")
"""Fields of the public manifest. They tell nothing of a file's source, save a name that the copy keeps."""
LEFT_BY_SYSTEMS = (".ds_store", "thumbs.db", "desktop.ini")
"""Names (in lower case) of files that operating systems put into folders that are looked at."""


class IntegrityError(RuntimeError):
    """The protected folder is not what the manifest says; nothing in it should be shared."""


@dataclass(frozen=True)
class ManifestRow:
    """What is known of one released file.

    Args:
        sample_id: the case, or a pseudonym of what belongs to many: an archive, a label file, a table.
        file: path below ``protected/``.
        sha256: of the file.
        levels: lattice steps the budget allows in this file (of frames that are scaled differently, the most that any
            of them has); 0 for files that accompany the images, which hold no perturbation.
        max_abs: largest change, in stored units, measured on the written file.
        changed: voxels that differ from the source.
        voxels: all voxels of the file that may change.
        inputs: keyed digest of source, perturbation and settings; tells a repeated run from a different one.
        state: one of :py:data:`PROTECTED`, :py:data:`COMPANION`, :py:data:`LABEL`, :py:data:`TABLE`.
        epsilon: the budget; empty where there is no perturbation.
        source: path of the original, relative to the export. Personal, as is the next.
        source_uid: SOPInstanceUID of the original, empty for other formats.
    """

    sample_id: str
    file: str
    sha256: str
    levels: int
    max_abs: float
    changed: int
    voxels: int
    inputs: str
    state: str = PROTECTED
    epsilon: str = ""
    source: str = ""
    source_uid: str = ""


def link(records: Iterable[Mapping[str, Any]], head: str = GENESIS) -> tuple[str, str]:
    """Lines that continue a chain from its ``head``, and the new head.

    Example:
        >>> text, head = link([{"file": "a"}])
        >>> text == '{"file": "a", "prev": "%s"}\\n' % GENESIS, len(head)
        (True, 64)
    """
    lines = []
    for record in records:
        lines.append(json.dumps({**record, "prev": head}, sort_keys=True) + "\n")
        head = hashlib.sha256(lines[-1].encode()).hexdigest()
    return "".join(lines), head


def read_chain(path: Path, *, torn: bool = True) -> tuple[list[dict[str, Any]], str]:
    """Records of a chain, without their ``prev``, and its head; none where there is no file.

    Args:
        path: of the file.
        torn: leave out a last line that a killed run wrote in part; if false, that is an error too.

    Raises:
        IntegrityError: When a line does not follow from the one before.
    """
    text = path.read_bytes() if path.is_file() else b""
    whole = text[: text.rfind(b"\n") + 1]
    name = f"{door.PRIVATE}/{path.name}" if path.parent.name == door.PRIVATE else path.name
    if not torn and whole != text:
        raise IntegrityError(f"{name} ends within a line")
    records, head = [], GENESIS
    for number, line in enumerate(whole.splitlines(keepends=True), 1):
        try:
            record = json.loads(line)
            follows = record.pop("prev") == head
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            follows = False
        if not follows:
            raise IntegrityError(f"line {number} of {name} does not follow from the one before: it was edited")
        records.append(record)
        head = hashlib.sha256(line).hexdigest()
    return records, head


def read_manifest(output_dir: Path | str, journals: Iterable[str] | None = None) -> list[ManifestRow]:
    """Rows of a release's journals; a line torn by a killed run is left out.

    Args:
        output_dir: the output folder.
        journals: their names relative to it; default: all that are there.

    Raises:
        IntegrityError: When a journal was edited.
    """
    folder = Path(output_dir)
    paths = sorted((folder / door.PRIVATE).glob(door.MANIFESTS)) if journals is None else map(folder.joinpath, journals)
    return rows_of(record for path in paths for record in read_chain(path)[0])


def rows_of(records: Iterable[Mapping[str, Any]]) -> list[ManifestRow]:
    """Rows of the records of journals; where two are of one file, the later one."""
    known = {field.name for field in fields(ManifestRow)}
    rows = (ManifestRow(**{key: value for key, value in record.items() if key in known}) for record in records)
    return list({row.file: row for row in rows}.values())


def journal_text(rows: Iterable[ManifestRow], head: str = GENESIS) -> tuple[str, str]:
    """Lines of the owner's journal, and the head after them."""
    return link(map(vars, rows), head)


def public_text(rows: Iterable[ManifestRow], versions: Mapping[str, str]) -> str:
    """The public manifest, sorted by file so that the order tells nothing.

    Args:
        rows: of the journal.
        versions: of the software that wrote the files, by name.
    """
    header = {"manifest": "monai_salm", "schema": SCHEMA, "versions": dict(versions)}
    records = ({name: getattr(row, name) for name in PUBLIC} for row in sorted(rows, key=lambda row: row.file))
    return link([header, *records])[0]


def differences(root: Path, expected: Mapping[str, str], *, thorough: bool = False) -> Iterator[tuple[str, str]]:
    """How a folder differs from what it should hold.

    Args:
        root: the folder.
        expected: sha256 by path below it.
        thorough: count empty folders as files, and go on where a file or folder cannot be read (``"unreadable"``).

    Yields:
        ``"missing"``, ``"changed"``, ``"added"`` or ``"unreadable"``, and the path below the folder.

    Raises:
        OSError: When something cannot be read, unless it is ``thorough``.
    """
    present = dict(walk(root, thorough=thorough))
    # Of the folder itself, whose name is empty, this is the prefix of all names.
    closed = tuple(f"{name}/".lstrip("/") for name, is_file in present.items() if is_file is None)
    for name, digest in expected.items():
        if name.startswith(closed):
            continue
        if name not in present:
            yield "missing", name
            continue
        try:
            if not present[name] or door.sha256_of(root / name) != digest:
                yield "changed", name
        except OSError:
            if not thorough:
                raise
            yield "unreadable", name
    for name in sorted(present.keys() - expected.keys()):
        yield "unreadable" if present[name] is None else "added", name


def walk(folder: Path, below: str = "", *, thorough: bool = False) -> Iterator[tuple[str, bool | None]]:
    """Everything below a folder but folders; links are not followed.

    Args:
        folder: the folder.
        below: goes in front of each path.
        thorough: yield empty folders too, and those that cannot be opened; else these raise.

    Yields:
        Its path, and whether it is a regular file; None for a folder that cannot be opened.
    """
    try:
        if not folder.is_dir():
            return
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError:
        if not thorough:
            raise
        yield below.removesuffix("/"), None
        return
    if not found and below and thorough:
        yield below.removesuffix("/"), False
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from walk(folder / entry.name, f"{below}{entry.name}/", thorough=thorough)
        else:
            yield f"{below}{entry.name}", entry.is_file(follow_symlinks=False)


def sweep(root: Path, rows: Iterable[ManifestRow]) -> None:
    """Check that a protected folder holds what its manifest lists, and nothing else.

    Raises:
        IntegrityError: When it holds another file, or lacks one, or one has changed.
    """
    found = [kind for kind, _ in differences(root, {row.file: row.sha256 for row in rows})]
    if "added" in found:
        raise IntegrityError(
            f"{found.count('added')} files in {root} were not written by this release and may be unprotected; "
            "remove the folder and run again"
        )
    if found:
        raise IntegrityError(f"a file in {root} is missing or changed since it was written; run protect again")
