# SPDX-License-Identifier: Apache-2.0
"""DICOM files: what is read, and by which window; padding and inversion."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import UIDS, WHEN, bundled, case_of, parse, protect, reason, refusal
from pydicom import uid
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from monai_salm.io import dicom, dicom_parse, dicom_pixels, dicom_read, formats
from monai_salm.io.base import FileCheck, RefusedError
from monai_salm.io.kept import Kept
from monai_salm.perturbations.budget import Budget


def test_a_file_that_changed_is_read_again_though_size_and_time_are_as_they_were(edited: Callable[..., Path]) -> None:
    path = edited()
    before, times = formats.read_outline(case_of(path), 2), path.stat()
    assert formats.read_outline(case_of(path), 2) == before
    path.write_bytes(path.read_bytes().replace(b"-1024", b"-1000"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    after = formats.read_outline(case_of(path), 2)
    assert (before.codec.intercept, after.codec.intercept) == (-1024, -1000)


def test_what_was_read_first_is_written_first_and_so_is_kept_where_not_all_can_be(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(dicom_read, "_LAYOUTS", Kept(7, drop_newest=True))  # of two slices, which count for three each
    cases = [case_of(Path(shutil.copy(bundled("CT_small.dcm"), tmp_path / str(index)))) for index in range(4)]
    loaded = [dicom.layout_of(case, 2) for case in cases]
    assert [dicom.layout_of(case, 2) is old for case, old in zip(cases, loaded, strict=True)] == [
        True,
        False,
        False,
        False,
    ]
    assert dicom.layout_of(cases[0], 2) is loaded[0] and dicom.layout_of(cases[3], 2) is dicom.layout_of(cases[3], 2)


def test_stored_values_are_those_in_the_file() -> None:
    image = dicom.read(case_of(bundled("CT_small.dcm")), 2)
    raw = np.frombuffer(pydicom.dcmread(bundled("CT_small.dcm")).PixelData, "<i2").reshape(1, 128, 128)
    assert np.array_equal(image.stored, raw) and image.stored.dtype == np.int16
    codec = image.codec
    assert (codec.slope, codec.intercept, codec.unit, codec.padding) == (1.0, -1024.0, "HU", (-2000.0, -2000.0))
    assert codec.window == (-160.0, 240.0) and codec.stored_range == (-32768, 32767) and not codec.inverted


@pytest.mark.data
def test_nine_encodings_of_one_slice_hold_the_same_integers(data_dir: Path) -> None:
    folder = data_dir / "dicom_awkward" / "dcm_qa_ts"
    big_endian = folder / "siemens_mr_series3.dcm"
    expected = pydicom.dcmread(big_endian).pixel_array
    paths = sorted(folder.glob("*.dcm"))
    assert len(paths) == 9
    for path in paths:
        assert np.array_equal(dicom.read(case_of(path), 2).stored[0], expected)
        name, content, delta = protect(path, levels=3)
        assert np.array_equal(dicom_pixels.decode(dicom_parse.parse(content)), expected + delta[0])
        assert dicom.verify(path, content, 3) == FileCheck(int((delta != 0).sum()), 3, 3)


@pytest.mark.data
@pytest.mark.parametrize(
    ("big", "little", "differ"),
    [
        ("pydicom/MR_small_bigendian.dcm", "pydicom/MR_small.dcm", ["DataSetTrailingPadding"]),
        (
            "dcm_qa_ts/siemens_mr_series3.dcm",
            "dcm_qa_ts/siemens_mr_series1.dcm",
            ["SOPInstanceUID", "SeriesNumber"],
        ),
    ],
)
def test_big_endian_file_becomes_the_bytes_of_its_little_endian_twin(
    data_dir: Path, big: str, little: str, differ: list[str]
) -> None:
    folder = data_dir / "dicom_awkward"
    one, other = (dicom_parse.parse((folder / name).read_bytes()) for name in (big, little))
    nested = {tag for tag in one.keys() if one.get_item(tag).VR == "SQ"}
    for tag in [*(one.keys() | other.keys()) - nested, *nested]:  # parsing a sequence decodes other elements
        if pydicom.datadict.keyword_for_tag(tag) not in differ:
            raw = [each.get_item(tag).value for each in (one, other)]
            decoded = tag in nested or not all(isinstance(value, bytes) for value in raw)
            assert one[tag].value == other[tag].value if decoded else raw[0] == raw[1], tag
    _, content, delta = protect(folder / big, levels=2)
    assert parse(content).file_meta.TransferSyntaxUID == uid.ExplicitVRLittleEndian
    assert np.array_equal(parse(content).pixel_array, pydicom.dcmread(folder / big).pixel_array + delta[0])


def test_big_endian_element_of_unknown_type_is_refused(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(bundled("MR_small_bigendian.dcm"))
    dataset.add_new(0x00991001, "UN", b"\0\1")
    dataset.save_as(tmp_path / "unknown.dcm")
    assert refusal(tmp_path / "unknown.dcm") == "unsupported_transfer_syntax"


@pytest.mark.parametrize("count", [2, 64, 1000])
def test_zeros_behind_the_pixels_are_padding(edited: Callable[..., Path], count: int) -> None:
    path = edited(change=lambda dataset: setattr(dataset, "PixelData", dataset.PixelData + bytes(count)))
    _, content, _ = protect(path)
    assert dicom.verify(path, content, 1).changed > 0 and len(parse(content).PixelData) == 2 * 128 * 128


@pytest.mark.parametrize("padding", [b"\0", b" ", b"\0\0\0"])
def test_padding_is_no_part_of_a_uid(edited: Callable[..., Path], padding: bytes) -> None:
    def change(dataset: Dataset) -> None:
        value = b"1.2.3.4.5" + padding
        dataset["StudyInstanceUID"] = RawDataElement(Tag("StudyInstanceUID"), "UI", len(value), value, 0, False, True)

    dicom.check_supported(dicom.read_header(edited(change=change)))


def test_unused_bits_are_told_with_what_may_use_them(edited: Callable[..., Path]) -> None:
    def not_extended(dataset: Dataset) -> None:
        """-2000 of 16 bits is 2096 of 12."""
        dataset.BitsStored, dataset.HighBit = 12, 11
        pixels = np.frombuffer(dataset.PixelData, "<u2") & 0xFFF
        dataset.PixelData = pixels.tobytes()

    with pytest.raises(RefusedError, match=r"unused_bits_set: .* an embedded overlay, or signed values that are not"):
        dicom.read(case_of(edited(change=not_extended)), 2)


def test_ct_uses_the_first_linear_window_of_the_file(edited: Callable[..., Path]) -> None:
    window = dicom.read(case_of(edited(WindowCenter=[40, 300], WindowWidth=[80, 1500])), 2).codec.window
    assert window == (0.0, 79.0)  # PS3.3 C.11.2.1.2.1: center - 0.5 -+ (width - 1) / 2
    exact = edited(WindowCenter=40, WindowWidth=80, VOILUTFunction="LINEAR_EXACT")
    assert dicom.read(case_of(exact), 2).codec.window == (0.0, 80.0)
    for other in ({"VOILUTFunction": "SIGMOID"}, {"WindowWidth": 1}):
        path = edited(**{"WindowCenter": 40, "WindowWidth": 80} | other)
        assert dicom.read(case_of(path), 2).codec.window == (-160.0, 240.0)


def test_explicit_window_is_taken_as_it_is() -> None:
    assert dicom.read(case_of(bundled("CT_small.dcm")), 2, (-10, 90.5)).codec.window == (-10.0, 90.5)
    with pytest.raises(ValueError, match="empty"):
        dicom.read(case_of(bundled("CT_small.dcm")), 2, (5, 5))


def test_several_modalities_in_one_file_pass_no_budget_for_another(edited: Callable[..., Path]) -> None:
    path = edited(SOPClassUID=uid.SecondaryCaptureImageStorage, Modality=["MR", "PT"])
    assert reason(lambda: dicom.read(case_of(path), 2).codec.levels(Budget.parse("5 HU"))) == "unreadable"


def with_padding(dataset: Dataset) -> None:
    pixels = np.frombuffer(dataset.PixelData, "<i2").reshape(128, 128).copy()
    pixels[:40] = -2000
    dataset.PixelData = pixels.tobytes()
    dataset.Modality, dataset.SOPClassUID = "MR", uid.MRImageStorage


def test_auto_window_and_protection_leave_padding_alone(edited: Callable[..., Path]) -> None:
    path = edited(change=with_padding)
    image = dicom.read(case_of(path), 2)
    assert image.codec.window[0] > -1000 and image.codec.unit == "a.u."
    _, content, _ = protect(path, levels=7)
    assert (parse(content).pixel_array[:40] == -2000).all()
    delta = np.zeros((1, 128, 128), np.int8)
    delta[0, 0, 0] = 1
    options = {"spatial_dims": 2, "window": (-10000, 10000), "uids": UIDS, "when": WHEN}
    assert reason(lambda: [*dicom.protect(case_of(path), delta, **options)]) == "delta_outside_bounds"


@pytest.mark.parametrize(("value", "vr"), [(-2000, "SS"), (63536, "US")])
def test_padding_counts_by_its_bits(edited: Callable[..., Path], value: int, vr: str) -> None:
    path = edited(change=lambda dataset: dataset.add_new("PixelPaddingValue", vr, value))
    assert dicom.read(case_of(path), 2).codec.padding == (-2000.0, -2000.0)


def test_padding_range_includes_both_ends_in_any_order(edited: Callable[..., Path]) -> None:
    path = edited(change=lambda dataset: dataset.add_new("PixelPaddingRangeLimit", "SS", -2005))
    assert dicom.read(case_of(path), 2).codec.padding == (-2005.0, -2000.0)


def test_monochrome1_is_inverted_for_networks_only(edited: Callable[..., Path]) -> None:
    path = edited(PhotometricInterpretation="MONOCHROME1")
    image, plain = dicom.read(case_of(path), 2), dicom.read(case_of(bundled("CT_small.dcm")), 2)
    assert image.codec.inverted and np.array_equal(image.stored, plain.stored)
    _, content, delta = protect(path)
    assert np.array_equal(dicom_pixels.decode(dicom_parse.parse(content)), image.stored[0] + delta[0])
    assert parse(content).PhotometricInterpretation == "MONOCHROME1"
