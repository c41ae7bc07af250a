# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' functions on tiny images: they run, resume, and count what they say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
QUICK = {"rounds": 1, "surrogate_steps": 2, "perturbation_steps": 3}


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 20), ("val", 6), ("test", 6)):
        labels = np.arange(count, dtype=np.uint8)[:, None] % 2
        arrays[f"{split}_images"] = rng.integers(0, 200, (count, 28, 28), dtype=np.uint8) + 50 * labels[:, :, None]
        arrays[f"{split}_labels"] = labels
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_subset_is_balanced_and_tested_on_the_images_of_its_split(load, archive, split):
    settings = {"archive": archive.name, "size": (28, 28), "train": 8, "split": split, "spare": 0}
    found = load("arena_data").load(settings, archive.parent, archive.parent)
    assert found.train.labels.bincount().tolist() == [4, 4] and found.spare is None
    with np.load(archive) as arrays:
        assert all((image.stored == arrays["train_images"]).all((1, 2)).any() for image in found.train.images.values())
        shown = np.concatenate([image.stored for image in found.test.images.values()])
        assert (shown == arrays[f"{split}_images"]).all()
        assert found.test.labels.tolist() == arrays[f"{split}_labels"][:, 0].tolist()
    with pytest.raises(ValueError, match="ask for fewer"):
        load("arena_data").load(settings | {"train": 100}, archive.parent, archive.parent)


def test_all_methods_are_measured_and_nothing_is_done_twice(load, archive, tmp_path, monkeypatch):
    module, output = load("pneumoniamnist"), tmp_path / "out.json"
    given = {"seeds": 1, "fits": 1, "train_size": 8, "epochs": 1, "workers": 1, "overrides": QUICK}
    results = module.Benchmark(archive, output, tmp_path, **given).run()
    assert results["images"] == {"train": {"0": 4, "1": 4}, "val": {"0": 3, "1": 3}}
    assert set(results["methods"]) == set(module.COMPARED) and len(results["rows"]["values"]) == 9 * 3
    assert results["methods"]["salm_0.1"]["passes_per_image"]["total"] == 2 + 3
    fractions = [results["methods"][f"salm_{ratio}"]["fidelity"]["mask_fraction"]["mean"] for ratio in (0.1, 0.2, 0.4)]
    assert all(0 < found <= asked + 0.01 for found, asked in zip(fractions, (0.1, 0.2, 0.4), strict=True))
    assert results["methods"]["random_noise"]["fidelity"]["mask_fraction"]["mean"] > 0.9
    assert module.table(results).count("\n") == 1 + len(module.COMPARED)
    text = output.read_text()
    assert len(text) < 200_000 and str(tmp_path) not in text

    monkeypatch.setattr("monai_salm.verification.jobs.train_network", None)  # would fail if it were called
    again = module.Benchmark(archive, output, tmp_path, **given).run()
    assert again["rows"] == results["rows"]


@pytest.fixture
def few(load, tmp_path):
    """Eight images of a number of axes, and how many classes they have."""
    labels, transforms, data = load("monai_salm.release.labels"), load("monai_salm.transforms"), load("monai.data")

    def make(dims: int = 2):
        rng, arrays, label = np.random.default_rng(0), {}, np.arange(8, dtype=np.uint8)[:, None] % 2
        for split in ("train", "val", "test"):
            arrays[f"{split}_images"] = rng.integers(0, 250, (8, *[28, 12][dims - 2 : dims - 1] * dims), dtype=np.uint8)
            arrays[f"{split}_labels"] = label
        np.savez(tmp_path / "few.npz", **arrays)
        cohort = labels.load_cohort(tmp_path / "few.npz", spatial_dims=dims)
        items = [{"image": case, "label": case.label} for case in cohort.cases if case.split == "train"]
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
        assert found.passes["total"] <= 2 + 3 * 8 and found.settings["epsilon"]
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
    assert em["perturbation::refresh"] == "call"  # or voxels that one round leaves at 0 stay there


@pytest.mark.parametrize("shape", [(12, 12), (8, 8, 8)])
def test_fit_and_bare_loop_do_the_same_passes(load, shape):
    module = load("fit_cost")
    work = module.Workload(5, shape, tuple(size // 2 for size in shape))
    found = module.measure(work, 1, {**QUICK, "batch_size": 2})
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
