# SPDX-License-Identifier: Apache-2.0
"""Transforms one by one: loading, unit intensity, masks and snapping."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from exports import SIZE, write_decathlon, write_nifti, write_npz, write_segmentation, write_series
from monai.data import MetaTensor, set_track_meta
from monai.transforms import Compose, EnsureChannelFirstd
from monai.utils import TransformBackends
from perturbed import BUDGET, CODEC, equal, save_nifti

import monai_salm.transforms as transforms_module
from monai_salm.io import formats
from monai_salm.io.base import RefusedError
from monai_salm.release.catalog import Catalog, scan
from monai_salm.release.labels import load_cohort
from monai_salm.stored import StoredCodec
from monai_salm.transforms import (
    ApplySparsityMask,
    ApplySparsityMaskd,
    ComputeSparsityMask,
    ComputeSparsityMaskd,
    LoadMask,
    LoadMaskd,
    LoadStored,
    LoadStoredd,
    SnapToStored,
    SnapToStoredd,
    StoredToUnit,
)


def test_every_array_class_has_its_dictionary_class_and_aliases() -> None:
    arrays = [name for name in transforms_module.__all__ if f"{name}d" in transforms_module.__all__]
    assert len(arrays) == 8 and len(transforms_module.__all__) == 4 * 8
    for name in arrays:
        array, dictionary = getattr(transforms_module, name), getattr(transforms_module, f"{name}d")
        assert dictionary is getattr(transforms_module, f"{name}D") is getattr(transforms_module, f"{name}Dict")
        assert array.backend and set(array.backend) <= set(TransformBackends) and dictionary.backend is array.backend


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32"])
@pytest.mark.parametrize("shape", [(9, 8), (9, 8, 7)])
def test_loaded_values_are_those_of_the_file(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    high = 255 if dtype == "uint8" else 60000 if dtype == "uint16" else 30000
    path = save_nifti(tmp_path / "x.nii", np.random.default_rng(0).integers(0, high, shape).astype(dtype))
    image = LoadStored(spatial_dims=len(shape))(str(path))
    expected = formats.read(scan(path, len(shape)).cases[0], len(shape))
    assert isinstance(image, MetaTensor) and equal(image, expected.stored)
    assert image.dtype == {"uint16": torch.int32}.get(dtype, getattr(torch, dtype))
    assert StoredCodec.from_meta(image.meta["stored_codec"]) == expected.codec
    assert image.meta["intensity"] == "stored"


def test_paths_and_cases_give_the_same_image_and_name(export: Catalog) -> None:
    load = LoadStored(spatial_dims=3, root=export.root)
    for case in export.cases:
        source = case.files[0].parent if case.format == "dicom" else case.files[0]
        image = load(source)
        assert equal(image, load(case)) and image.meta["sample_id"] == case.sample_id


def test_a_path_names_the_same_case_whichever_way_it_leads_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_nifti(tmp_path / "in" / "deep" / "x.nii")
    (name,) = (case.sample_id for case in scan(tmp_path / "in", 3).cases)
    (tmp_path / "link").symlink_to("in")
    monkeypatch.chdir(tmp_path / "in")
    for root in ("../in", tmp_path / "link", ".", tmp_path / "in"):
        for way in (path, tmp_path / "link" / "deep" / "x.nii", "deep/../deep/x.nii"):
            assert LoadStored(spatial_dims=3, root=root)(way).meta["sample_id"] == name
    (alone,) = (case.sample_id for case in scan(path, 3).cases)
    assert LoadStored(spatial_dims=3, root=path)(path).meta["sample_id"] == alone
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"x.nii does not lie in .*other; root must be the export"):
        LoadStored(spatial_dims=3, root=tmp_path / "other")(path)


def test_a_dicom_slice_is_a_2d_image(export: Catalog, tmp_path: Path) -> None:
    file = next(case for case in export.cases if case.format == "dicom").files[0]
    image = LoadStored(spatial_dims=2)(file)
    assert image.shape == (1, 16, 16) and image.meta["sample_id"] in {c.sample_id for c in scan(file.parent, 2).cases}


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    load = LoadStored(spatial_dims=3)
    with pytest.raises(FileNotFoundError, match="check the path"):
        load(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("no image")
    for source in (tmp_path / "notes.txt", tmp_path):
        with pytest.raises(RefusedError, match="neither DICOM nor NIfTI"):
            load(source)
    write_series(tmp_path / "mixed", "one", prefix="a")
    write_series(tmp_path / "mixed", "two", prefix="b")
    with pytest.raises(RefusedError, match="several"):
        load(tmp_path / "mixed")
    paths = write_series(tmp_path / "labeled", "one")
    pixels = np.ones((4, SIZE, SIZE, 1), np.uint8)
    write_segmentation(tmp_path / "labeled" / "seg.dcm", paths, pixels, ("Liver",))
    with pytest.raises(RefusedError, match=r"1 of 5 files .* hold no image \(DICOM SEG.* images alone"):
        load(tmp_path / "labeled")
    with pytest.raises(ValueError, match="spatial_dims is 4"):
        LoadStored(spatial_dims=4)


def test_monai_knows_which_axis_has_the_channels(tmp_path: Path) -> None:
    case = load_cohort(write_decathlon(tmp_path, 2), spatial_dims=3).cases[0]
    load = [LoadStoredd("image", spatial_dims=3), LoadMaskd("label", spatial_dims=3)]
    found = Compose([*load, EnsureChannelFirstd(["image", "label"])])({"image": case, "label": case})
    assert found["image"].shape == found["label"].shape == LoadMask(spatial_dims=3)(case).shape


def test_archives_load_by_case(tmp_path: Path) -> None:
    cases = scan(write_npz(tmp_path / "a.npz"), 2).cases
    image = LoadStored(spatial_dims=2)(cases[3])
    assert image.shape == (1, 8, 8) and image.dtype == torch.uint8 and image.meta["sample_id"] == cases[3].sample_id


def test_without_tracking_a_plain_tensor_comes_out(export: Catalog) -> None:
    set_track_meta(False)
    try:
        image = LoadStored(spatial_dims=3)(export.cases[0])
    finally:
        set_track_meta(True)
    assert type(image) is torch.Tensor


def containers(values: np.ndarray) -> list:
    tensor = torch.from_numpy(values)
    return [values, tensor, MetaTensor(tensor, meta={"stored_codec": CODEC.to_meta(), "note": "kept"})]


def test_unit_intensity_is_the_codecs_in_the_container_that_came() -> None:
    values = np.array([[[-5, 0], [51, 300]]], dtype=np.int16)
    for image in containers(values):
        before = copy.deepcopy(image)
        unit = StoredToUnit()(image, CODEC if not isinstance(image, MetaTensor) else None)
        assert type(unit) is type(image)
        assert equal(unit, np.array([[[0, 0], [0.2, 1]]], dtype=np.float32)) and np.asarray(unit).dtype == np.float32
        assert equal(image, np.asarray(before))
    assert unit.meta["note"] == "kept" and unit.meta["intensity"] == "unit" and "intensity" not in image.meta
    with pytest.raises(ValueError, match="in unit intensity already"):
        StoredToUnit()(unit)
    with pytest.raises(ValueError, match="no 'stored_codec'"):
        StoredToUnit()(values)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_types_that_torch_cannot_compute_with_are_no_obstacle(dtype: str) -> None:
    codec = StoredCodec(dtype, window=(0.0, 60000.0))
    values = np.array([[0, 30000, 60000]], dtype=dtype)
    for image in (values, torch.from_numpy(values)):
        assert equal(StoredToUnit()(image, codec), np.array([[0, 0.5, 1]], dtype=np.float32))
        assert np.asarray(ComputeSparsityMask(ratio=0.3)(image, codec=codec)).tolist() == [[False, False, True]]
        snapped = SnapToStored("10 stored")(np.array([[0.0, 1.0, 1.0]]), image, codec)
        assert equal(snapped, np.array([[0, 10, 0]]))


@pytest.mark.parametrize("shape", [(1, 10, 10), (2, 10, 10), (1, 5, 6, 7)])
def test_masks_have_the_ratio_asked_for_and_the_container_that_came(shape: tuple[int, ...]) -> None:
    unit = np.random.default_rng(0).random(shape).astype(np.float32)
    gradient = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    for criterion in ("foreground", "random", "gradient", "gradient_input"):
        transform = ComputeSparsityMask(ratio=0.3, criterion=criterion)
        masks = [transform(image, gradient) for image in (unit, torch.from_numpy(unit), MetaTensor(unit))]
        assert [type(mask) for mask in masks] == [np.ndarray, torch.Tensor, MetaTensor]
        assert masks[0].dtype == bool and masks[1].dtype == torch.bool
        assert all(equal(mask, masks[0]) for mask in masks)
        assert masks[0].sum() == round(0.3 * unit.size)


def test_a_random_mask_depends_on_seed_and_case_only() -> None:
    image = np.random.default_rng(0).random((1, 20, 20)).astype(np.float32)

    def mask(seed: int, name: str | None, shift: float = 0.0) -> np.ndarray:
        return ComputeSparsityMask(ratio=0.2, criterion="random", seed=seed)(image + np.float32(shift), sample_id=name)

    assert equal(mask(0, "a"), mask(0, "a", shift=0.1))
    assert not equal(mask(0, "a"), mask(0, "b")) and not equal(mask(0, "a"), mask(1, "a"))
    assert equal(mask(0, None), mask(0, None)) and not equal(mask(0, None), mask(0, None, shift=0.1))


def test_of_stored_images_only_movable_voxels_are_chosen() -> None:
    codec = StoredCodec("int16", window=(0.0, 100.0), padding=(100.0, 100.0))
    stored = np.array([[[-20, 500], [100, 99], [3, 2]]], dtype=np.int16)
    mask = ComputeSparsityMask(ratio=0.5)(stored, codec=codec)
    assert mask.astype(int).tolist() == [[[0, 0], [0, 1], [1, 1]]]


def test_masks_of_one_image_refuse_what_needs_more() -> None:
    with pytest.raises(ValueError, match="scope 'class'"):
        ComputeSparsityMask(ratio=0.5, scope="class")
    with pytest.raises(ValueError, match="needs a gradient"):
        ComputeSparsityMask(ratio=0.5, criterion="gradient")(np.ones((1, 4, 4), np.float32))
    with pytest.raises(ValueError, match=r"gradient is \(1, 2, 4\), image \(1, 4, 4\)"):
        ComputeSparsityMask(ratio=0.5, criterion="gradient")(np.ones((1, 4, 4), np.float32), np.ones((1, 2, 4)))
    with pytest.raises(ValueError, match="2 mask keys for 1"):
        ComputeSparsityMaskd("image", ratio=0.5, mask_keys=["a", "b"])


def test_applying_a_mask_is_exact_and_changes_no_input() -> None:
    perturbation = np.array([[[3, -4], [5, 6]], [[7, 8], [9, 10]]], dtype=np.int8)
    one = np.array([[[True, False], [False, True]]])
    expected = perturbation * one
    for container in (perturbation, torch.from_numpy(perturbation), MetaTensor(torch.from_numpy(perturbation))):
        for mask in (one, torch.from_numpy(one), np.broadcast_to(one, (2, 2, 2)), one.astype(np.float32)):
            out = ApplySparsityMask()(container, mask)
            assert type(out) is type(container) and out.dtype == container.dtype and equal(out, expected)
    assert perturbation[0, 0, 1] == -4
    with pytest.raises(ValueError, match="must have one shape"):
        ApplySparsityMask()(perturbation, one[:, :1])


def test_mask_transforms_work_on_dictionaries() -> None:
    data = {"image": np.arange(8, dtype=np.float32).reshape(1, 2, 4) / 8, "delta": np.ones((1, 2, 4), np.int8)}
    data["gradient"] = -data["image"]
    pipeline = Compose(
        [
            ComputeSparsityMaskd("image", ratio=0.25),
            ComputeSparsityMaskd("image", ratio=0.5, criterion="gradient", gradient_keys="gradient", mask_keys="steep"),
            ApplySparsityMaskd("delta", "image_mask"),
        ]
    )
    out = pipeline(data)
    assert out["delta"].tolist() == [[[0, 0, 0, 0], [0, 0, 1, 1]]]
    assert out["steep"].tolist() == [[[False] * 4, [True] * 4]]
    assert data["delta"].all() and set(data) == {"image", "delta", "gradient"}


def test_snapped_perturbations_are_lattice_steps_inside_the_budget() -> None:
    codec = StoredCodec("int16", window=(-100.0, 300.0), slope=2.0, intercept=-50.0, inverted=True)
    image = torch.randint(-100, 250, (1, 30, 30), dtype=torch.int16)
    wanted = torch.randn(1, 30, 30) * 0.05
    lower, upper = codec.bounds(image, BUDGET)
    for container in (wanted.numpy(), wanted, MetaTensor(wanted, meta={"note": "kept"})):
        steps = SnapToStored(BUDGET)(container, image, codec)
        assert type(steps) is type(container)
        assert np.asarray(steps).dtype == np.int16
        values = torch.as_tensor(np.asarray(steps))
        assert (values >= lower).all() and (values <= upper).all()
        inside = (wanted / codec.unit_step > lower + 0.5) & (wanted / codec.unit_step < upper - 0.5)
        assert ((values - wanted / codec.unit_step).abs()[inside] <= 0.5001).all()
    assert steps.meta["note"] == "kept"


def test_snapping_stored_units_of_a_float_image_gives_its_lattice_steps() -> None:
    codec = StoredCodec("float32", window=(0.0, 4.096))
    image = np.full((1, 2, 2), 2.0, np.float32)
    wanted = np.array([[[0.0024, -0.0016], [9.0, 0.0]]])
    steps = SnapToStored("0.01", "stored")(wanted, image, codec)
    assert steps.tolist() == [[[2, -2], [40, 0]]]


def test_snapping_says_when_nothing_is_left_or_makes_no_sense() -> None:
    image = np.full((1, 2, 2), 50, np.int16)
    with pytest.warns(UserWarning, match="nothing is left"):
        SnapToStored("4 stored")(np.full((1, 2, 2), 1e-4), image, CODEC)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SnapToStored("4 stored")(np.zeros((1, 2, 2)), image, CODEC)
    with pytest.raises(ValueError, match="not finite"):
        SnapToStored("4 stored")(np.full((1, 2, 2), np.nan), image, CODEC)
    with pytest.raises(ValueError, match="must have one shape"):
        SnapToStored("4 stored")(np.zeros((1, 2)), image, CODEC)
    with pytest.raises(ValueError, match="smallest epsilon that works"):
        SnapToStored("0.1 stored")(np.ones((1, 2, 2)), image, CODEC)
    with pytest.raises(ValueError, match="use 'unit' or 'stored'"):
        SnapToStored("4 stored", "HU")
    out = SnapToStoredd("delta", "image", "4 stored")(
        {"delta": np.ones((1, 2, 2)), "image": image, "stored_codec": CODEC.to_meta()}
    )
    assert (out["delta"] == 4).all()
