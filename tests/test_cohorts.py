# SPDX-License-Identifier: Apache-2.0
"""The demo cohort is deterministic, well formed, and split and labeled fairly; its lesions are where the masks are."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch

from monai_salm.cohorts import classification, demo, lesions, segmentation
from monai_salm.cohorts.classification import LABELS
from monai_salm.cohorts.demo import write_demo_export

N_PATIENTS = 6


@pytest.fixture(scope="module", params=[2, 3], ids=["2d", "3d"])
def dim(request: pytest.FixtureRequest) -> int:
    pytest.importorskip("nilearn", reason="the demo cohort needs the extra 'demo'")
    return request.param


@pytest.fixture(scope="module")
def export(dim: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("demo") / "export"
    assert write_demo_export(output, dim, seed=3, n_patients=N_PATIENTS, progress=False)
    return output


def rows(export: Path) -> list[dict[str, str]]:
    with open(export / "labels.csv", newline="") as file:
        return list(csv.DictReader(file))


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def dicom_series(export: Path) -> list[list[Path]]:
    return [sorted(folder.iterdir()) for folder in sorted(export.glob("PAT*/ST*/SE*"))]


def test_same_seed_gives_same_bytes_on_any_number_of_threads(export: Path, dim: int, tmp_path: Path) -> None:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2 if n_threads == 1 else 1)
    try:
        write_demo_export(tmp_path / "again", dim, seed=3, n_patients=N_PATIENTS, progress=False)
        assert torch.get_num_threads() == (2 if n_threads == 1 else 1)
    finally:
        torch.set_num_threads(n_threads)
    assert tree(tmp_path / "again") == tree(export)


def test_labels_name_every_image_and_nothing_else(export: Path) -> None:
    cases = [row["case"] for row in rows(export)]
    named = {
        path for case in cases for path in ([export / case] if (export / case).is_file() else (export / case).iterdir())
    }
    assert len(set(cases)) == len(cases)
    assert named == {path for path in export.rglob("*") if path.is_file()} - {export / "labels.csv"}


def test_case_is_file_in_2d_and_folder_or_volume_in_3d(export: Path, dim: int) -> None:
    for row in rows(export):
        path = export / row["case"]
        assert path.is_dir() == (dim == 3 and not path.name.endswith(".nii.gz"))


def test_no_patient_in_both_splits(export: Path) -> None:
    split_of = {(row["case"].split("/")[0], row["split"]) for row in rows(export)}
    assert len({patient for patient, _ in split_of}) == len(split_of) == N_PATIENTS
    assert {split for _, split in split_of} == {"train", "test"}


@pytest.mark.parametrize("split", ["train", "test"])
def test_classes_are_balanced_within_each_split(export: Path, split: str) -> None:
    counts = Counter(row["label"] for row in rows(export) if row["split"] == split)
    assert set(counts) <= set(LABELS)
    # Labels are dealt out in each format apart: at most one more of a class per format.
    assert max(counts.values()) - min(counts[label] for label in LABELS) <= 2


def test_dicom_slices_are_regular_and_named_in_another_order(export: Path) -> None:
    for paths in dicom_series(export):
        slices = [pydicom.dcmread(path) for path in paths]
        heights = np.array([float(item.ImagePositionPatient[2]) for item in slices])
        assert np.any(np.diff(heights) < 0), "file names are in slice order"
        assert np.allclose(np.diff(np.sort(heights)), float(slices[0].SpacingBetweenSlices))
        assert [slices[index].InstanceNumber for index in np.argsort(heights)] == list(range(1, len(slices) + 1))
        assert len({item.SOPInstanceUID for item in slices}) == len(slices)
        assert len({item.SeriesInstanceUID for item in slices}) == 1


def test_dicom_uses_both_integer_types_and_has_noise_in_the_air(export: Path) -> None:
    kinds = set()
    for paths in dicom_series(export):
        item = pydicom.dcmread(paths[0])
        pixels = item.pixel_array
        kinds.add(str(pixels.dtype))
        assert item.SOPInstanceUID.startswith("2.25.") and item.SOPInstanceUID.is_valid
        assert 0 <= pixels.min() and pixels.max() < 2**12
        assert pixels[:4, :4].std() > 0
    assert kinds == {"uint16", "int16"}


def test_one_patient_has_two_studies(export: Path) -> None:
    studies = Counter(folder.parent.name for folder in export.glob("PAT*/ST*"))
    assert set(studies.values()) == {1, 2}


def test_nifti_holds_scaled_integers(export: Path, dim: int) -> None:
    paths = sorted(export.rglob("*.nii.gz"))
    assert paths
    for path in paths:
        image = nib.load(path)
        stored = np.asarray(image.dataobj.get_unscaled())
        assert stored.dtype == np.int16 and len(np.unique(stored)) > 500
        assert (image.dataobj.slope, image.dataobj.inter) == (pytest.approx(1.1), pytest.approx(-16))
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
        assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 1
        assert image.shape == ((112, 128, 1) if dim == 2 else (52, 62, 52))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_voxel_lies_at_the_same_place_in_dicom_and_nifti(spatial_dims: int, tmp_path: Path) -> None:
    plan = classification.plan(spatial_dims, seed=0, n_patients=6).studies
    for series in (next(item for item in plan if item.is_dicom), next(item for item in plan if not item.is_dicom)):
        physical = np.zeros((*series.geometry.shape[:2], series.n_slices), dtype=np.float32)
        physical[5, 7, 2] = 2000
        (classification._write_dicom if series.is_dicom else classification._write_nifti)(tmp_path, series, physical)
        places = [place for name in series.files for place in bright_places(tmp_path / name)]
        assert np.allclose(places, [(series.affine @ [5, 7, 2, 1])[:3]], atol=1e-3)


@pytest.mark.parametrize(
    ("spatial_dims", "expected"),
    [
        (2, "c80a9d8f8a15033dd742c29ab78e2e05161cdc00c1e4ec050be34b74fc3e96f6"),
        (3, "648973f4972d4c86dd9b099fbf4bfa6d958b24d7c10e848bb11e466fe22a0a9d"),
    ],
)
def test_classification_names_labels_and_seeds_stay_what_they_were(spatial_dims: int, expected: str) -> None:
    plan = classification.plan(spatial_dims, seed=0)
    found = hashlib.sha256(plan.tables["labels.csv"])
    for series in plan.studies:
        found.update(repr((series.files, series.uid("series"), series.digest("pixels").hex())).encode())
    assert found.hexdigest() == expected, "results that were measured on this cohort are no longer about it"


def bright_places(path: Path) -> list[np.ndarray]:
    """Where the file's bright voxels lie in millimeters, axes pointing right, anterior, superior."""
    if path.name.endswith(".nii.gz"):
        image = nib.load(path)
        return [nib.affines.apply_affine(image.affine, index) for index in np.argwhere(image.get_fdata() > 1000)]
    item = pydicom.dcmread(path)
    # PS3.3 C.7.6.2.1.1: the first direction goes along a row, the second down a column.
    along_row, down_column = np.array(item.ImageOrientationPatient, dtype=float).reshape(2, 3)
    row_step, column_step = (float(value) for value in item.PixelSpacing)
    origin = np.array(item.ImagePositionPatient, dtype=float)
    return [
        (origin + column * column_step * along_row + row * row_step * down_column) * [-1, -1, 1]
        for row, column in np.argwhere(item.pixel_array > 1000)
    ]


