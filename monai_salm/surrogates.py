# SPDX-License-Identifier: Apache-2.0
"""Networks behind a differentiable view, so that perturbations live on the file's own voxel grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.layers import Conv, Pool
from monai.networks.nets import ResNet
from torch import Tensor, nn

from monai_salm.convolution import Filters, mean_nearby, mean_of_means
from monai_salm.errors import check_number, check_size


def resize_matrix(size_in: int, size_out: int, device: torch.device) -> Tensor:
    """(size_out, size_in) weights of linear resizing with a triangle filter widened against aliasing.

    The same filter as ``torch.nn.functional.interpolate(mode="bilinear", antialias=True)``, for one axis.
    """
    scale = float(size_in) / float(size_out)
    support = max(scale, 1.0)
    center = (torch.arange(size_out, device=device, dtype=torch.float32) + 0.5) * scale - 0.5
    source = torch.arange(size_in, device=device, dtype=torch.float32)
    weight = (1 - (source[None] - center[:, None]).abs() / support).clamp(min=0)
    return weight / weight.sum(1, keepdim=True)


class ResizeView(nn.Module):
    """Resize (B, C, *native) to (B, C, *spatial_size), anti-aliased, differentiable and scriptable, in 2D or 3D.

    Its size goes along with the weights of a network, which do not load where another one is seen.

    Args:
        spatial_size: size of the network's input in voxels.

    Example:
        >>> ResizeView((8, 8))(torch.rand(2, 1, 20, 31)).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, spatial_size: Sequence[int]) -> None:
        super().__init__()
        self.spatial_size: list[int] = check_size("spatial_size", spatial_size)
        self.register_buffer("size", torch.tensor(self.spatial_size))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        seen = state_dict.setdefault(f"{prefix}size", self.size).tolist()  # earlier versions did not keep it
        if seen != self.spatial_size:
            args[-1].append(f"the weights are of a network with spatial_size {seen}, this one has {self.spatial_size}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"spatial_size={self.spatial_size}"

    def forward(self, image: Tensor) -> Tensor:
        for axis, size in enumerate(self.spatial_size):
            shape = list(image.shape)
            length = shape[axis + 2]
            if length != size:
                weight = resize_matrix(length, size, image.device).to(image.dtype)
                if axis + 3 == len(shape):
                    image = image @ weight.t()
                else:  # products of matrices as they lie in memory: a transposed image would be copied
                    shape[axis + 2] = size
                    rows = image.flatten(0, axis + 1).flatten(2)
                    image = torch.bmm(weight.expand(len(rows), size, length), rows).reshape(shape)
        return image.contiguous()


class Surrogate(nn.Module):
    """A network that sees unit-intensity images of any size through a :py:class:`ResizeView`.

    Args:
        network: classifier of (B, 1, *spatial_size) images, or a network of voxel labels.
        spatial_size: size of its input in voxels; None: it sees every image on the image's own grid.
        guard: a second network of the same form, which learns the task itself from the clean images, so that what is
            done to them can be kept from harming such networks; None: there is none.
    """

    def __init__(
        self, network: nn.Module, spatial_size: Sequence[int] | None = None, guard: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.view = nn.Identity() if spatial_size is None else ResizeView(spatial_size)
        self.network, self.guard = network, guard

    def forward(self, image: Tensor) -> Tensor:
        return self.network(self.view(image))


class PaddedNetwork(nn.Module):
    """A network of voxel labels for images of any size: pads with zeros at the end of each axis, and crops the result.

    Args:
        network: maps (B, C, *spatial) to (B, n_classes, *spatial) for sizes that ``multiple`` divides.
        multiple: total stride of the network.

    Example:
        >>> PaddedNetwork(nn.AvgPool2d(1), 4)(torch.rand(1, 1, 5, 8)).shape
        torch.Size([1, 1, 5, 8])
    """

    def __init__(self, network: nn.Module, multiple: int) -> None:
        super().__init__()
        self.network, self.multiple = network, multiple

    def forward(self, image: Tensor) -> Tensor:
        size = list(image.shape[2:])
        missing: list[int] = []
        for length in size[::-1]:
            missing += [0, -length % self.multiple]
        logits = self.network(F.pad(image, missing))
        for axis, length in enumerate(size):
            logits = logits.narrow(axis + 2, 0, length)
        return logits


class SmallCNN(nn.Module):
    """Convolution blocks with batch normalization, max pooling and a global average: the cheapest useful classifier.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: number of classes.
        features: channels of each block; the grid is halved after every block but the last.

    Example:
        >>> SmallCNN(2, 1, 3)(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, out_channels: int, features: Sequence[int] = (16, 32, 64)
    ) -> None:
        super().__init__()
        conv, pool = Conv[Conv.CONV, spatial_dims], Pool[Pool.MAX, spatial_dims]
        norm = nn.BatchNorm2d if spatial_dims == 2 else nn.BatchNorm3d
        blocks: list[nn.Module] = []
        for i, width in enumerate(features):
            previous = features[i - 1] if i else in_channels
            blocks += [conv(previous, width, 3, padding=1, bias=False), norm(width), nn.ReLU(inplace=True)]
            if i < len(features) - 1:
                blocks.append(pool(2))
        self.features = nn.Sequential(*blocks)
        self.head = nn.Linear(features[-1], out_channels)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image).flatten(2).mean(2))


class LinearClassifier(nn.Module):
    """A weight per voxel and class and no bias: the cheapest classifier, which reads what every network can learn.

    Args:
        spatial_size: of its input in voxels.
        in_channels: channels of the input.
        out_channels: number of classes.

    Example:
        >>> LinearClassifier((4, 4), 1, 3)(torch.zeros(1, 1, 4, 4)).tolist()
        [[0.0, 0.0, 0.0]]
    """

    def __init__(self, spatial_size: Sequence[int], in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels * math.prod(spatial_size), out_channels, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        return self.linear(image.flatten(1))


class TextureReader(nn.Module):
    """The smallest network that tells textures apart, voxel by voxel: filters, rectified, and a vote of those nearby.

    It sees only what lies within ``kernel_size // 2 + 2`` voxels (``reach``) and has no stride: tiles with such a halo
    give what the whole image would. What so simple a network reads, others learn early.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: number of classes, background included.
        features: number of filters; default: 16, or four per class where that is more.
        kernel_size: odd side of a filter in voxels.

    Example:
        >>> TextureReader(3, 1, 2)(torch.rand(1, 1, 9, 10, 11)).shape
        torch.Size([1, 2, 9, 10, 11])
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, out_channels: int, features: int | None = None, kernel_size: int = 7
    ) -> None:
        super().__init__()
        check_number("out_channels", out_channels, least=1, whole=True)
        features = features or max(16, 4 * out_channels)
        filters = Filters(spatial_dims, in_channels, features, kernel_size)
        norm = nn.BatchNorm2d if spatial_dims == 2 else nn.BatchNorm3d
        self.filters = nn.Sequential(filters, norm(features), nn.ReLU(inplace=True))
        self.vote = Conv[Conv.CONV, spatial_dims](features, out_channels, 1, bias=False)
        self.bias, self.reach = nn.Parameter(torch.zeros(out_channels, *[1] * spatial_dims)), kernel_size // 2 + 2

    def forward(self, image: Tensor) -> Tensor:
        return mean_nearby(self.vote(self.filters(image))) + self.bias

    @torch.no_grad()
    def look_for(self, textures: Tensor, generator: torch.Generator) -> None:
        """Make random pieces of the textures the filters, each in both signs: learning then starts with what to find.

        Args:
            textures: (n, in_channels or 1, *spatial), no smaller than a filter; zeros and flat pieces change nothing.
            generator: decides the pieces.

        Raises:
            ValueError: When there is no texture, or they are smaller than a filter or more than the classes.
        """
        if len(textures) > len(self.bias):
            raise ValueError(f"out_channels is {len(self.bias)} and there are {len(textures)} classes; set num_classes")
        textures = textures[textures.flatten(1).any(1)]
        weight = self.filters[0].weight
        if not len(textures) or textures.ndim != weight.ndim or min(textures.shape[2:]) < max(weight.shape[2:]):
            raise ValueError(
                f"textures are {tuple(textures.shape[2:])}, filters {tuple(weight.shape[2:])}; use patches, "
                "or a spatial_size, of as many axes and no smaller than kernel_size"
            )
        for index in range(0, len(weight), 2):
            texture = textures[index // 2 % len(textures)]
            for axis, (length, size) in enumerate(zip(texture.shape[1:], weight.shape[2:], strict=True), 1):
                texture = texture.narrow(axis, int(torch.randint(length - size + 1, (), generator=generator)), size)
            if (piece := texture - texture.mean()).any():
                weight[index : index + 2] = piece / piece.norm()
                weight[index + 1 : index + 2] *= -1


class TextureClassifier(TextureReader):
    """Names the class whose texture an image has: the mean over all voxels of what :py:class:`TextureReader` votes.

    Example:
        >>> TextureClassifier(2, 1, 3)(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 3])
    """

    def forward(self, image: Tensor) -> Tensor:
        return mean_of_means(self.filters(image)) @ self.vote.weight.flatten(1).T + self.bias.flatten()  # as of votes


def small_resnet(
    spatial_dims: int, in_channels: int, out_channels: int, width: int = 16, blocks: Sequence[int] = (1, 1, 1, 1)
) -> ResNet:
    """MONAI's ResNet of basic blocks with a stem for small images: a convolution of 3 voxels per axis, of stride 1.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: number of classes.
        width: channels of the first stage; ResNet-18 has 64.
        blocks: of each of the four stages; ``(1, 1, 1, 1)`` is ResNet-10, ``(2, 2, 2, 2)`` ResNet-18.
    """
    return ResNet(
        "basic",
        list(blocks),
        [width, 2 * width, 4 * width, 8 * width],
        spatial_dims=spatial_dims,
        n_input_channels=in_channels,
        num_classes=out_channels,
        conv1_t_size=3,
        conv1_t_stride=1,
        no_max_pool=False,
    )


class RandomView(nn.Module):
    """Random flips, affine maps, contrast and noise on a batch: what a third party's loader does, differentiably.

    Args:
        spatial_dims: 2 or 3.
        flip: flip each axis with probability 1/2.
        rotate: largest rotation in radians (in 3D about each axis).
        scale: largest relative zoom.
        translate: largest shift as a fraction of the image's size.
        contrast: largest relative change of contrast and largest shift of brightness.
        noise: largest standard deviation of Gaussian noise, in unit intensity.
        affine_prob: probability that an image is rotated, zoomed and shifted at all; the others keep their sharpness.
    """

    def __init__(
        self,
        spatial_dims: int,
        flip: bool = True,
        rotate: float = math.radians(10),
        scale: float = 0.1,
        translate: float = 0.05,
        contrast: float = 0.1,
        noise: float = 0.02,
        affine_prob: float = 1.0,
    ) -> None:
        super().__init__()
        self.spatial_dims, self.affine_prob = spatial_dims, affine_prob
        self.flip, self.rotate, self.scale, self.translate = flip, rotate, scale, translate
        self.contrast, self.noise = contrast, noise

    def extra_repr(self) -> str:
        names = ("flip", "rotate", "scale", "translate", "contrast", "noise", "affine_prob")
        return ", ".join(f"{name}={getattr(self, name):g}" for name in names)

    def draw(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Parameters of one view per image; the same parameters give the same view of another batch."""
        dims = self.spatial_dims

        def uniform(*shape: int) -> Tensor:
            return torch.rand(batch, *shape, generator=generator) * 2 - 1

        matrix = torch.diag_embed(1 + self.scale * uniform(1).expand(batch, dims))
        for a in range(dims):
            for b in range(a + 1, dims):
                angle = self.rotate * uniform()
                turn = torch.eye(dims).repeat(batch, 1, 1)
                turn[:, a, a] = turn[:, b, b] = angle.cos()
                turn[:, a, b], turn[:, b, a] = -angle.sin(), angle.sin()
                matrix = turn @ matrix
        side = torch.where(uniform(1, dims) < 0, -1.0, 1.0) if self.flip else torch.ones(())
        shift = 2 * self.translate * uniform(dims, 1)
        if self.affine_prob < 1:
            moved = torch.rand(batch, 1, 1, generator=generator) < self.affine_prob
            matrix, shift = torch.where(moved, matrix, torch.eye(dims)), shift * moved
        matrix = matrix * side
        return {
            "theta": torch.cat([matrix, shift], 2),
            "gain": 1 + self.contrast * uniform(),
            "offset": self.contrast * uniform() / 2,
            "noise": self.noise * uniform().abs(),
            "seed": torch.randint(2**31, (1,), generator=generator),
        }

    def forward(self, image: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        """View of (B, C, *spatial) images by parameters from :py:meth:`draw`."""
        drawn = {key: value.to(image.device) for key, value in drawn.items() if key != "seed"} | {"seed": drawn["seed"]}
        image = self._move(image, drawn, "bilinear")
        each = (-1, *[1] * (self.spatial_dims + 1))
        image = (image - 0.5) * drawn["gain"].reshape(each) + 0.5 + drawn["offset"].reshape(each)
        generator = torch.Generator(image.device).manual_seed(int(drawn["seed"]))
        noise = torch.randn(image.shape, generator=generator, device=image.device)
        return image + drawn["noise"].reshape(each) * noise

    def move_labels(self, label: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        """(B, 1, *spatial) class indices, moved as :py:meth:`forward` moves the image; each from its nearest voxel."""
        return self._move(label.float(), drawn, "nearest").to(label.dtype)

    @staticmethod
    def _move(image: Tensor, drawn: dict[str, Tensor], mode: str) -> Tensor:
        grid = F.affine_grid(drawn["theta"].to(image.device), list(image.shape), align_corners=False)
        return F.grid_sample(image, grid, mode=mode, padding_mode="border", align_corners=False)
