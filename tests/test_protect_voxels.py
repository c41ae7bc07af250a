# SPDX-License-Identifier: Apache-2.0
"""Voxel labels in a release: never perturbed, all or nothing with their images, and they fit the protected ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pytest
from exports import class_map, edit_dicom, write_decathlon, write_label, write_labels
from pydicom import dcmread
from test_protect import bank_of, protect, tree
from voxel_exports import SHAPE, write_one_for_two_series, write_pairs, write_segmented

from monai_salm.io import dicom, formats, masks
from monai_salm.io.base import Case, RefusedError
from monai_salm.io.masks import read_mask
from monai_salm.release import commit as door
from monai_salm.release.custody import read_refusals
from monai_salm.release.labels import Cohort, load_cohort
from monai_salm.release.manifest import IntegrityError, read_manifest
from monai_salm.release.protect import read_protected


@pytest.fixture(autouse=True)
def _fixed_time(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


def decathlon(root: Path, count: int = 4, splits: str = "") -> Cohort:
    """Splits by first letter."""
    write_decathlon(root, count)
    if splits:
        named = {"t": "train", "v": "val", "x": "test"}
        rows = [f"imagesTr/v0{index}.nii.gz,,{named[letter]}" for index, letter in enumerate(splits)]
        write_labels(root, rows, "mask")
    return load_cohort(root, spatial_dims=3)


def check_twins(cohort: Cohort, out: Path, spatial_dims: int) -> dict[str, Case]:
    """Twins have the labels of their originals, and images that moved by the bank."""
    twins = read_protected(cohort, out)
    bank = bank_of(cohort, spatial_dims)
    for case in cohort.released:
        twin = twins[case.sample_id]
        assert twin.mask.file.is_relative_to(out / "protected") and twin.mask.values == case.mask.values
        np.testing.assert_array_equal(read_mask(twin, spatial_dims), read_mask(case, spatial_dims))
        before, after = formats.read(case, spatial_dims), formats.read(twin, spatial_dims)
        np.testing.assert_array_equal(after.stored, before.stored + bank[case.sample_id])
        assert after.spacing == before.spacing
    return twins


def test_label_files_are_copied_as_they_are_and_only_for_what_is_released(tmp_path):
    cohort = decathlon(tmp_path / "in", 4, "ttvx")
    out = tmp_path / "out"
    rows = protect(cohort, bank_of(cohort), out)
    assert [row.file for row in rows] == [
        f"{folder}/v0{index}.nii.gz" for index in range(3) for folder in ("imagesTr", "labelsTr")
    ] + ["labels.csv", "dataset.json"]
    assert rows == read_manifest(out)
    for row in rows[:-2]:
        same = (out / "protected" / row.file).read_bytes() == (tmp_path / "in" / row.file).read_bytes()
        assert same == row.file.startswith("labelsTr") == (row.levels == 0) == (row.changed == 0)
    assert (out / "protected" / "labels.csv").read_text().splitlines() == [
        "case,mask,split",
        "imagesTr/v00.nii.gz,labelsTr/v00.nii.gz,train",
        "imagesTr/v01.nii.gz,labelsTr/v01.nii.gz,train",
        "imagesTr/v02.nii.gz,labelsTr/v02.nii.gz,val",
    ]
    check_twins(cohort, out, 3)
    assert not read_refusals(out)


def test_the_released_dataset_json_lists_what_is_released(tmp_path):
    cohort = decathlon(tmp_path / "in", 4, "ttvx")
    path = tmp_path / "in" / "dataset.json"
    content = json.loads(path.read_text()) | {"test": ["./imagesTs/x.nii.gz"], "numTest": 1, "licence": "CC-BY é"}
    path.write_text(json.dumps(content))
    bank = bank_of(cohort)
    del bank[cohort.cases[1].sample_id]
    protect(cohort, bank, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "protected" / "dataset.json").read_text())
    assert list(found) == list(content)
    assert found == content | {
        "numTraining": 2,
        "numTest": 0,
        "training": [content["training"][index] for index in (0, 2)],
        "test": [],
    }
    assert [(each.name, each.reason) for each in read_refusals(tmp_path / "out")] == [
        (cohort.cases[1].sample_id, "no_perturbation")
    ]
    assert not (tmp_path / "out" / "protected" / "labelsTr" / "v01.nii.gz").exists()


def test_pairs_of_a_table_have_the_class_names_of_a_dataset_json_without_pairs(tmp_path):
    """As nnU-Net writes it."""
    root = write_decathlon(tmp_path / "in", 3)
    names = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "Core": 1, "Rim": 2}, "numTraining": 3}
    (root / "dataset.json").write_text(json.dumps(names))
    with pytest.raises(ValueError, match="lists no pair .* or in a table case,mask"):
        load_cohort(root, spatial_dims=3)
    write_labels(root, [f"imagesTr/v0{index}.nii.gz,labelsTr/v0{index}.nii.gz" for index in range(2)], "mask")
    cohort = load_cohort(root, spatial_dims=3)
    assert cohort.classes == ("background", "Core", "Rim") and len(cohort.cases) == 2
    protect(cohort, bank_of(cohort), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "protected" / "dataset.json").read_text())
    assert written == names | {"numTraining": 2}


def test_new_names_tell_nothing_of_the_old_ones_and_keep_the_pairs(tmp_path):
    cohort, out = decathlon(tmp_path / "in", 7, "tttttvx"), tmp_path / "out"
    table = tmp_path / "in" / "dataset.json"
    content = json.loads(table.read_text())
    content["training"][0]["patient"] = content["name"] = "v0, whose name is kept apart"
    content["unlabeled"] = ["./imagesTr/v09.nii.gz"]
    content["dataset"] = {"v00": "./imagesTr/v00.nii.gz"}
    content["modality"] = {"0": "MRI"}
    content["name"] = "Heads"
    table.write_text(json.dumps(content))
    rows = protect(cohort, bank_of(cohort), out, rename=True)
    assert not [row.file for row in rows if "v0" in row.file or "Tr" in row.file]
    assert [row.file.split("/")[0] for row in rows[:2]] == ["images", "labels"]
    for name in ("labels.csv", "dataset.json"):
        assert "v0" not in (out / "protected" / name).read_text()
    written = json.loads((out / "protected" / "dataset.json").read_text())
    images = [pair["image"] for pair in written["training"]]
    assert len(images) == 6 and images == sorted(images), "the order of the old names would tell"
    assert written["labels"] == content["labels"] and written["modality"] == {"0": "MRI"}
    check_twins(cohort, out, 3)
    again = load_cohort((out / "protected").rename(tmp_path / "shared"), spatial_dims=3)
    assert sorted(again.class_voxels.values()) == sorted(
        cohort.class_voxels[case.sample_id] for case in cohort.released
    )


def test_the_protected_folder_is_an_export_in_its_turn(tmp_path):
    cohort = decathlon(tmp_path / "in", 3)
    protect(cohort, bank_of(cohort), tmp_path / "out")
    with pytest.raises(ValueError, match="already_protected"):
        load_cohort(tmp_path / "out" / "protected", spatial_dims=3)
    again = load_cohort((tmp_path / "out" / "protected").rename(tmp_path / "shared"), spatial_dims=3)
    assert [case.sample_id for case in again.cases] == [case.sample_id for case in cohort.cases]
    assert again.class_voxels == cohort.class_voxels and not again.refusals


def test_pairs_without_dataset_json_are_released_with_a_table_only(tmp_path):
    write_labels(tmp_path / "in", write_pairs(tmp_path / "in"), "mask")
    cohort = load_cohort(tmp_path / "in", spatial_dims=3)
    protect(cohort, bank_of(cohort), tmp_path / "out")
    assert not (tmp_path / "out" / "protected" / "dataset.json").exists()
    check_twins(cohort, tmp_path / "out", 3)


def test_images_that_share_a_label_file_are_released_together(tmp_path):
    rows = write_pairs(tmp_path / "in", 3)
    rows[1] = "images/v1.nii.gz,masks/m0.nii.gz"
    (tmp_path / "in" / "masks" / "m1.nii.gz").unlink()
    write_labels(tmp_path / "in", rows, "mask")
    cohort = load_cohort(tmp_path / "in", spatial_dims=3)
    bank = bank_of(cohort)
    written = protect(cohort, bank, tmp_path / "out")
    assert [row.file for row in written] == [
        "images/v0.nii.gz",
        "images/v1.nii.gz",
        "masks/m0.nii.gz",
        "images/v2.nii.gz",
        "masks/m2.nii.gz",
        "labels.csv",
    ]
    check_twins(cohort, tmp_path / "out", 3)
    del bank[cohort.cases[1].sample_id]
    written = protect(cohort, bank, tmp_path / "fewer")
    assert [row.file for row in written] == ["images/v2.nii.gz", "masks/m2.nii.gz", "labels.csv"]
    assert {each.reason for each in read_refusals(tmp_path / "fewer")} == {"no_perturbation"}
    assert len(read_refusals(tmp_path / "fewer")) == 2


@pytest.mark.parametrize("what", ["image", "label", "extra", "json"])
def test_the_sweep_finds_what_was_changed(tmp_path, what):
    cohort = decathlon(tmp_path / "in", 3)
    out = tmp_path / "out"
    protect(cohort, bank_of(cohort), out)
    names = {"image": "imagesTr/v00.nii.gz", "label": "labelsTr/v01.nii.gz", "json": "dataset.json", "extra": "l.nii"}
    path = out / "protected" / names[what]
    path.write_bytes((path.read_bytes() if path.exists() else b"") + b"x")
    with pytest.raises(IntegrityError):
        read_protected(cohort, out)


def test_a_second_run_writes_nothing_anew_and_repairs_a_lost_label(tmp_path):
    cohort = decathlon(tmp_path / "in", 3)
    out = tmp_path / "out"
    rows = protect(cohort, bank_of(cohort), out)
    files = sorted((out / "protected").rglob("*.nii.gz"))
    before, digests = [path.stat().st_mtime_ns for path in files], tree(out)
    assert protect(cohort, bank_of(cohort), out) == rows
    assert [path.stat().st_mtime_ns for path in files] == before and tree(out) == digests
    (out / "protected" / "labelsTr" / "v01.nii.gz").unlink()
    (out / "protected" / "dataset.json").unlink()
    assert protect(cohort, bank_of(cohort), out) == rows and tree(out) == digests


def test_another_label_for_the_same_folder_is_an_error(tmp_path):
    cohort = decathlon(tmp_path / "in", 3)
    protect(cohort, bank_of(cohort), tmp_path / "out")
    write_label(tmp_path / "in" / "labelsTr" / "v01.nii.gz", class_map(SHAPE, 99))
    with pytest.raises(ValueError, match="choose a new output folder"):
        protect(cohort, bank_of(cohort), tmp_path / "out")


def test_an_image_is_not_written_without_its_label(tmp_path, monkeypatch):
    cohort = decathlon(tmp_path / "in", 3)
    bad, real = cohort.cases[1].mask.file, masks.verify.__wrapped__

    def verify(unit: Any, images: Any, written: Path, spatial_dims: int) -> Any:
        if unit[0].mask.file == bad:
            written.write_bytes(b"other")
        return real(unit, images, written, spatial_dims)

    monkeypatch.setattr(masks, "verify", verify)
    rows = protect(cohort, bank_of(cohort), tmp_path / "out")
    assert not [row for row in rows if "v01" in row.file] and len(rows) == 6
    assert [each.reason for each in read_refusals(tmp_path / "out")] == ["verification_failed"]
    assert len(list((tmp_path / "out" / "protected").rglob("*.nii.gz"))) == 4


SLOW_RUN = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_protect import bank_of, load_cohort, protect
replace = os.replace
def slow(source, target):
    replace(source, target)
    time.sleep(0.05)
os.replace = slow
cohort = load_cohort({root!r}, spatial_dims={dims})
protect(cohort, bank_of(cohort, {dims}), Path({out!r}), {dims}, key_file={key!r})
"""


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path, spatial_dims):
    write_segmented(tmp_path / "in", "ABC")
    cohort, key = load_cohort(tmp_path / "in", spatial_dims=spatial_dims), str(tmp_path / "release.key")
    bank = bank_of(cohort, spatial_dims)
    whole = protect(cohort, bank, tmp_path / "whole", spatial_dims, key_file=key)
    assert len(whole) == 16
    out = tmp_path / "killed"
    places = {"tests": str(Path(__file__).parent), "root": str(tmp_path / "in"), "out": str(out), "key": key}
    code = SLOW_RUN.format(**places, dims=spatial_dims)
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)]) as process:
        deadline = time.monotonic() + 60
        while len(read_manifest(out)) < 5 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.12)  # into the moving of the second series
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert 5 <= len(read_manifest(out)) < 15
    assert protect(cohort, bank, out, spatial_dims, key_file=key) == whole
    assert tree(out) == tree(tmp_path / "whole")


