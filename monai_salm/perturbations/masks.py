# SPDX-License-Identifier: Apache-2.0
"""Which voxels a perturbation may touch."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_salm.errors import check_number
from monai_salm.perturbations.voxels import require_voxel_labels

Criterion = Literal["gradient", "gradient_input", "foreground", "random", "label"]
Scope = Literal["image", "slice", "channel", "class"]
_NEAR = 12  # voxels: farther from a label than this, criterion "label" scores all alike


def _checked(name: str, value: str, allowed: object) -> str:
    if value not in get_args(allowed):
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(get_args(allowed))}")
    return value


class SparsityMask:
    """Keeps the fraction ``ratio`` of the voxels with the highest score.

    Args:
        ratio: fraction of each scope's voxels that may be touched, in (0, 1]; 1 is a dense perturbation.
        criterion: the score: ``"gradient"`` |dL/dx|, ``"gradient_input"`` |dL/dx * x|, ``"foreground"`` intensity,
            ``"random"`` uniform (the control that every other criterion has to beat), ``"label"`` labeled voxels first,
            then those around them (voxel labels only; the support then shows where the labels are).
        scope: over which voxels the fraction is taken: ``"image"``, ``"slice"`` (of the last spatial axis; made for
            volumes, of an image it is each line), ``"channel"``, or ``"class"``: all images of a class in the call
            share one mask; with voxel labels, the fraction is that of each class of each image, so that the support is
            as dense in one class as in another.

    Raises:
        ValueError: When ``ratio`` is outside (0, 1] or a name is unknown.

    Example:
        >>> gradient = torch.tensor([[[[3.0, 1.0], [2.0, 0.0]]]])
        >>> SparsityMask(ratio=0.5)(torch.ones(1, 1, 2, 2), gradient).int().tolist()
        [[[[1, 0], [1, 0]]]]
    """

    def __init__(self, *, ratio: float, criterion: Criterion = "gradient", scope: Scope = "image") -> None:
        check_number("mask_ratio", ratio, above=0, most=1)
        self.ratio = float(ratio)
        self.criterion = _checked("mask criterion", criterion, Criterion)
        self.scope = _checked("mask scope", scope, Scope)

    def __repr__(self) -> str:
        return f"SparsityMask(ratio={self.ratio}, criterion={self.criterion!r}, scope={self.scope!r})"

    def __call__(
        self,
        image: Tensor,
        gradient: Tensor | None = None,
        *,
        label: Tensor | None = None,
        movable: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Boolean mask of the images' shape.

        Args:
            image: (B, C, *spatial) unit intensities.
            gradient: of the same shape; needed by the gradient criteria.
            label: (B,) classes or (B, 1, *spatial) class indices; for scope ``"class"`` and criterion ``"label"``.
            movable: of the same shape; voxels outside are never chosen. The fraction still refers to all voxels.
            generator: CPU generator of the random criterion.

        Raises:
            ValueError: When an argument that criterion or scope needs is missing, or voxel labels have another shape.
        """
        voxels = label if label is not None and label.ndim == image.ndim else None
        if voxels is not None:
            require_voxel_labels(image, voxels)
        if self.ratio == 1:
            return torch.ones_like(image, dtype=torch.bool) if movable is None else movable.clone()
        score = self._label_score(label) if self.criterion == "label" else self.score(image, gradient, generator)
        if self.scope == "class" and voxels is None:
            score = self._shared(score, label)
        if movable is not None:
            score = score.masked_fill(~movable, -1.0)
        mask = self._top(score) if self.scope != "class" or voxels is None else self._top_of_each_class(score, voxels)
        return mask if movable is None else mask & movable

    def score(self, image: Tensor, gradient: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Nonnegative score of every voxel; higher is chosen first."""
        if self.criterion == "random":
            return torch.rand(image.shape, generator=generator).to(image.device)
        if self.criterion == "foreground":
            return image
        if gradient is None:
            raise ValueError(f"mask criterion {self.criterion!r} needs a gradient")
        return gradient.abs() if self.criterion == "gradient" else (gradient * image).abs()

    @staticmethod
    def _label_score(label: Tensor | None) -> Tensor:
        """2 where there is a label, falling with the distance from it to 0."""
        if label is None or label.ndim < 4:
            raise ValueError("mask criterion 'label' needs voxel labels, (B, 1, *spatial)")
        labeled = (label > 0).float()
        pool = F.avg_pool2d if label.ndim == 4 else F.avg_pool3d
        near = labeled
        for _ in range(_NEAR):
            near = pool(near, 3, stride=1, padding=1)
        return labeled + near

    def _top_of_each_class(self, score: Tensor, label: Tensor) -> Tensor:
        """The fraction with the highest score of the voxels of each class of each image."""
        mask = torch.zeros_like(score, dtype=torch.bool)
        for one, its_label, its_score in zip(mask, label.expand_as(score), score, strict=True):
            for value in its_label.unique():
                places = (its_label == value).flatten().nonzero()[:, 0]
                count = max(1, round(self.ratio * len(places)))
                chosen = places[its_score.flatten()[places].topk(count, sorted=False).indices]
                one.view(-1)[chosen] = True
        return mask

    def _shared(self, score: Tensor, label: Tensor | None) -> Tensor:
        """The mean score of all images of a class, for each of them."""
        if label is None:
            raise ValueError("mask scope 'class' needs the labels")
        shared = torch.empty_like(score)
        for value in label.unique():
            members = label == value
            shared[members] = score[members].mean(0, keepdim=True)
        return shared

    def _top(self, score: Tensor) -> Tensor:
        """The fraction with the highest score of each image, channel or slice."""
        keep_dims = {"image": 1, "class": 1, "channel": 2, "slice": 2}[self.scope]
        by_scope = score.movedim(-1, 1) if self.scope == "slice" else score
        flat = by_scope.flatten(keep_dims)
        count = max(1, round(self.ratio * flat.shape[-1]))
        mask = torch.zeros_like(flat, dtype=torch.bool)
        mask.scatter_(-1, flat.topk(count, -1, sorted=False).indices, True)
        mask = mask.reshape(by_scope.shape)
        return mask.movedim(1, -1) if self.scope == "slice" else mask
