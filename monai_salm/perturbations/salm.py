# SPDX-License-Identifier: Apache-2.0
"""Sparsity-aware local masking, and dense error-minimizing noise as its ratio 1."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from monai_salm.perturbations.base import Objective, Perturbation, mean_size
from monai_salm.perturbations.budget import Lattice
from monai_salm.perturbations.masks import SparsityMask

Refresh = Literal["once", "call", "step"]


class SALM(Perturbation):
    """Signed gradient descent on the objective, only in the voxels that matter most (idea: arXiv 2403.10573).

    The paper leaves mask criterion, ratio, scope and refresh open: they are options here, and the defaults are ours.
    The descent follows an exponential mean of the gradients (arXiv 1710.06081), each scaled to mean 1, since random
    views make single gradients noisy; the mask is chosen by the same mean.

    Args:
        mask: which voxels may be touched; ratio 1 gives dense error-minimizing noise (arXiv 2101.04898).
        steps: descent steps per call.
        step_size: of one step, as a fraction of the budget.
        momentum: weight of the past in the mean of the gradients, in [0, 1).
        look: gradients that are seen before a call chooses its mask (at most ``steps``); until then every voxel moves.
        refresh: choose the mask anew in every ``"call"``, at every ``"step"`` of it, or ``"once"``: a start that is not
            zero keeps its support.

    Raises:
        ValueError: When a number is out of range or ``refresh`` unknown.
    """

    def __init__(
        self,
        *,
        mask: SparsityMask,
        steps: int = 8,
        step_size: float = 0.25,
        momentum: float = 0.8,
        look: int = 3,
        refresh: Refresh = "call",
    ) -> None:
        if steps < 1 or step_size <= 0 or not 0 <= momentum < 1 or look < 1:
            raise ValueError(
                f"steps is {steps}, step_size {step_size}, momentum {momentum} and look {look}; steps and step_size "
                "must be above 0, momentum in [0, 1) and look 1 or more"
            )
        if refresh not in get_args(Refresh):
            raise ValueError(f"mask refresh is {refresh!r}; use one of {', '.join(get_args(Refresh))}")
        self.mask, self.steps, self.step_size, self.momentum = mask, steps, step_size, momentum
        self.look, self.refresh = min(look, steps), refresh

    def compute(
        self,
        objective: Objective,
        image: Tensor,
        label: Tensor,
        lattice: Lattice,
        start: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        movable = lattice.lower < lattice.upper
        stride = self.step_size * lattice.levels
        keep = movable
        chosen = self.refresh == "once" and bool(start.any())
        if chosen:
            keep = start != 0
        steps, mean = start, torch.zeros_like(start)
        seen = objective.network.view(image)  # the same in every step
        for step in range(1, self.steps + 1):
            gradient = self.gradient(objective, seen, label, lattice, steps * keep, generator)
            mean = self.momentum * mean + gradient / mean_size(gradient)
            if not chosen and step >= self.look:
                keep = self.mask(image, mean, label=label, movable=movable, generator=generator)
                chosen = self.refresh != "step"
            steps = lattice.project(steps - stride * mean.sign())
        return steps * keep


class RandomSign(Perturbation):
    """Control: every chosen voxel moves by the full budget in a random direction. Uses no network.

    Args:
        mask: which voxels move.
    """

    def __init__(self, *, mask: SparsityMask) -> None:
        self.mask = mask

    def compute(
        self,
        objective: Objective,
        image: Tensor,
        label: Tensor,
        lattice: Lattice,
        start: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        mask = self.mask(image, label=label, movable=lattice.lower < lattice.upper, generator=generator)
        up = (torch.rand(image.shape, generator=generator) < 0.5).to(image.device)
        return torch.where(up, lattice.upper, lattice.lower) * mask
