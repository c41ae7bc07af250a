# SPDX-License-Identifier: Apache-2.0
"""Victims: networks that a third party trains on what it was given, and how well they do on clean held-out cases."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from monai.metrics import compute_roc_auc
from torch import Tensor, nn

from monai_salm.surrogates import RandomView

__all__ = ["METRIC", "VictimResult", "evaluate", "scores", "train_victim", "victim_digest"]

METRIC = "balanced_accuracy"
"""Headline metric of classification."""

Labelled = tuple[Tensor, Tensor]
"""(N, 1, *spatial) unit intensities and (N,) class indices."""


@dataclass(frozen=True)
class VictimResult:
    """One training.

    Args:
        row: metrics on the test cases, ``seconds`` and ``curve``, as in ``arms`` of ``docs/report.md``.
        network: the trained network, in evaluation mode.
    """

    row: dict[str, Any]
    network: nn.Module


def train_victim(
    make: Callable[[], nn.Module],
    train: Labelled,
    test: Labelled,
    *,
    classes: Sequence[str],
    seed: int,
    epochs: int = 30,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    weight_decay: float = 1e-2,
    augment: RandomView | None = None,
    device: torch.device | str = "cpu",
    metric: str = METRIC,
    curve_points: int = 20,
) -> VictimResult:
    """Train one network with AdamW and a one-cycle learning rate, and test it once training is over.

    The last epoch counts: nothing is chosen by the test cases. One seed gives one start, order of images and
    augmentation in every arm, so that arms can be compared in pairs. On CPU the same seed and number of threads give
    the same result; the global random state is left as it was.

    Args:
        make: builds the untrained network, which maps (B, 1, *spatial) to (B, n_classes) logits.
        train: (N, 1, *spatial) unit intensities and (N,) labels.
        test: clean held-out cases, of the same form.
        classes: names of the classes.
        seed: of start, order and augmentation.
        epochs: passes over ``train``.
        batch_size: largest batch; the batches of an epoch are of nearly equal size.
        learning_rate: highest rate of the one-cycle schedule.
        weight_decay: of AdamW.
        augment: random views of the training images.
        device: where to train.
        metric: which metric the curve follows, a key of :py:func:`scores`.
        curve_points: at most about this many epochs are tested for the curve.

    Raises:
        ValueError: When there is nothing to train or to test on.
    """
    if not len(train[0]) or not len(test[0]):
        raise ValueError(f"{len(train[0])} training and {len(test[0])} test cases; a victim needs at least one of each")
    device, start = torch.device(device), time.monotonic()
    images, labels = train[0].to(device), train[1].to(device)
    test = (test[0].to(device), test[1].to(device))
    n_batches = -(-len(images) // batch_size)
    curve: list[dict[str, Any]] = []
    generator = torch.Generator().manual_seed(seed)
    with _seeded(seed, device):
        network = make().to(device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, learning_rate, total_steps=epochs * n_batches, cycle_momentum=False
        )
        for epoch in range(1, epochs + 1):
            network.train()
            loss_sum, n_right = torch.zeros((), device=device), torch.zeros((), device=device)
            for chosen in torch.randperm(len(images), generator=generator).tensor_split(n_batches):
                # Batch normalization of one value per channel is an error in PyTorch; two copies are harmless.
                index = (chosen if len(chosen) > 1 else chosen.repeat(2)).to(device)
                batch, truth = images[index], labels[index]
                if augment is not None:
                    batch = augment(batch, augment.draw(len(batch), generator))
                logits = network(batch)
                loss = F.cross_entropy(logits, truth)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                loss_sum += loss.detach() * len(chosen)
                n_right += (logits.detach().argmax(1) == truth).float().mean() * len(chosen)
            point = {"train_loss": float(loss_sum) / len(images), "train_accuracy": float(n_right) / len(images)}
            tested = epoch == epochs or epoch % max(1, epochs // curve_points) == 0
            if tested:
                found = scores(evaluate(network, test[0], batch_size), test[1], classes)
            curve.append({"epoch": epoch, **point, metric: found[metric] if tested else None})
    return VictimResult({**found, "seconds": time.monotonic() - start, "curve": curve}, network.eval())


@torch.no_grad()
def evaluate(network: nn.Module, images: Tensor, batch_size: int = 32) -> Tensor:
    """(N, n_classes) probabilities on CPU, of (N, 1, *spatial) images on the network's device."""
    network.eval()
    logits = torch.cat([network(batch) for batch in images.split(batch_size)])
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


def victim_digest(make: Callable[[], nn.Module], images: Tensor, n_classes: int) -> str:
    """What tells one kind of victim from another: its layers and the weights that it starts from.

    Args:
        make: builds the network.
        images: (B, 1, *spatial) images to try it on.
        n_classes: how many outputs it must have.

    Raises:
        ValueError: When its output does not fit the classes.
    """
    with _seeded(0, torch.device("cpu")), torch.no_grad():
        network = make().eval()
        shape = tuple(network(images).shape)
    if shape != (len(images), n_classes):
        raise ValueError(
            f"a victim ({type(network).__name__}) gives {shape} for {len(images)} images of {n_classes} classes; "
            f"build it with {n_classes} outputs"
        )
    digest = hashlib.sha256(f"{network}".encode())
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators that initialization and dropout draw from, and restore them on leaving."""
    index = None
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
    with torch.random.fork_rng(devices=[] if index is None else [index]):
        torch.default_generator.manual_seed(seed)
        if index is not None:
            torch.cuda.init()
            torch.cuda.default_generators[index].manual_seed(seed)
        yield
