# SPDX-License-Identifier: Apache-2.0
"""A folder of PNG and TIFF images through the release: labels by folder, exact copies, refusals with reasons."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from exports import write_nifti
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_protect import bank_of, protect

from monai_salm.io import formats
from monai_salm.release.catalog import scan
from monai_salm.release.folders import count_channels
from monai_salm.release.labels import count_classes, load_cohort
from monai_salm.release.protect import read_protected
from monai_salm.release.visibility import read_visibility
from monai_salm.transforms import LoadStored
from monai_salm.verification.visibility import VisibilityGate


def write_image(path: Path, seed: int = 0, **options: object) -> Path:
    """A 16-bit TIFF or an 8-bit image of another kind, of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype, top = (np.uint16, 60000) if path.suffix == ".tif" else (np.uint8, 256)
    Image.fromarray(np.random.default_rng(seed).integers(0, top, (14, 11)).astype(dtype)).save(path, **options)
    return path


@pytest.fixture
def export(tmp_path) -> Path:
    for index in range(8):
        label = "benign" if index % 2 else "malign"
        write_image(tmp_path / "in" / label / f"patient_{index}" / ("x.tif" if index > 5 else "x.png"), index)
    write_image(tmp_path / "in" / "benign" / "photo.jpg")
    return tmp_path / "in"


def test_png_and_tiff_folders_are_written_with_their_class_folders(export, tmp_path):
    assert count_classes(export) == 2
    cohort = load_cohort(export)
    assert cohort.classes == ("benign", "malign") and len(cohort.cases) == 8
    assert [refusal.reason for refusal in cohort.refusals] == ["jpeg_image"]
    assert len({case.group for case in cohort.cases}) == 8
    bank = bank_of(cohort, 2)
    rows = protect(cohort, bank, tmp_path / "out", 2)
    assert {row.file for row in rows if row.levels} == {case.names[0] for case in cohort.cases}
    twins = read_protected(cohort, tmp_path / "out")
    for case in cohort.cases:
        before, after = (formats.read(one, 2) for one in (case, twins[case.sample_id]))
        np.testing.assert_array_equal(after.stored.astype(int) - before.stored, bank[case.sample_id])
        shown = np.asarray(Image.open(tmp_path / "out" / "protected" / case.names[0]))
        np.testing.assert_array_equal(shown, after.stored[0])
    again = load_cohort((tmp_path / "out" / "protected").rename(tmp_path / "shared"))
    assert [case.label for case in again.cases] == [case.label for case in cohort.cases]


def test_a_single_image_is_loaded_with_its_codec(tmp_path):
    image = LoadStored(spatial_dims=2)(write_image(tmp_path / "x.tif"))
    assert image.shape == (1, 14, 11) and image.meta["stored_codec"]["dtype"] == "uint16"


def write_rgb(folder: Path, count: int = 8, shape: tuple[int, int] = (18, 15)) -> Path:
    """RGB images of noise in class folders."""
    rng = np.random.default_rng(0)
    for index in range(count):
        path = folder / ("benign" if index % 2 else "malign") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(20, 230, (*shape, 3)).astype(np.uint8)).save(path)
    return folder


def test_rgb_images_keep_their_colors_but_for_the_perturbation(tmp_path):
    cohort = load_cohort(write_rgb(tmp_path / "in"))
    bank = bank_of(cohort, 2)
    assert {delta.shape for delta in bank.values()} == {(3, 18, 15)}
    protect(cohort, bank, tmp_path / "out", 2, gate=VisibilityGate())
    for case in cohort.released:
        before, after = (Image.open(tmp_path / root / case.names[0]) for root in ("in", "out/protected"))
        assert after.mode == "RGB"
        change = np.asarray(after).astype(int) - np.asarray(before)
        np.testing.assert_array_equal(change.transpose(2, 0, 1), bank[case.sample_id])
    measured = read_visibility(tmp_path / "out")
    assert len(measured) == 8 and all(window.psnr is not None for case in measured for window in case.windows)


