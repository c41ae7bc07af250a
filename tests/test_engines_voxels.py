# SPDX-License-Identifier: Apache-2.0
"""The trainer where every voxel has a label: patches, codes, and slices that are scaled differently."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fits import segmenter, stored, trainer, volumes, voxel_trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from monai_salm.engines.cases import Cases, Patches
from monai_salm.perturbations.base import Objective
from monai_salm.perturbations.budget import Budget
from monai_salm.perturbations.markers import LabelMarker
from monai_salm.perturbations.masks import SparsityMask
from monai_salm.perturbations.salm import SALM
from monai_salm.perturbations.voxels import IGNORED
from monai_salm.stored import SliceScaling, StoredCodec
from monai_salm.surrogates import RandomView, SmallCNN, Surrogate, TextureReader


class TestVoxelLabels:
    """The same trainer, where every voxel has a label."""

    @pytest.mark.parametrize("dims", [2, 3])
    def test_every_volume_is_perturbed_on_its_own_grid_within_budget_and_ratio(self, tmp_path, dims):
        fit = voxel_trainer(tmp_path, dims)
        fit.run()
        for item in volumes(dims):
            image, label = item["image"], item["label"].as_tensor()
            delta = fit.bank.load(image.meta["sample_id"], image)
            assert delta.shape == image.shape and delta.dtype == torch.int8 and delta.abs().max() <= 8
            for index in label.unique():
                of_class = delta[label == index] != 0
                assert 0 < int(of_class.sum()) <= max(1, round(0.3 * len(of_class)))

    @pytest.mark.parametrize("change", [{"tile": 6}, {"halo": 1}, {"patch_size": np.array([7, 7])}, {"guard": 0.1}])
    def test_another_setting_of_voxel_labels_on_the_same_bank_is_refused(self, tmp_path, change):
        voxel_trainer(tmp_path).run()
        with pytest.raises(ValueError, match="configuration"):
            voxel_trainer(tmp_path, **change)

    def test_the_guard_learns_the_task_from_clean_images(self, tmp_path):
        dataset, losses = volumes(2, classes=2), []
        for item in dataset:  # bright where labeled
            item["image"][item["label"] == 1] = item["image"].max()
        for steps in (1, 80):
            fit = voxel_trainer(tmp_path / f"{steps}", 2, dataset, guard=0.5, surrogate_steps=steps, max_epochs=1)
            fit.run()
            image, label, _ = fit.cases.read([0], fit.budget)
            fit.objective.eval()
            losses.append(float(fit.objective.guard_loss(image, label, fit._generator("test")).detach()))
        assert losses[1] < 0.7 * losses[0]
        with_guard = fit.passes_per_image
        without = voxel_trainer(tmp_path / "none", 2, dataset, surrogate_steps=80, max_epochs=1)
        without.run()
        assert with_guard == {name: 2 * passes for name, passes in without.passes_per_image.items()}

    def test_a_texture_reader_starts_with_pieces_of_the_codes(self, tmp_path):
        surrogate = Surrogate(TextureReader(2, 1, 3, features=6, kernel_size=3))
        begun = voxel_trainer(tmp_path, surrogate=surrogate, halo=3)
        codes = begun.samples.codes
        pieces = codes.unfold(2, 3, 1).unfold(3, 3, 1).flatten(0, 3).flatten(1)
        pieces = pieces - pieces.mean(1, keepdim=True)
        pieces = pieces / pieces.norm(dim=1, keepdim=True)
        filters = surrogate.network.filters[0].weight.detach().flatten(1)
        assert torch.allclose((pieces @ filters[0::2].T).amax(0), torch.ones(3), atol=1e-5)
        assert torch.allclose(filters[0::2], -filters[1::2])

    @pytest.mark.parametrize("options", [{"patch_size": (8, 8, 8)}, {"tile": 8, "axes": 3}])
    def test_sizes_of_other_axes_are_told_before_anything_is_trained(self, tmp_path, options):
        name = "patch_size" if "patch_size" in options else "tile_size"
        with pytest.raises(ValueError, match=rf"{name} is \(8, 8, 8\); it must have 2 numbers"):
            voxel_trainer(tmp_path, **{"patch_size": (8, 8)} | options)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("size", [0, (8, 0), (8.5, 8), "88", (None, 8)])
    def test_what_is_no_size_of_a_patch_is_told(self, tmp_path, size):
        with pytest.raises(ValueError, match="patch_size is "):
            voxel_trainer(tmp_path, patch_size=size)

    def test_an_objective_without_tiles_is_told_to_name_a_patch(self, tmp_path):
        objective = Objective(segmenter(2), nn.CrossEntropyLoss(reduction="none"))
        with pytest.raises(ValueError, match="VoxelObjective, or a patch_size"):
            trainer(tmp_path, volumes(2), objective=objective)

    def test_other_labels_are_another_fit(self, tmp_path):
        voxel_trainer(tmp_path).run()
        other = volumes(2)
        other[0]["label"][0, 0, 0] = 1
        with pytest.raises(ValueError, match="configuration"):
            voxel_trainer(tmp_path, dataset=other)

    def test_cases_without_any_foreground_can_be_fitted(self, tmp_path):
        fit = voxel_trainer(tmp_path, dataset=volumes(2, 3, classes=1))
        fit.run()
        assert fit.bank.finished and fit.cases.n_classes == 1

    @pytest.mark.parametrize("transplant", [True, False])
    def test_the_perturbation_tells_the_surrogate_the_classes(self, tmp_path, transplant):
        dataset = volumes(2, 12, classes=2, shapes=((14, 12),))
        options = {"max_epochs": 3, "surrogate_steps": 60, "transplant": transplant}
        fit = voxel_trainer(tmp_path, dataset=dataset, steps=8, tile=12, **options)
        fit.run()
        assert fit.scores[-1] < 0.6  # ln 2 = 0.69 without any information, two classes of equal weight

    def test_a_method_that_follows_the_label_goes_through_the_same_fit(self, tmp_path):
        fit = voxel_trainer(tmp_path, method=LabelMarker(cell=1))
        fit.run()
        for item in volumes(2):
            delta = fit.bank.load(item["image"].meta["sample_id"], item["image"])
            assert torch.equal(delta != 0, item["label"].as_tensor() > 0)

    @pytest.mark.parametrize("shape", [(1, 13, 12), (1, 12, 14), (2, 14, 12), (14, 12)])
    def test_image_and_labels_of_different_shape_are_refused(self, tmp_path, shape):
        dataset = volumes(2, 2)
        dataset[0]["label"] = torch.zeros(shape, dtype=torch.uint8)
        with pytest.raises(ValueError, match="differ in shape") as refusal:
            voxel_trainer(tmp_path, dataset=dataset)
        assert "case-0" in str(refusal.value)
        assert "(1, 14, 12)" in str(refusal.value) and str(shape) in str(refusal.value)


def patches(image: torch.Tensor, label: torch.Tensor, size: tuple[int, ...], *, coded: bool = False) -> Patches:
    dataset = [{"image": stored(image, "one"), "label": label}]
    return Patches(Cases(dataset, Budget.parse("8/255"), torch.device("cpu")), size, coded=coded, seed=0)


def numbered(size: tuple[int, ...]) -> torch.Tensor:
    """Intensities that tell where a voxel lies, all above 0."""
    count = torch.tensor(size).prod()
    return (1 + torch.arange(count) % 250).reshape(1, *size).to(torch.uint8)


class TestPatches:
    @settings(max_examples=60, deadline=None)
    @given(
        st.integers(2, 3).flatmap(lambda n: st.tuples(*[st.lists(st.integers(1, 9), min_size=n, max_size=n)] * 2)),
        st.integers(0, 1000),
    )
    def test_they_are_cut_alike_and_padding_has_no_label(self, sizes, seed):
        volume, size = map(tuple, sizes)
        generator = torch.Generator().manual_seed(seed)
        image = numbered(volume)
        label = torch.randint(0, 3, image.shape, generator=generator, dtype=torch.uint8)
        delta = image.to(torch.int16)
        seen, moved, truth = patches(image, label, size).sample(0, delta, generator)
        assert seen.shape == moved.shape == truth.shape == (1, *size)
        inside = truth != IGNORED
        assert int(inside.sum()) == torch.tensor([min(pair) for pair in zip(volume, size, strict=True)]).prod()
        assert not seen[~inside].any() and not moved[~inside].any()
        assert torch.allclose(seen, moved) and (seen[inside] > 0).all()
        kept = [min(pair) for pair in zip(volume, size, strict=True)]
        windows = label[0]
        values = image[0]
        for axis, length in enumerate(kept):
            windows, values = windows.unfold(axis, length, 1), values.unfold(axis, length, 1)
        cut = (255 * seen[inside]).round().to(torch.uint8)
        same = (windows.reshape(-1, cut.numel()) == truth[inside]) & (values.reshape(-1, cut.numel()) == cut)
        assert same.all(1).any()

    def test_a_smaller_volume_lies_in_the_middle(self):
        image = numbered((3, 5))
        seen, _, truth = patches(image, torch.ones_like(image), (8, 8)).sample(0, None, torch.Generator())
        assert torch.equal((255 * seen[0, 3:6, 2:7]).round().to(torch.uint8), image[0])
        assert (truth[0, 3:6, 2:7] == 1).all() and int((truth == IGNORED).sum()) == 64 - 15

    @pytest.mark.parametrize("shape", [(40, 30), (20, 24, 22), (40, 30, 1)])
    def test_most_lie_around_a_labeled_voxel_at_any_place_of_them(self, shape):
        image = numbered(shape)
        label = torch.zeros_like(image)
        place = [length // 3 for length in shape]
        label[(0, *place)] = 2
        cutter, generator = patches(image, label, (8,) * len(shape)), torch.Generator().manual_seed(0)
        places = []
        for _ in range(200):
            truth = cutter.sample(0, None, generator)[2]
            if (truth == 2).any():
                places.append((truth == 2).nonzero()[0, 1:])
        share = (8 / torch.tensor(shape).clamp(min=8)).prod()
        assert 0.65 < len(places) / 200 < 0.85 + float(share)
        found = torch.stack(places)
        assert all(len(found[:, axis].unique()) > 5 for axis, length in enumerate(shape) if length > 8)

    def test_a_volume_without_labels_is_cut_anywhere(self):
        image = numbered((30, 30))
        cutter, generator = patches(image, torch.zeros_like(image), (4, 4)), torch.Generator().manual_seed(0)
        corners = {float(cutter.sample(0, None, generator)[0][0, 0, 0]) for _ in range(50)}
        assert len(corners) > 20

    def test_codes_stand_in_each_class_but_not_outside_of_the_image(self):
        image = numbered((12, 12))
        label = torch.zeros_like(image)
        label[0, 2:6], label[0, 8:] = 1, 2
        cutter, generator = patches(image, label, (16, 16), coded=True), torch.Generator().manual_seed(0)
        amplitudes = set()
        for _ in range(20):
            _, delta, truth = cutter.sample(0, None, generator)
            assert torch.equal(delta != 0, truth != IGNORED)
            amplitude = delta.abs().max()
            assert torch.allclose(delta[delta != 0].abs(), amplitude) and 1 <= float(amplitude) * 255 / 8 <= 4.001
            amplitudes.add(float(amplitude))
        assert len(amplitudes) > 10


def sliced_cases(count: int = 6) -> list[dict]:
    """Volumes of three slices with slopes of their own, the brightest slice with the finest steps."""
    generator = torch.Generator().manual_seed(0)
    slices = SliceScaling(2, (0.05, 0.1, 0.5), (0.0, 0.0, 10.0))
    codec = StoredCodec("int16", (0.0, 200.0), 0.05, slices=slices)
    items = []
    for at in range(count):
        physical = 60 + 20 * torch.rand((1, 8, 9, 3), generator=generator)
        image = (physical / torch.tensor([0.05, 0.1, 0.5])).round().to(torch.int16)
        items.append({"image": stored(image, f"case-{at}", codec), "label": at % 2})
    return items


def test_fit_of_volumes_whose_slices_are_scaled_differently_uses_each_slices_own_bound(tmp_path):
    dataset = sliced_cases()
    surrogate = Surrogate(SmallCNN(3, 1, 2, (4, 8)), (8, 8, 3))
    objective = Objective(surrogate, nn.CrossEntropyLoss(reduction="none"), view=RandomView(3))
    method = SALM(mask=SparsityMask(ratio=0.5), steps=2, step_size=1.0)
    fit = trainer(tmp_path, dataset, rounds=1, objective=objective, perturbation=method, budget="2 physical")
    fit.run()
    for item in dataset:
        delta = torch.as_tensor(fit.bank[item["image"].meta["sample_id"]]).abs()
        assert delta.amax((0, 1, 2)).tolist() == [40, 20, 4]  # floor(2 / slope)


def test_patches_of_such_volumes_are_read_by_the_slices_that_they_lie_in():
    dataset = sliced_cases()
    for item in dataset:
        item["label"] = (torch.arange(8 * 9 * 3).reshape(1, 8, 9, 3) % 3 == 0).to(torch.uint8)
    patches = Patches(Cases(dataset, Budget.parse("2 physical"), torch.device("cpu")), (4, 4, 2), coded=True, seed=0)
    steps = {"case-0": torch.full((1, 8, 9, 3), 4, dtype=torch.int16)}
    for seed in range(4):
        image, delta, _ = patches([0], steps, torch.Generator().manual_seed(seed))
        assert 0.29 < float(image.min()) and float(image.max()) < 0.46  # 60..80, and 10 more in one slice, of 200
        change = {round(float(each) * 200, 3) for each in delta.unique()}
        assert change in ({0.2, 0.4}, {0.4, 2.0})  # four steps of two neighboring slopes
