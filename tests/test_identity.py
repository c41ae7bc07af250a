# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import multiprocessing
import os
import stat
import uuid
from pathlib import Path

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from monai_salm.io.base import RefusedError
from monai_salm.release.identity import (
    KEPT_UID_KEYWORDS,
    UidMap,
    is_mapped_uid_tag,
    load_or_create_key,
    patient_in,
    pseudonym,
)

KEY = bytes(range(32))
UIDS = st.from_regex(r"[0-2](\.(0|[1-9][0-9]{0,8})){2,6}", fullmatch=True)


def reparsed(dataset: Dataset, syntax: str = ExplicitVRLittleEndian) -> Dataset:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return pydicom.dcmread(io.BytesIO(buffer.getvalue()))


@given(UIDS)
def test_mapped_uid_is_a_valid_uuid_uid_of_version_8(uid: str) -> None:
    mapped = UidMap(KEY)(uid)
    assert mapped.startswith("2.25.") and len(mapped) <= 64 and pydicom.uid.UID(mapped).is_valid
    shaped = uuid.UUID(int=int(mapped[5:]))
    assert shaped.version == 8 and shaped.variant == uuid.RFC_4122


@given(UIDS, UIDS)
def test_map_is_stateless_injective_and_keyed(first: str, second: str) -> None:
    assert UidMap(KEY)(first) == UidMap(KEY)(first + " ") == UidMap(bytes(KEY))(first + "\0")
    assert (UidMap(KEY)(first) == UidMap(KEY)(second)) == (first == second)
    assert UidMap(KEY)(first) != UidMap(KEY[::-1])(first)


def test_map_does_not_show_its_key_and_refuses_a_short_one() -> None:
    assert KEY.hex() not in repr(UidMap(KEY)) and repr(KEY) not in repr(UidMap(KEY))
    with pytest.raises(ValueError, match="4 bytes"):
        UidMap(b"abcd")


def test_kept_keywords_are_uid_elements_and_cover_every_class_and_syntax() -> None:
    assert {dictionary_VR(tag_for_keyword(keyword)) for keyword in KEPT_UID_KEYWORDS} == {"UI"}
    from pydicom._dicom_dict import DicomDictionary

    every = {entry[4] for entry in DicomDictionary.values() if entry[0] == "UI"}
    suspects = {key for key in every if "Class" in key or "TransferSyntax" in key or "CodingScheme" in key}
    assert suspects <= KEPT_UID_KEYWORDS
    assert {"SOPInstanceUID", "FrameOfReferenceUID", "DeviceUID", "TrackingUID"} <= {
        key for key in every if is_mapped_uid_tag(key)
    }
    assert is_mapped_uid_tag(0x00091010) and not is_mapped_uid_tag(0x00080016)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_every_nested_instance_uid_is_mapped_item_by_item(syntax: str) -> None:
    leaf = Dataset()
    leaf.ReferencedSOPClassUID, leaf.ReferencedSOPInstanceUID = CTImageStorage, "1.2.3.4"
    middle = Dataset()
    middle.ReferencedImageSequence = Sequence([leaf])
    middle.StudyInstanceUID = "1.2.3"
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, "1.2.3.4"
    dataset.FailedSOPInstanceUIDList = ["1.2.3.4", "1.2.840.10008.1.4.1.1", "1.2.3.5"]
    dataset.FrameOfReferenceUID = "1.2.840.10008.1.4.1.1"
    dataset.InstanceCreatorUID, dataset.StorageMediaFileSetUID = "1.2.9", "1.2.8"
    dataset.ReferencedStudySequence = Sequence([middle])
    dataset = reparsed(dataset, syntax)
    uids = UidMap(KEY)
    uids.map_dataset(dataset)
    dataset = reparsed(dataset, syntax)
    assert dataset.SOPInstanceUID == uids("1.2.3.4")
    assert dataset.FailedSOPInstanceUIDList == [uids("1.2.3.4"), "1.2.840.10008.1.4.1.1", uids("1.2.3.5")]
    assert dataset.FrameOfReferenceUID == "1.2.840.10008.1.4.1.1" and dataset.SOPClassUID == CTImageStorage
    assert dataset.InstanceCreatorUID == "1.2.9" and dataset.StorageMediaFileSetUID == "1.2.8"
    nested = dataset.ReferencedStudySequence[0]
    assert nested.StudyInstanceUID == uids("1.2.3")
    assert nested.ReferencedImageSequence[0].ReferencedSOPInstanceUID == uids("1.2.3.4")
    assert nested.ReferencedImageSequence[0].ReferencedSOPClassUID == CTImageStorage


def test_uid_in_an_element_of_unknown_type_is_mapped() -> None:
    dataset = Dataset()
    dataset.add_new(0x0020000E, "UN", b"1.2.3.40")
    dataset.add_new(0x00091010, "UI", "1.2.3.5")
    dataset = reparsed(dataset)
    UidMap(KEY).map_dataset(dataset)
    assert dataset.SeriesInstanceUID == UidMap(KEY)("1.2.3.40")
    assert dataset[0x00091010].value == UidMap(KEY)("1.2.3.5")


