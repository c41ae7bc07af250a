# SPDX-License-Identifier: Apache-2.0
"""DICOM files that are written: nothing but what is declared differs, and verification finds what must not be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_files import UIDS, WHEN, bundled, case_of, parse, protect, reason, rewritten
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence

from monai_salm.io import dicom, dicom_parse, dicom_pixels
from monai_salm.io.base import FileCheck

NATIVE_AND_KEPT = {
    "CT_small.dcm": uid.ExplicitVRLittleEndian,
    "MR_small_implicit.dcm": uid.ImplicitVRLittleEndian,
    "MR_small_RLE.dcm": uid.RLELossless,
    "MR_small_jp2klossless.dcm": uid.JPEG2000Lossless,
    "MR_small_jpeg_ls_lossless.dcm": uid.JPEGLSLossless,
    "JPGExtended.dcm": uid.ExplicitVRLittleEndian,
    "J2K_pixelrep_mismatch.dcm": uid.JPEG2000Lossless,
}


@pytest.mark.parametrize(("name", "syntax"), NATIVE_AND_KEPT.items())
def test_pixels_move_only_where_delta_says_and_the_syntax_is_kept_if_lossless(name: str, syntax: str) -> None:
    path = bundled(name)
    before = dicom.read(case_of(path), 2).stored
    relative, content, delta = protect(path, levels=5)
    written = parse(content)
    assert written.file_meta.TransferSyntaxUID == syntax and written["PixelData"].VR in ("OW", "OB")
    after = dicom_pixels.decode(dicom_parse.parse(content))
    assert np.array_equal(after.astype(int) - before[0], delta[0]) and after.dtype == before.dtype
    assert dicom.verify(path, content, 5) == FileCheck(int((delta != 0).sum()), 5.0, 5.0)
    assert dicom.verify(path.read_bytes(), content, 5).max_abs == 5


def test_perturbation_of_one_voxel_keeps_all_other_bytes_of_the_pixels() -> None:
    delta = np.zeros((1, 128, 128), np.int8)
    image = dicom.read(case_of(bundled("CT_small.dcm")), 2)
    row, column = np.argwhere((image.stored[0] > 900) & (image.stored[0] < 1200))[7]
    delta[0, row, column] = -2
    options = {"spatial_dims": 2, "window": "auto", "uids": UIDS, "when": WHEN}
    ((_, content),) = dicom.protect(case_of(bundled("CT_small.dcm")), delta, **options)
    old = np.frombuffer(pydicom.dcmread(bundled("CT_small.dcm")).PixelData, np.uint8)
    new = np.frombuffer(parse(content).PixelData, np.uint8)
    offset = 2 * (128 * row + column)
    assert set(np.flatnonzero(old != new)) <= {offset, offset + 1} and (old != new).any()


def test_nothing_is_written_where_nothing_would_change() -> None:
    options = {"spatial_dims": 2, "window": "auto", "uids": UIDS, "when": WHEN}
    case, delta = case_of(bundled("CT_small.dcm")), np.zeros((1, 128, 128), np.int16)
    assert reason(lambda: [*dicom.protect(case, delta, **options)]) == "nothing_changed"


def test_perturbation_that_does_not_fit_is_rejected() -> None:
    options = {"spatial_dims": 2, "window": "auto", "uids": UIDS, "when": WHEN}
    case = case_of(bundled("CT_small.dcm"))
    with pytest.raises(ValueError, match="does not fit"):
        [*dicom.protect(case, np.ones((1, 64, 128), np.int16), **options)]
    with pytest.raises(ValueError, match="does not fit"):
        [*dicom.protect(case, np.ones((1, 128, 128), np.float32), **options)]
    assert reason(lambda: [*dicom.protect(case, np.full((1, 128, 128), 9), **options)]) == "delta_outside_bounds"
    assert reason(lambda: [*dicom.protect(case, np.full((1, 128, 128), 40000), **options)]) == "delta_outside_bounds"


@pytest.fixture
def rich(edited: Callable[..., Path]) -> Path:
    """A CT slice with everything that a derived image must treat with care."""

    def enrich(dataset: Dataset) -> None:
        reference = Dataset()
        reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = uid.CTImageStorage, "1.2.3.4"
        reference.IconImageSequence = Sequence([Dataset()])
        dataset.ReferencedImageSequence = Sequence([reference])
        dataset.IconImageSequence = Sequence([Dataset()])
        dataset.DigitalSignaturesSequence, dataset.MACParametersSequence = Sequence([Dataset()]), Sequence([Dataset()])
        other = Dataset()
        other.Manufacturer = "someone else"
        dataset.ContributingEquipmentSequence = Sequence([other])
        dataset.SourceImageSequence = Sequence([reference])
        dataset.DerivationDescription = "Reformatted"
        dataset.add_new("SmallestImagePixelValue", "SS", 0)
        dataset.add_new("LargestImagePixelValue", "SS", 1)
        dataset.add_new("LargestPixelValueInSeries", "SS", 1)
        dataset.InstanceCreatorUID, dataset.SeriesDescription = "1.2.9", "Kopf nativ"
        dataset.SpecificCharacterSet, dataset.PatientName = "ISO_IR 192", "Müller^Jürgen"
        dataset.BurnedInAnnotation = "NO"
        dataset.private_block(0x0099, "VENDOR", create=True).add_new(1, "UI", "1.2.3.4")
        dataset.file_meta.SourceApplicationEntityTitle = "SCANNER7"
        dataset.preamble = b"MZ" + bytes(126)

    return edited(change=enrich)


def test_derived_instance_says_what_was_done(rich: Path) -> None:
    name, content, _ = protect(rich)
    before, after = pydicom.dcmread(rich), parse(content)
    assert after.SOPClassUID == before.SOPClassUID
    assert list(after.ImageType) == ["DERIVED", *before.ImageType[1:]]
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"):
        assert after[keyword].value == UIDS(before[keyword].value)
    assert name == PurePosixPath(after.StudyInstanceUID, after.SeriesInstanceUID, f"{after.SOPInstanceUID}.dcm")
    source = after.SourceImageSequence[-1]
    assert source.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
    assert source.ReferencedSOPInstanceUID not in (before.SOPInstanceUID, after.SOPInstanceUID)
    assert after.SourceImageSequence[0].ReferencedSOPInstanceUID == UIDS("1.2.3.4")
    assert after.DerivationCodeSequence[-1].CodeValue == "113042"
    assert after.DerivationDescription.startswith("Reformatted ") and len(after.DerivationDescription) < 1024
    other, own = after.ContributingEquipmentSequence
    assert other.Manufacturer == "someone else" and own.Manufacturer == "monai_salm"
    assert own.PurposeOfReferenceCodeSequence[0].CodeValue == "109103"
    assert str(own.ContributionDateTime) == "20260102030405+0000"
    assert before.TimezoneOffsetFromUTC == "-0500"
    assert (after.InstanceCreationDate, after.InstanceCreationTime) == ("20260101", "220405")
    assert after.SeriesDescription == "Kopf nativ [protected]"
    assert reason(lambda: dicom.check_supported(dicom_parse.parse(content))) == "already_protected"


def test_stale_and_leaking_elements_are_gone_and_the_rest_is_untouched(rich: Path) -> None:
    _, content, _ = protect(rich)
    before, after = pydicom.dcmread(rich), parse(content)
    for keyword in (
        "IconImageSequence",
        "DigitalSignaturesSequence",
        "MACParametersSequence",
        "LargestPixelValueInSeries",
    ):
        assert keyword in before and keyword not in after
    assert "IconImageSequence" not in after.ReferencedImageSequence[0]
    pixels = after.pixel_array
    assert (after.SmallestImagePixelValue, after.LargestImagePixelValue) == (pixels.min(), pixels.max())
    assert after["SmallestImagePixelValue"].VR == "SS"
    for keyword in ("PatientName", "InstanceCreatorUID", "BurnedInAnnotation", "RescaleIntercept", "PixelPaddingValue"):
        assert after[keyword] == before[keyword]
    assert after[0x0099, 0x1001].value == UIDS("1.2.3.4")
    assert after.preamble == bytes(128) and "SourceApplicationEntityTitle" not in after.file_meta
    assert after.file_meta.ImplementationVersionName == "MONAI_SALM"
    assert after.file_meta.MediaStorageSOPInstanceUID == after.SOPInstanceUID
    assert before.SOPInstanceUID.encode() not in content and before.StudyInstanceUID.encode() not in content


def test_only_declared_elements_differ(rich: Path) -> None:
    for path in (rich, bundled("MR_small_implicit.dcm"), bundled("JPGExtended.dcm")):
        before, after = pydicom.dcmread(path), parse(protect(path)[1])
        for tag in before.keys() | after.keys():
            if tag not in before or tag not in after or before[tag] != after[tag]:
                keyword = pydicom.datadict.keyword_for_tag(tag)
                is_reference = tag in before and before[tag].VR in ("UI", "SQ")
                assert keyword in dicom.DECLARED_KEYWORDS or is_reference or tag.element == 0, keyword


def test_same_input_gives_the_same_bytes(rich: Path) -> None:
    assert protect(rich)[:2] == protect(rich)[:2]


@pytest.mark.parametrize("text", ["", "x" * 52, "x" * 53, "é" * 25])
def test_series_description_is_marked_if_there_is_room(edited: Callable[..., Path], text: str) -> None:
    path = edited(SpecificCharacterSet="ISO_IR 192", SeriesDescription=text)
    marked = parse(protect(path)[1]).SeriesDescription
    assert marked == ((text + " [protected]").strip() if len(text.encode()) <= 52 else text)


@pytest.mark.parametrize(("name", "method"), [("JPGExtended.dcm", "ISO_10918_1")])
def test_lossy_input_stays_marked_lossy(tmp_path: Path, name: str, method: str) -> None:
    dataset = pydicom.dcmread(bundled(name))
    for mark in (None, "00", "01"):
        for keyword in ("LossyImageCompression", "LossyImageCompressionMethod", "LossyImageCompressionRatio"):
            dataset.pop(keyword, None)
        if mark:
            dataset.LossyImageCompression = mark
        dataset.save_as(tmp_path / "lossy.dcm")
        written = parse(protect(tmp_path / "lossy.dcm")[1])
        assert written.LossyImageCompression == "01"
        assert mark == "01" or written.LossyImageCompressionMethod == method
    assert "LossyImageCompression" not in parse(protect(bundled("CT_small.dcm"))[1])


def test_odd_number_of_bytes_is_padded(tmp_path: Path) -> None:
    pixels = np.arange(9, dtype=np.uint8).reshape(3, 3) * 20
    dataset = pydicom.dcmread(bundled("CT_small.dcm"))
    for keyword in ("PixelPaddingValue", "RescaleSlope", "RescaleIntercept"):
        del dataset[keyword]
    dataset.SOPClassUID, dataset.PixelRepresentation = uid.MRImageStorage, 0
    dataset.Rows = dataset.Columns = 3
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit = 7
    dataset.PixelData = pixels.tobytes() + b"\0"
    dataset["PixelData"].VR = "OB"
    dataset.save_as(tmp_path / "odd.dcm")
    delta = np.zeros((1, 3, 3), np.int8)
    delta[0, 1, 1] = 3
    options = {"spatial_dims": 2, "window": (0, 255), "uids": UIDS, "when": WHEN}
    ((_, content),) = dicom.protect(case_of(tmp_path / "odd.dcm"), delta, **options)
    assert np.array_equal(dicom_pixels.decode(dicom_parse.parse(content)), pixels + delta[0].astype(np.uint8))
    assert dicom.verify(tmp_path / "odd.dcm", content, 3) == FileCheck(1, 3, 3)
    assert len(parse(content).PixelData) == 10


def test_encoder_that_fails_gives_way_to_uncompressed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> bytes:
        raise RuntimeError("no codec")

    monkeypatch.setattr(dicom_pixels, "_compress", fail)
    _, content, _ = protect(bundled("MR_small_RLE.dcm"))
    assert parse(content).file_meta.TransferSyntaxUID == uid.ExplicitVRLittleEndian
    dicom.verify(bundled("MR_small_RLE.dcm"), content, 1)


def test_the_check_decodes_the_copy_each_time_and_the_original_once(monkeypatch: pytest.MonkeyPatch) -> None:
    path, decoded, pixel_array = bundled("MR_small_RLE.dcm"), [], dicom_pixels.pixel_array
    _, content, _ = protect(path)
    monkeypatch.setattr(dicom_pixels, "pixel_array", lambda *a, **k: decoded.append(1) or pixel_array(*a, **k))
    for _ in range(3):
        assert dicom.verify(path, content, 1).changed > 0
    assert len(decoded) == 3


def set_pixel(value: int) -> Callable[[Dataset], None]:
    def change(dataset: Dataset) -> None:
        pixels = dataset.pixel_array.copy()
        pixels[0, 0] = value
        dataset.PixelData = pixels.tobytes()

    return change


def source_pixels(dataset: Dataset) -> None:
    dataset.PixelData = pydicom.dcmread(bundled("CT_small.dcm")).PixelData


def nested_change(dataset: Dataset) -> None:
    dataset.ContributingEquipmentSequence = []


@pytest.mark.parametrize(
    "change",
    [
        set_pixel(3000),
        source_pixels,
        nested_change,
        lambda dataset: setattr(dataset, "PatientName", "Other^Name"),
        lambda dataset: setattr(dataset, "ReferringPhysicianName", "Other^Name"),
        lambda dataset: setattr(dataset, "RescaleIntercept", "-1000"),
        lambda dataset: setattr(dataset, "StudyDescription", "new"),
        lambda dataset: delattr(dataset, "PixelPaddingValue"),
        lambda dataset: setattr(dataset, "SOPInstanceUID", pydicom.dcmread(bundled("CT_small.dcm")).SOPInstanceUID),
        lambda dataset: setattr(dataset, "SOPInstanceUID", "1.2.3"),
        lambda dataset: setattr(dataset, "SOPClassUID", uid.MRImageStorage),
        lambda dataset: setattr(dataset, "ImageType", ["ORIGINAL", "PRIMARY"]),
        lambda dataset: setattr(dataset, "preamble", b"MZ" + bytes(126)),
        lambda dataset: setattr(dataset, "Rows", 64),
        lambda dataset: setattr(dataset["StudyDate"], "VR", "LO"),  # the same bytes
    ],
)
def test_verification_finds_what_must_not_be(change: Callable[[Dataset], None]) -> None:
    content = protect(bundled("CT_small.dcm"), levels=2)[1]
    dicom.verify(bundled("CT_small.dcm"), content, 2)
    broken = rewritten(content, change)
    assert reason(lambda: dicom.verify(bundled("CT_small.dcm"), broken, 2)) == "verification_failed"


def test_verification_needs_a_whole_file_within_the_budget() -> None:
    source, content = bundled("CT_small.dcm"), protect(bundled("CT_small.dcm"), levels=3)[1]
    assert reason(lambda: dicom.verify(source, content, 2)) == "verification_failed"
    assert reason(lambda: dicom.verify(source, content[:-2000], 3)) == "verification_failed"
    assert reason(lambda: dicom.verify(source, b"", 3)) == "verification_failed"
    assert reason(lambda: dicom.verify(source, source.read_bytes(), 3)) == "verification_failed"


def test_unchanged_slice_passes_only_where_it_is_allowed() -> None:
    content = rewritten(protect(bundled("CT_small.dcm"))[1], source_pixels)
    assert dicom.verify(bundled("CT_small.dcm"), content, 1, allow_unchanged=True) == FileCheck(0, 0.0, 1)
    assert reason(lambda: dicom.verify(bundled("CT_small.dcm"), content, 1)) == "verification_failed"


def test_compressed_slices_may_be_split_over_fragments(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(bundled("MR_small_jp2klossless.dcm"))
    expected = dataset.pixel_array
    frame = pydicom.encaps.get_frame(dataset.PixelData, 0, number_of_frames=1)
    dataset.PixelData = encapsulate([frame], fragments_per_frame=3)
    dataset.save_as(tmp_path / "fragments.dcm")
    assert np.array_equal(dicom.read(case_of(tmp_path / "fragments.dcm"), 2).stored[0], expected)


def test_own_file_meta_is_valid() -> None:
    meta = parse(protect(bundled("CT_small.dcm"))[1]).file_meta
    assert isinstance(meta, FileMetaDataset) and uid.UID(meta.ImplementationClassUID).is_valid
    assert len(meta.ImplementationVersionName) <= 16
