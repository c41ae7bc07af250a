# SPDX-License-Identifier: Apache-2.0
"""Write the protected copy of a cohort, and read it back.

Layout of the output folder::

    protected/            the files to share, and labels.csv
    manifest.jsonl        one line per shared file: what was measured on the written bytes
    private/              release.key, run.json, refusals.jsonl: stays with the owner

Fail closed: a case without a perturbation, or whose written file does not verify, is refused and never copied. A run
that was killed goes on where it stopped and ends with the same bytes.
"""

from __future__ import annotations

import csv
import hashlib
import hmac
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from monai_salm import __version__
from monai_salm.io import formats, npz
from monai_salm.io.base import Case, RefusedError, Window
from monai_salm.perturbations.budget import Budget
from monai_salm.release import commit as door
from monai_salm.release.catalog import Refusal
from monai_salm.release.identity import UidMap, load_or_create_key, pseudonym
from monai_salm.release.labels import LABELS_FILE, Cohort
from monai_salm.release.progress import track

KEY = f"{door.PRIVATE}/release.key"
REFUSALS = f"{door.PRIVATE}/refusals.jsonl"


class IntegrityError(RuntimeError):
    """The protected folder is not what the manifest says; nothing in it should be shared."""


@dataclass(frozen=True)
class ManifestRow:
    """What is known of one protected file.

    Args:
        sample_id: the case, or a pseudonym of the archive that holds many.
        file: path below ``protected/``.
        sha256: of the file.
        levels: lattice steps the budget allows.
        max_abs: largest change, in stored units, measured on the written file.
        changed: voxels that differ from the source.
        voxels: all voxels of the file.
        inputs: keyed digest of source, perturbation and settings; tells a repeated run from a different one.
    """

    sample_id: str
    file: str
    sha256: str
    levels: int
    max_abs: float
    changed: int
    voxels: int
    inputs: str


def protect_cohort(
    cohort: Cohort,
    bank: Mapping[str, Any],
    *,
    budget: Budget | str | float,
    output_dir: Path | str,
    spatial_dims: int,
    window: Window = "auto",
    key_file: Path | str | None = None,
) -> list[ManifestRow]:
    """Write the protected file of every released case, verified before it becomes visible.

    Args:
        cohort: labelled cases; those of split ``test`` are never written.
        bank: (1, *spatial) integer lattice steps by ``sample_id``, in canonical axes.
        budget: the bound that the perturbations were fitted with.
        output_dir: folder of the release, see the module's docstring.
        spatial_dims: 2 or 3.
        window: ``"auto"`` or (low, high) in physical units, as it was for the fit.
        key_file: secret of the UID map; default: ``private/release.key``, made on first use.

    Returns:
        One row per protected file, in the cohort's order. What was refused is in :py:func:`read_refusals`.

    Raises:
        ValueError: When the output folder cannot be used, holds a release made from other inputs, or when no case
            could be protected.
        OutputError: When the disk is full or not writable; the same command goes on later.
        IntegrityError: When ``protected/`` holds a file that this release did not write.
    """
    output_dir = Path(output_dir).absolute()
    window = window if isinstance(window, str) else (float(window[0]), float(window[1]))
    door.check_output(cohort.root, output_dir)
    door.open_output(output_dir)
    writer = _Writer(bank, Budget.parse(budget), output_dir, spatial_dims, window, key_file)
    rows: dict[tuple[Case, ...], list[ManifestRow]] = {}
    refusals = list(cohort.refusals)
    for unit in track(formats.units(cohort.released), "protecting"):
        try:
            rows[unit] = writer.protect(unit)
        except RefusedError as error:
            refusals.append(Refusal(_unit_id(unit), error.reason, error.detail))
    _finish(output_dir, rows, cohort, refusals)
    if not rows:
        reasons = ", ".join(sorted({refusal.reason for refusal in refusals}))
        raise ValueError(f"nothing was protected: every case was refused ({reasons}); see {output_dir / REFUSALS}")
    return [row for unit in rows.values() for row in unit]


def prepare_output(source: Path | str | None, output_dir: Path | str) -> None:
    """Check and mark the output folder before hours are spent on a fit that could not be written.

    Raises:
        ValueError: When there is no export, or the folder cannot be used, see
            :py:func:`monai_salm.release.commit.check_output`.
        OutputError: When it is not writable.
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
    _start_time(output_dir)
    door.close_output(output_dir)


def read_manifest(output_dir: Path | str) -> list[ManifestRow]:
    """Rows of a release's manifest; a line torn by a killed run is left out."""
    lines = _whole_lines(Path(output_dir) / door.MANIFEST)
    return list({row.file: row for row in (ManifestRow(**json.loads(line)) for line in lines)}.values())


def read_refusals(output_dir: Path | str) -> list[Refusal]:
    """What the release left out, with reasons: refused files, cases without label, cases that did not verify."""
    return [Refusal(**json.loads(line)) for line in _whole_lines(Path(output_dir) / REFUSALS)]


