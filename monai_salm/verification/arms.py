# SPDX-License-Identifier: Apache-2.0
"""Arms of a study: what victims are trained on, read from files once and kept on disk at the victims' size."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from monai_salm.io.base import StoredImage
from monai_salm.perturbations.base import Objective
from monai_salm.perturbations.budget import Budget
from monai_salm.perturbations.masks import SparsityMask
from monai_salm.perturbations.salm import RandomSign
from monai_salm.stored import lattice_of

__all__ = ["Arm", "ArmWriter", "Deltas", "generator_of", "perturbed", "random_signs"]

Deltas = Mapping[str, Any]
"""(1, *spatial) integer lattice steps by ``sample_id``: a ``PerturbationBank``, or arrays, or tensors."""


@dataclass(frozen=True)
class Arm:
    """Labelled images in a scratch file, so that worker processes share them and memory need not hold all arms.

    Args:
        path: raw float32 values.
        shape: (N, 1, *spatial).
        labels: N class indices.
        digest: of images and labels.
    """

    path: Path
    shape: tuple[int, ...]
    labels: tuple[int, ...]
    digest: str

    def load(self) -> tuple[Tensor, Tensor]:
        """Images, mapped from the file (writing to them does not change it), and labels."""
        images = np.memmap(self.path, np.float32, "c", shape=self.shape)
        return torch.from_numpy(images), torch.tensor(self.labels)


class ArmWriter:
    """Writes an arm, one image at a time.

    Args:
        path: file to create.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._stream = path, path.open("wb")
        self._labels: list[int] = []
        self._shape: tuple[int, ...] = ()
        self._digest = hashlib.sha256()

    def add(self, image: Tensor, label: int) -> None:
        """Append a (1, *spatial) image."""
        content = image.to(torch.float32).contiguous().numpy().tobytes()
        self._stream.write(content)
        self._digest.update(content)
        self._labels.append(label)
        self._shape = tuple(image.shape)

    def close(self) -> Arm:
        """What was written."""
        self._stream.close()
        shape = (len(self._labels), *self._shape)
        self._digest.update(repr((shape, self._labels)).encode())
        return Arm(self._path, shape, tuple(self._labels), self._digest.hexdigest())


def generator_of(*parts: object) -> torch.Generator:
    """A generator that depends on ``parts`` only, not on the order of cases."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def random_signs(image: StoredImage, budget: Budget, generator: torch.Generator) -> np.ndarray:
    """The control of equal budget: every voxel moves as far as it may, in a random direction."""
    stored = torch.from_numpy(image.stored)
    method = RandomSign(mask=SparsityMask(ratio=1.0))
    blind = Objective(nn.Identity(), nn.functional.cross_entropy)  # RandomSign asks no network
    unit, lattice = image.codec.to_unit(stored)[None], lattice_of([stored], [image.codec], budget)
    return method(blind, unit, torch.zeros(1, dtype=torch.long), lattice, generator=generator)[0].numpy()


def perturbed(image: StoredImage, delta: Any) -> Tensor:
    """(1, *spatial) unit intensities of an image with a perturbation, read with the original's window."""
    steps = delta.numpy() if isinstance(delta, Tensor) else np.asarray(delta)
    return image.codec.to_unit(torch.from_numpy(image.codec.add(image.stored, steps)))


def delta_of(deltas: Deltas, sample_id: str, image: StoredImage, what: str) -> Any:
    """One case's perturbation, checked against its image where the bank can.

    Raises:
        ValueError: When there is none, or it belongs to another image.
    """
    load: Callable[..., Any] | None = getattr(deltas, "load", None)
    try:
        return load(sample_id, image.stored, step=image.codec.step) if load else deltas[sample_id]
    except KeyError as error:
        raise ValueError(f"{what} have no perturbation for {sample_id}; make one for every case") from error
