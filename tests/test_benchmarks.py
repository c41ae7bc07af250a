# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' functions on tiny images: they run, keep their fits, and count what they say."""

from __future__ import annotations

import importlib
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from exports import write_npz
from torch import nn

from monai_salm.surrogates import small_resnet

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
QUICK = {"rounds": 1, "surrogate_steps": 2, "perturbation_steps": 3}


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def few(load, tmp_path):
    """Eight images of a number of axes, and how many classes they have."""
    labels, transforms, data = load("monai_salm.release.labels"), load("monai_salm.transforms"), load("monai.data")

    def make(dims: int = 2):
        archive = write_npz(tmp_path / "few.npz", ((28,) * 2, (12,) * 3)[dims - 2], (8, 8, 8))
        cases = labels.load_cohort(archive, spatial_dims=dims).cases
        items = [{"image": case, "label": case.label} for case in cases if case.split == "train"]
        return data.CacheDataset(items, transforms.LoadStoredd("image", spatial_dims=dims), progress=False), 2

    return make


@pytest.mark.parametrize("size", [(14, 14), (8, 8, 8)], ids=["2d", "3d"])
def test_every_method_can_be_fitted_by_name(load, few, tmp_path, size):
    methods, (dataset, classes) = load("methods"), few(len(size))
    for name in methods.FITTED:
        quick = {key: min(value, methods.METHODS[name].overrides.get(key, value)) for key, value in QUICK.items()}
        found = methods.fit(name, dataset, classes, size, 3, "8/255", tmp_path, quick)
        deltas = [found.deltas[item["image"].meta["sample_id"]].int() for item in dataset]
        bound = 255 if name in methods.UNBOUNDED else 8
        assert all(delta.any() and delta.abs().max() <= bound for delta in deltas), name
        assert 0 <= found.passes["total"] <= 2 + 3 * 8 and found.seconds > 0
    with pytest.raises(ValueError, match="makes no perturbations; use one of random_noise"):
        methods.fit("clean", dataset, classes, size, 3, "8/255", tmp_path)


def test_a_fit_is_read_again_and_never_taken_for_another(load, few, tmp_path, monkeypatch):
    methods, (dataset, classes) = load("methods"), few()
    given = ("salm_0.4", dataset, classes, (14, 14))
    first = methods.fit(*given, 3, "8/255", tmp_path, QUICK)
    for changed in ((4, "8/255"), (3, "4/255")):
        other = methods.fit(*given, *changed, tmp_path, QUICK)
        assert any((first.deltas[key] != other.deltas[key]).any() for key in other.deltas)
    monkeypatch.setattr("monai_salm.engines.trainer.PerturbationTrainer._fit", None)  # would fail if it were called
    same = methods.fit(*given, 3, "8/255", tmp_path, QUICK)
    assert same.seconds == first.seconds and all((first.deltas[key] == same.deltas[key]).all() for key in same.deltas)


def test_published_error_minimizing_noise_is_not_crippled(load):
    em = load("methods").METHODS["em"].overrides
    assert em["rounds"] >= 10 and em["mask_ratio"] == 1.0 and em["transplant"] is False


@pytest.mark.parametrize("shape", [(16, 16), (16, 16, 16)])
def test_fit_and_bare_loop_do_the_same_passes(load, shape):
    module = load("fit_cost")
    work = module.Workload(5, shape, tuple(size // 2 for size in shape))
    steps = {"surrogate_steps": "$1 + 1"}  # an expression, as in the bundles
    found = module.measure(work, 1, {**QUICK, **steps, "batch_size": 2})
    assert found["passes_per_image"] == {"surrogate_training": 4 / 5, "perturbation": 3.0, "total": 3.8}
    assert found["ratio"]["median"] > 0 and json.dumps(found)


def test_the_file_path_is_measured_beside_a_bare_one(load, tmp_path):
    module = load("files")
    found = module.codecs(3, 32, 1)
    assert set(found) == {"native", "rle", "jpeg_ls", "jpeg_2000"}
    assert all(row["slices"] == 3 and row["ratio_cpu"] > 0 and row["bare_cpu_s"] > 0 for row in found.values())
    assert found["native"]["file_mb"] > found["jpeg_ls"]["file_mb"]
    assert module.memory(4, 64)["protect_peak_mb"] >= 0
    assert module.scan_rate(5)["files"] == 5
    module.write_series(tmp_path / "in" / "a", 3, 32)
    assert module.one_shard(tmp_path, "1/1", 32) > 0


def test_halves_of_a_cohort_share_no_patient_and_lose_no_case(load):
    case = load("monai_salm.io.base").Case
    cases = [case(f"case-{at}", "nifti", (), (), f"group-{at % 5}") for at in range(20)]
    old, new = load("later_cases").halves(cases)
    assert {one.group for one in old}.isdisjoint(one.group for one in new)
    assert len(old) == 12 and sorted(old + new, key=cases.index) == cases


@pytest.mark.parametrize("dims", [2, 3])
def test_networks_of_the_field_see_every_voxel_of_a_small_image_before_training(load, dims):
    networks = load("networks")
    image = torch.rand(2, 1, *[28] * dims, requires_grad=True)
    wide = partial(small_resnet, width=64, blocks=(2, 2, 2, 2))
    for make in (wide, networks.small_densenet121, partial(networks.SmallViT, spatial_size=[28] * dims)):
        network = make(dims, 1, 3).eval()
        found = network(image)
        (slope,) = torch.autograd.grad(found.square().sum(), image)
        assert found.shape == (2, 3) and (slope != 0).float().mean() > 0.99
        assert not torch.allclose(found[0], found[1])


def test_resnet18_and_densenet121_are_as_deep_as_published(load):
    def convolutions(network):
        return sum(isinstance(part, nn.Conv2d) and part.kernel_size[0] > 1 for part in network.modules())

    assert convolutions(small_resnet(2, 1, 3, 64, (2, 2, 2, 2))) == 17  # and the last layer
    assert convolutions(load("networks").small_densenet121(2, 1, 3)) == 1 + 58


@pytest.mark.parametrize("size", [(12, 8), (9, 13), (8, 8, 12)])
def test_a_vision_transformer_tells_places_apart_and_passes_over_what_fills_no_patch(load, size):
    network = load("networks").SmallViT(len(size), 1, 3, size, width=32, layers=2).eval()
    with torch.no_grad():
        network.positions.normal_()
    image = torch.rand(1, 1, *size)
    moved = image.roll(4, 2)
    assert not torch.allclose(network(image), network(moved), atol=1e-5)
    with torch.no_grad():
        network.positions.zero_()
    whole = image[(..., *[slice(length // 4 * 4) for length in size])]
    assert torch.allclose(network(image), network(whole.roll(4, 2)), atol=1e-5), "patches without a place are a set"
