# SPDX-License-Identifier: Apache-2.0
"""How strong a protection is: the closed gap with its interval, and the summary of all arms.

A *row* is one victim training, a mapping ``{"arm", "victim", "seed", <metric>, ...}``. Every function takes the name of
the headline metric, so that classification (``balanced_accuracy``) and segmentation (``dice``) share this code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = [
    "ARMS",
    "Row",
    "arms_of",
    "closed_gap",
    "closed_gap_auc",
    "closed_gap_per_class",
    "floor_of",
    "mean_of",
    "pairs_of",
    "spread",
    "summarize",
    "value_of",
    "values_of",
    "victims_of",
]

ARMS = ("clean", "protected", "random_noise", "label_marker", "random_mask", "blind")
MIN_SPAN = 0.1
"""Least ``clean - blind`` of a victim that has learned something which could be taken away."""
CONFIDENCE = 0.95
"""Coverage of intervals."""
_DRAWS = 4000
_METRICS = ("accuracy", "balanced_accuracy", "auc", "hd95")
_PER_CLASS = ("recall", "dice_per_class", "hd95_per_class")

Row = Mapping[str, Any]


def value_of(row: Row, metric: str) -> float:
    """A row's metric; NaN if it is missing."""
    value = row.get(metric)
    return float("nan") if value is None else float(value)


def values_of(rows: Sequence[Row], metric: str, arm: str, victim: str | None = None) -> np.ndarray:
    """Finite values of an arm (all victims, or one), shape (n,)."""
    return _finite([row for row in rows if row["arm"] == arm and victim in (None, row["victim"])], metric)


def _finite(rows: Sequence[Row], metric: str) -> np.ndarray:
    values = np.asarray([value_of(row, metric) for row in rows], dtype=float)
    return values[np.isfinite(values)]


def mean_of(values: np.ndarray) -> float | None:
    """Mean, or ``None`` of nothing."""
    return float(values.mean()) if values.size else None


def spread(values: np.ndarray | Sequence[float]) -> dict[str, float | None]:
    """``mean`` and sample standard deviation ``std``; ``None`` of nothing, the latter also of one value."""
    values = np.asarray(values, dtype=float)
    return {"mean": mean_of(values), "std": float(values.std(ddof=1)) if values.size > 1 else None}


def arms_of(rows: Sequence[Row]) -> list[str]:
    """Arms that occur, in the canonical order, unknown ones last in order of appearance."""
    present = dict.fromkeys(str(row["arm"]) for row in rows)
    return [arm for arm in ARMS if arm in present] + [arm for arm in present if arm not in ARMS]


def victims_of(rows: Sequence[Row]) -> list[str]:
    """Victims that occur, in order of appearance."""
    return list(dict.fromkeys(str(row["victim"]) for row in rows))


def floor_of(rows: Sequence[Row], metric: str, victim: str, chance: float | None) -> float | None:
    """Blind floor of a victim: its own blind mean, else the blind mean of all victims, else chance."""
    for blind in (values_of(rows, metric, "blind", victim), values_of(rows, metric, "blind")):
        if blind.size:
            return float(blind.mean())
    return chance


def pairs_of(rows: Sequence[Row], metric: str, arm: str, victim: str) -> np.ndarray:
    """(clean, arm) metrics of the seeds that both arms have, shape (n, 2), finite."""

    def by_seed(name: str) -> dict[Any, float]:
        return {r["seed"]: value_of(r, metric) for r in rows if r["arm"] == name and r["victim"] == victim}

    clean, other = by_seed("clean"), by_seed(arm)
    pairs = np.asarray([(clean[seed], other[seed]) for seed in clean if seed in other], dtype=float).reshape(-1, 2)
    return pairs[np.isfinite(pairs).all(axis=1)]


def _interval(groups: Sequence[np.ndarray]) -> dict[str, float | None]:
    """Mean of what groups of pairs (lost, span) lost by their spans, and its two-level percentile bootstrap: groups are
    redrawn, then pairs inside them; the same pairs always give the same interval.

    See Davison and Hinkley, Bootstrap Methods and their Application (1997), section 3.8. One pair has no interval.
    """
    if not groups or any(group.size == 0 for group in groups):
        return {"mean": None, "low": None, "high": None}
    mean = float(np.mean([_ratio(group) for group in groups]))
    if sum(map(len, groups)) < 2:
        return {"mean": mean, "low": None, "high": None}
    rng = np.random.default_rng(0)
    draws = [group[rng.integers(len(group), size=(_DRAWS, len(groups), len(group)))] for group in groups]
    ratios = np.stack([_ratio(draw) for draw in draws])
    picked = rng.integers(len(groups), size=(_DRAWS, len(groups)))
    means = ratios[picked, np.arange(_DRAWS)[:, None], np.arange(len(groups))].mean(axis=1)
    tail = 100.0 * (1.0 - CONFIDENCE) / 2.0
    low, high = np.percentile(means, [tail, 100.0 - tail])
    return {"mean": mean, "low": min(float(low), mean), "high": max(float(high), mean)}


def _ratio(pairs: np.ndarray) -> np.ndarray:
    """(..., n, 2) pairs (lost, span) -> (...); redrawn trainings that learned next to nothing count as ``MIN_SPAN``."""
    lost, span = np.moveaxis(pairs.mean(axis=-2), -1, 0)
    return lost / np.maximum(span, MIN_SPAN)


