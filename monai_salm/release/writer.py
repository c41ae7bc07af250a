# SPDX-License-Identifier: Apache-2.0
"""Write the units of a release: files are verified before they are visible, and then listed in the journal."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from monai_salm import __version__
from monai_salm.io import dicom, formats, masks, worker
from monai_salm.io.base import Case, FileCheck, Outline, RefusedError, Window
from monai_salm.perturbations.budget import Budget
from monai_salm.records import OtherSettingsError, smallest_type
from monai_salm.release import commit as door
from monai_salm.release.custody import KEY, Journal, clear_key_parts, start_time
from monai_salm.release.identity import UidMap, keyed_name, load_or_create_key, mask_id, owner_id
from monai_salm.release.manifest import LABEL, PROTECTED, ManifestRow
from monai_salm.release.shards import Shard
from monai_salm.release.visibility import VISIBILITY, CaseVisibility, Gate, VisibilityLog, measure
from monai_salm.stored import StoredCodec


class _Facts(NamedTuple):
    """What is known of a source file before it is written; a label file has an owner and no more.

    Args:
        owner: ``sample_id`` of its manifest row.
        levels: lattice steps that the budget allows.
        limit: largest change allowed, in stored units.
        physical: the same in physical units.
        voxels: voxels that may change.
    """

    owner: str
    levels: int = 0
    limit: float = 0.0
    physical: float = 0.0
    voxels: int = 0


@dataclass
class UnitWriter:
    """Writes the units of a shard, and skips those that an earlier run has written.

    Only one process at a time may make one: that makes the keys and removes what a killed run has left. The arguments
    are those of :py:func:`monai_salm.release.protect.protect_cohort`; ``root`` is the export and ``out`` the output
    folder, both absolute.
    """

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
        """Write a unit, unless an earlier run has; returns the rows of its files."""
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
        is_whole = len(done) == len(formats.files_of(unit)) + bool(mask)
        if is_whole and all(door.holds(self.out / door.PROTECTED / row.file, row.sha256) for row in done):
            return done
        if self.gate is not None:
            self._visibility.keep([self._measure(self.gate, case, outlines[case], deltas[case]) for case in unit])
        facts = self._facts(outlines, deltas)
        written = door.commit(self.out, self._staged(unit, deltas, facts), self.shard.part)
        uids = [uid for _, uid in worker.call(dicom.identify_all, tuple(facts))]
        rows = [
            self._row(source, uid, facts[source], file, inputs)
            for source, uid, file in zip(facts, uids, written, strict=True)
        ]
        self._journal.append(rows)
        return rows

    def _row(self, source: Path, uid: str, known: _Facts, file: door.Committed[FileCheck], inputs: str) -> ManifestRow:
        return ManifestRow(
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

    def _measure(self, gate: Gate, case: Case, outline: Outline, delta: np.ndarray) -> CaseVisibility:
        return measure(gate, case, outline, delta, partial(formats.read_slices, case, self.spatial_dims, self.window))

    def _facts(self, outlines: Mapping[Case, Outline], deltas: Mapping[Case, np.ndarray]) -> dict[Path, _Facts]:
        """Facts of the files of a unit, in the order in which they are written."""
        facts: dict[Path, _Facts] = {}
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
            facts |= dict.fromkeys(files, _Facts(owner, levels, limit, physical, voxels))
        mask = next(iter(outlines)).mask
        if mask is not None:
            facts[mask.file] = _Facts(mask_id(mask))
        return facts

    def _staged(
        self, unit: Sequence[Case], deltas: dict[Case, np.ndarray], facts: Mapping[Path, _Facts]
    ) -> Iterator[door.Staged[FileCheck]]:
        """The files of a unit, one at a time in memory; each delta is dropped with the file that it goes into."""
        changed = Counter(dict.fromkeys(map(owner_id, unit), 0))
        staged: dict[Path, Path] = {}

        def verify(path: Path, source: Path) -> FileCheck:
            known = facts[source]
            check = formats.verify(unit[0].format, source, path, known.limit, known.physical)
            changed[known.owner] += check.changed
            staged[source] = path
            return check

        options = {"spatial_dims": self.spatial_dims, "window": self.window, "when": self._when}
        for file in formats.protect(unit, deltas.pop, uids=self.uids, **options):
            name = self._named(file.name, file.source, "images")
            ready = [door.Staged(name, file.content, partial(verify, source=file.source))]
            del file
            yield ready.pop()  # so that no variable holds its bytes while the next one comes
        if not all(changed.values()):  # nothing is visible before the generator ends
            raise RefusedError("verification_failed", "the written files equal their sources: nothing was protected")
        mask = unit[0].mask
        if mask is not None:
            name, content = masks.protect(mask, self.uids)
            check = partial(masks.verify, unit, staged, spatial_dims=self.spatial_dims)
            yield door.Staged(self._named(name, mask.file, "labels"), content, check)

    def _named(self, name: PurePosixPath, source: Path, folder: str) -> PurePosixPath:
        """Where a file goes, in the output folder; DICOM files have new names in any case."""
        keeps = not self.rename or dicom.looks_like_dicom(source)
        return door.PROTECTED / (name if keeps else keyed_name(self._key, name, folder))

    def _delta(self, case: Case, outline: Outline) -> np.ndarray:
        """The perturbation of a case.

        Raises:
            RefusedError: When there is none, it changes nothing, or it is of another image.
        """
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
        """Lattice steps that the budget allows in this image. Whether voxels stay in range ``io.base.move`` checks.

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
        """Keyed digest of all that decides the bytes of a unit's files: settings, sources, perturbations."""
        settings = [str(self.budget), self.window, self.spatial_dims, __version__]
        if self.gate is not None and self.gate.refuses:
            settings.append("refuse what is too visible")
        if self.rename:
            settings.append("rename")
        digest = hmac.new(self._key, json.dumps(settings).encode(), hashlib.sha256)
        for file in (*formats.files_of(unit), *([unit[0].mask.file] if unit[0].mask else [])):
            digest.update(door.sha256_of(file).encode())
        for case in unit:
            delta = deltas[case]
            kept = smallest_type(max(int(delta.max()), -int(delta.min()))) or delta.dtype
            for slab in delta.reshape(len(delta) * delta.shape[1], -1):
                digest.update(np.ascontiguousarray(slab, dtype=kept))
        return digest.hexdigest()
