# SPDX-License-Identifier: Apache-2.0
"""Properties of budget, lattice and stored codec, for every integer type, slope and intercept."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from monai_salm.perturbations.budget import Budget, Lattice
from monai_salm.stored import SliceScaling, StoredCodec, auto_window, lattice_of

TYPES = ["uint8", "int8", "int16", "uint16", "int32"]


def to_tensor(stored: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(stored.astype(np.int64))


@st.composite
def images(draw: st.DrawFn) -> tuple[np.ndarray, StoredCodec, Budget]:
    dtype = draw(st.sampled_from(TYPES))
    info = np.iinfo(dtype)
    stored = draw(hnp.arrays(dtype, (1, 3, 4)))
    slope = draw(st.sampled_from([1.0, -1.0, 0.5, 0.0458, 2.0, -0.1]))
    intercept = draw(st.sampled_from([0.0, -1024.0, 0.3]))
    ends = sorted(draw(st.lists(st.integers(info.min, info.max), min_size=2, max_size=2, unique=True)))
    window = tuple(sorted(slope * end + intercept for end in ends))
    pad = draw(st.none() | st.integers(info.min, info.max))
    codec = StoredCodec(dtype, window, slope, intercept, padding=None if pad is None else (pad, pad))
    levels = draw(st.integers(1, 300))
    assume(levels <= ends[1] - ends[0])
    return stored, codec, Budget(levels, "stored")


def assert_allowed_as_bounded(stored: np.ndarray, codec: StoredCodec, spread: int, seed: int) -> None:
    """One voxel moves by a little: ``allows`` says of it what ``bounds`` does, whose budget allows anything."""
    rng = np.random.default_rng(seed)
    at = tuple(int(rng.integers(length)) for length in stored.shape)
    delta = np.zeros(stored.shape, np.int16)
    delta[at] = rng.integers(-spread, spread + 1)
    values = torch.from_numpy(stored if stored.dtype.kind == "f" else stored.astype(np.int64))
    lower, upper = (bound.numpy() for bound in codec.bounds(values, Budget(1.0)))
    assert codec.allows(stored, delta) == bool(lower[at] <= delta[at] <= upper[at])


class TestCodec:
    @given(images(), st.integers(0, 2**31))
    def test_a_snapped_perturbation_keeps_every_promise(self, image, seed):
        stored, codec, budget = image
        lattice = lattice_of([to_tensor(stored)], [codec], budget)
        wish = torch.randn(lattice.lower.shape, generator=torch.Generator().manual_seed(seed)) * 1000
        delta = lattice.snap(wish)[0].numpy()
        protected = codec.add(stored, delta)
        difference = protected.astype(np.int64) - stored.astype(np.int64)
        assert np.abs(difference).max() <= codec.levels(budget)
        assert np.array_equal(difference, delta)
        physical = np.sort((np.array(codec.window) - codec.intercept) / codec.slope)
        outside = (stored < physical[0] - 1e-6) | (stored > physical[1] + 1e-6)
        assert not difference[outside].any()
        moved = difference != 0
        assert ((protected[moved] >= physical[0] - 1e-6) & (protected[moved] <= physical[1] + 1e-6)).all()
        if codec.padding is not None:
            assert np.array_equal(protected == codec.padding[0], stored == codec.padding[0])

    @given(images())
    def test_unit_intensity_is_the_window_clipped(self, image):
        stored, codec, _ = image
        physical = stored.astype(np.float64) * codec.slope + codec.intercept
        expected = np.clip((physical - codec.window[0]) / codec.width, 0, 1)
        assert np.allclose(codec.to_unit(to_tensor(stored)).numpy(), expected, atol=1e-6)

    @given(images())
    def test_a_large_image_is_read_in_parts_as_it_would_be_whole(self, image):
        stored, codec, budget = image
        whole = codec.to_unit(to_tensor(stored)), *codec.bounds(to_tensor(stored), budget)
        with patch("monai_salm.stored._SLAB_VOXELS", 5):
            parts = codec.to_unit(to_tensor(stored)), *codec.bounds(to_tensor(stored), budget)
        for one, other in zip(whole, parts, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)

    def test_padding_is_never_crossed_from_either_side(self):
        codec = StoredCodec("int16", (0.0, 100.0), padding=(50, 52))
        stored = torch.tensor([[49, 50, 51, 52, 53, 47]], dtype=torch.int16)
        lower, upper = codec.bounds(stored, Budget(5, "stored"))
        assert lower.tolist() == [[-5, 0, 0, 0, 0, -5]]
        assert upper.tolist() == [[0, 0, 0, 0, 5, 2]]

    @given(images(), st.integers(0, 2**31), st.integers(1, 40))
    def test_what_is_allowed_is_what_keeps_the_bounds_of_some_budget(self, image, seed, spread):
        stored, codec, _ = image
        assert_allowed_as_bounded(stored, codec, spread, seed)

    def test_large_integers_are_compared_exactly(self):
        codec = StoredCodec("int32", (0.0, 2147483584.0))
        stored = torch.tensor([[2147483583, 2147483584, 2147483585]], dtype=torch.int32)
        assert codec.movable(stored).tolist() == codec.movable(stored.numpy()).tolist() == [[True, True, False]]
        lower, upper = codec.bounds(stored, Budget(1.0))
        assert upper.tolist() == [[1, 0, 0]] and lower[0, 2] == 0 and lower[0, 0] == -2147483583

    @given(st.sampled_from(["float32", "float64"]), st.integers(0, 2**31), st.none() | st.floats(-5, 5))
    def test_what_is_allowed_in_float_files_is_what_keeps_the_bounds(self, dtype, seed, pad):
        stored = np.random.default_rng(seed).normal(0, 3, (1, 6, 7)).astype(dtype)
        stored[0, 0, 0] = np.nan
        codec = StoredCodec(dtype, (-5.0, 5.0), 1.5, 0.1, padding=None if pad is None else (pad, pad))
        assert_allowed_as_bounded(stored, codec, 30, seed)

    def test_inverted_images_are_bright_where_values_are_low(self):
        codec = StoredCodec("uint8", (0.0, 255.0), inverted=True)
        assert codec.to_unit(torch.tensor([0, 255])).tolist() == [1.0, 0.0]
        assert codec.unit_step < 0

    def test_nan_is_never_moved(self):
        codec = StoredCodec("float32", (0.0, 1.0))
        stored = np.array([[np.nan, 0.5]], dtype=np.float32)
        lower, upper = codec.bounds(torch.from_numpy(stored), Budget.parse("8/255"))
        assert lower[0, 0] == upper[0, 0] == 0 and upper[0, 1] > 0
        assert np.isfinite(codec.to_unit(torch.from_numpy(stored)).numpy()).all()

    @given(st.sampled_from(["float32", "float64"]), st.integers(0, 2**31))
    def test_float_files_stay_inside_the_budget(self, dtype, seed):
        rng = np.random.default_rng(seed)
        stored = rng.normal(0, 1000, (1, 6, 6)).astype(dtype)
        codec = StoredCodec(dtype, auto_window(stored, 1.0, 0.0))
        budget = Budget.parse("8/255")
        lattice = lattice_of([torch.from_numpy(stored)], [codec], budget)
        protected = codec.add(stored, lattice.snap(torch.full((1, 1, 6, 6), 1e6))[0].numpy())
        assert np.abs(protected.astype(np.float64) - stored).max() <= budget.epsilon * codec.width * (1 + 1e-5)

    def test_meta_round_trip(self):
        codec = StoredCodec("uint16", (1.0, 9.0), 0.5, -3.0, (0, 4095), (7, 9), True, "HU")
        assert StoredCodec.from_meta(codec.to_meta()) == codec

    def test_a_part_of_the_meta_is_told_by_what_it_lacks(self):
        part = {"dtype": "int16", "window": (0.0, 3.0), "slope": 1.0, "intercept": 0.0, "inverted": False}
        with pytest.raises(ValueError, match=r"lacks modality, padding, slices, stored_range, unit; .*to_meta\(\)"):
            StoredCodec.from_meta(part)

    @pytest.mark.parametrize(
        "arguments", [{"window": (1.0, 1.0)}, {"window": (0.0, 1.0), "slope": 0.0}, {"window": (0.0, float("nan"))}]
    )
    def test_impossible_codecs_are_refused(self, arguments):
        with pytest.raises(ValueError):
            StoredCodec("int16", **arguments)

    def test_a_sum_outside_the_stored_range_is_refused(self):
        codec = StoredCodec("uint8", (0.0, 255.0))
        with pytest.raises(ValueError, match="stored range"):
            codec.add(np.full((1, 1), 255, np.uint8), np.ones((1, 1), np.int8))

    def test_constant_images_have_no_window(self):
        with pytest.raises(ValueError, match="constant"):
            auto_window(np.full((4, 4), 7, np.int16), 1.0, 0.0)


class TestBudget:
    @pytest.mark.parametrize("text", ["0", "-1/255", "nan", "abc", "8/0", "300/255", "5 cm"])
    def test_what_makes_no_sense_is_refused(self, text):
        with pytest.raises(ValueError):
            Budget.parse(text)

    def test_below_one_step_names_the_epsilon_that_works(self):
        codec = StoredCodec("uint8", (0.0, 255.0))
        with pytest.raises(ValueError, match="smallest epsilon") as caught:
            codec.levels(Budget.parse("0.5/255"))
        least = float(str(caught.value).split("works here is ")[1].split()[0])
        assert codec.levels(Budget(least * 1.00001)) == 1

    def test_over_the_window_is_refused(self):
        with pytest.raises(ValueError, match="over the whole"):
            StoredCodec("int16", (0.0, 10.0)).levels(Budget.parse("11 HU"))

    @given(st.integers(1, 255))
    def test_fractions_of_255_are_whole_levels_of_eight_bits(self, k):
        assert StoredCodec("uint8", (0.0, 255.0)).levels(Budget.parse(f"{k}/255")) == k

    def test_units_agree(self):
        codec = StoredCodec("int16", (-160.0, 240.0), slope=2.0)
        assert codec.levels(Budget.parse("12 HU")) == codec.levels(Budget.parse("6 stored")) == 6


def test_lattice_levels_are_per_image():
    lower, upper = -torch.tensor([[1, 2], [0, 0]]), torch.tensor([[3, 0], [0, 5]])
    assert Lattice(lower, upper, torch.ones(2, 1)).levels.tolist() == [[3], [5]]


class TestSlices:
    codec = StoredCodec("int16", (0.0, 100.0), 0.1, slices=SliceScaling(2, (0.1, 0.5, 2.0), (0.0, 1.0, 0.0)))

    def test_metadata_keep_the_scaling_of_every_slice(self):
        assert StoredCodec.from_meta(self.codec.to_meta()) == self.codec
        plain = StoredCodec("int16", (0.0, 100.0))
        assert StoredCodec.from_meta(plain.to_meta()) == plain
        assert {key: type(value) for key, value in plain.to_meta().items()} == {
            key: type(value) for key, value in self.codec.to_meta().items()
        }

    def test_every_slice_moves_by_what_the_budget_allows_it(self):
        stored = torch.full((1, 2, 2, 3), 30, dtype=torch.int16)
        plain = StoredCodec("int16", (0.0, 100.0), 0.5)
        lattice = lattice_of([stored, stored], [self.codec, plain], Budget(2, "physical"))
        assert lattice.levels.shape == lattice.unit_step.shape == (2, 1, 1, 1, 3)
        assert lattice.levels.flatten(1).tolist() == [[20, 4, 1], [4, 4, 4]]
        assert torch.equal(lattice.upper[0].amax((0, 1, 2)), torch.tensor([20, 4, 1], dtype=torch.int16))
        change = lattice.upper * lattice.unit_step * 100
        assert torch.allclose(change, torch.full_like(change, 2.0))
        assert self.codec.slice_levels(Budget(2, "physical")) == (20, 4, 1)

    def test_unit_intensity_is_that_of_each_slice_alone(self):
        stored = torch.arange(0, 36, dtype=torch.int16).reshape(1, 3, 4, 3)
        unit = self.codec.to_unit(stored)
        for index, (slope, intercept) in enumerate([(0.1, 0.0), (0.5, 1.0), (2.0, 0.0)]):
            alone = StoredCodec("int16", (0.0, 100.0), slope, intercept)
            assert torch.equal(unit[..., index], alone.to_unit(stored[..., index]))
            assert torch.equal(self.codec.movable(stored)[..., index], alone.movable(stored[..., index]))

    def test_slopes_of_both_signs_are_rejected(self):
        with pytest.raises(ValueError, match="one sign"):
            SliceScaling(0, (1.0, -1.0), (0.0, 0.0))
        with pytest.raises(ValueError, match="finite"):
            SliceScaling(0, (1.0,), (0.0, 0.0))
