# SPDX-License-Identifier: Apache-2.0
"""Views and surrogates: anti-aliased resizing, determinism, scriptability."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from monai_salm.surrogates import RandomView, ResizeView, SmallCNN, Surrogate, small_resnet


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
@pytest.mark.parametrize("make", [SmallCNN, small_resnet])
def test_surrogates_script_with_equal_output(dims, make):
    surrogate = Surrogate(make(dims, 1, 3), [16] * dims).eval()
    image = torch.rand(2, 1, *[20, 25, 18][:dims])
    assert torch.allclose(torch.jit.script(surrogate)(image), surrogate(image), atol=1e-6)


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
