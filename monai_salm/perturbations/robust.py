# SPDX-License-Identifier: Apache-2.0
"""The objective of a rival that is made to survive adversarial training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from monai_salm.perturbations.base import Loss, Objective, frozen


class RobustObjective(Objective):
    """The loss after a third party's own adversarial steps: with it, error-minimizing noise is REM (arXiv 2203.14533).

    Surrogate and perturbation both minimize what signed ascent, within ``radius`` of the image as it is seen, made of
    the loss. One class per image. Different from the original: one random view per step in place of the mean over
    several, those of the other fits in place of crops and flips, and fewer steps of both kinds.

    Args:
        network: the surrogate.
        loss: one value per image from prediction and label.
        view: random view, see :py:class:`monai_salm.perturbations.base.Objective`.
        radius: largest adversarial change in unit intensity; half the budget in the paper.
        steps: ascent steps, which together reach twice as far.

    Raises:
        ValueError: When ``radius`` is not above 0 or there are no steps.
    """

    def __init__(
        self, network: nn.Module, loss: Loss, *, radius: float, steps: int = 2, view: nn.Module | None = None
    ) -> None:
        super().__init__(network, loss, view=view)
        if radius <= 0 or steps < 1:
            raise ValueError(f"radius is {radius} and steps {steps}; use a radius above 0 and 1 step or more")
        self.radius, self.steps = radius, steps

    def extra_repr(self) -> str:
        return f"radius={self.radius:g}, steps={self.steps}"

    def harden(self, seen: Tensor, label: Tensor) -> Tensor:
        attack = torch.zeros_like(seen)
        with frozen(self.network), torch.enable_grad():
            for _ in range(self.steps):
                attack.requires_grad_(True)
                loss = self.loss(self.network.network(seen.detach() + attack), label).sum()
                (gradient,) = torch.autograd.grad(loss, attack)
                stride = 2 * self.radius / self.steps
                attack = (attack.detach() + stride * gradient.sign()).clamp(-self.radius, self.radius)
        self.passes += self.steps * len(seen)
        return seen + attack
