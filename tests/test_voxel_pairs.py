# SPDX-License-Identifier: Apache-2.0
"""Cohorts with voxel labels: pairs in a table, and label files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from exports import class_map, write_decathlon, write_label, write_labels, write_nifti
from voxel_exports import SHAPE, names, reasons, write_pairs

from monai_salm.io.masks import read_mask
from monai_salm.release.catalog import scan
from monai_salm.release.labels import count_classes, find_labels, load_cohort


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


def test_images_that_share_a_label_file_with_a_tested_one_are_refused(tmp_path):
    rows = write_pairs(tmp_path, 4)
    rows[1] = "images/v1.nii.gz,masks/m0.nii.gz"
    (tmp_path / "masks" / "m1.nii.gz").unlink()
    write_labels(tmp_path, [f"{row},{'test' if index == 0 else 'train'}" for index, row in enumerate(rows)], "mask")
    (refusal,) = load_cohort(tmp_path, spatial_dims=3).refusals
    assert refusal.reason == "mask_shared_with_unreleased"
    assert refusal.detail.startswith("the label file also labels an image that is not released; release all")
