# SPDX-License-Identifier: Apache-2.0
"""Write the protected copy of a cohort, and read it back.

Layout of the output folder::

    protected/            the files to share; label files of voxels as they were; labels.csv, dataset.json
    manifest.jsonl        one line per shared file: what was measured on the written bytes
    release.*             signature over the manifests, and the public key
    private/              keys, run.json, refusals.jsonl, manifest.jsonl (the original of each file): the owner's

Fail closed: a case without a perturbation, or whose written file does not verify, is refused and never copied. A run
that was killed goes on where it stopped and ends with the same bytes.
"""

from __future__ import annotations

import atexit
import hashlib
import hmac
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from monai_salm import __version__
from monai_salm.io import dicom, formats, masks, worker
from monai_salm.io.base import Case, FileCheck, Outline, RefusedError, Window
from monai_salm.perturbations.budget import Budget, as_window
from monai_salm.records import OtherSettingsError
from monai_salm.release import bids, custody, lock
from monai_salm.release import commit as door
from monai_salm.release.custody import KEY, Journal, clear_key_parts, close, read_refusals, start_time
from monai_salm.release.earlier import CLASSES, FOLLOWED, PATIENTS
from monai_salm.release.gates import Refusal
from monai_salm.release.identity import UidMap, keyed_name, load_or_create_key, mask_id, owner_id
from monai_salm.release.labels import Cohort
from monai_salm.release.manifest import LABEL, PROTECTED, IntegrityError, ManifestRow, read_manifest, sweep
from monai_salm.release.progress import track
from monai_salm.release.shards import Shard
from monai_salm.release.visibility import VISIBILITY, CaseVisibility, Gate, VisibilityLog, measure
from monai_salm.stored import StoredCodec

__all__ = [
    "KEY",
    "IntegrityError",
    "ManifestRow",
    "prepare_output",
    "protect_cohort",
    "read_manifest",
    "read_protected",
    "read_refusals",
]

_WAIT_S = 600.0
"""How long a shard waits while another one opens or closes the output folder."""


def protect_cohort(
    cohort: Cohort,
    bank: Mapping[str, Any],
    *,
    budget: Budget | str | float,
    output_dir: Path | str,
    spatial_dims: int,
    window: Window = "auto",
    key_file: Path | str | None = None,
    gate: Gate | None = None,
    shard: Shard | str | None = None,
    rename: bool = False,
) -> list[ManifestRow]:
    """Write the protected file of every released case, verified before it becomes visible, and say what was refused.

    Args:
        cohort: labeled cases; those of split ``test`` are never written.
        bank: (1, *spatial) integer lattice steps by ``sample_id``, in canonical axes.
        budget: the bound that the perturbations were fitted with.
        output_dir: folder of the release, see the module's docstring.
        spatial_dims: 2 or 3.
        window: ``"auto"`` or (low, high) in physical units, as it was for the fit.
        key_file: secret of the UID map; default: ``private/release.key``, made on first use.
        gate: measures how visible each case would be, and may refuse it; default: nothing is measured.
        shard: ``"I/N"`` writes one part of N, beside other processes that write the others into the same folder; which
            part a unit is in follows from the key. The files are the same for every N. Default: everything.
        rename: give keyed names to files that would keep those of the export, see ``identity.keyed_name``.

    Returns:
        One row per released file, in the cohort's order. What was refused is in :py:func:`read_refusals`.

    Raises:
        ValueError: When the fit is not finished, the output folder cannot be used, holds a release made from other
            inputs or in another number of shards, or when no case could be protected.
        LockedError: When another process writes the same.
        OutputError: When the disk is full or not writable; the same command goes on later.
        IntegrityError: When ``protected/`` holds a file that this release did not write.
    """
    root, output_dir = cohort.root.absolute(), Path(output_dir).absolute()
    budget = Budget.parse(budget)
    budget.check_window(window)
    window = as_window(window)
    shard = Shard.parse(shard or Shard())
    if rename and bids.is_tree(root):
        raise ValueError("the names of a BIDS tree say what its files are; protect it without 'rename'")
    if not getattr(bank, "finished", True):  # an earlier round would protect less
        raise ValueError("the fit is not finished; run the stage 'fit' again, it goes on where it was")
    door.check_output(root, output_dir)
    door.open_output(output_dir)
    with lock.holding(output_dir, shard.lock):
        with lock.holding(output_dir, wait_s=_WAIT_S):
            writer = _Writer(bank, budget, root, output_dir, spatial_dims, window, key_file, gate, shard, rename)
            kept = {CLASSES: json.dumps(cohort.classes) + "\n", PATIENTS: json.dumps(cohort.patients) + "\n"}
            if cohort.follows:
                kept[FOLLOWED] = json.dumps({"like": str(cohort.follows)}) + "\n"
            door.write(output_dir, kept, shard.part)
        rows: list[ManifestRow] = []
        refusals = list(cohort.refusals) if shard.index == 1 else []
        units = [unit for unit in formats.units(cohort.released) if writer.writes(unit)]
        for unit in track(units, "protecting"):
            try:
                rows += writer.protect(unit)
            except RefusedError as error:
                refusals += _refuse(unit, error)
        with lock.holding(output_dir, wait_s=_WAIT_S):
            manifest = close(output_dir, shard, rows, cohort, refusals, writer.uids)
    if units and not rows:
        reasons = ", ".join(sorted({refusal.reason for refusal in refusals}))
        raise ValueError(f"nothing was protected: every case was refused ({reasons}); see {output_dir / door.REFUSALS}")
    if told := custody.refusals_line(output_dir):
        print(told, flush=True)
    return manifest