# --------------------------------------------------------------------------- SEG


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_segmentations_refer_to_the_protected_images(tmp_path, spatial_dims):
    write_segmented(tmp_path / "in")
    cohort = load_cohort(tmp_path / "in", spatial_dims=spatial_dims)
    out = tmp_path / "out"
    rows = protect(cohort, bank_of(cohort, spatial_dims), out, spatial_dims)
    assert len(rows) == 11 and sum(row.state == "label" for row in rows) == 2, "one segmentation per series"
    twins = check_twins(cohort, out, spatial_dims)
    for case in cohort.cases:
        twin = twins[case.sample_id]
        before, after = dcmread(case.mask.file), hd.seg.segread(twin.mask.file)
        image = dcmread(twin.files[0])
        assert before.PixelData == after.PixelData and not any(after.preamble)
        assert after.FrameOfReferenceUID == image.FrameOfReferenceUID != before.FrameOfReferenceUID
        assert after.StudyInstanceUID == image.StudyInstanceUID
        assert after.ReferencedSeriesSequence[0].SeriesInstanceUID == image.SeriesInstanceUID
        assert dicom.read_seg_header(twin.mask.file).instances == {
            dcmread(path).SOPInstanceUID
            for other in twins.values()
            if other.mask.file == twin.mask.file
            for path in other.files
        }
        by_uid = after.get_pixels_by_source_instance([image.SOPInstanceUID], combine_segments=True)
        if spatial_dims == 2:
            np.testing.assert_array_equal(by_uid, read_mask(case, 2))
    lines = (out / "protected" / "labels.csv").read_text().splitlines()
    assert lines[0] == "case,mask,split" and len(lines) == 1 + len(cohort.cases)
    for line in lines[1:]:
        name, mask, _ = line.split(",")
        assert (out / "protected" / name).exists() and (out / "protected" / mask).is_file()


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_two_series_leave_with_the_segmentation_of_both(tmp_path, spatial_dims):
    write_segmented(tmp_path / "in")
    write_one_for_two_series(tmp_path / "in", 0.4)
    cohort = load_cohort(tmp_path / "in", spatial_dims=spatial_dims)
    rows = protect(cohort, bank_of(cohort, spatial_dims), tmp_path / "out", spatial_dims)
    assert len(rows) == 20 and sum(row.state == "label" for row in rows) == 3
    check_twins(cohort, tmp_path / "out", spatial_dims)


