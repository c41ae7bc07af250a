# SPDX-License-Identifier: Apache-2.0
"""PNG and TIFF: exact samples, every byte kept that is no pixel, refusals by name."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from monai_salm.io import png, raster, tiff
from monai_salm.io.base import Case, RefusedError
from monai_salm.release.folders import class_folders

WINDOW = "auto"
LEVELS = np.random.default_rng(0).integers(0, 256, (23, 17)).astype(np.uint8)


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def make_png(
    samples: np.ndarray, filters: list[int] | None = None, *, before: bytes = b"", after: bytes = b""
) -> bytes:
    """A PNG file of (H, W, C) samples, filtered byte by byte as the specification tells it."""
    height, width, count = samples.shape
    size = samples.dtype.itemsize
    color = {1: 0, 2: 4, 3: 2, 4: 6}[count]
    rows = samples.astype(samples.dtype.newbyteorder(">")).tobytes()
    step, stride = count * size, count * size * width
    packed = bytearray()
    for row in range(height):
        kind = filters[row % len(filters)] if filters else 0
        packed.append(kind)
        for at in range(stride):
            here = rows[row * stride + at]
            left = rows[row * stride + at - step] if at >= step else 0
            up = rows[(row - 1) * stride + at] if row else 0
            corner = rows[(row - 1) * stride + at - step] if row and at >= step else 0
            packed.append((here - expected(kind, left, up, corner)) % 256)
    data = zlib.compress(bytes(packed))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8 * size, color, 0, 0, 0))
    middle = chunk(b"IDAT", data[:11]) + chunk(b"IDAT", data[11:])
    return png.SIGNATURE + header + before + middle + after + chunk(b"IEND")


def expected(kind: int, left: int, up: int, corner: int) -> int:
    nearest = min((left, up, corner), key=lambda value: abs(left + up - corner - value))
    return [0, left, up, (left + up) // 2, nearest][kind]


def save(form: str, samples: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(samples).save(stream, form, **options)
    return stream.getvalue()


def case_of(path: Path) -> Case:
    return Case("case-0", raster.sniff(path.read_bytes()[:8]) or "", (path,), (f"a/{path.name}",), "g")


def some_delta(stored: np.ndarray) -> np.ndarray:
    """One step towards the middle in a quarter of the pixels."""
    delta = np.where(stored > stored.mean(), -1, 1).astype(np.int16)
    delta.reshape(-1)[np.arange(delta.size) % 4 != 0] = 0
    return delta


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def protect(source: Path) -> tuple[Path, np.ndarray]:
    """The written copy beside ``source``, and what its samples must be."""
    image = raster.read(case_of(source), 2, WINDOW)
    delta = some_delta(image.stored) * image.codec.movable(image.stored)
    ((name, content),) = raster.protect(case_of(source), delta, spatial_dims=2, window=WINDOW)
    assert name.as_posix() == f"a/{source.name}"
    written = write(source.with_name(f"protected-{source.name}"), content)
    assert raster.verify(source, written, 1).changed == np.count_nonzero(delta)
    return written, image.stored.astype(int) + delta


@given(
    data=st.data(),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4)),
    dtype=st.sampled_from([np.uint8, np.uint16]),
    filters=st.lists(st.integers(0, 4), min_size=1, max_size=5),
)
@settings(max_examples=150, deadline=None)
def test_png_samples_survive_every_filter_and_come_back_exactly(data, shape, dtype, filters):
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    samples = rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    content = make_png(samples, filters, before=chunk(b"gAMA", bytes(4)), after=chunk(b"tEXt", b"kept"))
    found = png.decode(content)
    np.testing.assert_array_equal(found.samples, samples)
    other = rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    again = png.decode(png.encode(content, other))
    np.testing.assert_array_equal(again.samples, other)
    assert again.kept == found.kept


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_only_the_pixels_of_a_png_file_change(tmp_path, wide, alpha):
    samples = LEVELS[..., None].astype(np.uint16) * 200 if wide else LEVELS[..., None]
    samples = np.concatenate([samples, samples[::-1]], axis=2) if alpha else samples
    before, after = (
        chunk(b"tEXt", b"Comment\0before") + chunk(b"pHYs", bytes(9)),
        chunk(b"eXIf", b"II*\0\x08\0\0\0" + bytes(6)),
    )
    source = write(tmp_path / "x.png", make_png(samples, [4, 1, 3], before=before, after=after))
    written, expect = protect(source)
    content = written.read_bytes()
    start = source.read_bytes().index(b"IDAT") - 4
    assert content[:start] == source.read_bytes()[:start] and content.endswith(after + chunk(b"IEND"))
    found = png.decode(content).samples
    np.testing.assert_array_equal(found[..., 0], expect[0])
    np.testing.assert_array_equal(found[..., 1:], samples[..., 1:])
    assert b"IDAT" in content and content.count(b"IDAT") == 1


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
@pytest.mark.parametrize("kind", ["L", "I;16", "LA", "rows"])
def test_only_the_pixels_of_a_tiff_file_change(tmp_path, kind, compression):
    samples = np.kron(LEVELS, np.ones((9, 9), np.uint8))
    options = {"compression": compression, "description": "kept"}
    if kind == "rows":
        options["strip_size"] = 1000
    if kind == "I;16":
        samples = samples.astype(np.uint16) * 201
    if kind == "LA":
        samples = np.stack([samples, samples[::-1]], axis=2)
    source = write(tmp_path / "x.tif", save("TIFF", samples, **options))
    written, expect = protect(source)
    shown = np.asarray(Image.open(written)).reshape(*samples.shape[:2], -1)
    np.testing.assert_array_equal(shown[..., 0], expect[0])
    np.testing.assert_array_equal(shown[..., 1:], samples.reshape(shown.shape)[..., 1:])
    tags, kept = Image.open(written).tag_v2, Image.open(source).tag_v2
    assert {key for key in kept if kept[key] != tags[key]} <= {259, 273, 279}
    if compression is None:
        differ = np.frombuffer(written.read_bytes(), np.uint8) != np.frombuffer(source.read_bytes(), np.uint8)
        assert 0 < differ.sum() <= 2 * np.count_nonzero(expect[0] - samples.reshape(*samples.shape[:2], -1)[..., 0])
    else:
        assert Image.open(written).info["compression"] == "tiff_adobe_deflate"


def make_tiff(samples: np.ndarray, order: str = ">", photometric: int = 1, extra: bytes = b"", **tags: int) -> bytes:
    """A TIFF file with one Deflate strip, its predictor applied; ``extra`` lies behind the strip, untold."""
    height, width, count = samples.shape
    predicted = samples.copy()
    predicted[:, 1:] -= samples[:, :-1]
    strip = zlib.compress(predicted.astype(samples.dtype.newbyteorder(order)).tobytes())
    fields = {256: width, 257: height, 258: 8 * samples.dtype.itemsize, 259: 8, 262: photometric, 273: 8, 277: count}
    fields |= {278: height, 279: len(strip), 317: 2} | {int(key[1:]): value for key, value in tags.items()}
    entries = [struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in sorted(fields.items())]
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(strip))
    return head + strip + directory + extra


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_differenced_tiff_rows_of_both_byte_orders_are_exact(tmp_path, order, dtype):
    samples = (LEVELS[..., None].astype(dtype) * np.array([1, 255 if dtype == np.uint16 else 1], dtype)).astype(dtype)
    source = write(tmp_path / "x.tif", make_tiff(samples, order))
    np.testing.assert_array_equal(raster.read(case_of(source), 2, WINDOW).stored[0], samples[..., 0])
    written, expect = protect(source)
    np.testing.assert_array_equal(tiff.decode(written.read_bytes()).samples[..., 0], expect[0])


def test_no_pixel_of_the_source_is_left_in_a_packed_tiff_file(tmp_path):
    source = write(tmp_path / "x.tif", make_tiff(LEVELS[..., None]))
    strip = source.read_bytes()[8:100]
    written, _ = protect(source)
    assert strip in source.read_bytes() and strip[:40] not in written.read_bytes()


def test_white_is_zero_is_an_inverted_image(tmp_path):
    source = write(tmp_path / "x.tif", make_tiff(LEVELS[..., None], photometric=0))
    assert raster.read(case_of(source), 2, WINDOW).codec.inverted


def interlaced() -> bytes:
    content = bytearray(make_png(LEVELS[..., None]))
    content[28] = 1
    return bytes(content[:29]) + struct.pack(">I", zlib.crc32(content[12:29])) + bytes(content[33:])


def preview() -> bytes:
    return chunk(b"eXIf", b"II*\0\x08\0\0\0" + bytes(2) + b"\x20\0\0\0" + bytes(20))


def damaged(content: bytes) -> bytes:
    at = content.index(b"IDAT") + 6
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def exif_with(tag: int) -> bytes:
    """An Exif block with one tag."""
    return chunk(b"eXIf", b"II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, tag, 4, 1, 8) + bytes(4))


GRAY = make_png(LEVELS[..., None])
RGB = np.stack([LEVELS] * 3, axis=2)
REFUSED = {
    "interlaced": (interlaced(), "interlaced_image"),
    "palette_png": ("P", "palette_image"),
    "one_bit": ("1", "unsupported_type"),
    "transparent": (make_png(LEVELS[..., None], before=chunk(b"tRNS", bytes(2))), "transparent_color"),
    "animated": (make_png(LEVELS[..., None], before=chunk(b"acTL", bytes(8))), "animation"),
    "unsafe_chunk": (make_png(LEVELS[..., None], before=chunk(b"iDOT", bytes(28))), "unsupported_chunk"),
    "critical_chunk": (make_png(LEVELS[..., None], before=chunk(b"CgBI", bytes(4))), "unsupported_chunk"),
    "preview": (make_png(LEVELS[..., None], before=preview()), "embedded_preview"),
    "xmp": (make_png(LEVELS[..., None], before=chunk(b"iTXt", b"<xmpGImg:image>")), "embedded_preview"),
    "packed_xmp": (
        make_png(LEVELS[..., None], before=chunk(b"iTXt", b"XML\0\1\0\0\0" + zlib.compress(b"<xmpGImg:image>"))),
        "embedded_preview",
    ),
    "long_text": (
        make_png(LEVELS[..., None], before=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21)))),
        "embedded_preview",
    ),
    "raw_profile": (
        make_png(LEVELS[..., None], before=chunk(b"tEXt", b"Raw profile type exif\0\n8\n")),
        "embedded_preview",
    ),
    "long_plain_text": (make_png(LEVELS[..., None], before=chunk(b"tEXt", b"a\0" + b"x" * 1100)), "embedded_preview"),
    "private_chunk": (make_png(LEVELS[..., None], before=chunk(b"orIg", bytes(1100))), "embedded_preview"),
    "maker_note": (make_png(LEVELS[..., None], before=exif_with(37500)), "embedded_preview"),
    "preview_in_place": (make_png(LEVELS[..., None], before=exif_with(513)), "embedded_preview"),
    "trailing": (GRAY + b"PK", "trailing_data"),
    "truncated": (GRAY[:-20], "truncated_file"),
    "checksum": (damaged(GRAY), "broken_file"),
    "constant": (make_png(np.full((4, 4, 1), 7, np.uint8)), "constant_image"),
    "jpeg_tiff": (save("TIFF", LEVELS, compression="jpeg"), "jpeg_image"),
    "packbits": (save("TIFF", LEVELS, compression="packbits"), "unsupported_compression"),
    "palette_tiff": (make_tiff(LEVELS[..., None], photometric=3), "palette_image"),
    "cmyk_tiff": (make_tiff(LEVELS[..., None], photometric=5), "unsupported_color"),
    "float_tiff": (save("TIFF", LEVELS.astype(np.float32)), "unsupported_type"),
    "planar": (make_tiff(RGB, photometric=2, t284=2), "planar_image"),
    "tiled": (make_tiff(LEVELS[..., None], t322=16), "tiled_image"),
    "sub_images": (make_tiff(LEVELS[..., None], t330=8), "embedded_preview"),
    "photoshop": (make_tiff(LEVELS[..., None], t34377=8), "embedded_preview"),
    "premultiplied": (make_tiff(RGB[..., :2], t338=1), "alpha_channel"),
    "untold": (make_tiff(LEVELS[..., None], extra=bytes([1]) * 1100), "trailing_data"),
    "big_tiff": (b"II+\0\x08\0\0\0" + bytes(64), "big_tiff"),
    "cut_tiff": (make_tiff(LEVELS[..., None])[:-30], "truncated_file"),
    "overlap": (make_tiff(LEVELS[..., None], t273=40), "broken_header"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_files_are_refused_by_name(tmp_path, name):
    content, reason = REFUSED[name]
    if isinstance(content, str):
        stream = io.BytesIO()
        Image.fromarray(LEVELS).convert(content).save(stream, "PNG")
        content = stream.getvalue()
    with pytest.raises(RefusedError) as refusal:
        raster.read(case_of(write(tmp_path / "x", content)), 2, WINDOW)
    assert refusal.value.reason == reason


def test_several_pages_are_refused(tmp_path):
    stream = io.BytesIO()
    Image.fromarray(LEVELS).save(stream, "TIFF", save_all=True, append_images=[Image.fromarray(LEVELS)])
    with pytest.raises(RefusedError, match="several_pages"):
        raster.read(case_of(write(tmp_path / "x", stream.getvalue())), 2, WINDOW)


def test_a_dicom_file_with_a_tiff_preamble_is_dicom():
    assert raster.sniff(b"II*\0".ljust(128, b"\0") + b"DICM") is None


def test_a_single_image_is_no_volume(tmp_path):
    with pytest.raises(RefusedError, match="not_3d"):
        raster.count_colors(write(tmp_path / "x.png", GRAY), 3)


def test_headers_that_promise_more_than_the_file_holds_are_refused_before_unpacking():
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50000, 50000, 8, 0, 0, 0, 0))
    lying = png.SIGNATURE + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND")
    bomb = png.SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 0, 0, 0, 0))
    bomb += chunk(b"IDAT", zlib.compress(bytes(10**7))) + chunk(b"IEND")
    tall = make_tiff(LEVELS[..., None], t257=2**31, t278=2**31)
    for content, module, reason in (
        (lying, png, "truncated_file"),
        (bomb, png, "broken_file"),
        (tall, tiff, "too_large"),
    ):
        with pytest.raises(RefusedError, match=reason):
            module.decode(content)


@given(
    at=st.integers(0, 10**6),
    bit=st.integers(0, 7),
    cut=st.integers(0, 40),
    form=st.sampled_from(["png", "tiff", "lzw"]),
)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_damaged_files_are_read_or_refused(at, bit, cut, form):
    content = bytearray(DAMAGE[form])
    content[at % len(content)] ^= 1 << bit
    del content[len(content) - cut :]
    try:
        pixels = (png if form == "png" else tiff).decode(bytes(content))
    except RefusedError:
        return
    assert pixels.samples.ndim == 3


DAMAGE = {
    "png": make_png(LEVELS[:5, :, None]),
    "tiff": make_tiff(LEVELS[..., None]),
    "lzw": save("TIFF", np.kron(LEVELS, np.ones((3, 3), np.uint8)), compression="tiff_lzw", strip_size=500),
}


def test_verify_refuses_what_was_not_declared(tmp_path):
    samples = np.stack([LEVELS, LEVELS], axis=2)
    source = write(tmp_path / "a.png", make_png(samples, before=chunk(b"tEXt", b"kept")))
    good = samples.copy()
    good[..., 0] ^= 1
    both = good ^ 1
    bad = {
        "nothing was protected": png.encode(source.read_bytes(), samples),
        "moved by 9": png.encode(source.read_bytes(), good ^ np.array([8, 0], np.uint8)),
        "alpha": png.encode(source.read_bytes(), both ^ np.array([1, 0], np.uint8)),
        "outside the pixels": make_png(good, before=chunk(b"tEXt", b"lost")),
    }
    raster.verify(source, write(tmp_path / "b.png", png.encode(source.read_bytes(), good)), 1)
    for text, content in bad.items():
        with pytest.raises(RefusedError, match=text):
            raster.verify(source, write(tmp_path / "c.png", content), 2)
    old = save("TIFF", LEVELS, compression="tiff_lzw")
    left = bytearray(tiff.encode(old, LEVELS[..., None] ^ 1))
    raster.verify(write(tmp_path / "a.tif", old), write(tmp_path / "b.tif", bytes(left)), 1)
    left[8:40] = old[8:40]
    with pytest.raises(RefusedError):
        raster.verify(tmp_path / "a.tif", write(tmp_path / "c.tif", bytes(left)), 1)


def test_text_of_pillow_is_kept(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("Title", "kept", zip=True)
    source = write(tmp_path / "x.png", save("PNG", LEVELS, pnginfo=info, dpi=(72, 72)))
    written, expect = protect(source)
    with Image.open(written) as image:
        assert image.text["Title"] == "kept" and round(image.info["dpi"][0]) == 72
        np.testing.assert_array_equal(np.asarray(image), expect[0])


@pytest.mark.parametrize(("train", "test"), [("Train", "Test"), ("training", "testing"), ("TRAIN", "test")])
def test_class_folders_know_the_usual_words_for_splits(tmp_path, train, test):
    for name in (f"{train}/benign/a.png", f"{train}/malign/b.png", f"{test}/benign/c.png", "Validation/benign/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, GRAY)
    found = {Path(row.case).stem: (row.label, row.split) for row in class_folders(tmp_path)}
    expected = {"a": "train", "b": "train", "c": "test", "d": "val"}
    assert {name: split for name, (_, split) in found.items()} == expected
    assert {label for label, _ in found.values()} == {"benign", "malign"}


@pytest.mark.parametrize("other", ["test_set", "images-test", "fold 2"])
def test_class_folders_of_an_unknown_split_are_an_error(tmp_path, other):
    for name in ("train/benign/a.png", "train/malign/b.png", f"{other}/benign/c.png", "testis/left/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, GRAY)
    with pytest.raises(ValueError, match="named like a split"):
        class_folders(tmp_path)
    (tmp_path / other / "benign" / "c.png").unlink()
    assert {row.label for row in class_folders(tmp_path)} == {"benign", "malign", "testis"}


@pytest.mark.parametrize(
    ("flat", "told"),
    [(f"{name}/c.png", "lie in no class folder") for name in ("test", "Train", "val")]
    + [(f"{name}/c.png", "named like a split") for name in ("test1", "Test set")],
)
def test_images_of_a_split_that_lie_in_no_class_folder_are_an_error(tmp_path, flat, told):
    for name in ("train/benign/a.png", "train/malign/b.png", flat):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, GRAY)
    with pytest.raises(ValueError, match=told):
        class_folders(tmp_path)


def test_class_folders_tell_labels_and_splits(tmp_path):
    for name in ("train/benign/a.png", "train/malign/b/c.tif", "test/benign/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, GRAY if name.endswith("png") else make_tiff(LEVELS[..., None]))
    (tmp_path / "train" / "notes.txt").write_text("no image")
    rows = class_folders(tmp_path)
    assert [(row.case, row.label, row.split) for row in rows] == [
        ("test/benign/d.png", "benign", "test"),
        ("train/benign/a.png", "benign", "train"),
        ("train/malign/b/c.tif", "malign", "train"),
    ]
    stray = write(tmp_path / "stray.png", GRAY)
    assert class_folders(tmp_path) is None
    stray.unlink()
    (tmp_path / "test" / "slice").write_bytes(bytes(128) + b"DICM")
    assert class_folders(tmp_path) is None, "previews beside DICOM files are no data set of their own"
