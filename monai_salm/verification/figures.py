# SPDX-License-Identifier: Apache-2.0
"""Plots and image panels of the report, each a ``data:`` URI: nothing in the report is loaded from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from monai_salm.verification.strength import arms_of, values_of, victims_of

__all__ = [
    "ARM_STYLES",
    "OUTLINES",
    "arms_plot",
    "curve_plots",
    "delta_gradient",
    "delta_panel",
    "image_panel",
    "mask_panel",
    "training_quantity",
]

# Label, color (Okabe and Ito, safe for color-blind readers) and marker of every arm.
ARM_STYLES = {
    "clean": ("Clean", "#0072B2", "o"),
    "protected": ("Protected", "#D55E00", "s"),
    "random_mask": ("Random mask", "#CC79A7", "^"),
    "random_noise": ("Random noise", "#009E73", "D"),
    "label_marker": ("Label marker", "#E69F00", "P"),
    "blind": ("Blind", "#6B7280", "X"),
}
_OTHER = ("#56B4E9", "v")
OUTLINES = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00")
"""Colors of class borders, for classes 1, 2, ..., from the start again where there are more."""
_VICTIMS_PER_FIGURE = 3
_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 10,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9AA3AF",
    "axes.labelcolor": "#374151",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E7EB",
    "grid.linewidth": 0.7,
    "xtick.color": "#4B5563",
    "ytick.color": "#4B5563",
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "monai_salm",
}


def arm_style(arm: str) -> tuple[str, str, str]:
    """Label, color and marker of an arm; arms of later schema versions get a neutral style."""
    return ARM_STYLES.get(arm, (arm.replace("_", " ").capitalize(), *_OTHER))


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _svg(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return _uri(stream.getvalue(), "svg+xml")


def arms_plot(rows: Sequence[Mapping[str, Any]], metric: str, chance: float | None) -> str | None:
    """One column per victim and arm: a point per seed, a bar at the mean, a line at chance and one per blind floor.

    Args:
        rows: Victim trainings.
        metric: Name of the headline metric, in [0, 1].
        chance: Chance level, or ``None``.

    Returns:
        A ``data:`` URI of an SVG, or ``None`` if there is nothing to draw.
    """
    arms, victims = arms_of(rows), victims_of(rows)
    if not any(values_of(rows, metric, arm).size for arm in arms):
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.4, 4.1), layout="constrained")
        axes = figure.add_subplot()
        width = len(arms) + 1.0
        for v, victim in enumerate(victims):
            blind = values_of(rows, metric, "blind", victim)
            if blind.size:
                ends = (v * width - 0.6, v * width + len(arms) - 0.4)
                axes.plot(ends, [blind.mean()] * 2, color="#9CA3AF", lw=1.2, zorder=1)
            for a, arm in enumerate(arms):
                _draw_column(axes, v * width + a, values_of(rows, metric, arm, victim), arm, labeled=v == 0)
        if chance is not None:
            axes.axhline(chance, color="#111827", lw=1.0, ls=(0, (4, 3)), zorder=1, label=f"Chance ({chance:.2g})")
        axes.set_xticks([v * width + (len(arms) - 1) / 2 for v in range(len(victims))], victims)
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="x", visible=False)
        axes.set_xlim(-1.0, len(victims) * width - 1.0)
        axes.set_ylim(min(0.0, axes.get_ylim()[0]) if metric == "dice" else None, 1.02)
        axes.set_ylabel(f"{metric.replace('_', ' ')} on clean held-out cases")
        figure.legend(loc="outside upper center", ncols=len(arms) + 1, handletextpad=0.4, columnspacing=1.6)
        return _svg(figure)


def _draw_column(axes: Any, x: float, values: np.ndarray, arm: str, *, labeled: bool) -> None:
    label, color, marker = arm_style(arm)
    spread = np.linspace(-0.18, 0.18, values.size) if values.size > 1 else np.zeros(values.size)
    axes.plot(x + spread, values, marker, color=color, ms=5, alpha=0.65, mec="white", mew=0.5, zorder=3)
    axes.plot([], [], marker, color=color, ms=6, label=label if labeled else None)
    if values.size:
        axes.plot([x - 0.32, x + 0.32], [values.mean()] * 2, color=color, lw=2.4, zorder=4, solid_capstyle="round")


def curve_plots(rows: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    """Learning curves, one column per victim: training accuracy (or loss) above, metric on clean cases below.

    Args:
        rows: Victim trainings with a ``curve``; rows without one are left out.
        metric: Name of the headline metric.

    Returns:
        ``data:`` URIs of SVGs, up to three victims in each.
    """
    rows = [row for row in rows if row.get("curve")]
    victims = victims_of(rows)
    chunks = [victims[i : i + _VICTIMS_PER_FIGURE] for i in range(0, len(victims), _VICTIMS_PER_FIGURE)]
    return [_curve_plot(rows, metric, chunk) for chunk in chunks]


def training_quantity(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the upper curves show: the key ``train_accuracy`` where the task has it, else ``train_loss``."""
    known = any("train_accuracy" in point for row in rows for point in row.get("curve") or ())
    return "train_accuracy" if known or not rows else "train_loss"