def test_other_elements_are_not_even_decoded() -> None:
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    UidMap(KEY).map_dataset(dataset)
    assert dataset.get_item("PatientName").is_raw and dataset.get_item("PixelSpacing").is_raw


def test_sequences_nested_without_end_are_refused() -> None:
    dataset = Dataset()
    for _ in range(40):
        outer = Dataset()
        outer.ReferencedStudySequence = Sequence([dataset])
        dataset = outer
    with pytest.raises(RefusedError, match="nested_too_deep"):
        UidMap(KEY).map_dataset(reparsed(dataset))


def test_key_is_created_once_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "release.key"
    previous = os.umask(0)
    try:
        key = load_or_create_key(path)
    finally:
        os.umask(previous)
    assert len(key) == 32 and load_or_create_key(path) == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and [*tmp_path.iterdir()] == [path]
    assert load_or_create_key(tmp_path / "other.key") != key


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_key_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "release.key"
    load_or_create_key(path)
    path.chmod(mode)
    with pytest.raises(PermissionError, match="chmod 600"):
        load_or_create_key(path)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_key_of_another_length_is_refused_and_kept(tmp_path: Path, size: int) -> None:
    path = tmp_path / "release.key"
    path.write_bytes(bytes(size))
    path.chmod(0o600)
    with pytest.raises(ValueError, match="instead of 32"):
        load_or_create_key(path)
    assert path.stat().st_size == size


def test_key_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises((ValueError, OSError)):
            load_or_create_key(path)


def test_processes_that_start_together_agree_on_the_key(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        keys = pool.map(load_or_create_key, [tmp_path / "release.key"] * 16)
    assert len(set(keys)) == 1 and len([*tmp_path.iterdir()]) == 1


def test_pseudonym_is_stable_and_says_nothing() -> None:
    assert pseudonym("1.2.3") == "case-c47f5b18b8a430e6" != pseudonym("1.2.4")


@pytest.mark.parametrize(
    "names",
    [
        "sub-01/anat/a.nii, sub-01_T1w.nii, x/sub-01_ses-2_T2w.nii, sub-01.nii",
        "sub-abby/ses-1/anat/sub-abby_ses-1_T1w.nii, sub-abby/ses-2/anat/sub-abby_ses-2_T2w.nii",
        "patient001/patient001_frame01.nii, patient001/patient001_frame12.nii",
        "patient00001/study1/view1_frontal.png, patient00001/study2/view1_lateral.png",
        "benign/patient_7/1.png, benign/patient_7/2.png, t1/patient_7.png, site1_patient_7_slice_3.png",
        "PT_CT_000/1.png, PT_CT_000/2.png, PT_CT_000_slice_3.png",
        "PAT003/c.nii, pat003_2.nii",
        "pt-12_a.png, pt-12_b.png",
        "site1_pt012_1.png, site1_pt012_2.png",
        "Patient (12)/im1.png, Patient (12)/im2.png",
        "patient_A/1.png, patient_A_slice_2.png",
        "patients/001/a.png, patients/001/b.png",
        "sub-HC_001_T1.nii, sub-HC_001_T2.nii",
        "patient_T1_07.nii, patient_T1_07_2.nii",
        "patient_AB_slice_1.png, patient_AB_slice_2.png, patient_AB image_3.png",
        "sub-ABC_T1w.nii, sub-ABC_task-rest_bold.nii.gz",
    ],
)
def test_files_of_one_patient_are_known_as_that(names):
    (found,) = {patient_in(name) for name in names.split(", ")}
    assert found


@pytest.mark.parametrize(
    "names",
    [
        "PT_CT_000.nii, PT_CT_001.nii",
        "PT_001_0000.nii, PT_002_0000.nii",
        "patient_HC_001.nii, patient_HC_002.nii, patient_AD_001.nii",
        "sub-HC_001.nii, sub-HC_002.nii",
        "patient_A.png, patient_B.png",
        "patient_T1_07.nii, patient_T1_08.nii",
        "patient_slice_1.png, patient_slice_2.png",
        "patient_data_image_1.png, patient_data_image_2.png",
        "patient_AB_slice_1.png, patient_CD_slice_1.png",
        "patients/001/a.png, patients/002/a.png",
        "Patient (1)/a.png, Patient (2)/a.png",
    ],
)
def test_different_patients_are_told_apart(names):
    """Of names in which a word stands between ``patient`` and the number, too."""
    found = [patient_in(name) for name in names.split(", ")]
    assert all(found) and len(set(found)) == len(found)


@pytest.mark.parametrize(
    "name",
    ["MDA-001__PT.nii", "MDA-001_PT_0000.nii", "pathology_1.nii", "subset_1/a.png", "patient_scans/case_1.nii", "a.nii"]
    + ["patients/ct_01.png", "patients/train/a.png", "impatient_1.png"],
)
def test_what_names_no_patient_is_none(name):
    assert patient_in(name) == ""
