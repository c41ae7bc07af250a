# SPDX-License-Identifier: Apache-2.0
"""Filters: PyTorch's own convolution and its gradients, whatever is frozen. Means nearby, and the mean of those."""

from __future__ import annotations

import pytest
import torch

from monai_salm.convolution import Filters, convolve, image_gradient, mean_nearby, mean_of_means

SIZES = [(1, 1), (5, 7), (28, 30), (64, 3), (1, 1, 1), (3, 1, 9), (13, 6, 7)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_gradient_by_the_image_is_that_of_pytorch(size, kernel_size, channels):
    weight = torch.randn(4, channels, *[kernel_size] * len(size), dtype=torch.double)
    image = torch.randn(2, channels, *size, dtype=torch.double, requires_grad=True)
    result = convolve(image, weight)
    gradient = torch.randn_like(result)
    (expected,) = torch.autograd.grad(result, image, gradient)
    torch.testing.assert_close(image_gradient(gradient, weight), expected)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("frozen", [True, False])
def test_filters_are_an_ordinary_convolution_to_training_and_to_perturbations(dims, frozen):
    torch.manual_seed(0)
    filters = Filters(dims, 1, 8, 5).double().requires_grad_(not frozen)
    ordinary = [torch.nn.Conv2d, torch.nn.Conv3d][dims - 2](1, 8, 5, padding=2, bias=False)
    ordinary.weight.data = filters.weight.detach().clone()
    image = torch.randn(2, 1, *[11, 9, 10][:dims], dtype=torch.double)
    grads = []
    for network in (filters, ordinary.requires_grad_(not frozen)):
        seen = image.clone().requires_grad_(True)
        network(seen).square().sum().backward()
        grads.append([seen.grad, network.weight.grad])
    torch.testing.assert_close(filters(image), ordinary(image))
    torch.testing.assert_close(grads[0][0], grads[1][0])
    assert (grads[0][1] is None) is frozen
    if not frozen:
        torch.testing.assert_close(grads[0][1], grads[1][1])


def test_filters_take_part_in_mixed_precision():
    filters, image = Filters(2, 1, 8, 5).requires_grad_(False), torch.randn(2, 1, 11, 9, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = filters(image)
    result.float().sum().backward()
    assert image.grad.isfinite().all() and image.grad.any()


def test_filters_begin_as_the_convolutions_of_pytorch_do():
    torch.manual_seed(0)
    weight = Filters(2, 3, 16, 7).weight
    torch.manual_seed(0)
    assert torch.equal(weight, torch.nn.Conv2d(3, 16, 7, bias=False).weight)


@pytest.mark.parametrize("size", SIZES)
def test_means_nearby_are_those_of_a_window_with_zeros_beyond_the_image(size):
    image = torch.randn(2, 3, *size, dtype=torch.double)
    window = torch.full((3, 1, *[5] * len(size)), 0.2 ** len(size), dtype=torch.double)
    convolution = torch.nn.functional.conv2d if len(size) == 2 else torch.nn.functional.conv3d
    expected = convolution(image, window, padding=2, groups=3)
    torch.testing.assert_close(mean_nearby(image), expected)
    torch.testing.assert_close(mean_of_means(image), expected.flatten(2).mean(2))


@pytest.mark.parametrize("kernel_size", [0, 2, 6])
def test_filters_of_an_even_side_are_refused_when_they_are_made(kernel_size):
    with pytest.raises(ValueError, match=f"kernel_size is {kernel_size}; filters have an odd side"):
        Filters(2, 1, 4, kernel_size)