def read_protected(cohort: Cohort, output_dir: Path | str) -> dict[str, Case]:
    """The protected twin of each released case that was written, by ``sample_id``.

    The twin has the same id, label, split and group; its files are the protected ones, to be read from disk by
    :py:func:`monai_salm.io.formats.read` as any other case.

    Raises:
        IntegrityError: When a file is missing or not the one that was written.
    """
    root = Path(output_dir).absolute() / door.PROTECTED
    rows = read_manifest(output_dir)
    _sweep(root, rows)
    files: dict[str, list[Path]] = {}
    for row in rows:
        files.setdefault(row.sample_id, []).append(root / row.file)
    twins = {}
    for unit in formats.units(cohort.released):
        written = tuple(files.get(_unit_id(unit), ()))
        if written:
            twins |= {case.sample_id: replace(case, files=written) for case in unit}
    return twins


class _Writer:
    """Protects one unit after the other; knows what an earlier run has done."""

    def __init__(
        self,
        bank: Mapping[str, Any],
        budget: Budget,
        output_dir: Path,
        spatial_dims: int,
        window: Window,
        key_file: Path | str | None,
    ) -> None:
        self._bank = bank
        self._budget = budget
        self._out = output_dir
        self._spatial_dims = spatial_dims
        self._window = window
        self._when = _start_time(output_dir)
        self._key = load_or_create_key(Path(key_file) if key_file else output_dir / KEY)
        self._done: dict[str, list[ManifestRow]] = {}
        for row in read_manifest(output_dir):
            self._done.setdefault(row.sample_id, []).append(row)
        _drop_torn_line(output_dir)

    def protect(self, unit: Sequence[Case]) -> list[ManifestRow]:
        """Rows of one unit, written now or before."""
        images = {case: formats.read(case, self._spatial_dims, self._window) for case in unit}
        deltas = {case: self._delta(case, images[case].stored, images[case].codec.step) for case in unit}
        inputs = self._digest(unit, deltas)
        done = self._done.get(_unit_id(unit), [])
        if any(row.inputs != inputs for row in done):
            raise ValueError(
                "the output folder holds files made with another perturbation, budget, window or key; two versions of "
                "one image must not share their UIDs: choose a new output folder"
            )
        if len(done) == len(unit[0].files) and all(self._is_there(row) for row in done):
            return done
        levels = max(self._check_bounds(image.stored, image.codec, deltas[case]) for case, image in images.items())
        limit = levels * max(image.codec.step for image in images.values())
        voxels = sum(image.stored.size for image in images.values()) // len(unit[0].files)
        written = door.commit(self._out, self._staged(unit, deltas, limit))
        rows = [
            ManifestRow(
                _unit_id(unit),
                file.name.relative_to(door.PROTECTED).as_posix(),
                file.sha256,
                levels,
                float(file.result.max_abs),
                int(file.result.changed),
                voxels,
                inputs,
            )
            for file in written
        ]
        door.append_line(self._out, door.MANIFEST, _as_lines(rows))
        return rows

    def _staged(
        self, unit: Sequence[Case], deltas: Mapping[Case, np.ndarray], limit: float
    ) -> Iterator[door.Staged[Any]]:
        changed = 0

        def verify(path: Path, source: Path) -> Any:
            nonlocal changed
            check = formats.verify(unit[0].format, source, path, limit)
            changed += check.changed
            return check

        options = {"spatial_dims": self._spatial_dims, "window": self._window, "when": self._when}
        for file in formats.protect(unit, deltas.__getitem__, uids=UidMap(self._key), **options):
            yield door.Staged(door.PROTECTED / file.name, file.content, partial(verify, source=file.source))
        if not changed:  # still before anything is visible
            raise RefusedError("verification_failed", "the written files equal their sources: nothing was protected")

    def _delta(self, case: Case, stored: np.ndarray, step: float) -> np.ndarray:
        load = getattr(self._bank, "load", None)  # a PerturbationBank also checks that it was fitted on this image
        try:
            delta = np.asarray(load(case.sample_id, stored, step=step) if load else self._bank[case.sample_id])
        except KeyError as error:
            raise RefusedError("no_perturbation", "the bank has no perturbation for this case; fit it first") from error
        except ValueError as error:
            raise RefusedError("other_image", "the perturbation was fitted on another image; fit again") from error
        if delta.shape != stored.shape or delta.dtype.kind not in "iu":
            raise RefusedError(
                "other_image", f"perturbation {delta.dtype}{delta.shape} for an image {stored.shape}; fit again"
            )
        if not delta.any():
            raise RefusedError(
                "empty_perturbation", "the perturbation changes no voxel; fit longer or raise the budget"
            )
        return delta

    def _check_bounds(self, stored: np.ndarray, codec: Any, delta: np.ndarray) -> int:
        """Levels of the budget in this image.

        Raises:
            RefusedError: When the perturbation leaves the budget, the window or the padding's complement.
        """
        try:
            levels = codec.levels(self._budget)
            lower, upper = codec.bounds(torch.from_numpy(stored), self._budget)
        except ValueError as error:
            raise RefusedError("budget", str(error)) from error
        if (delta < lower.numpy()).any() or (delta > upper.numpy()).any():
            raise RefusedError(
                "outside_budget", f"the perturbation leaves the budget of {self._budget}; fit again with it"
            )
        return int(levels)

    def _digest(self, unit: Sequence[Case], deltas: Mapping[Case, np.ndarray]) -> str:
        settings = [str(self._budget), self._window, self._spatial_dims, __version__]
        digest = hmac.new(self._key, json.dumps(settings).encode(), hashlib.sha256)
        for file in unit[0].files:
            digest.update(door.sha256_of(file).encode())
        for case in unit:
            digest.update(np.ascontiguousarray(deltas[case], dtype=np.int32).tobytes())
        return digest.hexdigest()

    def _is_there(self, row: ManifestRow) -> bool:
        path = self._out / door.PROTECTED / row.file
        return path.is_file() and not path.is_symlink() and door.sha256_of(path) == row.sha256