def _refuse(unit: Sequence[Case], error: RefusedError) -> list[Refusal]:
    owners = list(dict.fromkeys(map(owner_id, unit)))
    one = f"one of {len(owners)} images that share a label file: " if len(owners) > 1 else ""
    return [Refusal(owner, error.reason, one + error.detail) for owner in owners]


def prepare_output(source: Path | str | None, output_dir: Path | str, shard: Shard | str | None = None) -> None:
    """Check, mark and lock the output folder before hours are spent on a fit that could not be written.

    The process keeps the lock until it ends, or gives it back with :py:func:`monai_salm.release.lock.give_back`.

    Raises:
        ValueError: When there is no export, or the folder cannot be used, see
            :py:func:`monai_salm.release.commit.check_output`.
        OutputError: When it is not writable.
        LockedError: When another process writes into it.
    """
    if source is None:
        raise ValueError("dataset_dir is not set; name the folder or archive that holds the images")
    source, output_dir = Path(source), Path(output_dir).absolute()
    if not source.exists():
        raise ValueError(f"export {source} does not exist; check dataset_dir")
    if source.is_dir() and not any(source.iterdir()):
        raise ValueError(f"export {source} is empty; name the folder that holds the images")
    door.check_output(source, output_dir)
    door.open_output(output_dir)
    shard = Shard.parse(shard or Shard())
    if lock.take(output_dir, shard.lock):
        atexit.register(lock.give_back, output_dir, shard.lock)
    with lock.holding(output_dir, wait_s=_WAIT_S):
        start_time(output_dir)
    door.clear_staging(output_dir, shard.part)


def read_protected(cohort: Cohort, output_dir: Path | str) -> dict[str, Case]:
    """The protected twin of each released case that was written, by ``sample_id``.

    The twin has the same id, label, split and group; its files (and that of its mask) are the protected ones, to be
    read from disk by :py:func:`monai_salm.io.formats.read` and ``read_mask`` as any other case.

    Raises:
        IntegrityError: When a file is missing or not the one that was written.
    """
    root = Path(output_dir).absolute() / door.PROTECTED
    rows = read_manifest(output_dir)
    sweep(root, rows)
    files: dict[str, list[Path]] = {}
    for row in rows:
        files.setdefault(row.sample_id, []).append(root / row.file)
    twins = {}
    for case in cohort.released:
        written = tuple(files.get(owner_id(case), ()))
        if written:
            mask = case.mask
            if mask is not None:
                path = files[mask_id(mask)][0]
                mask = replace(mask, file=path, name=path.relative_to(root).as_posix())
            twins[case.sample_id] = replace(case, files=written, mask=mask)
    return twins


class _File(NamedTuple):
    """A source file: whose it is, levels of the budget, largest change allowed (stored, physical), and voxels."""

    owner: str
    levels: int = 0
    limit: float = 0.0
    physical: float = 0.0
    voxels: int = 0


