# SPDX-License-Identifier: Apache-2.0
"""One training of one victim, whatever it learns: the loop that all tasks share, and what a task has to tell it."""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from monai_salm.io.base import Case
from monai_salm.perturbations.base import Perturbation
from monai_salm.verification.description import code_of

__all__ = [
    "Batches",
    "Learn",
    "Recipe",
    "Task",
    "VictimResult",
    "seeded",
    "train_network",
    "victim_digest",
]

Batches = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""(indices of cases, generator of what is random) -> inputs and truth of one batch, on the training's device."""

Learn = Callable[..., nn.Module]
"""(data as an arm is loaded, task, makes the untrained network) -> the network after an ordinary training; task and
network are those of the victim unless others are given."""


class Task(ABC):
    """What victims learn: how a case becomes a training item, what is minimized, and how a network is scored.

    A score that exists per class too is kept beside the headline metric, under the name ``f"{metric}_per_class"``.
    """

    name: ClassVar[str]
    """Starts the heading of a report."""
    metric: ClassVar[str]
    """Headline metric, a key of :py:meth:`evaluate`."""
    curve_points: ClassVar[int]
    """About how many epochs of a training are tested for its curve."""
    rules: ClassVar[Mapping[str, Any]] = {}
    """Arguments of :py:class:`monai_salm.verification.verdict.VerdictRules` that differ from its defaults."""
    controls: ClassVar[Mapping[str, Perturbation]] = {}
    """Perturbations that need no fit, by the name of the arm that the study makes of them."""
    not_tested: ClassVar[tuple[str, ...]] = ()
    """What a study of this task says nothing about, besides what no study does."""
    classes: tuple[str, ...]

    @property
    def note(self) -> str:
        """What the heading of a report must add, empty where there is nothing unusual."""
        return ""

    @property
    @abstractmethod
    def chance(self) -> float | None:
        """What guessing reaches; None where it is not defined."""

    @property
    @abstractmethod
    def learned(self) -> tuple[int, ...]:
        """Indices of the classes that training and test cases must have."""

    @property
    @abstractmethod
    def output(self) -> tuple[int, ...]:
        """Shape of a network's output for one training image."""

    @abstractmethod
    def describe(self) -> str:
        """What decides a training's result besides cases, network and recipe, always in the same words."""

    @abstractmethod
    def writer(self, path: Path) -> Any:
        """A writer of arms; its ``add`` takes what :py:meth:`view` and :py:meth:`truth` give."""

    @abstractmethod
    def view(self, unit: Tensor) -> Tensor:
        """(C, *) image that is kept, of a (C, *spatial) unit-intensity image on its native grid."""

    def warnings(self, shape: Sequence[int]) -> list[str]:
        """What the report must say of images whose largest spatial size is ``shape``: here nothing."""
        return []

    @abstractmethod
    def truth(self, case: Case, mask: np.ndarray | None, spacing: tuple[float, ...]) -> Any:
        """What is kept beside the image.

        Args:
            case: the case.
            mask: (1, *spatial) class indices on the native grid; None without voxel labels.
            spacing: mm per spatial axis, empty if unknown.
        """

    @abstractmethod
    def probe(self, data: Any) -> Tensor:
        """Two inputs, to try a network on."""

    @abstractmethod
    def count(self, data: Any) -> int:
        """Cases of an arm that was loaded."""

    @abstractmethod
    def part(self, data: Any, cases: Sequence[int]) -> Any:
        """Some cases of an arm that was loaded, by their places; a place may occur twice."""

    @abstractmethod
    def joined(self, data: Any, more: Any) -> Any:
        """The cases of two arms that were loaded."""

    @abstractmethod
    def mapped(self, data: Any, change: Callable[[Tensor], Tensor]) -> Any:
        """An arm that was loaded with each image changed; ``change`` takes and gives (C, *spatial) unit intensities."""

    @abstractmethod
    def batches(self, data: Any, seed: int, device: torch.device) -> Batches:
        """What a training draws its batches with; one seed gives the same views of the same cases in every arm."""

    @abstractmethod
    def losses(self, output: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """What is minimized, as ``"train_loss"``, and whatever else of a batch the curve shows; scalars."""

    @abstractmethod
    def evaluate(self, network: nn.Module, data: Any, batch_size: int, *, full: bool = True) -> dict[str, Any]:
        """Scores of a network on whole cases.

        Args:
            network: on the device to use; is set to evaluation mode.
            data: cases of an arm that was loaded.
            batch_size: most inputs of one pass.
            full: measure what costs much too.
        """


class Recipe:
    """How a training goes. This is the ordinary one; what a third party does otherwise overrides a part of it.

    One recipe is for one training. It asks ``generator`` for all that is random, and as much for any images, so that
    trainings of one seed can be compared in pairs.

    Args:
        clean: clean cases that the third party has, in the form that an arm is loaded in; None: it has none.
    """

    def __init__(self, clean: Any = None) -> None:
        self.clean = clean

    def data(self, task: Task, train: Any, test: Any) -> tuple[Any, Any]:
        """What is trained on, and what the network is given later, as an arm is loaded."""
        return train, test

    def network(self, make: Callable[[], nn.Module], learn: Learn) -> nn.Module:
        """The network to start from; ``learn`` gives one that was trained on what it is given."""
        return make()

    def losses(
        self, task: Task, network: nn.Module, images: Tensor, truth: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """As of :py:meth:`Task.losses`, of one batch."""
        return task.losses(network(images), truth)

    def end_epoch(self, task: Task, network: nn.Module, done: float) -> None:
        """What is done after each epoch, before the network is tested; ``done`` is the part of all epochs so far."""


@dataclass(frozen=True)
class VictimResult:
    """One training.

    Args:
        row: metrics on the test cases, ``seconds`` and ``curve``, as in ``arms`` of ``docs/report.md``.
        network: the trained network, in evaluation mode.
    """

    row: dict[str, Any]
    network: nn.Module


def train_network(
    task: Task,
    make: Callable[[], nn.Module],
    train: Any,
    test: Any,
    *,
    seed: int,
    epochs: int = 30,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    weight_decay: float = 1e-2,
    device: torch.device | str = "cpu",
    curve_points: int | None = None,
    recipe: Recipe | None = None,
) -> VictimResult:
    """Train one network with AdamW and a one-cycle learning rate, and test it.

    The last epoch counts: nothing is chosen by the test cases. One seed gives one start, order of cases and
    augmentation in every arm, so that arms can be compared in pairs. On CPU the same seed and number of threads give
    the same result; the global random state is left as it was. A training that diverged says nothing: its row has no
    metrics.

    Args:
        task: what is learned.
        make: builds the untrained network.
        train: cases of an arm that was loaded.
        test: clean held-out cases, of the same form.
        seed: of start, order and augmentation.
        epochs: passes over ``train``.
        batch_size: most cases in a batch; the batches of an epoch are of nearly equal size.
        learning_rate: highest rate of the one-cycle schedule.
        weight_decay: of AdamW.
        device: where to train.
        curve_points: at most about this many epochs are tested for the curve; default: the task's number.
        recipe: what is done otherwise; default: nothing.

    Raises:
        ValueError: When there is nothing to train or to test on.
    """
    count = task.count(train)
    if not count or not task.count(test):
        raise ValueError(f"{count} training and {task.count(test)} test cases; a victim needs at least one of each")
    device, start, recipe = torch.device(device), time.monotonic(), recipe or Recipe()
    rates = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    options: dict[str, Any] = {"seed": seed, "epochs": epochs, "batch_size": batch_size, **rates, "device": device}

    def learn(data: Any, task: Task = task, make: Callable[[], nn.Module] = make) -> nn.Module:
        return train_network(task, make, data, data, curve_points=1, **options).network

    train, test = recipe.data(task, train, test)
    count = task.count(train)
    n_batches, points = -(-count // batch_size), task.curve_points if curve_points is None else curve_points
    curve: list[dict[str, Any]] = []
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed, device):
        network = recipe.network(make, learn).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, learning_rate, total_steps=epochs * n_batches, cycle_momentum=False
        )
        batches = task.batches(train, seed, device)
        for epoch in range(1, epochs + 1):
            network.train()
            sums: dict[str, Tensor] = {}
            for chosen in torch.randperm(count, generator=generator).tensor_split(n_batches):
                images, truth = batches(chosen, generator)
                losses = recipe.losses(task, network, images, truth, generator)
                optimizer.zero_grad(set_to_none=True)
                losses["train_loss"].backward()
                optimizer.step()
                schedule.step()
                for name, value in losses.items():
                    sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach() * len(chosen)
            recipe.end_epoch(task, network, epoch / epochs)
            tested = epoch == epochs or epoch % max(1, epochs // points) == 0
            if tested:
                found = task.evaluate(network, test, batch_size, full=epoch == epochs)
            means = {name: float(value) / count for name, value in sums.items()}
            curve.append({"epoch": epoch, **means, task.metric: found[task.metric] if tested else None})
    if not all(bool(value.isfinite().all()) for value in network.state_dict().values()):
        found = {task.metric: None}
    return VictimResult({**found, "seconds": time.monotonic() - start, "curve": curve}, network.eval())


def victim_digest(make: Callable[[], nn.Module], images: Tensor, *output: int) -> str:
    """What tells one kind of victim from another: its layers, what they do, and the weights that it starts from.

    Args:
        make: builds the network.
        images: (B, C, *spatial) images to try it on.
        output: shape of what it must give for one image: the number of classes, and the image's size where every voxel
            has a class.

    Raises:
        ValueError: When its output does not fit the classes.
    """
    with seeded(0, torch.device("cpu")), torch.no_grad():
        network = make().eval()
        shape = tuple(network(images).shape)
    if shape != (len(images), *output):
        raise ValueError(
            f"a victim ({type(network).__name__}) gives {shape} for {len(images)} images of {output[0]} classes; "
            f"build it with {output[0]} outputs" + (f" of size {output[1:]}" if output[1:] else "")
        )
    kinds = sorted({type(module) for module in network.modules()}, key=str)
    digest = hashlib.sha256(f"{network} {[code_of(kind) for kind in kinds]}".encode())
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
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
