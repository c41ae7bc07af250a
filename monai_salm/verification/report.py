# SPDX-License-Identifier: Apache-2.0
"""The report: one HTML file that needs nothing else, and a table for the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import ChainableUndefined, Environment, PackageLoader
from rich.table import Table
from rich.text import Text

from monai_salm.release.commit import write_atomically
from monai_salm.verification import figures
from monai_salm.verification.strength import arms_of, victims_of

__all__ = ["Example", "verdict_table", "write_report"]

MISSING = "n/a"
_IMAGE_BYTES = 2_200_000  # of all image panels; keeps the file below 3 MB
_SIDES = (512, 384, 256, 192, 128, 64)
_PIXELATED_BELOW = 200  # pixels; smaller images are shown with sharp pixels
_COLUMNS = {"dice": ("dice", "hd95")}
_PER_CLASS = {"recall": "Recall", "dice_per_class": "Dice", "hd95_per_class": "HD95"}
_CLASS_COLUMNS = 6  # of the terminal's table; more classes do not fit on a screen


@dataclass(frozen=True)
class Example:
    """One image for the report, before and after.

    Args:
        title: Caption, without personal data.
        clean: Shape (H, W), or (H, W, 3) of RGB, unit intensity [0, 1].
        protected: Of the same shape, unit intensity [0, 1].
        delta: Shape (H, W), protected minus clean in stored units; of RGB, in the color that changed most.
        mask: Shape (H, W), true where a voxel was changed.
        max_delta: End of the color bar, in stored units; usually the budget.
        label: Shape (H, W), class indices, to draw their borders; None without voxel labels.

    Raises:
        ValueError: When the arrays are not images, or not of one shape.
    """

    title: str
    clean: np.ndarray
    protected: np.ndarray
    delta: np.ndarray
    mask: np.ndarray
    max_delta: float
    label: np.ndarray | None = None

    def __post_init__(self) -> None:
        names = ("clean", "protected", "delta", "mask", *(() if self.label is None else ("label",)))
        shapes = {name: np.shape(getattr(self, name)) for name in names}
        flat = {shapes[name][:2] for name in names} | {shapes[name] for name in names[2:]}
        if len(flat) > 1 or shapes["clean"] != shapes["protected"] or shapes["clean"][2:] not in ((), (3,)):
            raise ValueError(f"Example {self.title!r} needs arrays of one shape (H, W), got {shapes}.")


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any, digits: int = 3, sign: bool = False) -> str:
    """A number with fixed digits, or ``n/a``; a typographic minus."""
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "\u2212") if _known(value) else MISSING


def _general(value: Any, digits: int = 4) -> str:
    """A number with significant digits, or ``n/a``."""
    return f"{value:.{digits}g}".replace("-", "\u2212") if _known(value) else MISSING


def _percent(value: Any, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %" if _known(value) else MISSING


def _spread(part: Any, digits: int = 3) -> str:
    """``mean ± std`` of a mapping with these keys; the mean alone where there is no spread."""
    part = part if isinstance(part, Mapping) else {}
    std = f" \u00b1 {_number(part.get('std'), digits)}" if _known(part.get("std")) else ""
    return _number(part.get("mean"), digits) + std


def _range(part: Any, low: str = "low", high: str = "high", digits: int = 3, as_percent: bool = False) -> str:
    """``low to high`` of a mapping, or the one value where both show the same."""
    part = part if isinstance(part, Mapping) else {}
    show = _percent if as_percent else _general if low == "min" else _number
    ends = [show(part.get(key), digits) for key in (low, high)]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _duration(seconds: Any) -> str:
    if not _known(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _text(value: Any) -> str:
    """Any value of a key-value table."""
    if value is None or value == "":
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    return _general(value, 6) if isinstance(value, float) else str(value)


def _moment(value: Any) -> str:
    """An ISO 8601 time in UTC, to the minute; other text as it is."""
    try:
        return datetime.fromisoformat(str(value)).astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return _text(value)


def _words(name: Any) -> str:
    return str(name).replace("_", " ")


def _name(metric: Any) -> str:
    """Name of a metric in the head of a column."""
    return {"auc": "AUC", "hd95": "HD95"}.get(str(metric), _words(metric).capitalize())


def _columns(metric: str) -> tuple[str, ...]:
    """Metrics of the table of all arms, the headline metric first."""
    return _COLUMNS.get(metric, tuple(dict.fromkeys((metric, "accuracy", "balanced_accuracy", "auc"))))


def _class_tables(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What exists per class: key, title and classes; segmentation is shown victim by victim."""
    tables = []
    for key, title in _PER_CLASS.items():
        parts = [(part.get("all") or {}).get(key) or {} for part in summary.values()]
        names = list(dict.fromkeys(name for part in parts for name in part))
        if names:
            tables.append({"key": key, "title": title, "classes": names, "by_victim": key != "recall"})
    return tables


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("monai_salm.verification", ""),
        autoescape=True,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {
        "number": _number,
        "general": _general,
        "percent": _percent,
        "spread": _spread,
        "range": _range,
        "duration": _duration,
        "text": _text,
        "moment": _moment,
        "words": _words,
        "name": _name,
        "arm": lambda arm: figures.arm_style(arm)[0],
        "color": lambda arm: figures.arm_style(arm)[1],
    }
    environment.filters.update(filters)
    return environment


