# SPDX-License-Identifier: Apache-2.0
"""How a protected set gets out, and what can be made of it: protected in part, or twice, or with our tool at hand.

Each function makes what a third party trains on. Images are (N, C, *spatial) unit intensities, as victims see them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from arena_data import stratified
from torch import Tensor, nn

from monai_salm.verification.defenses import linear_classifier
from monai_salm.verification.filters import median
from monai_salm.verification.training import seeded

__all__ = ["RELEASES", "TURNED", "Copies", "separable", "turned"]

TURNED = "turned"
"""The release whose images get other labels, see :py:func:`turned`."""


@dataclass(frozen=True)
class Copies:
    """What exists of one protected set.

    Args:
        clean: the originals.
        protected: what was released.
        labels: (N,) class indices.
        seed: of what is random.
        again: the same images, protected with another seed.
        pairs: other images of the same kind, clean and protected with the same tool and another seed.
        work: folder for what costs much.
    """

    clean: Tensor
    protected: Tensor
    labels: Tensor
    seed: int
    again: Callable[[], Tensor]
    pairs: Callable[[], tuple[Tensor, Tensor]]
    work: Path


def partly(copies: Copies, share: float) -> Tensor:
    """Only a share of each class is protected, the other cases are released as they are."""
    images = copies.clean.clone()
    chosen = stratified(copies.labels, share, copies.seed)
    images[chosen] = copies.protected[chosen]
    return images


def averaged(copies: Copies) -> Tensor:
    """Mean of two protected copies of the same images."""
    return (copies.protected + copies.again()) / 2


def compared(copies: Copies) -> Tensor:
    """Where two protected copies differ, the value that is nearer to the median around it of their mean."""
    one, other = copies.protected, copies.again()
    guess = torch.stack([median(image, 1) for image in (one + other) / 2])
    return torch.where((one - guess).abs() <= (other - guess).abs(), one, other)


def removed(copies: Copies, steps: int = 400, batch: int = 16) -> Tensor:
    """What a network makes of the released images that has learned to give back clean ones from protected ones.

    After LightShed (Foerster et al., USENIX Security 2025): whoever has the tool can make as many pairs as there are
    other images. Four convolutions predict the perturbation and are trained with an L1 loss. The result is kept in
    ``copies.work``, by the content that it follows from.
    """
    clean, protected = copies.pairs()
    digest = hashlib.sha256(repr((copies.seed, steps, batch)).encode())
    for images in (copies.protected, clean, protected):
        digest.update(images.contiguous().numpy().tobytes())
    kept = copies.work / f"removed-{digest.hexdigest()[:16]}.pt"
    if kept.is_file():
        return torch.load(kept, weights_only=True)
    channels, dims = clean.shape[1], clean.ndim - 2
    conv = nn.Conv2d if dims == 2 else nn.Conv3d
    widths = (channels, 32, 32, 32, channels)
    with seeded(copies.seed, torch.device("cpu")):
        layers: list[nn.Module] = []
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            layers += [conv(before, after, 3, padding=1), nn.ReLU()]
        network = nn.Sequential(*layers[:-1])
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
        for _ in range(steps):
            chosen = torch.randint(len(clean), (min(batch, len(clean)),))
            loss = F.l1_loss(network(protected[chosen]), protected[chosen] - clean[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        found = torch.cat([network(part) for part in copies.protected.split(64)])
    result = (copies.protected - found).clamp(0, 1)
    torch.save(result, kept.with_suffix(".part"))
    os.replace(kept.with_suffix(".part"), kept)
    return result


def turned(images: Tensor) -> tuple[Tensor, Tensor]:
    """Half of the images with their first two axes swapped, and whether they are: another labeling of the same images.

    Flips, which victims are augmented with, do not change the answer.
    """
    labels = torch.zeros(len(images), dtype=torch.long)
    labels[stratified(labels, 0.5, 0)] = 1
    which = labels.reshape(-1, *[1] * (images.ndim - 1)) == 1
    return torch.where(which, images.transpose(2, 3), images), labels


def separable(images: Tensor, labels: Tensor) -> float:
    """Accuracy of a logistic regression on one half of the cases that was fitted to the other half."""
    flat = images.flatten(1)
    fitted = torch.from_numpy(stratified(labels, 0.5, 0))
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[fitted] = False
    mean = flat[fitted].mean(0)
    scale = flat[fitted].std().clamp(min=1e-8)
    weight, bias = linear_classifier((flat[fitted] - mean) / scale, labels[fitted])
    read = (((flat[rest] - mean) / scale) @ weight.T + bias).argmax(1)
    return float((read == labels[rest]).float().mean())


RELEASES: dict[str, Callable[[Copies], Tensor]] = {
    "all": lambda copies: copies.protected,
    **{f"part_{share}": partial(partly, share=share / 100) for share in (80, 50, 20)},
    "averaged": averaged,
    "compared": compared,
    "removed": removed,
    TURNED: lambda copies: copies.protected,
}
"""Names of grids. ``turned`` is told apart by its labels."""
