# SPDX-License-Identifier: Apache-2.0
"""What a study is asked for, checked before hours of a fit are spent for one that cannot be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn

from monai_salm.release.labels import Cohort
from monai_salm.verification.defenses import defenses_of
from monai_salm.verification.training import victim_digest

__all__ = ["check_settings", "check_study", "seeds_of"]


def check_study(
    cohort: Cohort,
    *,
    spatial_dims: int,
    spatial_size: Sequence[int],
    in_channels: int,
    victims: Mapping[str, Callable[[], nn.Module]],
    seeds: Sequence[int] | int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    defenses: str | Sequence[str] | None,
    eval_split: str,
    workers: int | None = None,
) -> None:
    """Whether a study with these settings can be, before hours of a fit are spent for it; each victim is tried once.

    Args:
        in_channels: colors of the images.
        cohort, spatial_dims, spatial_size, victims, seeds, epochs, batch_size, learning_rate, defenses, eval_split,
            workers: as of :class:`VictimStudy`.

    Raises:
        ValueError: When it cannot.
    """
    cohort.tested(eval_split)
    recipe = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    check_settings(spatial_dims, spatial_size, victims, seeds_of(seeds), recipe)
    if workers is not None:
        _check_kind("workers", workers, Integral)
    defenses_of(defenses or (), cohort.voxelwise)
    _check_victims(victims, (in_channels, *spatial_size), len(cohort.classes), cohort.voxelwise)


def seeds_of(seeds: Sequence[int] | int) -> list[int]:
    """Seeds of the trainings, given as such or by their number."""
    whole = isinstance(seeds, Integral) and not isinstance(seeds, bool)
    if not whole and (isinstance(seeds, str) or not isinstance(seeds, Sequence)):
        raise ValueError(f"seeds is {seeds!r}; it must be a number, or a list of numbers")
    for seed in () if whole else seeds:
        _check_kind("a seed", seed, Integral)
    return [int(one) for one in (range(seeds) if whole else seeds)]


def check_settings(
    spatial_dims: int,
    spatial_size: Sequence[int],
    victims: Mapping[str, Any],
    seeds: Sequence[int],
    recipe: Mapping[str, float],
) -> None:
    """Raise where a setting of a study is out of range.

    Raises:
        ValueError: Which, and what it must be.
    """
    if not isinstance(spatial_size, Sequence) or len(spatial_size) != spatial_dims:
        raise ValueError(f"spatial_size is {spatial_size}; it must have {spatial_dims} numbers")
    for size in spatial_size:
        _check_kind("a side of spatial_size", size, Integral)
    for name in ("epochs", "batch_size"):
        _check_kind(name, recipe[name], Integral)
    _check_kind("learning_rate", recipe["learning_rate"], Real)
    if not victims or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"a study needs a victim and different seeds; got {list(victims)} and {list(seeds)}")
    if recipe["epochs"] < 1 or recipe["batch_size"] < 1 or not recipe["learning_rate"] > 0:
        raise ValueError(f"epochs and batch_size must be 1 or more, learning_rate above 0; got {dict(recipe)}")


def _check_kind(name: str, value: object, kind: type[Integral] | type[Real]) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"{name} is {value!r}; it must be a {'whole ' if kind is Integral else ''}number")


def _check_victims(
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
