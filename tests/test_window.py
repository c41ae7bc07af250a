# SPDX-License-Identifier: Apache-2.0
"""A window that is none is refused at every door, before a file is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from exports import write_nifti

from monai_salm.cli import main
from monai_salm.cli.codes import BAD_INPUT
from monai_salm.perturbations.budget import as_window
from monai_salm.release.catalog import scan
from monai_salm.release.labels import Cohort, load_cohort
from monai_salm.release.protect import protect_cohort
from monai_salm.transforms import LoadStored
from monai_salm.verification.study import VictimStudy

WRONG = ["auot", "12", (200, 100), (1, 1), (0, float("inf")), (float("nan"), 1), (1,), (1, 2, 3), 5, None, ("a", "b")]


@pytest.mark.parametrize("given", [(-160, 240), [-160.0, 240.0], np.array([-160, 240])])
def test_two_numbers_are_a_window_of_floats(given):
    window = as_window(given)
    assert window == (-160.0, 240.0) and all(type(end) is float for end in window)
    assert as_window("auto") == "auto"


@pytest.mark.parametrize("given", WRONG, ids=repr)
def test_anything_else_is_no_window(given):
    with pytest.raises(ValueError, match="'auto' or two finite numbers"):
        as_window(given)


def _study(folder: Path, window: object) -> None:
    options = {"spatial_dims": 2, "spatial_size": (8, 8), "victims": {}, "budget": "1 stored"}
    cohort = Cohort((), ("a", "b"), (), folder)
    VictimStudy(cohort=cohort, output_dir=folder / "out", window=window, **options)


def _protect(folder: Path, window: object) -> None:
    cohort = Cohort((), ("a", "b"), (), folder)
    protect_cohort(cohort, {}, budget="1 stored", output_dir=folder / "out", spatial_dims=2, window=window)


DOORS = {
    "scan": lambda folder, window: scan(folder, 3, window=window),
    "load_cohort": lambda folder, window: load_cohort(folder, spatial_dims=3, window=window),
    "LoadStored": lambda folder, window: LoadStored(spatial_dims=3, window=window),
    "VictimStudy": _study,
    "protect_cohort": _protect,
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("given", ["auot", (200, 100)], ids=repr)
def test_every_door_refuses_what_is_no_window(tmp_path, door, given):
    write_nifti(tmp_path / "a.nii")
    with pytest.raises(ValueError, match="'auto' or two finite numbers"):
        DOORS[door](tmp_path, given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["inspect", "protect"])
def test_the_command_says_what_a_window_is(tmp_path, capsys, verb):
    write_nifti(tmp_path / "in" / "a.nii")
    arguments = [verb, tmp_path / "in", *([tmp_path / "out"] if verb == "protect" else [])]
    assert main([*map(str, arguments), "--dim", "3", "--window", "200", "100"]) == BAD_INPUT
    assert "the lower one first" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
