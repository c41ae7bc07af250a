# SPDX-License-Identifier: Apache-2.0
"""A copy of the image in another element is refused; what makers write of their own is not."""

from __future__ import annotations

import base64
import gzip
import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import bundled, edited, protect, reason, refusal, write_enhanced
from PIL import Image
from pydicom import uid
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels import get_encoder
from pydicom.sequence import Sequence
from pydicom.tag import Tag

from monai_salm.io import dicom
from monai_salm.io.base import RefusedError
from monai_salm.io.dicom_parse import holds_pixels, parse

NOISE = np.random.default_rng(0)


def plane(dataset: Dataset) -> np.ndarray:
    """Its stored values as unsigned integers of 12 bits."""
    return (dataset.pixel_array.astype(int) & 0xFFF).astype("<u2")


def raw(dataset: Dataset) -> bytes:
    return bytes(dataset.PixelData)


def eight_bits(dataset: Dataset) -> bytes:
    return (plane(dataset) >> 4).astype(np.uint8).tobytes()


def encoded(syntax: str) -> Callable[[Dataset], bytes]:
    def encode(dataset: Dataset) -> bytes:
        values = plane(dataset)
        frame = get_encoder(uid.UID(syntax)).encode(
            values,
            encoding_plugin="pyjpegls" if syntax == uid.JPEGLSLossless else "pylibjpeg",
            rows=values.shape[0],
            columns=values.shape[1],
            samples_per_pixel=1,
            number_of_frames=1,
            bits_allocated=16,
            bits_stored=12,
            pixel_representation=0,
            photometric_interpretation="MONOCHROME2",
            pixel_keyword="PixelData",
        )
        return bytes(frame)

    return encode


def picture(form: str, **options: int) -> Callable[[Dataset], bytes]:
    def encode(dataset: Dataset) -> bytes:
        file = io.BytesIO()
        Image.fromarray(np.frombuffer(eight_bits(dataset), np.uint8).reshape(128, 128)).save(file, form, **options)
        return file.getvalue()

    return encode


def whole_file(dataset: Dataset) -> bytes:
    file = io.BytesIO()
    pydicom.dcmread(bundled("MR_small_jp2klossless.dcm")).save_as(file)
    return file.getvalue()


def zipped(dataset: Dataset) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", raw(dataset))
    return file.getvalue()


def as_items(frame: Callable[[Dataset], bytes], frames: int = 1, *, table: bool = False) -> Callable[[Dataset], bytes]:
    """As encapsulated pixel data are."""

    def encode(dataset: Dataset) -> bytes:
        value = frame(dataset)
        value += bytes(len(value) % 2)
        offsets = struct.pack(f"<{frames}L", *range(0, frames * (len(value) + 8), len(value) + 8)) if table else b""
        items = [offsets, *[value] * frames]
        return b"".join(b"\xfe\xff\0\xe0" + struct.pack("<L", len(item)) + item for item in items)

    return encode


COPIES: dict[str, Callable[[Dataset], bytes]] = {
    "as it is": raw,
    "8 bits": eight_bits,
    "behind a header": lambda dataset: b"header of its own" + raw(dataset) + b"\0",
    "JPEG": picture("JPEG", quality=98),
    "PNG": picture("PNG"),
    "TIFF": picture("TIFF"),
    "JPEG-LS": encoded(uid.JPEGLSLossless),
    "JPEG 2000": encoded(uid.JPEG2000Lossless),
    "RLE": encoded(uid.RLELossless),
    "JPEG 2000 in items": as_items(encoded(uid.JPEG2000Lossless)),
    "RLE in items": as_items(encoded(uid.RLELossless)),
    **{
        f"{frames} JPEG in items with offsets": as_items(picture("JPEG", quality=98), frames, table=True)
        for frames in (2, 3, 4)
    },
    "DICOM file": whole_file,
    "zlib": lambda dataset: zlib.compress(raw(dataset), 9),
    "gzip": lambda dataset: gzip.compress(raw(dataset)),
    "gzip of two members": lambda dataset: gzip.compress(b"x") + gzip.compress(raw(dataset)),
    "gzip behind its length": lambda dataset: struct.pack("<L", 9999) + gzip.compress(raw(dataset)),
    "zip": zipped,
    "base64": lambda dataset: base64.encodebytes(raw(dataset)),
    "base64 of 8 bits": lambda dataset: b"xxxxx" + base64.b64encode(eight_bits(dataset)),
    "base64 of JPEG": lambda dataset: base64.b64encode(picture("JPEG", quality=98)(dataset)),
    "base64 of JPEG for URLs": lambda dataset: base64.urlsafe_b64encode(picture("JPEG", quality=98)(dataset)),
    "hexadecimal text": lambda dataset: raw(dataset).hex().encode(),
    "hexadecimal text of JPEG": lambda dataset: picture("JPEG", quality=98)(dataset).hex().encode(),
    "base64 of gzip": lambda dataset: base64.b64encode(gzip.compress(raw(dataset))),
}


