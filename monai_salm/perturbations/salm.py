# SPDX-License-Identifier: Apache-2.0
"""Sparsity-aware local masking, and dense error-minimizing noise as its ratio 1."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from monai_salm.perturbations.base import Objective, Perturbation
from monai_salm.perturbations.budget import Lattice
from monai_salm.perturbations.masks import SparsityMask

Refresh = Literal["step", "call"]


class SALM(Perturbation):
    """Signed gradient descent on the objective, only in the voxels that matter most (idea: arXiv 2403.10573).

    The paper leaves mask criterion, ratio, scope and refresh open: they are options here, and the defaults are ours.

    Args:
        mask: which voxels may be touched; ratio 1 gives dense error-minimizing noise (arXiv 2101.04898).
        steps: descent steps per call.
        step_size: of one step, as a fraction of the budget.
        refresh: choose the mask anew at every ``"step"``, or once per ``"call"``.
    """

    def __init__(self, *, mask: SparsityMask, steps: int = 4, step_size: float = 0.25, refresh: Refresh = "call") -> None:
        if steps < 1 or step_size <= 0:
            raise ValueError(f"steps is {steps} and step_size {step_size}; both must be above 0")
        if refresh not in ("step", "call"):
            raise ValueError(f"mask refresh is {refresh!r}; use 'step' or 'call'")
        self.mask, self.steps, self.step_size, self.refresh = mask, steps, step_size, refresh

    def compute(
        self, objective: Objective, image: Tensor, label: Tensor, lattice: Lattice, start: Tensor, generator: torch.Generator
    ) -> Tensor:
        movable = lattice.lower < lattice.upper
        stride = self.step_size * lattice.levels
        steps, mask = start, None
        for _ in range(self.steps):
            gradient = self._gradient(objective, image, label, lattice, steps, generator)
            if mask is None or self.refresh == "step":
                mask = self.mask(image, gradient, label=label, movable=movable, generator=generator)
            steps = lattice.project(steps - stride * gradient.sign()) * mask
        return steps

    def _gradient(
        self, objective: Objective, image: Tensor, label: Tensor, lattice: Lattice, steps: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Gradient by lattice steps at the perturbation that would be stored."""
        delta = (steps.round() * lattice.unit_step).requires_grad_(True)
        with torch.enable_grad():
            loss = objective(image, delta, label, generator).sum()
            (gradient,) = torch.autograd.grad(loss, delta)
        return gradient * lattice.unit_step.sign()


class RandomSign(Perturbation):
    """Control: every chosen voxel moves by the full budget in a random direction. Uses no network.

    Args:
        mask: which voxels move.
    """

    def __init__(self, *, mask: SparsityMask) -> None:
        self.mask = mask

    def compute(
        self, objective: Objective, image: Tensor, label: Tensor, lattice: Lattice, start: Tensor, generator: torch.Generator
    ) -> Tensor:
        mask = self.mask(image, label=label, movable=lattice.lower < lattice.upper, generator=generator)
        up = (torch.rand(image.shape, generator=generator) < 0.5).to(image.device)
        return torch.where(up, lattice.upper, lattice.lower) * mask
