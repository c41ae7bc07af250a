# SPDX-License-Identifier: Apache-2.0
"""A training that is kept is done again when what it was made with does something else."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from monai.transforms import Compose, RandFlipd, RandSpatialCropSamplesd

from monai_salm.verification.description import code_of, described
from monai_salm.verification.training import Recipe, victim_digest

SOMEBODYS = """
import torch
from monai.transforms import Transform
from monai_salm.verification.training import Recipe

SHARE = {share}
SIZES = ({share}, 1)

class Method(Recipe):
    factor = {factor}

    def losses(self, *given):
        return super().losses(*given) {sign} SHARE

class Change(Transform):
    def __call__(self, image):
        return Method.change(image)

    @staticmethod
    def change(image):
        return image {sign} 1

class Nested:
    def of(self, images):
        return [each for each in images if (lambda: SIZES)()]

class Decorated:
    @torch.no_grad()
    def of(self, image):
        return image {sign} 1

class Computed:
    @property
    def of(self):
        return 0 {sign} 1

class Network(torch.nn.Linear):
    def forward(self, image):
        return super().forward(image.flatten(1)) {sign} 1
"""


def written(**values: Any) -> Any:
    """A module of somebody's, written anew each time."""
    names = {"__name__": "somebody"}
    exec(SOMEBODYS.format(**({"share": 0.2, "factor": 1, "sign": "+"} | values)), names)
    return type("Module", (), names)


@pytest.mark.parametrize(
    ("name", "change"), [("Method", {"share": 0.5}), ("Method", {"factor": 2}), ("Nested", {"share": 0.5})]
)
def test_a_class_is_what_its_methods_and_constants_are(name, change):
    one, again, other = (getattr(written(**values), name) for values in ({}, {}, change))
    assert described(one) == described(again) != described(other)
    assert described(one()) == described(again()) != described(other())


@pytest.mark.parametrize("name", ["Method", "Change", "Decorated", "Computed"])
def test_a_class_is_what_its_methods_do(name):
    one, other = (getattr(written(sign=sign), name) for sign in "+-")
    assert described(one) != described(other)


def test_what_a_library_brings_is_known_by_its_name():
    assert code_of(torch.nn.Linear) == code_of(dict) == "" and code_of(Recipe)


def test_victims_that_compute_something_else_are_others():
    one, again, other = (written(sign=sign).Network for sign in "++-")
    digests = [victim_digest(lambda kind=kind: kind(4, 2), torch.zeros(2, 1, 2, 2), 2) for kind in (one, again, other)]
    assert digests[0] == digests[1] != digests[2]


def test_description_tells_settings_apart_and_not_random_states():
    def augmentation(samples: int = 2) -> Compose:
        return Compose([RandSpatialCropSamplesd("image", (4, 4), num_samples=samples), RandFlipd("image", prob=0.5)])

    one, other = augmentation(), augmentation()
    one.set_random_state(5)
    assert described(one) == described(other)
    assert "0x" not in described(one)
    assert described(augmentation(samples=3)) != described(one)
    assert described(partial(int, base=2)) != described(partial(int, base=3))
    assert described({"b", "a", "c"}) == described({"c", "b", "a"})


class Scaled:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, image):
        return image * self.factor

    def of(self, image):
        return image * self.factor


def closure(factor):
    return lambda image: image * factor


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda image: torch.sqrt(image), lambda image: torch.zeros_like(image)),
        (lambda image, factor=1: image * factor, lambda image, factor=2: image * factor),
        (lambda image, *, factor=1: image * factor, lambda image, *, factor=2: image * factor),
        (closure(0), closure(1)),
        (Scaled(0).of, Scaled(1).of),
        (torch.sqrt, torch.zeros_like),
    ],
)
def test_functions_that_do_different_things_are_described_differently(one, other):
    assert described(one) != described(other) and described(one) == described(one)


def test_functions_with_functions_inside_are_described_alike_in_every_process():
    command = "from monai_salm.verification import defenses as d, description as s; print(s.described(d.DEFENSES))"
    one, other = (subprocess.run([sys.executable, "-c", command], capture_output=True, text=True) for _ in range(2))
    assert one.stdout == other.stdout != "" and one.returncode == 0