def in_private(dataset: Dataset, *values: bytes) -> None:
    block = dataset.private_block(0x0071, "VENDOR", create=True)
    for number, value in enumerate(values):
        block.add_new(number + 1, "OB", value)


def in_unknown(dataset: Dataset, *values: bytes) -> None:
    block = dataset.private_block(0x0071, "VENDOR", create=True)
    for number, value in enumerate(values):
        block.add_new(number + 1, "UN", value)


def in_items(dataset: Dataset, *values: bytes) -> None:
    items = [Dataset() for _ in values]
    for item, value in zip(items, values, strict=True):
        in_private(item, value)
    dataset.private_block(0x0071, "VENDOR", create=True).add_new(0x10, "SQ", Sequence(items))


def in_items_of_an_unknown_type(dataset: Dataset, *values: bytes) -> None:
    content = b""
    for value in values:
        element = struct.pack("<HHL", 0x0071, 0x1001, len(value)) + value
        content += b"\xfe\xff\0\xe0" + struct.pack("<L", len(element)) + element
    in_unknown(dataset, content)


def in_comments(dataset: Dataset, *values: bytes) -> None:
    (value,) = values
    dataset.add_new("ImageComments", "UN", value)


def in_what_checks_read(dataset: Dataset, *values: bytes) -> None:
    (value,) = values
    tag = Tag("PixelPresentation")
    dataset[tag] = RawDataElement(tag, "CS", len(value), value, 0, False, True)


def in_an_item_that_checks_read(dataset: Dataset, *values: bytes) -> None:
    item = Dataset()
    (value,) = values
    item.add_new("Manufacturer", "UN", value)
    dataset.ContributingEquipmentSequence = [item]


@pytest.mark.parametrize("where", [in_private, in_unknown, in_items, in_items_of_an_unknown_type])
@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_refused(tmp_path: Path, kind: str, where: Callable[..., None]) -> None:
    path = edited(tmp_path / "a.dcm", lambda dataset: where(dataset, COPIES[kind](dataset)))
    assert refusal(path) == "pixel_copy"
    if kind != "behind a header" and where in (in_private, in_unknown):
        assert reason(lambda: dicom.check_supported(dicom.read_scan_header(path))) == "pixel_copy", "without its pixels"


@pytest.mark.parametrize("where", [in_what_checks_read, in_an_item_that_checks_read])
def test_a_copy_is_refused_where_a_check_reads_it_as_text(tmp_path: Path, where: Callable[..., None]) -> None:
    path = edited(tmp_path / "a.dcm", lambda dataset: where(dataset, dataset.PixelData))
    assert refusal(path) == "pixel_copy"


@pytest.mark.parametrize("kind", [kind for kind in COPIES if "8 bits" not in kind or "base64" in kind])
def test_a_copy_is_refused_in_a_standard_element_too(tmp_path: Path, kind: str) -> None:
    path = edited(tmp_path / "a.dcm", lambda dataset: in_comments(dataset, COPIES[kind](dataset)))
    assert refusal(path) == "pixel_copy"


