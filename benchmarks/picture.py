# SPDX-License-Identifier: Apache-2.0
"""Draws README.md's picture from a run's report: one case before and after, and what networks learned.

python benchmarks/picture.py build/demo docs/demo.png
"""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from monai_salm.verification.figures import ARM_STYLES
from monai_salm.verification.victims import METRIC

PANELS = {"Clean": "clean", "Protected": "protected", "Signed difference": "difference"}
"""What the report calls its panels, and the picture's titles."""
ARMS = ("clean", "random_noise", "protected", "blind")


def panel(html: str, name: str) -> Image.Image:
    """The report's first panel of a kind."""
    found = re.search(rf'data:image/png;base64,([^"]*)" alt="{name}\b', html)
    if found is None:
        raise SystemExit(f"the report shows no panel {name!r}: run `make demo` again")
    return Image.open(io.BytesIO(base64.b64decode(found[1]))).convert("RGB")


def draw(html: str, results: dict[str, Any]) -> Figure:
    """Three panels of one case, and a point per network and seed."""
    figure = Figure(figsize=(11, 3.1), layout="constrained")
    *cells, plot = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.5))
    moved = f"{results['fidelity']['mask_fraction']['mean']:.0%} of the voxels, at most {results['config']['epsilon']}"
    notes = {"protected": f"SSIM {results['fidelity']['ssim']['mean']:.3f}", "difference": moved}
    for axes, (name, title) in zip(cells, PANELS.items(), strict=True):
        axes.imshow(panel(html, name))
        axes.set_axis_off()
        axes.set_title(title + (f"\n{notes[title]}" if title in notes else "\n"), fontsize=10)
    found = {arm: [row[METRIC] for row in results["arms"] if row["arm"] == arm] for arm in ARMS}
    for place, (arm, values) in enumerate(found.items()):
        label, color, marker = ARM_STYLES[arm]
        spread = np.linspace(-0.15, 0.15, len(values))
        plot.plot(place + spread, values, marker, color=color, ms=5, alpha=0.7)
        plot.plot([place - 0.3, place + 0.3], [mean(values)] * 2, color=color, lw=2.5)
    plot.axhline(results["chance"], color="#111827", lw=1, ls="--")
    plot.set_xticks(range(len(ARMS)), [ARM_STYLES[arm][0].replace(" ", "\n") for arm in ARMS], fontsize=9)
    plot.set_ylim(min(results["chance"], *map(min, found.values())) - 0.05, 1.02)
    plot.spines[["top", "right"]].set_visible(False)
    plot.set_title("networks trained on each:\nbalanced accuracy on clean cases", fontsize=10)
    return figure


def main(run: str, output: str) -> None:
    """Draw what is in the folder ``run``."""
    folder = Path(run)
    results = json.loads((folder / "report.json").read_text())
    figure = draw((folder / "report.html").read_text(), results)
    figure.savefig(output, dpi=110, metadata={"Software": None}, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main(*sys.argv[1:])
