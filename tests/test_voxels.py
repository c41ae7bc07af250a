# SPDX-License-Identifier: Apache-2.0
"""Cohorts with voxel labels: Decathlon folders, and who is held out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from exports import class_map, write_decathlon, write_label, write_labels, write_nifti
from hypothesis import given, settings
from hypothesis import strategies as st
from voxel_exports import SHAPE, edit_dataset, names, reasons

from monai_salm.io.base import Case, Mask
from monai_salm.io.masks import read_mask
from monai_salm.release.catalog import Catalog
from monai_salm.release.labels import count_classes, find_labels, label_cases, load_cohort
from monai_salm.release.voxels import VoxelLabels


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
