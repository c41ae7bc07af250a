# SPDX-License-Identifier: Apache-2.0
"""The data sets of the arena: what is protected, what victims are tested on, and clean cases that a third party has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arena_colors import KINDS, write_colors
from arena_slices import write_slices
from monai.data import CacheDataset
from monai.transforms import Compose
from torch import Tensor

from monai_salm.cohorts.demo import write_demo_export
from monai_salm.engines.cases import generator_of
from monai_salm.io import formats
from monai_salm.io.base import Case, StoredImage, window_of
from monai_salm.records import image_digest
from monai_salm.release.labels import Cohort, load_cohort
from monai_salm.surrogates import ResizeView
from monai_salm.transforms import LoadMaskd, LoadStoredd
from monai_salm.transforms.meta import codec_of, meta_of, plain_tensor, stored_array
from monai_salm.verification.arms import Deltas, perturbed

__all__ = ["DataSet", "Part", "VoxelPart", "drawn", "load", "part_of", "stratified", "voxelwise"]


@dataclass(frozen=True)
class Part:
    """Some cases of a data set.

    Args:
        dataset: items ``{"image": stored values, "label": class index}``.
        size: of what victims see.
    """

    dataset: Sequence[Mapping[str, Any]]
    size: tuple[int, ...]

    @cached_property
    def images(self) -> dict[str, StoredImage]:
        """Stored images by ``sample_id``."""
        found = {}
        for item in self.dataset:
            codec = codec_of(item["image"], None)
            found[meta_of(item["image"], "sample_id")] = StoredImage(stored_array(item["image"], codec), codec)
        return found

    @cached_property
    def labels(self) -> Tensor:
        """(N,) class indices."""
        return torch.tensor([int(item["label"]) for item in self.dataset])

    def seen(self, deltas: Deltas | None = None) -> Tensor:
        """(N, C, *size) unit intensities as victims see them, with perturbations if there are any."""
        resize = ResizeView(self.size)
        units = (
            image.codec.to_unit(torch.from_numpy(image.stored)) if deltas is None else perturbed(image, deltas[name])
            for name, image in self.images.items()
        )
        return torch.cat([resize(unit[None]) for unit in units])

    @property
    def truths(self) -> Sequence[Any]:
        """What victims learn of each case, as their task keeps it."""
        return self.labels.tolist()

    def noise(self, seed: int) -> Tensor:
        """Uniform noise in place of the images that victims see."""
        channels = len(next(iter(self.images.values())).stored)
        return torch.rand(len(self.images), channels, *self.size, generator=generator_of("blind", seed))


class VoxelPart(Part):
    """Some cases with voxel labels, which victims see on their own grids, patch by patch.

    Args:
        dataset: items ``{"image": stored values, "label": (1, *spatial) class indices, "spacing": mm per axis}``.
        size: of a patch.
    """

    @cached_property
    def truths(self) -> Sequence[tuple[Tensor, tuple[float, ...]]]:
        """As :py:meth:`monai_salm.verification.segmenters.Segmentation.truth`."""
        return [(plain_tensor(item["label"]), item["spacing"]) for item in self.dataset]

    def seen(self, deltas: Deltas | None = None) -> list[Tensor]:
        """(1, *spatial) unit intensities; with perturbations in the window of the written NIfTI file, as in a study."""
        return [self._read(image, None if deltas is None else deltas[name]) for name, image in self.images.items()]

    def noise(self, seed: int) -> list[Tensor]:
        """As a study makes it."""
        generators = ((generator_of(seed, "blind", name), image) for name, image in self.images.items())
        return [torch.rand(image.stored.shape, generator=generator) for generator, image in generators]

    @staticmethod
    def _read(image: StoredImage, delta: Any) -> Tensor:
        stored, codec = image.stored, image.codec
        if delta is not None:
            stored = codec.add(stored, np.asarray(delta))
            codec = replace(codec, window=window_of(stored, "auto", codec.slope, codec.intercept))
        return codec.to_unit(torch.from_numpy(stored))


@dataclass(frozen=True)
class DataSet:
    """Three parts; of an archive as its splits have them.

    Args:
        classes: their names.
        train: what is protected, and victims are trained on.
        test: clean, for the test of victims.
        spare: clean cases of the third party's own.
        fit_size: of what the surrogate sees.
        released: all that is protected together, if that is more than ``train``.
    """

    classes: tuple[str, ...]
    train: Part
    test: Part
    spare: Part
    fit_size: tuple[int, ...]
    released: Part | None = None

    @property
    def fitted(self) -> Part:
        """What a fit is made to."""
        return self.train if self.released is None else self.released

    @property
    def voxelwise(self) -> bool:
        """Whether each voxel has its own label."""
        return isinstance(self.train, VoxelPart)


def voxelwise(settings: Mapping[str, Any]) -> bool:
    """Whether the settings are of a data set whose voxels have labels."""
    return "decathlon" in settings or settings.get("task") == "segmentation"


def load(settings: Mapping[str, Any], data: Path, work: Path) -> DataSet:
    """A data set of the arena.

    Args:
        settings: ``size`` of what victims see, three numbers for volumes; ``fit_size`` of what the surrogate sees, if
            that is another; ``train``: how many cases, as many of each
            class; ``split`` that is tested on; ``spare``: how many clean cases the third party has; those with the
            pixels of a training or test case are passed over. Either ``archive`` names a MedMNIST archive in ``data``,
            or ``slices`` a Decathlon folder there, whose slices make ``classes`` classes, or ``colors`` a kind of
            simulated color images (of all three, ``spare_split`` is where spare cases come from, and with ``reversed``
            the classes are in reverse order), or ``demo`` is the seed of a demo cohort (then spare cases come from the
            cohort of the next seed; ``patients``: how many each has). Voxel labels are those of a demo cohort with
            ``task: segmentation``, or of the Decathlon folder in ``data`` that ``decathlon`` names. Training and test
            cases, and what is fitted, are then those of a study; ``spare`` may be left out.
        data: folder of the archives.
        work: folder where demo cohorts are written.

    Raises:
        ValueError: When a class has too few cases.
    """
    if voxelwise(settings):
        return _with_voxel_labels(settings, data, work)
    size, split, spare = tuple(settings["size"]), settings["split"], settings["spare"]
    if "demo" in settings:
        cohort, others = (_demo(work, settings, offset) for offset in (0, 1))
        spare_split = "train"
    else:
        if "archive" in settings:
            archive = data / settings["archive"]
        else:
            archive = _colors(work, settings) if "colors" in settings else _slices(work, data, settings)
        cohort = load_cohort(archive, spatial_dims=len(size))
        cohort = others = _reversed(cohort) if settings.get("reversed") else cohort
        spare_split = settings["spare_split"]
    if others is cohort:
        _check_spare(spare_split, split)
    tested = [case for case in cohort.cases if case.split == split]
    train = part_of(drawn(cohort, settings["train"], "train"), size)
    test = part_of(tested, size)
    own = part_of(drawn(others, spare, spare_split, _seen(others, spare_split, train, test)), size)
    return DataSet(tuple(cohort.classes), train, test, own, tuple(settings.get("fit_size", size)))


def _reversed(cohort: Cohort) -> Cohort:
    last = len(cohort.classes) - 1
    cases = tuple(replace(case, label=last - case.label) for case in cohort.cases)
    return replace(cohort, cases=cases, classes=cohort.classes[::-1])


def _seen(cohort: Cohort, split: str, *parts: Part) -> set[str]:
    """Ids of the cases of a split whose pixels some other part has too: archives hold images twice."""
    known = {image_digest(image.stored) for part in parts for image in part.images.values()}
    own = part_of([case for case in cohort.cases if case.split == split], parts[0].size)
    return {name for name, image in own.images.items() if image_digest(image.stored) in known}


def drawn(cohort: Cohort, count: int, split: str, without: Set[str] = frozenset()) -> list[Case]:
    """``count`` cases of a split, as many of each class, in the cohort's order.

    Args:
        cohort: all cases.
        count: how many are wanted.
        split: of the cases.
        without: ids of cases that are passed over.

    Raises:
        ValueError: When a class has too few cases.
    """
    each, generator = count // len(cohort.classes), np.random.default_rng(0)
    chosen = set()
    for label, name in enumerate(cohort.classes):
        members = [case for case in cohort.cases if case.split == split and case.label == label]
        order = [members[at].sample_id for at in generator.permutation(len(members))]
        free = [one for one in order if one not in without]
        if len(free) < each or each < 1:
            raise ValueError(f"class {name} has {len(free)} {split} cases, {each} are asked for; ask for fewer")
        chosen |= set(free[:each])
    return [case for case in cohort.cases if case.sample_id in chosen]


def _check_spare(spare_split: str, split: str) -> None:
    if spare_split in ("train", split):
        raise ValueError(f"spare_split is {spare_split!r}; the third party's cases must be none of train and {split}")


def _with_voxel_labels(settings: Mapping[str, Any], data: Path, work: Path) -> DataSet:
    size, split, spare = tuple(settings["size"]), settings["split"], settings.get("spare", 0)
    if "demo" in settings:
        cohort = _demo(work, settings, 0)
        own = _demo(work, settings, 1).train if spare else ()
    else:
        cohort = load_cohort(data / settings["decathlon"], spatial_dims=len(size))
        if spare:
            _check_spare(settings["spare_split"], split)
        own = cohort.tested(settings["spare_split"]) if spare else ()
    if len(own) < spare:
        raise ValueError(f"there are {len(own)} spare cases, {spare} are asked for; ask for fewer")
    chosen = sorted(np.random.default_rng(0).permutation(len(own))[:spare])
    kept = {case.sample_id for case in cohort.train}
    released = _voxel_part(cohort.released, size)
    train = VoxelPart([item for item in released.dataset if meta_of(item["image"], "sample_id") in kept], size)
    test, others = _voxel_part(cohort.tested(split), size), _voxel_part([own[at] for at in chosen], size)
    return DataSet(tuple(cohort.classes), train, test, others, tuple(settings.get("fit_size", size)), released)


def _demo(work: Path, settings: Mapping[str, Any], offset: int) -> Cohort:
    dims, seed, task = len(settings["size"]), settings["demo"] + offset, settings.get("task", "classification")
    options = {name: settings[key] for name, key in (("task", "task"), ("n_patients", "patients")) if key in settings}
    name = f"{'lesions' if task == 'segmentation' else 'demo'}-{dims}d-{seed}"
    folder = work / (f"{name}-{settings['patients']}" if "patients" in settings else name)
    write_demo_export(folder, dims, seed, progress=False, **options)
    return load_cohort(folder, spatial_dims=dims)


def _slices(work: Path, data: Path, settings: Mapping[str, Any]) -> Path:
    name, classes, train = (settings[key] for key in ("slices", "classes", "train"))
    path = work / f"{name}-{classes}-{train}.npz"
    if not path.is_file():  # written by the first of all processes
        part = path.with_suffix(".part.npz")
        write_slices(data / name, part, classes, train)
        part.replace(path)
    return path


def _colors(work: Path, settings: Mapping[str, Any]) -> Path:
    kind, size, train = (settings[key] for key in ("colors", "size", "train"))
    folder = work / f"{kind}-{size[0]}-{train}"
    if not folder.is_dir():  # written by the first of all processes
        part, each = folder.with_suffix(".part"), train // len(KINDS[kind][0])
        write_colors(part, kind, size[0], {"train": each, "val": max(1, each // 2), "test": max(1, each // 2)})
        part.replace(folder)
    return folder


def part_of(cases: Sequence[Case], size: tuple[int, ...]) -> Part:
    """Some cases, read once; their images have as many axes as ``size``."""
    items = [{"image": case, "label": case.label} for case in cases]
    dataset = CacheDataset(items, LoadStoredd("image", spatial_dims=len(size)), copy_cache=False, progress=False)
    return Part(dataset, size)


def _voxel_part(cases: Sequence[Case], size: tuple[int, ...]) -> VoxelPart:
    """Some cases and their masks, read once."""
    dims = len(size)
    items = [{"image": case, "label": case, "spacing": formats.read_spacing(case, dims)} for case in cases]
    read = Compose([LoadStoredd("image", spatial_dims=dims), LoadMaskd("label", spatial_dims=dims)])
    return VoxelPart(CacheDataset(items, read, copy_cache=False, progress=False) if items else [], size)


def stratified(labels: Tensor, share: float, seed: int) -> np.ndarray:
    """Places of a share of the cases of each class."""
    generator = np.random.default_rng(seed)
    chosen = []
    for label in labels.unique().tolist():
        members = np.flatnonzero(labels.numpy() == label)
        chosen.append(generator.permutation(members)[: round(share * len(members))])
    return np.sort(np.concatenate(chosen))
