# SPDX-License-Identifier: Apache-2.0
"""NIfTI in and out: exact values, canonical axes, and no byte changed that is not a voxel."""

from __future__ import annotations

import gzip
import itertools
import os
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_salm.io import nifti
from monai_salm.io.base import Case, RefusedError

DATA = Path(os.environ.get("MONAI_SALM_DATA", "")) / "Task04_Hippocampus" / "imagesTr"
needs_data = pytest.mark.skipif("MONAI_SALM_DATA" not in os.environ, reason="MONAI_SALM_DATA is not set")
RAMP = np.arange(4 * 5 * 6).reshape(4, 5, 6)


def case_of(path: Path) -> Case:
    return Case("case-0", "nifti", (path,), (path.name,), "case-0")


def write(
    path: Path,
    voxels: np.ndarray,
    *,
    affine: np.ndarray | None = None,
    slope: float | None = None,
    inter: float = 0.0,
    order: str = "<",
    kind: type = nib.Nifti1Image,
    comment: bytes = b"",
) -> Path:
    """A file written byte by byte, so that stored values and scaling are exactly what the test says."""
    header = kind.header_class(endianness=order)
    header.set_data_dtype(voxels.dtype.newbyteorder(order))
    header.set_data_shape(voxels.shape)
    header["descrip"] = b"kept"
    affine = np.eye(4) if affine is None else affine
    header.set_sform(affine, code=2)
    if slope is not None:
        header["scl_slope"], header["scl_inter"] = slope, inter
    extension = b""
    if comment:
        size = 16 * ((len(comment) + 8 + 15) // 16)
        words = np.array([size, 6], dtype=f"{order}i4").tobytes()
        extension = words + comment.ljust(size - 8, b"\0")
    magic_offset = len(header.binaryblock) + 4 + len(extension)
    header["vox_offset"] = magic_offset
    flag = b"\1\0\0\0" if comment else b"\0\0\0\0"
    body = voxels.astype(voxels.dtype.newbyteorder(order)).tobytes(order="F")
    content = header.binaryblock + flag + extension + body
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def protect(path: Path, delta: np.ndarray, spatial_dims: int = 3) -> bytes:
    ((name, content),) = nifti.protect([case_of(path)], lambda _: delta, spatial_dims=spatial_dims, window="auto")
    assert str(name) == path.name
    return content


def some_delta(stored: np.ndarray) -> np.ndarray:
    """One step up in the middle of the value range, where nothing can overflow."""
    delta = np.zeros(stored.shape, dtype=np.int16)
    finite = stored[np.isfinite(stored)]
    middle = np.argsort(np.abs(stored - np.median(finite)), axis=None)[:3]
    delta.flat[middle] = 1
    return delta


def plain(content: bytes) -> bytes:
    return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content


@pytest.mark.parametrize("dtype", nifti.SUPPORTED_TYPES)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_only_moved_voxels_differ_in_the_written_file(tmp_path, dtype, order, kind, ending):
    source = write(
        tmp_path / f"a{ending}", RAMP.astype(dtype), order=order, kind=kind, slope=0.5, inter=-3, comment=b"hi"
    )
    image = nifti.read(case_of(source), 3, "auto")
    assert image.stored.dtype == np.dtype(dtype) and image.stored.dtype.isnative
    np.testing.assert_array_equal(image.stored[0], RAMP)
    assert (image.codec.slope, image.codec.intercept) == (0.5, -3)

    delta = some_delta(image.stored)
    content = protect(source, delta)
    (written := tmp_path / "out").write_bytes(content)
    before, after = plain(source.read_bytes()), plain(content)
    offset = int(kind.header_class(before[:540] if kind is nib.Nifti2Image else before[:348])["vox_offset"])
    assert len(before) == len(after) and before[:offset] == after[:offset]
    changed = np.flatnonzero(np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8))
    assert 0 < len(changed) <= 3 * np.dtype(dtype).itemsize
    check = nifti.verify(source, written, image.codec.step)
    assert check.changed == 3 and check.max_abs == pytest.approx(image.codec.step, rel=1e-4)
    np.testing.assert_array_equal(nifti.read(case_of(written), 3, "auto").stored, image.codec.add(image.stored, delta))


def test_gzip_output_carries_no_name_and_no_time(tmp_path):
    source = write(tmp_path / "a.nii.gz", RAMP.astype(np.int16))
    content = protect(source, some_delta(RAMP[None]))
    assert content[3] == 0 and content[4:8] == bytes(4)
    assert content == protect(source, some_delta(RAMP[None]))


