# SPDX-License-Identifier: Apache-2.0
"""What a run would do: files, bytes, refusals, disk and time, from some images that are tried in memory."""

from __future__ import annotations

import math
import secrets
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

from monai_salm.io import formats
from monai_salm.io.base import Case, Outline, RefusedError, StoredImage, Window
from monai_salm.perturbations.budget import Budget
from monai_salm.records import smallest_type
from monai_salm.release import bids
from monai_salm.release.companions import belonging
from monai_salm.release.gates import tally
from monai_salm.release.identity import UidMap
from monai_salm.release.labels import Cohort
from monai_salm.release.progress import track
from monai_salm.release.visibility import Gate, measure

HELD_OUT = "held out, not written"
SAMPLES = 8
"""Units of each format that are tried."""
SAMPLE_SECONDS = 20.0
"""No further unit is tried after so long."""


@dataclass
class _Rate:
    """What trying some units of one format took."""

    files: int = 0
    size: int = 0
    written: int = 0
    voxels: int = 0
    seconds: float = 0.0
    refused: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Plan:
    """What would be done.

    Args:
        files: files and bytes by format and state.
        cases: cases by format and state; none of labels and companions.
        refused: refusals by reason.
        copy_bytes: the copy's size, estimated from the samples; None where none of a format could be tried.
        bank_bytes: most that the perturbations can take, uncompressed.
        free_bytes: free on the disk of the output folder.
        seconds: to write and check the files, estimated from the samples; None as for ``copy_bytes``.
        tried: how many files and bytes the samples had.
        refused_at_writing: samples that could not be written, by reason.
    """

    files: dict[tuple[str, str], tuple[int, int]]
    cases: Mapping[tuple[str, str], int]
    refused: dict[str, int]
    copy_bytes: int | None
    bank_bytes: int
    free_bytes: int
    seconds: float | None
    tried: tuple[int, int]
    refused_at_writing: dict[str, int]

    def lines(self) -> Iterator[str]:
        """The plan for a terminal."""
        yield "plan; nothing was written"
        for (form, state), (count, size) in sorted(self.files.items()):
            cases = f"{self.cases[form, state]} cases in " if self.cases.get((form, state)) else ""
            yield f"  {form} {state}: {cases}{count} files, {_size(size)}"
        yield f"  refused: {tally(self.refused) or 'nothing'}"
        if self.refused_at_writing:
            yield f"  refused when tried: {tally(self.refused_at_writing)}; of those that were not tried more may be"
        if self.copy_bytes is None or self.seconds is None:
            yield "  disk and time: not known, no image could be tried"
            return
        need = self.copy_bytes + self.bank_bytes
        yield (
            f"  disk: about {_size(self.copy_bytes)} for the copy, at most {_size(self.bank_bytes)} for perturbations; "
            f"{_size(self.free_bytes)} are free"
            + ("" if need < self.free_bytes else ": NOT ENOUGH")
            + ". A study keeps what its networks see besides, as long as it runs"
        )
        yield (
            f"  time: about {_time(self.seconds)} to write and check the files, by what reading, changing, looking at "
            f"and encoding {self.tried[0]} of them ({_size(self.tried[1])}) just took, with reading counted twice. "
            "Fit and study are not in it; they tell their own time once they run"
        )


def make_plan(
    cohort: Cohort,
    output_dir: Path,
    *,
    spatial_dims: int,
    window: Window,
    budget: Budget | str | float,
    mask_ratio: float,
    gate: Gate | None = None,
    banks: int = 1,
) -> Plan:
    """Try some images in memory, with noise in place of perturbations, and add up.

    Args:
        cohort: labeled cases.
        output_dir: where the copy would go; need not exist.
        spatial_dims: 2 or 3.
        window: ``"auto"`` or (low, high) in physical units.
        budget: of the noise.
        mask_ratio: part of the voxels that the noise changes.
        gate: measures how visible each image would be, as the run would.
        banks: of perturbations, that of the control among them.
    """
    out, units = output_dir.absolute(), formats.units(cohort.released)
    by_format: dict[str, list[tuple[Case, ...]]] = defaultdict(list)
    for unit in units:
        by_format[unit[0].format].append(unit)
    noise = _Noise(Budget.parse(budget), mask_ratio)
    rates = {form: _try(_spread(found), noise, spatial_dims, window, gate) for form, found in by_format.items()}
    states = _states(cohort, units)
    copy_bytes: float = sum(size for (_, state), (_, size) in states.items() if state in ("label", "companion"))
    bank_bytes = seconds = 0.0
    known = all(rate.files for rate in rates.values()) and bool(rates)
    for form, rate in rates.items() if known else ():
        count, size = states[form, "protected"]
        copy_bytes += size * rate.written / rate.size
        seconds += size * rate.seconds / rate.size
        bank_bytes += banks * count * rate.voxels / rate.files
    return Plan(
        files=states,
        cases=Counter((case.format, HELD_OUT if case.split == "test" else "protected") for case in cohort.cases),
        refused=dict(Counter(refusal.reason for refusal in cohort.refusals)),
        copy_bytes=round(copy_bytes) if known else None,
        bank_bytes=round(bank_bytes),
        free_bytes=shutil.disk_usage(next(path for path in (out, *out.parents) if path.is_dir())).free,
        seconds=seconds if known else None,
        tried=(sum(rate.files for rate in rates.values()), sum(rate.size for rate in rates.values())),
        refused_at_writing=dict(sum((rate.refused for rate in rates.values()), Counter())),
    )


