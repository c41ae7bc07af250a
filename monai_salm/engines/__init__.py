# SPDX-License-Identifier: Apache-2.0
"""The fit: ``trainer.py`` alternates surrogate and perturbations, ``cases.py`` is what it knows of a cohort."""

from monai_salm.engines.trainer import PerturbationTrainer

__all__ = ["PerturbationTrainer"]