@pytest.mark.parametrize("flips", list(itertools.product([1, -1], repeat=3)))
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_volumes_are_turned_to_ras_and_back(tmp_path, order, flips):
    affine = np.zeros((4, 4))
    for file_axis, (world, sign) in enumerate(zip(order, flips, strict=True)):
        affine[world, file_axis] = sign
    affine[3, 3] = 1
    source = write(tmp_path / "a.nii", RAMP.astype(np.int16), affine=affine)
    stored = nifti.read(case_of(source), 3, "auto").stored
    expected = nib.as_closest_canonical(nib.load(source))
    np.testing.assert_array_equal(stored[0], np.asarray(expected.dataobj))

    delta = np.zeros(stored.shape, dtype=np.int16)
    delta[0, 1, 0, 1] = 1
    (written := tmp_path / "b.nii").write_bytes(protect(source, delta))
    np.testing.assert_array_equal(nifti.read(case_of(written), 3, "auto").stored, stored + delta)


@pytest.mark.parametrize("flips", list(itertools.product([1, -1], repeat=2)))
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("singleton", [False, True])
def test_axial_slices_are_shown_as_dicom_shows_them(tmp_path, flips, swapped, singleton):
    ras = np.arange(4 * 5).reshape(4, 5)  # x to the right, y to anterior
    expected = ras.T[::-1, ::-1]  # rows from anterior to posterior, columns from the patient's right to left
    affine, voxels = np.diag([flips[0], flips[1], 1.0, 1.0]), ras[:: flips[0], :: flips[1]]
    if swapped:
        affine, voxels = affine[:, [1, 0, 2, 3]], voxels.T
    source = write(tmp_path / "a.nii", (voxels[..., None] if singleton else voxels).astype(np.int16), affine=affine)
    stored = nifti.read(case_of(source), 2, "auto").stored
    assert stored.flags.c_contiguous
    np.testing.assert_array_equal(stored[0], np.flip(ras.T, (0, 1)))
    np.testing.assert_array_equal(stored[0], expected)
    delta = np.zeros(stored.shape, dtype=np.int16)
    delta[0, 2, 1] = 1
    (written := tmp_path / "b.nii").write_bytes(protect(source, delta, 2))
    np.testing.assert_array_equal(nifti.read(case_of(written), 2, "auto").stored, stored + delta)


def test_a_slice_without_orientation_is_transposed_as_stored(tmp_path):
    source = write(tmp_path / "a.nii", RAMP[..., 0].astype(np.int16))
    content = bytearray(source.read_bytes())
    content[252:256] = bytes(4)  # both form codes
    source.write_bytes(content)
    np.testing.assert_array_equal(nifti.read(case_of(source), 2, "auto").stored[0], RAMP[..., 0].T)


@pytest.mark.parametrize("slope", [0.0, float("nan")])
def test_no_slope_means_one(tmp_path, slope):
    codec = nifti.read(case_of(write(tmp_path / "a.nii", RAMP.astype(np.int16), slope=slope, inter=7)), 3, "auto").codec
    assert (codec.slope, codec.intercept) == (1.0, 0.0)


def test_the_window_of_uint8_is_its_whole_range_in_physical_units(tmp_path):
    path = write(tmp_path / "a.nii", RAMP.astype(np.uint8), slope=-2.0, inter=10.0)
    assert nifti.read(case_of(path), 3, "auto").codec.window == (-500.0, 10.0)
    assert nifti.read(case_of(path), 3, (-100.0, 0.0)).codec.window == (-100.0, 0.0)


def test_nan_keeps_its_bits(tmp_path):
    voxels = RAMP.astype(np.float32)
    voxels.view(np.uint32)[0, 0, :3] = (0x7FC00001, 0xFFC12345, 0x7F800000)  # payloads, and infinity
    source = write(tmp_path / "a.nii", voxels)
    image = nifti.read(case_of(source), 3, "auto")
    (written := tmp_path / "b.nii").write_bytes(protect(source, some_delta(image.stored)))
    after = nifti.read(case_of(written), 3, "auto").stored
    np.testing.assert_array_equal(after.view(np.uint32)[0, 0, 0, :3], voxels.view(np.uint32)[0, 0, :3])
    assert nifti.verify(source, written, image.codec.step).changed == 3


