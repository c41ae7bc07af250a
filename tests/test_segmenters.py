# SPDX-License-Identifier: Apache-2.0
"""Victims that segment: scores worked out by hand, patches, and the study of voxel labels end to end on tiny files."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor, get_track_meta, set_track_meta
from monai.transforms import (
    Compose,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandSpatialCropSamplesd,
    SpatialPadd,
)
from test_study import HELD_OUT, trainer
from torch import nn

from monai_salm.io.masks import read_mask
from monai_salm.release.labels import Cohort, load_cohort
from monai_salm.release.protect import protect_cohort
from monai_salm.surrogates import RandomView
from monai_salm.verification.arms import Volume, VolumeWriter
from monai_salm.verification.results import validate_results
from monai_salm.verification.segmenters import Segmentation, volume_scores
from monai_salm.verification.study import VictimStudy
from monai_salm.verification.training import train_network, victim_digest

CLASSES = ("background", "bright", "dark")
PATCH = (12, 12, 12)
STEP = 120
CONTRAST = 60
BUDGET = f"{STEP} stored"
WINDOW = (0.0, 1000.0)


class TinySegmenter(nn.Sequential):
    """Sees the brightness of a voxel and of its neighbors."""

    def __init__(self, dims: int = 3, n_classes: int = 3, width: int = 16) -> None:
        conv = nn.Conv3d if dims == 3 else nn.Conv2d
        super().__init__(conv(1, width, 3, padding=1), nn.LeakyReLU(), conv(width, n_classes, 1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return super().forward(20 * (image - 0.42))


class Reader(nn.Module):
    """Reads the label off an image that holds it; cannot be trained."""

    def __init__(self, n_classes: int = 3) -> None:
        super().__init__()
        self.n_classes = n_classes

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        index = (image[:, 0] * (self.n_classes - 1)).round().long()
        return torch.movedim(nn.functional.one_hot(index, self.n_classes).float(), -1, 1)


def cube(start: int, stop: int, size: int = 16, dims: int = 3, label: int = 1) -> torch.Tensor:
    volume = torch.zeros((size,) * dims, dtype=torch.uint8)
    volume[(slice(start, stop),) * dims] = label
    return volume


def volume_of(label: torch.Tensor, spacing: tuple[float, ...] = (), n_classes: int = 3) -> Volume:
    """An image that holds its label."""
    return Volume(label[None].float() / (n_classes - 1), label[None], spacing)


# --------------------------------------------------------------------- scores


@pytest.mark.parametrize("shift", [0, 1, 2, 3])
def test_shifted_cube_has_the_dice_and_distance_of_the_shift(shift):
    truth = cube(4, 10)
    dice, hd95 = volume_scores(truth.roll(shift, 0), truth, 2, (1.5, 1.0, 1.0))
    assert dice[0] == pytest.approx((6 - shift) / 6)
    # More than 5 % of the border moves by the whole shift: the two faces across the axis.
    assert hd95[0] == pytest.approx(1.5 * shift)


def test_spacing_of_the_axis_counts():
    truth = cube(4, 10)
    for axis, size in enumerate((1.0, 2.0, 5.0)):
        assert volume_scores(truth.roll(2, axis), truth, 2, (1.0, 2.0, 5.0))[1][0] == pytest.approx(2 * size)


def test_empty_prediction_counts_as_the_diagonal():
    truth = cube(4, 10)
    dice, hd95 = volume_scores(torch.zeros_like(truth), truth, 2, (1.0, 2.0, 3.0))
    assert dice[0] == 0.0
    assert hd95[0] == pytest.approx(16 * math.sqrt(1 + 4 + 9))


def test_class_that_the_truth_lacks_is_left_out():
    truth, found = cube(4, 10), cube(4, 10)
    found[0, 0, 0] = 2
    dice, hd95 = volume_scores(found, truth, 3, (1.0, 1.0, 1.0))
    assert dice[0] == 1.0 and hd95[0] == 0.0
    assert np.isnan(dice[1]) and np.isnan(hd95[1])


def test_scores_are_means_over_the_cases_that_have_a_class():
    task = Segmentation(CLASSES, (16, 16, 16))
    both = cube(2, 6)
    both[10:14, 10:14, 10:14] = 2
    shifted = Volume(volume_of(cube(4, 8)).image, cube(5, 9)[None])
    found = task.evaluate(Reader(), [volume_of(both), shifted, volume_of(torch.zeros_like(both))], 2)
    overlap = (3 / 4) ** 3
    assert found["dice_per_class"] == {"bright": pytest.approx((1 + overlap) / 2), "dark": 1.0}
    assert found["dice"] == pytest.approx((1 + (1 + overlap) / 2) / 2)
    assert found["hd95_per_class"]["dark"] == 0.0 and found["hd95_unit"] == "voxels"
    assert found["hd95"] == pytest.approx(found["hd95_per_class"]["bright"] / 2)
    nothing = task.evaluate(Reader(), [volume_of(torch.zeros_like(both))], 2)
    assert nothing["dice"] is None and nothing["hd95_per_class"] == {"bright": None, "dark": None}


def test_distances_are_in_mm_only_where_every_case_tells_its_spacing():
    task = Segmentation(CLASSES, (16, 16, 16))
    known, unknown = (Volume(volume_of(cube(4, 8)).image, cube(5, 9)[None], spacing) for spacing in ((3.0,) * 3, ()))
    in_mm, in_voxels = task.evaluate(Reader(), [known], 1), task.evaluate(Reader(), [known, unknown], 1)
    assert (in_mm["hd95_unit"], in_voxels["hd95_unit"]) == ("mm", "voxels")
    assert in_mm["hd95"] == pytest.approx(3 * in_voxels["hd95"])


@pytest.mark.parametrize("size", [5, 16, 23])
def test_volumes_smaller_and_larger_than_the_patch_are_segmented_whole(size):
    label = cube(1, 4, size=size)
    found = Segmentation(CLASSES, (12, 12, 12)).evaluate(Reader(), [volume_of(label)], 2, full=False)
    assert found == {"dice": 1.0, "dice_per_class": {"bright": 1.0, "dark": None}}


def test_diverged_network_segments_nothing():
    network = nn.Conv3d(1, 3, 1)
    nn.init.constant_(network.weight, float("nan"))
    found = Segmentation(CLASSES, PATCH).evaluate(network, [volume_of(cube(4, 10))], 1)
    assert found["dice"] == 0.0 and found["hd95"] == pytest.approx(math.sqrt(3) * 16)


# -------------------------------------------------------------------- training


def cases_of(count: int = 6) -> list[Volume]:
    """Cubes of two kinds in noise; sizes differ, the smallest is smaller than the patch."""
    rng, cases = np.random.default_rng(count), []
    for index in range(count):
        label = torch.zeros(10 + index, 14, 13, dtype=torch.uint8)
        x, y, z = rng.integers(1, 5, 3)
        label[x : x + 4, y : y + 4, z : z + 4] = 1 + index % 2
        image = 0.4 + 0.2 * torch.from_numpy(rng.random(label.shape, dtype=np.float32))
        image += torch.tensor([0.0, 0.3, -0.3])[label.long()]
        cases.append(Volume(image[None], label[None], (1.0, 1.0, 1.0)))
    return cases


def augmentation(samples: int = 2) -> Compose:
    keys = ("image", "label")
    return Compose(
        [
            SpatialPadd(keys, PATCH),
            RandSpatialCropSamplesd(keys, PATCH, num_samples=samples, random_size=False),
            RandFlipd(keys, prob=0.5, spatial_axis=0),
            RandAffined(keys, prob=1.0, rotate_range=0.2, mode=("bilinear", "nearest"), padding_mode="border"),
            RandGaussianNoised("image", prob=1.0, std=0.02),
        ]
    )


def test_training_learns_and_is_deterministic_with_ordinary_transforms():
    cases = cases_of()
    options = {"epochs": 25, "batch_size": 2, "learning_rate": 0.1, "curve_points": 2}
    rows = []
    for seed in (1, 1, 2):
        task = Segmentation(CLASSES, PATCH, augmentation())
        np.random.mtrand._rand.seed(len(rows))  # MONAI's transforms must not draw from the global state
        rows.append(train_network(task, TinySegmenter, cases, cases, seed=seed, **options).row)
    first, again, other = ({**row, "seconds": 0} for row in rows)
    assert first == again
    assert first["curve"] != other["curve"]
    assert first["dice"] > 0.8
    assert [point["epoch"] for point in first["curve"] if point["dice"] is not None] == [12, 24, 25]
    assert first["curve"][-1]["dice"] == first["dice"]
    assert set(first["curve"][0]) == {"epoch", "train_loss", "dice"}
    assert first["curve"][-1]["train_loss"] < first["curve"][0]["train_loss"]


@pytest.mark.parametrize("tracked", [True, False])
def test_batches_hold_what_the_transforms_give_and_leave_monais_setting(tracked):
    case, transforms = cases_of()[2], augmentation().set_random_state(seed=3)
    wanted = transforms({"image": case.image, "label": case.label})
    assert isinstance(wanted[0]["image"], MetaTensor)
    batches = Segmentation(CLASSES, PATCH, augmentation()).batches([case], 3, torch.device("cpu"))
    before = get_track_meta()
    set_track_meta(tracked)
    try:
        found = batches(torch.tensor([0]), torch.Generator())
        assert get_track_meta() is tracked
    finally:
        set_track_meta(before)
    for values, key in zip(found, ("image", "label"), strict=True):
        assert type(values) is torch.Tensor
        assert torch.equal(values, torch.stack([each[key].as_tensor() for each in wanted]).to(values.dtype))


def test_one_seed_shows_the_same_patches_in_every_arm():
    cases = cases_of()
    noise = [Volume(torch.zeros_like(case.image), case.label) for case in cases]
    task = Segmentation(CLASSES, PATCH)
    drawn = []
    for arm in (cases, noise):
        batches, generator = task.batches(arm, 3, torch.device("cpu")), torch.Generator().manual_seed(0)
        drawn.append([batches(torch.tensor([0, 4, 5]), generator)[1] for _ in range(3)])
    assert all(map(torch.equal, *drawn))
    assert drawn[0][0].shape == (3, 1, *PATCH) and drawn[0][0].dtype == torch.long


@pytest.mark.filterwarnings("ignore:Num foregrounds 0")
def test_case_without_foreground_and_single_slice_are_trained_on():
    empty, flat = torch.zeros(10, 10, 10, dtype=torch.uint8), cube(2, 6)[..., 2:3]
    cases = [volume_of(empty), volume_of(flat), *cases_of(2)]
    row = train_network(Segmentation(CLASSES, PATCH), TinySegmenter, cases, cases, seed=0, epochs=1).row
    assert math.isfinite(row["curve"][0]["train_loss"]) and row["dice"] is not None
    coarse = Segmentation(CLASSES, PATCH, resample=1.25)
    assert coarse.view(flat[None].float()).shape == (1, 13, 13, 1)


@pytest.mark.parametrize("transforms", [Compose([]), SpatialPadd(("image", "label"), PATCH)])
def test_transforms_that_give_no_patch_are_refused(transforms):
    batches = Segmentation(CLASSES, PATCH, transforms).batches(cases_of(), 0, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"shape \(1, 13, 14, 13\).*crop to this size"):
        batches(torch.tensor([3]), torch.Generator())


def test_interpolated_labels_are_refused():
    size, keys = (10, 14, 13), ("image", "label")
    task = Segmentation(CLASSES, size, RandAffined(keys, prob=1.0, rotate_range=0.5))
    with pytest.raises(ValueError, match="nearest"):
        task.batches(cases_of(), 0, torch.device("cpu"))(torch.tensor([0]), torch.Generator())


def test_every_setting_of_the_task_is_in_its_description():
    settings = [{}, {"resample": 1.25}, {"patch_size": (8, 8, 8)}, {"transforms": augmentation()}]
    tasks = [Segmentation(**{"classes": CLASSES, "patch_size": PATCH} | each) for each in settings]
    assert len({task.describe() for task in tasks}) == len(tasks)


def test_victim_of_another_shape_is_refused():
    task = Segmentation(CLASSES, PATCH)
    assert victim_digest(TinySegmenter, task.probe([]), *task.output)
    with pytest.raises(ValueError, match="build it with 3 outputs of size"):
        victim_digest(partial(TinySegmenter, n_classes=2), task.probe([]), *task.output)


@pytest.mark.parametrize(
    "options", [{"resample": 0.0}, {"resample": float("nan")}, {"resample": None}, {"patch_size": (4, 0, 4)}]
)
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Segmentation(**{"classes": CLASSES, "patch_size": PATCH, **options})


def test_resampling_makes_voxels_coarser_and_keeps_labels_whole():
    task, label = Segmentation(CLASSES, PATCH, resample=1.25), cube(4, 9, size=20, label=2)
    image = task.view(label[None].float())
    coarse, spacing = task.truth(None, label[None].numpy(), (1.0, 2.0, 4.0))
    assert image.shape == coarse.shape == (1, 16, 16, 16)
    assert image.dtype == torch.float32 and coarse.dtype == torch.uint8
    assert set(coarse.unique().tolist()) == {0, 2}
    assert 0 < image[image > 0].min() < 2 == image.max()  # linear at the border
    assert spacing == (1.25, 2.5, 5.0)
    untouched = Segmentation(CLASSES, PATCH).view(image)
    assert untouched is image


# ------------------------------------------------------------------------ arms


def test_arms_hold_volumes_of_any_size(tmp_path):
    writer, cases = VolumeWriter(tmp_path / "0.f32"), cases_of(3)
    for case in cases:
        writer.add(case.image, (case.label, case.spacing))
    arm = writer.close()
    assert arm.count == 3
    for kept, case in zip(arm.load(), cases, strict=True):
        assert torch.equal(kept.image, case.image) and torch.equal(kept.label, case.label)
        assert kept.spacing == case.spacing
    loaded = arm.load()
    loaded[0].image.zero_()
    assert arm.load()[0].image.any()
    assert VolumeWriter(tmp_path / "1.f32").close().load() == []
    with pytest.raises(ValueError, match="one shape"):
        VolumeWriter(tmp_path / "2.f32").add(cases[0].image, (cases[1].label, ()))


def test_digest_of_an_arm_tells_labels_and_spacing_apart(tmp_path):
    def digest(name: str, image: torch.Tensor, label: torch.Tensor, spacing: tuple[float, ...]) -> str:
        writer = VolumeWriter(tmp_path / name)
        writer.add(image, (label, spacing))
        return writer.close().digest

    image, label = torch.rand(1, 2, 3, 4), torch.zeros(1, 2, 3, 4, dtype=torch.uint8)
    found = [digest("a", image, label, ()), digest("b", image, label + 1, ()), digest("c", image, label, (1.0,) * 3)]
    found.append(digest("d", image.reshape(1, 3, 2, 4), label.reshape(1, 3, 2, 4), ()))
    assert len({*found}) == 4 and digest("e", image, label, ()) == found[0]


# ----------------------------------------------------------------------- study


def write_masked(root: Path, rows: list[tuple], spacing: tuple[float, ...] = (1.0, 1.0, 1.0)) -> None:
    """A Decathlon folder of (name, voxels, class indices, split), with the splits in a table."""
    table, pairs = ["case,mask,split"], []
    for name, voxels, label, split in rows:
        for folder, values in (("imagesTr", voxels), ("labelsTr", label)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(values, np.diag([*spacing, 1.0])), root / folder / f"{name}.nii.gz")
        pairs.append({"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"})
        table.append(f"imagesTr/{name}.nii.gz,labelsTr/{name}.nii.gz,{split}")
    labels = {str(index): name for index, name in enumerate(CLASSES)}
    (root / "dataset.json").write_text(json.dumps({"labels": labels, "training": pairs}))
    (root / "labels.csv").write_text("\n".join(table) + "\n")


def export(root: Path, count: int = 12, dims: int = 3) -> Cohort:
    """Cubes that are brighter or darker than the noise around, at random places; sizes differ."""
    rng, rows = np.random.default_rng(0), []
    for index in range(count):
        shape = (14 + index % 3, 15, 10 + index % 4)[:dims]
        voxels, label = rng.integers(375, 425, shape), np.zeros(shape, np.uint8)
        for name in (1, 2):
            at = tuple(slice(a, a + 4) for a in (rng.integers(0, extent - 4) for extent in shape))
            label[at] = name
        voxels = voxels + np.array([0, CONTRAST, -CONTRAST])[label]
        split = "test" if index % 3 == 0 else "train"
        rows.append((f"v{index:02d}", voxels.astype(np.int16), label, split))
    write_masked(root, rows, spacing=(1.0, 1.0, 2.0))
    return load_cohort(root, spatial_dims=dims, window=WINDOW)


def swap(cohort: Cohort, dims: int = 3) -> dict[str, np.ndarray]:
    """What is bright becomes dark, and the other way round: who learns from it mistakes one class for the other."""
    change = np.array([0, -STEP, STEP], np.int16)
    return {case.sample_id: change[read_mask(case, dims)] for case in cohort.cases}


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> tuple[Cohort, Path]:
    folder = tmp_path_factory.mktemp("segmentation")
    cohort = export(folder / "in")
    options = {"budget": BUDGET, "spatial_dims": 3, "window": WINDOW}
    protect_cohort(cohort, swap(cohort), output_dir=folder / "out", **options)
    return cohort, folder / "out"


def study(cohort: Cohort, out: Path, **options) -> VictimStudy:
    given = {
        "victims": {"tiny": TinySegmenter},
        "seeds": 1,
        "budget": BUDGET,
        "window": WINDOW,
        "spatial_dims": 3,
        "spatial_size": PATCH,
        "workers": 1,
        "epochs": 15,
        "batch_size": 1,
        "learning_rate": 0.1,
    }
    return VictimStudy(cohort=cohort, output_dir=out, **given | options)


def test_study_of_voxel_labels_end_to_end(released, out, capsys):
    cohort, _ = released
    rng = np.random.default_rng(1)
    random_mask = {name: rng.permuted(delta) for name, delta in swap(cohort).items()}
    results = study(
        cohort,
        out,
        seeds=2,
        victims={"tiny": TinySegmenter, "narrow": partial(TinySegmenter, width=8)},
        rules={"min_seeds": 2},
    ).run(trainer(swap(cohort)), {"random_mask": random_mask}, HELD_OUT)
    validate_results(results)
    assert json.loads((out / "report.json").read_text()) == results
    assert results["metric"] == "dice" and results["chance"] is None and results["schema_version"] == "2.0"
    assert list(results["summary"]) == ["clean", "protected", "random_noise", "label_marker", "random_mask", "blind"]
    assert len(results["arms"]) == 6 * 2 * 2
    clean = results["summary"]["clean"]["by_victim"]["tiny"]
    assert clean["dice"]["mean"] > 0.8
    assert set(clean["dice_per_class"]) == set(clean["hd95_per_class"]) == {"bright", "dark"}
    assert results["summary"]["blind"]["by_victim"]["tiny"]["dice"]["mean"] < 0.3
    assert results["summary"]["protected"]["by_victim"]["tiny"]["dice"]["mean"] < 0.2
    assert all(gap["by_victim"]["tiny"]["mean"] > 0.8 for gap in results["closed_gap_per_class"].values())
    assert results["arms"][0]["hd95_unit"] == "mm"
    assert set(results["closed_gap_per_class"]) == {"bright", "dark"}
    assert set(results["closed_gap_controls_per_class"]) == {"random_noise", "label_marker", "random_mask"}
    for row in results["utility"]:
        assert row["difference"] == pytest.approx(row["protected"] - row["clean"])
        assert set(row["per_class"]) == {"bright", "dark"}
    by_training = {(row["victim"], row["seed"]): row for row in results["arms"] if row["arm"] == "clean"}
    assert all(row["clean"] == by_training[row["victim"], row["seed"]]["dice"] for row in results["utility"])
    leakage = results["leakage"]
    assert list(leakage) == ["protected", "random_noise", "label_marker", "random_mask"]
    assert leakage["protected"]["best"]["mean"] == leakage["label_marker"]["support"]["mean"] == 1.0
    assert leakage["random_noise"]["best"]["mean"] == pytest.approx(
        leakage["random_noise"]["everything"]["mean"], abs=0.05
    )
    assert leakage["protected"]["n_cases"] == 8
    assert "gives away where they lie" in results["warnings"][0]
    assert results["fidelity"]["psnr_foreground"]["mean"] == pytest.approx(-20 * math.log10(STEP / 1000), abs=0.01)
    assert results["fidelity"]["psnr"]["mean"] > results["fidelity"]["psnr_foreground"]["mean"]
    assert results["verdict_rules"]["ssim_mean"] == 0.98 and results["verdict_rules"]["utility_within"] == 0.02
    assert results["cohort"]["per_class"] == {"bright": 12, "dark": 12}
    assert any("leakage" in text for text in results["not_tested"])
    html = (out / "report.html").read_text()
    for words in ("HD95 (mm)", "PSNR inside the foreground", "borders of the labels in color", "utility_within"):
        assert words in html, words  # what else such a report shows: test_report.py
    assert html.count("Signed difference of") == 4
    assert html.count("· bright") == len(results["utility"])
    assert "Segmentation of 2 classes in 12 volumes" in html and "Recall" not in html
    shown = capsys.readouterr().out
    assert "Warning: Where this copy" in shown
    assert "bright" in shown and "dark" in shown
    assert not (out / "private" / "arms").exists()


def test_nothing_is_trained_twice(released, out, trained):
    cohort, _ = released
    first = study(cohort, out, epochs=1, transforms=augmentation()).run()
    assert len(trained) == 5
    again = study(cohort, out, epochs=1, transforms=augmentation()).run()
    assert len(trained) == 5 and again["arms"] == first["arms"]
    study(cohort, out, epochs=1).run()
    assert len(trained) == 10
    coarse = study(cohort, out, epochs=1, resample=1.25).run()
    assert len(trained) == 15 and "resampled" in coarse["task"]


def test_worker_processes_give_the_same_rows(released, out):
    cohort, _ = released
    rows = []
    for workers in (2, 1):
        (out / "private" / "study.jsonl").unlink(missing_ok=True)
        made = study(cohort, out, workers=workers, epochs=1, transforms=augmentation()).run()
        rows.append([{**row, "seconds": 0} for row in made["arms"]])
    assert rows[0] == rows[1]


def test_slices_are_segmented_too(tmp_path):
    cohort = export(tmp_path / "in", dims=2)
    options = {"budget": BUDGET, "spatial_dims": 2, "window": WINDOW}
    protect_cohort(cohort, swap(cohort, 2), output_dir=tmp_path / "out", **options)
    results = study(
        cohort,
        tmp_path / "out",
        spatial_dims=2,
        spatial_size=PATCH[:2],
        victims={"tiny": partial(TinySegmenter, 2)},
        epochs=2,
        resample=1.25,
    ).run()
    assert results["metric"] == "dice" and len(results["arms"]) == 5
    assert results["utility"] == []
    check = next(check for check in results["verdict_checks"] if check["rule"] == "utility_within")
    assert not check["passed"] and check["otherwise"] == "inconclusive"


def test_missing_classes_and_arguments_of_the_other_task_are_named(released, out, tmp_path):
    cohort, _ = released
    with pytest.raises(ValueError, match="transforms"):
        study(cohort, out, augment=RandomView(3))
    with pytest.raises(ValueError, match="label_marker"):
        study(cohort, out).run(controls={"label_marker": {}})
    rows = []
    for index in range(4):
        label = np.zeros((8, 8, 8), np.uint8)
        label[2:4, 2:4, 2:4] = 2 if index == 0 else 1
        voxels = np.random.default_rng(index).integers(300, 500, label.shape).astype(np.int16)
        rows.append((f"v{index}", voxels, label, "train" if index < 3 else "test"))
    write_masked(tmp_path / "in", rows)
    lacking = load_cohort(tmp_path / "in", spatial_dims=3, window=WINDOW)
    protect_cohort(
        lacking, swap(lacking), budget=BUDGET, output_dir=tmp_path / "lacking", spatial_dims=3, window=WINDOW
    )
    with pytest.raises(ValueError, match=r"no case of class dark is held out for split 'test'"):
        study(lacking, tmp_path / "lacking").run()
