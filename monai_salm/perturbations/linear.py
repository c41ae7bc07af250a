# SPDX-License-Identifier: Apache-2.0
"""A rival whose surrogate is linear, and so cheap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monai_salm.perturbations.base import Batch, Objective
from monai_salm.perturbations.patterns import require_class_labels
from monai_salm.perturbations.salm import SALM


class PerturbationInducedLinearization(SALM):
    """Perturbations that a linear classifier reads, on images that it no longer does (PIL, arXiv 2601.19967).

    For noise n it minimizes ``alone`` times the loss of n alone, and 1 - ``alone`` times the distance of the
    classification of x - n from the uniform one; x - n is what is released. The surrogate is a
    :py:class:`monai_salm.surrogates.LinearClassifier` that one round, without transplants or random views, trained on
    the clean images. Different from the original: the descent of :py:class:`monai_salm.perturbations.salm.SALM`
    (with mask ratio 1 and momentum 0 plain signed steps, on the integers that are stored). One class per image.

    Args:
        num_classes: of the task.
        alone: weight of the first term, in [0, 1].
        settings: of the descent.

    Raises:
        ValueError: When ``alone`` is outside [0, 1], or a setting is out of range.
    """

    def __init__(self, *, num_classes: int, alone: float = 0.9, **settings: Any) -> None:
        if not 0 <= alone <= 1:
            raise ValueError(f"alone is {alone}; it must be in [0, 1]")
        super().__init__(**settings)
        self.num_classes, self.alone = num_classes, alone

    def compute(self, objective: Objective, batch: Batch, start: Tensor, generator: torch.Generator) -> Tensor:
        image, label, lattice = batch
        require_class_labels(label)
        noise = (2 * torch.rand(image.shape, generator=generator) - 1).to(image.device)
        begin = lattice.project(start + noise * lattice.levels * (start == 0))
        return super().compute(objective, batch, begin, generator)

    def gradient(self, objective: Objective, batch: Batch, steps: Tensor, generator: torch.Generator) -> Tensor:
        image, label, _ = batch
        uniform = torch.full((len(label), self.num_classes), 1 / self.num_classes, device=image.device)
        noise = super().gradient(objective, batch._replace(image=torch.zeros_like(image)), -steps, generator)
        rest = super().gradient(objective, batch._replace(label=uniform), steps, generator)
        return (1 - self.alone) * rest - self.alone * noise
