# SPDX-License-Identifier: Apache-2.0
"""What a third party may do to every image before it trains, once: lossy codecs, fewer gray values, blur, resampling.

Each function takes and gives a (C, *spatial) image of unit intensities, in 2D or 3D, and knows of no method that moved
its voxels.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from monai.transforms import GaussianSmooth, MedianSmooth
from monai.utils import convert_to_tensor
from numpy.typing import NDArray
from openjpeg.utils import decode, encode_array
from PIL import Image
from torch import Tensor

from monai_salm.surrogates import ResizeView

__all__ = ["bit_depth", "blur", "jpeg", "jpeg2000", "jpeg2000_copy", "low_pass", "median", "narrowed", "respaced"]

_LEAST_SIDE = 128
"""Pixels per side that the JPEG 2000 codec wants; smaller planes are continued by their mirror images."""


def jpeg(image: Tensor, quality: int) -> Tensor:
    """Baseline JPEG of 8 bits (ITU-T T.81): red, green and blue of an image together, all else plane by plane.

    Args:
        image: (C, *spatial) unit intensities; three channels of a 2D image are its colors, whose differences are kept
            at half the size (4:2:0, as libjpeg does by default). A volume is a stack of planes across its last axis.
        quality: of libjpeg's scale, 1 to 100.

    Example:
        >>> ramp = torch.linspace(0, 1, 64).reshape(1, 8, 8)
        >>> bool((jpeg(ramp, 95) - ramp).abs().max() < 0.05)
        True
    """

    def copy(plane: NDArray[np.generic]) -> NDArray[np.uint8]:
        stream = io.BytesIO()
        Image.fromarray(plane.astype(np.uint8)).save(stream, "JPEG", quality=quality)
        return np.asarray(Image.open(stream))

    if image.ndim == 3 and len(image) == 3:
        colors = copy((image.clamp(0, 1) * 255).round().permute(1, 2, 0).numpy())
        return torch.from_numpy(np.ascontiguousarray(colors.transpose(2, 0, 1), np.float32)) / 255
    return _by_plane(image, 8, copy)


def jpeg2000(image: Tensor, ratio: float) -> Tensor:
    """Irreversible JPEG 2000 (ISO/IEC 15444-1) of 12 bits, plane by plane.

    Args:
        image: (C, *spatial) unit intensities; a volume is a stack of planes across its last axis.
        ratio: of compression.
    """
    return _by_plane(image, 12, lambda plane: jpeg2000_copy(plane, 12, ratio))


def jpeg2000_copy(levels: NDArray[np.uint16], bits: int, ratio: float) -> NDArray[np.integer]:
    """(H, W) gray values of ``bits`` bits after JPEG 2000 at a compression ratio."""
    rows, columns = levels.shape
    extended = np.pad(levels, [(0, max(0, _LEAST_SIDE - rows)), (0, max(0, _LEAST_SIDE - columns))], "symmetric")
    stream = encode_array(
        extended.astype(np.uint8 if bits <= 8 else np.uint16), bits_stored=bits, compression_ratios=[ratio]
    )
    return decode(stream)[:rows, :columns]


def _by_plane(image: Tensor, bits: int, copy: Callable[[NDArray[np.uint16]], NDArray[np.integer]]) -> Tensor:
    top = 2**bits - 1
    levels = (image.clamp(0, 1) * top).round().numpy().astype(np.uint16)
    planes = np.moveaxis(levels, -1, 1) if image.ndim == 4 else levels[:, None]
    copies = np.stack([np.stack([copy(plane) for plane in channel]) for channel in planes])
    copies = np.moveaxis(copies, 1, -1) if image.ndim == 4 else copies[:, 0]
    return torch.from_numpy(np.ascontiguousarray(copies, np.float32)) / top


def bit_depth(image: Tensor, bits: int) -> Tensor:
    """The nearest of ``2 ** bits`` gray values.

    Example:
        >>> bit_depth(torch.tensor([[[0.1, 0.4, 0.9]]]), 1).tolist()
        [[[0.0, 0.0, 1.0]]]
    """
    top = 2**bits - 1
    return (image.clamp(0, 1) * top).round() / top


def narrowed(image: Tensor, low: float, high: float) -> Tensor:
    """A narrower intensity window, from ``low`` to ``high`` of the one before; what is outside is cut off."""
    return ((image - low) / (high - low)).clamp(0, 1)


def blur(image: Tensor, sigma: float) -> Tensor:
    """MONAI's Gaussian blur, which takes what lies beyond the border for 0; ``sigma`` in voxels."""
    return convert_to_tensor(GaussianSmooth(sigma)(image), track_meta=False)


def median(image: Tensor, radius: int) -> Tensor:
    """The median over ``2 * radius + 1`` voxels per axis."""
    return convert_to_tensor(MedianSmooth(radius)(image), track_meta=False)


def low_pass(image: Tensor, cut: float) -> Tensor:
    """Without the frequencies above ``cut`` cycles per voxel (0.5 is all of them).

    Example:
        >>> stripes = torch.tensor([[0.0, 1.0] * 4] * 8)[None]
        >>> bool((low_pass(stripes, 0.4) - 0.5).abs().max() < 1e-6)
        True
    """
    axes = tuple(range(1, image.ndim))
    squares = [torch.fft.fftfreq(size) ** 2 for size in image.shape[1:]]
    distance = torch.stack(torch.meshgrid(*squares, indexing="ij")).sum(0).sqrt()
    return torch.fft.ifftn(torch.fft.fftn(image, dim=axes) * (distance <= cut), dim=axes).real


def respaced(image: Tensor, factor: float) -> Tensor:
    """Resampled to voxels that are ``factor`` times as large, anti-aliased, and back to the grid that it had."""
    size = image.shape[1:]
    small = ResizeView([max(1, round(length / factor)) for length in size])(image[None])
    return ResizeView(size)(small)[0]
