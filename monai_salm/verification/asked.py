# SPDX-License-Identifier: Apache-2.0
"""The arguments of a study, checked before hours of a fit are spent for one that cannot be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from monai_salm.errors import check_number, check_size
from monai_salm.release.labels import Cohort
from monai_salm.surrogates import RandomView
from monai_salm.verification.segmenters import Segmentation, Transforms
from monai_salm.verification.training import Task, victim_digest
from monai_salm.verification.victims import Classification

__all__ = ["check_settings", "check_victims", "seeds_of", "task_of"]


def seeds_of(seeds: Sequence[int] | int) -> list[int]:
    """Seeds of the trainings, from a list of them or from their number.

    Raises:
        ValueError: When one is no whole number, or there are none.
    """
    if not isinstance(seeds, Sequence) or isinstance(seeds, str):
        check_number("seeds", seeds, least=1, most=1e4, whole=True)
        seeds = range(seeds)
    for seed in seeds:
        check_number("a seed", seed, whole=True)
    return [int(seed) for seed in seeds]


def task_of(
    cohort: Cohort,
    spatial_size: tuple[int, ...],
    augment: RandomView | None,
    transforms: Transforms | None,
    resample: float,
) -> Task:
    """What victims learn: to segment where voxels have labels, else to classify.

    Raises:
        ValueError: When an argument belongs to the other task.
    """
    classes = tuple(cohort.classes)
    if cohort.voxelwise:
        if augment is not None:
            raise ValueError("victims that segment are augmented by transforms=..., not by augment=...")
        return Segmentation(classes, spatial_size, transforms, resample)
    if transforms is not None or resample != 1.0:
        raise ValueError("transforms and resample are for cohorts with voxel labels; use augment and spatial_size")
    return Classification(classes, augment, spatial_size)


def check_settings(
    spatial_dims: int,
    spatial_size: Sequence[int],
    victims: Mapping[str, Any],
    seeds: Sequence[int],
    recipe: Mapping[str, float],
    workers: int | None,
) -> None:
    """Check what is a number, and that there are victims and different seeds.

    Raises:
        ValueError: When a setting is out of range.
    """
    check_size("spatial_size", spatial_size, spatial_dims)
    for name in ("epochs", "batch_size"):
        check_number(f"{name} of victims", recipe[name], least=1, most=1e9, whole=True)
    check_number("learning_rate of victims", recipe["learning_rate"], above=0, most=1000)
    if workers is not None:
        check_number("workers", workers, least=1, most=1e4, whole=True)
    if not victims or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"a study needs a victim and different seeds; got {list(victims)} and {list(seeds)}")


def check_victims(
    victims: Mapping[str, Callable[[], nn.Module]], size: Sequence[int], n_classes: int, voxelwise: bool
) -> None:
    """Try each kind of victim once.

    Args:
        victims: functions that build an untrained network, by name.
        size: (C, *spatial) of its input.
        n_classes: classes of the cohort.
        voxelwise: whether every voxel has a class.

    Raises:
        ValueError: When one cannot be built, cannot take such images, or its output does not fit the classes.
    """
    for name, make in victims.items():
        try:
            victim_digest(make, torch.zeros(1, *size), n_classes, *(size[1:] if voxelwise else ()))
        except Exception as error:  # whatever networks raise
            said = str(error).partition("\n")[0]
            raise ValueError(
                f"victim {name!r} cannot be trained on images of {tuple(size[1:])} with {n_classes} classes ({said}); "
                "change it, num_classes or spatial_size, whose sides must be multiples of a network's total stride"
            ) from error