def _curve_plot(rows: Sequence[Mapping[str, Any]], metric: str, victims: Sequence[str]) -> str:
    trained = training_quantity(rows)
    quantities = {trained: trained.replace("train_", "training "), metric: f"{metric.replace('_', ' ')}, clean cases"}
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.4, 5.6), layout="constrained")
        grid = figure.subplots(2, max(2, len(victims)), sharex=True, sharey="row", squeeze=False)
        for line, (key, title) in enumerate(quantities.items()):
            grid[line, 0].set_ylabel(title)
            for axes, victim in zip(grid[line], victims, strict=False):
                for arm in arms_of(rows):
                    _draw_curve(axes, [r for r in rows if (r["arm"], r["victim"]) == (arm, victim)], key, arm)
                if line == 0:
                    axes.set_title(victim, fontsize=10.5, fontweight="bold", color="#1F2937")
                else:
                    axes.set_xlabel("epoch")
        for axes in grid[:, len(victims) :].flat:
            axes.set_visible(False)
        handles = {text: h for axes in grid.flat for h, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        if handles:
            figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles))
        return _svg(figure)


def _draw_curve(axes: Any, rows: Sequence[Mapping[str, Any]], key: str, arm: str) -> None:
    """Mean over seeds with a band of one standard deviation."""
    by_epoch: dict[int, list[float]] = {}
    for row in rows:
        for point in row["curve"]:
            if point.get(key) is not None and point.get("epoch") is not None:
                by_epoch.setdefault(int(point["epoch"]), []).append(float(point[key]))
    if not by_epoch:
        return
    label, color, marker = arm_style(arm)
    epochs = sorted(by_epoch)
    mean = np.asarray([np.mean(by_epoch[e]) for e in epochs])
    std = np.asarray([np.std(by_epoch[e], ddof=1) if len(by_epoch[e]) > 1 else 0.0 for e in epochs])
    axes.plot(epochs, mean, color=color, lw=1.7, marker=marker, ms=3.5, markevery=max(1, len(epochs) // 8), label=label)
    axes.fill_between(epochs, mean - std, mean + std, color=color, alpha=0.14, lw=0)


def _png(image: Image.Image, side: int, resample: Image.Resampling) -> str:
    """PNG of an image whose longer side is at most ``side`` pixels."""
    if max(image.size) > side:
        scale = side / max(image.size)
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), resample)
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return _uri(stream.getvalue(), "png")


def image_panel(image: np.ndarray, side: int, label: np.ndarray | None = None) -> str:
    """PNG of an (H, W) or (H, W, 3) image in unit intensity [0, 1]; what lies outside is clipped.

    Args:
        image: The image.
        side: Most pixels of its longer side.
        label: (H, W) class indices of a grayscale image; the inner border of every class but 0 is drawn in color.
    """
    levels = np.round(255 * np.clip(np.nan_to_num(np.asarray(image, dtype=float)), 0, 1)).astype(np.uint8)
    if label is None:
        return _png(Image.fromarray(levels), side, Image.Resampling.BOX)
    # The outline is drawn at the size that is shown: a line of one voxel would vanish when a large image is reduced.
    scale = max(1.0, max(levels.shape) / side)
    size = [max(1, round(length / scale)) for length in levels.shape]
    shown = np.asarray(Image.fromarray(levels).resize(size[::-1], Image.Resampling.BOX))
    classes = np.asarray(Image.fromarray(np.asarray(label, np.uint8)).resize(size[::-1], Image.Resampling.NEAREST))
    colors = np.repeat(shown[..., None], 3, axis=2)
    edges = _outline(classes)
    palette = np.array([_rgb(color) for color in OUTLINES], np.uint8)
    colors[edges] = palette[(classes[edges].astype(int) - 1) % len(palette)]
    return _png(Image.fromarray(colors), side, Image.Resampling.BOX)


def _outline(classes: np.ndarray) -> np.ndarray:
    """True in labeled pixels that have a neighbor of another class, or none."""
    padded = np.pad(classes, 1, constant_values=0)
    height, width = classes.shape
    around = [padded[1 + y : 1 + y + height, 1 + x : 1 + x + width] for y, x in ((0, 1), (0, -1), (1, 0), (-1, 0))]
    return (classes > 0) & np.any([each != classes for each in around], axis=0)


def _rgb(color: str) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in matplotlib.colors.to_rgb(color))


def mask_panel(mask: np.ndarray, side: int) -> str:
    """PNG of an (H, W) boolean mask, changed voxels dark."""
    levels = np.where(np.asarray(mask, dtype=bool), 40, 255).astype(np.uint8)
    return _png(Image.fromarray(levels), side, Image.Resampling.NEAREST)


def delta_panel(delta: np.ndarray, max_delta: float, side: int) -> str:
    """PNG of an (H, W) perturbation in stored units: blue is darker, white is unchanged, red is brighter."""
    scale = max(float(max_delta), np.finfo(float).tiny)
    levels = np.round(127 + 127 * np.clip(np.nan_to_num(np.asarray(delta, dtype=float)) / scale, -1, 1))
    image = Image.fromarray(levels.astype(np.uint8), mode="P")
    image.putpalette((255 * _palette(255)).round().astype(np.uint8).tobytes())
    return _png(image, side, Image.Resampling.NEAREST)


def delta_gradient() -> str:
    """The colors of :func:`delta_panel` from minus to plus, as CSS color stops."""
    return ", ".join(matplotlib.colors.to_hex(color) for color in _palette(17))


def _palette(steps: int) -> np.ndarray:
    """RGB in [0, 1], shape (steps, 3); the middle is white."""
    colors = matplotlib.colormaps["RdBu_r"](np.linspace(0, 1, steps))[:, :3]
    colors[steps // 2] = 1.0
    return np.asarray(colors)
