# SPDX-License-Identifier: Apache-2.0
"""Methods that follow the label: where they are, how large, and in which pattern."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lattices import CROSS_ENTROPY, free, gen
from torch import Tensor, nn

from monai_salm.perturbations.base import Perturbation
from monai_salm.perturbations.markers import ContourInterior, LabelMarker, SliceSpectrum, checkerboard
from monai_salm.perturbations.voxels import VoxelObjective
from monai_salm.surrogates import Surrogate

LEVELS = 8
SIZES = {2: (16, 14), 3: (12, 11, 9)}
BLOCK = slice(3, 9)


def labels(dims: int) -> Tensor:
    """A block of classes 1 and 2 in the first case, nothing in the second."""
    label = torch.zeros(2, 1, *SIZES[dims], dtype=torch.uint8)
    label[(0, 0, *[BLOCK] * dims)] = 1
    label[(0, 0, *[slice(3, 5)] * dims)] = 2
    return label


def images(dims: int) -> Tensor:
    return torch.rand(2, 1, *SIZES[dims], generator=gen(1))


def objective(dims: int) -> VoxelObjective:
    torch.manual_seed(0)
    conv = (nn.Conv2d, nn.Conv3d)[dims - 2]
    network = nn.Sequential(conv(1, 4, 3, padding=1), nn.ReLU(), conv(4, 3, 3, padding=1))
    return VoxelObjective(Surrogate(network), CROSS_ENTROPY, tile_size=SIZES[dims], halo=0)


def run(method: Perturbation, dims: int, *, image: Tensor | None = None, label: Tensor | None = None, seed=0) -> Tensor:
    image = images(dims) if image is None else image
    label = labels(dims) if label is None else label
    return method(objective(dims), image, label, free(image.shape, LEVELS), generator=gen(seed))


def grown(label: Tensor) -> Tensor:
    pool = F.max_pool2d if label.ndim == 4 else F.max_pool3d
    return pool((label > 0).float(), 3, 1, 1) > 0


def mean_loss(dims: int, delta: Tensor) -> float:
    """Objective of the first case, the one with labels."""
    with torch.no_grad():
        return float(objective(dims)(images(dims), delta / 255, labels(dims), gen())[0])


def methods(dims: int) -> list[Perturbation]:
    return [LabelMarker(), ContourInterior(), *([SliceSpectrum()] if dims == 3 else [])]


class Never(nn.Module):
    """A network that must not be asked."""

    def forward(self, image: Tensor) -> Tensor:
        raise AssertionError("this method uses no network")


@pytest.mark.parametrize("dims", [2, 3])
class TestSupport:
    def test_a_marker_is_in_every_labeled_voxel_and_nowhere_else(self, dims):
        delta = run(LabelMarker(), dims)
        assert torch.equal(delta != 0, labels(dims) > 0)
        assert torch.equal(delta.abs(), LEVELS * (labels(dims) > 0).to(delta.dtype))

    def test_contour_and_interior_lie_in_the_label_grown_by_a_voxel(self, dims):
        delta, near = run(ContourInterior(), dims), grown(labels(dims))
        assert not delta[~near].any() and delta[0].any() and not delta[1].any()
        assert (delta[near] != 0).float().mean() > 0.9

    def test_slice_spectrum_lies_inside_the_label(self, dims):
        if dims == 2:
            with pytest.raises(ValueError, match=r"volumes only.*\(2, 1, 16, 14\)"):
                run(SliceSpectrum(), dims)
            return
        delta = run(SliceSpectrum(), dims)
        assert not delta[labels(dims) == 0].any() and delta[labels(dims) > 0].float().abs().mean() > LEVELS / 4

    def test_a_case_without_foreground_stays_as_it_is(self, dims):
        nothing = torch.zeros(2, 1, *SIZES[dims], dtype=torch.uint8)
        for method in methods(dims):
            assert not run(method, dims, label=nothing).any()

    def test_labels_that_are_not_of_voxels_are_refused_also_where_shapes_would_broadcast(self, dims):
        image = torch.rand(4, 1, *[4] * dims)
        for method in methods(dims):
            for label in (torch.tensor([0, 1, 2, 1]), torch.ones(4, 1, *[1] * dims, dtype=torch.uint8)):
                with pytest.raises(ValueError, match="voxel labels"):
                    method(objective(dims), image, label, free(image.shape, LEVELS), generator=gen())


class TestMarker:
    @pytest.mark.parametrize("cell", [1, 2, 3])
    @pytest.mark.parametrize("size", [(7, 8), (5, 6, 7)])
    def test_a_checkerboard_turns_with_every_cell_of_every_axis(self, cell, size):
        board = checkerboard(torch.zeros(2, 1, *size), cell)
        for place in torch.cartesian_prod(*[torch.arange(length) for length in size]).tolist():
            assert board[(1, 0, *place)] == (-1) ** sum(at // cell for at in place)

    def test_it_asks_no_network(self):
        unused = VoxelObjective(Surrogate(Never()), CROSS_ENTROPY, tile_size=(16, 14))
        image = images(2)
        delta = LabelMarker(cell=1)(unused, image, labels(2), free(image.shape, LEVELS), generator=gen())
        assert torch.equal(delta, run(LabelMarker(cell=1), 2, seed=7)) and unused.passes == 0

    def test_where_the_range_is_narrow_it_goes_as_far_as_it_can(self):
        image, label = images(2), torch.ones(2, 1, 16, 14, dtype=torch.uint8)
        lattice = free(image.shape, LEVELS)
        lattice.upper[..., :4] = 0
        lattice.lower[0] = -3
        delta = LabelMarker(cell=2)(objective(2), image, label, lattice, generator=gen())
        board = checkerboard(image, 2)
        assert torch.equal(delta, torch.where(board > 0, lattice.upper, lattice.lower))

    def test_a_cell_has_a_voxel(self):
        with pytest.raises(ValueError, match="cell is 0"):
            LabelMarker(cell=0)


@pytest.mark.parametrize("dims", [2, 3])
class TestContour:
    def regions(self, dims: int) -> tuple[Tensor, Tensor]:
        """Contour and inside of the block, from their definition."""
        near, inside = torch.zeros(2, 2, 1, *SIZES[dims], dtype=torch.bool)
        near[(0, 0, *[slice(BLOCK.start - 1, BLOCK.stop + 1)] * dims)] = True
        inside[(0, 0, *[slice(BLOCK.start + 1, BLOCK.stop - 1)] * dims)] = True
        return near & ~inside, inside

    def test_the_contour_takes_the_full_budget(self, dims):
        contour, _ = self.regions(dims)
        delta = run(ContourInterior(steps=8), dims)
        assert (delta[contour].abs() == LEVELS).float().mean() > 0.5

    @pytest.mark.parametrize("interior", [0.0, 0.25, 0.5])
    def test_inside_it_is_bounded_by_contrast_and_the_least_bound(self, dims, interior):
        image = images(dims)
        image[(0, 0, *[slice(2, 7)] * dims)] = 0.5  # smooth: no contrast in the middle of this part
        delta = run(ContourInterior(steps=8, interior=interior), dims, image=image).float()
        _, inside = self.regions(dims)
        padded = F.pad(image, [1, 1] * dims, mode="replicate")
        windows = padded
        for axis in range(2, 2 + dims):
            windows = windows.unfold(axis, 3, 1)
        windows = windows.flatten(2 + dims)
        contrast = windows.amax(-1) - windows.amin(-1)
        contrast = contrast / contrast.flatten(1).amax(1).reshape(-1, *[1] * (dims + 1))
        bound = contrast.clamp(min=interior) * LEVELS
        assert (delta[inside].abs() <= bound[inside].round()).all()
        smooth = inside & (contrast == 0)
        assert smooth.any() and (delta[smooth].abs() <= interior * LEVELS).all()
        assert bool(delta[smooth].any()) == (interior > 0)
        assert delta[inside & ~smooth].abs().max() > interior * LEVELS

    def test_the_loss_falls(self, dims):
        assert mean_loss(dims, run(ContourInterior(), dims)) < mean_loss(dims, torch.zeros(2, 1, *SIZES[dims]))

    def test_it_needs_no_chance(self, dims):
        assert torch.equal(run(ContourInterior(), dims, seed=1), run(ContourInterior(), dims, seed=2))


class TestSpectrum:
    def test_the_seed_decides(self):
        assert torch.equal(run(SliceSpectrum(steps=2), 3, seed=1), run(SliceSpectrum(steps=2), 3, seed=1))
        assert not torch.equal(run(SliceSpectrum(steps=2), 3, seed=1), run(SliceSpectrum(steps=2), 3, seed=2))

    def test_the_loss_falls_without_the_other_terms(self):
        delta = run(SliceSpectrum(spectrum=0.0, logits=0.0), 3)
        assert mean_loss(3, delta) < mean_loss(3, torch.zeros(2, 1, *SIZES[3]))

    def test_spectra_of_neighbors_get_farther_apart_the_more_that_weighs(self):
        def distance(delta: Tensor) -> float:
            spectra = torch.fft.fft2(delta[0, 0].float().movedim(-1, 0)).abs()
            return float((spectra[1:] - spectra[:-1]).norm())

        found = [distance(run(SliceSpectrum(spectrum=weight, logits=0.0), 3)) for weight in (0.0, 100.0)]
        assert found[1] > 1.2 * found[0]

    def test_logits_move_farther_the_more_that_weighs(self):
        def moved(delta: Tensor) -> float:
            network = objective(3).network
            with torch.no_grad():
                return float((network(images(3) + delta / 255) - network(images(3)))[0].abs().mean())

        found = [moved(run(SliceSpectrum(spectrum=0.0, logits=weight), 3)) for weight in (0.0, 1000.0)]
        assert found[1] > found[0]

    def test_a_volume_of_one_slice_has_no_neighbors_but_works(self):
        image = torch.rand(1, 1, 8, 8, 1, generator=gen())
        delta = run(SliceSpectrum(), 3, image=image, label=torch.ones(1, 1, 8, 8, 1, dtype=torch.uint8))
        assert delta.any()
