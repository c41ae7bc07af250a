# SPDX-License-Identifier: Apache-2.0
"""Cohorts with voxel labels: DICOM SEG files and the series that they refer to."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from exports import SIZE, edit_dicom, write_labels, write_segmentation, write_series
from pydicom import dcmread
from voxel_exports import move_last_frame, name_only_the_series, reasons, write_one_for_two_series, write_segmented

from monai_salm.release.catalog import scan
from monai_salm.release.labels import count_classes, find_labels, load_cohort


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


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_segmentation_that_names_only_its_series_counts_as_any_other(tmp_path, spatial_dims):
    write_segmented(tmp_path)
    for patient in "AB":
        edit_dicom(tmp_path / patient / "seg", name_only_the_series)
    cohort = load_cohort(tmp_path, spatial_dims=spatial_dims)
    assert cohort.classes == ("background", "Liver", "Tumor") and not cohort.refusals
    assert len(cohort.cases) == (8 if spatial_dims == 2 else 2)


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
