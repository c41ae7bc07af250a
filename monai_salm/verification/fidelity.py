# SPDX-License-Identifier: Apache-2.0
"""Fidelity: how much of an image is kept, measured on the written files at their own resolution."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from monai_salm.io.base import StoredImage
from monai_salm.release.visibility import CaseVisibility
from monai_salm.similarity import structural_similarity
from monai_salm.verification.strength import spread

__all__ = ["SSIM_CASES", "Fidelity", "ssim_sample"]

SSIM_CASES = {2: 200, 3: 40}
"""How many cases SSIM is measured on, by number of dimensions: enough for a mean, whatever the cohort's size."""


def ssim_sample(sample_ids: Iterable[str], limit: int) -> frozenset[str]:
    """At most ``limit`` cases, always the same ones of the same cases, whatever their order."""
    return frozenset(sorted(sample_ids, key=lambda name: hashlib.sha256(name.encode()).digest())[:limit])


class Fidelity:
    """Collects what changed, one case at a time.

    Args:
        device: where SSIM is computed.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._ssim: list[float] = []
        self._psnr: list[float] = []
        self._psnr_foreground: list[float] = []
        self._fraction: list[float] = []
        self._errors: list[tuple[float, float, float]] = []
        self._units: set[str] = set()

    def add(
        self,
        clean: StoredImage,
        protected: StoredImage,
        *,
        ssim: bool = True,
        foreground: np.ndarray | None = None,
    ) -> None:
        """Compare a case with its written copy.

        Args:
            clean: the original; its codec (window) is used for both.
            protected: the copy, as it was read from its file.
            ssim: measure SSIM of this case too.
            foreground: (1, *spatial) voxels to measure PSNR inside of too; None where there are no voxel labels.

        Raises:
            ValueError: When the two are not of one shape and type.
        """
        before, after, codec = clean.stored, protected.stored, clean.codec
        if before.shape != after.shape or before.dtype != after.dtype:
            raise ValueError(
                f"a protected file holds {after.dtype}{after.shape}, its source {before.dtype}{before.shape}; "
                "it was not written from it, run protect again"
            )
        moved, change = _changes(before, after, codec.step)
        largest = float(change.max()) if change.size else 0.0
        physical = largest * abs(codec.slope)
        if codec.slices:
            physical = float(np.abs(codec.slices.to_physical(after) - codec.slices.to_physical(before)).max())
        self._errors.append((largest, physical, physical / codec.width))
        self._fraction.append(float(moved.mean()))
        self._units.add(codec.unit)
        one, other = (codec.to_unit(torch.from_numpy(image)).to(self._device) for image in (before, after))
        squared = (one - other).double().square()
        self._psnr += _psnr(squared)
        if foreground is not None:
            self._psnr_foreground += _psnr(squared[torch.from_numpy(foreground).to(self._device)])
        if ssim:
            self._ssim.append(float(structural_similarity(one[None], other[None])))

    @property
    def mean_ssim(self) -> float | None:
        """Over the cases that it was measured on; None where there are none."""
        return float(np.mean(self._ssim)) if self._ssim else None

    def result(self, mask_ratio: float | None = None, visibility: Sequence[CaseVisibility] = ()) -> dict[str, Any]:
        """The ``fidelity`` part of ``docs/report.md``; errors and fractions are over all cases.

        ``n_ssim_cases`` says how many of them SSIM was measured on.

        Args:
            mask_ratio: fraction of the voxels that the configuration asked for.
            visibility: what was measured of each case before it was written.

        Raises:
            ValueError: When no case was added.
        """
        if not self._errors:
            raise ValueError("no protected case was compared with its source; run protect first")
        stored, physical, window = (max(errors) for errors in zip(*self._errors, strict=True))
        return {
            "n_cases": len(self._errors),
            "n_ssim_cases": len(self._ssim),
            "ssim": _with_least(self._ssim),
            "psnr": _with_least(self._psnr),
            **({"psnr_foreground": _with_least(self._psnr_foreground)} if self._psnr_foreground else {}),
            "max_error_stored": stored,
            "max_error_physical": physical if len(self._units) == 1 else None,
            "max_error_window": window,
            "unit": next(iter(self._units)) if len(self._units) == 1 else None,
            "mask_fraction_asked": mask_ratio,
            "mask_fraction": {
                "mean": float(np.mean(self._fraction)),
                "min": min(self._fraction),
                "max": max(self._fraction),
            },
            "n_visibility_cases": len(visibility),
            "n_more_visible": sum(not case.less_visible for case in visibility),
        }


def _changes(before: np.ndarray, after: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Where two images differ (NaN equals NaN), and by how much in stored units, for those voxels only.

    A change of a float file is a whole number of lattice steps, but for the rounding of the file's type: where that
    explains the difference, it is left out.
    """
    moved = (before != after) & ~((before != before) & (after != after))
    new = after[moved]
    change = np.abs(new.astype(np.float64) - before[moved].astype(np.float64))
    if before.dtype.kind == "f":
        steps = np.rint(change / step) * step
        change = np.where(np.abs(change - steps) <= np.abs(np.spacing(new)), steps, change)
    return moved, change


def _psnr(squared: torch.Tensor) -> list[float]:
    """dB of squared errors in unit intensity; nothing where all (or none) are 0."""
    mean = float(squared.mean()) if squared.numel() else 0.0
    return [-10 * float(np.log10(mean))] if mean > 0 else []


def _with_least(values: Sequence[float]) -> dict[str, float | None]:
    return spread(values) | {"min": min(values, default=None)}
