# SPDX-License-Identifier: Apache-2.0
"""A folder of PNG and TIFF images through the release: labels by folder, exact copies, refusals with reasons."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_protect import bank_of, protect

from monai_salm.io import formats
from monai_salm.release.labels import count_classes, load_cohort
from monai_salm.release.protect import read_protected
from monai_salm.transforms import LoadStored


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
