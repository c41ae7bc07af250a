# SPDX-License-Identifier: Apache-2.0
"""Networks that the field compares with, in the sizes that small images ask for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.networks.layers import Conv
from monai.networks.nets import DenseNet
from torch import Tensor, nn


def small_densenet121(spatial_dims: int, in_channels: int, out_channels: int) -> DenseNet:
    """MONAI's DenseNet-121 with the stem of ``small_resnet``; behind its own, nothing is left of 28 voxels."""
    network = DenseNet(spatial_dims, in_channels, out_channels)
    stem = Conv[Conv.CONV, spatial_dims](in_channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight)
    network.features.conv0 = stem
    return network


class SmallViT(nn.Module):
    """A vision transformer (arXiv 2010.11929) of the size that small images ask for: learned positions, normalization
    before each sublayer, and the mean of all tokens before a linear head. Of PyTorch's layers, since MONAI's own ViT
    needs einops.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: number of classes.
        spatial_size: of its input in voxels; what is left over beyond whole patches is not seen.
        patch_size: voxels per axis of one token.
        width: channels of a token; a head of attention has 16.
        layers: transformer layers.

    Example:
        >>> SmallViT(2, 1, 3, (28, 28))(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        spatial_size: Sequence[int],
        patch_size: int = 4,
        width: int = 64,
        layers: int = 4,
    ) -> None:
        super().__init__()
        self.patches = Conv[Conv.CONV, spatial_dims](in_channels, width, patch_size, stride=patch_size)
        self.positions = nn.Parameter(torch.empty(math.prod(size // patch_size for size in spatial_size), width))
        nn.init.trunc_normal_(self.positions, std=0.02)
        layer = nn.TransformerEncoderLayer(
            width, width // 16, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        # The encoder copies one layer, so that all would start alike.
        for weight in self.encoder.parameters():
            if weight.ndim > 1:
                nn.init.xavier_uniform_(weight)
        self.head = nn.Linear(width, out_channels)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.patches(image).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.encoder(tokens).mean(1))
