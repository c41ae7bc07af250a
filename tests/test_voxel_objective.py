# SPDX-License-Identifier: Apache-2.0
"""The objective of voxel labels: tiles that add up to the whole volume, and classes that weigh the same."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lattices import CROSS_ENTROPY, free, gen
from monai.networks.nets import UNet
from torch import Tensor, nn

from monai_salm.convolution import mean_nearby
from monai_salm.perturbations.base import frozen
from monai_salm.perturbations.masks import SparsityMask
from monai_salm.perturbations.salm import SALM
from monai_salm.perturbations.voxels import IGNORED, VoxelObjective
from monai_salm.surrogates import PaddedNetwork, RandomView, Surrogate, TextureReader

LARGE = 10**6  # a tile that holds every volume

SIZES = {2: (45, 38), 3: (21, 18, 13)}
"""Divided neither by the tile nor by the stride."""


def local_network(dims: int, classes: int = 3) -> Surrogate:
    """Two 3-voxel convolutions: a receptive field of radius 2, no stride."""
    torch.manual_seed(1)
    conv, norm = ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[dims - 2]
    layers = [conv(1, 4, 3, padding=1), norm(4), nn.Tanh(), conv(4, classes, 3, padding=1)]
    return _trained(Surrogate(nn.Sequential(*layers)))


def strided_network(dims: int, classes: int = 3) -> Surrogate:
    """A U-Net of total stride 4, with a receptive field of radius 13 (see the test of it)."""
    torch.manual_seed(1)
    unet = UNet(dims, 1, classes, (4, 8, 8), (2, 2), num_res_units=1, norm="BATCH")
    return _trained(Surrogate(PaddedNetwork(unet, 4)))


def _trained(network: Surrogate) -> Surrogate:
    """Normalization statistics as after training, so that they are not the identity; double precision."""
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network.double().eval()


def volumes(size: tuple[int, ...], classes: int = 3, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Images, perturbations and voxel labels with blocks of every class."""
    shape = (batch, 1, *size)
    image = torch.rand(shape, generator=gen(1), dtype=torch.double)
    delta = 0.03 * torch.randn(shape, generator=gen(2), dtype=torch.double)
    label = torch.zeros(shape, dtype=torch.uint8)
    for index in range(1, classes):
        block = tuple(slice(length * index // 4, length * (index + 1) // 4) for length in size)
        label[(..., *block)] = index
    return image, delta, label


def gradients(network: Surrogate, tile: tuple[int, ...], halo: int) -> tuple[Tensor, float]:
    objective = VoxelObjective(network, CROSS_ENTROPY, tile_size=tile, halo=halo)
    with frozen(network):
        return objective.gradient(*volumes(SIZES[len(tile)]), gen()), objective.mean()


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class TestTiles:
    @pytest.mark.parametrize("dims", [2, 3])
    def test_the_gradient_is_that_of_the_whole_volume(self, dims):
        network = local_network(dims)
        whole, loss = gradients(network, (LARGE,) * dims, 0)
        for tile, halo in (((7,) * dims, 2), ((5, 11, 4)[:dims], 3)):
            parts, their_loss = gradients(network, tile, halo)
            assert difference(parts, whole) < 1e-12
            assert their_loss == pytest.approx(loss)
        short, _ = gradients(network, (7,) * dims, 1)
        assert difference(short, whole) > 1e-3

    @pytest.mark.parametrize("dims", [2, 3])
    def test_so_it_is_with_a_strided_network_and_padded_sizes(self, dims):
        network = strided_network(dims)
        whole, loss = gradients(network, (LARGE,) * dims, 0)
        tile, halo = ((16,) * dims, 16) if dims == 2 else ((8, 8, 4), 16)
        parts, their_loss = gradients(network, tile, halo)
        assert difference(parts, whole) < 1e-12 and their_loss == pytest.approx(loss)
        for wrong_tile, wrong_halo in ((tile, 0), ((6,) * dims, halo)):  # no halo; off the stride
            wrong, _ = gradients(network, wrong_tile, wrong_halo)
            assert difference(wrong, whole) > 1e-3

    @pytest.mark.parametrize("dims", [2, 3])
    def test_so_it_is_with_a_texture_reader_and_the_halo_it_asks_for(self, dims):
        torch.manual_seed(1)
        network = _trained(Surrogate(TextureReader(dims, 1, 3, features=4, kernel_size=5)))
        whole, _ = gradients(network, (LARGE,) * dims, 4)
        assert difference(gradients(network, (7,) * dims, 4)[0], whole) < 1e-12
        with pytest.raises(ValueError, match="halo is 3; the surrogate reads voxels up to 4 away, so use 4 or more"):
            gradients(network, (7,) * dims, 3)
        network.network.reach = 0  # it is no more than is needed
        assert difference(gradients(network, (7,) * dims, 3)[0], whole) > 1e-4

    def test_a_halo_of_16_covers_the_receptive_field_of_the_bundled_kind_of_network(self):
        network = strided_network(2)
        image = torch.rand(1, 1, 80, 80, generator=gen(), dtype=torch.double, requires_grad=True)
        radius = 0
        for at in range(36, 40):  # one for each phase of the stride
            (seen,) = torch.autograd.grad(network(image)[0, :, at, at].sum(), image)
            places = seen[0, 0].nonzero()
            radius = max(radius, at - int(places.min()), int(places.max()) - at)
        assert radius == 13

    @pytest.mark.parametrize("dims", [2, 3])
    @pytest.mark.parametrize("scope", ["image", "class"])
    def test_final_perturbations_are_equal_too(self, dims, scope):
        network = strided_network(dims)
        image, _, label = volumes(SIZES[dims])
        lattice = free(image.shape)
        method = SALM(mask=SparsityMask(ratio=0.2, scope=scope), steps=4)
        found = []
        for tile, halo in (((LARGE,) * dims, 0), ((8,) * dims, 16), ((8,) * dims, 0)):
            objective = VoxelObjective(network, CROSS_ENTROPY, tile_size=tile, halo=halo)
            found.append(method(objective, image, label, lattice, generator=gen()))
        assert torch.equal(found[0], found[1]) and found[0].any()
        assert not torch.equal(found[0], found[2])

    @settings(max_examples=40, deadline=None)
    @given(
        st.integers(2, 3).flatmap(lambda n: st.tuples(*[st.lists(st.integers(1, 40), min_size=n, max_size=n)] * 2)),
        st.integers(0, 9),
    )
    def test_they_cover_every_voxel_once(self, sizes, halo):
        size, tile = sizes
        seen = torch.zeros(size, dtype=torch.int)
        objective = VoxelObjective(nn.Identity(), CROSS_ENTROPY, tile_size=tile, halo=halo)
        for inner, outer in objective.tiles(size):
            assert inner[0] is outer[0] is Ellipsis
            for own, around, length, most in zip(inner[1:], outer[1:], size, tile, strict=True):
                assert 0 < own.stop - own.start <= most
                assert around == slice(max(0, own.start - halo), min(length, own.stop + halo))
            seen[inner] += 1
        assert (seen == 1).all()

    def test_a_volume_below_the_tile_is_one(self):
        objective = VoxelObjective(nn.Identity(), CROSS_ENTROPY, tile_size=(8, 8, 8), halo=4)
        assert len(list(objective.tiles((8, 5, 1)))) == 1
        assert len(list(objective.tiles((9, 5, 1)))) == 2

    def test_halos_have_no_loss(self):
        truths, sizes = [], []

        def spy(logits: Tensor, truth: Tensor) -> Tensor:
            truths.append(truth)
            sizes.append(tuple(logits.shape[2:]))
            return CROSS_ENTROPY(logits, truth)

        network = local_network(2)
        objective = VoxelObjective(network, spy, tile_size=(16, 16), halo=3)
        image, delta, label = volumes((40, 20))
        objective.gradient(image, delta, label, gen())
        counted = [int((truth >= 0).sum()) for truth in truths]
        assert sum(counted) == label.numel() and max(counted) == 2 * 16 * 16
        assert sorted(sizes) == sorted([(19, 19), (19, 7), (22, 19), (22, 7), (11, 19), (11, 7)])
        for index in range(3):
            assert sum(int((truth == index).sum()) for truth in truths) == int((label == index).sum())

    @pytest.mark.parametrize("size", [(17, 9, 1), (1, 1, 1), (3, 2, 2)])
    def test_a_single_slice_and_a_tiny_volume_work(self, size):
        network = strided_network(3)
        image, delta, _ = volumes(size)
        label = torch.zeros(image.shape, dtype=torch.uint8)
        label[:, :, 0] = 1
        found = []
        for tile, halo in (((LARGE,) * 3, 0), ((8, 8, 8), 16)):
            objective = VoxelObjective(network, CROSS_ENTROPY, tile_size=tile, halo=halo)
            found.append(objective.gradient(image, delta, label, gen()))
        assert torch.isfinite(found[0]).all() and found[0].any()
        assert torch.allclose(*found, rtol=1e-9, atol=1e-15)

    def test_each_tile_has_a_random_view_of_its_own_and_the_seed_decides_it(self):
        image, delta, label = volumes((20, 20))
        drawn = []

        class Views(RandomView):
            def draw(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
                drawn.append(super().draw(batch, generator))
                return drawn[-1]

        network = local_network(2).float()
        objective = VoxelObjective(network, CROSS_ENTROPY, view=Views(2), tile_size=(10, 10), halo=2)
        found = [objective.gradient(image.float(), delta.float(), label, gen(seed)) for seed in (3, 3, 4)]
        assert len({str(one["theta"]) for one in drawn[:4]}) == 4
        assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])

    def test_its_text_tells_the_tiles(self):
        assert "tile_size=(4, 6), halo=3" in str(VoxelObjective(nn.Identity(), CROSS_ENTROPY, tile_size=(4, 6), halo=3))

    def test_impossible_tiles_are_refused(self):
        sizes = [{"tile_size": size} for size in ((0, 4), (4.5, 4), 4, "44", None)]
        for options in (*sizes, {"halo": -1}, {"halo": 0.5}, {"halo": None}):
            with pytest.raises(ValueError, match=f"{next(iter(options))}.* is "):
                VoxelObjective(nn.Identity(), CROSS_ENTROPY, **options)

    @pytest.mark.parametrize("tile", [(8, 8), (64, 64)])
    @pytest.mark.parametrize("shape", [(2, 1, 14, 12), (2, 1, 12, 11), (2,), (2, 12, 12)])
    def test_labels_of_another_shape_are_refused(self, tile, shape):
        image, delta, _ = volumes((12, 12))
        objective = VoxelObjective(local_network(2), CROSS_ENTROPY, tile_size=tile)
        for call in (objective.gradient, objective):
            with pytest.raises(ValueError, match=r"\(2, 1, 12, 12\)"):
                call(image, delta, torch.ones(shape, dtype=torch.uint8), gen())


class TestGuard:
    """A second network, which learned the task from clean images."""

    def networks(self, dims: int = 2) -> Surrogate:
        reader, guard = local_network(dims), local_network(dims)
        with torch.no_grad():
            for weight in guard.parameters():
                weight.add_(torch.randn(weight.shape, generator=gen(7), dtype=torch.double) / 2)
        return Surrogate(reader.network, guard=guard.network).double().eval()

    @pytest.mark.parametrize("tile", [LARGE, 7])
    @pytest.mark.parametrize("dims", [2, 3])
    def test_its_part_of_the_gradient_has_the_asked_size(self, dims, tile):
        network, data = self.networks(dims), volumes(SIZES[dims])
        whole = {"tile_size": (LARGE,) * dims, "halo": 0}
        alone, guards = (
            VoxelObjective(Surrogate(each), CROSS_ENTROPY, **whole).gradient(*data, gen())
            for each in (network.network, network.guard)
        )
        objective = VoxelObjective(network, CROSS_ENTROPY, tile_size=(tile,) * dims, halo=2, guard_weight=0.5)
        part = objective.gradient(*data, gen()) - alone
        axes = tuple(range(1, part.ndim))
        assert torch.allclose(part.abs().mean(axes), 0.5 * alone.abs().mean(axes))
        guards = guards - mean_nearby(guards)
        for found, expected in zip(part, guards, strict=True):
            assert difference(found / found.norm(), expected / expected.norm()) < 1e-9
        assert objective.passes == 2 * len(part) and objective.mean() > 0

    def test_perturbations_harm_it_less(self):
        network = self.networks()
        image, _, label = volumes(SIZES[2])
        losses = []
        for weight in (0.0, 2.0):
            objective = VoxelObjective(network, CROSS_ENTROPY, tile_size=(64, 64), halo=2, guard_weight=weight)
            delta = SALM(mask=SparsityMask(ratio=0.5))(objective, image, label, free(image.shape), generator=gen())
            losses.append(objective.guard_loss(image + delta / 255, label, gen()).sum())
        assert losses[1] < losses[0]

    def test_a_weight_without_a_guard_or_below_zero_is_refused(self):
        with pytest.raises(ValueError, match="has no guard"):
            VoxelObjective(local_network(2), CROSS_ENTROPY, tile_size=(4, 4), guard_weight=0.1)
        with pytest.raises(ValueError, match=r"guard_weight is -0\.1; it must be a number, 0 or more"):
            VoxelObjective(self.networks(), CROSS_ENTROPY, tile_size=(4, 4), guard_weight=-0.1)


class Pointwise(nn.Module):
    """Logits (0, x, 2x, ...) of a voxel's intensity x: the loss and its gradient are known in closed form."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.view = nn.Identity()

    def network(self, image: Tensor) -> Tensor:
        return torch.cat([index * image for index in range(self.classes)], 1)


def voxel_losses(image: Tensor, label: Tensor, classes: int) -> Tensor:
    """Cross-entropy of every voxel, from its definition."""
    exponents = torch.stack([index * image for index in range(classes)])
    return exponents.exp().sum(0).log() - label * image


class TestClasses:
    def objective(self, classes: int = 3, tile: int = LARGE) -> VoxelObjective:
        return VoxelObjective(Pointwise(classes), CROSS_ENTROPY, tile_size=(tile, tile), halo=1)

    @pytest.mark.parametrize("tile", [LARGE, 4])
    def test_every_class_of_an_image_weighs_the_same(self, tile):
        image, delta, label = volumes((9, 10))
        label[1][label[1] == 2] = 1  # the second image has two classes only
        each = voxel_losses(image + delta, label, 3)
        expected = [
            torch.stack([losses[own == index].mean() for index in own.unique()]).mean()
            for losses, own in zip(each, label, strict=True)
        ]
        objective = self.objective(tile=tile)
        objective.gradient(image, delta, label, gen())
        assert objective.mean() == pytest.approx(float(sum(expected)) / 2, rel=1e-6)
        assert torch.allclose(objective(image, delta, label, gen()), torch.stack(expected))

    @pytest.mark.parametrize("tile", [LARGE, 4])
    def test_gradient_has_its_closed_form(self, tile):
        """Of a two-class voxel: the probability of the wrong class, times the voxel's weight."""
        image, delta, label = volumes((9, 10), classes=2)
        count = label.sum((1, 2, 3), keepdim=True)
        weight = torch.where(label == 1, 0.5 / count, 0.5 / (90 - count))
        expected = weight * (torch.sigmoid(image + delta) - label)
        found = self.objective(2, tile).gradient(image, delta, label, gen())
        assert torch.allclose(found, expected, rtol=1e-6)

    def test_a_case_without_foreground_is_its_background(self):
        image, delta, _ = volumes((9, 10))
        label = torch.zeros(image.shape, dtype=torch.uint8)
        objective = self.objective(tile=4)
        assert objective.gradient(image, delta, label, gen()).any()
        assert objective.mean() == pytest.approx(float(voxel_losses(image + delta, label, 3).mean()))

    def test_ignored_voxels_count_nothing(self):
        image, delta, label = volumes((9, 10))
        label[..., 5:] = IGNORED
        objective = self.objective(tile=4)
        gradient = objective.gradient(image, delta, label, gen())
        assert not gradient[..., 5:].any() and (gradient[..., :5] != 0).all()
        whole = objective.mean()
        objective.reset_mean()
        objective.gradient(image[..., :5], delta[..., :5], label[..., :5], gen())
        assert whole == pytest.approx(objective.mean())
        nothing = torch.full_like(label, IGNORED)
        assert not objective.gradient(image, delta, nothing, gen()).any()
        assert not objective(image, delta, nothing, gen()).any()

    def test_the_sum_of_weights_is_one_per_image(self):
        _, _, label = volumes((9, 10))
        label[..., 7:] = IGNORED

        def ones(logits: Tensor, truth: Tensor) -> Tensor:
            return (truth >= 0).double()

        image = torch.zeros(label.shape, dtype=torch.double)
        objective = VoxelObjective(Pointwise(3), ones, tile_size=(4, 4), halo=1)
        assert torch.allclose(objective(image, image, label, gen()), torch.ones(2, dtype=torch.double), rtol=1e-6)

    def test_passes_and_the_mean_are_per_image_whatever_the_tiles(self):
        image, delta, label = volumes((9, 10))
        for tile in (LARGE, 3):
            objective = self.objective(tile=tile)
            objective.gradient(image, delta, label, gen())
            objective(image, delta, label, gen())
            assert objective.passes == 4 and math.isfinite(objective.mean())


def test_the_scaling_benchmark_on_tiny_volumes(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    module = importlib.import_module("voxel_scaling")
    monkeypatch.setattr(module, "in_fresh_process", lambda function, *given, exact=False: function(*given))
    for name, value in {"SIZES": (8, 12, 16), "TILE": 8, "HALO": 16, "STEPS": 1, "WHOLE_UP_TO": 12}.items():
        monkeypatch.setattr(module, name, value)
    output = tmp_path / "out.json"
    module.main(["--output", str(output), "--networks", "unet", "pointwise"])
    before = output.read_text()
    monkeypatch.setattr(module, "measure", None)  # would fail if it were called
    module.main(["--output", str(output), "--networks", "unet", "--resume"])
    assert output.read_text() == before
    results = json.loads(output.read_text())["networks"]
    for found in results.values():
        assert [row["voxels"] for row in found["rows"]] == [8**3, 12**3, 16**3]
        assert found["rows"][0]["seen_voxels"] == 8**3 and found["rows"][2]["seen_voxels"] == 8 * 16**3
        assert [(pair["size"], pair["double"]) for pair in found["whole_against_tiled"]] == [(12, False), (12, True)]
        assert found["whole_against_tiled"][1]["equal"] and found["whole_against_tiled"][0]["equal_fraction"] > 0.99
    assert module.power([1, 10, 100], [3, 30, 300])["b"] == pytest.approx(1)
    assert module.line([0, 1, 2], [5, 7, 9]) == pytest.approx({"intercept": 5, "slope": 2, "largest_residual": 0})
    assert str(tmp_path) not in output.read_text()
