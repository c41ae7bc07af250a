# SPDX-License-Identifier: Apache-2.0
"""Victims that classify: networks that a third party trains on what it was given, and how well they do afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from monai.metrics import compute_roc_auc
from torch import Tensor, nn

from monai_salm.io.base import Case
from monai_salm.perturbations.base import Perturbation
from monai_salm.surrogates import RandomView, ResizeView
from monai_salm.verification.arms import RANDOM_NOISE, ArmWriter
from monai_salm.verification.description import described
from monai_salm.verification.training import Batches, Task

__all__ = ["METRIC", "Classification", "evaluate", "scores"]

METRIC = "balanced_accuracy"
"""Headline metric of classification."""
MEASURED_FINER = 2
"""Networks that see images at up to this many times the surrogate's size were measured (``docs/limits.md``)."""

Labeled = tuple[Tensor, Tensor]
"""(N, C, *spatial) unit intensities and (N,) class indices."""


@dataclass(frozen=True, eq=False)
class Classification(Task):
    """One class per image.

    Args:
        classes: their names.
        augment: random views of the training images.
        spatial_size: size of the victims' input in voxels; images are resized to it once.
    """

    name: ClassVar[str] = "Classification"
    metric: ClassVar[str] = METRIC
    curve_points: ClassVar[int] = 20
    controls: ClassVar[Mapping[str, Perturbation]] = {"random_noise": RANDOM_NOISE}

    classes: tuple[str, ...]
    augment: RandomView | None = None
    spatial_size: tuple[int, ...] = ()

    @property
    def chance(self) -> float:
        return 1 / len(self.classes)

    @property
    def learned(self) -> tuple[int, ...]:
        return tuple(range(len(self.classes)))

    @property
    def output(self) -> tuple[int, ...]:
        return (len(self.classes),)

    def describe(self) -> str:
        return described(self.augment)

    def writer(self, path: Path) -> ArmWriter:
        return ArmWriter(path)

    def view(self, unit: Tensor) -> Tensor:
        return ResizeView(self.spatial_size)(unit[None])[0]

    def warnings(self, shape: Sequence[int]) -> list[str]:
        if all(length <= MEASURED_FINER * seen for length, seen in zip(shape, self.spatial_size, strict=True)):
            return []
        seen, native = (" x ".join(map(str, size)) for size in (self.spatial_size, shape))
        return [
            f"The networks of this study see images at {seen}, and files have up to {native}: it says nothing of "
            "networks that see them finer. Set spatial_size to what a third party would train at, and fit again."
        ]

    def truth(self, case: Case, mask: np.ndarray | None, spacing: tuple[float, ...]) -> int:
        return case.label

    def probe(self, data: Labeled) -> Tensor:
        return data[0][:2]

    def count(self, data: Labeled) -> int:
        return len(data[0])

    def part(self, data: Labeled, cases: Sequence[int]) -> Labeled:
        index = torch.as_tensor(cases, dtype=torch.long)
        return data[0][index], data[1][index]

    def joined(self, data: Labeled, more: Labeled) -> Labeled:
        return torch.cat([data[0], more[0]]), torch.cat([data[1], more[1]])

    def mapped(self, data: Labeled, change: Callable[[Tensor], Tensor]) -> Labeled:
        return torch.stack([change(image) for image in data[0]]), data[1]

    def batches(self, data: Labeled, seed: int, device: torch.device) -> Batches:
        images, labels = data[0].to(device), data[1].to(device)

        def batch(chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            # Batch normalization of one value per channel is an error in PyTorch; two copies are harmless.
            index = (chosen if len(chosen) > 1 else chosen.repeat(2)).to(device)
            seen = images[index]
            if self.augment is not None:
                seen = self.augment(seen, self.augment.draw(len(seen), generator))
            return seen, labels[index]

        return batch

    def losses(self, output: Tensor, truth: Tensor) -> dict[str, Tensor]:
        right = (output.detach().argmax(1) == truth).float().mean()
        return {"train_loss": F.cross_entropy(output, truth), "train_accuracy": right}

    def evaluate(self, network: nn.Module, data: Labeled, batch_size: int, *, full: bool = True) -> dict[str, Any]:
        return scores(evaluate(network, data[0], batch_size), data[1], self.classes)


@torch.no_grad()
def evaluate(network: nn.Module, images: Tensor, batch_size: int = 32) -> Tensor:
    """(N, n_classes) probabilities on CPU, of (N, C, *spatial) images."""
    network.eval()
    device = next((weight.device for weight in network.parameters()), images.device)
    logits = torch.cat([network(batch.to(device)) for batch in images.split(batch_size)])
    return logits.float().softmax(1).nan_to_num(0.0).cpu()


def scores(probability: Tensor, label: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Accuracy, balanced accuracy, AUC (each class against the rest, unweighted mean) and recall per class.

    Args:
        probability: (N, n_classes).
        label: (N,) class indices; a class that does not occur has no part in balanced accuracy and AUC.
        classes: names of the classes.

    Example:
        >>> found = scores(torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]), torch.tensor([0, 1, 1]), ["no", "yes"])
        >>> found["balanced_accuracy"], found["auc"], found["recall"]
        (0.75, 1.0, {'no': 1.0, 'yes': 0.5})
    """
    label = label.cpu()
    right = (probability.argmax(1) == label).double()
    present = [index for index in range(len(classes)) if bool((label == index).any())]
    recall = {classes[index]: float(right[label == index].mean()) for index in present}
    against_rest = present if len(present) > 1 else []
    aucs = [float(compute_roc_auc(probability[:, index], (label == index).long())) for index in against_rest]
    return {
        "accuracy": float(right.mean()),
        "balanced_accuracy": sum(recall.values()) / len(recall),
        "auc": sum(aucs) / len(aucs) if aucs else None,
        "recall": recall,
    }
