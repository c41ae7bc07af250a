# SPDX-License-Identifier: Apache-2.0
"""What files of many makers hold besides the obvious, and what must come of it."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import (
    UIDS,
    WHEN,
    bundled,
    case_of,
    edited,
    fitting_delta,
    parse,
    protect,
    reason,
    refusal,
    write_enhanced,
)
from exports import write_series
from pydicom import uid
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.filereader import read_sequence
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from test_companions import write_referring

from monai_salm.io import dicom
from monai_salm.io.base import RefusedError
from monai_salm.io.dicom_companion import read_companion
from monai_salm.io.dicom_parse import parse as parse_plain

PRIVATE = Tag(0x0047, 0x10DA)
"""Of creator GEMS_3DSTATE_001; the dictionary says that it is a sequence."""


def raw_value(content: bytes, tag: int) -> bytes:
    element = parse_plain(content).get_item(Tag(tag))
    assert isinstance(element, RawDataElement)
    return element.value


@pytest.mark.parametrize(("keyword", "value"), [("RescaleSlope", b"   1"), ("RescaleIntercept", b" -1024")])
def test_numbers_with_leading_spaces_stay_as_they_are(tmp_path: Path, keyword: str, value: bytes) -> None:
    """Padding in front of a decimal string is legal (PS3.5 6.2)."""

    def change(dataset: Dataset) -> None:
        dataset[keyword] = RawDataElement(Tag(keyword), "DS", len(value), value, 0, False, True)

    path = edited(tmp_path / "a.dcm", change)
    _, content, _ = protect(path)
    assert raw_value(content, Tag(keyword)) == value
    assert dicom.verify(path, content, 1).changed > 0


@pytest.mark.parametrize("value", [b"abcdefgh", b"\0" * 16, b"GE private text in place of a sequence of items."])
@pytest.mark.parametrize("declared", ["implicit", "UN"])
def test_bytes_that_a_dictionary_takes_for_a_sequence_stay_as_they_are(
    tmp_path: Path, value: bytes, declared: str
) -> None:
    def change(dataset: Dataset) -> None:
        dataset.private_block(0x0047, "GEMS_3DSTATE_001", create=True)
        dataset._dict[PRIVATE] = DataElement(PRIVATE, "UN", value)
        if declared == "implicit":
            dataset.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian

    path = tmp_path / "a.dcm"
    dataset = pydicom.dcmread(bundled("CT_small.dcm"))
    change(dataset)
    dataset.save_as(path, implicit_vr=declared == "implicit", little_endian=True)
    assert raw_value(path.read_bytes(), PRIVATE) == value
    _, content, _ = protect(path)
    assert raw_value(content, PRIVATE) == value
    assert dicom.verify(path, content, 1).changed > 0
    lost = content.replace(value, b"".ljust(len(value), b"x"))
    assert reason(lambda: dicom.verify(path, lost, 1)) == "verification_failed"


def in_sequence(dataset: Dataset) -> None:
    item = Dataset()
    item.Rows, item.Columns, item.BitsAllocated = dataset.Rows, dataset.Columns, 16
    item["PixelData"] = DataElement(Tag("PixelData"), "OW", bytes(dataset.PixelData))
    dataset.private_block(0x0099, "COPY", create=True).add_new(1, "SQ", Sequence([item]))


def in_private_item(dataset: Dataset) -> None:
    item = Dataset()
    item.private_block(0x0099, "COPY", create=True).add_new(1, "OW", bytes(dataset.PixelData))
    dataset.private_block(0x0099, "COPY", create=True).add_new(1, "SQ", Sequence([item]))


def behind_a_header(dataset: Dataset) -> None:
    dataset.private_block(0x0099, "COPY", create=True).add_new(
        1, "OB", b"header of its own" + dataset.PixelData + b"\0"
    )


def in_variable_pixel_data(dataset: Dataset) -> None:
    dataset.add_new(0x7F000010, "OW", bytes(dataset.PixelData))


@pytest.mark.parametrize("length", ["defined", "undefined"])
@pytest.mark.parametrize("change", [in_sequence, in_private_item, behind_a_header, in_variable_pixel_data])
def test_a_second_copy_of_the_pixels_is_refused(tmp_path: Path, change: Callable[[Dataset], None], length: str) -> None:
    def with_length(dataset: Dataset) -> None:
        change(dataset)
        for element in dataset:
            if element.VR == "SQ":
                element.is_undefined_length = length == "undefined"

    assert refusal(edited(tmp_path / "a.dcm", with_length)) == "pixel_copy"


def test_icons_are_no_second_copy_and_go(tmp_path: Path) -> None:
    def change(dataset: Dataset) -> None:
        icon = Dataset()
        icon.Rows = icon.Columns = 64
        icon["PixelData"] = DataElement(Tag("PixelData"), "OB", bytes(64 * 64))
        dataset.IconImageSequence = Sequence([icon])

    _, content, _ = protect(edited(tmp_path / "a.dcm", change))
    assert "IconImageSequence" not in parse(content)


@pytest.mark.parametrize("kind", ["item", "private", "numbers", "parts"])
def test_a_companion_with_pixels_inside_is_refused(tmp_path: Path, kind: str) -> None:
    def change(dataset: Dataset) -> None:
        if kind != "item":
            block = dataset.private_block(0x0099, "COPY", create=True)
            for part in range(2 if kind == "parts" else 1):
                values = [1] * (1 << 13) if kind == "numbers" else bytes(1 << (13 if kind == "parts" else 14))
                block.add_new(1 + part, "US" if kind == "numbers" else "OB", values)
            return
        item = Dataset()
        item["PixelData"] = DataElement(Tag("PixelData"), "OW", bytes(64))
        dataset.ReferencedStudySequence = Sequence([item])

    sources = write_series(tmp_path / "series", "a")
    assert read_companion(write_referring(tmp_path / "good.dcm", "rtstruct", sources))[1]
    path = write_referring(tmp_path / "bad.dcm", "rtstruct", sources, change)
    assert reason(lambda: read_companion(path)) == "companion_with_pixels"


def test_addresses_that_hold_the_old_uids_go(tmp_path: Path) -> None:
    def change(dataset: Dataset) -> None:
        dataset.RetrieveURL = f"http://pacs.example/wado?objectUID={dataset.SOPInstanceUID}"

    path = edited(tmp_path / "a.dcm", change)
    _, content, _ = protect(path)
    assert b"http://pacs.example" not in content and dicom.verify(path, content, 1).changed > 0


@pytest.mark.parametrize("count", [2, 8, 1000])
def test_zeros_behind_the_last_element_are_no_data(tmp_path: Path, count: int) -> None:
    path = tmp_path / "padded.dcm"
    path.write_bytes(bundled("CT_small.dcm").read_bytes() + bytes(count))
    _, content, delta = protect(path)
    expected = pydicom.dcmread(bundled("CT_small.dcm")).pixel_array + delta[0]
    assert np.array_equal(parse(content).pixel_array, expected) and dicom.verify(path, content, 1).changed > 0


def test_other_bytes_behind_the_last_element_are_told_as_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "padded.dcm"
    path.write_bytes(bundled("CT_small.dcm").read_bytes() + b"\xff" * 512)
    with pytest.raises(RefusedError, match="unreadable: .* goes on behind the last;"):
        dicom.read(case_of(path), 2)


def test_a_broken_window_is_in_the_way_only_where_it_is_used(tmp_path: Path) -> None:
    value = b"40,5"

    def change(dataset: Dataset) -> None:
        dataset.WindowWidth = 400
        dataset["WindowCenter"] = RawDataElement(Tag("WindowCenter"), "DS", len(value), value, 0, False, True)

    path = edited(tmp_path / "a.dcm", change)
    assert reason(lambda: dicom.read(case_of(path), 2)) == "unreadable"
    image = dicom.read(case_of(path), 2, (-160, 240))
    assert image.codec.window == (-160, 240) and image.windows == ()
    assert dicom.read(case_of(edited(tmp_path / "b.dcm", change, "MR_small.dcm")), 2).stored.size


@pytest.mark.parametrize("shared", ["absent", "empty"])
def test_without_shared_groups_each_frame_says_that_it_is_derived(tmp_path: Path, shared: str) -> None:
    path = write_enhanced(tmp_path / "a.dcm")
    dataset = pydicom.dcmread(path)
    (common,) = dataset.SharedFunctionalGroupsSequence
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        for element in common:
            if element.tag not in frame:
                frame[element.tag] = element
    dataset.SharedFunctionalGroupsSequence = Sequence([])
    if shared == "absent":
        del dataset.SharedFunctionalGroupsSequence
    dataset.save_as(path)
    options = {"spatial_dims": 3, "window": "auto", "uids": UIDS, "when": WHEN}
    delta = fitting_delta(dicom.read(case_of(path), 3))
    ((_, content),) = dicom.protect(case_of(path), delta, **options)
    frames = parse(content).PerFrameFunctionalGroupsSequence
    assert [len(frame.DerivationImageSequence) for frame in frames] == [1] * len(frames)
    assert dicom.verify(path, content, 1).changed > 0
    broken = parse(content)
    del broken.PerFrameFunctionalGroupsSequence[1].DerivationImageSequence
    broken.save_as(tmp_path / "broken.dcm")
    assert reason(lambda: dicom.verify(path, tmp_path / "broken.dcm", 1)) == "verification_failed"


ODD = {
    "ImageComments": (Tag("ImageComments"), "LT", b"odd", b" "),
    "PatientID": (Tag("PatientID"), "LO", b"12345", b" "),
    "RescaleIntercept": (Tag("RescaleIntercept"), "DS", b"-1024.5", b" "),
    "ConcatenationUID": (Tag("ConcatenationUID"), "UI", b"1.2.3", b"\0"),
    "RedPaletteColorLookupTableData": (Tag("RedPaletteColorLookupTableData"), "OW", b"abc", b"\0"),
    "private": (Tag(0x0047, 0x10E1), "OB", b"\1\2\3", b"\0"),
    "unknown": (Tag(0x0047, 0x10E2), "UN", b"\1\2\3", b"\0"),
}
"""Of elements of odd length, which some scanners write: tag, type, value and what must be added (PS3.5 7.1.1, 6.2)."""


def odd_elements(dataset: Dataset) -> None:
    for tag, vr, value, _ in ODD.values():
        dataset[tag] = RawDataElement(tag, vr, len(value), value, 0, False, True)
    dataset.private_block(0x0047, "GEMS_3DSTATE_001", create=True)


def odd_values(dataset: Dataset) -> list[bytes]:
    found = []
    for element in list(dataset.values()):
        if element.tag in (Tag("RequestAttributesSequence"), Tag("ConceptCodeSequence")):
            found += [value for item in dataset[element.tag].value for value in odd_values(item)]
        elif element.is_raw and len(element.value or b"") % 2:
            found.append(element.value)
    return found


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_values_of_odd_length_are_padded(tmp_path: Path, nested: bool, implicit: bool) -> None:
    dataset, holder = pydicom.dcmread(bundled("MR_small_implicit.dcm" if implicit else "MR_small.dcm")), Dataset()
    odd_elements(holder if nested else dataset)
    if nested:
        inner = Dataset()
        inner.ConceptCodeSequence = Sequence([holder])
        for item in (inner, holder):  # else pydicom decodes what it writes
            item.set_original_encoding(implicit, True, "iso8859")
        dataset.RequestAttributesSequence = Sequence([inner])
    path = tmp_path / "a.dcm"
    dataset.save_as(path)
    assert len(odd_values(pydicom.dcmread(path))) == len(ODD)
    _, content, _ = protect(path)
    assert dicom.verify(path, content, 1).changed > 0
    after = parse(content)
    assert not odd_values(after)
    written = after.RequestAttributesSequence[0].ConceptCodeSequence[0] if nested else after
    for name, (tag, _, value, padding) in ODD.items():
        if name != "ConcatenationUID":  # which is another one now
            assert written.get_item(tag).value == value + padding, name


@pytest.mark.parametrize("implicit", [False, True])
def test_items_of_an_unknown_type_and_of_odd_length_can_still_be_read(tmp_path: Path, implicit: bool) -> None:
    element = struct.pack("<HHL", 0x0047, 0x1001, 3) + b"abc"
    items = b"\xfe\xff\0\xe0" + struct.pack("<L", len(element)) + element
    dataset = pydicom.dcmread(bundled("MR_small_implicit.dcm" if implicit else "MR_small.dcm"))
    tag = Tag(0x0047, 0x10E3)
    dataset[tag] = RawDataElement(tag, None if implicit else "UN", len(items), items, 0, implicit, True)
    dataset.private_block(0x0047, "GEMS_3DSTATE_001", create=True)
    path = tmp_path / "a.dcm"
    dataset.save_as(path)
    _, content, _ = protect(path)
    assert dicom.verify(path, content, 1).changed > 0
    (item,) = read_sequence(io.BytesIO(parse(content).get_item(tag).value), True, True, len(items), "iso8859")
    assert item[0x0047, 0x1001].value == b"abc"


def test_values_of_odd_length_are_padded_in_companions_too(tmp_path: Path) -> None:
    sources = write_series(tmp_path / "series", "a")
    path = write_referring(tmp_path / "a.dcm", "rtstruct", sources, odd_elements)
    assert odd_values(pydicom.dcmread(path))
    _, content = dicom.protect_companion(path, UIDS)
    (tmp_path / "copy.dcm").write_bytes(content)
    dicom.verify_companion(path, tmp_path / "copy.dcm")
    assert not odd_values(parse(content))


@pytest.mark.parametrize("name", ["0f8fad5b-d9cb-469f-a165-70867728950e", "anon_000123", "9F86D081884C7D65"])
def test_what_a_tool_wrote_in_place_of_a_uid_is_replaced_as_a_uid(tmp_path: Path, name: str) -> None:
    def change(dataset: Dataset) -> None:
        dataset.StudyInstanceUID = dataset.SeriesInstanceUID = dataset.PatientID = name
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = name

    path = edited(tmp_path / "a.dcm", change)
    _, content, _ = protect(path)
    assert dicom.verify(path, content, 1).changed > 0
    after = parse(content)
    assert after.PatientID == name, "no identity is changed"
    assert all(uid.UID(after[each].value).is_valid for each in ("StudyInstanceUID", "SeriesInstanceUID"))
    assert uid.UID(after.SOPInstanceUID).is_valid and after.SOPInstanceUID == after.file_meta.MediaStorageSOPInstanceUID