def test_no_original_uid_is_left_in_a_segmentation(tmp_path):
    write_segmented(tmp_path / "in")
    cohort = load_cohort(tmp_path / "in", spatial_dims=3)
    protect(cohort, bank_of(cohort), tmp_path / "out")
    twins = read_protected(cohort, tmp_path / "out")
    for case in cohort.cases:
        content = twins[case.sample_id].mask.file.read_bytes()
        for path in (*case.files, case.mask.file):
            header = dcmread(path)
            for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"):
                assert str(header[keyword].value).encode() not in content


def test_a_hidden_preamble_does_not_leave_with_a_segmentation(tmp_path):
    write_segmented(tmp_path / "in", "AB")
    seg = tmp_path / "in" / "A" / "seg"
    seg.write_bytes(b"secret".ljust(128, b"\0") + seg.read_bytes()[128:])
    cohort = load_cohort(tmp_path / "in", spatial_dims=3)
    protect(cohort, bank_of(cohort), tmp_path / "out")
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "out" / "protected").rglob("*.dcm"))


def test_a_segmentation_leaves_with_all_of_its_slices_or_not_at_all(tmp_path):
    write_segmented(tmp_path / "in")
    cohort = load_cohort(tmp_path / "in", spatial_dims=2)
    bank = bank_of(cohort, 2)
    del bank[cohort.cases[1].sample_id]
    rows = protect(cohort, bank, tmp_path / "out", 2)
    assert len(rows) == 6 and len(read_refusals(tmp_path / "out")) == 4
    assert "one of 4 images that share a label file" in read_refusals(tmp_path / "out")[0].detail
    part = Cohort(cohort.cases[1:], cohort.classes, (), cohort.root)
    rows = protect(part, bank_of(part, 2), tmp_path / "part", 2)
    assert len(rows) == 6, "a cohort that was cut by hand must not write references to what is left out"
    assert {each.reason for each in read_refusals(tmp_path / "part")} == {"verification_failed"}


