# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from exports import SIZE, class_map, write_decathlon, write_nifti, write_npz, write_segmentation, write_series
from monai.data import (
    CacheDataset,
    CacheNTransDataset,
    DataLoader,
    Dataset,
    MetaTensor,
    PersistentDataset,
    decollate_batch,
    set_track_meta,
)
from monai.data.utils import pickle_hashing
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    Flipd,
    Invertd,
    LoadImaged,
    Orientationd,
    Rotate90d,
    SaveImage,
    SaveImaged,
    ScaleIntensityRanged,
    Spacingd,
    ToMetaTensord,
)
from monai.utils import TransformBackends
from pydicom import dcmread

import monai_salm.transforms as transforms_module
from monai_salm.bank import PerturbationBank, Record, image_digest
from monai_salm.engines.cases import Cases
from monai_salm.io import formats
from monai_salm.io.base import Case, RefusedError
from monai_salm.perturbations.budget import Budget
from monai_salm.release import catalog as catalog_module
from monai_salm.release.catalog import Catalog, scan
from monai_salm.release.commit import PROTECTED, STAGING
from monai_salm.release.labels import load_cohort
from monai_salm.stored import StoredCodec
from monai_salm.transforms import (
    ApplyPerturbation,
    ApplyPerturbationd,
    ApplySparsityMask,
    ApplySparsityMaskd,
    ComputeSparsityMask,
    ComputeSparsityMaskd,
    LoadMask,
    LoadMaskd,
    LoadStored,
    LoadStoredd,
    SaveStored,
    SaveStoredd,
    SnapToStored,
    SnapToStoredd,
    StoredToUnit,
    StoredToUnitd,
)

BUDGET = Budget.parse("8/255")
CODEC = StoredCodec("int16", window=(0.0, 255.0))


def save_nifti(path: Path, voxels: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(voxels, np.diag([-1, 1, 2, 1])), path)
    return path


