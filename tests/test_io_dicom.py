# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import os
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_files import UIDS, WHEN, bundled, case_of, parse, protect, reason, refusal, rewritten
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import uid
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.tag import Tag

from monai_salm.io import dicom, dicom_parse, dicom_pixels, dicom_read, formats
from monai_salm.io.base import FileCheck, RefusedError
from monai_salm.io.kept import Kept
from monai_salm.perturbations.budget import Budget


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a bundled file with some attributes changed (None removes)."""

    def edit(name: str = "CT_small.dcm", change: Callable[[Dataset], None] | None = None, **attributes: Any) -> Path:
        dataset = pydicom.dcmread(bundled(name))
        for keyword, value in attributes.items():
            if value is None:
                del dataset[keyword]
            else:
                setattr(dataset, keyword, value)
        if change:
            change(dataset)
        path = tmp_path / "edited.dcm"
        dataset.save_as(path)
        return path

    return edit


# Reading


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


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("DICOMDIR", "unsupported_sop_class"),
        ("reportsi.dcm", "unsupported_sop_class"),
        ("image_dfl.dcm", "unsupported_transfer_syntax"),
        ("meta_missing_tsyntax.dcm", "missing_transfer_syntax"),
        ("ExplVR_LitEndNoMeta.dcm", "no_file_meta"),
        ("examples_palette.dcm", "unsupported_photometric"),
        ("SC_rgb_rle_2frame.dcm", "multi_frame"),
        ("MR_truncated.dcm", "truncated_pixel_data"),
        ("JPEG-lossy.dcm", "undecodable_pixel_data"),
        ("badVR.dcm", "unreadable"),
    ],
)
def test_bundled_file_is_refused_by_name(name: str, refused: str) -> None:
    assert refusal(bundled(name)) == refused


def overlay_in_pixels(dataset: Dataset) -> None:
    dataset.add_new(0x60000010, "US", 128)
    dataset.add_new(0x60000011, "US", 128)
    dataset.add_new(0x60000102, "US", 15)


def unsigned_12_bits_with_more(dataset: Dataset) -> None:
    dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 11, 0
    pixels = np.frombuffer(dataset.PixelData, "<u2") & 0xFFF
    dataset.PixelData = (pixels | (np.arange(pixels.size) == 5) * np.uint16(0x1000)).astype("<u2").tobytes()


def float_pixels(dataset: Dataset) -> None:
    del dataset.PixelData
    dataset.FloatPixelData = np.zeros(128 * 128, "<f4").tobytes()


def more_pixels(count: int) -> Callable[[Dataset], None]:
    """Pixel data that begin again behind their end."""

    def change(dataset: Dataset) -> None:
        dataset.PixelData += dataset.PixelData[:count]

    return change


def private_copy(dataset: Dataset) -> None:
    dataset.private_block(0x0099, "COPY", create=True).add_new(1, "OB", dataset.PixelData)


def constant(dataset: Dataset) -> None:
    dataset.PixelData = np.full(128 * 128, 900, "<i2").tobytes()


def constant_but_for_padding(dataset: Dataset) -> None:
    dataset.PixelData = np.where(np.arange(128 * 128) < 500, -2000, 900).astype("<i2").tobytes()


@pytest.mark.parametrize(
    ("refused", "attributes"),
    [
        ("unsupported_sop_class", {"SOPClassUID": uid.RTDoseStorage}),
        ("unsupported_sop_class", {"SOPClassUID": None}),
        ("multi_frame", {"SOPClassUID": uid.EnhancedCTImageStorage, "NumberOfFrames": 2}),
        ("multi_frame", {"NumberOfFrames": 2}),
        ("missing_uid", {"SOPInstanceUID": None}),
        ("missing_uid", {"StudyInstanceUID": "1.2.840.10008.1.1"}),
        ("missing_uid", {"StudyInstanceUID": "../.."}),
        ("missing_uid", {"SeriesInstanceUID": ["1.2", "1.3"]}),
        ("missing_uid", {"SOPInstanceUID": "1.2." + "3" * 61}),
        ("missing_uid", {"SOPInstanceUID": "1.2.3\x1b[1m"}),
        ("missing_pixel_data", {"PixelData": None}),
        ("unsupported_pixel_format", {"change": float_pixels}),
        ("unsupported_pixel_format", {"BitsAllocated": 32}),
        ("unsupported_pixel_format", {"BitsAllocated": 1}),
        ("unsupported_pixel_format", {"BitsStored": 17}),
        ("unsupported_pixel_format", {"HighBit": 11}),
        ("unsupported_pixel_format", {"PixelRepresentation": 2}),
        ("unsupported_photometric", {"PhotometricInterpretation": "RGB"}),
        ("unsupported_photometric", {"PhotometricInterpretation": "PALETTE COLOR"}),
        ("unsupported_photometric", {"SamplesPerPixel": 3}),
        ("embedded_overlay", {"change": overlay_in_pixels}),
        ("unused_bits_set", {"change": unsigned_12_bits_with_more}),
        ("modality_lut", {"ModalityLUTSequence": Sequence([Dataset()])}),
        ("invalid_rescale", {"RescaleSlope": 0}),
        ("pixel_copy", {"change": private_copy}),
        ("constant_image", {"change": constant}),
        ("constant_image", {"change": constant_but_for_padding}),
        ("truncated_pixel_data", {"Rows": 130}),
        ("codestream_mismatch", {"change": more_pixels(64)}),
        ("codestream_mismatch", {"change": more_pixels(1000)}),
        ("codestream_mismatch", {"change": more_pixels(32768)}),
        ("unreadable", {"Rows": None}),
        ("unreadable", {"BitsStored": None}),
        ("over_budget", {"Rows": 65535, "Columns": 65535}),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    edited: Callable[..., Path], refused: str, attributes: dict[str, Any]
) -> None:
    assert refusal(edited(**attributes)) == refused


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


def test_header_alone_tells_what_is_missing(edited: Callable[..., Path]) -> None:
    header = dicom.read_header(edited(PixelData=None))
    assert reason(lambda: dicom.check_supported(header)) == "missing_pixel_data"
    header = dicom.read_header(edited(change=float_pixels))
    assert reason(lambda: dicom.check_supported(header)) == "unsupported_pixel_format"
    header = dicom.read_header(bundled("CT_small.dcm"))
    dicom.check_supported(header)
    assert "PixelData" not in header and header.pixel_element == "PixelData"


def test_files_that_are_not_dicom_are_refused(tmp_path: Path) -> None:
    for content, refused in [
        (b"", "not_dicom"),
        (b"case,label\n" * 50, "not_dicom"),
        (b"\x08\0\5\0" * 50, "no_file_meta"),
    ]:
        (tmp_path / "file").write_bytes(content)
        assert reason(lambda: dicom.read_header(tmp_path / "file")) == refused
        assert not dicom.looks_like_dicom(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing"):
        assert reason(lambda path=path: dicom.read_header(path)) == "unreadable"
        assert reason(lambda path=path: dicom.looks_like_dicom(path)) == "unreadable"
    assert dicom.looks_like_dicom(bundled("CT_small.dcm"))


def test_deflated_body_is_not_inflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zlib

    monkeypatch.setattr(zlib, "decompress", lambda *_: pytest.fail("the body was inflated"))
    assert refusal(bundled("image_dfl.dcm")) == "unsupported_transfer_syntax"


def test_promise_of_pixels_beyond_the_encoded_data_is_refused(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(bundled("MR_small_RLE.dcm"))
    dataset.Rows, dataset.Columns = 8000, 8000
    dataset.save_as(tmp_path / "bomb.dcm")
    assert reason(lambda: dicom.read_header(tmp_path / "bomb.dcm")) == "over_budget"
    assert refusal(tmp_path / "bomb.dcm") == "over_budget"


@pytest.mark.parametrize("name", ["MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm"])
def test_codestream_of_another_size_is_refused_before_it_is_decoded(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = pydicom.dcmread(bundled(name))
    dataset.Rows, dataset.Columns = 32, 128
    dataset.save_as(tmp_path / "lying.dcm")
    monkeypatch.setattr(dicom_pixels, "pixel_array", lambda *_, **__: pytest.fail("the pixels were decoded"))
    assert refusal(tmp_path / "lying.dcm") == "codestream_mismatch"


def test_panic_of_the_rle_codec_is_a_refusal_too(tmp_path: Path) -> None:
    first, second = b"\x81\x05" * 40, b"\x81\x07" * 32  # runs of 128 bytes: the first segment is too long
    dataset = pydicom.dcmread(bundled("MR_small_RLE.dcm"))
    frame = struct.pack("<16I", 2, 64, 64 + len(first), *[0] * 13) + first + second
    dataset.PixelData = encapsulate([frame])
    dataset.save_as(tmp_path / "panic.dcm")
    assert refusal(tmp_path / "panic.dcm") == "undecodable_pixel_data"


def test_file_over_the_size_budget_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_parse, "MAX_FILE_BYTES", 1000)
    assert reason(lambda: dicom.read_header(bundled("CT_small.dcm"))) == "over_budget"
    assert refusal(bundled("CT_small.dcm")) == "over_budget"


def test_sequences_nested_thousands_deep_are_refused(tmp_path: Path) -> None:
    nested = b"".join(b"\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff" for _ in range(5000))
    content = bundled("CT_small.dcm").read_bytes()
    meta_end = 144 + pydicom.dcmread(bundled("CT_small.dcm")).file_meta.FileMetaInformationGroupLength
    (tmp_path / "deep.dcm").write_bytes(content[:meta_end] + nested)
    assert reason(lambda: dicom.read_header(tmp_path / "deep.dcm")) == "nested_too_deep"


CORPUS = [
    bundled(name).read_bytes()
    for name in ("MR_small.dcm", "MR_small_implicit.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm")
]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(CORPUS) - 1), st.lists(st.tuples(st.integers(132, 9000), st.integers(0, 255)), max_size=6))
def test_mutated_file_is_read_or_refused_and_nothing_else(
    tmp_path: Path, which: int, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(CORPUS[which])
    for position, value in changes:
        content[position % (len(content) - 132) + 132] = value
    (tmp_path / "mutated.dcm").write_bytes(content)
    try:
        dicom.check_supported(dicom.read_header(tmp_path / "mutated.dcm"))
        dicom.read(case_of(tmp_path / "mutated.dcm"), 2)
    except RefusedError as error:
        assert error.reason and "CompressedSamples" not in str(error)


def test_nothing_personal_is_said_when_a_file_is_broken(
    edited: Callable[..., Path], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    canary = "CANARY^NAME"
    path = edited(PatientName=canary)
    content = path.read_bytes().replace(b"CT_small", b"CANARY_1")
    bad_number = content.replace(pydicom.dcmread(path).RescaleSlope.original_string.encode().ljust(2), b"CA", 1)
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for broken in (content[:3000], content[:-500], bad_number, content.replace(b"DA\x08\0", b"IS\x08\0")):
            path.write_bytes(broken)
            try:
                dicom.check_supported(dicom.read_header(path))
                protect(path)
            except RefusedError as error:
                assert canary not in str(error) and error.__cause__ is None
    said = caplog.text + "".join(capfd.readouterr()) + "".join(str(item.message) for item in caught)
    assert "CANARY" not in said and "pydicom" not in said


# Windows, padding and inversion


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


# Writing


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


# Verification


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
