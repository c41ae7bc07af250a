# SPDX-License-Identifier: Apache-2.0
"""How visible each protected image is. It is kept in ``private/``, for it tells where perturbations are strong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from monai_salm.io.base import Case, Outline, StoredImage
from monai_salm.release import commit as door

VISIBILITY = f"{door.PRIVATE}/visibility.jsonl"


@dataclass(frozen=True)
class WindowVisibility:
    """A protected image in one display window, beside the image's own JPEG 2000 copy at 5:1.

    Args:
        low: lower end of the window in physical units.
        high: upper end.
        psnr: of the protected image in dB; None where nothing differs in this window.
        ssim: of the protected image.
        psnr_compressed: of the compressed image; None where nothing differs.
        ssim_compressed: of the compressed image.
    """

    low: float
    high: float
    psnr: float | None
    ssim: float
    psnr_compressed: float | None
    ssim_compressed: float

    @property
    def less_visible(self) -> bool:
        """True where the perturbation is no more visible than the compression, by both measures."""
        if self.psnr is None:
            return True
        return self.psnr_compressed is not None and (
            self.psnr >= self.psnr_compressed and self.ssim >= self.ssim_compressed
        )


@dataclass(frozen=True)
class CaseVisibility:
    """One case in each of its windows."""

    sample_id: str
    windows: tuple[WindowVisibility, ...]

    @property
    def less_visible(self) -> bool:
        """True where it is so in every window."""
        return all(window.less_visible for window in self.windows)


class Gate(Protocol):
    """Measures a case before it is written."""

    @property
    def refuses(self) -> bool:
        """Whether it may refuse a case."""

    def slices(self, outline: Outline, delta: np.ndarray) -> tuple[int, list[int]]:
        """What it wants to see of an image: a spatial axis, and the slices along it; none if nothing is measured."""

    def __call__(self, case: Case, image: StoredImage, delta: np.ndarray) -> CaseVisibility:
        """Raises RefusedError to keep the case out of the release."""


def measure(
    gate: Gate, case: Case, outline: Outline, delta: np.ndarray, read: Callable[[int, Sequence[int]], StoredImage]
) -> CaseVisibility:
    """How visible a case would be; of its image only what the gate wants to see is asked for.

    Args:
        gate: measures it.
        case: the case.
        outline: of its image.
        delta: lattice steps.
        read: gives slices of the image along an axis.

    Raises:
        RefusedError: When the gate keeps the case out, or the image cannot be read.
    """
    axis, indices = gate.slices(outline, delta)
    if not indices:
        return CaseVisibility(case.sample_id, ())
    return gate(case, read(axis, indices), delta.take(indices, axis + 1))


class VisibilityLog:
    """Keeps what was measured, a line for each case, before the case is written.

    Args:
        output_dir: folder of the release.
        name: of the file, relative to it; shards that run side by side keep one each.
    """

    def __init__(self, output_dir: Path, name: str = VISIBILITY) -> None:
        self._out, self._name = output_dir, name
        self._lines = dict.fromkeys(_whole_lines(output_dir / name))
        text = "".join(f"{line}\n" for line in self._lines)
        if (output_dir / name).is_file():
            door.write(output_dir, {name: text})  # without what a killed run wrote in part

    def keep(self, cases: Iterable[CaseVisibility]) -> None:
        """Add lines that are not there yet."""
        lines = [json.dumps(asdict(case) | {"less_visible": case.less_visible}) for case in cases if case.windows]
        new = [line for line in lines if line not in self._lines]
        if new:
            door.append_line(self._out, self._name, "".join(f"{line}\n" for line in new))
            self._lines |= dict.fromkeys(new)


def read_visibility(output_dir: Path | str) -> list[CaseVisibility]:
    """What was measured of each case of a release; nothing where it was not asked for."""
    files = sorted((Path(output_dir) / door.PRIVATE).glob("visibility*.jsonl"))
    rows = {row["sample_id"]: row for file in files for row in map(json.loads, _whole_lines(file))}
    return [
        CaseVisibility(name, tuple(WindowVisibility(**window) for window in row["windows"]))
        for name, row in rows.items()
    ]


def summary(output_dir: Path | str) -> str:
    """A line for the user on all cases; empty where nothing was measured."""
    cases = read_visibility(output_dir)
    seen = sum(not case.less_visible for case in cases)
    return f"visibility: {seen} of {len(cases)} cases change more visibly than by JPEG 2000 at 5:1" if cases else ""


def _whole_lines(path: Path) -> list[str]:
    text = path.read_text() if path.is_file() else ""
    return text[: text.rfind("\n") + 1].splitlines()
