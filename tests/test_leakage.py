# SPDX-License-Identifier: Apache-2.0
"""Label leakage of perturbations whose right answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from monai_salm.verification.leakage import Leakage, label_leakage, leakage_warnings

SHAPE = (1, 16, 16, 16)


def foreground_of(start: int = 4, stop: int = 12) -> torch.Tensor:
    foreground = torch.zeros(SHAPE, dtype=torch.bool)
    foreground[0, start:stop, start:stop, start:stop] = True
    return foreground


def signs(seed: int = 0) -> torch.Tensor:
    return 2 * torch.randint(0, 2, SHAPE, generator=torch.Generator().manual_seed(seed)) - 1


def everything(foreground: torch.Tensor) -> float:
    share = float(foreground.float().mean())
    return 2 * share / (1 + share)


def test_label_shaped_support_gives_the_label_away():
    foreground = foreground_of()
    found = label_leakage(8 * signs() * foreground, foreground)
    assert found["threshold"] == found["support"] == 1.0
    assert found["blur_1"] > 0.8
    assert found["everything"] == pytest.approx(everything(foreground))


def test_untouched_label_is_given_away_too():
    foreground = foreground_of()
    found = label_leakage(8 * signs() * ~foreground, foreground)
    assert found["threshold"] == 1.0 and found["support"] == 0.0


def test_random_signs_tell_nothing():
    foreground = foreground_of()
    found = label_leakage(8 * signs(), foreground)
    assert list(found.values()) == pytest.approx([everything(foreground)] * len(found))


def test_no_perturbation_tells_nothing():
    foreground = foreground_of()
    found = label_leakage(torch.zeros(SHAPE), foreground)
    assert found.pop("support") == 0.0
    assert list(found.values()) == pytest.approx([everything(foreground)] * len(found))


def test_denser_change_shows_only_after_blurring():
    foreground = foreground_of()
    chance = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))
    found = label_leakage((chance < torch.where(foreground, 0.6, 0.2)).int(), foreground)
    assert found["blur_2"] > found["threshold"] + 0.15
    assert found["blur_2"] > found["support"] + 0.15


def test_blur_keeps_a_constant_at_the_border_and_works_in_2d():
    foreground = torch.zeros(1, 9, 12, dtype=torch.bool)
    foreground[0, :3] = True
    found = label_leakage(torch.full(foreground.shape, 5), foreground)
    assert list(found.values()) == pytest.approx([0.5] * len(found))


def test_cases_are_collected_and_those_without_foreground_left_out():
    leakage, foreground = Leakage(), foreground_of().numpy()
    assert leakage.result() is None
    for share in (1.0, 0.0):
        leakage.add("protected", (foreground * share).astype(np.int8), foreground)
    leakage.add("protected", foreground.astype(np.int8), np.zeros_like(foreground))
    found = leakage.result()["protected"]
    base = everything(torch.from_numpy(foreground))
    assert found["n_cases"] == 2
    assert found["best"]["mean"] == pytest.approx((1 + base) / 2)
    assert found["best"]["std"] == pytest.approx((1 - base) / np.sqrt(2))
    assert set(found["by_estimator"]) == {"threshold", "blur_1", "blur_2", "blur_4"}


@pytest.mark.parametrize(
    ("protected", "noise", "count"), [(0.9, 0.3, 1), (0.39, 0.3, 0), (0.9, None, 0), (None, 0.3, 0)]
)
def test_warning_needs_more_than_random_noise_gives_away(protected, noise, count):
    given = {"protected": protected, "random_noise": noise}
    leakage = {arm: {"best": {"mean": value, "std": None}} for arm, value in given.items()}
    warnings = leakage_warnings(leakage)
    assert len(warnings) == count
    assert not warnings or "without its labels" in warnings[0] and "0.90" in warnings[0]
    assert leakage_warnings(None) == []
