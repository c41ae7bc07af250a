# SPDX-License-Identifier: Apache-2.0
"""Transforms in pipelines: inversion, datasets and caches of every kind, with metadata and without, voxel labels."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from exports import class_map, write_decathlon
from monai.data import (
    CacheDataset,
    CacheNTransDataset,
    DataLoader,
    Dataset,
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
from perturbed import BUDGET, equal, fit, items

from monai_salm.bank import PerturbationBank, Record
from monai_salm.engines.cases import Cases
from monai_salm.io import formats
from monai_salm.release.catalog import Catalog
from monai_salm.release.labels import load_cohort
from monai_salm.stored import StoredCodec
from monai_salm.transforms import (
    ApplyPerturbationd,
    ApplySparsityMaskd,
    ComputeSparsityMaskd,
    LoadMask,
    LoadMaskd,
    LoadStored,
    LoadStoredd,
    SnapToStoredd,
    StoredToUnit,
    StoredToUnitd,
)


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
