# SPDX-License-Identifier: Apache-2.0
"""Series as volumes: which are one, their axes, and slices that are scaled differently."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from dicom_files import (
    ORIENTATIONS,
    UIDS,
    WHEN,
    case_of,
    fitting_delta,
    headers_of,
    parse,
    reason,
    write_mr_series,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import uid
from pydicom.dataset import Dataset

from monai_salm.io import dicom, dicom_parse, dicom_read, dicom_volume, formats
from monai_salm.io.base import RefusedError, StoredImage
from monai_salm.perturbations.budget import Budget


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_volume_is_canonical_and_written_back_exactly(tmp_path: Path, name: str) -> None:
    paths = write_mr_series(tmp_path, ORIENTATIONS[name])
    case = case_of(*paths)
    image = dicom.read(case, 3)
    headers = headers_of(paths)
    first = headers[dicom.order_volume(headers)[0]]
    last = headers[dicom.order_volume(headers)[-1]]
    direction = np.array(first.ImageOrientationPatient, dtype=float)
    step = (np.array(last.ImagePositionPatient, float) - np.array(first.ImagePositionPatient, float)) / 4
    affine = np.eye(4)
    affine[:3, :3] = np.stack([direction[:3] * 0.75, direction[3:] * 0.5, step], 1) * [[-1], [-1], [1]]
    slices = np.stack([parse(path.read_bytes()).pixel_array for path in sorted(paths, key=lambda p: int(p.suffix[1:]))])
    expected = nib.as_closest_canonical(nib.Nifti1Image(slices.transpose(2, 1, 0), affine))
    assert nib.aff2axcodes(expected.affine) == ("R", "A", "S")
    assert np.array_equal(image.stored[0], np.asanyarray(expected.dataobj))

    delta = fitting_delta(image, levels=4)
    options = {"spatial_dims": 3, "window": "auto", "uids": UIDS, "when": WHEN}
    written = [*dicom.protect(case, delta, **options)]
    changed = 0
    for path, (_, content) in zip(paths, written, strict=True):
        changed += dicom.verify(path, content, 4, allow_unchanged=True).changed
    assert changed == int((delta != 0).sum()) > 0
    assert len({file.parent for file, _ in written}) == 1 and len({file for file, _ in written}) == 5
    copies = []
    for index, (_, content) in enumerate(written):
        dataset = parse(content)
        del dataset.ContributingEquipmentSequence  # else it is refused as already protected
        copies.append(paths[0].parent / f"copy{index}")
        dataset.save_as(copies[-1])
    assert np.array_equal(dicom.read(case_of(*copies), 3).stored, image.stored + delta)


@settings(max_examples=30, deadline=None)
@given(st.permutations([0, 1, 2]), st.lists(st.sampled_from([1, -1]), min_size=3, max_size=3), st.integers(0, 2**31))
def test_canonical_axes_have_an_exact_inverse(axes: list[int], flips: list[int], seed: int) -> None:
    slices = np.random.default_rng(seed).integers(0, 99, (4, 5, 6))
    orientation = np.array(list(zip(axes, flips, strict=True)), dtype=float)
    there = dicom_volume.to_canonical(slices, orientation)
    assert np.array_equal(dicom_volume.from_canonical(there, orientation), slices)


@pytest.mark.data
def test_ge_series_is_one_volume_in_spatial_order(data_dir: Path) -> None:
    paths = [path for path in sorted((data_dir / "dicom_series").rglob("*")) if path.is_file()]
    paths = [path for path in paths if dicom.looks_like_dicom(path)]
    headers = headers_of(paths)
    assert len({tuple(header.ImageOrientationPatient) for header in headers}) > 1  # differ in the 8th digit
    order = dicom.order_volume(headers)
    assert order != sorted(order) and sorted(order) == list(range(130))
    numbers = [int(headers[index].InstanceNumber) for index in order]
    assert numbers in (sorted(numbers), sorted(numbers, reverse=True))

    chosen = order[50:80]
    case = case_of(*(paths[index] for index in chosen))
    image = dicom.read(case, 3)
    assert image.stored.shape == (1, 256, 256, 30) and image.codec.dtype == "int16"
    assert np.array_equal(dicom.read(case_of(*(paths[index] for index in sorted(chosen))), 3).stored, image.stored)
    delta = fitting_delta(image, levels=2, density=0.05)
    options = {"spatial_dims": 3, "window": "auto", "uids": UIDS, "when": WHEN}
    changed = 0
    for path, (_, content) in zip(case.files, dicom.protect(case, delta, **options), strict=True):
        changed += dicom.verify(path, content, 2, allow_unchanged=True).changed
    assert changed == int((delta != 0).sum())


def move(k: int, distance: float) -> Callable[[Dataset, int], None]:
    def change(dataset: Dataset, index: int) -> None:
        if index == k:
            x, y, z = dataset.ImagePositionPatient
            dataset.ImagePositionPatient = [x, y, float(z) + distance]

    return change


def on_slice(k: int, **attributes: Any) -> Callable[[Dataset, int], None]:
    def change(dataset: Dataset, index: int) -> None:
        for keyword, value in attributes.items() if index == k else ():
            setattr(dataset, keyword, value)

    return change


@pytest.mark.parametrize(
    ("refused", "change"),
    [
        ("duplicate_position", move(2, -2.5)),
        ("irregular_spacing", move(2, 0.15)),
        ("irregular_spacing", move(4, 2.5)),
        ("irregular_spacing", on_slice(2, ImagePositionPatient=[10.5, -20, 35])),
        ("mixed_geometry", on_slice(1, ImageOrientationPatient=[1, 0, 0, 0, 0, -1])),
        ("mixed_geometry", on_slice(1, ImageOrientationPatient=[0.9999, 0.0141, 0, -0.0141, 0.9999, 0])),
        ("mixed_geometry", on_slice(1, PixelSpacing=[0.5, 0.76])),
        ("mixed_geometry", on_slice(1, Columns=6)),
        ("mixed_geometry", on_slice(1, SOPClassUID=uid.CTImageStorage)),
        ("mixed_geometry", on_slice(1, FrameOfReferenceUID="1.2.7")),
        ("mixed_geometry", on_slice(1, StudyInstanceUID="1.2.7")),
        ("mixed_geometry", on_slice(1, PatientID="another")),
        ("mixed_pixel_format", on_slice(1, PhotometricInterpretation="MONOCHROME1")),
        ("mixed_pixel_format", on_slice(1, BitsStored=12)),
        ("varying_rescale", on_slice(3, RescaleSlope="-1", RescaleIntercept="0")),
        ("invalid_geometry", on_slice(0, ImageOrientationPatient=[1, 0, 0, 1, 0, 0])),
        ("invalid_geometry", on_slice(0, ImagePositionPatient=[0, 0])),
        ("invalid_geometry", lambda dataset, k: delattr(dataset, "ImagePositionPatient")),
        ("invalid_geometry", lambda dataset, k: delattr(dataset, "PixelSpacing")),
    ],
)
def test_series_that_is_no_volume_is_refused_by_name(
    tmp_path: Path, refused: str, change: Callable[[Dataset, int], None]
) -> None:
    assert reason(lambda: dicom.order_volume(headers_of(write_mr_series(tmp_path, change=change)))) == refused


def shear(dataset: Dataset, k: int) -> None:
    x, y, z = dataset.ImagePositionPatient
    dataset.ImagePositionPatient = [x, float(y) + 0.8 * k, z]


def rounded(dataset: Dataset, k: int) -> None:
    """To 0.02 mm, up and down in turn, as of a scanner that counts in steps of its table."""
    move(k, 0.02 * (-1) ** k)(dataset, k)


@pytest.mark.parametrize(
    "change",
    [move(2, 0.02), move(2, 0.1), rounded, shear, on_slice(2, ImageOrientationPatient=[1, 0.00001, 0, 0, 1, 0])],
)
def test_rounded_positions_and_a_tilted_gantry_are_a_volume(
    tmp_path: Path, change: Callable[[Dataset, int], None]
) -> None:
    paths = write_mr_series(tmp_path, change=change)
    order = dicom.order_volume(headers_of(paths))
    assert [int(paths[index].suffix[1:]) for index in order] == [0, 1, 2, 3, 4]


def test_the_refusal_says_where_slices_are_missing(tmp_path: Path) -> None:
    paths = write_mr_series(tmp_path, n=9)
    headers = headers_of([path for path in paths if path.suffix not in (".4", ".5")])
    expected = r"between slices 4 and 5 in space: 7\.5 mm where others have 2\.5 mm"
    with pytest.raises(RefusedError, match=expected) as caught:
        dicom.order_volume(headers)
    assert not any(str(header.SOPInstanceUID) in str(caught.value) for header in headers)


def test_single_slice_is_no_volume(tmp_path: Path) -> None:
    assert reason(lambda: dicom.order_volume(headers_of(write_mr_series(tmp_path, n=1)))) == "single_slice"
    with pytest.raises(ValueError, match="2 takes one file"):
        dicom.read(case_of(*write_mr_series(tmp_path)), 2)


# Slices that are scaled differently


SLOPES = [0.5, 1.25, 0.8, 2.0, 0.1]


def as_pet(dataset: Dataset, k: int) -> None:
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = uid.PositronEmissionTomographyImageStorage
    dataset.Modality, dataset.Units = "PT", "BQML"
    dataset.RescaleSlope, dataset.RescaleIntercept = str(SLOPES[k]), str(k)


def bounds_of(image: StoredImage, budget: str) -> tuple[torch.Tensor, torch.Tensor]:
    return image.codec.bounds(torch.from_numpy(image.stored.astype(np.int32)), Budget.parse(budget))


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_each_slice_is_read_and_moved_by_its_own_slope(tmp_path: Path, name: str) -> None:
    paths = write_mr_series(tmp_path, ORIENTATIONS[name], as_pet)
    case = case_of(*paths)
    image = dicom.read(case, 3)
    lower, upper = bounds_of(image, "4 physical")
    up = torch.rand(upper.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    delta = torch.where(up, upper, lower).numpy()
    physical = {}
    for path, (_, content) in zip(
        paths, dicom.protect(case, delta, spatial_dims=3, window="auto", uids=UIDS, when=WHEN), strict=True
    ):
        k = int(path.suffix[1:])
        levels = int(4 / SLOPES[k] + 1e-9)
        assert dicom.verify(path, content, 40, physical=4.0).max_abs == levels  # at its own bound, not another slice's
        too_small = SLOPES[k] * (levels - 1) if levels > 1 else SLOPES[k] / 2
        if levels > 1:
            assert reason(lambda: dicom.verify(path, content, 40, physical=too_small)) == "verification_failed"  # noqa: B023
        before, after = pydicom.dcmread(path), parse(content)
        assert (after.RescaleSlope, after.RescaleIntercept) == (before.RescaleSlope, before.RescaleIntercept)
        physical[k] = before.pixel_array * SLOPES[k] + k
    read = image.codec.slices.to_physical(image.stored)
    flat = np.sort(np.concatenate([values.ravel() for values in physical.values()]))
    assert np.allclose(np.sort(read.ravel()), flat, rtol=1e-12)


@pytest.mark.parametrize("name", ORIENTATIONS)
@pytest.mark.parametrize("change", [None, as_pet])
def test_some_slices_are_those_of_the_whole_volume(tmp_path: Path, name: str, change: Any) -> None:
    case = case_of(*write_mr_series(tmp_path, ORIENTATIONS[name], change))
    image = dicom.read(case, 3)
    for axis in range(3) if change is None else [image.codec.slices.axis]:
        assert_same(formats.read_slices(case, 3, "auto", axis, [0, 1, 4]), image.slices(axis, [0, 1, 4]))


def assert_same(found: StoredImage, expected: StoredImage) -> None:
    assert np.array_equal(found.stored, expected.stored) and found.stored.flags.c_contiguous
    assert found.stored.dtype == expected.stored.dtype
    assert (found.codec, found.spacing, found.windows) == (expected.codec, expected.spacing, expected.windows)


def test_only_the_files_of_the_slices_that_are_wanted_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_mr_series(tmp_path, ORIENTATIONS["axial"])
    case = case_of(*paths)
    expected = dicom.read(case, 3).slices(2, [1, 3])
    kept = {f"1.2.3.{k + 1}" for k in (1, 3)}
    read: list[Path] = []
    monkeypatch.setattr(dicom_read, "read_bytes", lambda path: read.append(path) or dicom_parse.read_bytes(path))
    assert_same(dicom.read_slices(case, 3, "auto", 2, [1, 3]), expected)
    assert {str(pydicom.dcmread(path).SOPInstanceUID) for path in read} == kept


def test_series_with_a_slice_below_one_step_is_refused_not_weakened(tmp_path: Path) -> None:
    image = dicom.read(case_of(*write_mr_series(tmp_path, change=as_pet)), 3)
    assert bounds_of(image, "2 physical")[1].max() == 20
    with pytest.raises(ValueError, match="below one stored step"):
        bounds_of(image, "1.5 physical")


def test_part_of_a_volume_is_read_as_the_whole(tmp_path: Path) -> None:
    image = formats.read(case_of(*write_mr_series(tmp_path, change=as_pet)), 3)
    stored = torch.from_numpy(image.stored)
    part = image.codec.part([1, 2, 1], [4, 3, 3])
    cut = (slice(None), slice(1, 5), slice(2, 5), slice(1, 4))
    assert torch.equal(part.to_unit(stored[cut]), image.codec.to_unit(stored)[cut])
    assert torch.equal(part.movable(stored[cut]), image.codec.movable(stored)[cut])
    with pytest.raises(ValueError, match="does not fit"):
        part.to_unit(stored)
