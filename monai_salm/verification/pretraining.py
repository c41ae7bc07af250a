# SPDX-License-Identifier: Apache-2.0
"""Networks that have learned something else before they see a released image: from a file, or from the images alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from monai_salm.surrogates import ResizeView
from monai_salm.verification.training import Learn, Recipe, Task

__all__ = ["SelfSupervised", "from_weights", "last_linear"]

TURNS = 4
"""By 0, 90, 180 and 270 degrees."""


def last_linear(network: nn.Module) -> tuple[str, nn.Linear]:
    """The head of a classifier and its name.

    Raises:
        ValueError: When the network has no linear layer.
    """
    found = [(name, part) for name, part in network.named_modules() if name and isinstance(part, nn.Linear)]
    if not found:
        raise ValueError(
            f"a victim ({type(network).__name__}) has no linear layer to renew; leave out frozen_encoder, "
            "self_supervised and weights from a file"
        )
    return found[-1]


def from_weights(make: Callable[[], nn.Module], path: str | Path) -> nn.Module:
    """A victim that starts from weights on disk; its last linear layer is new, whatever the file has there.

    Args:
        make: builds the untrained network.
        path: state dict as ``torch.save`` writes it, or a dictionary that has one as ``"state_dict"``; the ``module.``
            that ``DataParallel`` puts before names is taken away. Nothing in the file is executed.

    Raises:
        ValueError: When the file holds no state dict, or its names or shapes are not those of the network.

    Example:
        >>> from functools import partial
        >>> from monai_salm.surrogates import SmallCNN
        >>> victim = partial(from_weights, partial(SmallCNN, 2, 1, 2), "weights.pt")
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state) if isinstance(state, Mapping) else {}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{Path(path).name} holds no state dict; write it with torch.save(network.state_dict(), ...)")
    network = make()
    return _started(network, {name.removeprefix("module."): value for name, value in state.items()}, Path(path).name)


def _started(network: nn.Module, state: Mapping[str, Tensor], source: str) -> nn.Module:
    """``network`` with all weights of ``state`` but those of the last linear layer."""
    head = last_linear(network)[0] + "."
    wanted = {name: value for name, value in network.state_dict().items() if not name.startswith(head)}
    given = {name: value for name, value in state.items() if not name.startswith(head)}
    # A count that decides nothing here, and that old files lack.
    missing = [name for name in wanted.keys() - given.keys() if not name.endswith("num_batches_tracked")]
    shapes = [name for name in wanted.keys() & given.keys() if wanted[name].shape != given[name].shape]
    wrong = {"lacks": missing, "has besides": given.keys() - wanted.keys(), "has another shape of": shapes}
    said = [f"{how} {', '.join(sorted(names))}" for how, names in wrong.items() if names]
    if said:
        raise ValueError(f"{source} does not fit {type(network).__name__}: it {'; it '.join(said)}")
    network.load_state_dict(given, strict=False)
    return network


class SelfSupervised(Recipe):
    """Starts from a network that learned by how far images are turned (arXiv 1803.07728).

    It sees the released ones and, where there are some, the third party's own clean ones (a study gives it none),
    without any labels, all in all four turns, in 3D about one axis; the augmentation is that of the training, without
    flips, which would make some turns alike.
    """

    def data(self, task: Task, train: Any, test: Any) -> tuple[Any, Any]:
        self.task, self.seen = task, train if self.clean is None else task.joined(train, self.clean)
        return train, test

    def network(self, make: Callable[[], nn.Module], learn: Learn) -> nn.Module:
        images, _ = self.seen
        resize = ResizeView(images.shape[2:])  # where axes differ in length
        turned = torch.cat([resize(images.rot90(turn, (2, 3))) for turn in range(TURNS)])
        turns = torch.arange(TURNS).repeat_interleave(len(images))
        learned = learn((turned, turns), _to_tell_turns(self.task), partial(_of_turns, make))
        return _started(make(), learned.state_dict(), "the network that tells turns")


def _of_turns(make: Callable[[], nn.Module]) -> nn.Module:
    network = make()
    name, head = last_linear(network)
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, nn.Linear(head.in_features, TURNS))
    return network


def _to_tell_turns(task: Any) -> Any:
    augment = copy(task.augment)
    if augment is not None:
        augment.flip = False
    return replace(task, classes=tuple(f"{90 * turn} degrees" for turn in range(TURNS)), augment=augment)