def change_pixels(dataset: Any) -> None:
    dataset.PixelData = bytes([dataset.PixelData[0] ^ 1]) + dataset.PixelData[1:]


def change_label(dataset: Any) -> None:
    dataset.SegmentSequence[0].SegmentLabel = "Spleen"


def change_reference(dataset: Any) -> None:
    reference = dataset.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0]
    reference.ReferencedSOPInstanceUID = "2.25.123"


def keep_series(dataset: Any) -> None:
    dataset.SeriesInstanceUID = "1.2.3"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_pixels, "changed, which is not declared"),
        (change_label, "changed, which is not declared"),
        (change_reference, "refers to 1 images"),
        (keep_series, "not declared"),
    ],
)
def test_a_segmentation_that_is_not_what_it_should_be_does_not_verify(tmp_path, change, words):
    write_segmented(tmp_path / "in", "AB")
    cohort = load_cohort(tmp_path / "in", spatial_dims=3)
    protect(cohort, bank_of(cohort), tmp_path / "out")
    case = cohort.cases[0]
    twin = read_protected(cohort, tmp_path / "out")[case.sample_id]
    images = dict(zip(case.files, twin.files, strict=True))
    masks.verify((case,), images, twin.mask.file, 3)
    edit_dicom(twin.mask.file, change)
    with pytest.raises(RefusedError, match=words) as error:
        masks.verify((case,), images, twin.mask.file, 3)
    assert error.value.reason == "verification_failed"


def test_what_is_written_is_closed_to_others(tmp_path):
    cohort = decathlon(tmp_path / "in", 3)
    protect(cohort, bank_of(cohort), tmp_path / "out")
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert not (tmp_path / "out" / door.STAGING).exists()


def test_real_hippocampi_are_protected(data_dir, tmp_path):
    source, root = data_dir / "Task04_Hippocampus", tmp_path / "in"
    content = json.loads((source / "dataset.json").read_text())
    content["training"] = content["training"][:6]
    for pair in content["training"]:
        for name in pair.values():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes((source / name).read_bytes())
    (root / "dataset.json").write_text(json.dumps(content))
    cohort = load_cohort(root, spatial_dims=3)
    rows = protect(cohort, bank_of(cohort), tmp_path / "out", budget="8/255")
    assert len(rows) == 14 and not read_refusals(tmp_path / "out")
    for case in cohort.cases:
        assert (tmp_path / "out" / "protected" / case.mask.name).read_bytes() == case.mask.file.read_bytes()
    assert os.listdir(tmp_path / "out" / "protected").count("dataset.json") == 1
