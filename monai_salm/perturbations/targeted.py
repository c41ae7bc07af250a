# SPDX-License-Identifier: Apache-2.0
"""Rivals that push images away from their class, against a surrogate that was trained on clean ones.

The fit that they need has one round, no transplants, and enough surrogate steps to learn the task. The paper of both is
arXiv 2106.10807. Different from the original: the shared surrogate and its random views, and the descent of
:py:class:`monai_salm.perturbations.salm.SALM` (with mask ratio 1 and momentum 0 plain signed steps).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monai_salm.perturbations.base import Batch, Objective
from monai_salm.perturbations.salm import SALM


class TargetedAdversarial(SALM):
    """Adversarial examples of the next class (TAP): what looks like one class is labeled as another.

    Works voxel by voxel where every voxel has a label.

    Args:
        num_classes: of the task; the class that follows the last one is the first.
        settings: of the descent, see :py:class:`monai_salm.perturbations.salm.SALM`.

    Raises:
        ValueError: When there are fewer than 2 classes, or a setting is out of range.
    """

    def __init__(self, *, num_classes: int, **settings: Any) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; there is no other class to aim at")
        super().__init__(**settings)
        self.num_classes = num_classes

    def gradient(self, objective: Objective, batch: Batch, steps: Tensor, generator: torch.Generator) -> Tensor:
        aim = (batch.label + 1) % self.num_classes
        return super().gradient(objective, batch._replace(label=aim), steps, generator)


class ErrorMaximizing(SALM):
    """Untargeted adversarial examples: signed ascent of the loss. Works with labels of both kinds; arguments as of
    :py:class:`monai_salm.perturbations.salm.SALM`."""

    def gradient(self, objective: Objective, batch: Batch, steps: Tensor, generator: torch.Generator) -> Tensor:
        return -super().gradient(objective, batch, steps, generator)
