# SPDX-License-Identifier: Apache-2.0
"""The data sets of the arena: what is protected, what victims are tested on, and clean cases that a third party has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arena_colors import KINDS, write_colors
from arena_slices import write_slices
from monai.data import CacheDataset
from torch import Tensor

from monai_salm.cohorts.demo import write_demo_export
from monai_salm.io.base import Case, StoredImage
from monai_salm.records import image_digest
from monai_salm.release.labels import Cohort, load_cohort
from monai_salm.surrogates import ResizeView
from monai_salm.transforms import LoadStoredd
from monai_salm.transforms.meta import codec_of, meta_of, stored_array
from monai_salm.verification.arms import Deltas, perturbed

__all__ = ["DataSet", "Part", "drawn", "load", "part_of", "stratified"]


@dataclass(frozen=True)
class Part:
    """Some cases of a data set.

    Args:
        dataset: items ``{"image": stored values, "label": class index}``.
        size: of what victims see.
    """

    dataset: CacheDataset
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


@dataclass(frozen=True)
class DataSet:
    """Three parts; of an archive as its splits have them.

    Args:
        classes: their names.
        train: what is protected.
        test: clean, for the test of victims.
        spare: clean cases of the third party's own.
        fit_size: of what the surrogate sees.
    """

    classes: tuple[str, ...]
    train: Part
    test: Part
    spare: Part
    fit_size: tuple[int, ...]


def load(settings: Mapping[str, Any], data: Path, work: Path) -> DataSet:
    """A data set of the arena.

    Args:
        settings: ``size`` of what victims see, three numbers for volumes; ``fit_size`` of what the surrogate sees, if
            that is another; ``train``: how many cases, as many of each
            class; ``split`` that is tested on; ``spare``: how many clean cases the third party has; those with the
            pixels of a training or test case are passed over. Either ``archive`` names a MedMNIST archive in ``data``,
            or ``slices`` a Decathlon folder there, whose slices make ``classes`` classes, or ``colors`` a kind of
            simulated color images (of all three, ``spare_split`` is where spare cases come from), or ``demo`` is the
            seed of a demo cohort (then they come from the cohort of the next seed).
        data: folder of the archives.
        work: folder where demo cohorts are written.

    Raises:
        ValueError: When a class has too few cases.
    """
    size, split, spare = tuple(settings["size"]), settings["split"], settings["spare"]
    if "demo" in settings:
        cohort, others = (_demo(work, len(size), settings["demo"] + offset) for offset in (0, 1))
        spare_split = "train"
    else:
        if "archive" in settings:
            archive = data / settings["archive"]
        else:
            archive = _colors(work, settings) if "colors" in settings else _slices(work, data, settings)
        cohort = others = load_cohort(archive, spatial_dims=len(size))
        spare_split = settings["spare_split"]
    if others is cohort and spare_split in ("train", split):
        raise ValueError(f"spare_split is {spare_split!r}; the third party's cases must be none of train and {split}")
    tested = [case for case in cohort.cases if case.split == split]
    train = part_of(drawn(cohort, settings["train"], "train"), size)
    test = part_of(tested, size)
    own = part_of(drawn(others, spare, spare_split, _seen(others, spare_split, train, test)), size)
    return DataSet(tuple(cohort.classes), train, test, own, tuple(settings.get("fit_size", size)))


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


def _demo(work: Path, dims: int, seed: int) -> Cohort:
    folder = work / f"demo-{dims}d-{seed}"
    write_demo_export(folder, dims, seed, progress=False)
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


def stratified(labels: Tensor, share: float, seed: int) -> np.ndarray:
    """Places of a share of the cases of each class."""
    generator = np.random.default_rng(seed)
    chosen = []
    for label in labels.unique().tolist():
        members = np.flatnonzero(labels.numpy() == label)
        chosen.append(generator.permutation(members)[: round(share * len(members))])
    return np.sort(np.concatenate(chosen))