def test_complete_export_is_left_alone(export: Path, dim: int) -> None:
    before = tree(export)
    assert not write_demo_export(export, dim, seed=3, n_patients=N_PATIENTS, progress=False)
    assert tree(export) == before


@pytest.mark.parametrize("task", ["classification", "segmentation"])
@pytest.mark.parametrize("change", ["seed", "extra", "missing", "interrupted", "task"])
def test_other_export_is_refused(
    dim: int, change: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monai_salm.cohorts.classification._Series.write", touch_files)
    monkeypatch.setattr("monai_salm.cohorts.segmentation._Study.write", touch_files)
    write_demo_export(tmp_path, dim, seed=3, n_patients=N_PATIENTS, progress=False, task=task)
    assert not write_demo_export(tmp_path, dim, seed=3, n_patients=N_PATIENTS, progress=False, task=task)
    if change == "extra":
        (tmp_path / "thesis.docx").touch()
    if change == "missing":
        next(tmp_path.rglob("*.nii.gz")).unlink()
    if change == "interrupted":
        (tmp_path / "labels.csv").unlink()
    if change == "task":
        task = next(other for other in demo.PLANS if other != task)
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match="not a complete demo export with these parameters; delete it or"):
        seed = 4 if change == "seed" else 3
        write_demo_export(tmp_path, dim, seed=seed, n_patients=N_PATIENTS, progress=False, task=task)
    assert tree(tmp_path) == before


def touch_files(study: object, root: Path, template: object) -> None:
    for name in study.files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_foreign_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.docx").write_text("years of work")
    with pytest.raises(FileExistsError, match="not empty"):
        write_demo_export(tmp_path, 2, n_patients=N_PATIENTS, progress=False)
    assert tree(tmp_path) == {"thesis.docx": b"years of work"}


