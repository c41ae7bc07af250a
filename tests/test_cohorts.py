# SPDX-License-Identifier: Apache-2.0
"""The demo cohort is deterministic, well formed, and split and labeled fairly."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch

from monai_salm.cohorts import demo
from monai_salm.cohorts.anatomy import LABELS
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
    plan = demo._plan(spatial_dims, seed=0, n_patients=6)
    for series in (next(item for item in plan if item.is_dicom), next(item for item in plan if not item.is_dicom)):
        physical = np.zeros((*demo.GEOMETRY[spatial_dims].shape[:2], series.n_slices), dtype=np.float32)
        physical[5, 7, 2] = 2000
        (demo._write_dicom if series.is_dicom else demo._write_nifti)(tmp_path, series, physical)
        places = [place for name in series.files for place in bright_places(tmp_path / name)]
        assert np.allclose(places, [(demo._affine(series) @ [5, 7, 2, 1])[:3]], atol=1e-3)


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


@pytest.mark.parametrize("change", ["seed", "extra", "missing"])
def test_other_export_is_refused(dim: int, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_salm.cohorts.demo.simulate", lambda template, *_: template)
    monkeypatch.setattr("monai_salm.cohorts.demo._write_dicom", touch_files)
    monkeypatch.setattr("monai_salm.cohorts.demo._write_nifti", touch_files)
    write_demo_export(tmp_path, dim, seed=3, n_patients=N_PATIENTS, progress=False)
    if change == "extra":
        (tmp_path / "thesis.docx").touch()
    if change == "missing":
        next(tmp_path.rglob("*.nii.gz")).unlink()
    with pytest.raises(FileExistsError, match="not empty"):
        write_demo_export(tmp_path, dim, seed=4 if change == "seed" else 3, n_patients=N_PATIENTS, progress=False)


def touch_files(root: Path, series: object, physical: object) -> None:
    for name in series.files:
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
    "arguments", [{"spatial_dims": 4}, {"spatial_dims": 2, "seed": -1}, {"spatial_dims": 3, "n_patients": 5}]
)
def test_impossible_parameters_are_named(arguments: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use "):
        write_demo_export(tmp_path / "export", **arguments)