def closed_gap(
    rows: Sequence[Row],
    metric: str,
    arm: str = "protected",
    *,
    chance: float | None = None,
) -> dict[str, Any]:
    """Share of what the anatomy teaches a victim that training on ``arm`` takes away.

    Per victim ``(clean - arm) / (clean - blind)`` of the means over seeds: 0 is no protection, 1 is a victim that was
    no better than one that never saw the anatomy. A training below its blind floor counts as on it: it is as useless,
    and must not make up for another that learned. The mean weighs victims equally. Where the mean ``clean - blind`` of
    a victim is below ``MIN_SPAN`` its trainings say nothing; they are counted, not divided.

    Args:
        rows: Victim trainings.
        metric: Name of the headline metric, higher is better, in [0, 1].
        arm: The arm to compare with clean.
        chance: Floor to use if there is no blind arm.

    Returns:
        ``mean``, ``low``, ``high`` (``None`` if undefined: some victim has no usable pairs; a single pair has no
        interval), ``confidence``, ``n`` and ``n_unusable`` pairs, and ``by_victim`` with the same keys and the means of
        ``clean``, ``arm`` and ``blind``.

    Example:
        >>> values = [("clean", 0.9), ("protected", 0.6), ("blind", 0.5)]
        >>> rows = [{"arm": a, "victim": "cnn", "seed": 0, "dice": v} for a, v in values]
        >>> round(closed_gap(rows, "dice")["mean"], 2)
        0.75
    """
    groups: list[np.ndarray] = []
    by_victim: dict[str, Any] = {}
    for victim in victims_of([row for row in rows if row["arm"] == arm]):
        pairs, floor = pairs_of(rows, metric, arm, victim), floor_of(rows, metric, victim, chance)
        span = pairs[:, 0] - (np.nan if floor is None else floor)
        lost_of_span = np.stack([np.minimum(pairs[:, 0] - pairs[:, 1], span), span], axis=1)
        usable = len(pairs) > 0 and span.mean() >= MIN_SPAN - 1e-9  # NaN compares false
        groups.append(lost_of_span if usable else lost_of_span[:0])
        by_victim[victim] = {
            **_interval(groups[-1:]),
            "n": len(groups[-1]),
            "n_unusable": len(pairs) - len(groups[-1]),
            "clean": mean_of(pairs[:, 0]),
            "arm": mean_of(pairs[:, 1]),
            "blind": floor,
        }
    return {
        **_interval(groups),
        "confidence": CONFIDENCE,
        "n": sum(v["n"] for v in by_victim.values()),
        "n_unusable": sum(v["n_unusable"] for v in by_victim.values()),
        "by_victim": by_victim,
    }


def closed_gap_auc(rows: Sequence[Row], arm: str = "protected") -> dict[str, Any]:
    """The closed gap of the AUC, with 0.5 as floor: a victim that ranks cases rightly has learned, wherever it draws
    the line, and a third party can move that.

    Args:
        rows: Victim trainings.
        arm: The arm to compare with clean.

    Returns:
        As :func:`closed_gap`; empty where the arm's victims have no AUC.
    """
    mine = [row for row in rows if row["arm"] in ("clean", arm) and row.get("auc") is not None]
    return closed_gap(mine, "auc", arm, chance=0.5) if any(row["arm"] == arm for row in mine) else {}


def closed_gap_per_class(rows: Sequence[Row], metric: str, arm: str = "protected") -> dict[str, Any]:
    """The closed gap of each class, from rows that hold ``f"{metric}_per_class"``: a mean over classes hides the weak.

    Args:
        rows: Victim trainings.
        metric: Name of the headline metric.
        arm: The arm to compare with clean.

    Returns:
        ``{class: closed gap}``; empty where rows have no values per class.
    """
    names = dict.fromkeys(name for row in rows for name in row.get(f"{metric}_per_class") or {})
    found = {}
    for name in names:
        mine = [{**row, metric: (row.get(f"{metric}_per_class") or {}).get(name)} for row in rows]
        found[str(name)] = closed_gap(mine, metric, arm)
    return found


def summarize(rows: Sequence[Row], metric: str) -> dict[str, Any]:
    """Count, mean and standard deviation (ddof=1) per arm, over all victims and per victim.

    Args:
        rows: Victim trainings.
        metric: Name of the headline metric; ``accuracy``, ``balanced_accuracy``, ``auc`` and ``hd95`` join it where
            present.

    Returns:
        ``{arm: {"all": cell, "by_victim": {victim: cell}}}``, a cell being ``{"n", <metric>: {"mean", "std"}, "recall":
        {class: {"mean", "std"}}}``, with ``dice_per_class`` and ``hd95_per_class`` beside ``recall`` where present.
    """
    wanted = dict.fromkeys((metric, *_METRICS))
    names = [name for name in wanted if name == metric or any(name in row for row in rows)]
    parts = [name for name in _PER_CLASS if name == "recall" or any(name in row for row in rows)]

    def described(chosen: Sequence[Row]) -> dict[str, Any]:
        return {
            "n": len(chosen),
            **{name: spread(_finite(chosen, name)) for name in names},
            **{part: _by_class(chosen, part) for part in parts},
        }

    summary: dict[str, Any] = {}
    for arm in arms_of(rows):
        mine = [row for row in rows if row["arm"] == arm]
        per_victim = {v: described([row for row in mine if row["victim"] == v]) for v in victims_of(mine)}
        summary[arm] = {"all": described(mine), "by_victim": per_victim}
    return summary


def _by_class(rows: Sequence[Row], part: str) -> dict[str, Any]:
    cells = [row.get(part) or {} for row in rows]
    return {str(name): spread(_finite(cells, name)) for name in dict.fromkeys(name for cell in cells for name in cell)}
