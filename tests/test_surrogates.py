# SPDX-License-Identifier: Apache-2.0
"""Views and surrogates: anti-aliased resizing, determinism, scriptability."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.nets import UNet
from torch import Tensor

from monai_salm.surrogates import (
    PaddedNetwork,
    RandomView,
    ResizeView,
    SmallCNN,
    Surrogate,
    TextureClassifier,
    TextureReader,
    small_resnet,
)


@pytest.mark.parametrize("size", [(28, 28), (80, 64), (61, 20), (61, 47)])
def test_resizing_agrees_with_torch_in_two_dimensions(size):
    image = torch.rand(2, 3, 61, 47)
    expected = F.interpolate(image, size, mode="bilinear", antialias=True, align_corners=False)
    assert torch.allclose(ResizeView(size)(image), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 5, 6), (20, 30, 10)])
def test_resizing_keeps_constants_and_is_linear_in_three_dimensions(size):
    view = ResizeView(size)
    assert torch.allclose(view(torch.full((1, 1, 9, 12, 11), 0.3)), torch.full((1, 1, *size), 0.3), atol=1e-6)
    a, b = torch.rand(2, 1, 1, 9, 12, 11)
    assert torch.allclose(view(a + 2 * b), view(a) + 2 * view(b), atol=1e-5)


def test_every_voxel_gets_a_gradient_when_the_image_is_reduced():
    image = torch.rand(1, 1, 64, 64, requires_grad=True)
    ResizeView((8, 8))(image).sum().backward()
    assert (image.grad != 0).all()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("make", [SmallCNN, TextureClassifier, small_resnet])
def test_surrogates_script_with_equal_output(dims, make):
    surrogate = Surrogate(make(dims, 1, 3), [16] * dims).eval()
    image = torch.rand(2, 1, *[20, 25, 18][:dims])
    assert torch.allclose(torch.jit.script(surrogate)(image), surrogate(image), atol=1e-6)


def test_weights_do_not_load_where_another_size_is_seen():
    """Of another size nothing in their shapes would tell."""
    weights = Surrogate(TextureClassifier(2, 1, 3), [16, 16]).state_dict()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"with spatial_size \[16, 16\], this one has \[24, 24\]"):
            Surrogate(TextureClassifier(2, 1, 3), [24, 24]).load_state_dict(weights, strict)
    del weights["view.size"]  # as earlier versions wrote them
    other = Surrogate(TextureClassifier(2, 1, 3), [24, 24])
    other.load_state_dict(weights)
    assert other.state_dict()["view.size"].tolist() == [24, 24] and "view.size" not in weights


@pytest.mark.parametrize("dims", [2, 3])
def test_a_random_view_is_a_function_of_its_parameters_and_differentiable(dims):
    view, image = RandomView(dims), torch.rand(4, 1, *[10] * dims, requires_grad=True)
    drawn = view.draw(4, torch.Generator().manual_seed(0))
    first = view(image, drawn)
    assert torch.equal(first, view(image, drawn)) and first.shape == image.shape
    assert not torch.equal(first, view(image, view.draw(4, torch.Generator().manual_seed(1))))
    first.sum().backward()
    assert torch.isfinite(image.grad).all() and image.grad.abs().sum() > 0


def test_without_any_strength_a_view_only_flips():
    view, image = RandomView(2, rotate=0, scale=0, translate=0, contrast=0, noise=0), torch.rand(8, 1, 6, 6)
    seen = view(image, view.draw(8, torch.Generator().manual_seed(0)))
    for one, original in zip(seen, image, strict=True):
        flips = [original, original.flip(1), original.flip(2), original.flip(1, 2)]
        assert any(torch.allclose(one, flipped, atol=1e-5) for flipped in flips)


def unet(dims: int) -> UNet:
    return UNet(dims, 1, 3, (2, 4, 4), (2, 2), num_res_units=1, norm="BATCH").eval()


class TestPaddedNetwork:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(2, 3).flatmap(lambda dims: st.lists(st.integers(1, 19), min_size=dims, max_size=dims)))
    def test_any_size_comes_out_as_it_went_in(self, size):
        network = PaddedNetwork(unet(len(size)), 4)
        assert network(torch.rand(2, 1, *size)).shape == (2, 3, *size)

    @pytest.mark.parametrize("dims", [2, 3])
    def test_a_size_that_fits_is_left_alone_and_others_end_in_zeros(self, dims):
        network, image = unet(dims), torch.rand(1, 1, *[8, 12, 4][:dims])
        assert torch.equal(PaddedNetwork(network, 4)(image), network(image))
        short = image[..., :-1]
        ends_in_zero = F.pad(short, [0, 1])
        assert torch.equal(PaddedNetwork(network, 4)(short), network(ends_in_zero)[..., :-1])

    @pytest.mark.parametrize("dims", [2, 3])
    def test_it_scripts_with_equal_output_at_every_size(self, dims):
        surrogate = Surrogate(PaddedNetwork(unet(dims), 4)).eval()
        scripted = torch.jit.script(surrogate)
        for size in ([8, 8, 8], [9, 6, 5], [1, 2, 3], [13, 1, 4]):
            image = torch.rand(2, 1, *size[:dims])
            assert torch.allclose(scripted(image), surrogate(image), atol=1e-6)

    def test_gradients_reach_the_image(self):
        image = torch.rand(1, 1, 7, 9, requires_grad=True)
        PaddedNetwork(unet(2), 4)(image).square().sum().backward()
        assert (image.grad != 0).all()


class TestTextureReader:
    @pytest.mark.parametrize("dims", [2, 3])
    def test_it_scripts_with_equal_output_at_every_size(self, dims):
        surrogate = Surrogate(TextureReader(dims, 1, 3)).eval()
        scripted = torch.jit.script(surrogate)
        for size in ([12, 9, 10], [5, 6, 7]):
            image = torch.rand(2, 1, *size[:dims])
            assert scripted(image).shape == (2, 3, *size[:dims])
            assert torch.allclose(scripted(image), surrogate(image), atol=1e-6)

    @pytest.mark.parametrize("size", [(3, 1), (12, 10, 1)])
    def test_a_volume_of_one_slice_goes_through(self, size):
        network = TextureReader(len(size), 1, 3).eval()
        assert network(torch.rand(2, 1, *size)).shape == (2, 3, *size)

    @pytest.mark.parametrize("dims", [2, 3])
    def test_it_looks_for_pieces_of_the_textures_in_both_signs(self, dims):
        network = TextureReader(dims, 1, 3, features=8, kernel_size=3)
        axis = torch.arange(9.0).reshape(-1, *[1] * (dims - 1)).expand(*[9] * dims)
        network.look_for(torch.stack([0 * axis, axis, -axis])[:, None], torch.Generator().manual_seed(0))
        weight = network.filters[0].weight.detach()
        ramp = axis[tuple(slice(3) for _ in range(dims))] - 1
        assert torch.allclose(weight[0::2], -weight[1::2])
        assert torch.allclose(weight[0, 0], ramp / ramp.norm(), atol=1e-6)
        assert torch.allclose(weight[2, 0], -ramp / ramp.norm(), atol=1e-6)

    @pytest.mark.parametrize("classes", [2, 5, 30])
    def test_every_texture_gets_a_filter_however_many_there_are(self, classes):
        network = TextureReader(2, 1, classes, kernel_size=3)
        textures = torch.randn(classes, 1, 9, 9, generator=torch.Generator().manual_seed(1))
        network.look_for(textures, torch.Generator().manual_seed(0))
        pieces = torch.nn.functional.unfold(textures, 3)  # (classes, 9, all places)
        pieces = pieces - pieces.mean(1, keepdim=True)
        likeness = network.filters[0].weight.detach().flatten(1) @ (pieces / pieces.norm(dim=1, keepdim=True))
        assert torch.allclose(likeness.amax((1, 2)), torch.ones(classes))  # one filter is a piece of it
        assert torch.allclose(likeness.amin((1, 2)), -torch.ones(classes))  # and one the piece's negative

    def test_textures_that_fill_no_filter_are_refused(self):
        for textures in (torch.zeros(2, 1, 9, 9), torch.ones(2, 1, 9, 4)):
            with pytest.raises(ValueError, match="no smaller than kernel_size"):
                TextureReader(2, 1, 2, kernel_size=5).look_for(textures, torch.Generator())

    def test_a_number_of_classes_that_is_none_or_too_small_is_told(self):
        for classes in (0, -1, 1.5):
            with pytest.raises(ValueError, match=f"out_channels is {classes}; it must be a whole number, 1 or more"):
                TextureReader(2, 1, classes)
        with pytest.raises(ValueError, match="out_channels is 2 and there are 3 classes; set num_classes"):
            TextureReader(2, 1, 2).look_for(torch.randn(3, 1, 9, 9), torch.Generator())

    def test_flat_pieces_of_a_texture_leave_filters_as_they_were(self):
        network = TextureReader(2, 1, 2, kernel_size=3)
        before = network.filters[0].weight.detach().clone()
        network.look_for(torch.ones(1, 1, 9, 9), torch.Generator().manual_seed(0))
        assert torch.equal(network.filters[0].weight, before)
        with pytest.raises(ValueError, match="3 or more"):
            TextureReader(2, 1, 2, kernel_size=1)

    @pytest.mark.parametrize("kernel_size", [3, 5, 7])
    def test_it_sees_no_farther_than_it_says(self, kernel_size):
        network = TextureReader(2, 1, 2, features=64, kernel_size=kernel_size).eval()
        image = torch.rand(1, 1, 31, 31, requires_grad=True)
        (seen,) = torch.autograd.grad(network(image)[0, :, 15, 15].sum(), image)
        reach = (seen[0, 0].nonzero() - 15).abs().amax(0)
        assert reach.tolist() == [kernel_size // 2 + 2] * 2


def blocks(dims: int, batch: int = 6) -> Tensor:
    """Voxel labels 0, 1 and 2 in blocks of no symmetry, and 255 at one border."""
    label = torch.zeros(batch, 1, *[24, 21, 18][:dims], dtype=torch.uint8)
    label[(..., *[slice(2, 9), slice(3, 12), slice(2, 8)][:dims])] = 1
    label[(..., *[slice(13, 20), slice(5, 9), slice(9, 16)][:dims])] = 2
    label[:, :, 22:] = 255
    return label


@pytest.mark.parametrize("dims", [2, 3])
class TestLabelsUnderViews:
    def test_flips_move_labels_and_image_alike(self, dims):
        view = RandomView(dims, rotate=0, scale=0, translate=0, contrast=0, noise=0)
        label = blocks(dims)
        drawn = view.draw(len(label), torch.Generator().manual_seed(0))
        moved = view.move_labels(label, drawn)
        assert moved.dtype == torch.uint8 and moved.shape == label.shape
        assert torch.allclose(view(label.float(), drawn), moved.float(), atol=1e-3)
        axes = range(1, dims + 1)
        flips = [[axis for axis in axes if chosen >> (axis - 1) & 1] for chosen in range(2**dims)]
        taken = set()
        for one, original in zip(moved, label, strict=True):
            taken |= {str(flip) for flip in flips if torch.equal(one, original.flip(flip))}
        assert len(taken) > 2

    @pytest.mark.parametrize("strength", [{}, {"rotate": 1.0, "scale": 0.3, "translate": 0.2, "flip": False}])
    def test_rotation_zoom_and_shift_move_labels_and_image_alike(self, dims, strength):
        view = RandomView(dims, contrast=0, noise=0, **strength)
        label = blocks(dims)
        drawn = view.draw(len(label), torch.Generator().manual_seed(1))
        moved = view.move_labels(label, drawn)
        assert (moved != label).float().mean() > 0.02
        for value in (0, 1, 2, 255):
            share = view((label == value).float(), drawn)  # of a voxel that comes from the class
            assert (moved[share > 0.999] == value).all() and (moved[share < 0.001] != value).all()
            assert value == 255 or ((share > 0.999) & (label == value)).any()

    def test_no_value_is_made_up(self, dims):
        view, label = RandomView(dims, rotate=1.0), blocks(dims)
        moved = view.move_labels(label, view.draw(len(label), torch.Generator().manual_seed(2)))
        assert moved.unique().tolist() == label.unique().tolist() == [0, 1, 2, 255]

    def test_contrast_and_noise_leave_labels_alone(self, dims):
        view, label = RandomView(dims, flip=False, rotate=0, scale=0, translate=0, contrast=0.5, noise=1), blocks(dims)
        drawn = view.draw(len(label), torch.Generator().manual_seed(3))
        assert torch.equal(view.move_labels(label, drawn), label)

    def test_a_single_slice_moves_too(self, dims):
        view, label = RandomView(dims), blocks(dims)[..., 5:6]
        moved = view.move_labels(label, view.draw(len(label), torch.Generator().manual_seed(4)))
        assert moved.shape == label.shape and set(moved.unique().tolist()) <= set(label.unique().tolist())


def test_an_affine_view_is_drawn_with_its_probability():
    steady = RandomView(2, flip=False, affine_prob=0.0)
    half = RandomView(2, flip=False, affine_prob=0.5)
    still = torch.eye(2, 3).repeat(400, 1, 1)
    assert torch.equal(steady.draw(400, torch.Generator().manual_seed(0))["theta"], still)
    moved = (half.draw(400, torch.Generator().manual_seed(0))["theta"] != still).flatten(1).any(1)
    assert 0.4 < moved.float().mean() < 0.6
