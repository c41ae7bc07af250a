# SPDX-License-Identifier: Apache-2.0
"""Budgets that mean something for a kind of image: each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """A budget for a kind of image.

    Args:
        budget: text that :py:meth:`monai_salm.perturbations.budget.Budget.parse` reads.
        modalities: DICOM modalities that it is meant for.
        reason: why this much.
    """

    budget: str
    modalities: tuple[str, ...]
    reason: str


PRESETS: Mapping[str, Preset] = {
    "ct-brain": Preset(
        "2 HU",
        ("CT",),
        "half the noise of stroke CT (4 HU); gray and white matter differ by 7 to 9 HU, and are read at a width of 80",
    ),
    "ct-body": Preset(
        "5 HU",
        ("CT",),
        "the tolerance of water in quality control; the noise of abdominal CT is 8 HU; read at a width of 400",
    ),
    "ct-lung": Preset("8 HU", ("CT",), "as far below the noise as in the body; lung is read at a width of 1500"),
    "mr": Preset(
        "4/255 window",
        ("MR",),
        "MR has no unit: a fraction of the percentiles 0.5 to 99.5; 2/255 of a sparse mask is like JPEG 2000 at 5:1",
    ),
    "cr-dx": Preset("4/255 window", ("CR", "DX"), "four gray levels of the file's own window on an 8-bit display"),
}
"""Proposals by name: no reader has rated them, and a study has to show that they protect enough."""
