# SPDX-License-Identifier: Apache-2.0
"""NIfTI label files: class indices on the image's grid, or a reason that says what does not fit."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from exports import class_map, write_label, write_nifti
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_salm.io import formats, masks, worker
from monai_salm.io.base import Case, Mask, RefusedError
from monai_salm.io.masks import read_mask

SHAPE = (6, 7, 5)
AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])


def pair(image: Path, label: Path, values: tuple[int, ...] = (0, 1, 2)) -> Case:
    mask = Mask(label, label.name, values)
    return Case("case-0", "nifti", (image,), (image.name,), "p", mask=mask)


def refused(case: Case, reason: str, *words: str, spatial_dims: int = 3) -> None:
    with pytest.raises(RefusedError) as error:
        read_mask(case, spatial_dims)
    assert error.value.reason == reason
    for word in words:
        assert word in error.value.detail, error.value.detail


@pytest.fixture
def image(tmp_path) -> Path:
    return write_nifti(tmp_path / "image.nii.gz")


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "int64", "uint64", "float32", "float64"])
def test_a_label_of_any_type_becomes_class_indices(tmp_path, image, dtype):
    voxels = class_map()
    label = write_label(tmp_path / "label.nii", voxels * 4)
    nib.save(nib.Nifti1Image((voxels * 4).astype(dtype), AFFINE, dtype=dtype), label)
    found = read_mask(pair(image, label, (0, 4, 8)), 3)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, voxels[None])


@pytest.mark.parametrize(
    ("times", "slope", "intercept", "values"),
    [(1, 3, 0, (0, 3, 6)), (127, 1 / 127, 0, (0, 1, 2)), (10, 0.1, 0, (0, 1, 2)), (1, 7, 900.0, (900, 907, 914))],
)
def test_scaled_label_values_count_after_scaling(tmp_path, image, times, slope, intercept, values):
    label = write_label(tmp_path / "label.nii", class_map() * np.uint8(times))
    content = bytearray(label.read_bytes())
    content[112:120] = np.array([slope, intercept], "<f4").tobytes()  # scl_slope, scl_inter
    label.write_bytes(content)
    np.testing.assert_array_equal(read_mask(pair(image, label, values), 3), class_map()[None])


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint32])
def test_labels_that_were_saved_from_floats_are_whole_again(tmp_path, image, dtype):
    """nibabel gives them a slope of their own, of about the largest value / 2**32 for 32 bits."""
    made = nib.Nifti1Image(class_map().astype(np.float64), AFFINE)
    made.set_data_dtype(dtype)
    nib.save(made, tmp_path / "label.nii")
    np.testing.assert_array_equal(read_mask(pair(image, tmp_path / "label.nii"), 3), class_map()[None])


def test_a_value_below_zero_is_no_class_that_the_file_lacks(tmp_path, image):
    voxels = class_map().astype(np.int16)
    voxels[0, 0, 0] = -1
    label = write_label(tmp_path / "label.nii", voxels)
    refused(pair(image, label, (0, 1, 2, -1)), "unknown_label_value", "-1 (1 voxels)", "names 0, 1, 2;")


def test_scaled_values_between_whole_numbers_stay_fractions(tmp_path, image):
    label = write_label(tmp_path / "label.nii", class_map() * np.uint8(100))
    content = bytearray(label.read_bytes())
    content[112:120] = np.array([0.010001, 0], "<f4").tobytes()
    label.write_bytes(content)
    refused(pair(image, label), "mask_is_image", "no integers")


@pytest.mark.parametrize(
    ("dtype", "slope", "intercept", "words"),
    [("int16", 1e-3, 5e6, "no integers"), ("int16", 1e-12, 5e6, "values of 192"), ("float32", 1, 1, "1 values of 192")],
)
def test_an_image_is_no_label_by_its_scaling(tmp_path, image, dtype, slope, intercept, words):
    values = np.random.default_rng(0).integers(1, 1000, SHAPE)
    voxels = (values * (1e-10 if dtype == "float32" else 1)).astype(dtype)
    label = write_label(tmp_path / "label.nii", voxels)
    content = bytearray(label.read_bytes())
    content[112:120] = np.array([slope, intercept], "<f4").tobytes()
    label.write_bytes(content)
    refused(pair(image, label, (int(intercept), int(intercept) + 1)), "mask_is_image", words)


@settings(max_examples=30, deadline=None)
@given(codes=st.permutations("xyz"), signs=st.tuples(*[st.booleans()] * 3), seed=st.integers(0, 9))
def test_label_and_image_are_turned_to_canonical_axes_alike(tmp_path_factory, codes, signs, seed):
    folder = tmp_path_factory.mktemp("axes")
    names = {"x": "LR", "y": "PA", "z": "IS"}
    target = nib.orientations.axcodes2ornt([names[c][sign] for c, sign in zip(codes, signs, strict=True)])
    voxels = class_map(SHAPE, seed)
    change = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), target)
    for name, values in (("image", voxels.astype(np.int16)), ("label", voxels)):
        nib.save(nib.Nifti1Image(values, AFFINE).as_reoriented(change), folder / f"{name}.nii")
    case = pair(folder / "image.nii", folder / "label.nii")
    np.testing.assert_array_equal(read_mask(case, 3), voxels[None])
    stored = formats.read(case, 3)
    np.testing.assert_array_equal(stored.stored, voxels[None])
    assert stored.spacing == (1.0, 1.0, 2.0)


ORIENTATIONS = st.tuples(st.permutations(range(3)), st.tuples(*[st.sampled_from([-1, 1])] * 3))


@settings(max_examples=60, deadline=None)
@given(
    image=ORIENTATIONS,
    label=ORIENTATIONS,
    plane=st.sampled_from([None, 0, 1, 2]),
    angle=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 9),
)
def test_a_label_stored_in_another_orientation_fits_voxel_by_voxel(tmp_path_factory, image, label, plane, angle, seed):
    """nibabel turns both; a voxel's place in the world then tells its class."""
    folder = tmp_path_factory.mktemp("turned")
    shape = tuple(1 if axis == plane else size for axis, size in enumerate(SHAPE))
    truth, affine = class_map(shape, seed), AFFINE.copy()
    turn = [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    affine[:3] = np.array(turn) @ AFFINE[:3]
    affine[:3, 3] = -20.25, 8.5, 3.125
    for name, (order, signs) in (("image", image), ("label", label)):
        values = truth.astype(np.int16) if name == "image" else truth
        turned = nib.Nifti1Image(values, affine).as_reoriented(np.stack([order, signs], 1).astype(float))
        if plane is not None:  # a slice has its flat axis last
            flat = turned.shape.index(1)
            last = [2 if axis == flat else axis - (axis > flat) for axis in range(3)]
            turned = turned.as_reoriented(np.stack([last, np.ones(3)], 1))
        nib.save(turned, folder / f"{name}.nii")
    case, dims = pair(folder / "image.nii", folder / "label.nii"), 3 if plane is None else 2
    found = read_mask(case, dims)
    np.testing.assert_array_equal(found, formats.read(case, dims).stored)
    if plane is None:
        np.testing.assert_array_equal(found, truth[None])


def test_a_label_of_another_shape_is_refused_with_both_shapes(tmp_path, image):
    label = write_label(tmp_path / "label.nii", class_map((6, 7, 4)))
    refused(pair(image, label), "mask_shape", "(6, 7, 5)", "(6, 7, 4)", "resample the label")


@pytest.mark.parametrize(
    ("change", "distance", "same_axes"),
    [
        ({(0, 3): 2.5}, "2.5 mm", True),
        ({(0, 3): 0.02}, "0.02 mm", True),
        ({(2, 2): 2.5}, "2 mm", True),
        ({(0, 0): -1.0}, "5 mm", False),
    ],
)
def test_a_label_of_another_affine_is_refused_with_the_distance(tmp_path, image, change, distance, same_axes):
    affine = AFFINE.copy()
    for index, value in change.items():
        affine[index] = value
    label = write_label(tmp_path / "label.nii", class_map(), affine)
    refused(pair(image, label), "mask_affine", distance, "0.01 mm are tolerated", "resample")
    with pytest.raises(RefusedError) as error:
        read_mask(pair(image, label), 3)
    assert ("copy the image's affine" in error.value.detail) == same_axes, "else it would mirror the labels"


def test_affines_that_differ_by_rounding_agree(tmp_path, image):
    affine = AFFINE.copy()
    affine[:3, 3] = 5e-3
    read_mask(pair(image, write_label(tmp_path / "label.nii", class_map(), affine)), 3)


def test_a_qform_agrees_with_an_sform_of_the_same_grid(tmp_path):
    angle = 0.3
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine[:3, 3] = -120.25, 80.5, 33.125
    voxels = class_map()
    nib.save(nib.Nifti1Image(voxels.astype(np.int16), affine), tmp_path / "image.nii")
    label = nib.Nifti1Image(voxels, affine)
    label.set_sform(None, 0)
    label.set_qform(affine, 1)
    nib.save(label, tmp_path / "label.nii")
    read_mask(pair(tmp_path / "image.nii", tmp_path / "label.nii"), 3)


@pytest.mark.parametrize("degrees", [45, 44.999999, -45, 135])
def test_equal_transforms_agree_where_the_nearest_axis_is_undecided(tmp_path, degrees):
    affine, angle = AFFINE.copy(), np.deg2rad(degrees)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    for name, voxels in (("image", class_map().astype(np.int16)), ("label", class_map())):
        written = nib.Nifti1Image(voxels, affine)
        written.set_sform(affine, 1)
        if name == "image":
            written.set_qform(affine, 1)
        nib.save(written, tmp_path / f"{name}.nii")
    read_mask(pair(tmp_path / "image.nii", tmp_path / "label.nii"), 3)


def test_a_label_that_its_header_turns_to_other_axes_is_told_so(tmp_path):
    """By the rounded numbers of a qform, the nearest axis of a volume that lies at 135 degrees may be another one."""
    affine, angle = AFFINE.copy(), np.deg2rad(135)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    nib.save(nib.Nifti1Image(class_map().astype(np.int16), affine), tmp_path / "image.nii")
    label = nib.Nifti1Image(class_map(), affine)
    label.set_sform(None, 0)
    label.set_qform(affine, 1)
    nib.save(label, tmp_path / "label.nii")
    refused(pair(tmp_path / "image.nii", tmp_path / "label.nii"), "mask_shape", "turn the axes", "header of its image")


@pytest.mark.parametrize("angle", [0.2, np.pi / 2])
@pytest.mark.parametrize("codes", [(1, 1), (2, 1), (4, 1), (1, 4)])
@pytest.mark.parametrize("torn", ["image", "label"])
def test_a_sform_may_be_turned_against_the_qform_but_not_to_other_axes(tmp_path, angle, codes, torn):
    """The other file was written by a tool that follows either."""
    other = AFFINE.copy()
    other[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    for name, voxels in (("image", class_map().astype(np.int16)), ("label", class_map())):
        written = nib.Nifti1Image(voxels, AFFINE)
        written.set_sform(AFFINE, codes[0])
        written.set_qform(other if name == torn else AFFINE, codes[1])
        nib.save(written, tmp_path / f"{name}.nii")
    case = pair(tmp_path / "image.nii", tmp_path / "label.nii")
    if angle < 1:
        np.testing.assert_array_equal(read_mask(case, 3), class_map()[None])
    else:
        refused(case, "mask_orientation", f"of the {torn} contradict", "RAS and ", "header of its image")


def test_a_label_with_the_header_of_its_image_fits_whatever_that_says(tmp_path):
    image = nib.Nifti1Image(class_map().astype(np.int16), AFFINE)
    image.set_qform(np.diag([-1, 1, 2, 1]), 1)
    nib.save(image, tmp_path / "image.nii")
    nib.save(nib.Nifti1Image(class_map(), None, image.header), tmp_path / "label.nii")
    case = pair(tmp_path / "image.nii", tmp_path / "label.nii")
    np.testing.assert_array_equal(read_mask(case, 3), class_map()[None])


def test_a_label_without_orientation_does_not_fit_an_image_with_one(tmp_path, image):
    label = nib.Nifti1Image(class_map(), None)
    label.header.set_zooms((1, 1, 2))
    nib.save(label, tmp_path / "label.nii")
    refused(pair(image, tmp_path / "label.nii"), "mask_affine")


def test_units_other_than_mm_are_converted(tmp_path):
    voxels = nib.Nifti1Image(class_map().astype(np.int16), np.diag([1000.0, 1000.0, 2000.0, 1.0]))
    voxels.header.set_xyzt_units("micron")
    nib.save(voxels, tmp_path / "image.nii")
    case = pair(tmp_path / "image.nii", write_label(tmp_path / "label.nii", class_map()))
    assert formats.read(case, 3).spacing == pytest.approx((1.0, 1.0, 2.0))
    read_mask(case, 3)


def test_a_value_that_is_not_listed_is_refused_with_its_count(tmp_path, image):
    voxels = class_map()
    voxels[0, 0, :3] = 7
    refused(
        pair(image, write_label(tmp_path / "label.nii", voxels)),
        "unknown_label_value",
        "7 (3 voxels)",
        "names 0, 1, 2",
        "dataset.json",
    )


@pytest.mark.parametrize(
    ("value", "reason", "words"),
    [
        (0.5, "mask_is_image", "1 voxels of the label are no integers"),
        (np.nan, "unknown_label_value", "1 voxels of the label are not finite"),
        (np.inf, "unknown_label_value", "1 voxels of the label are not finite"),
    ],
)
def test_a_label_with_fractions_is_taken_for_an_image(tmp_path, image, value, reason, words):
    voxels = class_map().astype(np.float32)
    voxels[0, 0, 0] = value
    refused(pair(image, write_label(tmp_path / "label.nii", voxels)), reason, words)


def test_a_label_of_several_volumes_is_refused_with_what_to_do(tmp_path, image):
    label = write_label(tmp_path / "label.nii", np.stack([class_map(), class_map()], -1))
    refused(pair(image, label), "multi_volume", "2 volumes", "split it", "one-hot")


def test_an_image_as_label_is_refused(tmp_path, image):
    other = write_nifti(tmp_path / "other.nii", 1)
    refused(pair(image, other), "mask_is_image", "distinct values")
    refused(pair(image, image), "mask_is_image", "one file")
    with pytest.raises(RefusedError, match="mask_is_image"):
        masks.label_values(other)


def test_a_label_as_image_is_told_from_an_image():
    mask = Mask(Path("l"), "l", (0, 1, 2, -1))
    with pytest.raises(RefusedError, match="mask_is_image"):
        masks.check_image(class_map()[None].astype(np.float32), mask)
    masks.check_image(class_map(classes=4)[None], mask)
    masks.check_image(np.array([[-1, 0]]), mask)


@pytest.mark.parametrize("content", [b"", b"not an image", bytes(400)])
def test_a_label_file_of_another_kind_is_refused(tmp_path, image, content):
    (tmp_path / "label.nii").write_bytes(content)
    refused(pair(image, tmp_path / "label.nii"), "mask_format", "convert")


def test_a_truncated_label_file_is_refused(tmp_path, image):
    label = write_label(tmp_path / "label.nii", class_map())
    label.write_bytes(label.read_bytes()[:-10])
    refused(pair(image, label), "truncated_file")


def test_label_values_are_remembered_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(worker._Child, "inside", True)  # else it is the child that reads and remembers
    label = write_label(tmp_path / "label.nii", class_map())
    assert masks.label_values(label) == (0, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(masks.nifti, "read_labels", lambda *_: pytest.fail("read again"))
        assert masks.label_values(label) == (0, 1, 2)
    write_label(label, class_map(SHAPE, classes=5).astype(np.int16))
    assert masks.label_values(label) == (0, 1, 2, 3, 4)


def test_a_slice_and_its_label_of_shape_h_w_1_agree(tmp_path):
    image = write_nifti(tmp_path / "image.nii", shape=(6, 7))
    voxels = class_map((6, 7, 1))
    label = write_label(tmp_path / "label.nii", voxels, nib.load(image).affine)
    case = pair(image, label)
    found = read_mask(case, 2)
    assert found.shape == formats.read(case, 2).stored.shape
    flat = write_nifti(tmp_path / "flat.nii", shape=(6, 7, 1))
    np.testing.assert_array_equal(read_mask(pair(flat, write_label(tmp_path / "l.nii", voxels)), 2).sum(), voxels.sum())
    refused(pair(flat, label), "not_3d", "use --dim 2 (spatial_dims=2)")


def test_a_slice_and_its_label_keep_their_pixels_together(tmp_path):
    voxels = class_map((6, 7, 1))
    image = tmp_path / "image.nii"
    nib.save(nib.Nifti1Image(voxels.astype(np.int16), AFFINE), image)
    case = pair(image, write_label(tmp_path / "label.nii", voxels))
    np.testing.assert_array_equal(read_mask(case, 2), formats.read(case, 2).stored)


def test_anisotropic_spacing_of_10_to_1_is_read(tmp_path):
    affine = np.diag([0.5, 0.5, 5.0, 1.0])
    nib.save(nib.Nifti1Image(class_map(classes=9).astype(np.int16), affine), tmp_path / "image.nii")
    case = pair(tmp_path / "image.nii", write_label(tmp_path / "label.nii", class_map(), affine))
    assert formats.read(case, 3).spacing == (0.5, 0.5, 5.0)
    assert read_mask(case, 3).shape == (1, *SHAPE)


def test_a_case_without_mask_is_an_error(image):
    with pytest.raises(ValueError, match="no voxel labels"):
        read_mask(Case("case-0", "nifti", (image,), ("image",), "p"), 3)


def test_masks_of_archives_are_refused(image):
    case = Case("case-0", "npz", (image,), ("image",), "p", mask=Mask(image, "image", (0, 1)))
    refused(case, "mask_format")


def test_every_real_label_fits_its_image(data_dir):
    root = data_dir / "Task04_Hippocampus"
    for path in sorted((root / "imagesTr").glob("*.nii.gz")):
        label = root / "labelsTr" / path.name
        case = pair(path, label)
        found = read_mask(case, 3)
        assert found.shape == formats.read(case, 3).stored.shape
        np.testing.assert_array_equal(
            np.bincount(found.reshape(-1)), np.bincount(np.ravel(nib.load(label).dataobj).astype(int))
        )
