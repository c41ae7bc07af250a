# SPDX-License-Identifier: Apache-2.0
"""A cohort as the fit sees it: facts of each case, and batches of what the surrogate trains on."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from monai.transforms import Compose, RandomizableTrait
from monai.utils import CommonKeys
from torch import Tensor
from torch.utils.data import Dataset

from monai_salm.errors import check_size
from monai_salm.perturbations.base import Batch, Objective
from monai_salm.perturbations.budget import Budget, Lattice
from monai_salm.perturbations.codes import Examples, class_codes, voxel_codes
from monai_salm.perturbations.voxels import IGNORED
from monai_salm.records import as_array, image_digest
from monai_salm.release.progress import track
from monai_salm.stored import StoredCodec, lattice_of
from monai_salm.transforms.meta import codec_of, meta_of, plain_tensor, stored_array, told

CODE_STRENGTH = (1.0, 4.0)
"""Class codes are shown at random strengths between these multiples of the budget: weak ones alone are not learned."""
VOXELS_AT_ONCE = 2**25
"""Most voxels of the images that are perturbed together: about 1.5 GB of intermediate values."""
EXAMPLES, EACH = 2**22, 8
"""Voxels, as the network sees them, of the images that tell which class gets which code; of each class at least so
many images, however large."""
EXPECTED_RMS = 0.5
"""What a perturbation is expected to change in the mean (root mean square), as a part of the budget."""
FOREGROUND_PATCHES = 0.75
"""Part of the patches that lie around a labeled voxel, where there is one; the others lie anywhere."""

Sample = tuple[Tensor, Tensor, Tensor]
"""Image and perturbation (C, *size) in unit intensity, and label; or (B, C, *size) and labels of a batch."""


@dataclass(frozen=True)
class Facts:
    """What the fit keeps of a case in memory; its voxels it reads again when they are needed.

    Args:
        sample_id: the case.
        label: class index, or the digest of its voxel labels.
        codec: how to read its stored values.
        shape: (C, *spatial) of its image.
        digest: of its stored image, see :py:func:`monai_salm.records.image_digest`.
        levels: most lattice steps that the budget allows in it.
    """

    sample_id: str
    label: int | str
    codec: StoredCodec
    shape: tuple[int, ...]
    digest: str
    levels: int


class Cases:
    """The cases of a dataset, read once.

    Args:
        dataset: items ``{"image": stored values from LoadStored, "label": class index}``, or with voxel labels, which
            are (1, *spatial) class indices; the same ones at every reading.
        budget: largest change of a voxel.
        device: where tensors are handed out.

    Raises:
        ValueError: When the dataset is empty, an id occurs twice, the budget does not fit an image, an image and its
            voxel labels differ in shape, or the dataset's transform is random.
    """

    def __init__(self, dataset: Dataset, budget: Budget, device: torch.device) -> None:
        if random := _first_random(getattr(dataset, "transform", None)):
            raise ValueError(
                f"{random} changes an image at every reading, and its perturbation belongs to the file as it is; leave "
                "it out of the dataset's transform: random views are the view of the objective"
            )
        self.dataset, self.device = dataset, device
        self.n_classes, self.voxelwise = 0, False
        self.facts = [self._examine(at, budget) for at in track(range(len(dataset)), "reading")]  # type: ignore[arg-type]
        if not self.facts or len({fact.sample_id for fact in self.facts}) < len(self.facts):
            raise ValueError(
                f"the dataset has {len(self.facts)} cases; it needs at least one, and every sample_id only once"
            )

    def __len__(self) -> int:
        return len(self.facts)

    def stored(self, at: int) -> Tensor:
        """(C, *spatial) stored values, on the device that they were loaded to."""
        return plain_tensor(self.dataset[at][CommonKeys.IMAGE])

    def unit(self, at: int) -> Tensor:
        """(C, *spatial) unit intensities."""
        return self.facts[at].codec.to_unit(self.stored(at).to(self.device))

    def read(self, batch: Sequence[int], budget: Budget) -> Batch:
        """Unit intensities, labels and lattice of cases of one shape."""
        stored, codecs = [self.stored(at) for at in batch], [self.facts[at].codec for at in batch]
        if len(set(codecs)) == 1 and codecs[0].slices is None:  # as in an archive: one reading for all
            values = torch.stack(stored).to(self.device)
            steps = torch.full((len(batch), *[1] * (values.ndim - 1)), codecs[0].unit_step, device=self.device)
            lattice = Lattice(*codecs[0].bounds(values, budget), steps)
            return Batch(codecs[0].to_unit(values), self.labels(batch), lattice)
        stored = [values.to(self.device) for values in stored]
        image = torch.stack([codec.to_unit(values) for codec, values in zip(codecs, stored, strict=True)])
        return Batch(image, self.labels(batch), lattice_of(stored, codecs, budget))

    def label(self, at: int) -> Tensor:
        """Class index, or (1, *spatial) class indices, on the device that they were loaded to."""
        return _label(self.dataset[at]) if self.voxelwise else torch.tensor(self.facts[at].label)

    def labels(self, batch: Sequence[int]) -> Tensor:
        """(B,) class indices, or (B, 1, *spatial) of cases of one shape."""
        return torch.stack([self.label(at) for at in batch]).to(self.device)

    def unit_delta(self, at: int, delta: Tensor) -> Tensor:
        """A case's perturbation in unit intensity."""
        delta = delta.to(self.device).float()
        return delta * self.facts[at].codec.unit_steps(delta)

    def unit_budget(self, at: int) -> float:
        """A case's budget in unit intensity."""
        return self.facts[at].levels * abs(self.facts[at].codec.unit_step)

    def batches(self, batch_size: int) -> list[list[int]]:
        """Positions of cases of one shape, as many at a time as batch size and memory allow."""
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for at, fact in enumerate(self.facts):
            by_shape.setdefault(fact.shape, []).append(at)
        batches = []
        for shape, group in by_shape.items():
            size = max(1, min(batch_size, VOXELS_AT_ONCE // math.prod(shape)))
            batches += [group[i : i + size] for i in range(0, len(group), size)]
        return batches

    def _examine(self, at: int, budget: Budget) -> Facts:
        item = self.dataset[at]
        image, label = item[CommonKeys.IMAGE], _label(item)
        known = told(item, CommonKeys.IMAGE)
        codec = codec_of(image, known["codec"])
        stored = stored_array(image, codec)
        self.n_classes = max(self.n_classes, 1 + int(label.max()))
        sample_id, target = meta_of(image, "sample_id", known["sample_id"]), int(label) if label.ndim == 0 else ""
        if label.ndim:
            self.voxelwise = True
            target = hashlib.sha256(as_array(label).tobytes()).hexdigest()
            if tuple(label.shape) != stored.shape:
                raise ValueError(
                    f"{sample_id}: image {stored.shape} and voxel labels {tuple(label.shape)} differ in shape; "
                    "load both with LoadStored and LoadMask"
                )
        return Facts(sample_id, target, codec, stored.shape, image_digest(stored), codec.levels(budget))


def _first_random(transform: object) -> str:
    """Name of a random transform in it; empty where there is none."""
    if type(transform) is Compose:  # which counts as random, whatever is in it
        return next(filter(None, map(_first_random, transform.transforms)), "")
    return type(transform).__name__ if isinstance(transform, RandomizableTrait) else ""


def _label(item: Mapping[str, object]) -> Tensor:
    label = item[CommonKeys.LABEL]
    return plain_tensor(label) if isinstance(label, Tensor) else torch.tensor(int(label))  # type: ignore[call-overload]


class Samples(ABC):
    """What a surrogate trains on: images beside perturbations. A case that has none yet shows a class code or zeros.

    Args:
        cases: the cohort.
        size: of a sample in voxels, one number for each axis.
        coded: show class codes where there is no perturbation yet.
        seed: of the codes.
    """

    def __init__(self, cases: Cases, size: Sequence[int], *, coded: bool, seed: int) -> None:
        self.cases, self.size, self.coded, self.seed = cases, tuple(size), coded, seed

    def __call__(self, batch: Sequence[int], deltas: Mapping[str, Tensor], generator: torch.Generator) -> Sample:
        """Samples of the cases at positions ``batch``, of which ``deltas`` has perturbations by sample id."""
        parts = [self.sample(at, deltas.get(self.cases.facts[at].sample_id), generator) for at in batch]
        image, delta, label = (torch.stack(part).to(self.cases.device) for part in zip(*parts, strict=True))
        return image, delta, label

    @abstractmethod
    def sample(self, at: int, delta: Tensor | None, generator: torch.Generator) -> Sample:
        """One sample of the case at a position.

        Args:
            at: position in the cohort.
            delta: (C, *spatial) lattice steps on the image's own grid; None: there are none yet.
            generator: of what is random.
        """

    def strength(self, at: int, generator: torch.Generator) -> float:
        """Amplitude of a code in unit intensity."""
        factor = torch.empty(()).uniform_(*CODE_STRENGTH, generator=generator)
        return float(factor) * self.cases.unit_budget(at)

    @cached_property
    @abstractmethod
    def codes(self) -> Tensor:
        """(n_classes, 1, *size) textures."""


class ResizedImages(Samples):
    """Whole images at the size that a network sees.

    Args:
        view: resizes (B, C, *native) images to ``size``.
    """

    def __init__(self, cases: Cases, size: Sequence[int], view: torch.nn.Module, *, coded: bool, seed: int) -> None:
        super().__init__(cases, size, coded=coded, seed=seed)
        self.view = view
        self._seen: dict[int, Tensor] = {}

    @cached_property
    def codes(self) -> Tensor:
        count = self.cases.n_classes
        most = max(EACH, EXAMPLES // math.prod(self.size) // count)
        classes = [[at for at, fact in enumerate(self.cases.facts) if fact.label == label] for label in range(count)]
        # Evenly spaced: neighbors may be slices of one patient.
        shown = [at for members in classes for at in members[:: max(1, math.ceil(len(members) / most))]]
        labels = torch.tensor([self.cases.facts[at].label for at in shown])
        budget = sum(map(self.cases.unit_budget, shown)) / len(shown)
        examples = Examples(map(self._image, shown), labels, EXPECTED_RMS * budget)
        return class_codes(self.size, count, self.seed, examples).to(self.cases.device)

    def sample(self, at: int, delta: Tensor | None, generator: torch.Generator) -> Sample:
        image, label = self._image(at), self.cases.label(at)
        if delta is not None:
            return image, self.view(self.cases.unit_delta(at, delta)[None])[0], label
        if self.coded:
            return image, self.strength(at, generator) * self.codes[int(label)].expand_as(image), label
        return image, torch.zeros_like(image), label

    def _image(self, at: int) -> Tensor:
        if at not in self._seen:
            self._seen[at] = self.view(self.cases.unit(at)[None])[0]
        return self._seen[at]


class Patches(Samples):
    """Patches of volumes with voxel labels, most of them around a labeled voxel; small volumes are padded."""

    @cached_property
    def codes(self) -> Tensor:
        return voxel_codes(self.size, self.cases.n_classes, self.seed).to(self.cases.device)

    def sample(self, at: int, delta: Tensor | None, generator: torch.Generator) -> Sample:
        label = self.cases.label(at)
        corner = self._corner(label[0], generator)
        stored = self._cut(self.cases.stored(at), corner).to(self.cases.device)
        codec = self.cases.facts[at].codec.part([max(0, first) for first in corner], stored.shape[1:])
        image = self._padded(codec.to_unit(stored), corner, 0)
        label = self._padded(self._cut(label, corner).to(self.cases.device), corner, IGNORED)
        if delta is not None:
            steps = self._cut(delta, corner).to(self.cases.device).float()
            return image, self._padded(steps * codec.unit_steps(steps), corner, 0), label
        if self.coded:
            shifts = [int(torch.randint(size, (), generator=generator)) for size in self.size]
            codes = self.codes.roll(shifts, tuple(range(2, 2 + len(shifts))))
            inside = label != IGNORED
            index = (label * inside).long()
            return image, self.strength(at, generator) * codes.gather(0, index[None])[0] * inside, label
        return image, torch.zeros_like(image), label

    def _corner(self, label: Tensor, generator: torch.Generator) -> list[int]:
        """First voxel of a patch, per axis; negative where the volume is smaller than the patch."""
        room = [length - size for length, size in zip(label.shape, self.size, strict=True)]
        labeled = label.nonzero() if torch.rand((), generator=generator) < FOREGROUND_PATCHES else label.new_empty(0)
        if len(labeled):
            center = labeled[int(torch.randint(len(labeled), (), generator=generator))].tolist()
            shift = [int(torch.randint(size, (), generator=generator)) for size in self.size]
            return [
                min(max(at - back, 0), left) if left > 0 else left // 2
                for at, back, left in zip(center, shift, room, strict=True)
            ]
        return [int(torch.randint(left + 1, (), generator=generator)) if left > 0 else left // 2 for left in room]

    def _cut(self, volume: Tensor, corner: Sequence[int]) -> Tensor:
        """What of a (1, *spatial) volume lies in the patch."""
        places = zip(corner, self.size, volume.shape[1:], strict=True)
        spans = [slice(max(0, at), min(length, at + size)) for at, size, length in places]
        return volume[(slice(None), *spans)]

    def _padded(self, part: Tensor, corner: Sequence[int], fill: float) -> Tensor:
        """The patch, ``fill`` where the volume is smaller."""
        places = zip(corner, part.shape[1:], self.size, strict=True)
        sides = [(max(0, -at), size - length - max(0, -at)) for at, length, size in places]
        padding = [voxels for before, after in sides[::-1] for voxels in (before, after)]
        return F.pad(part, padding, value=fill)


def samples_of(
    cases: Cases, objective: Objective, patch_size: Sequence[int] | None, *, coded: bool, seed: int
) -> Samples:
    """What an objective's surrogate trains on: whole images, or patches of volumes with voxel labels.

    Args:
        cases: the cohort.
        objective: has the surrogate, and with voxel labels the size of a tile.
        patch_size: with voxel labels, of a patch; None: that of a tile.
        coded, seed: as of :py:class:`Samples`.

    Raises:
        ValueError: When a size is none for these images, or there is none.
    """
    if cases.voxelwise:
        tile_size = getattr(objective, "tile_size", None)
        size = tile_size if patch_size is None else patch_size
        if size is None:
            raise ValueError("voxel labels need the objective that works tile by tile, VoxelObjective, or a patch_size")
        dims = len(cases.facts[0].shape) - 1
        size = check_size("patch_size", size, dims)
        check_size("tile_size", tile_size or size, dims)
        return Patches(cases, size, coded=coded, seed=seed)
    view = objective.network.view
    if not hasattr(view, "spatial_size"):
        raise ValueError(
            "the surrogate sees each image on its own grid, and images that have labels as a whole are trained on in "
            "one size: give the surrogate a spatial_size"
        )
    return ResizedImages(cases, view.spatial_size, view, coded=coded, seed=seed)


class Steps:
    """Endless batches of positions: a new order for every pass, a function of seed and step number alone."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed, self.start = count, min(batch_size, count), seed, 0

    def __iter__(self) -> Iterator[list[int]]:
        step, per_pass = self.start, self.count // self.batch_size
        while True:
            order = torch.randperm(self.count, generator=generator_of(self.seed, "order", step // per_pass)).tolist()
            for at in range(step % per_pass, per_pass):
                yield order[at * self.batch_size : (at + 1) * self.batch_size]
                step += 1


def derive(*parts: object) -> int:
    """A seed that follows from ``parts`` alone, such as the seed of a run and a place in it."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def generator_of(*parts: object) -> torch.Generator:
    """A CPU generator that begins at the seed of ``parts``, whatever was drawn elsewhere before."""
    return torch.Generator().manual_seed(derive(*parts))
