# SPDX-License-Identifier: Apache-2.0
"""What protection does to a model that was trained on clean images: its scores on clean and on protected copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from monai_salm.verification.material import Material
from monai_salm.verification.training import Task

__all__ = ["utility_rows"]


def utility_rows(
    networks: Mapping[tuple[str, int], Callable[[], nn.Module]],
    material: Material,
    task: Task,
    batch_size: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """The part ``utility`` of ``docs/report.md``.

    Args:
        networks: load a clean-trained network, by victim and seed.
        material: has the held-out cases and, if all were protected, their copies.
        task: what was learned.
        batch_size: most inputs of one pass.
        device: where to evaluate.
    """
    if material.test_protected is None:
        return []
    rows, metric = [], task.metric
    for (victim, seed), load in networks.items():
        network = load().to(device)
        clean, protected = (
            task.evaluate(network, tested.load(), batch_size, full=False)
            for tested in (material.test, material.test_protected)
        )
        row: dict[str, Any] = {"victim": victim, "seed": seed, **_compared(clean[metric], protected[metric])}
        parts = clean.get(f"{metric}_per_class")
        if parts:
            others = protected[f"{metric}_per_class"]
            row["per_class"] = {name: _compared(parts[name], others[name]) for name in parts}
        rows.append(row)
    return rows


def _compared(clean: float | None, protected: float | None) -> dict[str, float | None]:
    difference = None if clean is None or protected is None else protected - clean
    return {"clean": clean, "protected": protected, "difference": difference}