def _panels(example: Example, side: int) -> dict[str, Any]:
    """What the template shows of an example, its images at most ``side`` pixels long."""
    height, width = np.shape(example.delta)
    change = f"changed voxels of {example.title}"
    outlined = "" if example.label is None else ", borders of the labels in color"
    images = [
        (
            f"Clean{outlined}",
            figures.image_panel(example.clean, side, example.label),
            f"Clean image of {example.title}{outlined}",
        ),
        ("Protected", figures.image_panel(example.protected, side), f"Protected image of {example.title}"),
        (
            "Difference",
            figures.delta_panel(example.delta, example.max_delta, side),
            f"Signed difference of {example.title}",
        ),
        ("Changed voxels", figures.mask_panel(example.mask, side), f"Mask of {change}"),
    ]
    return {
        "title": example.title,
        "images": images,
        "pixelated": max(height, width) < _PIXELATED_BELOW,
        "reduced": max(height, width) > side,
        "size": f"{width} \u00d7 {height}",
        "side": side,
        "fraction": float(np.mean(np.asarray(example.mask, dtype=bool))),
        "largest": float(np.max(np.abs(np.nan_to_num(example.delta)))) if np.size(example.delta) else None,
        "max_delta": float(example.max_delta),
    }


def _all_panels(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Panels of all examples at the largest size that keeps the file small."""

    def small(panels: list[dict[str, Any]]) -> bool:
        return sum(len(uri) for panel in panels for _, uri, _ in panel["images"]) <= _IMAGE_BYTES

    for side in _SIDES:
        panels = [_panels(example, side) for example in examples]
        if small(panels):
            break
    while not small(panels):
        panels.pop()
    return panels


def write_report(results: Mapping[str, Any], examples: Sequence[Example], path: str | Path) -> None:
    """Write one self-contained HTML file: no script, no request to anywhere, at most about 3 MB.

    Args:
        results: Contents of ``report.json``. Parts that are missing or ``None`` are shown as "n/a" or left out.
        examples: Images to show, in order.
        path: File to write, replaced atomically.

    Raises:
        ValueError: When ``results`` has no verdict.
    """
    if not results.get("verdict"):
        raise ValueError("results have no 'verdict'; pass what build_results returned or report.json holds.")
    rows, metric = results.get("arms") or [], str(results.get("metric") or "metric")
    per_class = {
        "protected": results.get("closed_gap_per_class"),
        **(results.get("closed_gap_controls_per_class") or {}),
    }
    html = (
        _environment()
        .get_template("report.html.j2")
        .render(
            {key: value for key, value in results.items() if value is not None},
            metric=metric,
            arm_names=arms_of(rows),
            victim_names=victims_of(rows),
            n_seeds=len({row["seed"] for row in rows}),
            columns=_columns(metric),
            class_tables=_class_tables(results.get("summary") or {}),
            gaps_per_class={arm: gaps for arm, gaps in per_class.items() if gaps},
            hd95_unit=next((row["hd95_unit"] for row in rows if row.get("hd95_unit")), None),
            trained=figures.training_quantity([row for row in rows if row.get("curve")]),
            arms_plot=figures.arms_plot(rows, metric, results.get("chance")),
            curve_plots=figures.curve_plots(rows, metric),
            gradient=figures.delta_gradient(),
            examples=_all_panels(examples),
            config_text=json.dumps(results.get("config") or {}, indent=2, default=str, ensure_ascii=False),
        )
    )
    write_atomically(html, path)


def verdict_table(results: Mapping[str, Any]) -> Table:
    """The result as a table for the terminal: one line per arm, the verdict below.

    Args:
        results: Contents of ``report.json``.

    Returns:
        A table with the mean and standard deviation of the headline metric over all victims and seeds, its means per
        class in segmentation, the closed gap with its interval, and SSIM.
    """
    metric = str(results.get("metric") or "metric")
    verdict = str(results.get("verdict") or MISSING)
    style = {"protected": "bold green", "not protected": "bold red"}.get(verdict, "bold yellow")
    title = Text.assemble("Verdict: ", (verdict, style))
    table = Table(title=title, caption=Text((results.get("verdict_reasons") or [""])[0]))
    summary = results.get("summary") or {}
    per_class = {each["key"]: each["classes"] for each in _class_tables(summary)}
    classes = per_class.get(f"{metric}_per_class", [])
    classes = classes if len(classes) <= _CLASS_COLUMNS else []
    table.add_column("arm")
    for name in ("n", _words(metric), *classes, "closed gap", "SSIM"):
        table.add_column(Text(name), justify="right")
    gaps = {"protected": results.get("closed_gap"), **(results.get("closed_gap_controls") or {})}
    ssim = ((results.get("fidelity") or {}).get("ssim") or {}).get("mean")
    for arm, part in summary.items():
        cell, gap = part.get("all") or {}, gaps.get(arm) or {}
        interval = f" [{_range(gap)}]" if _known(gap.get("low")) else ""
        each = cell.get(f"{metric}_per_class") or {}
        texts = [figures.arm_style(arm)[0], str(cell.get("n", "")), _spread(cell.get(metric))]
        texts += [_number((each.get(name) or {}).get("mean")) for name in classes]
        texts += [_number(gap.get("mean")) + interval if gap else "", _number(ssim, 4) if arm == "protected" else ""]
        table.add_row(*map(Text, texts))
    return table