@pytest.mark.parametrize("name", ["MR_small_implicit.dcm", "MR_small_bigendian.dcm"])
@pytest.mark.parametrize("where", [in_private, in_items])
def test_a_copy_is_refused_however_the_file_is_encoded(tmp_path: Path, name: str, where: Callable[..., None]) -> None:
    copy = bytes(NOISE.integers(0, 256, 64 * 64 * 2, np.uint8))
    dataset = pydicom.dcmread(bundled(name))
    where(dataset, copy)
    syntax = dataset.file_meta.TransferSyntaxUID
    dataset.save_as(tmp_path / "a.dcm", implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
    assert refusal(tmp_path / "a.dcm") == "pixel_copy"


@pytest.mark.parametrize("parts", [2, 4, 128])
@pytest.mark.parametrize("where", [in_private, in_items])
@pytest.mark.parametrize("content", [raw, eight_bits])
def test_a_copy_in_parts_is_refused(
    tmp_path: Path, content: Callable[[Dataset], bytes], where: Callable[..., None], parts: int
) -> None:
    def change(dataset: Dataset) -> None:
        value = content(dataset)
        where(dataset, *(value[at : at + len(value) // parts] for at in range(0, len(value), len(value) // parts)))

    assert refusal(edited(tmp_path / "a.dcm", change)) == "pixel_copy"


@pytest.mark.parametrize("name", ["MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm"])
@pytest.mark.parametrize("native", [True, False])
def test_a_copy_behind_a_header_is_found_in_compressed_files_too(tmp_path: Path, name: str, native: bool) -> None:
    def change(dataset: Dataset) -> None:
        value = dataset.pixel_array.tobytes() if native else bytes(dataset.PixelData)
        in_private(dataset, b"header " + value)

    assert refusal(edited(tmp_path / "a.dcm", change, name)) == "pixel_copy"


@pytest.mark.parametrize("frames", [1, 5])
def test_a_frame_and_all_frames_are_copies(tmp_path: Path, frames: int) -> None:
    def change(dataset: Dataset) -> None:
        dataset.Rows, dataset.Columns = 64, 64
        dataset.PixelData = bytes(NOISE.integers(0, 16, 5 * 64 * 64 * 2, np.uint8))
        in_private(dataset, dataset.PixelData[: frames * 64 * 64 * 2])

    path = write_enhanced(tmp_path / "a.dcm", change=change)
    assert reason(lambda: dicom.check_supported(parse(path.read_bytes()))) == "pixel_copy"


def dark(dataset: Dataset) -> None:
    """Values whose lower bytes are all letters and digits."""
    values = NOISE.normal(80, 15, (128, 128)).clip(48, 122).astype("<u2")
    dataset.PixelData, dataset.PixelRepresentation = values.tobytes(), 0


@pytest.mark.parametrize("pack", [zlib.compress, gzip.compress])
@pytest.mark.parametrize("content", [raw, lambda dataset: dataset.pixel_array.astype(np.uint8).tobytes()])
def test_a_packed_copy_of_values_that_look_like_text_is_refused(
    tmp_path: Path, content: Callable[[Dataset], bytes], pack: Callable[[bytes], bytes]
) -> None:
    def change(dataset: Dataset) -> None:
        dark(dataset)
        in_private(dataset, pack(content(dataset)))

    assert refusal(edited(tmp_path / "a.dcm", change)) == "pixel_copy"


TURNS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as it is": lambda values: values,
    "inverted": lambda values: 127 - values,
    "upside down": lambda values: values[::-1],
    "from its end": lambda values: values[::-1, ::-1],
    "transposed": lambda values: values.T,
}


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("kind", ["u1", "<u2", ">u2", "<i4", "<f4", "<f8"])
@pytest.mark.parametrize("turn", TURNS)
def test_what_is_like_the_picture_is_refused_even_as_text(tmp_path: Path, turn: str, kind: str, parts: int) -> None:
    def change(dataset: Dataset) -> None:
        dark(dataset)
        value = TURNS[turn](dataset.pixel_array.astype(int)).astype(kind).tobytes()
        in_private(
            dataset,
            *(
                value[at::parts] if turn == "transposed" else value[at * len(value) // parts :][: len(value) // parts]
                for at in range(parts)
            ),
        )

    assert refusal(edited(tmp_path / "a.dcm", change)) == "pixel_copy"


def protocol(size: int) -> bytes:
    """As GE writes it: text, packed, behind its length."""
    lines = "".join(
        f'set ENTRY{number} "Schädel {value}"\n' for number, value in enumerate(NOISE.integers(0, 9e9, size))
    )
    packed = gzip.compress(lines.encode())
    return struct.pack("<L", len(packed)) + packed


OWN: dict[str, bytes] = {
    "header of Siemens": b"SV10\4\3\2\1" + bytes(NOISE.integers(0, 256, 100_000, np.uint8)),
    "packed protocol": protocol(4000),
    "packed numbers": zlib.compress(bytes(NOISE.integers(0, 256, 6000, np.uint8))),
    "what only begins like zlib": b"\x78\x9c" + bytes(NOISE.integers(0, 256, 20_000, np.uint8)),
    "text": b"This is a finding, in words. " * 1000,
    "spaces": b" " * 100_000,
    "zeros, as many as there are pixels": bytes(128 * 128),
    "short base64": base64.b64encode(bytes(NOISE.integers(0, 256, 6000, np.uint8))),
    "table": np.linspace(0, 1, 3000).astype("<f8").tobytes(),
}


@pytest.mark.parametrize("where", [in_private, in_unknown, in_items, in_comments])
@pytest.mark.parametrize("kind", OWN)
def test_what_makers_write_stays(tmp_path: Path, kind: str, where: Callable[..., None]) -> None:
    path = edited(tmp_path / "a.dcm", lambda dataset: where(dataset, OWN[kind]))
    _, content, _ = protect(path)
    assert OWN[kind] in content and dicom.verify(path, content, 1).changed > 0


SMALL: dict[str, list[bytes]] = {
    "zeros": [bytes(2048)] * 2,
    "larger zeros": [bytes(4096)] * 2,
    "blanks": [b" " * 1024] * 4,
    "names": [f"protocol name {number:02}".ljust(64).encode() for number in range(64)],
    "one table of doubles": [np.linspace(0, 1, 512).astype("<f8").tobytes()],
    "two tables of floats": [np.linspace(0, end, 1024).astype("<f4").tobytes() for end in (1, 2)],
    "two tables of integers": [np.linspace(0, end, 1024).astype("<u2").tobytes() for end in (100, 4095)],
}


@pytest.mark.parametrize("kind", SMALL)
def test_what_is_as_long_as_a_small_picture_and_unlike_it_stays(tmp_path: Path, kind: str) -> None:
    path = edited(tmp_path / "a.dcm", lambda dataset: in_private(dataset, *SMALL[kind]), "MR_small.dcm")
    dicom.check_supported(dicom.read_scan_header(path))
    _, content, _ = protect(path)
    assert all(value in content for value in SMALL[kind])


def test_the_packed_protocol_is_long_enough_to_be_looked_at() -> None:
    assert len(OWN["packed protocol"]) > 4096 and len(gzip.decompress(OWN["packed protocol"][4:])) > 128 * 128


def test_sequences_of_an_unknown_type_are_not_followed_without_end(tmp_path: Path) -> None:
    value = bytes(5000)
    for _ in range(40):
        element = struct.pack("<HHL", 0x0071, 0x1001, len(value)) + value
        value = b"\xfe\xff\0\xe0" + struct.pack("<L", len(element)) + element
    path = edited(tmp_path / "a.dcm", lambda dataset: in_unknown(dataset, value))
    assert refusal(path) == "nested_too_deep"


def test_the_refusal_names_an_element_that_is_in_the_file(tmp_path: Path) -> None:
    copy = as_items(picture("JPEG", quality=98), 2, table=True)
    path = edited(tmp_path / "a.dcm", lambda dataset: in_unknown(dataset, copy(dataset)))
    with pytest.raises(RefusedError, match=r"element \(0071,1001\) begins as an image file"):
        dicom.check_supported(dicom.read_header(path))


def test_the_refusal_says_which_element(tmp_path: Path) -> None:
    path = edited(tmp_path / "a.dcm", lambda dataset: in_private(dataset, eight_bits(dataset)))
    with pytest.raises(RefusedError, match=r"element \(0071,1001\) is as long as the pixels.*; remove it first"):
        dicom.check_supported(dicom.read_header(path))


def test_pixel_data_that_hold_the_bytes_of_their_own_tag_are_no_sequence(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(bundled("MR_small_RLE.dcm"))
    dataset.PixelData = encapsulate([b"\0\0\xe0\x7f\x10\0\0\0"])
    dataset.save_as(tmp_path / "a.dcm")
    assert not holds_pixels(parse((tmp_path / "a.dcm").read_bytes()))