def test_images_of_the_other_kind_are_refused_by_name(tmp_path):
    write_rgb(tmp_path / "in")
    write_image(tmp_path / "in" / "benign" / "gray.png")
    assert count_channels(tmp_path / "in") == 3
    assert [refusal.reason for refusal in load_cohort(tmp_path / "in").refusals] == ["other_channels"]
    for index in range(9):
        write_image(tmp_path / "in" / "malign" / f"gray{index}.png", index)
        write_image(tmp_path / "in" / "benign" / f"gray{index}.png", index)
    assert count_channels(tmp_path / "in") == 1
    cohort = load_cohort(tmp_path / "in")
    assert len(cohort.cases) == 19 and len(cohort.refusals) == 8


def test_files_with_free_text_are_no_deidentified_files(tmp_path):
    info = PngInfo()
    info.add_text("Comment", "Jane")
    write_image(tmp_path / "a.png", pnginfo=info)
    write_image(tmp_path / "b.tif", description="Jane")
    write_image(tmp_path / "c.png")
    write_image(tmp_path / "d.tif")
    write_nifti(tmp_path / "e.nii", shape=(6, 7))
    for name, field in (("f.nii.gz", "descrip"), ("g.nii", "db_name")):
        image = nib.load(write_nifti(tmp_path / name, shape=(6, 7)))
        voxels = np.array(image.dataobj)
        image.header[field] = b"Jane"
        nib.save(nib.Nifti1Image(voxels, None, image.header), tmp_path / name)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane"))
    image.header["db_name"] = b""
    nib.save(nib.Nifti1Image(voxels, None, image.header), tmp_path / "h.nii")
    catalog = scan(tmp_path, 2, require_deidentified=True)
    assert {case.names[0] for case in catalog.cases} == {"c.png", "d.tif", "e.nii"}
    assert {refusal.reason for refusal in catalog.refusals} == {"not_deidentified"}
    assert not any("Jane" in refusal.detail for refusal in catalog.refusals)
    assert len(scan(tmp_path, 2).cases) == 8


def test_slices_count_as_grayscale(tmp_path):
    write_rgb(tmp_path / "in", 2)
    for index in range(3):
        write_nifti(tmp_path / "in" / f"{index}.nii.gz", index, (6, 7))
    assert count_channels(tmp_path / "in") == 1


def test_an_rgb_folder_goes_through_the_whole_command(tmp_path):
    """Fit, files, victims and report of three channels, with settings too small to mean anything."""
    export = write_rgb(tmp_path / "in", 16)
    few = {"rounds": 1, "surrogate_steps": 2, "perturbation_steps": 2, "batch_size": 8, "seeds": 1, "epochs": 1}
    sets = [f"--set={key}={value}" for key, value in (few | {"device": "cpu", "workers": 1}).items()]
    command = [
        sys.executable,
        "-m",
        "monai_salm.cli",
        "protect",
        export,
        tmp_path / "out",
        "--set=spatial_size=[16,16]",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, *sets], capture_output=True, text=True, timeout=300, env=env, cwd=tmp_path)
    assert result.returncode == 3 and "Traceback" not in result.stderr, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["cohort"]["released"] == 16 and report["fidelity"]["n_cases"] == 16
    assert 0 < report["fidelity"]["ssim"]["mean"] < 1
    changes = []
    for path in sorted(export.rglob("*.png")):
        after = np.asarray(Image.open(tmp_path / "out" / "protected" / path.relative_to(export))).astype(int)
        changes.append(after - np.asarray(Image.open(path)))
    assert all(0 < np.abs(change).max() <= 8 for change in changes)
    assert all((change[..., color] != 0).any() for change in changes for color in range(3))
    assert np.mean([change != 0 for change in changes]) <= 0.41, "the mask ratio counts all colors"
    shown = re.findall(r'src="data:image/png;base64,([^"]+)"', (tmp_path / "out" / "report.html").read_text())
    pictures = [Image.open(io.BytesIO(base64.b64decode(text))) for text in shown]
    assert {picture.mode for picture in pictures} >= {"RGB", "P"}
