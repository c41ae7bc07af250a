# SPDX-License-Identifier: Apache-2.0
"""Arms of a study: what victims are trained on, read from files once and kept on disk as victims see it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from monai_salm.bank import PerturbationBank
from monai_salm.io.base import StoredImage
from monai_salm.perturbations.base import Objective, Perturbation
from monai_salm.perturbations.budget import Budget
from monai_salm.perturbations.masks import SparsityMask
from monai_salm.perturbations.salm import RandomSign
from monai_salm.stored import lattice_of

__all__ = [
    "RANDOM_NOISE",
    "Arm",
    "ArmWriter",
    "Deltas",
    "Volume",
    "VolumeArm",
    "VolumeWriter",
    "applied",
    "delta_of",
    "perturbed",
]

RANDOM_NOISE = RandomSign(mask=SparsityMask(ratio=1.0))
"""The control of equal budget: every voxel moves as far as it may, in a random direction."""

Deltas = Mapping[str, Any]
"""(C, *spatial) integer lattice steps by ``sample_id``: a ``PerturbationBank``, or arrays, or tensors."""


@dataclass(frozen=True)
class Arm:
    """Labeled images in a scratch file, so that worker processes share them and memory need not hold all arms.

    Args:
        path: raw float32 values.
        shape: (N, C, *spatial).
        labels: N class indices.
        digest: of images and labels.
    """

    path: Path
    shape: tuple[int, ...]
    labels: tuple[int, ...]
    digest: str

    @property
    def count(self) -> int:
        """Number of cases."""
        return len(self.labels)

    def load(self) -> tuple[Tensor, Tensor]:
        """Images, mapped from the file (writing to them does not change it), and labels."""
        images = np.memmap(self.path, np.float32, "c", shape=self.shape)
        return torch.from_numpy(images), torch.tensor(self.labels)


class ArmWriter:
    """Writes an arm of images of one size, one at a time.

    Args:
        path: file to create.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._stream = path, path.open("wb")
        self._labels: list[int] = []
        self._shape: tuple[int, ...] = ()
        self._digest = hashlib.sha256()

    def add(self, image: Tensor, label: int) -> None:
        """Append a (C, *spatial) image."""
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


@dataclass(frozen=True)
class Volume:
    """One labeled image.

    Args:
        image: (1, *spatial) unit intensities.
        label: (1, *spatial) class indices, uint8.
        spacing: mm per spatial axis, empty if unknown.
    """

    image: Tensor
    label: Tensor
    spacing: tuple[float, ...] = ()


@dataclass(frozen=True)
class VolumeArm:
    """Images that have a size of their own and a class per voxel, in two scratch files.

    Args:
        path: raw float32 values, one image behind the other.
        labels: raw uint8 class indices.
        shapes: of the images, (1, *spatial) each.
        spacings: mm per spatial axis of each, empty if unknown.
        digest: of all of these.
    """

    path: Path
    labels: Path
    shapes: tuple[tuple[int, ...], ...]
    spacings: tuple[tuple[float, ...], ...]
    digest: str

    @property
    def count(self) -> int:
        """Number of cases."""
        return len(self.shapes)

    def load(self) -> list[Volume]:
        """The cases, mapped from the files (writing to them does not change these)."""
        if not self.shapes:
            return []
        # One mapping per file: one per image would be a file descriptor per image.
        images, labels = np.memmap(self.path, np.float32, "c"), np.memmap(self.labels, np.uint8, "c")
        ends = np.cumsum([0, *(math.prod(shape) for shape in self.shapes)]).tolist()
        volumes = []
        for start, end, shape, spacing in zip(ends[:-1], ends[1:], self.shapes, self.spacings, strict=True):
            image, label = (torch.from_numpy(flat[start:end].reshape(shape)) for flat in (images, labels))
            volumes.append(Volume(image, label, spacing))
        return volumes


class VolumeWriter:
    """Writes an arm of labeled images of any size, one at a time.

    Args:
        path: file to create; labels go to a second one beside it.
    """

    def __init__(self, path: Path) -> None:
        self._paths = (path, path.with_suffix(".u8"))
        self._streams = tuple(each.open("wb") for each in self._paths)
        self._shapes: list[tuple[int, ...]] = []
        self._spacings: list[tuple[float, ...]] = []
        self._digest = hashlib.sha256()

    def add(self, image: Tensor, truth: tuple[Tensor, tuple[float, ...]]) -> None:
        """Append a (1, *spatial) image with its (1, *spatial) class indices and spacing.

        Raises:
            ValueError: When image and labels differ in shape.
        """
        label, spacing = truth
        if image.shape != label.shape:
            raise ValueError(
                f"an image is {tuple(image.shape)}, its label {tuple(label.shape)}; they must be of one shape"
            )
        for stream, values, dtype in zip(self._streams, (image, label), (torch.float32, torch.uint8), strict=True):
            content = values.to(dtype).contiguous().numpy().tobytes()
            stream.write(content)
            self._digest.update(content)
        self._shapes.append(tuple(image.shape))
        self._spacings.append(tuple(spacing))

    def close(self) -> VolumeArm:
        """What was written."""
        for stream in self._streams:
            stream.close()
        self._digest.update(repr((self._shapes, self._spacings)).encode())
        return VolumeArm(*self._paths, tuple(self._shapes), tuple(self._spacings), self._digest.hexdigest())


def applied(
    method: Perturbation, image: StoredImage, label: Tensor, budget: Budget, generator: torch.Generator
) -> np.ndarray:
    """Perturbation of one image by a method that asks no network.

    Args:
        method: one that never calls the objective.
        image: the clean image.
        label: (1, ...) class index, or (1, 1, *spatial) class indices.
        budget: the bound.
        generator: of what is random.

    Returns:
        (C, *spatial) lattice steps.
    """
    stored = torch.from_numpy(image.stored)
    unused = Objective(nn.Identity(), nn.functional.cross_entropy)
    unit, lattice = image.codec.to_unit(stored)[None], lattice_of([stored], [image.codec], budget)
    return method(unused, unit, label, lattice, generator=generator)[0].numpy()


def perturbed(image: StoredImage, delta: Any) -> Tensor:
    """(C, *spatial) unit intensities of an image with (C, *spatial) lattice steps added, in the original's window."""
    steps = delta.numpy() if isinstance(delta, Tensor) else np.asarray(delta)
    return image.codec.to_unit(torch.from_numpy(image.codec.add(image.stored, steps)))


def delta_of(deltas: Deltas, sample_id: str, image: StoredImage, what: str) -> Any:
    """One case's perturbation; a bank checks that it belongs to this image.

    Args:
        deltas: perturbations of all cases.
        sample_id: the case.
        image: its clean image.
        what: names ``deltas`` in an error.

    Returns:
        (C, *spatial) lattice steps.

    Raises:
        ValueError: When there is none, or it belongs to another image.
    """
    try:
        if isinstance(deltas, PerturbationBank):
            return deltas.load(sample_id, image.stored, step=image.codec.step)
        return deltas[sample_id]
    except KeyError as error:
        raise ValueError(f"{what} have no perturbation for {sample_id}; make one for every case") from error
