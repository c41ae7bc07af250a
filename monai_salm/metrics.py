# SPDX-License-Identifier: Apache-2.0
"""What MONAI lacks: size and extent of a perturbation, and the generalization gap.

For similarity use MONAI's ``SSIMMetric`` and ``PSNRMetric``. All of these work in ``IgniteMetricHandler`` as they are.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from monai.metrics import CumulativeIterationMetric
from monai.metrics.regression import RegressionMetric
from monai.utils import MetricReduction
from torch import Tensor

__all__ = ["GeneralizationGap", "Norm", "PerturbationNorm", "PerturbedFraction"]

Norm = Literal["linf", "l2", "rms", "mean_abs"]


class PerturbationNorm(RegressionMetric):
    """Size of the perturbation of each image, in the unit of the images (stored values, HU, unit intensity).

    Args:
        norm: ``"linf"`` largest absolute change, ``"l2"`` Euclidean norm, ``"rms"`` root mean square, ``"mean_abs"``.
        reduction: of the images' values, as in MONAI's ``RegressionMetric``; ``"none"`` keeps (B, 1).
        get_not_nans: ``aggregate`` also returns how many values were not NaN.

    Raises:
        ValueError: When the norm is unknown.

    Example:
        >>> import torch
        >>> clean, protected = torch.zeros(1, 1, 1, 2), torch.tensor([[[[3.0, -4.0]]]])
        >>> [PerturbationNorm(norm)(protected, clean).item() for norm in ("linf", "l2", "mean_abs")]
        [4.0, 5.0, 3.5]
    """

    def __init__(
        self,
        norm: Norm = "linf",
        reduction: MetricReduction | str = MetricReduction.MEAN,
        get_not_nans: bool = False,
    ) -> None:
        super().__init__(reduction, get_not_nans)
        if norm not in get_args(Norm):
            raise ValueError(f"norm is {norm!r}; use one of {', '.join(get_args(Norm))}")
        self.norm = norm

    def _compute_metric(self, y_pred: Tensor, y: Tensor) -> Tensor:
        # Double: the difference of two 32-bit integers does not fit their own type.
        change = (_values(y_pred) - _values(y)).abs().flatten(1)
        if self.norm == "linf":
            return change.amax(1, keepdim=True)
        if self.norm == "mean_abs":
            return change.mean(1, keepdim=True)
        squares = change.square()
        return (squares.sum(1, keepdim=True) if self.norm == "l2" else squares.mean(1, keepdim=True)).sqrt()


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


class GeneralizationGap(CumulativeIterationMetric):
    """How far a victim falls behind one that was trained on clean data: ``reference - metric``.

    To be fed with the predictions of a victim that was trained on protected data, on clean test cases.

    Args:
        metric: a cumulative metric where more is better, such as ``ROCAUCMetric`` or ``DiceMetric``.
        reference: what the victim that was trained on clean data reaches on the same cases.

    Raises:
        ValueError: When the metric does not accumulate.

    Example:
        >>> import torch
        >>> from monai.metrics import ROCAUCMetric
        >>> gap = GeneralizationGap(ROCAUCMetric(), reference=0.9)
        >>> _ = gap(torch.tensor([[0.2], [0.8]]), torch.tensor([[1], [0]]))
        >>> gap.aggregate()
        0.9
    """

    def __init__(self, metric: CumulativeIterationMetric, *, reference: float) -> None:
        if not isinstance(metric, CumulativeIterationMetric):
            raise ValueError(f"metric is {type(metric).__name__}; use a CumulativeIterationMetric such as ROCAUCMetric")
        self.metric, self.reference = metric, float(reference)
        super().__init__()

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **kwargs: Any) -> Any:
        return self.metric._compute_tensor(y_pred, y, **kwargs)

    def __call__(self, y_pred: Any, y: Any = None, **kwargs: Any) -> Any:
        """The metric's own values of a batch; it also keeps them."""
        return self.metric(y_pred, y, **kwargs)

    def reset(self) -> None:
        """Forget what was seen."""
        self.metric.reset()

    def get_buffer(self) -> Any:
        """What the metric keeps, gathered across processes."""
        return self.metric.get_buffer()

    def __len__(self) -> int:
        return len(self.metric)

    def aggregate(self, *args: Any, **kwargs: Any) -> Any:
        """``reference - metric.aggregate(...)`` over all that was seen; of each value if the metric has several.

        Raises:
            ValueError: When nothing was seen yet.
        """
        if len(self) == 0:
            raise ValueError("no prediction was seen yet: call the metric before aggregate()")
        result = self.metric.aggregate(*args, **kwargs)
        if isinstance(result, (list, tuple)):
            return [self.reference - value for value in result]
        return self.reference - result


def _values(images: Tensor) -> Tensor:
    return images.as_subclass(Tensor).double()
