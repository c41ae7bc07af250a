# SPDX-License-Identifier: Apache-2.0
"""What a scan finds, and what it refuses and why."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from exports import write_nifti, write_npz, write_series
from pydicom import dcmread
from pydicom.data import get_testdata_file

from monai_salm.io import formats
from monai_salm.perturbations.budget import Budget
from monai_salm.release.catalog import Catalog, scan
from monai_salm.release.labels import find_labels

DATA = Path(os.environ.get("MONAI_SALM_DATA", ""))
needs_data = pytest.mark.skipif("MONAI_SALM_DATA" not in os.environ, reason="MONAI_SALM_DATA is not set")


def reasons(catalog: Catalog) -> dict[str, int]:
    return dict(Counter(refusal.reason for refusal in catalog.refusals))


def test_files_are_known_by_content_and_not_by_ending(tmp_path):
    write_series(tmp_path / "A", "one")
    write_nifti(tmp_path / "b.nii.gz").rename(tmp_path / "b.bin")
    write_npz(tmp_path / "c.npz", (8, 8, 8)).rename(tmp_path / "c.dcm")
    (tmp_path / "note.nii").write_text("not an image")
    (tmp_path / "labels.csv").write_text("case,label\n")
    (tmp_path / "DICOMDIR").write_bytes(b"index")
    catalog = scan(tmp_path, 3)
    assert Counter(case.format for case in catalog.cases) == {"dicom": 1, "nifti": 1, "npz": 16}
    assert reasons(catalog) == {"unknown_file": 1}
    assert catalog == scan(tmp_path, 3), "two scans of one export differ"
    assert all(case.sample_id.startswith("case-") and len(case.sample_id) == 21 for case in catalog.cases)
    assert len({case.sample_id for case in catalog.cases}) == len(catalog.cases)


@pytest.mark.parametrize("form", ["zip", "tar", "gztar"])
def test_an_archive_of_files_is_to_be_unpacked_first(tmp_path, form):
    write_nifti(tmp_path / "files" / "a.nii")
    write_nifti(tmp_path / "in" / "b.nii")
    archive = shutil.make_archive(str(tmp_path / "in" / "all"), form, tmp_path / "files")
    (refusal,) = scan(tmp_path / "in", 3).refusals
    assert refusal.reason == "unknown_file" and "unpack it first" in refusal.detail
    with pytest.raises(ValueError, match="unpack it first"):
        scan(archive, 3)


def test_a_refusal_names_nothing_personal(tmp_path):
    write_nifti(tmp_path / "ok.nii")
    (tmp_path / "Jane_Doe.txt").write_text("hello")
    catalog = scan(tmp_path, 3)
    assert "Jane" not in repr(catalog.refusals) and "Jane" not in repr(catalog).replace(repr(catalog.root), "")
    assert catalog.refused_names == {catalog.refusals[0].name: ("Jane_Doe.txt",)}


def test_slices_of_a_series_become_one_volume_in_spatial_order(tmp_path):
    paths = write_series(tmp_path / "A", "one", 5)
    (case,) = scan(tmp_path, 3).cases
    assert case.files == tuple(paths) and case.files != tuple(sorted(paths))
    header = dcmread(paths[0])
    assert {"A", "A/IM50", str(header.SeriesInstanceUID), str(header.StudyInstanceUID)} <= set(case.names)
    assert formats.read(case, 3).stored.shape == (1, 16, 16, 5)


def test_each_slice_is_a_case_in_2d(tmp_path):
    paths = write_series(tmp_path / "A", "one", 3)
    cases = scan(tmp_path, 2).cases
    assert [case.files for case in cases] == [(path,) for path in sorted(paths)]
    assert len({case.group for case in cases}) == 1


def test_mixed_series_in_one_folder_are_told_apart(tmp_path):
    write_series(tmp_path / "A", "one", 3, prefix="x")
    write_series(tmp_path / "A", "two", 4, prefix="y")
    cases = scan(tmp_path, 3).cases
    assert sorted(len(case.files) for case in cases) == [3, 4]
    assert all("A" not in case.names for case in cases), "a folder of two series names neither"


def test_a_series_across_folders_is_one_volume(tmp_path):
    paths = write_series(tmp_path / "A", "one", 4)
    (tmp_path / "B").mkdir()
    paths[1].rename(tmp_path / "B" / paths[1].name)
    (case,) = scan(tmp_path, 3).cases
    assert len(case.files) == 4 and {"A", "B"} <= set(case.names)


def test_one_truncated_slice_refuses_its_whole_series_and_no_other(tmp_path):
    broken, _ = write_series(tmp_path / "A", "one", 4), write_series(tmp_path / "B", "two", 4)
    broken[2].write_bytes(broken[2].read_bytes()[:-300])
    catalog = scan(tmp_path, 3)
    assert [case.files[0].parent.name for case in catalog.cases] == ["B"]
    assert len(catalog.refusals) == 1
    assert len(scan(tmp_path, 2).cases) == 7, "in 2D only the broken slice is lost"


def test_an_end_slice_without_a_header_that_can_be_read_refuses_its_series(tmp_path):
    paths, _ = write_series(tmp_path / "A", "one", 4), write_series(tmp_path / "B", "two", 4)
    paths[-1].write_bytes(paths[-1].read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.7\0", 1))
    catalog = scan(tmp_path, 3)
    assert [case.files[0].parent.name for case in catalog.cases] == ["B"], "not a shorter volume"
    assert reasons(catalog) == {"unsupported_transfer_syntax": 2}, "the file, and its series"


def test_a_missing_slice_refuses_its_series(tmp_path):
    gap, _ = write_series(tmp_path / "A", "one", 5), write_series(tmp_path / "B", "two", 5)
    gap[2].unlink()
    assert reasons(scan(tmp_path, 3)) == {"irregular_spacing": 1}


def test_a_broken_dicom_among_good_ones_is_listed(tmp_path):
    paths = write_series(tmp_path / "A", "one", 4)
    (tmp_path / "A" / "IM98").write_bytes(paths[0].read_bytes()[:200])
    catalog = scan(tmp_path, 3)
    assert len(catalog.cases) == 1 and len(catalog.refusals) == 1


def test_two_files_with_one_instance_uid_are_both_refused(tmp_path):
    paths = write_series(tmp_path / "A", "one", 3)
    shutil.copy(paths[0], tmp_path / "A" / "copy")
    catalog = scan(tmp_path, 2)
    assert len(catalog.cases) == 2 and reasons(catalog) == {"duplicate_uid": 2}
    with pytest.raises(ValueError, match="duplicate_uid"):
        scan(tmp_path, 3)


def test_constant_and_empty_images_are_refused(tmp_path):
    import nibabel as nib

    write_nifti(tmp_path / "ok.nii")
    for name, voxels in {"flat": np.zeros((4, 4, 4), np.int16), "nan": np.full((4, 4, 4), np.nan, np.float32)}.items():
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / f"{name}.nii")
    assert reasons(scan(tmp_path, 3)) == {"constant_image": 1, "no_window": 1}
    assert reasons(scan(tmp_path, 3, check_pixels=False)) == {}


def test_an_image_outside_the_window_is_refused(tmp_path):
    write_nifti(tmp_path / "ok.nii")
    with pytest.raises(ValueError, match="nothing_to_move"):
        scan(tmp_path, 3, window=(5000.0, 6000.0))


def test_an_image_too_coarse_for_the_budget_is_refused_and_the_others_stay(tmp_path):
    import nibabel as nib

    write_nifti(tmp_path / "fine.nii.gz")
    steps = np.arange(210, dtype=np.int16).reshape(6, 7, 5) % 3  # a window of two stored steps
    nib.save(nib.Nifti1Image(steps, np.eye(4)), tmp_path / "coarse.nii.gz")
    catalog = scan(tmp_path, 3, budget=Budget.parse("8/255"))
    assert [case.names for case in catalog.cases] == [("fine.nii.gz",)]
    assert reasons(catalog) == {"budget": 1}
    assert "below one stored step" in catalog.refusals[0].detail


def test_an_image_that_the_budget_is_not_meant_for_is_refused_and_the_others_stay(tmp_path):
    write_series(tmp_path / "a", "A")
    shutil.copy(get_testdata_file("MR_small.dcm", download=False), tmp_path)
    catalog = scan(tmp_path, 2, budget=Budget.parse("ct-body"))
    assert len(catalog.cases) == 4 and reasons(catalog) == {"budget": 1}
    assert "is for CT, and an image is MR" in catalog.refusals[0].detail


def test_names_that_are_not_utf_8_are_names_too(tmp_path):
    write_nifti(tmp_path / "good.nii")
    (tmp_path / os.fsdecode(b"M\xfcller.txt")).write_text("no image")
    shutil.copy(tmp_path / "good.nii", tmp_path / os.fsdecode(b"M\xfcller.nii"))  # the copy would keep the name
    catalog = scan(tmp_path, 3)
    assert len(catalog.cases) == 1 and reasons(catalog) == {"unknown_file": 1, "file_name": 1}


def test_a_folder_that_cannot_be_opened_is_refused_and_the_others_stay(tmp_path, monkeypatch):
    write_nifti(tmp_path / "good.nii")
    (tmp_path / "closed").mkdir()
    opened = os.scandir

    def scandir(path):
        if Path(path).name == "closed":  # the tests may run as root, who can open everything
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path)

    monkeypatch.setattr(os, "scandir", scandir)
    catalog = scan(tmp_path, 3)
    assert len(catalog.cases) == 1 and reasons(catalog) == {"unreadable_file": 1}
    assert "Permission denied" in catalog.refusals[0].detail and "closed" not in catalog.refusals[0].detail


def test_a_file_that_cannot_be_read_is_refused_by_that_name(tmp_path, monkeypatch):
    write_series(tmp_path / "a", "a")
    closed, opened = write_series(tmp_path / "b", "b")[0], Path.open

    def open_(self, *arguments, **options):
        if self == closed:  # the tests may run as root, who can open everything
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_)
    catalog = scan(tmp_path, 2)
    assert reasons(catalog) == {"unreadable_file": 1} and len(catalog.cases) == 7
    assert find_labels(tmp_path) is None, "whoever looks for other labels goes on"


def test_what_macos_leaves_behind_is_no_image_and_no_refusal(tmp_path):
    write_nifti(tmp_path / "good.nii.gz")
    (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1" + bytes(200))
    (tmp_path / "desktop.ini").write_text("[.ShellClassInfo]")
    (tmp_path / "._good.nii.gz").write_bytes(b"\x00\x05\x16\x07" + bytes(200))
    catalog = scan(tmp_path, 3)
    assert len(catalog.cases) == 1 and not catalog.refusals


def test_an_archive_is_refused_as_a_whole(tmp_path):
    write_nifti(tmp_path / "ok.nii", shape=(9, 9))
    path = write_npz(tmp_path / "a.npz")
    content = dict(np.load(path))
    content["train_images"][3] = 255
    np.savez(path, **content)
    assert len(scan(tmp_path, 2).cases) == 17, "a constant uint8 image of an archive can be protected"
    catalog = scan(tmp_path, 2, window=(0.0, 250.0))
    assert [case.format for case in catalog.cases] == ["nifti"] and reasons(catalog) == {"nothing_to_move": 1}


def test_links_and_pipes_are_never_followed(tmp_path):
    outside = write_nifti(tmp_path / "outside" / "a.nii")
    export = tmp_path / "export"
    write_nifti(export / "b.nii", 1)
    (export / "link.nii").symlink_to(outside)
    (export / "folder").symlink_to(outside.parent)
    os.mkfifo(export / "pipe")
    catalog = scan(export, 3)
    assert len(catalog.cases) == 1 and reasons(catalog) == {"not_a_file": 3}


def test_patients_of_nifti_files_follow_from_their_paths(tmp_path):
    names = ["sub-01/anat/a.nii", "sub-01/anat/b.nii", "x/sub-02_T1w.nii", "PAT003/c.nii", "c1.nii", "pathology_1.nii"]
    for index, name in enumerate([*names, "pathology_2.nii"]):
        write_nifti(tmp_path / name, index)
    groups = {case.names[0]: case.group for case in scan(tmp_path, 3).cases}
    assert groups["sub-01/anat/a.nii"] == groups["sub-01/anat/b.nii"]
    assert len(set(groups.values())) == len(groups) - 1


def test_one_file_can_be_the_export(tmp_path):
    catalog = scan(write_npz(tmp_path / "a.npz"), 2)
    assert len(catalog.cases) == 16 and catalog.cases[9].names == ("a.npz/val/1", "val/1")
    assert len(scan(write_nifti(tmp_path / "b.nii"), 3).cases) == 1


@pytest.mark.parametrize("kind", ["missing", "empty", "unusable"])
def test_an_export_with_nothing_to_protect_is_an_error_that_says_why(tmp_path, kind):
    if kind == "unusable":
        (tmp_path / "readme.txt").write_text("hello")
    text = {"missing": "does not exist", "empty": "is empty", "unusable": "1 unknown_file"}[kind]
    with pytest.raises(ValueError, match=text):
        scan(tmp_path / "nowhere" if kind == "missing" else tmp_path, 3)


def test_pydicoms_own_export_is_read(tmp_path):
    shutil.copytree(Path(get_testdata_file("dicomdirtests/DICOMDIR", download=False)).parent, tmp_path / "export")
    catalog = scan(tmp_path / "export", 2)
    found = reasons(catalog)
    assert len(catalog.cases) == 29 and found["missing_pixel_data"] == 50 and "no_series" not in found


@pytest.mark.data
@needs_data
def test_real_data_is_catalogued(capsys):
    (series,) = scan(DATA / "dicom_series", 3, check_pixels=False).cases
    assert len(series.files) == 130
    volumes = scan(DATA / "Task04_Hippocampus" / "imagesTr", 3).cases
    assert len(volumes) == 130 and len({case.group for case in volumes}) == 130
    awkward = scan(DATA / "dicom_awkward", 2)
    assert len(awkward.cases) > 5 and len(awkward.refusals) > 5
    assert not {"unreadable_pixels"} & reasons(awkward).keys()
    assert len(scan(DATA / "pneumoniamnist.npz", 2).cases) == 5856


def test_an_export_may_be_one_dicom_file(tmp_path):
    (path,) = write_series(tmp_path / "A", "A", 1)
    (case,) = scan(path, 2).cases
    assert case.files == (path,) and case.names[0] == path.name
