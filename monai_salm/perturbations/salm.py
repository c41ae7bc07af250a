# SPDX-License-Identifier: Apache-2.0
"""Sparsity-aware local masking: signed descent in the voxels that matter most."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from monai_salm.errors import check_number
from monai_salm.perturbations.base import Batch, Objective, Perturbation, mean_size, per_image
from monai_salm.perturbations.budget import Lattice
from monai_salm.perturbations.masks import SparsityMask
from monai_salm.similarity import structural_similarity

LOOK = 3
"""A call chooses its mask after this many gradients (or after its last, if it has fewer); before, every voxel moves."""
_RANGE = 1e3
"""The threshold of :py:func:`_faithful` is searched for between the largest gradient divided by this and times this."""
_HALVINGS = 12
"""Steps of that search, by bisection of the logarithm: the threshold is then known to 0.3 %."""
_MOST_PSNR = 60.0
"""dB; even the weakest perturbation of the search, a thousandth of any budget, keeps this much."""
_MOST_SSIM = 0.999

Bound = Callable[[Tensor, Tensor | slice], Tensor]
"""(steps, at): ``steps`` are (n, C, *spatial) real-valued lattice steps of the images at the places ``at`` of a batch;
(n,) whether each image then keeps the bound."""


class SALM(Perturbation):
    """Signed gradient descent on the objective, only in the voxels that matter most (idea: arXiv 2403.10573).

    The paper leaves mask criterion, ratio, scope and refresh open: the first three are options here, with defaults of
    ours; every call chooses its mask anew.
    The descent follows an exponential mean of the gradients (arXiv 1710.06081), each scaled to mean 1, since random
    views make single gradients noisy; the mask is chosen by the same mean.

    Args:
        mask: which voxels may be touched; at ratio 1 all. Then, and with a surrogate that is trained on the protected
            images themselves (no transplants), this is error-minimizing noise (arXiv 2101.04898).
        steps: descent steps per call.
        step_size: of one step, as a fraction of the budget.
        momentum: weight of the past in the mean of the gradients, in [0, 1).
        psnr: least PSNR of each protected image in dB, on its own grid and in its window. Where the budget allows more,
            voxels move in proportion to the mean of their gradients, and only those with the largest ones by the whole
            budget: a wave keeps its form, in place of its signs. None: as far as the budget allows.
        ssim: least structural similarity of each protected image, kept in the same way. None: no bound.

    Raises:
        ValueError: When a number is out of range.
    """

    mask: SparsityMask

    def __init__(
        self,
        *,
        mask: SparsityMask,
        steps: int = 8,
        step_size: float = 0.25,
        momentum: float = 0.8,
        psnr: float | None = None,
        ssim: float | None = None,
    ) -> None:
        check_number("perturbation_steps", steps, least=1, most=1e9, whole=True)
        check_number("step_size", step_size, above=0)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; it must be in [0, 1)")
        for name, value, most in (("psnr", psnr, _MOST_PSNR), ("ssim", ssim, _MOST_SSIM)):
            if value is not None:
                check_number(name, value, above=0, most=most)
        self.mask, self.steps, self.step_size, self.momentum = mask, steps, step_size, momentum
        self.psnr, self.ssim = psnr, ssim

    def compute(self, objective: Objective, batch: Batch, start: Tensor, generator: torch.Generator) -> Tensor:
        image, label, lattice = batch
        # Bounds and mask in the images' own type: every step of mixed types would convert them again.
        lower, upper = lattice.lower.to(image.dtype), lattice.upper.to(image.dtype)
        movable = lower < upper
        keep = movable.to(image.dtype)
        stride = self.step_size * lattice.levels
        steps, mean = start.clone(), torch.zeros_like(start)
        seen = batch._replace(image=objective.network.view(image))  # the same in every step
        for step in range(1, self.steps + 1):
            gradient = self.gradient(objective, seen, steps * keep, generator)
            mean.mul_(self.momentum).add_(gradient.div_(mean_size(gradient)))
            if step == min(LOOK, self.steps):
                keep = self.mask(image, mean, label=label, movable=movable, generator=generator).to(image.dtype)
            torch.clamp(steps.sub_(mean.sign().mul_(stride)), lower, upper, out=steps)
        steps.mul_(keep)
        bounds = self._bounds(image, lattice)
        return _faithful(steps, mean.abs_(), lattice, bounds) if bounds else steps

    def _bounds(self, image: Tensor, lattice: Lattice) -> list[Bound]:
        """The bounds that were asked for, the cheapest to compute first."""
        most, least = 10 ** (-(self.psnr or 0.0) / 10), self.ssim or 0.0

        def change(steps: Tensor, at: Tensor | slice) -> Tensor:
            """Of unit intensity, by what would be stored."""
            return steps.round().mul_(lattice.unit_step[at])

        def keeps_psnr(steps: Tensor, at: Tensor | slice) -> Tensor:
            return change(steps, at).square_().flatten(1).mean(1) <= most

        def keeps_ssim(steps: Tensor, at: Tensor | slice) -> Tensor:
            return structural_similarity(image[at], change(steps, at).add_(image[at])) >= least

        asked = ((self.psnr, keeps_psnr), (self.ssim, keeps_ssim))
        return [keeps for value, keeps in asked if value is not None]


def _faithful(steps: Tensor, size: Tensor, lattice: Lattice, bounds: Sequence[Bound]) -> Tensor:
    """Weaken the steps of the images that break a bound, as little as it takes.

    A voxel may then move by ``budget * size / (threshold * largest size)`` at most, so that those with a gradient above
    the threshold still move by the whole budget. Of each image the least threshold that keeps the bounds is taken.

    Args:
        steps: (B, C, *spatial) lattice steps, changed in place.
        size: of the same shape, the mean of the gradients without its sign.
        lattice: the changes that the images allow.
        bounds: see :py:meth:`SALM._bounds`.
    """
    peak = per_image(size.flatten(1).amax(1), size).clamp(min=torch.finfo(size.dtype).tiny)
    reach, threshold = size / peak * lattice.levels, torch.full_like(peak, 1 / _RANGE)
    for keeps in bounds:
        at = (~keeps(steps, slice(None))).nonzero()[:, 0]
        if not len(at):
            continue
        room, far, sign = steps[at].abs(), reach[at], steps[at].sign()
        low, high = threshold[at], torch.full_like(peak[at], _RANGE)
        for _ in range(_HALVINGS):
            middle = (low * high).sqrt()
            kept = keeps(torch.minimum(room, far / middle).mul_(sign), at).reshape(middle.shape)
            low, high = torch.where(kept, low, middle), torch.where(kept, middle, high)
        threshold[at], steps[at] = high, torch.minimum(room, far / high).mul_(sign)
    return steps


class RandomSign(Perturbation):
    """Control: every chosen voxel moves by the full budget in a random direction. Uses no network.

    Args:
        mask: which voxels move.
    """

    mask: SparsityMask

    def __init__(self, *, mask: SparsityMask) -> None:
        self.mask = mask

    def compute(self, objective: Objective, batch: Batch, start: Tensor, generator: torch.Generator) -> Tensor:
        image, label, lattice = batch
        mask = self.mask(image, label=label, movable=lattice.lower < lattice.upper, generator=generator)
        up = (torch.rand(image.shape, generator=generator) < 0.5).to(image.device)
        return torch.where(up, lattice.upper, lattice.lower) * mask
