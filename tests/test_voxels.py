# SPDX-License-Identifier: Apache-2.0
"""Voxel labels of an export: pairs, classes, splits, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exports import (
    SIZE,
    class_map,
    edit_dicom,
    write_decathlon,
    write_label,
    write_labels,
    write_nifti,
    write_segmentation,
    write_series,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread

from monai_salm.io.base import Case, Mask
from monai_salm.io.masks import read_mask
from monai_salm.release.catalog import Catalog, scan
from monai_salm.release.labels import Cohort, count_classes, find_labels, label_cases, load_cohort
from monai_salm.release.voxels import VoxelLabels

SHAPE = (6, 7, 5)


def reasons(cohort: Cohort | Catalog) -> dict[str, int]:
    return dict(Counter(refusal.reason for refusal in cohort.refusals))


def names(cases: tuple[Case, ...]) -> list[str]:
    return [case.names[0] for case in cases]


def edit_dataset(root: Path, **changes: Any) -> None:
    path = root / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_pairs(root: Path, count: int = 4, values: int = 3) -> list[str]:
    """NIfTI pairs without ``dataset.json``; rows of a table that names them."""
    for index in range(count):
        write_nifti(root / "images" / f"v{index}.nii.gz", index)
        write_label(root / "masks" / f"m{index}.nii.gz", class_map(SHAPE, index, values))
    return [f"images/v{index}.nii.gz,masks/m{index}.nii.gz" for index in range(count)]


def write_segmented(root: Path, patients: str = "AB", slices: int = 4) -> dict[str, np.ndarray]:
    """A series with its SEG file in one folder per patient; the class indices by patient."""
    truth = {}
    for patient in patients:
        paths = write_series(root / patient, patient, slices, patient=patient)
        classes = np.random.default_rng(ord(patient)).integers(0, 3, (slices, SIZE, SIZE))
        truth[patient] = classes.astype(np.uint8)
        pixels = np.stack([classes == 1, classes == 2], -1).astype(np.uint8)
        write_segmentation(root / patient / "seg", paths, pixels)
    return truth


# ------------------------------------------------------------------- Decathlon


def test_a_decathlon_folder_becomes_a_cohort_with_masks(tmp_path):
    cohort = load_cohort(write_decathlon(tmp_path, 4, test=2), spatial_dims=3)
    assert cohort.voxelwise and cohort.classes == ("background", "Core", "Rim") and count_classes(tmp_path) == 3
    assert names(cohort.cases) == [f"imagesTr/v0{index}.nii.gz" for index in range(4)]
    assert not cohort.refusals, "images to test on without a label here are no cases, and no label files are"
    for index, case in enumerate(cohort.cases):
        assert case.label == -1 and case.mask == Mask(
            tmp_path / "labelsTr" / f"v0{index}.nii.gz", f"labelsTr/v0{index}.nii.gz", (0, 1, 2)
        )
        np.testing.assert_array_equal(read_mask(case, 3), class_map(SHAPE, index)[None])
        assert cohort.class_voxels[case.sample_id] == tuple(np.bincount(class_map(SHAPE, index).ravel()))
    assert len(cohort.held_out) == 1 and len(cohort.train) == 3 and cohort.released == cohort.cases


@pytest.mark.parametrize(
    "labels",
    [
        {"0": "background", "4": "Rim", "2": "Core"},
        {"background": 0, "Rim": 4, "Core": 2},
        {"background": "0", "Rim": "4", "Core": "2"},
        {"Rim": 4, "background": 0, "Core": 2},
    ],
)
def test_class_names_are_read_in_both_forms_and_sorted_by_value(tmp_path, labels):
    write_decathlon(tmp_path, 2)
    for index in range(2):
        write_label(tmp_path / "labelsTr" / f"v0{index}.nii.gz", class_map(SHAPE, index) * 2)
    edit_dataset(tmp_path, labels=labels)
    cohort = load_cohort(tmp_path, spatial_dims=3)
    assert cohort.classes == ("background", "Core", "Rim") and cohort.cases[0].mask.values == (0, 2, 4)
    assert read_mask(cohort.cases[0], 3).max() == 2


BAD_DATASETS = {
    "no_labels": ({"labels": None}, "needs 'labels'"),
    "labels_list": ({"labels": ["background"]}, "needs 'labels'"),
    "regions": ({"labels": {"background": 0, "whole": [1, 2]}}, "single numbers"),
    "no_background": ({"labels": {"1": "Core", "2": "Rim"}}, "0 to the background"),
    "negative": ({"labels": {"0": "background", "-1": "Core"}}, "0 to the background"),
    "twice": ({"labels": {"0": "background", "1": "Core", "2": "Core"}}, "twice"),
    "ignore": ({"labels": {"background": 0, "Core": 1, "ignore": 2}}, "every voxel must have a class"),
    "too_many": ({"labels": {str(value): f"c{value}" for value in range(256)}}, "must be 1 to 254"),
    "one_class": ({"labels": {"0": "background"}}, "0 classes besides"),
    "no_training": ({"training": []}, "lists no pair"),
    "training_text": ({"training": "all"}, "must be a list"),
    "several_channels": ({"training": [{"image": ["a", "b"], "label": "c"}]}, "entry 1"),
    "missing_image": ({"training": [{"image": "secret.nii", "label": "c"}]}, "entry 1|line 1"),
}


@pytest.mark.parametrize("name", BAD_DATASETS)
def test_a_bad_dataset_json_is_an_error_that_says_what(tmp_path, name):
    changes, message = BAD_DATASETS[name]
    edit_dataset(write_decathlon(tmp_path, 2), **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_cohort(tmp_path, spatial_dims=3)
    assert "dataset.json" in str(error.value) or "label files" in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100_000])
def test_a_dataset_json_that_is_no_object_is_an_error(tmp_path, text):
    write_decathlon(tmp_path, 2)
    (tmp_path / "dataset.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"dataset\.json"):
        load_cohort(tmp_path, spatial_dims=3)


@given(content=st.recursive(st.none() | st.integers(-2, 3) | st.text("a01", max_size=2), st.lists, max_leaves=4))
@settings(max_examples=100, deadline=None)
def test_any_json_is_labels_or_a_value_error(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("json")
    for key in ("labels", "training", "test"):
        whole = {"labels": {"0": "b", "1": "c"}, "training": [{"image": "a", "label": "b"}]} | {key: content}
        (folder / "dataset.json").write_text(json.dumps(whole))
        try:
            assert isinstance(find_labels(folder), VoxelLabels)
        except ValueError:
            pass


def test_validation_and_labeled_test_entries_keep_their_split(tmp_path):
    write_decathlon(tmp_path, 4)
    pairs = json.loads((tmp_path / "dataset.json").read_text())["training"]
    edit_dataset(tmp_path, training=pairs[:2], validation=pairs[2:3], test=pairs[3:])
    cohort = load_cohort(tmp_path, spatial_dims=3)
    assert [case.split for case in cohort.cases] == ["train", "train", "val", "test"]
    assert len(cohort.held_out) == 1 and len(cohort.released) == 3


def test_a_table_beside_it_gives_splits_and_has_the_last_word(tmp_path):
    write_decathlon(tmp_path, 4)
    rows = [f"imagesTr/v0{index}.nii.gz,,{split}" for index, split in enumerate(["train", "val", "test"])]
    write_labels(tmp_path, rows, "mask")
    cohort = load_cohort(tmp_path, spatial_dims=3)
    assert [case.split for case in cohort.cases] == ["train", "val", "test"]
    assert reasons(cohort) == {"no_label": 1} and "label table" in cohort.refusals[0].detail
    table = write_labels(tmp_path, ["imagesTr/v00.nii.gz,labelsTr/v01.nii.gz,train"], "mask")
    with pytest.raises(ValueError, match=r"line 2 of the label table: the mask is another"):
        load_cohort(tmp_path, spatial_dims=3)
    other = tmp_path.with_name("elsewhere.csv")
    table.rename(other)
    write_labels(other.parent, rows, "mask").rename(other)  # labels.csv of another folder
    assert len(load_cohort(tmp_path, other, spatial_dims=3).cases) == 3


def test_a_table_of_labels_keeps_it_a_classification(tmp_path):
    write_decathlon(tmp_path, 2)
    write_labels(tmp_path, [f"imagesTr/v0{index}.nii.gz,{'ab'[index]}" for index in range(2)])
    cohort = load_cohort(tmp_path, spatial_dims=3)
    assert not cohort.voxelwise and cohort.classes == ("a", "b") and count_classes(tmp_path) == 2
    assert reasons(cohort) == {"unknown_file": 1, "no_label": 2}


def test_real_hippocampi_become_a_cohort(data_dir):
    cohort = load_cohort(data_dir / "Task04_Hippocampus", spatial_dims=3)
    assert len(cohort.cases) == 130 and not cohort.refusals and len(cohort.held_out) == 32
    assert cohort.classes == ("background", "Anterior", "Posterior")
    assert all(min(counts) > 0 for counts in cohort.class_voxels.values())


# ------------------------------------------------------------- pairs in a table


def test_pairs_in_a_table_are_found_and_their_values_are_the_classes(tmp_path):
    write_labels(tmp_path, write_pairs(tmp_path), "mask")
    write_label(tmp_path / "masks" / "m0.nii.gz", class_map(classes=2) * 7)
    cohort = load_cohort(tmp_path, spatial_dims=3)
    assert cohort.classes == ("background", "1", "2", "7") and count_classes(tmp_path) == 4
    assert len(cohort.cases) == 4 and not cohort.refusals
    assert cohort.cases[0].mask.values == (0, 1, 2, 7)
    np.testing.assert_array_equal(np.unique(read_mask(cohort.cases[0], 3)), [0, 3])


@pytest.mark.parametrize("folder", ["labels", "/data/masks"])
def test_label_files_that_are_not_there_are_told_as_such(tmp_path, folder):
    rows = write_pairs(tmp_path)
    write_labels(tmp_path, [row.replace("masks", folder) for row in rows], "mask")
    for call in (count_classes, load_cohort):
        with pytest.raises(ValueError, match="none of the 4 label files that the label table names is there"):
            call(tmp_path, spatial_dims=3)


def test_label_files_that_share_a_fault_are_told_with_it(tmp_path):
    rows = write_pairs(tmp_path, 2)
    for index in range(2):
        write_label(tmp_path / "masks" / f"m{index}.nii.gz", class_map() / np.float32(3))
    write_labels(tmp_path, rows, "mask")
    with pytest.raises(ValueError, match=r"0 classes .*\. Refused: 2 mask_is_image; mask_is_image: .* no integers"):
        load_cohort(tmp_path, spatial_dims=3)


@pytest.mark.parametrize("levels", [33, 64, 101])
def test_an_image_of_few_gray_levels_names_no_classes(tmp_path, levels):
    write_labels(tmp_path, write_pairs(tmp_path), "mask")
    write_label(tmp_path / "masks" / "m1.nii.gz", class_map(classes=levels))
    cohort = load_cohort(tmp_path, spatial_dims=3)
    assert cohort.classes == ("background", "1", "2") and len(cohort.cases) == 3
    (refusal,) = cohort.refusals
    assert refusal.reason in ("mask_is_image", "unknown_label_value") and "dataset.json" in refusal.detail


def test_an_atlas_needs_names_for_its_classes(tmp_path):
    write_labels(tmp_path, write_pairs(tmp_path, values=40), "mask")
    with pytest.raises(ValueError, match=r"more than 32 must be named in a dataset\.json"):
        load_cohort(tmp_path, spatial_dims=3)
    labels = {str(value): f"structure {value}" for value in range(40)}
    pairs = [{"image": f"images/v{index}.nii.gz", "label": f"masks/m{index}.nii.gz"} for index in range(4)]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels, "training": pairs}))
    assert len(load_cohort(tmp_path, spatial_dims=3).cases) == 4


def test_what_does_not_fit_is_refused_and_the_rest_is_kept(tmp_path):
    rows = write_pairs(tmp_path, 9)
    write_label(tmp_path / "masks" / "m1.nii.gz", class_map((6, 7, 4)))
    write_label(tmp_path / "masks" / "m2.nii.gz", class_map(), np.eye(4))
    write_nifti(tmp_path / "masks" / "m3.nii.gz", 77)
    write_label(tmp_path / "masks" / "m4.nii.gz", class_map() * np.float32(0.5))
    write_label(tmp_path / "images" / "v5.nii.gz", class_map(seed=9))
    (tmp_path / "masks" / "m6.nii.gz").unlink()
    rows[7] = "images/v7.nii.gz,images/v7.nii.gz"
    write_label(tmp_path / "masks" / "m8.nii.gz", np.zeros(SHAPE, np.uint8))
    write_labels(tmp_path, rows, "mask")
    cohort = load_cohort(tmp_path, spatial_dims=3)
    assert names(cohort.cases) == ["images/v0.nii.gz", "images/v8.nii.gz"], "a case without foreground is kept"
    assert cohort.class_voxels[cohort.cases[1].sample_id] == (210, 0, 0)
    by_id = {refusal.name: refusal.reason for refusal in cohort.refusals}
    found = scan(tmp_path, 3, voxels=find_labels(tmp_path)).refused_names
    assert {found[name][0]: reason for name, reason in by_id.items() if "images" in found[name][0]} == {
        "images/v1.nii.gz": "mask_shape",
        "images/v2.nii.gz": "mask_affine",
        "images/v3.nii.gz": "mask_is_image",
        "images/v4.nii.gz": "mask_is_image",
        "images/v5.nii.gz": "mask_is_image",
        "images/v6.nii.gz": "mask_missing",
        "images/v7.nii.gz": "mask_is_image",
    }


def test_a_label_file_that_cannot_be_opened_is_one_refusal(tmp_path, monkeypatch):
    write_decathlon(tmp_path, 4)
    closed, opened = tmp_path / "labelsTr" / "v01.nii.gz", Path.open

    def open_(self, *arguments, **options):
        if self == closed:  # the tests may run as root, who can open everything
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_)
    catalog = scan(tmp_path, 3, voxels=find_labels(tmp_path))
    (refusal,) = catalog.refusals
    assert len(catalog.cases) == 3 and catalog.refused_names[refusal.name] == ("imagesTr/v01.nii.gz",)
    assert refusal.reason == "unreadable_file"
    assert refusal.detail == "its label file: the file cannot be opened (Permission denied)"


def test_swapped_columns_are_refused(tmp_path):
    rows = write_pairs(tmp_path)
    write_labels(tmp_path, [",".join(reversed(row.split(","))) for row in rows], "mask")
    with pytest.raises(ValueError, match=r"0 classes besides|mask_is_image"):
        load_cohort(tmp_path, spatial_dims=3)


def test_a_file_that_is_image_and_label_at_once_is_refused(tmp_path):
    rows = write_pairs(tmp_path)
    write_labels(tmp_path, [*rows, "masks/m0.nii.gz,images/v0.nii.gz"], "mask")
    cohort = load_cohort(tmp_path, spatial_dims=3)
    assert len(cohort.cases) == 3 and reasons(cohort) == {"mask_is_image": 2}


def test_a_label_value_that_dataset_json_lacks_refuses_its_case(tmp_path):
    write_decathlon(tmp_path, 3)
    write_label(tmp_path / "labelsTr" / "v01.nii.gz", class_map(classes=4))
    cohort = load_cohort(tmp_path, spatial_dims=3)
    assert len(cohort.cases) == 2 and reasons(cohort) == {"unknown_label_value": 1}
    assert "3 (" in cohort.refusals[0].detail


def test_a_table_row_without_any_mask_is_refused(tmp_path):
    rows = write_pairs(tmp_path)
    write_labels(tmp_path, [*rows[:3], "images/v3.nii.gz,"], "mask")
    cohort = load_cohort(tmp_path, spatial_dims=3)
    assert len(cohort.cases) == 3 and reasons(cohort) == {"no_label": 2}, "nor is its label file an image"


def test_masks_outside_the_export_or_behind_links_are_not_read(tmp_path):
    rows = write_pairs(tmp_path / "in")
    write_label(tmp_path / "out.nii", class_map(classes=9))
    (tmp_path / "in" / "masks" / "link.nii").symlink_to(tmp_path / "out.nii")
    rows[1], rows[2] = "images/v1.nii.gz,../out.nii", "images/v2.nii.gz,masks/link.nii"
    write_labels(tmp_path / "in", rows, "mask")
    cohort = load_cohort(tmp_path / "in", spatial_dims=3)
    assert cohort.classes == ("background", "1", "2")
    assert reasons(cohort)["mask_missing"] == 2 and len(cohort.cases) == 2


def test_a_cohort_without_foreground_is_an_error(tmp_path):
    write_decathlon(tmp_path, 3)
    for index in range(3):
        write_label(tmp_path / "labelsTr" / f"v0{index}.nii.gz", np.zeros(SHAPE, np.uint8))
    with pytest.raises(ValueError, match="no released case has a voxel"):
        load_cohort(tmp_path, spatial_dims=3)


def test_a_class_that_is_only_tested_is_an_error(tmp_path):
    write_decathlon(tmp_path, 3)
    for index in range(2):
        write_label(tmp_path / "labelsTr" / f"v0{index}.nii.gz", class_map(classes=2))
    rows = [f"imagesTr/v0{index}.nii.gz,,{split}" for index, split in enumerate(["train", "train", "test"])]
    write_labels(tmp_path, rows, "mask")
    with pytest.raises(ValueError, match="1 of 3 classes occur in split test only"):
        load_cohort(tmp_path, spatial_dims=3)


def test_a_class_that_no_case_has_must_leave_the_labels(tmp_path):
    write_decathlon(tmp_path, 4)
    edit_dataset(tmp_path, labels={"0": "background", "1": "Core", "2": "Rim", "3": "Never"})
    with pytest.raises(ValueError, match=r"no case has a voxel of class Never; take it out of 'labels'"):
        load_cohort(tmp_path, spatial_dims=3).tested()


def test_slices_have_masks_too(tmp_path):
    for index in range(4):
        write_nifti(tmp_path / f"v{index}.nii", index, (6, 7))
        write_label(tmp_path / f"m{index}.nii", class_map((6, 7, 1), index), np.diag([1, 1, 2, 1]))
    write_labels(tmp_path, [f"v{index}.nii,m{index}.nii" for index in range(4)], "mask")
    cohort = load_cohort(tmp_path, spatial_dims=2)
    assert len(cohort.cases) == 4 and read_mask(cohort.cases[0], 2).shape == (1, 7, 6)
    with pytest.raises(ValueError, match="not_3d"):
        load_cohort(tmp_path, spatial_dims=3)


# ---------------------------------------------------------------------- held out


@given(
    has=st.lists(st.sets(st.integers(1, 3)), min_size=1, max_size=40),
    per_patient=st.integers(1, 3),
    seed=st.integers(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_a_quarter_of_the_patients_is_held_out_and_no_class_is_lost(has, per_patient, seed):
    mask = Mask(Path("m"), "m", (0, 1, 2, 3))
    cases, counts = [], {}
    for index, present in enumerate(has):
        own = Mask(Path(f"m{index}"), f"m{index}", mask.values)
        cases.append(
            Case(f"c{index}", "nifti", (Path(f"{index}"),), (f"{index}",), f"p{index // per_patient}", mask=own)
        )
        counts[f"c{index}"] = tuple(int(label == 0 or label in present) for label in range(4))
    catalog = Catalog(Path("/x"), tuple(cases), (), {}, ("background", "1", "2", "3"), counts)
    labels = VoxelLabels(Path("/x"), None, None)
    if not set().union(*has):
        with pytest.raises(ValueError, match="no released case"):
            label_cases(catalog, labels, seed=seed)
        return
    cohort = label_cases(catalog, labels, seed=seed)
    assert cohort == label_cases(catalog, labels, seed=seed)
    patients = {case.group for case in cases}
    held = {case.group for case in cohort.held_out}
    assert len(held) <= max(1, round(len(patients) / 4)) and held < patients
    assert not held & {case.group for case in cohort.train}
    left = set().union(*(has[int(case.names[0])] for case in cohort.train))
    assert left == set().union(*has)
    if all(each == {1, 2, 3} for each in has) and len(patients) > 1:
        assert len(held) == max(1, round(len(patients) / 4))


@pytest.mark.parametrize("seed", range(6))
def test_somebody_of_a_class_that_few_have_is_held_out(tmp_path, seed):
    write_decathlon(tmp_path, 16)
    for index in range(14):
        write_label(tmp_path / "labelsTr" / f"v{index:02d}.nii.gz", class_map(seed=index, classes=2))
    cohort = load_cohort(tmp_path, spatial_dims=3, seed=seed)
    assert len(cohort.tested()) == 4, "it raises where a class is missing"
    assert sum(cohort.class_voxels[case.sample_id][2] > 0 for case in cohort.held_out) == 1


# --------------------------------------------------------------------------- SEG


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_segmentations_find_their_series_without_a_table(tmp_path, spatial_dims):
    truth = write_segmented(tmp_path)
    cohort = load_cohort(tmp_path, spatial_dims=spatial_dims)
    assert cohort.voxelwise and cohort.classes == ("background", "Liver", "Tumor") and count_classes(tmp_path) == 3
    assert not cohort.refusals and len(cohort.cases) == (8 if spatial_dims == 2 else 2)
    total = np.sum([cohort.class_voxels[case.sample_id] for case in cohort.cases], axis=0)
    np.testing.assert_array_equal(total, np.bincount(np.concatenate([*truth.values()]).ravel()))
    assert len({case.group for case in cohort.held_out}) == 1


def test_a_segmentation_without_series_reference_is_found_by_its_frames(tmp_path):
    write_segmented(tmp_path)

    def forget(dataset: Any) -> None:
        del dataset.ReferencedSeriesSequence

    edit_dicom(tmp_path / "A" / "seg", forget)
    assert len(load_cohort(tmp_path, spatial_dims=3).cases) == 2


def name_only_the_series(dataset: Any) -> None:
    del dataset.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        del frame.DerivationImageSequence


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_segmentation_that_names_only_its_series_counts_as_any_other(tmp_path, spatial_dims):
    write_segmented(tmp_path)
    for patient in "AB":
        edit_dicom(tmp_path / patient / "seg", name_only_the_series)
    cohort = load_cohort(tmp_path, spatial_dims=spatial_dims)
    assert cohort.classes == ("background", "Liver", "Tumor") and not cohort.refusals
    assert len(cohort.cases) == (8 if spatial_dims == 2 else 2)


def write_one_for_two_series(root: Path, shift: float = 0.0, sources: bool = True) -> dict[str, np.ndarray]:
    """Patient Z with two series and one segmentation of both; the class indices by series.

    Args:
        root: where to.
        shift: mm that the second series lies higher than the first one.
        sources: whether frames name their source images.
    """
    truth = {}
    for name in "XY":
        paths = write_series(root / "Z" / name, name, 4, patient="Z")
        for index, path in enumerate(paths if name == "Y" else ()):
            edit_dicom(path, lambda dataset, z=2.5 * index + shift: setattr(dataset, "ImagePositionPatient", [0, 0, z]))
        truth[name] = np.random.default_rng(ord(name)).integers(0, 3, (4, SIZE, SIZE)).astype(np.uint8)
        pixels = np.stack([truth[name] == 1, truth[name] == 2], -1).astype(np.uint8)
        write_segmentation(root / "Z" / f"seg{name}", paths, pixels)
    other = dcmread(root / "Z" / "segY")
    (root / "Z" / "segY").unlink()

    def join(dataset: Any) -> None:
        for keyword in ("ReferencedSeriesSequence", "PerFrameFunctionalGroupsSequence"):
            dataset[keyword].value.extend(other[keyword].value)
        for frame in () if sources else dataset.PerFrameFunctionalGroupsSequence:
            del frame.DerivationImageSequence
        dataset.NumberOfFrames += other.NumberOfFrames
        dataset.PixelData += other.PixelData

    edit_dicom(root / "Z" / "segX", join)
    return truth


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize(("shift", "sources"), [(0.0, True), (0.4, True), (50.0, True), (50.0, False)])
def test_each_series_takes_its_own_frames_of_a_segmentation_of_two(tmp_path, spatial_dims, shift, sources):
    write_segmented(tmp_path)
    truth = write_one_for_two_series(tmp_path, shift, sources)
    cohort = load_cohort(tmp_path, spatial_dims=spatial_dims)
    assert not cohort.refusals and len(cohort.cases) == (16 if spatial_dims == 2 else 4)
    for name, classes in truth.items():
        cases = [case for case in cohort.cases if case.names[0].startswith(f"Z/{name}/")]
        counts = np.sum([cohort.class_voxels[case.sample_id] for case in cases], axis=0)
        np.testing.assert_array_equal(counts, np.bincount(classes.ravel()))


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("lost", ["slice", "series", "frame", "released"])
def test_a_segmentation_of_two_series_leaves_with_both_or_not_at_all(tmp_path, spatial_dims, lost):
    write_segmented(tmp_path)
    write_one_for_two_series(tmp_path, 50.0, sources=lost != "frame")
    slices = sorted((tmp_path / "Z" / "Y").iterdir())
    for path in {"slice": [tmp_path / "Z" / "Y" / "IM50"], "series": slices}.get(lost, ()):
        path.unlink()
    if lost == "frame":
        edit_dicom(tmp_path / "Z" / "segX", move_last_frame)
    if lost == "released":
        rows = [f"Z/Y/{path.name},Z/segX,test" for path in slices] if spatial_dims == 2 else ["Z/Y,Z/segX,test"]
        of_x = [f"Z/X/{path.name},Z/segX,train" for path in sorted((tmp_path / "Z" / "X").iterdir())]
        rows += of_x if spatial_dims == 2 else ["Z/X,Z/segX,train"]
        write_labels(tmp_path, ["A,A/seg,train", "B,B/seg,train", *rows], "mask")
    cohort = load_cohort(tmp_path, spatial_dims=spatial_dims)
    assert len({case.group for case in cohort.released}) == 2, "those of the other patients"
    found = reasons(cohort)
    if lost == "released":
        assert found == {"mask_shared_with_unreleased": 4 if spatial_dims == 2 else 1}
    else:
        assert found.keys() == {"mask_missing_slices"}
        assert all("complete the series (each that it labels)" in each.detail for each in cohort.refusals)


def move_last_frame(dataset: Any) -> None:
    dataset.PerFrameFunctionalGroupsSequence[-1].PlanePositionSequence[0].ImagePositionPatient = [0, 0, 99]


def test_segments_that_dataset_json_does_not_name_are_refused_with_what_it_names(tmp_path):
    write_segmented(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "Liver": 1}}))
    write_labels(tmp_path, ["A,A/seg", "B,B/seg"], "mask")
    with pytest.raises(ValueError, match=r"1 of 2 segment labels are no classes of dataset\.json \(Liver\); add them"):
        load_cohort(tmp_path, spatial_dims=3)


def test_one_label_in_different_files_is_one_class(tmp_path):
    write_segmented(tmp_path, "AB")
    paths = sorted(path for path in (tmp_path / "B").iterdir() if path.name != "seg")
    write_segmentation(tmp_path / "B" / "seg", paths, np.ones((4, SIZE, SIZE, 1), np.uint8), labels=("Tumor",))
    cohort = load_cohort(tmp_path, spatial_dims=3)
    assert cohort.classes == ("background", "Liver", "Tumor")
    assert [case.mask.values for case in cohort.cases] == [(0, 1, 2), (0, -1, 1)]
    assert cohort.class_voxels[cohort.cases[1].sample_id] == (0, 0, 4 * SIZE * SIZE)


def test_segment_labels_that_differ_in_case_only_are_warned_of(tmp_path, caplog):
    write_segmented(tmp_path)
    paths = [path for path in (tmp_path / "B").iterdir() if path.name != "seg"]
    write_segmentation(tmp_path / "B" / "seg", paths, np.ones((4, SIZE, SIZE, 1), np.uint8), labels=("liver",))
    assert load_cohort(tmp_path, spatial_dims=3).classes == ("background", "Liver", "Tumor", "liver")
    assert "count as different: Liver, liver" in caplog.text


def test_fractions_are_warned_of(tmp_path, caplog):
    write_segmented(tmp_path, "AB")
    load_cohort(tmp_path, spatial_dims=3)
    assert not caplog.messages
    paths = write_series(tmp_path / "C", "C", 4, patient="C")
    write_segmentation(tmp_path / "C" / "seg", paths, np.full((4, SIZE, SIZE, 2), 0.4), kind="FRACTIONAL")
    load_cohort(tmp_path, spatial_dims=3)
    assert caplog.messages == ["1 segmentations have fractions: a voxel counts above half of the maximum"]


def test_a_table_chooses_between_several_segmentations(tmp_path):
    write_segmented(tmp_path)
    paths = sorted(path for path in (tmp_path / "B").iterdir() if path.name != "seg")
    write_segmentation(tmp_path / "B" / "other", paths, np.ones((4, SIZE, SIZE, 1), np.uint8), labels=("Lung",))
    cohort = load_cohort(tmp_path, spatial_dims=3)
    assert len(cohort.cases) == 1 and reasons(cohort) == {"several_masks": 1}
    write_labels(tmp_path, ["A,,train", "B,B/other,train"], "mask")
    cohort = load_cohort(tmp_path, spatial_dims=3)
    assert [case.mask.name for case in cohort.cases] == ["A/seg", "B/other"]
    assert not cohort.refusals, "what the table did not choose is simply left out"
    write_labels(tmp_path, ["A,,train", "B,,train"], "mask")
    assert reasons(load_cohort(tmp_path, spatial_dims=3)) == {"several_masks": 1}
    slices = sorted(path.name for path in (tmp_path / "B").iterdir() if path.name not in ("seg", "other"))
    write_labels(tmp_path, ["A,", *(f"B/{name},B/other" for name in slices)], "mask")
    cohort = load_cohort(tmp_path, spatial_dims=2)
    assert len(cohort.cases) == 8 and not cohort.refusals


@pytest.mark.parametrize("where", ["private", "sequence"])
@pytest.mark.parametrize("table", [False, True])
def test_a_segmentation_that_hides_pixels_is_refused_as_a_companion_would_be(tmp_path, where, table):
    def hide(dataset: Any) -> None:
        if where == "private":
            dataset.private_block(0x0099, "COPY", create=True).add_new(1, "OB", bytes(1 << 14))
        else:
            item = dataset.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0]
            item.add_new("PixelData", "OW", bytes(64))

    write_segmented(tmp_path)
    edit_dicom(tmp_path / "B" / "seg", hide)
    if table:
        write_labels(tmp_path, ["A,A/seg", "B,B/seg"], "mask")
    cohort = load_cohort(tmp_path, spatial_dims=3)
    assert [case.mask.name for case in cohort.cases] == ["A/seg"]
    assert reasons(cohort) == {"companion_with_pixels": 1} | ({} if table else {"no_label": 1})


@pytest.mark.parametrize("table", [False, True])
def test_segmentations_that_share_their_uid_are_refused_as_images_are(tmp_path, table):
    write_segmented(tmp_path, "ABCD")
    uid = dcmread(tmp_path / "B" / "seg").SOPInstanceUID
    edit_dicom(tmp_path / "C" / "seg", lambda dataset: setattr(dataset, "SOPInstanceUID", uid))
    image = dcmread(next(path for path in (tmp_path / "A").iterdir() if path.name != "seg")).SOPInstanceUID
    edit_dicom(tmp_path / "D" / "seg", lambda dataset: setattr(dataset, "SOPInstanceUID", image))
    write_series(tmp_path / "E", "E", 4, patient="E")
    pixels = np.tri(SIZE, dtype=np.uint8)[None].repeat(4, 0)
    write_segmentation(tmp_path / "E" / "seg", sorted((tmp_path / "E").iterdir()), pixels, ("Liver",))
    if table:
        write_labels(tmp_path, [f"{name},{name}/seg" for name in "ABCDE"], "mask")
    cohort = load_cohort(tmp_path, spatial_dims=3)
    assert [case.mask.name for case in cohort.cases] == ["E/seg"]
    # B, C and D (and the series A, one of whose images has the UID of D's) and the series that lost their labels
    assert reasons(cohort) == {"duplicate_uid": 4, "mask_unused": 1} | ({} if table else {"no_label": 3})
    told = [each.detail for each in cohort.refusals if each.reason == "duplicate_uid"]
    assert all(detail.endswith("2 files have one SOPInstanceUID; remove copies") for detail in told)


def test_a_series_that_no_segmentation_refers_to_is_told_so(tmp_path):
    write_segmented(tmp_path)
    write_series(tmp_path / "A" / "scout", "scout", 4, patient="P")
    (refusal,) = load_cohort(tmp_path, spatial_dims=3).refusals
    assert refusal.reason == "no_label" and refusal.detail.startswith("no SEG file that can be used refers to this")


def test_a_segmentation_of_a_series_that_is_not_there_is_refused(tmp_path):
    write_segmented(tmp_path, "ABC")
    for path in (tmp_path / "C").iterdir():
        if path.name != "seg":
            path.unlink()
    write_series(tmp_path / "D", "D", 3, patient="D")
    cohort = load_cohort(tmp_path, spatial_dims=3)
    assert len(cohort.cases) == 2 and reasons(cohort) == {"mask_unused": 1, "no_label": 1}
    assert "no image of the export uses" in next(r.detail for r in cohort.refusals if r.reason == "mask_unused")


def test_a_segmentation_whose_images_were_refused_says_so(tmp_path):
    write_segmented(tmp_path, "ABC")
    for path in (tmp_path / "C").iterdir():
        if path.name != "seg":
            edit_dicom(path, lambda dataset: setattr(dataset, "ImagePositionPatient", [0, 0, 0]))
    cohort = load_cohort(tmp_path, spatial_dims=3)
    assert len(cohort.cases) == 2 and reasons(cohort) == {"duplicate_position": 1, "mask_unused": 1}
    assert "the images that it refers to were refused" in cohort.refusals[-1].detail


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_missing_slices_refuse_the_whole_series(tmp_path, spatial_dims):
    write_segmented(tmp_path, "AB", slices=6)
    paths = write_series(tmp_path / "B", "B", 6, patient="B")
    paths[0].unlink()
    cohort = load_cohort(tmp_path, spatial_dims=spatial_dims)
    assert {case.group for case in cohort.cases} == {cohort.cases[0].group}
    assert reasons(cohort) == {"mask_missing_slices": 5 if spatial_dims == 2 else 1}
    assert "1 of 6 slices" in cohort.refusals[0].detail


@pytest.mark.parametrize("shift", [0.02, 1.2, 2.5])
@pytest.mark.parametrize("sources", [0, 2])
def test_frames_that_find_no_slice_are_no_background(tmp_path, shift, sources):
    """Slices are read one by one, and each takes such a frame for one of another slice."""
    write_segmented(tmp_path)

    def move(dataset: Any) -> None:
        frame = dataset.PerFrameFunctionalGroupsSequence[-1]
        frame.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 7.5 + shift]
        named = dataset.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence[0]
        if sources:
            frame.DerivationImageSequence[0].SourceImageSequence.append(named)
        else:
            del frame.DerivationImageSequence

    edit_dicom(tmp_path / "B" / "seg", move)
    cohort = load_cohort(tmp_path, spatial_dims=2)
    assert len(cohort.cases) == 4 and reasons(cohort) == {"mask_affine" if sources else "mask_missing_slices": 4}
    assert f"{shift} mm from the " in cohort.refusals[0].detail


def test_slices_that_share_a_segmentation_are_refused_together(tmp_path):
    write_segmented(tmp_path)
    paths = write_series(tmp_path / "B", "B", 4, patient="B")
    edit_dicom(paths[1], lambda dataset: setattr(dataset, "PixelData", bytes(2 * SIZE * SIZE)))
    cohort = load_cohort(tmp_path, spatial_dims=2)
    assert len(cohort.cases) == 4
    assert reasons(cohort) == {"constant_image": 1, "mask_shared_with_unreleased": 3}
    assert "refers to images that are not released (constant_image), and a copy" in cohort.refusals[0].detail


@pytest.mark.parametrize("fault", ["overlap", "hidden", "duplicate"])
def test_the_cause_of_many_refusals_is_named(tmp_path, fault):
    """A fault of the one segmentation, of which all slices but one only say that they have no label."""
    write_segmented(tmp_path, "A")
    seg = tmp_path / "A" / "seg"
    if fault == "overlap":
        edit_dicom(seg, lambda dataset: setattr(dataset, "PixelData", b"\xff" * len(dataset.PixelData)))
    elif fault == "hidden":
        hidden = bytes(1 << 14)
        edit_dicom(seg, lambda dataset: dataset.private_block(0x0099, "A", create=True).add_new(1, "OB", hidden))
    else:
        (tmp_path / "A" / "copy").write_bytes(seg.read_bytes())
    causes = {
        "overlap": "mask_overlap: segm",
        "hidden": "companion_with_pixels: ",
        "duplicate": "duplicate_uid: 2 files",
    }
    with pytest.raises(ValueError, match=rf"Refused: .*(4 no_label|3 mask_shared_).*; {causes[fault]}"):
        load_cohort(tmp_path, spatial_dims=2)


def test_images_that_share_a_label_file_with_a_tested_one_are_refused(tmp_path):
    rows = write_pairs(tmp_path, 4)
    rows[1] = "images/v1.nii.gz,masks/m0.nii.gz"
    (tmp_path / "masks" / "m1.nii.gz").unlink()
    write_labels(tmp_path, [f"{row},{'test' if index == 0 else 'train'}" for index, row in enumerate(rows)], "mask")
    (refusal,) = load_cohort(tmp_path, spatial_dims=3).refusals
    assert refusal.reason == "mask_shared_with_unreleased"
    assert refusal.detail.startswith("the label file also labels an image that is not released; release all")


def test_slices_held_back_by_a_table_hold_back_those_that_share_their_segmentation(tmp_path):
    write_segmented(tmp_path)
    first, *rest = sorted(path.name for path in (tmp_path / "B").iterdir() if path.name != "seg")
    rows = ["A,,train", f"B/{first},,test", *(f"B/{name},,train" for name in rest)]
    write_labels(tmp_path, rows, "mask")
    cohort = load_cohort(tmp_path, spatial_dims=2)
    assert [case.split for case in cohort.cases] == ["train"] * 4 + ["test"]
    assert reasons(cohort) == {"mask_shared_with_unreleased": 3}
    write_labels(tmp_path, rows[:-1], "mask")
    cohort = load_cohort(tmp_path, spatial_dims=2)
    assert len(cohort.cases) == 4 and reasons(cohort) == {"mask_shared_with_unreleased": 3, "no_label": 1}


def test_slices_that_a_table_leaves_out_hold_back_the_others_of_a_segmentation_that_names_only_its_series(tmp_path):
    write_segmented(tmp_path)
    edit_dicom(tmp_path / "B" / "seg", name_only_the_series)
    first, *rest = sorted(path.name for path in (tmp_path / "B").iterdir() if path.name != "seg")
    write_labels(tmp_path, ["A,", *(f"B/{name},B/seg" for name in rest)], "mask")
    cohort = load_cohort(tmp_path, spatial_dims=2)
    assert len(cohort.cases) == 4 and reasons(cohort) == {"mask_shared_with_unreleased": 3, "no_label": 1}


def test_an_image_named_as_segmentation_is_refused(tmp_path):
    write_segmented(tmp_path)
    name = next(path.name for path in (tmp_path / "A").iterdir() if path.name != "seg")
    write_labels(tmp_path, [f"A,A/{name},train", "B,B/seg,train"], "mask")
    cohort = load_cohort(tmp_path, spatial_dims=3)
    assert len(cohort.cases) == 1 and reasons(cohort) == {"mask_is_image": 1}


def test_segmentations_do_not_turn_a_classification_into_voxel_labels(tmp_path):
    write_segmented(tmp_path)
    write_labels(tmp_path, [f"{name}/{path.name},{name}" for name in "AB" for path in (tmp_path / name).iterdir()])
    cohort = load_cohort(tmp_path, spatial_dims=2)
    assert not cohort.voxelwise and len(cohort.cases) == 8 and not cohort.refusals and len(cohort.companions) == 2


def test_a_segmentation_of_nothing_in_the_export_tells_no_labels(tmp_path):
    write_segmented(tmp_path, "AB")
    for path in [*(tmp_path / "A").iterdir(), *(tmp_path / "B").iterdir()]:
        if path.name != "seg":
            path.unlink()
    write_series(tmp_path / "C", "C", 3)
    assert find_labels(tmp_path) is None and len(scan(tmp_path, 3).cases) == 1
    with pytest.raises(ValueError, match=r"labels\.csv"):
        load_cohort(tmp_path, spatial_dims=3)