def test_missing_nilearn_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nilearn", None)
    with pytest.raises(ImportError, match=r"monai-salm\[demo\]"):
        write_demo_export(tmp_path / "export", 2, n_patients=N_PATIENTS, progress=False)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"spatial_dims": 4},
        {"spatial_dims": 2, "seed": -1},
        {"spatial_dims": 3, "n_patients": 5},
        {"spatial_dims": 3, "task": "detection"},
    ],
)
def test_impossible_parameters_are_named(arguments: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use "):
        write_demo_export(tmp_path / "export", **arguments)


@pytest.fixture(scope="module")
def lesion_export(dim: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("lesions") / "export"
    assert write_demo_export(output, dim, seed=3, n_patients=10, progress=False, task="segmentation")
    return output


def pairs(export: Path) -> list[tuple[nib.Nifti1Image, nib.Nifti1Image]]:
    return [(nib.load(export / row["case"]), nib.load(export / row["mask"])) for row in rows(export)]


def ball(spatial_dims: int) -> np.ndarray:
    """A brain of one tissue."""
    grid = np.indices(segmentation.GEOMETRY[spatial_dims].shape[:spatial_dims])
    center = np.array(grid.shape[1:]).reshape(-1, *[1] * spatial_dims) / 2
    return (np.linalg.norm(grid - center, axis=0) < 18).astype(np.float32)


def test_same_arguments_give_same_lesions(lesion_export: Path, dim: int, tmp_path: Path) -> None:
    write_demo_export(tmp_path / "again", dim, seed=3, n_patients=10, progress=False, task="segmentation")
    assert tree(tmp_path / "again") == tree(lesion_export)


def test_dataset_json_and_table_tell_the_same_pairs_and_name_every_file(lesion_export: Path) -> None:
    content = json.loads((lesion_export / "dataset.json").read_text())
    assert content["labels"] == {"0": "background", "1": "lesion"}
    table = {(row["case"], row["mask"]) for row in rows(lesion_export)}
    assert {(item["image"][2:], item["label"][2:]) for item in content["training"]} == table
    assert content["numTraining"] == len(content["training"]) == len(table)
    assert {name for pair in table for name in pair} == set(tree(lesion_export)) - {"dataset.json", "labels.csv"}
    for image, mask in table:
        assert image.startswith("imagesTr/") and mask == image.replace("imagesTr/", "labelsTr/")


def test_mask_lies_on_the_grid_of_its_image(lesion_export: Path, dim: int) -> None:
    for image, mask in pairs(lesion_export):
        assert image.shape == mask.shape == ((80, 96, 1) if dim == 2 else (48, 56, 48))
        assert np.array_equal(image.affine, mask.affine)
        assert [int(image.header[code]) for code in ("sform_code", "qform_code")] == [
            int(mask.header[code]) for code in ("sform_code", "qform_code")
        ]
        assert mask.get_data_dtype() == np.uint8 and (mask.dataobj.slope, mask.dataobj.inter) == (1, 0)
        assert set(np.unique(mask.dataobj)) <= {0, 1}


def test_lesion_files_differ_as_those_of_several_scanners(lesion_export: Path) -> None:
    images = [image for image, _ in pairs(lesion_export)]
    assert {image.get_data_dtype().name for image in images} == {"int16", "uint8", "float32"}
    assert len({(image.dataobj.slope, image.dataobj.inter) for image in images}) > 3
    assert {int(image.header["sform_code"]) for image in images} == {0, 1, 2}
    assert {nib.aff2axcodes(image.affine) for image in images} == {("R", "A", "S"), ("L", "P", "S")}
    for image in images:
        stored = np.asarray(image.dataobj.get_unscaled())
        assert len(np.unique(stored)) > 200 and np.isfinite(stored).all()


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_turned_file_holds_the_same_voxels_at_the_same_places(
    spatial_dims: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = segmentation.plan(spatial_dims, seed=0, n_patients=6)
    shape = (*plan.geometry.shape[:2], 3 if spatial_dims == 2 else plan.geometry.shape[2])
    physical = np.random.default_rng(0).uniform(0, 500, shape).astype(np.float32)
    physical[5, 7, 2] = 2000
    monkeypatch.setattr(segmentation, "simulate", lambda *_: (physical, (physical > 1000).astype(np.uint8)))
    for study in (plan.studies[2], plan.studies[4]):  # the second is turned
        study.write(tmp_path, physical)
        for names in zip(*study.pairs, strict=True):
            files = [nib.load(tmp_path / name) for name in names]
            places = [
                nib.affines.apply_affine(file.affine, index)
                for file in files
                for index in np.argwhere(file.get_fdata() > (1000 if "imagesTr" in names[0] else 0))
            ]
            # A header holds qform quaternions in single precision.
            assert np.allclose(places, [(study.affine @ [5, 7, 2, 1])[:3]], atol=1e-3)


def test_lesions_are_visible_and_of_both_signs(lesion_export: Path) -> None:
    from scipy import ndimage  # nilearn brings it

    contrasts = []
    for image, mask in pairs(lesion_export):
        voxels, lesion = image.get_fdata(), np.asarray(mask.dataobj) > 0
        noise = 1.05 * np.median(np.abs(np.diff(voxels, axis=0)))  # of normal noise; anatomy makes it larger
        spots, n_spots = ndimage.label(lesion)
        near = ndimage.binary_dilation(lesion)
        for spot in (spots == index + 1 for index in range(n_spots)):
            ring = ndimage.binary_dilation(spot, iterations=3) & ~near
            contrasts.append((voxels[spot].mean() - np.median(voxels[ring])) / noise)
    contrasts = np.array(contrasts)
    assert np.mean(np.abs(contrasts) > 2) > 0.9
    assert 0.2 < np.mean(contrasts > 0) < 0.8


def test_lesions_take_a_small_part_of_the_image_and_stay_inside_the_window(lesion_export: Path, dim: int) -> None:
    fractions = []
    for image, mask in pairs(lesion_export):
        voxels, lesion = image.get_fdata(), np.asarray(mask.dataobj) > 0
        fractions.append(lesion.mean())
        low, high = np.percentile(voxels, (0.5, 99.5))
        if lesion.any():
            assert np.mean((voxels[lesion] > low) & (voxels[lesion] < high)) > 0.9
    assert max(fractions) < 0.15
    assert (0.015 if dim == 2 else 0.004) < np.mean(fractions) < (0.06 if dim == 2 else 0.025)


def test_lesions_are_split_by_patient_as_file_names_tell_them(lesion_export: Path) -> None:
    split_of = {(row["case"].split("/")[1].split("_")[0], row["split"]) for row in rows(lesion_export)}
    assert len({patient for patient, _ in split_of}) == len(split_of) == 10
    assert {split for _, split in split_of} == {"train", "val", "test"}
    assert all(patient[:3] == "PAT" and patient[3:].isdigit() for patient, _ in split_of)


@pytest.mark.parametrize(
    ("spatial_dims", "sizes"),
    [(2, {"train": 180, "val": 36, "test": 72}), (3, {"train": 100, "val": 20, "test": 40})],
)
def test_every_split_has_images_with_no_to_three_lesions(spatial_dims: int, sizes: dict[str, int]) -> None:
    counts = {split: Counter() for split in sizes}
    for study in segmentation.plan(spatial_dims, seed=0).studies:
        counts[study.split].update(study.n_lesions)
    assert {split: sum(found.values()) for split, found in counts.items()} == sizes
    for split, found in counts.items():
        assert set(found) == {0, 1, 2, 3}
        assert found[0] == sizes[split] // 20
        assert max(found[n] for n in (1, 2, 3)) - min(found[n] for n in (1, 2, 3)) <= 2


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_lesion_mask_is_where_the_tissue_changed_most(spatial_dims: int) -> None:
    geometry, tissue = segmentation.GEOMETRY[spatial_dims], ball(spatial_dims)
    for seed in range(5):
        image, mask = lesions.add_lesions(0.7 * tissue, tissue, 1, geometry, np.random.default_rng(seed))
        change = np.abs(image - 0.7 * tissue)
        assert mask.any() and not mask[tissue == 0].any() and not change[tissue == 0].any()
        # Even tissue: the change is the lesion's contrast times its weight and opacity, and the edge is at one half.
        contrast = change.max() / lesions.OPACITY
        assert geometry.contrast[0] - 0.01 <= contrast <= geometry.contrast[1] + 0.01
        assert change[mask == 1].min() >= 0.48 * change.max()
        assert change[mask == 0].max() <= 0.52 * change.max()


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_image_without_lesion_is_left_as_it_is(spatial_dims: int) -> None:
    tissue = ball(spatial_dims)
    image, mask = lesions.add_lesions(tissue, tissue, 0, segmentation.GEOMETRY[spatial_dims], np.random.default_rng(0))
    assert np.array_equal(image, tissue) and not mask.any()


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_lesion_may_lie_anywhere(spatial_dims: int) -> None:
    geometry, tissue = segmentation.GEOMETRY[spatial_dims], ball(spatial_dims)
    masks = [lesions.add_lesions(tissue, tissue, 1, geometry, np.random.default_rng(seed))[1] for seed in range(150)]
    frequency = np.mean(masks, axis=0)[tissue > 0]
    # Were the place fixed, a voxel would be lesion nearly always or never.
    assert frequency.max() < 4 * frequency.mean()
    assert np.mean(frequency > 0) > 0.95
