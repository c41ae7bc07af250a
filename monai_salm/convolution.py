# SPDX-License-Identifier: Apache-2.0
"""Filters of images whose gradient by the image is fast on a CPU too, and means of what is nearby."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_salm.errors import check_number

BLOCK = {2: (4, 4), 3: (2, 2, 4)}
"""Voxels whose gradients are computed side by side, by spatial dims."""


class Filters(nn.Module):
    """A convolution without bias that keeps the image's size, zeros beyond it.

    While its weights are frozen, as for a perturbation, only the image has a gradient. That of PyTorch takes a CPU
    several times as long as the convolution itself, since images have one channel where its kernels want many: here the
    voxels of a small block are the channels of a convolution with as large a stride (``benchmarks/convolution.py``).

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        features: number of filters.
        kernel_size: odd side of a filter in voxels, 3 or more.

    Raises:
        ValueError: When the side is even, or 1.

    Example:
        >>> Filters(2, 1, 16, 7)(torch.rand(2, 1, 28, 30)).shape
        torch.Size([2, 16, 28, 30])
    """

    def __init__(self, spatial_dims: int, in_channels: int, features: int, kernel_size: int) -> None:
        super().__init__()
        check_number("kernel_size", kernel_size, most=255, whole=True)
        if kernel_size % 2 != 1 or kernel_size < 3:
            raise ValueError(f"kernel_size is {kernel_size}; filters have an odd side of 3 or more")
        self.weight = nn.Parameter(torch.empty(features, in_channels, *[kernel_size] * spatial_dims))
        nn.init.kaiming_uniform_(self.weight, math.sqrt(5))  # as PyTorch's convolutions begin

    def extra_repr(self) -> str:
        return f"features={self.weight.shape[0]}, kernel_size={tuple(self.weight.shape[2:])}"

    def forward(self, image: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if image.requires_grad and not self.weight.requires_grad and image.device.type == "cpu":
                return _ByImage.apply(image, self.weight)
        return convolve(image, self.weight)


def convolve(image: Tensor, weight: Tensor) -> Tensor:
    """(B, features, *spatial) of (B, C, *spatial) images and (features, C, *kernel) filters of odd sides."""
    padding = [size // 2 for size in weight.shape[2:]]
    return F.conv2d(image, weight, padding=padding) if weight.ndim == 4 else F.conv3d(image, weight, padding=padding)


class _ByImage(torch.autograd.Function):
    """:py:func:`convolve` with :py:func:`image_gradient`; has no second derivative."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return convolve(image, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight = ctx.saved_tensors[0]
        return image_gradient(gradient.to(weight.dtype), weight), None  # autocast computes the result in less


def image_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """Gradient by the image of :py:func:`convolve`.

    Args:
        gradient: (B, features, *spatial), by the result.
        weight: (features, C, *kernel).

    Returns:
        (B, C, *spatial).
    """
    spatial, kernel, block = gradient.shape[2:], weight.shape[2:], BLOCK[weight.ndim - 2]
    dims, channels = len(block), weight.shape[1]
    mirrored = weight.flip(tuple(range(2, weight.ndim))).transpose(0, 1)
    # One filter for each voxel of a block: the mirrored one, moved to that voxel.
    moved = weight.new_zeros(*block, *mirrored.shape[:2], *(k + b - 1 for k, b in zip(kernel, block, strict=True)))
    for voxel in product(*map(range, block)):
        place = tuple(slice(at, at + k) for at, k in zip(voxel, kernel, strict=True))
        moved[(*voxel, slice(None), slice(None), *place)] = mirrored
    sides = [(k // 2, k // 2 + -size % b) for k, size, b in zip(kernel, spatial, block, strict=True)]
    # Padded apart: with padding of its own, PyTorch's strided convolution leaves its fast path.
    padded = F.pad(gradient, [width for side in reversed(sides) for width in side])
    convolution = F.conv2d if dims == 2 else F.conv3d
    blocks = convolution(padded, moved.flatten(0, dims), stride=block)
    counts = blocks.shape[2:]
    apart = blocks.reshape(len(gradient), *block, channels, *counts)
    order = [axis for at in range(dims) for axis in (dims + 2 + at, 1 + at)]
    whole = apart.permute(0, dims + 1, *order).reshape(
        len(gradient), channels, *(n * b for n, b in zip(counts, block, strict=True))
    )
    return whole[(..., *(slice(size) for size in spatial))]


def mean_nearby(image: Tensor, width: int = 5) -> Tensor:
    """Mean of (B, C, *spatial) over the window of odd ``width`` around each voxel, zeros beyond the image.

    Axis by axis, and padded apart, since PyTorch pools no axis shorter than the window. (The width is an argument, for
    TorchScript knows no constants of a module.)
    """
    image = F.pad(image, [width // 2] * (2 * image.ndim - 4))
    for axis in range(image.ndim - 2):
        window = [width if at == axis else 1 for at in range(image.ndim - 2)]
        image = F.avg_pool2d(image, window, 1) if image.ndim == 4 else F.avg_pool3d(image, window, 1)
    return image


def mean_of_means(image: Tensor, width: int = 5) -> Tensor:
    """(B, C): mean of :py:func:`mean_nearby` over all voxels, each counted in as many windows as it is part of."""
    for _ in range(image.ndim - 2):
        place = torch.arange(image.shape[-1], device=image.device)
        windows = (place + width // 2 + 1).clamp(max=len(place)) - (place - width // 2).clamp(min=0)
        image = image @ (windows / (width * len(place))).to(image.dtype)
    return image
