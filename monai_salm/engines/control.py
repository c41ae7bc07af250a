# SPDX-License-Identifier: Apache-2.0
"""The control of a study: the same fit with a random mask."""

from __future__ import annotations

import copy
import os

from monai_salm.engines.trainer import PerturbationTrainer

__all__ = ["with_random_mask"]


def with_random_mask(trainer: PerturbationTrainer, bank_file: str | os.PathLike[str]) -> PerturbationTrainer | None:
    """The same fit from its beginning with a random mask: does it matter which voxels change?

    Network and optimizer begin as those of the other fit did, also where that one took the weights of an earlier fit.

    Args:
        trainer: of the other fit, which stays as it is.
        bank_file: where the control's perturbations go.

    Returns:
        The trainer of the control; None where the method has no mask: the study then goes without this control.
    """
    if trainer.perturbation.mask is None:
        return None
    perturbation, (objective, optimizer) = copy.copy(trainer.perturbation), copy.deepcopy(trainer.untrained)
    perturbation.mask = copy.copy(trainer.perturbation.mask)
    perturbation.mask.criterion = "random"
    return PerturbationTrainer(
        device=trainer.state.device,
        max_epochs=trainer.state.max_epochs,
        dataset=trainer.cases.dataset,
        objective=objective,
        optimizer=optimizer,
        perturbation=perturbation,
        budget=trainer.budget,
        bank_file=bank_file,
        surrogate_steps=trainer.surrogate_steps,
        batch_size=trainer.batch_size,
        patch_size=trainer.patch_size,
        transplant=trainer.transplant,
        seed=trainer.seed,
    )
