# SPDX-License-Identifier: Apache-2.0
"""Fidelity against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from exports import write_labels, write_nifti
from monai.metrics import SSIMMetric

from monai_salm.io import formats
from monai_salm.io.base import StoredImage
from monai_salm.release.labels import load_cohort
from monai_salm.release.protect import protect_cohort, read_protected
from monai_salm.similarity import structural_similarity
from monai_salm.stored import StoredCodec
from monai_salm.verification.fidelity import Fidelity, ssim_sample


def pair(moves: dict[int, float], *, size: int = 16, dtype: str = "int16", **codec) -> tuple[StoredImage, StoredImage]:
    """A ramp from 0 to 255 and its copy with some voxels moved."""
    stored = np.linspace(0, 255, size * size).reshape(1, size, size).astype(dtype)
    after = stored.copy()
    for index, move in moves.items():
        after.flat[index] += np.asarray(move).astype(dtype)
    how = StoredCodec(dtype, **{"window": (0.0, 255.0), **codec})
    return StoredImage(stored, how), StoredImage(after, how)


def test_errors_fraction_and_psnr_are_those_of_hand_computation():
    fidelity = Fidelity()
    fidelity.add(*pair({20: 3, 21: -5, 100: 1}, slope=0.5, window=(0.0, 127.5), unit="HU"))
    found = fidelity.result(mask_ratio=0.02)
    assert found["n_cases"] == found["n_ssim_cases"] == 1
    assert found["max_error_stored"] == 5
    assert found["max_error_physical"] == 2.5
    assert found["max_error_window"] == pytest.approx(2.5 / 127.5)
    assert found["unit"] == "HU"
    assert found["mask_fraction"] == {"mean": 3 / 256, "min": 3 / 256, "max": 3 / 256}
    assert found["mask_fraction_asked"] == 0.02
    squared = (9 + 25 + 1) / 255**2 / 256
    assert found["psnr"]["mean"] == pytest.approx(-10 * math.log10(squared), abs=1e-3)


def test_values_are_collected_over_cases():
    fidelity = Fidelity()
    for moves in ({20: 3}, {30: -7, 31: 7}):
        fidelity.add(*pair(moves))
    found = fidelity.result()
    assert found["max_error_stored"] == 7
    assert found["mask_fraction"]["min"] == 1 / 256
    assert found["mask_fraction"]["max"] == 2 / 256
    psnrs = [-10 * math.log10(squares / 255**2 / 256) for squares in (9, 98)]
    assert found["psnr"]["mean"] == pytest.approx(np.mean(psnrs), abs=1e-3)
    assert found["psnr"]["std"] == pytest.approx(np.std(psnrs, ddof=1), abs=1e-3)
    assert found["psnr"]["min"] == pytest.approx(min(psnrs), abs=1e-3)


def test_ssim_of_two_constant_images_has_the_closed_form():
    # No variance: only the luminance term is left.
    one, other = torch.full((1, 24, 24), 0.5), torch.full((1, 24, 24), 0.8)
    expected = (2 * 0.5 * 0.8 + 1e-4) / (0.5**2 + 0.8**2 + 1e-4)
    assert float(structural_similarity(one[None], other[None])) == pytest.approx(expected, abs=1e-3)  # float32
    assert float(structural_similarity(one[None], one[None])) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 5, 40), (1, 6, 7, 1), (1, 1, 1), (1, 12, 13, 4)])
def test_ssim_window_fits_small_images(shape):
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    assert float(structural_similarity(image[None], image[None])) == pytest.approx(1.0, abs=1e-5)
    if image.numel() > 1:
        assert float(structural_similarity(image[None], (1 - image)[None])) < 0.9


@pytest.mark.parametrize("shape", [(1, 64, 80), (3, 90, 31), (1, 75, 24, 17), (2, 40, 12, 4)])
def test_ssim_is_that_of_monai_whatever_the_slabs(shape):
    clean = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    moved = (clean + 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)
    size = [min(11, length - (length + 1) % 2) for length in shape[1:]]
    expected = SSIMMetric(len(shape) - 1, data_range=1.0, win_size=size, reduction="none")(moved[None], clean[None])
    assert float(structural_similarity(clean[None], moved[None])) == pytest.approx(float(expected.mean()), abs=2e-5)
    assert float(structural_similarity(clean[None], moved[None])) < 0.99


def test_rounding_of_a_float_file_is_not_an_error_over_the_budget():
    # Near 1000, float32 cannot hold a step of 1/4096 of this window exactly.
    codec = StoredCodec("float32", window=(1000.0, 1000.7))
    before = np.full((1, 8, 8), 1000.3, np.float32)
    delta = np.zeros(before.shape, np.int16)
    delta[0, 2, 3] = 5
    after = codec.add(before, delta)
    raw = float(np.abs(after.astype(np.float64) - before).max())
    assert raw != 5 * codec.step
    fidelity = Fidelity()
    fidelity.add(StoredImage(before, codec), StoredImage(after, codec))
    assert fidelity.result()["max_error_stored"] == 5 * codec.step


def test_nan_that_stays_is_no_change():
    clean, protected = pair({20: 2.0}, dtype="float32")
    clean.stored.flat[7] = protected.stored.flat[7] = np.nan
    fidelity = Fidelity()
    fidelity.add(clean, protected)
    found = fidelity.result()
    assert found["mask_fraction"]["max"] == 1 / 256
    assert math.isfinite(found["psnr"]["mean"])


def test_psnr_inside_the_foreground_is_that_of_its_voxels_alone():
    fidelity, (clean, protected) = Fidelity(), pair({20: 3, 21: -5, 100: 1})
    foreground = np.zeros(clean.stored.shape, bool)
    foreground.flat[[20, 22, 100]] = True
    fidelity.add(clean, protected)
    assert "psnr_foreground" not in fidelity.result()
    fidelity.add(clean, protected, foreground=np.zeros_like(foreground))  # a case without foreground says nothing
    fidelity.add(clean, protected, foreground=foreground)
    found = fidelity.result()["psnr_foreground"]
    assert found == {
        "mean": pytest.approx(-10 * math.log10((9 + 1) / 255**2 / 3), abs=1e-3),
        "std": None,
        "min": found["mean"],
    }


def test_another_shape_is_refused():
    clean, protected = pair({1: 1})
    with pytest.raises(ValueError, match="not written from it"):
        Fidelity().add(clean, StoredImage(protected.stored[:, :4], protected.codec))
    with pytest.raises(ValueError, match="run protect first"):
        Fidelity().result()


def test_ssim_sample_does_not_depend_on_order():
    names = [f"case-{index}" for index in range(50)]
    assert ssim_sample(names, 10) == ssim_sample(reversed(names), 10)
    assert len(ssim_sample(names, 10)) == 10
    assert ssim_sample(names[:3], 10) == set(names[:3])


def test_written_files_are_measured(tmp_path):
    for index in range(6):
        write_nifti(tmp_path / "in" / f"v{index}.nii.gz", index)
    write_labels(tmp_path / "in", [f"v{index}.nii.gz,{'ab'[index % 2]}" for index in range(6)])
    cohort = load_cohort(tmp_path / "in", spatial_dims=3)
    bank = {}
    for number, case in enumerate(cohort.cases):
        image = formats.read(case, 3)
        low, high = image.codec.window
        room = (image.stored >= low) & (image.stored + 3.0 <= high)
        room.flat[np.flatnonzero(room)[4 + number :]] = False
        bank[case.sample_id] = (room * (3 if number == 2 else 1)).astype(np.int8)
    protect_cohort(cohort, bank, budget="3 stored", output_dir=tmp_path / "out", spatial_dims=3)
    twins, fidelity = read_protected(cohort, tmp_path / "out"), Fidelity()
    sample = ssim_sample(twins, 2)
    for case in cohort.released:
        fidelity.add(formats.read(case, 3), formats.read(twins[case.sample_id], 3), ssim=case.sample_id in sample)
    found = fidelity.result()
    assert (found["n_cases"], found["n_ssim_cases"]) == (6, 2)
    assert found["max_error_stored"] == 3
    voxels = 6 * 7 * 5
    assert found["mask_fraction"]["min"] == 4 / voxels
    assert found["mask_fraction"]["max"] == 9 / voxels
    assert found["mask_fraction"]["mean"] == pytest.approx(6.5 / voxels)
