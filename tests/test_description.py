# SPDX-License-Identifier: Apache-2.0
"""A training that is kept is done again when what it was made with does something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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
