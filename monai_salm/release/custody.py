# SPDX-License-Identifier: Apache-2.0
"""What a release keeps about itself: start time, keys, journals and refusals; and how it is closed and signed."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from monai_salm import __version__
from monai_salm.io.base import Case
from monai_salm.release import bids, signature
from monai_salm.release import commit as door
from monai_salm.release.companions import REFERENCES, closure, write_companions
from monai_salm.release.decathlon import DATASET_FILE
from monai_salm.release.gates import Refusal, tally
from monai_salm.release.identity import UidMap, load_or_create_key, owner_id, pseudonym
from monai_salm.release.labels import LABELS_FILE, Cohort
from monai_salm.release.manifest import (
    COMPANION,
    GENESIS,
    PROTECTED,
    TABLE,
    ManifestRow,
    journal_text,
    link,
    public_text,
    read_chain,
    read_manifest,
    rows_of,
    sweep,
)
from monai_salm.release.shards import Shard, shards_of
from monai_salm.release.written_tables import dataset_json, labels_table

KEY = f"{door.PRIVATE}/release.key"
SIGNING_KEY = f"{door.PRIVATE}/signing.key"
_REFUSALS = f"{door.PRIVATE}/refusals*.jsonl"
"""Pattern of the lists of what all shards refused."""
_SOFTWARE = ("numpy", "torch", "pydicom", "nibabel")


class Journal:
    """A shard's journal, a line for each file that is in place: those of earlier runs, and what this one appends.

    Args:
        output_dir: the output folder.
        shard: whose journal.

    Raises:
        ValueError: When the folder was written in another number of shards.
        IntegrityError: When the journal was edited.
    """

    def __init__(self, output_dir: Path, shard: Shard) -> None:
        self._out, self._name = output_dir, shard.journal
        _check_count(output_dir, shard)
        path = output_dir / shard.journal
        records, self._head = read_chain(path)
        if path.is_file():  # drop a last line that a killed run wrote in part
            door.write(output_dir, {shard.journal: link(records)[0]}, shard.part)
        self.done: dict[str, list[ManifestRow]] = {}
        for row in rows_of(records):
            self.done.setdefault(row.sample_id, []).append(row)

    def append(self, rows: Sequence[ManifestRow]) -> None:
        """Add rows of files that are in place."""
        text, self._head = journal_text(rows, self._head)
        door.append_line(self._out, self._name, text)


def clear_key_parts(output_dir: Path) -> None:
    """Remove the unfinished key files that a killed run has left."""
    for left in (output_dir / door.PRIVATE).glob(".*.part"):
        left.unlink(missing_ok=True)


def start_time(output_dir: Path) -> datetime:
    """When the first run on this folder started (SOURCE_DATE_EPOCH if set); every rerun then writes the same bytes."""
    path = output_dir / door.RUN
    if not path.is_file():
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        now = datetime.fromtimestamp(int(epoch), timezone.utc) if epoch else datetime.now(timezone.utc)
        run = {"started": now.replace(microsecond=0).isoformat(), "monai_salm": __version__}
        door.write(output_dir, {door.RUN: json.dumps(run) + "\n"})
    return datetime.fromisoformat(json.loads(path.read_text())["started"])


def read_refusals(output_dir: Path | str) -> list[Refusal]:
    """What the release left out, with reasons: refused files, cases without label, cases that did not verify."""
    return [Refusal(**record) for path in sorted(Path(output_dir).glob(_REFUSALS)) for record in read_chain(path)[0]]


def refusals_line(output_dir: Path | str) -> str:
    """A line for the user: what was refused and why, and how many files were protected; empty where nothing was.

    Files are counted, and not cases: what was refused may be no case, or hold many.
    """
    refusals = read_refusals(output_dir)
    if not refusals:
        return ""
    names = {refusal.name for refusal in refusals}
    files = sum(row.state == PROTECTED for row in read_manifest(output_dir))
    reasons = tally(refusal.reason for refusal in refusals)
    lists = list(Path(output_dir).glob(_REFUSALS))
    where = lists[0] if len(lists) == 1 else Path(output_dir) / _REFUSALS
    return f"{len(names)} refused ({reasons}), {files} files protected: see {where}"


def close(
    output_dir: Path,
    shard: Shard,
    rows: Sequence[ManifestRow],
    cohort: Cohort,
    refusals: Sequence[Refusal],
    uids: UidMap,
) -> list[ManifestRow]:
    """Write the manifest of a shard in the cohort's order, and sign it with all others that are there.

    The last shard adds what belongs to all: companions and tables. Then every file below ``protected/`` is held against
    the manifest, and gets the time of the release's start.

    Args:
        output_dir: the output folder.
        shard: what was written.
        rows: its files.
        cohort: all cases.
        refusals: what this shard refused.
        uids: the release's UID map.

    Returns:
        The rows, with those of companions and tables where they were written.
    """
    others = [other for other in shards_of(shard.count) if other != shard and (output_dir / other.manifest).is_file()]
    is_last = len(others) == shard.count - 1
    rest = read_manifest(output_dir, [other.journal for other in others])
    lists = {shard: (list(rows), list(refusals))}
    texts: dict[str, str | bytes] = {}
    common: list[ManifestRow] = []
    if is_last:
        common, refused, texts = _close_whole(output_dir, shard, [*rows, *rest], cohort, uids)
        whole_rows, whole_refusals = lists.setdefault(Shard(), ([], []))  # the same lists where there is one shard
        whole_rows += common
        whole_refusals += refused
    for part, (its_rows, its_refusals) in lists.items():  # refusals first: a manifest says that its shard is finished
        if its_refusals or part == shard or (output_dir / part.refusals).is_file():
            texts[part.refusals], _ = link(map(asdict, its_refusals))
        texts[part.journal], _ = journal_text(its_rows)
        texts[part.manifest] = public_text(its_rows, _versions())
    door.write(output_dir, {**texts, **_signed(output_dir, texts, others, shard.count)}, shard.part)
    door.clear_staging(output_dir, shard.part)
    if is_last:
        sweep(output_dir / door.PROTECTED, [*rows, *common, *rest])
        door.give_one_time(output_dir / door.PROTECTED, start_time(output_dir))
    return [*rows, *common]


def _close_whole(
    output_dir: Path, shard: Shard, rows: Sequence[ManifestRow], cohort: Cohort, uids: UidMap
) -> tuple[list[ManifestRow], list[Refusal], dict[str, str | bytes]]:
    """Write companions and make tables, for the rows of all shards.

    Returns:
        Rows of both, which companions were refused, and texts that are still to be written, by name.
    """
    tables = _tables(rows, cohort)
    texts: dict[str, str | bytes] = {f"{door.PROTECTED}/{name}": content for name, content in tables.items()}
    released = {row.sample_id for row in rows}
    common, refused = write_companions(output_dir, cohort.companions, released, uids, shard.part)
    if cohort.companions:
        released |= {row.sample_id for row in common}
        texts[REFERENCES], _ = link(closure(cohort.companions, released))
    common += [_table_row(name, content, cohort.root) for name, content in tables.items()]
    return common, [Refusal(each.sample_id, error.reason, error.detail) for each, error in refused], texts


def _signed(
    output_dir: Path, texts: Mapping[str, str | bytes], others: Sequence[Shard], count: int
) -> dict[str, bytes]:
    """The files of the signature, over the chains among the texts and those that other shards have written."""
    ours = [name for name in texts if name.endswith(".jsonl") and not name.startswith(f"{door.PROTECTED}/")]
    chains = {name: _chain(texts[name]) for name in ours}
    for other in others:
        for name in (other.manifest, other.journal, other.refusals):
            chains[name] = _chain((output_dir / name).read_text())
    if (output_dir / signature.PUBLIC_KEY).exists() and not (output_dir / SIGNING_KEY).exists():
        raise ValueError(
            f"{SIGNING_KEY} is gone, but the release was signed with it, and recipients know its public key; put it "
            f"back, or remove {signature.PUBLIC_KEY} to sign with a new one"
        )
    return signature.sign(load_or_create_key(output_dir / SIGNING_KEY), chains, count)


def _tables(rows: Sequence[ManifestRow], cohort: Cohort) -> dict[str, bytes]:
    """Content of the tables that go with the files, by name; without those that the cohort has no use for."""
    written: dict[str, list[ManifestRow]] = {}
    for row in rows:
        written.setdefault(row.sample_id, []).append(row)
    names = {row.source: row.file for row in rows}
    cases: list[Case] = [case for case in cohort.released if owner_id(case) in written]
    tables = {
        LABELS_FILE: labels_table(cases, written, cohort),
        DATASET_FILE: dataset_json(cases, cohort.root, names) if cohort.voxelwise and cases else "",
    }
    found = {name: text.encode(errors="backslashreplace") for name, text in tables.items() if text}
    return found | (bids.derivative(cohort.root, cases) if cases and bids.is_tree(cohort.root) else {})


def _table_row(name: str, content: bytes, root: Path) -> ManifestRow:
    digest = door.sha256(content)
    state = COMPANION if door.holds(root / name, digest) else TABLE
    return ManifestRow(pseudonym(name), name, digest, 0, 0.0, 0, 0, digest, state=state)


def _chain(text: str) -> signature.Chain:
    lines = text.splitlines(keepends=True)
    return signature.Chain(door.sha256(lines[-1].encode()) if lines else GENESIS, len(lines))


@cache
def _versions() -> Mapping[str, str]:
    found = {"monai_salm": __version__, "python": platform.python_version()}
    for name in _SOFTWARE:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # bundled by other means
            continue
    return found


def _check_count(output_dir: Path, shard: Shard) -> None:
    """Refuse a folder that was written in another number of shards."""
    ours = {other.journal for other in shards_of(shard.count)} | {door.JOURNAL}
    there = {f"{door.PRIVATE}/{path.name}" for path in (output_dir / door.PRIVATE).glob(door.MANIFESTS)}
    is_whole = there == {door.JOURNAL}  # of a release in shards, this one comes with the last of them
    if there - ours or (is_whole and shard.count > 1):
        raise ValueError(
            f"the output folder was written in another number of shards than {shard.count}; go on with that number, or "
            "choose a new output folder"
        )
