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
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from monai_salm.io import formats
from monai_salm.io.base import Case, RefusedError, Window
from monai_salm.perturbations.budget import Budget, as_window
from monai_salm.release import bids, custody, lock
from monai_salm.release import commit as door
from monai_salm.release.custody import close, start_time
from monai_salm.release.earlier import CLASSES, FOLLOWED, PATIENTS
from monai_salm.release.gates import Refusal
from monai_salm.release.identity import mask_id, owner_id
from monai_salm.release.labels import Cohort
from monai_salm.release.manifest import ManifestRow, read_manifest, sweep
from monai_salm.release.progress import track
from monai_salm.release.shards import Shard
from monai_salm.release.visibility import Gate
from monai_salm.release.writer import UnitWriter

__all__ = ["prepare_output", "protect_cohort", "read_protected"]

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
        One row per released file, in the cohort's order; :py:func:`monai_salm.release.custody.read_refusals` tells what
        was refused.

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
    shard = Shard.parse(shard)
    if rename and bids.is_tree(root):
        raise ValueError("the names of a BIDS tree say what its files are; protect it without 'rename'")
    if not getattr(bank, "finished", True):  # an earlier round would protect less
        raise ValueError("the fit is not finished; run the stage 'fit' again, it goes on where it was")
    door.check_output(root, output_dir)
    door.open_output(output_dir)
    with lock.holding(output_dir, shard.lock):
        with lock.holding(output_dir, wait_s=_WAIT_S):
            writer = UnitWriter(bank, budget, root, output_dir, spatial_dims, window, key_file, gate, shard, rename)
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
        raise ValueError(
            f"nothing was protected: every case was refused ({reasons}); see {output_dir / shard.refusals}"
        )
    if told := custody.refusals_line(output_dir):
        print(told, flush=True)
    return manifest


def _refuse(unit: Sequence[Case], error: RefusedError) -> list[Refusal]:
    """The refusals of a unit: one for each case, or for the one file that holds them all."""
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
    shard = Shard.parse(shard)
    if lock.take(output_dir, shard.lock):
        atexit.register(lock.give_back, output_dir, shard.lock)
    with lock.holding(output_dir, wait_s=_WAIT_S):
        start_time(output_dir)
    door.clear_staging(output_dir, shard.part)


def read_protected(cohort: Cohort, output_dir: Path | str) -> dict[str, Case]:
    """The protected twin of each released case that was written, by ``sample_id``.

    A twin has the same id, label, split and group; its files (and that of its mask) are the protected ones.

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
