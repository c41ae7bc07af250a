# SPDX-License-Identifier: Apache-2.0
"""Plain elements are read and written as pydicom does it, whatever the file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutations import mutants, sources
from pydicom import dcmwrite, uid
from pydicom.data import get_testdata_file
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filereader import dcmread
from pydicom.tag import BaseTag

from monai_salm.io import dicom_elements, dicom_parse, dicom_syntax
from monai_salm.io.base import RefusedError
from monai_salm.io.dicom_elements import ITEM

FILES = [content for content in sources() if content[128:132] == b"DICM"]


def told(dataset: Dataset) -> Any:
    """All elements at any depth as they are, decoded or not; those that only one of both looks into, decoded."""
    for each in {0x00020000, 0x00020001, 0x00020010, 0x00080005} & dataset.keys():
        dataset[each]
    return [
        (element.tag, element.VR, [told(item) for item in element.value])
        if element.VR == "SQ" and not element.is_raw
        else element
        for element in dataset.values()
    ]


def outcome(read: Any, argument: Any, **options: bool) -> Any:
    """What is read, with everything that pydicom keeps about it; or the reason why not."""
    try:
        dataset = read(argument, **options)
        kept = {name: value for name, value in vars(dataset).items() if name not in ("_dict", "file_meta", "timestamp")}
        return told(dataset), told(dataset.file_meta), kept
    except RefusedError as error:
        return error.reason


@pytest.mark.parametrize(("broken", "head"), [(0, 1 << 16), (0, 700), (0, 333), (1500, 1 << 16)])
def test_a_file_is_read_as_by_pydicom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: int, head: int) -> None:
    """Wherever the head of it ends that is read at first."""
    monkeypatch.setattr(dicom_parse, "HEAD_BYTES", head)
    making = mutants(FILES, np.random.default_rng(0))
    contents = [next(making) for _ in range(broken)] or FILES
    path = tmp_path / "a.dcm"
    read = 0
    for content in contents:
        path.write_bytes(content)
        ours = outcome(dicom_parse.parse, content), outcome(dicom_parse.read_header, path)
        with monkeypatch.context() as slow:
            slow.setattr(dicom_parse, "_read_plain", lambda *_: None)
            theirs = outcome(dicom_parse.parse, content), outcome(dicom_parse.read_header, path)
        assert ours == theirs
        assert ours[0] == outcome(dicom_parse.parse, content, by_pydicom=True)
        read += not isinstance(ours[0], str)
    assert read > len(contents) / 3


def test_nothing_but_short_private_elements_is_left_out() -> None:
    left_out = 0
    for content in FILES:
        try:
            part, whole = dicom_parse.parse(content, least_private=64), dicom_parse.parse(content)
        except RefusedError:
            continue
        lost = [element for tag, element in whole.items() if tag not in part]
        assert all(element.tag.is_private and element.length < 64 and element.VR != "SQ" for element in lost)
        assert not any((element.value or b"").startswith(ITEM) for element in lost)
        assert dict(part.items()) == {tag: element for tag, element in whole.items() if tag in part}
        left_out += len(lost)
    assert left_out > 100


@pytest.mark.parametrize("items_with_length", [False, True])
def test_a_header_is_read_whose_first_bytes_end_in_a_sequence(tmp_path: Path, items_with_length: bool) -> None:
    dataset = dcmread(get_testdata_file("MR_small.dcm", download=False))
    items = [Dataset() for _ in range(1000)]
    for item in items:
        item.CodeMeaning, item.is_undefined_length_sequence_item = "a" * 64, not items_with_length
    dataset.ProcedureCodeSequence = items
    dataset["ProcedureCodeSequence"].is_undefined_length = True
    dataset.save_as(tmp_path / "a.dcm")
    header = dicom_parse.read_header(tmp_path / "a.dcm")
    assert (len(header.ProcedureCodeSequence), header.pixel_element) == (1000, "PixelData")


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small_implicit.dcm", "MR_small_RLE.dcm"])
def test_images_of_common_syntaxes_are_plain(name: str) -> None:
    content = Path(get_testdata_file(name, download=False)).read_bytes()
    assert dicom_parse._read_plain(content, None) is not None


def test_who_reads_the_same_bytes_again_gets_a_data_set_of_his_own() -> None:
    content = Path(get_testdata_file("CT_small.dcm", download=False)).read_bytes()
    first, fresh = dicom_parse.parse(content), outcome(dicom_parse.parse, content)
    first.PatientName, first.Rows, first.file_meta.TransferSyntaxUID = "A^B", 7, uid.RLELossless
    first.OtherPatientIDsSequence[0].PatientID = "other"
    del first.PixelData
    assert outcome(dicom_parse.parse, content) == fresh
    other = content.replace(b"CompressedSamples", b"CompressedSimples")
    assert other != content and dicom_parse.parse(other).PatientName == "CompressedSimples^CT1"


def test_an_unknown_type_is_written_as_it_was() -> None:
    dataset = dicom_parse.parse(FILES[0])
    odd = RawDataElement(BaseTag(0x00191010), "L\xcf", 2, b"ab", 0, False, True)
    dataset._dict[odd.tag] = odd
    assert b"\x19\0\x10\x10L\xcf\x02\0ab" in b"".join(dicom_elements.write_elements(dataset))


def test_pixels_that_are_not_encapsulated_are_not_written_as_compressed() -> None:
    dataset = dicom_parse.parse(Path(get_testdata_file("MR_small.dcm", download=False)).read_bytes())
    dataset.file_meta.TransferSyntaxUID = uid.RLELossless
    with pytest.raises(ValueError, match="encapsulated"):
        list(dicom_elements.write_elements(dataset))


def test_most_files_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[bytes] = []
    read = dicom_parse._read_by_pydicom
    monkeypatch.setattr(
        dicom_parse, "_read_by_pydicom", lambda file, stop: left.append(file.getvalue()) or read(file, stop)
    )
    for content in FILES:
        outcome(dicom_parse.parse, content)
    assert len(left) < len(FILES) / 8


def test_a_data_set_is_written_as_by_pydicom() -> None:
    written = 0
    for content in FILES:
        try:
            ours, theirs = dicom_parse.parse(content), dicom_parse.parse(content)
        except RefusedError:
            continue
        if "PixelData" not in ours or ours.file_meta.TransferSyntaxUID not in (*dicom_syntax.NATIVE, uid.RLELossless):
            continue
        for dataset in (ours, theirs):
            dataset.PatientName, dataset.SamplesPerPixel = "A^B", 0
            dataset.SeriesDescription = ""
            dataset.file_meta.ImplementationClassUID = "1.2"
        buffer = io.BytesIO()
        dcmwrite(buffer, theirs)
        whole = b"".join(dicom_elements.write_elements(ours))
        assert buffer.getvalue().endswith(whole) and len(buffer.getvalue()) - len(whole) < 600
        written += 1
    assert written > 20


def test_an_element_of_the_file_meta_is_not_written_among_the_others() -> None:
    dataset = dicom_parse.parse(FILES[0])
    dataset[0x00020010] = dataset.file_meta[0x00020010]
    with pytest.raises(ValueError, match="file meta"):
        list(dicom_elements.write_elements(dataset))
