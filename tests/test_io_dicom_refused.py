# SPDX-License-Identifier: Apache-2.0
"""DICOM files that are refused: not supported, broken or hostile, and what is said of them."""

from __future__ import annotations

import logging
import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_files import bundled, case_of, protect, reason, refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence

from monai_salm.io import dicom, dicom_parse, dicom_pixels
from monai_salm.io.base import RefusedError


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
