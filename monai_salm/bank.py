# SPDX-License-Identifier: Apache-2.0
"""Perturbations on disk with digests, and the trainer's state, in one SQLite file."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from monai_salm.records import COLUMNS, OtherSettingsError, Record, as_array, image_digest, pack, unpack

__all__ = ["PerturbationBank", "Record", "image_digest"]

_APPLICATION_ID = 0x53414C4D  # "SALM"
_SCHEMA_VERSION = 1
_BATCH_BYTES = 8 << 20
TIMEOUT_S = 30.0
"""How long to wait for another process that writes."""
_SCHEMA = """
CREATE TABLE record (
    generation INTEGER NOT NULL, sample_id TEXT NOT NULL, dtype TEXT NOT NULL, shape TEXT NOT NULL,
    levels INTEGER NOT NULL, step REAL NOT NULL, image_digest TEXT NOT NULL, digest TEXT NOT NULL,
    payload BLOB NOT NULL,
    PRIMARY KEY (generation, sample_id));
CREATE TABLE status (
    id INTEGER PRIMARY KEY CHECK (id = 1), fingerprint TEXT NOT NULL, generation INTEGER NOT NULL DEFAULT 0,
    round INTEGER, best INTEGER NOT NULL DEFAULT 0, best_score REAL, finished INTEGER NOT NULL DEFAULT 0,
    revision TEXT NOT NULL DEFAULT '', state_digest TEXT, state BLOB);
