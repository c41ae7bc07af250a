# SPDX-License-Identifier: Apache-2.0
"""Enhanced CT and MR: all frames of one file are one volume, and a derived file says so of every frame."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
import torch
from dicom_files import (
    ORIENTATIONS,
    UIDS,
    WHEN,
    bundled,
    case_of,
    fitting_delta,
    parse,
    reason,
    rewritten,
    write_enhanced,
    write_mr_series,
)
from exports import write_segmentation
from pydicom import uid
from pydicom.dataset import Dataset

from monai_salm.io import dicom, dicom_seg_labels, formats
from monai_salm.io.base import Mask, RefusedError
from monai_salm.perturbations.budget import Budget
from monai_salm.release.catalog import scan

OPTIONS = {"spatial_dims": 3, "window": "auto", "uids": UIDS, "when": WHEN}
CT, MR = uid.EnhancedCTImageStorage, uid.EnhancedMRImageStorage


def protect(path: Path, levels: int = 3) -> tuple[bytes, np.ndarray]:
    delta = fitting_delta(dicom.read(case_of(path), 3), levels)
    ((_, content),) = dicom.protect(case_of(path), delta, **OPTIONS)
    return content, delta


def single_frames(path: Path, folder: Path) -> list[Path]:
    """The same volume as a series of single-frame files."""
    dataset = pydicom.dcmread(path)
    shared, paths = dataset.SharedFunctionalGroupsSequence[0], []
    for index, own in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        frame = pydicom.dcmread(bundled("MR_small.dcm"))
        frame.Rows, frame.Columns, frame.PixelData = 32, 36, dataset.pixel_array[index].tobytes()
        frame.SOPInstanceUID = f"1.2.3.{index + 1}"
        frame.ImageOrientationPatient = shared.PlaneOrientationSequence[0].ImageOrientationPatient
        frame.PixelSpacing = shared.PixelMeasuresSequence[0].PixelSpacing
        frame.ImagePositionPatient = own.PlanePositionSequence[0].ImagePositionPatient
        transformation = own.PixelValueTransformationSequence[0]
        frame.RescaleSlope, frame.RescaleIntercept = transformation.RescaleSlope, transformation.RescaleIntercept
        paths.append(folder / f"frame{index}.dcm")
        frame.save_as(paths[-1])
    return paths


def varying_slopes(dataset: Dataset) -> None:
    for index, own in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        own.PixelValueTransformationSequence[0].RescaleSlope = 0.5 + 0.25 * index


@pytest.mark.parametrize("change", [None, varying_slopes])
@pytest.mark.parametrize("name", ORIENTATIONS)
def test_frames_are_the_same_volume_as_their_single_slices(
    tmp_path: Path, name: str, change: Callable[[Dataset], None] | None
) -> None:
    path = write_enhanced(tmp_path / "enhanced.dcm", ORIENTATIONS[name], change)
    image = dicom.read(case_of(path), 3)
    expected = dicom.read(case_of(*single_frames(path, tmp_path)), 3)
    assert np.array_equal(image.stored, expected.stored)
    assert image.codec == expected.codec and image.spacing == expected.spacing
    assert (image.codec.slices is None) == (change is None)


@pytest.mark.parametrize(
    "syntax",
    [uid.ExplicitVRLittleEndian, uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000Lossless],
)
@pytest.mark.parametrize("sop_class", [CT, MR])
def test_every_frame_moves_as_delta_says_in_the_same_syntax(tmp_path: Path, syntax: str, sop_class: str) -> None:
    path = write_enhanced(tmp_path / "enhanced.dcm", sop_class=sop_class, syntax=syntax)
    content, delta = protect(path)
    before, after = pydicom.dcmread(path), parse(content)
    assert after.file_meta.TransferSyntaxUID == syntax and int(after.NumberOfFrames) == 5
    check = dicom.verify(path, content, 3)
    assert (check.changed, check.max_abs) == (int((delta != 0).sum()), 3)
    (tmp_path / "copy.dcm").write_bytes(content)
    written = dicom.read(case_of(tmp_path / "copy.dcm"), 3)
    assert np.array_equal(written.stored, dicom.read(case_of(path), 3).stored + delta)
    assert (np.abs(after.pixel_array.astype(int) - before.pixel_array) > 0).any(axis=(1, 2)).all()
    assert written.codec.unit == ("HU" if sop_class == CT else "a.u.")


def with_own_derivation(dataset: Dataset) -> None:
    for index, own in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        item = Dataset()
        item.DerivationDescription = f"frame {index}"
        own.DerivationImageSequence = [item] if index else []


def with_shared_type(dataset: Dataset) -> None:
    for own in dataset.PerFrameFunctionalGroupsSequence:
        types = own.MRImageFrameTypeSequence
        del own.MRImageFrameTypeSequence
    dataset.SharedFunctionalGroupsSequence[0].MRImageFrameTypeSequence = types


@pytest.mark.parametrize("change", [None, with_own_derivation, with_shared_type])
def test_derivation_stands_in_the_functional_groups(tmp_path: Path, change: Callable[[Dataset], None] | None) -> None:
    path = write_enhanced(tmp_path / "enhanced.dcm", change=change)
    content, _ = protect(path)
    after = parse(content)
    assert list(after.ImageType) == ["DERIVED", "PRIMARY", "VOLUME", "NONE"]
    assert after.ContentQualification == "RESEARCH"
    assert not {"SourceImageSequence", "DerivationCodeSequence", "DerivationDescription"} & set(after.dir())
    listed = after.SourceImageEvidenceSequence[-1].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    shared, frames = after.SharedFunctionalGroupsSequence[0], after.PerFrameFunctionalGroupsSequence
    for index, frame in enumerate(frames):
        types = (frame.get("MRImageFrameTypeSequence") or shared.get("MRImageFrameTypeSequence"))[0]
        assert list(types.FrameType) == ["DERIVED", "PRIMARY", "VOLUME", "NONE"]
        assert ("DerivationImageSequence" in frame) != ("DerivationImageSequence" in shared)
        items = frame.get("DerivationImageSequence") or shared.get("DerivationImageSequence")
        assert items[-1].DerivationCodeSequence[0].CodeValue == "113042"
        source = items[-1].SourceImageSequence[0]
        assert source.ReferencedSOPClassUID == MR and source.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
        assert source.ReferencedSOPInstanceUID == listed.ReferencedSOPInstanceUID
        assert source.ReferencedSOPInstanceUID not in (after.SOPInstanceUID, pydicom.dcmread(path).SOPInstanceUID)
        if change is with_own_derivation and index:
            assert items[0].DerivationDescription == f"frame {index}"


def one_frame_original(dataset: Dataset) -> None:
    dataset.PerFrameFunctionalGroupsSequence[3].MRImageFrameTypeSequence[0].FrameType[0] = "ORIGINAL"


def other_frame_type(dataset: Dataset) -> None:
    dataset.PerFrameFunctionalGroupsSequence[3].MRImageFrameTypeSequence[0].FrameType[3] = "OTHER"


def no_derivation(dataset: Dataset) -> None:
    del dataset.SharedFunctionalGroupsSequence[0].DerivationImageSequence


def moved_frame(dataset: Dataset) -> None:
    dataset.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence[0].ImagePositionPatient[2] += 1


def other_slope(dataset: Dataset) -> None:
    dataset.PerFrameFunctionalGroupsSequence[1].PixelValueTransformationSequence[0].RescaleSlope = 2


def frames_swapped(dataset: Dataset) -> None:
    dataset.PixelData = dataset.pixel_array[[1, 0, 2, 3, 4]].tobytes()


def one_voxel_too_far(dataset: Dataset) -> None:
    pixels = dataset.pixel_array.copy()
    pixels[4, 0, 0] += 9
    dataset.PixelData = pixels.tobytes()


@pytest.mark.parametrize(
    "change",
    [one_frame_original, other_frame_type, no_derivation, moved_frame, other_slope, frames_swapped, one_voxel_too_far],
)
def test_verification_finds_what_must_not_be(tmp_path: Path, change: Callable[[Dataset], None]) -> None:
    path = write_enhanced(tmp_path / "enhanced.dcm")
    content, _ = protect(path)
    dicom.verify(path, content, 3)
    assert reason(lambda: dicom.verify(path, rewritten(content, change), 3)) == "verification_failed"


def test_old_derivation_must_stay_as_it_was(tmp_path: Path) -> None:
    path = write_enhanced(tmp_path / "enhanced.dcm", change=with_own_derivation)
    content, _ = protect(path)

    def edit(dataset: Dataset) -> None:
        dataset.PerFrameFunctionalGroupsSequence[2].DerivationImageSequence[0].DerivationDescription = "other"

    assert reason(lambda: dicom.verify(path, rewritten(content, edit), 3)) == "verification_failed"


def test_each_frame_is_held_to_its_own_slope(tmp_path: Path) -> None:
    path = write_enhanced(tmp_path / "enhanced.dcm", change=varying_slopes)
    image = formats.read(case_of(path), 3)
    _, upper = image.codec.bounds(torch.from_numpy(image.stored), Budget.parse("3 physical"))
    ((_, content),) = dicom.protect(case_of(path), upper.numpy(), **OPTIONS)
    change = np.abs(parse(content).pixel_array.astype(int) - pydicom.dcmread(path).pixel_array).max(axis=(1, 2))
    assert change.tolist() == [6, 4, 3, 2, 2]  # floor(3 / slope)
    dicom.verify(path, content, 6, physical=3.0)
    far = rewritten(content, one_voxel_too_far)
    assert reason(lambda: dicom.verify(path, far, 60, physical=3.0)) == "verification_failed"


def edit_frame(index: int, macro: str, **attributes: object) -> Callable[[Dataset], None]:
    def change(dataset: Dataset) -> None:
        item = Dataset()
        for keyword, value in attributes.items():
            setattr(item, keyword, value)
        setattr(dataset.PerFrameFunctionalGroupsSequence[index], macro, [item])

    return change


def without_groups(dataset: Dataset) -> None:
    del dataset.PerFrameFunctionalGroupsSequence


def without_positions(dataset: Dataset) -> None:
    for own in dataset.PerFrameFunctionalGroupsSequence:
        del own.PlanePositionSequence


TURNED = edit_frame(2, "PlaneOrientationSequence", ImageOrientationPatient=[1, 0, 0, 0, 0, -1])


@pytest.mark.parametrize(
    ("refused", "change"),
    [
        ("mixed_geometry", TURNED),
        ("mixed_geometry", edit_frame(2, "PixelMeasuresSequence", PixelSpacing=[0.5, 0.8])),
        ("duplicate_position", edit_frame(2, "PlanePositionSequence", ImagePositionPatient=[10, -20, 30])),
        ("irregular_spacing", edit_frame(2, "PlanePositionSequence", ImagePositionPatient=[10, -20, 130])),
        ("invalid_rescale", edit_frame(2, "PixelValueTransformationSequence", RescaleSlope=0, RescaleIntercept=0)),
        ("varying_rescale", edit_frame(2, "PixelValueTransformationSequence", RescaleSlope=-1, RescaleIntercept=0)),
        ("invalid_geometry", without_groups),
        ("invalid_geometry", without_positions),
        ("invalid_geometry", lambda dataset: dataset.PerFrameFunctionalGroupsSequence.pop()),
        ("supplemental_palette", lambda dataset: setattr(dataset, "PixelPresentation", "COLOR")),
        ("unsupported_pixel_format", lambda dataset: setattr(dataset, "HighBit", 11)),
    ],
)
def test_file_whose_frames_are_no_volume_is_refused_by_name(
    tmp_path: Path, refused: str, change: Callable[[Dataset], None]
) -> None:
    path = write_enhanced(tmp_path / "enhanced.dcm", change=change)
    assert reason(lambda: dicom.read(case_of(path), 3)) == refused


def test_truncated_frames_are_refused(tmp_path: Path) -> None:
    path = write_enhanced(tmp_path / "enhanced.dcm")
    path.write_bytes(path.read_bytes()[:-200])
    assert reason(lambda: dicom.read(case_of(path), 3)) in ("truncated_pixel_data", "unreadable")


def test_files_of_one_volume_must_have_as_many_frames(tmp_path: Path) -> None:
    paths = [write_enhanced(tmp_path / f"{frames}.dcm", frames=frames) for frames in (5, 3)]
    for files in (paths, paths[::-1]):
        assert reason(lambda files=files: dicom.read(case_of(*files), 3)) == "mixed_geometry"


def test_scan_finds_a_volume_per_file_in_3d_and_refuses_them_in_2d(tmp_path: Path) -> None:
    def other(dataset: Dataset) -> None:
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.99"

    write_enhanced(tmp_path / "one.dcm")
    catalog = scan(tmp_path, 3)
    assert [case.files for case in catalog.cases] == [(tmp_path / "one.dcm",)] and not catalog.refusals
    write_enhanced(tmp_path / "two.dcm", change=other)
    catalog = scan(tmp_path, 3)
    assert len({case.sample_id for case in catalog.cases}) == len(catalog.cases) == 2 and not catalog.refusals
    with pytest.raises(ValueError, match="2 multi_frame; .*--dim 3"):
        scan(tmp_path, 2)


def test_enhanced_file_of_one_frame_gets_one_advice(tmp_path: Path) -> None:
    path = write_enhanced(tmp_path / "one.dcm", frames=1)
    details = set()
    for spatial_dims in (2, 3):
        with pytest.raises(RefusedError, match="single_slice") as caught:
            dicom.read(case_of(path), spatial_dims)
        details.add(caught.value.detail)
    assert len(details) == 1 and "convert it" in details.pop()


def test_series_that_mixes_single_and_multi_frame_files_is_refused(tmp_path: Path) -> None:
    write_mr_series(tmp_path)
    write_enhanced(tmp_path / "enhanced.dcm")
    with pytest.raises(ValueError, match="1 mixed_geometry"):
        scan(tmp_path, 3)


def test_legacy_converted_series_is_a_volume(tmp_path: Path) -> None:
    sources = [pydicom.dcmread(path) for path in write_mr_series(tmp_path)]
    converted = hd.legacy.LegacyConvertedEnhancedMRImage(
        sources,
        series_instance_uid="1.2.3.4",
        series_number=1,
        sop_instance_uid="1.2.3.4.5",
        instance_number=1,
    )
    converted.save_as(tmp_path / "legacy.dcm")
    content, _ = protect(tmp_path / "legacy.dcm")
    dicom.verify(tmp_path / "legacy.dcm", content, 3)
    assert np.array_equal(
        dicom.read(case_of(tmp_path / "legacy.dcm"), 3).stored,
        dicom.read(case_of(*sorted(tmp_path.glob("?.?"))), 3).stored,
    )


def test_segmentation_of_a_multi_frame_image_lies_on_its_frames(tmp_path: Path) -> None:
    path = write_enhanced(tmp_path / "enhanced.dcm", frames=5)
    pixels = np.random.default_rng(0).random((5, 32, 36, 1)) < 0.4
    mask = write_segmentation(tmp_path / "seg.dcm", [path], pixels, ("Liver",))
    labels = dicom_seg_labels.read(case_of(path), Mask(mask, "seg.dcm", (0, 1)), 3)
    image = dicom.read(case_of(path), 3)
    assert labels.shape == image.stored.shape and labels.sum() == pixels.sum()
    frame = pydicom.dcmread(path).pixel_array[1]
    place = [k for k in range(5) if np.array_equal(np.sort(image.stored[0, ..., k].ravel()), np.sort(frame.ravel()))]
    assert labels[0, ..., place[0]].sum() == pixels[1].sum()


def test_some_frames_are_those_of_the_whole_volume(tmp_path: Path) -> None:
    case = case_of(write_enhanced(tmp_path / "a"))
    image = dicom.read(case, 3)
    for axis in range(3):
        found, expected = formats.read_slices(case, 3, "auto", axis, [1, 2]), image.slices(axis, [1, 2])
        assert np.array_equal(found.stored, expected.stored) and found.codec == expected.codec
