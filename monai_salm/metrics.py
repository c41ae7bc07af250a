# SPDX-License-Identifier: Apache-2.0
"""What MONAI lacks: the largest change of an image, and how much of it changed.

For other norms use MONAI's ``MAEMetric`` and ``RMSEMetric``, for similarity its ``SSIMMetric`` and ``PSNRMetric``. All
of these work in ``IgniteMetricHandler`` as they are.
"""

from __future__ import annotations

from monai.metrics.regression import RegressionMetric
from torch import Tensor

__all__ = ["PerturbationNorm", "PerturbedFraction"]


class PerturbationNorm(RegressionMetric):
    """Largest absolute change of each image, in the unit of the images (stored values, HU, unit intensity).

    Args:
        reduction: of the images' values, as in MONAI's ``RegressionMetric``; ``"none"`` keeps (B, 1).
        get_not_nans: ``aggregate`` also returns how many values were not NaN.

    Example:
        >>> import torch
        >>> clean, protected = torch.zeros(1, 1, 1, 2), torch.tensor([[[[3.0, -4.0]]]])
        >>> PerturbationNorm()(protected, clean).item()
        4.0
    """

    def _compute_metric(self, y_pred: Tensor, y: Tensor) -> Tensor:
        return (_values(y_pred) - _values(y)).abs().flatten(1).amax(1, keepdim=True)


class PerturbedFraction(RegressionMetric):
    """Fraction of the voxels of each image that differ: the mask ratio that was achieved. NaN equals NaN.

    Args:
        reduction: of the images' values, as in MONAI's ``RegressionMetric``; ``"none"`` keeps (B, 1).
        get_not_nans: ``aggregate`` also returns how many values were not NaN.

    Example:
        >>> import torch
        >>> PerturbedFraction()(torch.tensor([[[1, 2, 3, 4]]]), torch.tensor([[[1, 2, 3, 5]]]))
        tensor([[0.2500]], dtype=torch.float64)
    """

    def _compute_metric(self, y_pred: Tensor, y: Tensor) -> Tensor:
        after, before = _values(y_pred), _values(y)
        differs = (after != before) & ~(after.isnan() & before.isnan())
        return differs.flatten(1).double().mean(1, keepdim=True)


def _values(images: Tensor) -> Tensor:
    """Plain float64: exact for all integers of 32 bits, and so are their differences."""
    return images.as_subclass(Tensor).double()