REFUSED = {
    "5d": (np.zeros((2, 3, 4, 1, 3), np.int16), 3, "vector_image"),
    "slices_in_3d": (np.zeros((2, 3, 1, 5), np.int16), 3, "not_3d"),
    "complex": (np.zeros((2, 3, 4), np.complex64), 3, "complex_image"),
    "rgb": (np.zeros((2, 3, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")]), 3, "color_image"),
    "int64": (RAMP.astype(np.int64), 3, "unsupported_type"),
    "volume_in_2d": (RAMP.astype(np.int16), 2, "not_2d"),
    "slice_in_3d": (RAMP[..., 0].astype(np.int16), 3, "not_3d"),
    "single_slice_in_3d": (RAMP[..., :1].astype(np.int16), 3, "not_3d"),
    "constant": (np.full((2, 3, 4), 5, np.int16), 3, "constant_image"),
    "constant_uint8": (np.full((2, 3, 4), 5, np.uint8), 3, "constant_image"),
    "only_nan": (np.full((2, 3, 4), np.nan, np.float32), 3, "no_window"),
    "too_coarse": ((RAMP * 8 + 1e8).astype(np.float32), 3, "too_coarse"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_files_are_refused_by_name(tmp_path, name):
    voxels, spatial_dims, reason = REFUSED[name]
    with pytest.raises(RefusedError) as refusal:
        nifti.read(case_of(write(tmp_path / "a.nii", voxels)), spatial_dims, "auto")
    assert refusal.value.reason == reason


def test_a_volume_with_a_fourth_axis_of_one_is_a_volume(tmp_path):
    stored = nifti.read(case_of(write(tmp_path / "a.nii", RAMP[..., None].astype(np.int16))), 3, "auto").stored
    np.testing.assert_array_equal(stored[0], RAMP)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_header_that_promises_more_than_the_file_holds_is_refused_before_reading(tmp_path, ending):
    source = write(tmp_path / f"a{ending}", RAMP.astype(np.int16))
    content = bytearray(plain(source.read_bytes()))
    content[42:48] = np.array([30000, 30000, 300], dtype="<i2").tobytes()
    source.write_bytes(gzip.compress(content) if ending.endswith("gz") else bytes(content))
    with pytest.raises(RefusedError, match="truncated_file"):
        nifti.count_volumes(source, 3)


def test_truncated_and_broken_files_are_refused(tmp_path):
    source = write(tmp_path / "a.nii.gz", np.random.default_rng(0).integers(0, 999, (20, 20, 20)).astype(np.int16))
    content = source.read_bytes()
    source.write_bytes(content[:-2000])
    with pytest.raises(RefusedError, match="broken_file"):
        nifti.read(case_of(source), 3, "auto")
    source.write_bytes(gzip.compress(plain(content)[:-1]))
    with pytest.raises(RefusedError, match="truncated_file"):
        nifti.read(case_of(source), 3, "auto")
    source.write_bytes(gzip.compress(plain(content) + bytes(nifti.MAX_TRAILING_BYTES + 1)))
    with pytest.raises(RefusedError, match="trailing_data"):
        nifti.read(case_of(source), 3, "auto")


@pytest.mark.parametrize("place", ["extension", "behind the voxels"])
def test_a_file_with_room_for_another_copy_of_its_image_is_refused(tmp_path, place):
    voxels = np.random.default_rng(0).integers(0, 999, (20, 20, 20)).astype(np.int16)
    image = nib.Nifti1Image(voxels, np.eye(4))
    for size, refused in ((1000, False), (2000, True)):  # a sixteenth of 16,000 bytes is less than a KiB
        copy, image.header.extensions[:] = (b"\x07" + bytes(49)) * (size // 50) + b"\x07", []
        if place == "extension":
            image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", copy))
        path = tmp_path / f"{size}.nii"
        nib.save(image, path)
        if place != "extension":
            path.write_bytes(path.read_bytes() + copy + bytes(5000))  # zeros hold nothing
        if refused:
            with pytest.raises(RefusedError, match="embedded_preview"):
                nifti.read(case_of(path), 3, "auto")
        else:
            assert nifti.read(case_of(path), 3, "auto").stored.shape == (1, 20, 20, 20)


def test_a_gzip_file_that_is_copied_holds_nothing_but_its_content(tmp_path):
    content = gzip.compress(bytes(3 << 20), mtime=0)
    extra = content[:3] + b"\x04" + content[4:10] + (4).to_bytes(2, "little") + b"abcd" + content[10:]
    for name, packed, good in (
        ("one", content, True),
        ("zeros", content + bytes(100), True),
        ("extra", extra, False),
        ("two", content + gzip.compress(b""), False),
        ("behind", content + b"x", False),
    ):
        (tmp_path / name).write_bytes(packed)
        if good:
            nifti.check_copied(tmp_path / name, False)
        else:
            with pytest.raises(RefusedError, match="embedded_preview"):
                nifti.check_copied(tmp_path / name, False)


def test_trailing_bytes_are_kept(tmp_path):
    source = write(tmp_path / "a.nii", RAMP.astype(np.int16))
    source.write_bytes(source.read_bytes() + b"tail")
    assert protect(source, some_delta(RAMP[None])).endswith(b"tail")


@given(flipped=st.integers(0, 347 * 8 + 7))
@settings(max_examples=400, deadline=None)
def test_a_header_with_any_one_bit_flipped_is_read_or_refused(tmp_path_factory, flipped):
    source = write(tmp_path_factory.mktemp("bits") / "a.nii", RAMP.astype(np.int16), slope=2.0)
    content = bytearray(source.read_bytes())
    content[flipped // 8] ^= 1 << flipped % 8
    source.write_bytes(content)
    try:
        image = nifti.read(case_of(source), 3, "auto")
    except RefusedError:
        return
    assert image.stored.ndim == 4


@given(data=st.data(), dtype=st.sampled_from(nifti.SUPPORTED_TYPES), order=st.sampled_from("<>"))
@settings(max_examples=60, deadline=None)
def test_stored_values_of_any_type_survive_the_round_trip(tmp_path_factory, data, dtype, order):
    info = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else None
    element = st.integers(int(info.min), int(info.max)) if info else st.floats(-1e4, 1e4, width=32)
    values = np.array(data.draw(st.lists(element, min_size=8, max_size=8, unique=True)), dtype=dtype).reshape(2, 2, 2)
    folder = tmp_path_factory.mktemp("types")
    source = write(folder / "a.nii", values, order=order)
    try:
        image = nifti.read(case_of(source), 3, (float(values.min()) - 1, float(values.max()) + 1))
    except RefusedError as error:
        assert error.reason == "too_coarse"
        return
    np.testing.assert_array_equal(image.stored[0], values)
    delta = np.where(image.stored == image.stored.max(), -1, 0).astype(np.int16)
    ((_, content),) = nifti.protect([case_of(source)], lambda _: delta, spatial_dims=3, window=image.codec.window)
    (written := folder / "b.nii").write_bytes(content)
    assert nifti.verify(source, written, image.codec.step).changed == 1


def test_verify_refuses_what_was_not_declared(tmp_path):
    source = write(tmp_path / "a.nii", RAMP.astype(np.int16))
    content = protect(source, some_delta(RAMP[None]) * 3)
    written = tmp_path / "b.nii"
    written.write_bytes(content)
    nifti.verify(source, written, 3)
    with pytest.raises(RefusedError, match="moved by 3"):
        nifti.verify(source, written, 2)
    written.write_bytes(source.read_bytes())
    with pytest.raises(RefusedError, match="nothing was protected"):
        nifti.verify(source, written, 3)
    written.write_bytes(content.replace(b"kept", b"lost", 1))
    with pytest.raises(RefusedError, match="outside the voxels"):
        nifti.verify(source, written, 3)
    written.write_bytes(content[:-2])
    with pytest.raises(RefusedError, match="truncated"):
        nifti.verify(source, written, 3)


def test_a_header_and_image_pair_is_refused_by_name(tmp_path):
    nib.save(nib.Nifti1Pair(RAMP.astype(np.int16), np.eye(4)), tmp_path / "a.hdr")
    with pytest.raises(RefusedError, match="nifti_pair"):
        nifti.count_volumes(tmp_path / "a.hdr", 3)


@pytest.mark.data
@needs_data
def test_real_volumes_keep_everything_but_their_moved_voxels(tmp_path):
    for source in sorted(DATA.glob("*.nii.gz"))[:12]:
        image = nifti.read(case_of(source), 3, "auto")
        original = nib.load(source)
        canonical = nib.as_closest_canonical(original)
        np.testing.assert_array_equal(image.stored[0], np.asanyarray(canonical.dataobj.get_unscaled()))
        (written := tmp_path / source.name).write_bytes(protect(source, some_delta(image.stored)))
        copy = nib.load(written)
        assert copy.header.binaryblock == original.header.binaryblock
        np.testing.assert_array_equal(copy.affine, original.affine)
        assert nifti.verify(source, written, image.codec.step).changed == 3


@pytest.mark.parametrize("pixdim", [(0, 2, 3, 4), (-1, 2, 3, 4), (7, -2, 3, 4)])
def test_what_other_readers_repair_in_a_header_is_read_as_they_do(tmp_path, pixdim):
    """A handedness of 0 means 1 (nifti1.h), and sizes of voxels are positive."""
    image = nib.Nifti1Image(np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6), None)
    image.header.set_qform(np.array([[-2.0, 0, 0, 9], [0, 0, -4, 8], [0, 3, 0, 7], [0, 0, 0, 1]]), 1)
    content = bytearray(image.to_bytes())
    struct.pack_into("<4f", content, 76, *pixdim)
    (tmp_path / "a.nii").write_bytes(content)
    expected = nib.as_closest_canonical(nib.load(tmp_path / "a.nii"))
    case = Case("case-0", "nifti", (tmp_path / "a.nii",), ("a.nii",), "p")
    found = nifti.read(case, 3, "auto")
    assert np.array_equal(found.stored[0], np.asanyarray(expected.dataobj))
    assert np.allclose(found.spacing, expected.header.get_zooms())
