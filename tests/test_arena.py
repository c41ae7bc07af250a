# SPDX-License-Identifier: Apache-2.0
"""The arena on tiny images: nothing is trained twice, budgets meet a PSNR, releases are what they say."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from exports import write_decathlon, write_labels, write_nifti

from monai_salm.verification.training import victim_digest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SIZE = 16
CONFIG = {
    "data": {"tiny": {"archive": "tiny.npz", "size": [SIZE, SIZE], "train": 16, "split": "test", "spare": 8}},
    "epochs": {"tiny": 1},
    "fits": 1,
    "fit": {"rounds": 1, "surrogate_steps": 2, "perturbation_steps": 3},
    "grids": {
        "headline": {
            "methods": ["random_noise", "salm_0.4"],
            "levels": ["8/255", "40 dB"],
            "victims": ["small_cnn"],
            "seeds": 2,
        },
        "defenses": {
            "methods": ["salm_0.4"],
            "levels": ["8/255"],
            "defenses": ["blur_1", "clean_20"],
            "victims": ["small_cnn"],
            "seeds": 1,
        },
        "releases": {
            "methods": ["salm_0.4"],
            "levels": ["8/255"],
            "releases": ["part_50", "averaged", "removed", "turned"],
            "victims": ["small_cnn"],
            "seeds": 1,
        },
    },
}
CONFIG["data"]["tiny"]["spare_split"] = "val"
VOXELS = {
    "data": {"noise": {"decathlon": "Task", "size": [8, 8, 8], "split": "test"}},
    "epochs": {"noise": 1},
    "fits": 1,
    "fit": {"surrogate_steps": 2, "perturbation_steps": 2},
    "grids": {
        "one": {
            "methods": ["salm", "label_marker", "random_noise"],
            "levels": ["8/255"],
            "defenses": ["blur_1"],
            "victims": ["attention_unet"],
            "seeds": 1,
        },
    },
}


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 16), ("test", 12), ("val", 12)):
        labels = np.arange(count, dtype=np.uint8)[:, None] % 2
        images = rng.integers(20, 180, (count, SIZE, SIZE), dtype=np.uint8) + 50 * labels[:, :, None]
        if split == "val":  # an image that training cases have too, and one that test cases have
            images[:2] = arrays["train_images"][0], arrays["test_images"][1]
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    folder = tmp_path_factory.mktemp("arena")
    np.savez(folder / "tiny.npz", **arrays)
    return folder


@pytest.fixture
def field(load, data, tmp_path):
    loaded = load("arena_data").load(CONFIG["data"]["tiny"], data, tmp_path)
    return load("arena_field").Field("tiny", CONFIG, loaded, tmp_path)


# ------------------------------------------------------------------------ grid


def test_grids_are_products_and_share_their_trainings(load):
    found = load("arena_cells").cells(CONFIG)
    assert len(found) == len(set(found))
    fitted = [cell for cell in found if cell.method not in ("clean", "blind", "own_clean")]
    assert len(fitted) == 2 * 2 * 2 + 2 + 4  # the plain training is that of the headline
    clean = [(cell.release, cell.defense) for cell in found if cell.method == "clean" and cell.seed == 0]
    assert sorted(clean) == [("all", "blur_1"), ("all", "clean_20"), ("all", "none"), ("turned", "none")]
    assert {cell.seed for cell in load("arena_cells").cells(CONFIG, ["releases"])} == {0}
    own = CONFIG | {"grids": {"one": CONFIG["grids"]["headline"] | {"methods": ["ops"]}}}
    levels = {cell.level for cell in load("arena_cells").cells(own) if cell.method == "ops"}
    assert levels == {"8/255"}, "a method with a budget of its own has no budget for a PSNR"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fit": {"mask_ratioo": 0.3}}, "mask_ratioo"),
        ({"recipes": {"smal_cnn": {}}}, "smal_cnn"),
        ({"seed": 1}, "unknown setting: seed"),
        ({"epochs": {}}, "tiny"),
        ({"grids": {"one": {"levels": ["8/255"]}}}, "lacks methods, victims, seeds"),
    ],
)
def test_a_typing_error_in_the_yaml_is_told_before_any_fit(load, change, words):
    with pytest.raises(ValueError, match=words):
        load("arena_cells").cells(CONFIG | change)


def test_fits_that_share_a_folder_are_made_one_after_the_other(load):
    module = load("arena_cells")
    groups = module.fit_groups(module.cells(CONFIG), CONFIG["fits"])
    assert len(groups) == 2  # two methods, one seed
    assert {seed for *_, method, seed in groups[1] if method == "salm_0.4"} == {0, 1000, 2000}
    assert sorted(len(group) for group in groups) == [2, 4]


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"releases": ["never"]}, "never"),
        ({"defenses": "all"}, "no set of defenses"),
        ({"defenses": ["x"]}, "no defense"),
        ({"defence": "standard"}, "unknown setting of grid one: defence"),
        ({"victims": ["resnet50"]}, "unknown victims of grid one: resnet50"),
        ({"methods": ["samlm"]}, "unknown methods"),
        ({"levels": ["8/255 of it"]}, "cannot read budget"),
    ],
)
def test_what_is_unknown_is_named_before_anything_is_done(load, grid, words):
    config = CONFIG | {"grids": {"one": CONFIG["grids"]["headline"] | grid}}
    with pytest.raises(ValueError, match=words):
        load("arena_cells").cells(config)
    with pytest.raises(ValueError, match="unknown grid: two; there are one"):
        load("arena_cells").cells(config, ["two"])


def test_the_shipped_grid_asks_for_what_there_is(load):
    config = yaml.safe_load((BENCHMARKS / "arena.yaml").read_text())
    found = load("arena_cells").cells(config)
    methods = load("methods")
    assert {cell.method for cell in found} <= {*methods.FITTED, "clean", "blind", "own_clean"}
    assert {cell.victim for cell in found} <= set(methods.victims(2, (28, 28)))
    assert {cell.data for cell in found} == set(config["data"]) == set(config["epochs"])
    voxels = load("arena_cells").cells(yaml.safe_load((BENCHMARKS / "arena_voxels.yaml").read_text()))
    assert {cell.method for cell in voxels} == {*methods.VOXEL_METHODS, "clean", "blind", "own_clean"}


def test_a_run_trains_every_cell_once_and_shows_it(load, data, tmp_path, monkeypatch, capsys):
    arena, board = load("arena"), load("leaderboard")
    output = tmp_path / "arena.csv"
    piece = arena.Arena(CONFIG, data, tmp_path / "work", output).run(["headline"])
    assert "14 of 14 trainings" in capsys.readouterr().out and len(piece) == 14
    rows = arena.Arena(CONFIG, data, tmp_path / "work", output).run()
    said = capsys.readouterr().out
    assert "9 of 23 trainings to do, about 0 min" in said and len(rows) == 23
    table = board.read(output)
    assert [[row.get(name) or 0 for name in arena.COLUMNS] for row in table] == [
        [row.get(name) or 0 for name in arena.COLUMNS] for row in rows
    ]
    noise = next(row for row in table if row["method"] == "random_noise" and row["level"] == "8/255")
    assert noise["epsilon"] == "8/255" and 29 < noise["psnr"] < 31
    assert noise["passes"] == 0, "it has no surrogate, whatever 'fit' says of one"
    assert 0 <= noise["linear_images"] <= 1 and 0 <= noise["linear_delta"] <= 1

    page = board.page(table)
    assert all(
        name in page for name in ("random_noise", "blur_1", "part_50", "own_clean", "balanced accuracy", "by AUC")
    )
    assert "http" not in page

    monkeypatch.setattr("monai_salm.verification.jobs.train_network", None)  # would fail if it were called
    assert arena.Arena(CONFIG, data, tmp_path / "work", output).run() == rows


# ------------------------------------------------------------------------ fits


def test_a_budget_is_found_for_a_psnr(field):
    fitted, epsilon = field.fitted("40 dB", "random_noise", 0)
    assert epsilon == "3/255"  # 38.6 dB; 2/255 have 42.1
    assert set(np.abs(np.asarray(fitted.deltas[next(iter(field.data.train.images))])).ravel().tolist()) <= {3}
    again = field.fitted("40 dB", "random_noise", 1000)[1]
    assert again == epsilon


def test_a_method_with_a_bound_on_psnr_reaches_it_by_that_bound(load, field):
    fitted, epsilon = field.fitted("40 dB", "salm_0.4", 0)
    assert epsilon == "8/255"
    reached = load("arena_field").fidelity(field.data.train, fitted, ssim=False)["psnr"]
    assert reached["min"] >= 40 and reached["mean"] < 40.2


def test_networks_may_see_another_size_than_the_surrogate(load, data, tmp_path, field):
    settings = CONFIG["data"]["tiny"] | {"size": [12, 12], "fit_size": [SIZE, SIZE]}
    other = load("arena_field").Field("tiny", CONFIG, load("arena_data").load(settings, data, tmp_path), tmp_path)
    mine, same = (dict(each.fitted("8/255", "salm_0.4", 0)[0].deltas) for each in (other, field))
    assert mine.keys() == same.keys() and all(np.array_equal(mine[name], same[name]) for name in mine)
    assert other.data.train.seen().shape[2:] == (12, 12)


def test_spare_cases_are_neither_trained_nor_tested_on(field):
    parts = [field.data.train, field.data.test, field.data.spare]
    digests = [{image.stored.tobytes() for image in part.images.values()} for part in parts]
    assert [len(each) for each in digests] == [16, 12, 8]
    assert not digests[0] & digests[1] and not digests[2] & (digests[0] | digests[1])
    assert [int(part.labels.sum()) for part in parts] == [8, 6, 4]


def test_images_that_an_archive_holds_twice_are_no_spare_cases(load, data, tmp_path):
    module, settings = load("arena_data"), CONFIG["data"]["tiny"]
    most = module.load(settings | {"spare": 10}, data, tmp_path)
    assert len(most.spare.labels) == 10
    with pytest.raises(ValueError, match="has 5 val cases, 6 are asked for"):
        module.load(settings | {"spare": 12}, data, tmp_path)


@pytest.mark.data
def test_spare_cases_of_pneumoniamnist_share_no_image_with_training_and_test_cases(load, data_dir, tmp_path):
    module = load("arena_data")
    settings = yaml.safe_load((BENCHMARKS / "arena.yaml").read_text())["data"]["pneumoniamnist"]
    found = module.load(settings, data_dir, tmp_path)
    train, test, spare = (
        {image.stored.tobytes() for image in part.images.values()} for part in (found.train, found.test, found.spare)
    )
    assert len(found.spare.labels) == 240 and not spare & (train | test)


@pytest.mark.parametrize(("split", "other"), [("val", "test"), ("test", "val")])
def test_the_subset_is_balanced_and_tested_on_the_images_of_its_split(load, data, tmp_path, split, other):
    settings = CONFIG["data"]["tiny"] | {"train": 8, "spare": 4, "split": split, "spare_split": other}
    found = load("arena_data").load(settings, data, tmp_path)
    assert found.train.labels.bincount().tolist() == [4, 4] and found.spare.labels.bincount().tolist() == [2, 2]
    with np.load(data / "tiny.npz") as arrays:
        for part, name in ((found.train, "train"), (found.spare, other)):
            known = {image.tobytes() for image in arrays[f"{name}_images"]}
            assert {image.stored.tobytes() for image in part.images.values()} <= known
        shown = np.concatenate([image.stored for image in found.test.images.values()])
        assert (shown == arrays[f"{split}_images"]).all()
        assert found.test.labels.tolist() == arrays[f"{split}_labels"][:, 0].tolist()
    with pytest.raises(ValueError, match="class 0 has 8 train cases, 50 are asked for; ask for fewer"):
        load("arena_data").load(settings | {"train": 100}, data, tmp_path)
    with pytest.raises(ValueError, match="must be none of train"):
        load("arena_data").load(settings | {"spare_split": split}, data, tmp_path)


def test_three_sizes_ask_for_volumes(load, tmp_path, monkeypatch):
    def written(folder: Path, dims: int, seed: int, *, progress: bool, **options: object) -> None:
        assert dims == 3 and not progress and not options
        names = [write_nifti(folder / f"{at}.nii.gz", 100 * seed + at).name for at in range(12)]
        write_labels(
            folder, [f"{name},{'ab'[at % 2]},{'test' if at < 4 else 'train'}" for at, name in enumerate(names)]
        )

    module = load("arena_data")
    monkeypatch.setattr(module, "write_demo_export", written)
    settings = {"demo": 0, "size": [8, 9, 7], "train": 8, "split": "test", "spare": 4}
    found = module.load(settings, tmp_path, tmp_path)
    assert found.train.seen().shape == (8, 1, 8, 9, 7) and found.test.labels.tolist() == [0, 1, 0, 1]
    config = CONFIG | {"epochs": {"volumes": 1}}
    field = load("arena_field").Field("volumes", config, found, tmp_path)
    assert field.task.spatial_size == (8, 9, 7) and field.recipe["batch_size"] == 8
    fitted, _ = field.fitted("8/255", "salm_0.4", 0)
    assert all(fitted.deltas[name].shape == (1, 6, 7, 5) for name in found.train.images)


def test_slices_of_volumes_are_labeled_by_place_and_no_patient_is_in_two_parts(load, tmp_path):
    (tmp_path / "Task/imagesTr").mkdir(parents=True)
    for patient in range(1, 11):  # intensities say who it is, and how far along the axis
        volume = np.full((50, 20, 6), 100.0, np.float32)
        volume[..., 1] = np.linspace(0, 100, 20)[:, None].T
        volume[:patient, :, 0] = 50
        nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / f"Task/imagesTr/case_{patient}.nii.gz")
    write = load("arena_slices").write_slices
    write(tmp_path / "Task", tmp_path / "slices.npz", 4, 40)
    made, patients = np.load(tmp_path / "slices.npz"), {}
    for split, count in (("train", 6), ("val", 2), ("test", 2)):
        images, labels = made[f"{split}_images"], made[f"{split}_labels"]
        assert images.shape == (count * 4 * 2, 40, 40) and images.dtype == np.uint8  # two of each class: 48 >= 40
        assert np.bincount(labels[:, 0]).tolist() == [count * 2] * 4
        along = images[:, 0, 1] / 255
        assert all(
            0.05 + 0.9 * k / 4 <= value + 0.06 and value - 0.06 <= 0.05 + 0.9 * (k + 1) / 4
            for k, value in zip(labels[:, 0], along, strict=True)
        )
        assert (images[:, :, 6:] == 0).all()
        patients[split] = set((images[:, :, 0] == 128).sum(1).tolist())
    assert sorted(n for names in patients.values() for n in names) == list(range(1, 11))
    with pytest.raises(ValueError, match="five or more"):
        (tmp_path / "none").mkdir()
        write(tmp_path / "none", tmp_path / "no.npz", 4, 40)


def test_a_method_changes_no_more_than_its_mask_ratio_and_every_pass_is_counted(load, field):
    module, part = load("arena_field"), field.data.train
    for ratio in (0.1, 0.2, 0.4):
        fitted, _ = field.fitted("8/255", f"salm_{ratio}", 0)
        assert 0 < module.fidelity(part, fitted, ssim=False)["mask_fraction"]["mean"] <= ratio + 0.01
        assert fitted.passes["total"] == 2 + 3
    noise, _ = field.fitted("8/255", "random_noise", 0)
    assert module.fidelity(part, noise, ssim=False)["mask_fraction"]["mean"] > 0.9


def test_color_images_go_through_the_arena(load, tmp_path):
    config = load("arena_colors")
    assert all(len(classes) >= 3 for classes, _ in config.KINDS.values())
    settings = {"colors": "skin", "size": [16, 16], "train": 12, "split": "test", "spare": 6, "spare_split": "val"}
    found = load("arena_data").load(settings, tmp_path, tmp_path)
    assert found.classes == ("hemangioma", "melanoma", "nevus")
    assert found.train.seen().shape == (12, 3, 16, 16) and found.train.labels.bincount().tolist() == [4, 4, 4]
    again = load("arena_data").load(settings, tmp_path, tmp_path / "again")
    assert torch.equal(again.test.seen(), found.test.seen())
    cell = load("arena_cells").Cell("skin", "8/255", "salm_0.4", "all", "none", "resnet10", 0)
    field = load("arena_field").Field("skin", CONFIG | {"epochs": {"skin": 1}}, found, tmp_path)
    (row,) = field.train([cell], tmp_path, tmp_path / "rows.jsonl", 1)
    assert 0 <= row["balanced_accuracy"] <= 1 and row["psnr"] > 35
    with pytest.raises(ValueError, match="no color images 'hair'; there are skin, tissue, fundus"):
        config.write_colors(tmp_path / "none", "hair", 16, {"train": 1})


@pytest.mark.parametrize(("size", "channels"), [((28, 28), 1), ((28, 28), 3), ((24, 24, 24), 1)])
def test_every_victim_can_be_trained_and_is_one_of_its_own(load, size, channels):
    makers = load("methods").victims(3, size, channels)
    assert set(makers) == {"small_cnn", "resnet10", "densenet", "resnet18", "densenet121", "vit"}
    digests = {victim_digest(make, torch.rand(2, channels, *size), 3) for make in makers.values()}
    assert len(digests) == len(makers)
    pickle.dumps(makers)  # they go to worker processes


def test_a_victim_with_a_recipe_of_its_own_is_trained_by_it_and_others_are_not_trained_anew(load, field, tmp_path):
    cell = load("arena_cells").Cell("tiny", "", "clean", "all", "none", "small_cnn", 0)
    jobs = []
    for recipes in ({}, {"small_cnn": {"learning_rate": 0.5}}, {"vit": {"learning_rate": 0.5}}):
        field.config = CONFIG | {"recipes": recipes}
        jobs.append(field._jobs([cell], tmp_path)[cell])
    assert [job.options["learning_rate"] == 0.5 for job in jobs] == [False, True, False]
    assert jobs[0].key == jobs[2].key != jobs[1].key


# ---------------------------------------------------------------- voxel labels


@pytest.fixture(scope="module")
def volumes(tmp_path_factory) -> Path:
    return write_decathlon(tmp_path_factory.mktemp("volumes") / "Task", 8).parent


@pytest.fixture
def voxels(load, volumes, tmp_path):
    loaded = load("arena_data").load(VOXELS["data"]["noise"], volumes, tmp_path)
    return load("arena_field").Field("noise", VOXELS, loaded, tmp_path)


def test_voxel_labels_go_through_the_arena_and_onto_the_page(load, volumes, tmp_path, monkeypatch):
    arena, board, output = load("arena"), load("leaderboard"), tmp_path / "voxels.csv"
    rows = arena.Arena(VOXELS, volumes, tmp_path / "work", output).run()
    assert sorted((row["method"], row["defense"]) for row in rows) == sorted(
        [(name, each) for name in ("clean", "salm", "label_marker", "random_noise") for each in ("none", "blur_1")]
        + [("blind", "none")]
    )
    table = board.read(output)
    assert all(0 <= row["dice"] <= 1 and row["hd95"] >= 0 and row["balanced_accuracy"] is None for row in table)
    assert all(row["dice"] == pytest.approx(sum(row["dice_per_class"].values()) / 2, abs=1e-4) for row in table)
    assert set(table[0]["dice_per_class"]) == {"Core", "Rim"}
    leaks = {row["method"]: row["leakage"] for row in table}
    assert leaks["label_marker"] > 0.98 > leaks["random_noise"]
    assert leaks["clean"] is None and all(row["linear_images"] is None for row in table)
    page = board.page(table)
    assert all(text in page for text in ("Dice by class", "HD95", "leakage", "blur_1")) and "by AUC" not in page
    monkeypatch.setattr("monai_salm.verification.jobs.train_network", None)  # would fail if it were called
    assert arena.Arena(VOXELS, volumes, tmp_path / "work", output).run() == rows


def test_a_table_without_voxel_labels_has_no_columns_of_them(load, tmp_path):
    load("arena").write_table([{"data": "tiny", "auc": 0.5, "dice": None}], tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text().splitlines()[0] == (
        "data,level,method,release,defense,victim,seed,balanced_accuracy,auc,accuracy,seconds,epsilon,psnr,ssim,"
        "changed,fit_seconds,passes,linear_images,linear_delta"
    )


def test_arms_with_voxel_labels_are_those_of_a_study(load, voxels, volumes, tmp_path):
    module, bank = load("segmentation"), tmp_path / "out/private/bank.sqlite"
    settings = {"dataset_dir": str(volumes / "Task"), "output_dir": str(tmp_path / "out"), "device": "cpu"}
    settings |= {"spatial_size": [8, 8, 8], "visibility": "none", **VOXELS["fit"]}
    module.prepare_output(settings["dataset_dir"], settings["output_dir"])
    module.fit("protected", settings, bank)
    parser = module.configured(module.BUNDLE, settings)
    parser["study::victims"] = {"attention_unet": parser["study::victims"]["attention_unet"]}
    parser.get_parsed_content("protect_cohort")()
    study = parser.get_parsed_content("study")
    (tmp_path / "arms").mkdir()
    theirs = study._material(study._twins(), {}, None, tmp_path / "arms")
    cell = load("arena_cells").Cell
    for arm, level, method in (("clean", "", "clean"), ("protected", "8/255", "salm"), ("blind", "", "blind")):
        one = cell("noise", level, method, "all", "none", "attention_unet", 0)
        (job,) = voxels._jobs([one], tmp_path).values()
        assert job.train.digest == theirs.arms[arm].digest, arm
        assert job.test.digest == theirs.test.digest
        assert job.task.describe() == study.learning.describe()
        assert {name: job.options[name] for name in study.recipe} == study.recipe | {"epochs": 1}
    mine = load("arena_field").leakage(voxels.data.train, voxels.fitted("8/255", "salm", 0)[0].deltas)
    assert mine == pytest.approx(theirs.leakage.result()["protected"]["best"]["mean"])


@pytest.mark.parametrize("name", ["random_mask", "em", "contour_interior", "slice_spectrum"])
def test_every_method_for_voxel_labels_can_be_fitted_by_name(load, voxels, name):
    quick = {"rounds": 1, "surrogate_steps": 1, "perturbation_steps": 1}
    part, methods = voxels.data.fitted, load("methods")
    found = methods.fit(name, part.dataset, 3, (8, 8, 8), 0, "8/255", voxels.work, quick, voxelwise=True)
    assert all(found.deltas[each].any() for each in part.images)
    with pytest.raises(ValueError, match="'lsp' makes no perturbations; use one of random_noise"):
        methods.fit("lsp", part.dataset, 3, (8, 8, 8), 0, "8/255", voxels.work, voxelwise=True)


@pytest.mark.parametrize(
    ("data", "grid", "words"),
    [
        ({}, {"releases": ["all", "averaged"]}, r"releases of grid one \(voxel labels, 3D\): averaged; there are all"),
        ({}, {"methods": ["salm_0.4"]}, "unknown methods of grid one .*salm_0.4"),
        ({}, {"victims": ["small_cnn"]}, "unknown victims of grid one .*small_cnn"),
        ({}, {"defenses": ["mixup"]}, "unknown defenses of grid one .*mixup"),
        ({}, {"defenses": "standard"}, "need clean cases: clean_20; say with 'spare'"),
        ({"train": 100}, {}, r"unknown setting of data set noise \(voxel labels\): train"),
        ({"size": [10, 10, 10]}, {}, "victim 'attention_unet' cannot be trained on images of"),
        ({"size": [32, 32]}, {"methods": ["slice_spectrum"]}, "voxel labels, 2D.*: slice_spectrum"),
    ],
)
def test_what_does_not_go_with_voxel_labels_is_named_before_anything_is_done(load, data, grid, words):
    config = VOXELS | {"data": {"noise": VOXELS["data"]["noise"] | data}}
    config["grids"] = {"one": VOXELS["grids"]["one"] | grid}
    with pytest.raises(ValueError, match=words):
        load("arena_cells").cells(config)


def test_a_third_party_may_have_cases_with_voxel_labels_of_its_own(load, volumes, tmp_path):
    module, settings = load("arena_data"), VOXELS["data"]["noise"] | {"spare": 2}
    with pytest.raises(ValueError, match="must be none of train and test"):
        module.load(settings | {"spare_split": "test"}, volumes, tmp_path)
    given = {"demo": 5, "task": "segmentation", "patients": 6, "size": [32, 32], "split": "test", "spare": 4}
    found = module.load(given, tmp_path, tmp_path)
    parts = [set(part.images) for part in (found.train, found.test, found.spare)]
    assert [len(each) for each in parts] == [9, 6, 4] and len(set.union(*parts)) == 19
    assert parts[0] < set(found.fitted.images), "cases for validation are released too"
    assert [set(label.unique().tolist()) <= {0, 1} for label, _ in found.train.truths]
    with pytest.raises(ValueError, match="there are 9 spare cases, 10 are asked for"):
        module.load(given | {"spare": 10}, tmp_path, tmp_path)


# -------------------------------------------------------------------- releases


def copies(load, work: Path, count: int = 20):
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(count, 1, 12, 12, generator=generator) * 0.1 + 0.4
    noise = 0.05 * torch.where(torch.rand(2, count, 1, 12, 12, generator=generator) < 0.5, -1.0, 1.0)
    given = (lambda: clean + noise[1], lambda: (clean, clean + noise[0]), work)
    return load("releases").Copies(clean, clean + noise[0], torch.arange(count) % 2, 0, *given)


def test_a_part_of_each_class_is_protected(load, tmp_path):
    one = copies(load, tmp_path)
    shown = load("releases").RELEASES["part_50"](one)
    moved = (shown != one.clean).flatten(1).any(1)
    assert [int(moved[one.labels == label].sum()) for label in (0, 1)] == [5, 5]
    assert torch.equal(shown[moved], one.protected[moved])


def test_two_copies_give_some_of_the_original_away(load, tmp_path):
    one = copies(load, tmp_path)
    error = {
        name: float((load("releases").RELEASES[name](one) - one.clean).abs().mean())
        for name in ("all", "averaged", "compared")
    }
    assert error["averaged"] == pytest.approx(0.5 * error["all"], rel=0.05)
    assert error["compared"] <= error["all"] + 1e-6


def test_a_remover_learns_a_pattern_from_other_images_and_is_trained_once(load, tmp_path):
    generator = torch.Generator().manual_seed(1)
    smooth = torch.rand(40, 1, 1, 1, generator=generator).expand(40, 1, 12, 12) * 0.4 + 0.3
    checker = 0.05 * ((torch.arange(12)[:, None] + torch.arange(12)) % 2 * 2.0 - 1)
    one = load("releases").Copies(
        smooth[:20],
        smooth[:20] + checker,
        torch.arange(20) % 2,
        0,
        lambda: None,
        lambda: (smooth[20:], smooth[20:] + checker),
        tmp_path,
    )
    state = torch.get_rng_state()
    found = load("releases").removed(one, steps=200)
    assert torch.equal(torch.get_rng_state(), state)
    assert float((found - one.clean).abs().mean()) < 0.3 * 0.05
    (kept,) = tmp_path.iterdir()
    stamp = kept.stat().st_mtime_ns
    assert torch.equal(load("releases").removed(one, steps=200), found) and kept.stat().st_mtime_ns == stamp


def test_other_labels_say_which_images_were_turned(load):
    images = torch.rand(8, 1, 5, 5)
    shown, labels = load("releases").turned(images)
    assert labels.sum() == 4
    for image, seen, label in zip(images, shown, labels, strict=True):
        assert torch.equal(seen, image.transpose(1, 2) if label else image)


def test_linear_separability_sees_a_class_marker_and_nothing_in_noise(load):
    labels = torch.arange(80) % 2
    noise = torch.rand(80, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    marker = torch.zeros(1, 8, 8)
    marker[:, ::2] = 0.5
    separable = load("releases").separable
    assert separable(noise + labels[:, None, None, None] * marker, labels) > 0.95
    assert separable(noise, labels) < 0.75


# ----------------------------------------------------------------- leaderboard


def test_the_page_compares_with_the_clean_arm_of_the_same_defense_and_says_what_is_not_known(load):
    board = load("leaderboard")
    empty = dict.fromkeys(board.RANKING) | {"accuracy": None, "seconds": 1.0, "epsilon": ""}

    def row(method, value, defense="none", level="8/255", seed=0):
        own = {"data": "tiny", "level": level, "method": method, "release": "all", "defense": defense}
        return empty | own | {"victim": "cnn", "seed": seed, "balanced_accuracy": value}

    rows = [
        each
        for seed in (0, 1)
        for each in (
            row("clean", 0.9, level="", seed=seed),
            row("blind", 0.5, level="", seed=seed),
            row("clean", 0.7, "blur_1", "", seed),
            row("clean", 0.51, "mixup", "", seed),
            row("weak", 0.8, seed=seed),
            row("strong", 0.5, seed=seed),
            row("strong", 0.65, "blur_1", seed=seed),
            row("strong", 0.5, "mixup", seed=seed),
        )
    ]
    found = board.Board(rows)
    assert [line["method"] for line in found.ranking] == ["strong", "weak", "clean", "blind"]
    bounds = ("255/255", "255/255", "9/255")
    others = [row("ops", 0.5, seed=seed) | {"epsilon": bound} for seed, bound in enumerate(bounds)]
    (line,) = [line for line in board.Board([*rows, *others]).ranking if line["method"] == "ops"]
    assert line["epsilon"] == "255/255, 9/255"
    assert found.gap("8/255", "strong", defense="blur_1")["mean"] == pytest.approx(0.25)
    assert found.gap("8/255", "strong", defense="blur_1")["conclusive"] is True
    assert found.gap("8/255", "strong", defense="mixup")["conclusive"] is False
    assert found.gap("8/255", "weak", defense="blur_1") is None


def test_tables_show_every_kept_report_and_what_readme_quotes(load, capsys):
    load("tables").main()
    said = capsys.readouterr().out
    readme = "".join((BENCHMARKS.parent / page).read_text() for page in ("README.md", "docs/results.md"))
    for name, arm in (("demo_2d", "random_mask"), ("demo_3d", "random_mask"), ("demo_seg", "label_marker")):
        table = said.split(f"\n{name}: ")[1].split("\n\n")[1]
        row = next(line for line in table.splitlines() if line.startswith(f"| {arm} |"))
        cells = row.split("|")[2:-1]
        assert len(cells) > 2 and all(cell.strip() in readme for cell in cells), f"{name}: the pages have other numbers"