"""

_COLUMNS = ", ".join(COLUMNS)
_CURRENT, _RESULT = (f"record WHERE generation = (SELECT {which} FROM status)" for which in ("generation", "best"))
"""Records of the last complete round, and those that reading returns."""


class PerturbationBank(Mapping[str, Tensor]):
    """The perturbations of a cohort, keyed by ``sample_id``.

    Reading returns the perturbations of the round with the lowest score so far, or those of the final pass once there
    is one. A killed process leaves the last complete round. The object keeps no file open: it can be pickled, used by
    forked loader workers and by threads. Its pickle carries a digest of the content, so that a cached pipeline
    (``PersistentDataset(hash_transform=pickle_hashing)``) notices another round.

    Whoever has the bank can undo the protection: the file is created readable by its owner only.

    Args:
        path: the SQLite file.
        fingerprint: digest of the configuration that the perturbations are fitted with; None: take any. The first
            round settles it: before that there is nothing that another one would spoil.
        create: make the file if there is none.

    Raises:
        FileNotFoundError: When there is no file and ``create`` is False.
        ValueError: When the file is no bank, is damaged, or was fitted with another configuration.

    Example:
        >>> import tempfile, torch
        >>> bank = PerturbationBank(Path(tempfile.mkdtemp(), "bank.sqlite"), fingerprint="abc", create=True)
        >>> image = torch.zeros(1, 2, 2, dtype=torch.int16)
        >>> record = Record("case-1", torch.ones(1, 2, 2, dtype=torch.int32), image_digest(image), levels=3)
        >>> bank.commit([record], round_=0, score=0.7, state=b"")
        >>> bank.load("case-1", image).dtype, list(bank), bank.state(), bank.finished
        (torch.int8, ['case-1'], (0, b''), False)
    """

    def __init__(self, path: str | os.PathLike[str], *, fingerprint: str | None = None, create: bool = False) -> None:
        self.path = Path(path).absolute()
        self.fingerprint = fingerprint
        if create:
            self._create()
        self._check_is_bank()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": str(self.path), "fingerprint": self.fingerprint, "revision": self.revision}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self.fingerprint = Path(state["path"]), state["fingerprint"]

    def __repr__(self) -> str:
        return f"PerturbationBank({str(self.path)!r})"

    # ---------------------------------------------------------------- reading

    def __getitem__(self, sample_id: str) -> Tensor:
        return self.record(sample_id).delta

    def __contains__(self, sample_id: object) -> bool:
        query = f"SELECT count(*) FROM {_RESULT} AND sample_id = ?"
        return isinstance(sample_id, str) and self._one(query, sample_id)[0] > 0

    def __iter__(self) -> Iterator[str]:
        with self._session() as db:
            return iter([row[0] for row in db.execute(f"SELECT sample_id FROM {_RESULT} ORDER BY sample_id")])

    def __len__(self) -> int:
        return self._one(f"SELECT count(*) FROM {_RESULT}")[0]

    def record(self, sample_id: str, *, current: bool = False) -> Record:
        """The record of one case: of the result, or of the last complete round if ``current``.

        Raises:
            KeyError: When the bank has no such case.
            ValueError: When the record does not agree with its digest.
        """
        table = _CURRENT if current else _RESULT
        row = self._one(f"SELECT {_COLUMNS} FROM {table} AND sample_id = ?", sample_id)
        if row is None:
            raise KeyError(
                f"no perturbation for {sample_id!r} in {self.path.name}: fit it first "
                "(or check that bank and images belong to the same export)"
            )
        return self._unpacked(row)

    def current(self, sample_id: str) -> Tensor:
        """(C, *spatial) perturbation of the last complete round, for going on with the fit (see :py:meth:`record`)."""
        return self.record(sample_id, current=True).delta

    def load(self, sample_id: str, stored: Tensor | np.ndarray, *, step: float | None = None) -> Tensor:
        """(C, *spatial) perturbation of exactly this image.

        Args:
            sample_id: the case.
            stored: (C, *spatial) clean stored image in the file's own type.
            step: the image's ``StoredCodec.step``; checked if given.

        Raises:
            KeyError: When the bank has no such case.
            ValueError: When shape, content or step is not the one that the perturbation was fitted on.
        """
        record = self.record(sample_id)
        if tuple(stored.shape) != tuple(record.delta.shape):
            raise ValueError(
                f"{sample_id}: the image is {tuple(stored.shape)}, its perturbation {tuple(record.delta.shape)}; "
                "apply it to the image as it is stored, before any spatial transform"
            )
        return _of_image(record, f"the image ({as_array(stored).dtype})", image_digest(stored), step)

    def load_by_digest(self, sample_id: str, digest: str, *, step: float) -> Tensor:
        """As :py:meth:`load`, by the :py:func:`image_digest` of the image."""
        return _of_image(self.record(sample_id), "the image", digest, step)

    def levels(self, sample_id: str) -> int:
        """Most steps that the budget of the fit allows in this image."""
        return self._one(f"SELECT levels FROM {_RESULT} AND sample_id = ?", sample_id)[0]

    def state(self) -> tuple[int, bytes] | None:
        """Round and trainer's state of the last complete round; None before the first.

        Raises:
            ValueError: When the state does not agree with its digest.
        """
        round_, digest, state = self._one("SELECT round, state_digest, state FROM status")
        if round_ is None:
            return None
        if hashlib.sha256(state).hexdigest() != digest:
            raise self._damaged("the trainer's state does not agree with its digest")
        return round_, state

    @property
    def finished(self) -> bool:
        """True once the final pass is in."""
        return bool(self._one("SELECT finished FROM status")[0])

    @property
    def revision(self) -> str:
        """Digest over all records that reading returns; empty before the first round."""
        return self._one("SELECT revision FROM status")[0]

    def verify(self) -> int:
        """Digest every record, the state and the file's structure again; returns the number of cases.

        Raises:
            ValueError: When anything differs from what was written.
        """
        with self._session() as db:
            problems = db.execute("PRAGMA integrity_check(1)").fetchall()
            if problems != [("ok",)]:
                raise self._damaged(str(problems[0][0]).splitlines()[0])
            generation, best, revision = db.execute("SELECT generation, best, revision FROM status").fetchone()
            for row in db.execute(f"SELECT {_COLUMNS} FROM record WHERE generation <= ?", (generation,)):
                self._unpacked(row)
            if generation and _revision(db, best) != revision:
                raise self._damaged("the set of cases has changed")
        self.state()
        return len(self)

    # ---------------------------------------------------------------- writing

    def commit(
        self, records: Iterable[Record], *, round_: int, score: float, state: bytes, final: bool = False
    ) -> None:
        """Make one complete round current, in one transaction.

        Records are put on disk as they come (they may be computed on the way, from :py:meth:`current`) but none is seen
        before the last one is in.

        Args:
            records: one per case, every round the same cases.
            round_: number of the round, above the last one's; the final pass may repeat it.
            score: finite, the lower the better.
            state: what the trainer needs to go on after this round.
            final: these perturbations are the result, whatever their score.

        Raises:
            ValueError: When the round is not a successor, is incomplete, or a record contradicts itself.
            OSError: When the disk is full or cannot be written; the last complete round is kept.
        """
        if not math.isfinite(score):
            raise ValueError(f"score of round {round_} is {score}: the fit has diverged; lower the learning rate")
        generation, count = self._begin_round(round_, final), 0
        for rows in _batches((generation, *pack(record)) for record in records):
            with self._session(write=True) as db:
                self._check_alone(db, generation, count)
                try:
                    db.executemany(f"INSERT INTO record (generation, {_COLUMNS}) VALUES (?{', ?' * 8})", rows)
                except sqlite3.IntegrityError as error:
                    raise ValueError(f"round {round_} has a case twice; sample ids must be unique") from error
            count += len(rows)
        with self._session(write=True) as db:
            self._check_alone(db, generation, count)
            self._check_complete(db, generation, count)
            self._publish(db, generation, round_, score, state, final)

    def _begin_round(self, round_: int, final: bool) -> int:
        with self._session(write=True) as db:
            status = db.execute("SELECT generation, round, finished, fingerprint FROM status").fetchone()
            generation, last, finished, found = status
            if generation:  # another run may have settled it since this object was made
                self._check_fingerprint(found)
            if finished:
                raise ValueError(f"{self.path.name} is finished; use a new output folder to fit again")
            if last is not None and round_ < last + (not final):
                raise ValueError(
                    f"round {round_} does not follow round {last} of {self.path.name}; resume from bank.state()"
                )
            # What a killed run wrote of a round that it did not complete.
            db.execute("DELETE FROM record WHERE generation > ?", (generation,))
            return generation + 1

    def _check_alone(self, db: sqlite3.Connection, generation: int, count: int) -> None:
        before = db.execute("SELECT generation FROM status").fetchone()[0]
        present = db.execute("SELECT count(*) FROM record WHERE generation >= ?", (generation,)).fetchone()[0]
        if generation != before + 1 or present != count:
            raise ValueError(f"another run writes {self.path}; let one of them use another output folder")

    def _check_complete(self, db: sqlite3.Connection, generation: int, count: int) -> None:
        if count == 0:
            raise ValueError("a round without any case cannot be committed")
        before = generation - 1
        kept = db.execute("SELECT count(*) FROM record WHERE generation = ?", (before,)).fetchone()[0]
        lost = db.execute(
            "SELECT sample_id FROM record WHERE generation = ? AND (sample_id, image_digest) NOT IN "
            "(SELECT sample_id, image_digest FROM record WHERE generation = ?)",
            (before, generation),
        ).fetchone()
        if before and (lost or count != kept):
            example = f", for example {lost[0]}" if lost else ""
            raise ValueError(
                f"this round has {count} cases and the last one {kept}, not all with the same image{example}: "
                "the cohort changed; use a new output folder"
            )

    def _publish(
        self, db: sqlite3.Connection, generation: int, round_: int, score: float, state: bytes, final: bool
    ) -> None:
        changes: dict[str, Any] = {"generation": generation, "round": round_, "finished": int(final)}
        changes |= {"state": state, "state_digest": hashlib.sha256(state).hexdigest()}
        if self.fingerprint is not None:
            changes["fingerprint"] = self.fingerprint
        best_score = db.execute("SELECT best_score FROM status").fetchone()[0]
        if final or best_score is None or score < best_score:
            changes |= {"best": generation, "best_score": score, "revision": _revision(db, generation)}
        db.execute(f"UPDATE status SET {', '.join(f'{name} = ?' for name in changes)}", tuple(changes.values()))
        db.execute("DELETE FROM record WHERE generation < ? AND generation != (SELECT best FROM status)", (generation,))
        if final:
            db.execute("PRAGMA incremental_vacuum").fetchall()

    # ---------------------------------------------------------------- the file

    @contextmanager
    def _session(self, *, write: bool = False) -> Iterator[sqlite3.Connection]:
        """One transaction on a connection of its own: nothing is shared with threads or forked processes."""
        try:
            db = _connect(self.path)
            try:
                if write:
                    db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # heeded only while the file is empty
                db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                yield db
                db.execute("COMMIT")
            finally:
                db.close()  # rolls back what was not committed
        except sqlite3.Error as error:
            raise self._translated(error) from error

    def _create(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        if self._one("SELECT 1 FROM sqlite_master"):
            return  # a session that may write changes the file's header
        with self._session(write=True) as db:
            if db.execute("SELECT 1 FROM sqlite_master").fetchone():
                return
            for statement in filter(str.strip, _SCHEMA.split(";")):
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            db.execute("INSERT INTO status (id, fingerprint) VALUES (1, '')")

    def _check_is_bank(self) -> None:
        with self._session() as db:
            if db.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
                raise ValueError(f"{self.path} is not a perturbation bank; name the bank.sqlite that a fit wrote")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version != _SCHEMA_VERSION:
                raise ValueError(f"{self.path} has bank version {version}, not {_SCHEMA_VERSION}: fit again")
            found, generation = db.execute("SELECT fingerprint, generation FROM status").fetchone()
        if generation:
            self._check_fingerprint(found)

    def _check_fingerprint(self, found: str) -> None:
        if self.fingerprint is not None and found != self.fingerprint:
            raise OtherSettingsError(
                f"{self.path} was fitted with fingerprint {found[:12]!r}, now it is {self.fingerprint[:12]!r}: "
                "the configuration, the images or monai_salm changed. Use a new output folder, or the old ones"
            )

    def _one(self, query: str, *arguments: Any) -> Any:
        with self._session() as db:
            return db.execute(query, arguments).fetchone()

    def _unpacked(self, row: tuple[Any, ...]) -> Record:
        try:
            return unpack(row)
        except ValueError as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is damaged ({what}): restore it, or fit again in a new output folder")

    def _translated(self, error: sqlite3.Error) -> Exception:
        text = str(error)
        if "is full" in text:
            what = f"no space left while writing {self.path}: free some and run again, the last complete round is kept"
            return OSError(errno.ENOSPC, what)
        if "locked" in text:
            return TimeoutError(f"another run is writing {self.path}: wait for it, or use another output folder")
        if "readonly" in text or "unable to open" in text or "disk I/O" in text:
            if not self.path.exists():
                return FileNotFoundError(errno.ENOENT, "there is no perturbation bank; fit first", str(self.path))
            return OSError(errno.EIO, f"the perturbation bank cannot be read or written ({text})", str(self.path))
        return self._damaged(text)


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=TIMEOUT_S, isolation_level=None)


def _revision(db: sqlite3.Connection, generation: int) -> str:
    query = "SELECT sample_id, digest FROM record WHERE generation = ? ORDER BY sample_id"
    return hashlib.sha256(json.dumps(db.execute(query, (generation,)).fetchall()).encode()).hexdigest()


def _batches(rows: Iterable[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += len(row[-1])
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _of_image(record: Record, image: str, digest: str, step: float | None) -> Tensor:
    """The perturbation, if it was fitted on the image of this digest and step."""
    if digest != record.image_digest:
        raise ValueError(
            f"{record.sample_id}: {image} is not the one that its perturbation was fitted on: values or type differ. "
            "Apply it to the stored values before any other transform, or fit again"
        )
    if step is not None and not math.isclose(step, record.step, rel_tol=1e-9):
        raise ValueError(
            f"{record.sample_id}: a lattice step is {step:g} stored units here and {record.step:g} in the bank; "
            "read the image with the window that it was fitted with"
        )
    return record.delta