@dataclass
class _Writer:
    """Protects one unit after the other; knows what an earlier run has done."""

    bank: Mapping[str, Any]
    budget: Budget
    root: Path
    out: Path
    spatial_dims: int
    window: Window
    key_file: Path | str | None
    gate: Gate | None
    shard: Shard
    rename: bool

    def __post_init__(self) -> None:
        self._visibility = VisibilityLog(self.out, self.shard.named(VISIBILITY))
        door.clear_staging(self.out, self.shard.part)
        clear_key_parts(self.out)
        self._when = start_time(self.out)
        self._key = load_or_create_key(Path(self.key_file) if self.key_file else self.out / KEY)
        self.uids = UidMap(self._key)
        self._journal = Journal(self.out, self.shard)

    def writes(self, unit: Sequence[Case]) -> bool:
        """Whether the unit is in this shard."""
        return self.shard.holds(hmac.new(self._key, owner_id(unit[0]).encode(), hashlib.sha256).digest())

    def protect(self, unit: Sequence[Case]) -> list[ManifestRow]:
        """Rows of one unit, written now or before."""
        outlines = {case: formats.read_outline(case, self.spatial_dims, self.window) for case in unit}
        deltas = {case: self._delta(case, outlines[case]) for case in unit}
        inputs = self._digest(unit, deltas)
        mask = unit[0].mask
        owners = dict.fromkeys([*map(owner_id, unit), *([mask_id(mask)] if mask else [])])
        done = [row for owner in owners for row in self._journal.done.get(owner, [])]
        if any(row.inputs != inputs for row in done):
            raise OtherSettingsError(
                "the output folder holds files made with another perturbation, budget, window or key; two versions of "
                "one image must not share their UIDs: choose a new output folder"
            )
        there = (door.holds(self.out / door.PROTECTED / row.file, row.sha256) for row in done)
        if len(done) == len(formats.files_of(unit)) + bool(mask) and all(there):
            return done
        if self.gate is not None:
            self._visibility.keep([self._measure(self.gate, case, outlines[case], deltas[case]) for case in unit])
        facts = self._facts(outlines, deltas)
        written = door.commit(self.out, self._staged(unit, deltas, facts), self.shard.part)
        rows = [
            ManifestRow(
                sample_id=known.owner,
                file=file.name.relative_to(door.PROTECTED).as_posix(),
                sha256=file.sha256,
                levels=int(min(known.levels, file.result.allowed)),
                max_abs=float(file.result.max_abs),
                changed=int(file.result.changed),
                voxels=known.voxels,
                inputs=inputs,
                state=PROTECTED if known.levels else LABEL,
                epsilon=str(self.budget) if known.levels else "",
                source=source.name if source == self.root else source.relative_to(self.root).as_posix(),
                source_uid=uid,
            )
            for file, (_, uid), (source, known) in zip(
                written, worker.call(dicom.identify_all, tuple(facts)), facts.items(), strict=True
            )
        ]
        self._journal.append(rows)
        return rows

    def _measure(self, gate: Gate, case: Case, outline: Outline, delta: np.ndarray) -> CaseVisibility:
        return measure(gate, case, outline, delta, partial(formats.read_slices, case, self.spatial_dims, self.window))

    def _facts(self, outlines: Mapping[Case, Outline], deltas: Mapping[Case, np.ndarray]) -> dict[Path, _File]:
        facts: dict[Path, _File] = {}
        owned: dict[str, list[Case]] = {}
        for case in outlines:
            owned.setdefault(owner_id(case), []).append(case)
        for owner, cases in owned.items():
            codecs = [outlines[case].codec for case in cases]
            levels = max(self._check_budget(case, outlines[case].codec, deltas[case]) for case in cases)
            limit = levels * max(codec.step for codec in codecs)
            physical = max(codec.physical_limit(self.budget) for codec in codecs)
            files = formats.files_of(cases)
            voxels = sum(math.prod(outlines[case].shape) for case in cases) // len(files)
            facts |= dict.fromkeys(files, _File(owner, levels, limit, physical, voxels))
        mask = next(iter(outlines)).mask
        if mask is not None:
            facts[mask.file] = _File(mask_id(mask))
        return facts

    def _staged(
        self, unit: Sequence[Case], deltas: dict[Case, np.ndarray], facts: Mapping[Path, _File]
    ) -> Iterator[door.Staged[FileCheck]]:
        changed = Counter(dict.fromkeys(map(owner_id, unit), 0))
        staged: dict[Path, Path] = {}

        def verify(path: Path, source: Path) -> FileCheck:
            known = facts[source]
            check = formats.verify(unit[0].format, source, path, known.limit, known.physical)
            changed[known.owner] += check.changed
            staged[source] = path
            return check

        options = {"spatial_dims": self.spatial_dims, "window": self.window, "when": self._when}
        for file in formats.protect(unit, deltas.pop, uids=self.uids, **options):  # no longer needed here
            name = self._named(file.name, file.source, "images")
            ready = [door.Staged(name, file.content, partial(verify, source=file.source))]
            del file
            yield ready.pop()  # and keeps nothing of it while the next one comes
        if not all(changed.values()):  # still before anything is visible
            raise RefusedError("verification_failed", "the written files equal their sources: nothing was protected")
        mask = unit[0].mask
        if mask is not None:
            name, content = masks.protect(mask, self.uids)
            check = partial(masks.verify, unit, staged, spatial_dims=self.spatial_dims)
            yield door.Staged(self._named(name, mask.file, "labels"), content, check)

    def _named(self, name: PurePosixPath, source: Path, folder: str) -> PurePosixPath:
        """Where a file goes; DICOM files have new names anyhow."""
        keeps = not self.rename or dicom.looks_like_dicom(source)
        return door.PROTECTED / (name if keeps else keyed_name(self._key, name, folder))

    def _delta(self, case: Case, outline: Outline) -> np.ndarray:
        try:
            if hasattr(self.bank, "load_by_digest"):  # a PerturbationBank knows which image it was fitted on
                found = self.bank.load_by_digest(case.sample_id, outline.digest, step=outline.codec.step)
            else:
                found = self.bank[case.sample_id]
        except KeyError as error:
            raise RefusedError("no_perturbation", "the bank has no perturbation for this case; fit it first") from error
        except ValueError as error:
            raise RefusedError("other_image", "the perturbation was fitted on another image; fit again") from error
        delta = np.asarray(found)
        if delta.shape != outline.shape or delta.dtype.kind not in "iu":
            raise RefusedError(
                "other_image", f"perturbation {delta.dtype}{delta.shape} for an image {outline.shape}; fit again"
            )
        if not delta.any():
            raise RefusedError(
                "empty_perturbation", "the perturbation changes no voxel; fit longer or raise the budget"
            )
        return delta

    def _check_budget(self, case: Case, codec: StoredCodec, delta: np.ndarray) -> int:
        """Levels of the budget in this image. (Where voxels may go is for ``io.base.move`` to say, as they do.)

        Raises:
            RefusedError: When the perturbation leaves the budget, or was fitted with another one or another window.
        """
        try:
            levels = codec.slice_levels(self.budget)
        except ValueError as error:
            raise RefusedError("budget", str(error)) from error
        slices = np.moveaxis(delta, codec.slices.axis + 1, 0) if codec.slices else [delta]
        if any(part.max() > most or part.min() < -most for part, most in zip(slices, levels, strict=True)):
            raise RefusedError(
                "outside_budget", f"the perturbation leaves the budget of {self.budget}; fit again with it"
            )
        fitted = self.bank.levels(case.sample_id) if hasattr(self.bank, "levels") else max(levels)
        if fitted != max(levels):
            now = f"budget and window of the fit allow {fitted} steps in this image, those of now {max(levels)}"
            raise RefusedError("outside_budget", f"{now}; give those of the fit")
        return max(levels)

    def _digest(self, unit: Sequence[Case], deltas: Mapping[Case, np.ndarray]) -> str:
        settings = [str(self.budget), self.window, self.spatial_dims, __version__]
        if self.gate is not None and self.gate.refuses:
            settings.append("refuse what is too visible")
        if self.rename:
            settings.append("rename")
        digest = hmac.new(self._key, json.dumps(settings).encode(), hashlib.sha256)
        for file in (*formats.files_of(unit), *([unit[0].mask.file] if unit[0].mask else [])):
            digest.update(door.sha256_of(file).encode())
        for case in unit:
            for slab in deltas[case].reshape(len(deltas[case]) * deltas[case].shape[1], -1):
                digest.update(np.ascontiguousarray(slab, dtype=np.int32))
        return digest.hexdigest()
