# SPDX-License-Identifier: Apache-2.0
"""Transforms that apply a bank, and save what comes of it."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from exports import write_npz
from monai.data import MetaTensor
from monai.transforms import Compose
from perturbed import BUDGET, delta_of, equal, fit, items, save_nifti
from pydicom import dcmread

from monai_salm.bank import PerturbationBank, Record, image_digest
from monai_salm.io import formats
from monai_salm.io.base import RefusedError
from monai_salm.release import catalog as catalog_module
from monai_salm.release.catalog import Catalog, scan
from monai_salm.release.commit import PROTECTED, STAGING
from monai_salm.stored import StoredCodec
from monai_salm.transforms import (
    ApplyPerturbation,
    ApplyPerturbationd,
    LoadStored,
    LoadStoredd,
    SaveStored,
    SaveStoredd,
    StoredToUnit,
)


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
