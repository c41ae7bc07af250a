# SPDX-License-Identifier: Apache-2.0
"""Label leakage: how well someone who sees the perturbation alone can guess where the labels lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_salm.verification.strength import spread

__all__ = ["LEAKAGE_CASES", "Leakage", "label_leakage", "leakage_warnings"]

LEAKAGE_CASES = 40
"""Most cases that leakage is measured on."""
SIGMAS = (1.0, 2.0, 4.0)
"""Standard deviations in voxels of the Gaussians that an observer may blur with."""
TOLERATED = 0.1
"""Dice above that of random noise that goes without a warning."""
_BINS = 4096


def label_leakage(delta: Tensor, foreground: Tensor, device: torch.device | str = "cpu") -> dict[str, float]:
    """Dice between the foreground and the best simple guesses of it from a perturbation.

    A guess is a threshold of the absolute perturbation, or of what a Gaussian blur makes of it, and one side of it. The
    threshold is the best one for this very case (of 4096 equal steps from 0), which nobody knows without its label: an
    upper bound on what such a guess is worth.

    Args:
        delta: (1, *spatial) perturbation in any unit.
        foreground: (1, *spatial) true in any class but background, somewhere true.
        device: where to compute.

    Returns:
        ``threshold``, ``blur_1``, ``blur_2``, ``blur_4``: one estimator each, named by the Gaussian's standard
        deviation in voxels; ``support``: every changed voxel; ``everything``: every voxel.

    Example:
        >>> foreground = torch.zeros(1, 8, 8, dtype=torch.bool)
        >>> foreground[0, 2:4, 2:6] = True
        >>> found = label_leakage(3 * foreground.int(), foreground)
        >>> found["threshold"], found["support"], round(found["everything"], 3)
        (1.0, 1.0, 0.222)
    """
    size, truth = delta.to(device).abs().float()[0], foreground.to(device).bool()[0]
    found = {"threshold": _best_dice(size, truth)}
    for sigma in SIGMAS:
        found[f"blur_{sigma:g}"] = _best_dice(_blurred(size, sigma), truth)
    return found | {"support": _dice(size > 0, truth), "everything": _dice(torch.ones_like(truth), truth)}


class Leakage:
    """Collects leakage, one case and arm at a time.

    Args:
        device: where to compute.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._found: dict[str, list[dict[str, float]]] = {}

    def add(self, arm: str, delta: np.ndarray | Tensor, foreground: np.ndarray) -> None:
        """Add the perturbation of a case (1, *spatial); a case without foreground says nothing and is left out."""
        if foreground.any():
            steps = torch.as_tensor(delta)
            self._found.setdefault(arm, []).append(label_leakage(steps, torch.from_numpy(foreground), self._device))

    def result(self) -> dict[str, Any] | None:
        """The ``leakage`` part of ``docs/report.md``; None if there was no case."""
        return {arm: _summary(cases) for arm, cases in self._found.items()} or None


def leakage_warnings(leakage: Mapping[str, Any] | None) -> list[str]:
    """What a report must say about the leakage of the protected copy: nothing, or one sentence."""
    best = {arm: (part.get("best") or {}).get("mean") for arm, part in (leakage or {}).items()}
    mine, noise = best.get("protected"), best.get("random_noise")
    if mine is None or noise is None or mine - noise <= TOLERATED:
        return []
    return [
        "Where this copy is meant to be released without its labels, the perturbation gives away where they lie: from "
        f"it alone the foreground can be guessed with a Dice of {mine:.2f} (from random noise of the same budget "
        f"{noise:.2f})."
    ]


def _summary(cases: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    references = ("support", "everything")
    estimators = [name for name in cases[0] if name not in references]
    return {
        "n_cases": len(cases),
        "best": spread([max(case[name] for name in estimators) for case in cases]),
        **{name: spread([case[name] for case in cases]) for name in references},
        "by_estimator": {name: spread([case[name] for case in cases]) for name in estimators},
    }


def _best_dice(score: Tensor, truth: Tensor) -> float:
    """Largest Dice of ``score >= t`` or ``score <= t`` with the truth, over t."""
    # Steps begin at 0: between least and largest value they would tell apart the rounding errors of a constant.
    steps = score * ((_BINS - 1) / max(float(score.max()), torch.finfo(score.dtype).tiny))
    index = steps.round().long().clamp_(0, _BINS - 1).reshape(-1)
    voxels = torch.bincount(index, minlength=_BINS).double()
    hits = torch.bincount(index[truth.reshape(-1)], minlength=_BINS).double()
    total = hits.sum()
    sides = [(voxels.cumsum(0), hits.cumsum(0)), (voxels.flip(0).cumsum(0), hits.flip(0).cumsum(0))]
    return max(float((2 * right / (guessed + total)).max()) for guessed, right in sides)


def _blurred(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (*spatial); at the border the weights of what is inside sum to 1."""
    for axis, length in enumerate(image.shape):
        at = torch.arange(length, dtype=image.dtype, device=image.device)
        weight = torch.exp(-0.5 * ((at[:, None] - at[None]) / sigma) ** 2)
        weight[weight < 1e-7] = 0  # products with numbers that small are slow and add nothing
        weight = weight / weight.sum(1, keepdim=True)
        image = (image.transpose(axis, -1) @ weight.t()).transpose(axis, -1)
    return image


def _dice(guess: Tensor, truth: Tensor) -> float:
    return 2 * float((guess & truth).sum()) / (float(guess.sum()) + float(truth.sum()))