def delta_of(image: formats.StoredImage, seed: int) -> torch.Tensor:
    """A random change of every voxel that may move, within the budget."""
    stored = image.stored.astype(np.int64) if image.stored.dtype.kind in "iu" else image.stored
    lower, upper = image.codec.bounds(torch.from_numpy(stored), BUDGET)
    up = torch.rand(lower.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return torch.where(up, upper, lower)


def fit(cases: tuple[Case, ...], path: Path, spatial_dims: int) -> PerturbationBank:
    bank = PerturbationBank(path, create=True)
    records = []
    for seed, case in enumerate(cases):
        image = formats.read(case, spatial_dims)
        levels = image.codec.levels(BUDGET)
        records.append(
            Record(case.sample_id, delta_of(image, seed), image_digest(image.stored), levels, image.codec.step)
        )
    bank.commit(records, round_=0, score=0.0, state=b"")
    return bank


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """Two DICOM series and two NIfTI volumes, all of one shape."""
    root = tmp_path_factory.mktemp("export")
    for name in ("one", "two"):
        write_series(root / name, name)
        write_nifti(root / f"{name}.nii.gz", seed=len(name), shape=(16, 16, 4))
    return scan(root, 3, check_pixels=False)


@pytest.fixture(scope="module")
def bank(export: Catalog, tmp_path_factory: pytest.TempPathFactory) -> PerturbationBank:
    return fit(export.cases, tmp_path_factory.mktemp("bank") / "bank.sqlite", 3)


def items(export: Catalog) -> list[dict]:
    return [{"image": case, "label": index} for index, case in enumerate(export.cases)]


def equal(image: torch.Tensor | np.ndarray, expected: np.ndarray) -> bool:
    return np.array_equal(np.asarray(image), expected)


# -------------------------------------------------------------------- MONAI's dialect


def test_every_array_class_has_its_dictionary_class_and_aliases() -> None:
    arrays = [name for name in transforms_module.__all__ if f"{name}d" in transforms_module.__all__]
    assert len(arrays) == 8 and len(transforms_module.__all__) == 4 * 8
    for name in arrays:
        array, dictionary = getattr(transforms_module, name), getattr(transforms_module, f"{name}d")
        assert dictionary is getattr(transforms_module, f"{name}D") is getattr(transforms_module, f"{name}Dict")
        assert array.backend and set(array.backend) <= set(TransformBackends) and dictionary.backend is array.backend


# -------------------------------------------------------------------- loading


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


# -------------------------------------------------------------------- unit intensity


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


# -------------------------------------------------------------------- masks


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


# -------------------------------------------------------------------- snapping


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


# -------------------------------------------------------------------- applying a bank


def test_applying_and_inverting_are_exact_for_every_format(export: Catalog, bank: PerturbationBank) -> None:
    apply = ApplyPerturbation(bank.path)
    for case in export.cases:
        clean = LoadStored(spatial_dims=3)(case)
        values = np.asarray(clean).copy()
        protected = apply(clean)
        assert isinstance(protected, MetaTensor) and protected.dtype == clean.dtype
        assert equal(protected, values + bank[case.sample_id].numpy()) and not equal(protected, values)
        assert protected.meta["sample_id"] == case.sample_id and len(protected.applied_operations) == 1
        again = apply.inverse(protected)
        assert equal(again, values) and again.dtype == clean.dtype and again.applied_operations == []
        if not clean.is_floating_point():
            assert equal(apply.inverse(protected.double()), values), "the image, in another type"
            prediction = protected.double() + 0.5
            assert equal(apply.inverse(prediction), np.asarray(prediction)), "what it cannot be passes"
        assert equal(clean, values) and clean.applied_operations == [] and len(protected.applied_operations) == 1


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint32"])
@pytest.mark.parametrize("shape", [(1, 6, 5), (1, 6, 5, 4)])
def test_applying_to_arrays_needs_the_name_only(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 255, shape).astype(dtype)
    image = formats.StoredImage(values, StoredCodec(dtype, window=(0.0, 255.0)))
    bank = PerturbationBank(tmp_path / "bank.sqlite", create=True)
    delta = delta_of(image, 0)
    bank.commit([Record("a", delta, image_digest(values), 8)], round_=0, score=0, state=b"")
    apply = ApplyPerturbation(bank)
    for container in (values, torch.from_numpy(values)):
        protected = apply(container, "a")
        assert type(protected) is type(container) and protected.dtype == container.dtype
        assert equal(protected, (values.astype(np.int64) + delta.numpy()).astype(dtype))
        assert equal(apply.inverse(protected, "a"), values)
    data = {"image": values, "sample_id": "a"}
    dictionary = ApplyPerturbationd("image", bank)
    assert equal(dictionary.inverse(dictionary(data))["image"], values) and data["image"] is values


def test_a_perturbation_never_meets_another_image(export: Catalog, bank: PerturbationBank) -> None:
    apply, load = ApplyPerturbation(bank), LoadStored(spatial_dims=3)
    first, second = (load(case) for case in export.cases if case.format == "dicom")
    with pytest.raises(ValueError, match="is not the one that its perturbation was fitted on"):
        apply(second.as_tensor(), first.meta["sample_id"], first.meta["stored_codec"])
    with pytest.raises(ValueError, match="metadata say sample_id"):
        apply(second, first.meta["sample_id"])
    with pytest.raises(ValueError, match="is not the one"):
        apply(apply(first))
    with pytest.raises(ValueError, match="before any spatial transform"):
        apply(first[:, :8])
    with pytest.raises(ValueError, match="unit intensity already"):
        apply(StoredToUnit()(first))
    with pytest.raises(ValueError, match="not its stored values any more"):
        apply(first.as_tensor().float(), first.meta["sample_id"], first.meta["stored_codec"])
    with pytest.raises(ValueError, match="has no 'sample_id'"):
        apply(first.as_tensor())
    with pytest.raises(KeyError, match="fit it first"):
        apply(np.asarray(first), "case-unknown")
    protected = apply(first)
    protected[0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match="does not give back the image"):
        apply.inverse(protected)


def test_float_images_are_changed_as_the_codec_says_and_never_restored_wrongly(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "x.nii", np.random.default_rng(0).normal(size=(6, 7, 5)).astype(np.float32))
    cases = scan(path, 3).cases
    bank = fit(cases, tmp_path / "bank.sqlite", 3)
    apply, clean = ApplyPerturbation(bank), LoadStored(spatial_dims=3)(cases[0])
    protected = apply(clean)
    source = formats.read(cases[0], 3)
    assert equal(protected, source.codec.add(source.stored, bank[cases[0].sample_id].numpy()))
    try:
        assert equal(apply.inverse(protected), source.stored)
    except ValueError as error:
        assert "floats, which round" in str(error)
    with pytest.raises(ValueError, match="a lattice step is"):
        apply(LoadStored(spatial_dims=3, window=(-1.0, 1.0))(cases[0]))


# -------------------------------------------------------------------- pipelines


def test_a_pipeline_with_spatial_transforms_inverts_to_the_stored_values(
    export: Catalog, bank: PerturbationBank
) -> None:
    pipeline = Compose(
        [
            LoadStoredd("image", spatial_dims=3),
            ApplyPerturbationd("image", bank),
            Orientationd("image", axcodes="LPS", labels=None),
            Flipd("image", spatial_axis=0),
            Rotate90d("image"),
        ]
    )
    for item in items(export):
        out = pipeline(item)
        assert out["image"].shape == (1, 16, 16, 4)
        assert equal(pipeline.inverse(out)["image"], formats.read(item["image"], 3).stored)


def test_saved_images_are_named_after_their_cases_by_every_worker(
    export: Catalog, bank: PerturbationBank, tmp_path: Path
) -> None:
    options = {"print_log": False, "separate_folder": False}
    names = sorted(case.sample_id for case in export.cases)

    def saved(folder: str) -> list[str]:
        return sorted(path.name for path in (tmp_path / folder).iterdir())

    start = [LoadStoredd("image", spatial_dims=3), ApplyPerturbationd("image", bank), StoredToUnitd("image")]
    in_workers = Compose([*start, SaveImaged("image", output_dir=tmp_path / "workers", **options)])
    pipeline = Compose([*start, Flipd("image", spatial_axis=0)])
    list(DataLoader(Dataset(items(export), in_workers), batch_size=1, num_workers=2))
    assert saved("workers") == [f"{name}_trans.nii.gz" for name in names]
    after = Compose([Invertd("pred", pipeline, "image"), SaveImaged("pred", output_dir=tmp_path / "pred", **options)])
    for batch in DataLoader(Dataset(items(export), pipeline), batch_size=2):
        for item in decollate_batch({**batch, "pred": batch["image"]}):
            after(item)
    assert saved("pred") == saved("workers")
    steps = [LoadStored(spatial_dims=3), SaveImage(output_dir=tmp_path / "array", **options)]
    for case in export.cases:
        Compose(steps)(case)
    assert saved("array") == saved("workers")


def test_a_pipeline_that_ends_in_unit_intensity_inverts_to_the_protected_image(
    export: Catalog, bank: PerturbationBank
) -> None:
    """As the README says of its example."""
    start = [LoadStoredd("image", spatial_dims=3), ApplyPerturbationd("image", bank)]
    pipeline = Compose([*start, StoredToUnitd("image")])
    for item in items(export):
        out = pipeline(item)
        assert equal(pipeline.inverse(out)["image"], out["image"]) and out["image"].meta["intensity"] == "unit"
        short = Compose(start)
        assert equal(short.inverse(short(item))["image"], formats.read(item["image"], 3).stored)


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "PIR"])
def test_voxel_sizes_and_axes_are_known(tmp_path: Path, axcodes: str) -> None:
    """As of an image that MONAI reads; the label file of a cohort agrees."""
    sizes = {"R": 1.5, "L": -1.5, "A": 2.0, "P": -2.0, "S": 4.0, "I": -4.0}
    affine = np.zeros((4, 4))
    for axis, code in enumerate(axcodes):
        affine[{"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}[code], axis] = sizes[code]
    affine[:, 3] = 30, 20, 10, 1
    for folder, values in (("imagesTr", np.arange(8 * 9 * 5) % 251), ("labelsTr", np.arange(8 * 9 * 5) % 3)):
        (tmp_path / folder).mkdir()
        for name in ("a", "b"):
            image = nib.Nifti1Image(values.reshape(8, 9, 5).astype(np.uint8), affine)
            nib.save(image, tmp_path / folder / f"{name}.nii.gz")
    table = "".join(f"imagesTr/{name}.nii.gz,labelsTr/{name}.nii.gz\n" for name in "ab")
    (tmp_path / "labels.csv").write_text(f"case,mask\n{table}")
    keys, case = ["image", "label"], load_cohort(tmp_path, spatial_dims=3).cases[0]
    ours = Compose([LoadStoredd("image", spatial_dims=3), LoadMaskd("label", spatial_dims=3)])
    grid = Compose([Orientationd(keys, axcodes="RAS", labels=None), Spacingd(keys, pixdim=1.0, mode="nearest")])
    other = Compose([LoadImaged(keys), EnsureChannelFirstd(keys)])
    paths = {"image": tmp_path / "imagesTr/a.nii.gz", "label": tmp_path / "labelsTr/a.nii.gz"}
    found, expected = grid(ours({"image": case, "label": case})), grid(other(paths))
    for key in keys:
        assert found[key].shape == expected[key].shape and found[key].pixdim.tolist() == [1.0, 1.0, 1.0]
        assert equal(found[key], np.asarray(expected[key]).astype(found[key].numpy().dtype))


def test_predictions_go_back_to_the_grid_of_the_image(export: Catalog, bank: PerturbationBank) -> None:
    pipeline = Compose(
        [
            LoadStoredd("image", spatial_dims=3),
            ApplyPerturbationd("image", bank),
            StoredToUnitd("image"),
            Rotate90d("image"),
        ]
    )
    item = pipeline(items(export)[0])
    item["pred"] = item["image"] * 2
    back = Invertd("pred", pipeline, orig_keys="image", nearest_interp=False)(item)["pred"]
    assert torch.equal(back.as_tensor(), torch.rot90(item["pred"].as_tensor(), -1, (1, 2)))


def test_predictions_go_back_from_whatever_made_an_input_of_stored_integers(
    export: Catalog, bank: PerturbationBank
) -> None:
    steps = [LoadStoredd("image", spatial_dims=3), ApplyPerturbationd("image", bank)]
    steps += [ScaleIntensityRanged("image", 0, 1000, 0, 1), Rotate90d("image")]
    item = Compose(steps)(items(export)[0])
    item["pred"] = (item["image"] > 0.5).float()
    back = Invertd("pred", Compose(steps), orig_keys="image")(item)["pred"]
    assert torch.equal(back.as_tensor(), torch.rot90(item["pred"].as_tensor(), -1, (1, 2)))


def test_network_inputs_can_be_resampled(export: Catalog, bank: PerturbationBank) -> None:
    pipeline = Compose(
        [
            LoadStoredd("image", spatial_dims=3),
            ApplyPerturbationd("image", bank),
            StoredToUnitd("image"),
            Spacingd("image", pixdim=(2.0, 2.0, 2.0)),
        ]
    )
    out = pipeline(items(export)[0])["image"]
    assert out.shape[1:3] == (8, 8)
    assert out.dtype == torch.float32 and 0 <= out.min() and out.max() <= 1


def pipeline_of(bank: PerturbationBank) -> Compose:
    return Compose(
        [
            LoadStoredd("image", spatial_dims=3),
            ApplyPerturbationd("image", bank),
            ComputeSparsityMaskd("image", ratio=0.2, criterion="random"),
        ]
    )


def _persistent(data: list[dict], pipeline: Compose, folder: Path) -> Dataset:
    dataset = PersistentDataset(data, pipeline, folder, hash_transform=pickle_hashing, track_meta=True)
    assert len(list(dataset)) == len(data) == len(list(folder.iterdir()))
    dataset._pre_transform = None  # from here on all comes from disk
    return dataset


DATASETS: dict[str, Callable] = {
    "plain": lambda data, pipeline, _: Dataset(data, pipeline),
    "cached": lambda data, pipeline, _: CacheDataset(data, pipeline, num_workers=2, progress=False),
    "persistent": _persistent,
}


@pytest.mark.parametrize("make", DATASETS.values(), ids=DATASETS)
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_every_dataset_decollate_and_invert(
    export: Catalog, bank: PerturbationBank, tmp_path: Path, make: Callable, workers: int
) -> None:
    pipeline = pipeline_of(bank)
    loader = DataLoader(make(items(export), pipeline, tmp_path), batch_size=4, num_workers=workers)
    (batch,) = list(loader)
    assert batch["image"].shape == (4, 1, 16, 16, 4) and batch["label"].tolist() == [0, 1, 2, 3]
    assert batch["image_mask"].dtype == torch.bool
    assert batch["image"].meta["sample_id"] == [case.sample_id for case in export.cases]
    with pytest.raises(ValueError, match="decollate_batch"):
        StoredToUnitd("image")(batch)
    for case, item in zip(export.cases, decollate_batch(batch), strict=True):
        clean = formats.read(case, 3)
        assert StoredCodec.from_meta(item["image"].meta["stored_codec"]) == clean.codec
        assert equal(item["image"], clean.stored + bank[case.sample_id].numpy())
        assert equal(pipeline.inverse(item)["image"], clean.stored)
        unit = StoredToUnit()(item["image"])
        assert torch.equal(unit.as_tensor(), clean.codec.to_unit(item["image"].as_tensor()))


# -------------------------------------------------------------------- without metadata


def plain(values: dict) -> dict:
    """Tensors of a dictionary without their metadata."""
    return {key: np.asarray(value).tolist() for key, value in values.items() if isinstance(value, torch.Tensor)}


def test_pipelines_give_the_same_where_metadata_are_not_tracked(export: Catalog, bank: PerturbationBank) -> None:
    keys, (one, two, *_) = ["image", "other"], export.cases
    steps = [LoadStoredd(keys, spatial_dims=3), ApplyPerturbationd(keys, bank)]
    steps += [ComputeSparsityMaskd("other", ratio=0.2, criterion="random", mask_keys="early"), StoredToUnitd(keys)]
    pipeline = Compose([*steps, ComputeSparsityMaskd("other", ratio=0.2)])
    tracked = pipeline({"image": one, "other": two})
    set_track_meta(False)
    try:
        found = pipeline({"image": one, "other": two})
        with pytest.raises(ValueError, match="no 'stored_codec'"):
            StoredToUnitd("image")(found)  # once is enough
        early = Compose(steps[:2])({"image": one, "other": two})
        assert equal(ApplyPerturbationd("image", bank).inverse(early)["image"], formats.read(one, 3).stored)
    finally:
        set_track_meta(True)
    assert type(found["image"]) is torch.Tensor and plain(found) == plain(tracked)
    again = ToMetaTensord(keys)(found)["other"]
    assert again.meta["sample_id"] == two.sample_id and torch.equal(again.affine, tracked["other"].affine)


@pytest.mark.parametrize("make", [PersistentDataset, partial(CacheNTransDataset, cache_n_trans=1)])
def test_caches_keep_what_an_image_is_without_its_metadata(
    export: Catalog, bank: PerturbationBank, tmp_path: Path, make: Callable
) -> None:
    rest = [ApplyPerturbationd("image", bank), StoredToUnitd("image")]
    for _ in range(2):  # the first one reads files, the second the cache
        dataset = make(items(export), Compose([LoadStoredd("image", spatial_dims=3)]), cache_dir=tmp_path)
        facts = Cases(dataset, BUDGET, torch.device("cpu")).facts
        assert [fact.sample_id for fact in facts] == [case.sample_id for case in export.cases]
        for item, case in zip(dataset, export.cases, strict=True):
            clean = formats.read(case, 3)
            expected = clean.codec.to_unit(torch.from_numpy(clean.stored + bank[case.sample_id].numpy()))
            assert equal(Compose(rest)(item)["image"], expected.numpy())
    assert type(item["image"]) is torch.Tensor


def test_a_persistent_cache_notices_another_round_of_the_bank(export: Catalog, tmp_path: Path) -> None:
    bank = fit(export.cases, tmp_path / "bank.sqlite", 3)
    data, cache = items(export)[:1], tmp_path / "cache"

    def read() -> np.ndarray:
        dataset = PersistentDataset(data, pipeline_of(bank), cache, hash_transform=pickle_hashing, track_meta=True)
        return np.asarray(dataset[0]["image"])

    first = read()
    assert equal(read(), first) and len(list(cache.iterdir())) == 1
    records = [bank.record(name) for name in bank]
    zero = [Record(r.sample_id, torch.zeros_like(r.delta), r.image_digest, r.levels, r.step) for r in records]
    bank.commit(zero, round_=1, score=-1.0, state=b"")
    assert equal(read(), formats.read(export.cases[0], 3).stored) and len(list(cache.iterdir())) == 2


DICTIONARY_TRANSFORMS: list[Callable] = [
    partial(LoadStoredd, "image", spatial_dims=3),
    partial(StoredToUnitd, "image"),
    partial(ComputeSparsityMaskd, "image", ratio=0.5, seed=3),
    partial(ApplySparsityMaskd, "image", "mask"),
    partial(SnapToStoredd, "image", "clean", "8/255"),
]
"""All but the one that needs a bank and the one that writes."""


def test_transforms_pickle_small_and_alike(bank: PerturbationBank, export: Catalog) -> None:
    for make in (*DICTIONARY_TRANSFORMS, partial(ApplyPerturbationd, "image", bank.path)):
        transform = make()
        before = pickle.dumps(transform)
        assert len(before) < 2000 and pickle_hashing([transform]) == pickle_hashing([make()])
        if isinstance(transform, ApplyPerturbationd):
            transform(LoadStoredd("image", spatial_dims=3)(items(export)[0]))
        assert pickle.dumps(transform) == before and type(pickle.loads(before)) is type(transform)


def test_missing_keys_are_an_error_unless_allowed(bank: PerturbationBank) -> None:
    for make in (*DICTIONARY_TRANSFORMS, partial(ApplyPerturbationd, "image", bank)):
        with pytest.raises(KeyError, match="image"):
            make()({})
        assert make(allow_missing_keys=True)({"other": 1}) == {"other": 1}


# -------------------------------------------------------------------- saving


def test_saved_files_hold_exactly_the_protected_image(export: Catalog, bank: PerturbationBank, tmp_path: Path) -> None:
    pipeline = Compose(
        [
            LoadStoredd("image", spatial_dims=3),
            ApplyPerturbationd("image", bank),
            SaveStoredd("image", tmp_path / "out", export, budget=BUDGET, spatial_dims=3),
        ]
    )
    protected = [pipeline(item)["image"] for item in items(export)]
    written = scan_protected(tmp_path / "out")
    assert sorted(map(image_digest, protected)) == sorted(map(image_digest, written))
    assert not any((tmp_path / "out" / STAGING).iterdir())


def scan_protected(out: Path) -> list[np.ndarray]:
    """What other readers find: nibabel in NIfTI, pydicom in DICOM (turned from LPS slices to RAS volumes)."""
    volumes = [np.asarray(nib.load(path).dataobj)[None] for path in (out / PROTECTED).glob("*.nii.gz")]
    for folder in {path.parent for path in (out / PROTECTED).rglob("*.dcm")}:
        slices = sorted((dcmread(path) for path in folder.iterdir()), key=lambda d: d.ImagePositionPatient[2])
        stack = np.stack([image.pixel_array for image in slices], -1).transpose(1, 0, 2)
        volumes.append(stack[::-1, ::-1].copy()[None])
    return volumes


def test_saving_takes_no_image_that_left_budget_lattice_or_catalog(export: Catalog, tmp_path: Path) -> None:
    save = SaveStored(tmp_path / "out", export, budget=BUDGET, spatial_dims=3)
    image = LoadStored(spatial_dims=3)(next(case for case in export.cases if case.format == "nifti"))
    with pytest.raises(ValueError, match="voxels are outside the budget of 0.0313725 window"):
        save(image + 500)
    with pytest.raises(ValueError, match="unit intensity already|not its stored values"):
        save(StoredToUnit()(image))
    with pytest.raises(ValueError, match="must have one shape"):
        save(image[:, 1:])
    with pytest.raises(RefusedError, match="nothing was protected|zero everywhere"):
        save(image)
    with pytest.raises(KeyError, match="no case 'case-x' in the catalog"):
        save(np.asarray(image), "case-x")
    assert not (tmp_path / "out" / PROTECTED).exists() or not any((tmp_path / "out" / PROTECTED).rglob("*.*"))


def test_held_out_cases_and_parts_of_archives_are_not_saved(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    catalog = scan(write_npz(tmp_path / "in" / "a.npz"), 2)
    save = SaveStored(tmp_path / "out", catalog, budget=BUDGET, spatial_dims=2)
    for split, what in (("test", "held out"), ("train", "part of a file with others")):
        case = next(case for case in catalog.cases if case.split == split)
        with pytest.raises(ValueError, match=what):
            save(LoadStored(spatial_dims=2)(case))


def test_the_output_folder_must_not_touch_the_export(export: Catalog) -> None:
    with pytest.raises(ValueError, match="inside the export"):
        SaveStored(export.root / "out", export, budget=BUDGET, spatial_dims=3)
    assert catalog_module.scan(export.root, 3, check_pixels=False).cases == export.cases


# ---------------------------------------------------------------------- voxel labels


@pytest.mark.parametrize("track", [True, False])
def test_masks_are_loaded_on_the_grid_of_their_images(tmp_path, track):
    cohort = load_cohort(write_decathlon(tmp_path, 2), spatial_dims=3)
    set_track_meta(track)
    try:
        load = Compose([LoadStoredd("image", spatial_dims=3), LoadMaskd("label", spatial_dims=3)])
        for index, case in enumerate(cohort.cases):
            item = load({"image": case, "label": case})
            assert item["label"].dtype == torch.uint8 and item["label"].shape == item["image"].shape
            assert equal(item["label"], class_map(seed=index)[None])
            if track:
                assert item["label"].meta["sample_id"] == item["image"].meta["sample_id"] == case.sample_id
                assert torch.equal(item["label"].affine, item["image"].affine)
    finally:
        set_track_meta(True)


def test_images_and_masks_go_through_a_loader_and_flips_together(tmp_path):
    cohort = load_cohort(write_decathlon(tmp_path, 4), spatial_dims=3)
    keys = ["image", "label"]
    steps = [LoadStoredd("image", spatial_dims=3), StoredToUnitd("image"), LoadMaskd("label", spatial_dims=3)]
    data = [{"image": case, "label": case} for case in cohort.cases]
    plain = next(iter(DataLoader(CacheDataset(data, Compose(steps), progress=False), batch_size=4)))
    flipped = next(iter(DataLoader(Dataset(data, Compose([*steps, Flipd(keys, 1)])), batch_size=4)))
    assert plain["label"].shape == (4, 1, 6, 7, 5) and plain["label"].max() == 2
    for key in keys:
        assert torch.equal(flipped[key].as_tensor(), plain[key].as_tensor().flip(3))


def test_a_case_without_mask_has_none_to_load(export: Catalog) -> None:
    with pytest.raises(ValueError, match="no voxel labels"):
        LoadMask(spatial_dims=3)(export.cases[0])
    with pytest.raises(ValueError, match="spatial_dims is 4"):
        LoadMask(spatial_dims=4)