class _Noise:
    """Signs at the edge of the budget in a part of the voxels: as hard to compress as a perturbation can be."""

    def __init__(self, budget: Budget, mask_ratio: float) -> None:
        self._budget, self._ratio = budget, mask_ratio
        self._random = np.random.default_rng(0)

    def __call__(self, image: StoredImage) -> np.ndarray:
        bounds = image.codec.bounds(torch.from_numpy(image.stored), self._budget)
        lower, upper = (bound.numpy() for bound in bounds)
        delta = np.where(self._random.random(image.stored.shape) < 0.5, lower, upper)
        delta[self._random.random(image.stored.shape) > self._ratio] = 0
        return delta if delta.any() else upper


def _try(
    units: Sequence[tuple[Case, ...]], noise: _Noise, spatial_dims: int, window: Window, gate: Gate | None
) -> _Rate:
    """Protect units of one format in memory, and measure it; those that are refused are counted."""
    rate = _Rate()
    until = time.monotonic() + SAMPLE_SECONDS
    uids, now = UidMap(secrets.token_bytes(32)), datetime.now(timezone.utc)
    options = {"spatial_dims": spatial_dims, "window": window, "uids": uids, "when": now}
    for unit in track(units, "trying"):
        if time.monotonic() > until and rate.files:
            break
        try:
            start = time.monotonic()
            images = {case: formats.read(case, spatial_dims, window) for case in unit}
            reading = time.monotonic() - start
            deltas = {case: noise(image) for case, image in images.items()}
            for case, image in images.items() if gate else ():
                outline = Outline(image.stored.shape, image.codec, image.spacing)
                with suppress(RefusedError):  # noise shows more than a perturbation, and is no reason to refuse it
                    measure(gate, case, outline, deltas[case], image.slices)
            written = sum(len(file.content) for file in formats.protect(unit, deltas.__getitem__, **options))
        except RefusedError as error:
            rate.refused[error.reason] += 1
            continue
        except ValueError:  # the run itself reports it
            continue
        rate.seconds += time.monotonic() - start + reading
        rate.written += written
        rate.files += len(formats.files_of(unit))
        rate.size += sum(path.stat().st_size for path in formats.files_of(unit))
        rate.voxels += sum(image.stored.size * _bytes_of(deltas[case]) for case, image in images.items())
    return rate


def _bytes_of(delta: np.ndarray) -> int:
    return np.dtype(smallest_type(int(abs(delta).max()))).itemsize


def _spread(units: Sequence[tuple[Case, ...]]) -> list[tuple[Case, ...]]:
    """Some units, evenly from first to last."""
    step = max(1, math.ceil(len(units) / SAMPLES))
    return list(units[::step])


def _states(cohort: Cohort, units: Sequence[Sequence[Case]]) -> dict[tuple[str, str], tuple[int, int]]:
    """Files and bytes by format and state, each file once."""
    found: dict[tuple[str, str], set[Path]] = defaultdict(set)
    for unit in units:
        found[unit[0].format, "protected"] |= set(formats.files_of(unit))
        found[unit[0].format, "label"] |= {case.mask.file for case in unit if case.mask}
    companions = belonging(cohort.companions, {case.sample_id for unit in units for case in unit})
    found["dicom", "companion"] = {companion.file for companion in companions}
    released = {path for paths in found.values() for path in paths}
    for case in cohort.cases:
        if case.split == "test":
            found[case.format, HELD_OUT] |= set(case.files) - released
    states = {key: (len(paths), sum(path.stat().st_size for path in paths)) for key, paths in found.items() if paths}
    if units and bids.is_tree(cohort.root):
        beside = bids.derivative(cohort.root, cohort.released)
        states["bids", "companion"] = len(beside), sum(map(len, beside.values()))
    return states


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.{0 if unit == 'bytes' else 1}f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