def _finish(
    output_dir: Path,
    rows: Mapping[tuple[Case, ...], Sequence[ManifestRow]],
    cohort: Cohort,
    refusals: Sequence[Refusal],
) -> None:
    """Write the tables in the cohort's order and sweep the folder for files that do not belong."""
    tables = {door.MANIFEST: _as_lines([row for unit in rows.values() for row in unit]), REFUSALS: _as_lines(refusals)}
    labels = _labels_table(rows, cohort)
    if labels:
        tables[f"{door.PROTECTED}/{LABELS_FILE}"] = labels
    _write(output_dir, tables)
    door.close_output(output_dir)
    _sweep(output_dir / door.PROTECTED, [row for unit in rows.values() for row in unit])


def _labels_table(rows: Mapping[tuple[Case, ...], Sequence[ManifestRow]], cohort: Cohort) -> str:
    """Labels of the released cases under their new names; archives carry their own."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["case", "label", "split"])
    labelled = [(unit[0], files) for unit, files in rows.items() if unit[0].index is None]
    for case, files in labelled:
        folders = {PurePosixPath(row.file).parent for row in files}
        name = folders.pop().as_posix() if len(files) > 1 and len(folders) == 1 else files[0].file
        table.writerow([name, cohort.classes[case.label], case.split])
    return text.getvalue() if labelled else ""


def _sweep(root: Path, rows: Iterable[ManifestRow]) -> None:
    expected = {root / row.file: row.sha256 for row in rows}
    present = {path for path in root.rglob("*") if path.is_symlink() or not path.is_dir()}
    orphans = present - expected.keys() - {root / LABELS_FILE}
    if orphans:
        raise IntegrityError(
            f"{len(orphans)} files in {root} were not written by this release and may be unprotected; "
            "remove the folder and run again"
        )
    for path, digest in expected.items():
        if path.is_symlink() or not path.is_file() or door.sha256_of(path) != digest:
            raise IntegrityError(f"a file in {root} is missing or changed since it was written; run protect again")


def _start_time(output_dir: Path) -> datetime:
    """Start of the first run on this folder (SOURCE_DATE_EPOCH if set), so that every rerun writes the same bytes."""
    path = output_dir / door.RUN
    if not path.is_file():
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        now = datetime.fromtimestamp(int(epoch), timezone.utc) if epoch else datetime.now(timezone.utc)
        run = {"started": now.replace(microsecond=0).isoformat(), "monai_salm": __version__}
        _write(output_dir, {door.RUN: json.dumps(run) + "\n"})
    return datetime.fromisoformat(json.loads(path.read_text())["started"])


def _write(output_dir: Path, tables: Mapping[str, str]) -> None:
    door.commit(
        output_dir, (door.Staged(PurePosixPath(name), text.encode(), lambda _: None) for name, text in tables.items())
    )


def _unit_id(unit: Sequence[Case]) -> str:
    return unit[0].sample_id if unit[0].index is None else pseudonym(npz.archive_name(unit[0]).as_posix())


def _as_lines(rows: Iterable[ManifestRow | Refusal]) -> str:
    return "".join(json.dumps(asdict(row), sort_keys=True) + "\n" for row in rows)


def _whole_lines(path: Path) -> list[str]:
    text = path.read_text() if path.is_file() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def _drop_torn_line(output_dir: Path) -> None:
    path = output_dir / door.MANIFEST
    whole = "".join(f"{line}\n" for line in _whole_lines(path))
    if path.is_file() and path.read_text() != whole:
        _write(output_dir, {door.MANIFEST: whole})
