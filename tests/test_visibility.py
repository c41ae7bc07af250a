# SPDX-License-Identifier: Apache-2.0
"""The visibility gate: a protected image beside its own JPEG 2000 copy at 5:1."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from exports import write_labels
from pydicom.data import get_testdata_file

from monai_salm.io import formats
from monai_salm.io.base import Case, Outline, RefusedError, StoredImage
from monai_salm.io.dicom import read
from monai_salm.perturbations.budget import Budget
from monai_salm.release.catalog import scan
from monai_salm.release.custody import read_refusals
from monai_salm.release.labels import Cohort, load_cohort
from monai_salm.release.protect import protect_cohort
from monai_salm.release.visibility import VISIBILITY, WindowVisibility, read_visibility, summary
from monai_salm.stored import SliceScaling, StoredCodec
from monai_salm.verification.visibility import CROP, VisibilityGate, measure_visibility

CASE = Case("case-1", "dicom", (), ("a",), "group-1")


@pytest.fixture(scope="module")
def head() -> StoredImage:
    """CT of a head, 512 by 512, that lists a narrow and a wide window."""
    path = Path(get_testdata_file("J2K_pixelrep_mismatch.dcm", download=False))
    return read(Case("case-1", "dicom", (path,), ("a",), "group-1"), 2)


def signs(image: StoredImage, hu: int, ratio: float) -> np.ndarray:
    """Random signs on a part of the tissue's voxels."""
    rng = np.random.default_rng(0)
    tissue = (image.stored > -200) & (image.stored < 1500)
    return (tissue & (rng.random(tissue.shape) < ratio)) * rng.choice([-hu, hu], tissue.shape)


def smooth(shape: tuple[int, ...], seed: int = 0) -> StoredImage:
    """A smooth image with some noise, which a codec can press."""
    axes = np.meshgrid(*[np.linspace(0, 3, length) for length in shape], indexing="ij")
    values = 500 + 300 * sum(np.sin(axis) for axis in axes) + np.random.default_rng(seed).normal(0, 2, shape)
    return StoredImage(values.astype(np.int16)[None], StoredCodec("int16", (0.0, 1500.0)))


@pytest.mark.parametrize(
    ("hu", "ratio", "psnr", "hidden"), [(2, 0.02, 52.4, True), (5, 0.02, 44.5, False), (5, 0.1, 37.5, False)]
)
def test_a_ct_head_has_the_numbers_that_are_known_of_it(head, hu, ratio, psnr, hidden):
    narrow, wide = measure_visibility(head, signs(head, hu, ratio))
    assert (narrow.low, narrow.high) == (-10, 89)
    assert (wide.low, wide.high) == (-60, 139)
    assert narrow.psnr == pytest.approx(psnr, abs=1)
    assert narrow.psnr_compressed == pytest.approx(45, abs=1.5)
    assert wide.psnr > narrow.psnr and wide.ssim > narrow.ssim, "a narrow window shows more"
    assert narrow.less_visible is wide.less_visible is hidden


def test_a_visible_perturbation_is_refused_with_its_numbers_and_a_hidden_one_is_not(head):
    gate = VisibilityGate("refuse")
    assert gate(CASE, head, signs(head, 2, 0.02)).less_visible
    with pytest.raises(RefusedError, match=r"visibility_gate: in the window -10 to 89 HU .*PSNR 3\d\.\d dB") as info:
        gate(CASE, head, signs(head, 12, 0.1))
    assert info.value.reason == "visibility_gate"
    assert not VisibilityGate("report")(CASE, head, signs(head, 12, 0.1)).less_visible


def test_a_change_outside_the_window_is_not_visible_in_it(head):
    bone = (head.stored > 400).astype(int) * 20
    assert measure_visibility(head, bone)[0].psnr is None
    assert all(window.less_visible for window in measure_visibility(head, bone))


def test_both_measures_must_hold():
    assert WindowVisibility(0, 1, 40.0, 0.99, 40.0, 0.99).less_visible
    assert not WindowVisibility(0, 1, 39.0, 0.99, 40.0, 0.99).less_visible
    assert not WindowVisibility(0, 1, 41.0, 0.98, 40.0, 0.99).less_visible
    assert not WindowVisibility(0, 1, 60.0, 0.99, None, 1.0).less_visible, "the copy is perfect"


def test_of_a_large_image_the_part_with_the_perturbation_is_compared():
    image = smooth((700, 900))
    delta = np.zeros(image.stored.shape, int)
    delta[0, 600:632, 800:832] = 4
    (found,) = measure_visibility(image, delta)
    assert found.psnr == pytest.approx(-10 * np.log10((4 / 1500) ** 2 * 32**2 / CROP**2), abs=0.01)


def test_of_a_volume_the_slices_with_the_perturbation_are_compared_across_its_thickest_axis():
    image = smooth((40, 150, 130))
    image = StoredImage(image.stored, image.codec, (5.0, 1.0, 1.0))
    delta = np.zeros(image.stored.shape, int)
    delta[0, 17, 50:90, 50:90] = 4
    (found,) = measure_visibility(image, delta)
    assert found.psnr == pytest.approx(-10 * np.log10((4 / 1500) ** 2 * 40**2 / (8 * 150 * 130)), abs=0.01)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32", "float64"])
@pytest.mark.parametrize("shape", [(28, 28), (1, 300), (130, 131)])
def test_any_type_and_size_can_be_measured(dtype, shape):
    window = (0.0, 250.0)
    values = (smooth(shape).stored / 8).astype(dtype)
    if dtype == "int32":
        values = values * np.int32(10**6)
        window = (0.0, 2.5e8)
    if dtype.startswith("float"):
        values[0, 0, :5] = [np.nan, np.inf, -np.inf, 1e30, 0]
    image = StoredImage(values, StoredCodec(dtype, window, padding=(0, 0)))
    (found,) = measure_visibility(image, np.where(np.arange(values.size).reshape(values.shape) % 9 == 5, 1, 0))
    assert np.isfinite([found.psnr, found.ssim, found.psnr_compressed, found.ssim_compressed]).all()


def test_padding_is_not_what_makes_the_copy_bad():
    image = smooth((200, 200))
    padded = image.stored.copy()
    padded[0, :100] = -30000
    delta = np.zeros(padded.shape, int)
    delta[0, 150:, :] = 1
    codec = StoredCodec("int16", image.codec.window, padding=(-30000, -30000))
    (plain,), (found,) = (measure_visibility(each, delta) for each in (image, StoredImage(padded, codec)))
    assert found.psnr_compressed > plain.psnr_compressed - 3


def test_chosen_slices_are_compared_as_in_the_whole_volume_and_each_by_its_own_scaling():
    image = smooth((20, 60, 50))
    slices = SliceScaling(0, tuple(1 + 0.1 * np.arange(20)), tuple(np.arange(20.0)))
    image = StoredImage(image.stored, StoredCodec("int16", (0.0, 1500.0), slices=slices))
    delta = np.random.default_rng(0).integers(-3, 4, image.stored.shape)
    delta[0, ::2] = 0
    axis, chosen = VisibilityGate().slices(Outline(image.stored.shape, image.codec), delta)
    assert axis == 0 and len(chosen) == 8 and all(index % 2 for index in chosen)
    part = StoredImage(image.stored[:, chosen], image.codec.of_slices(chosen))
    assert measure_visibility(part, delta[:, chosen]) == measure_visibility(image, delta)
    assert VisibilityGate("none").slices(Outline(image.stored.shape, image.codec), delta)[1] == []


def test_an_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match="use one of report, refuse, none"):
        VisibilityGate("off")


class TestRelease:
    @pytest.fixture
    def cohort(self, tmp_path):
        (tmp_path / "in").mkdir()
        for index in range(4):
            nib.save(nib.Nifti1Image(smooth((40, 44, 6), index).stored[0], np.eye(4)), tmp_path / f"in/v{index}.nii")
        write_labels(tmp_path / "in", [f"v{i}.nii,{'ab'[i % 2]}" for i in range(4)])
        return load_cohort(tmp_path / "in", spatial_dims=3)

    @pytest.fixture
    def bank(self, cohort):
        """Of two cases few voxels change by little, of two all by much."""
        bank = {}
        for index, case in enumerate(cohort.cases):
            image = formats.read(case, 3)
            _, upper = image.codec.bounds(torch.from_numpy(image.stored), Budget.parse("30 stored"))
            bank[case.sample_id] = upper.numpy()
            if index % 2:
                few = np.arange(upper.numel()).reshape(upper.shape) % 500 == 0
                bank[case.sample_id] = np.minimum(upper.numpy(), few)
        return bank

    def protect(self, cohort, bank, out, mode):
        gate = VisibilityGate(mode)
        return protect_cohort(cohort, bank, budget="30 stored", output_dir=out, spatial_dims=3, gate=gate)

    def test_every_case_is_reported_on_the_private_side(self, cohort, bank, tmp_path):
        rows = self.protect(cohort, bank, tmp_path / "out", "report")
        assert len({row.sample_id for row in rows if row.levels}) == 4
        found = read_visibility(tmp_path / "out")
        assert {each.sample_id: each.less_visible for each in found} == {
            case.sample_id: bool(index % 2) for index, case in enumerate(cohort.cases)
        }
        lines = (tmp_path / "out" / VISIBILITY).read_text().splitlines()
        assert [json.loads(line)["less_visible"] for line in lines] == [each.less_visible for each in found]
        assert summary(tmp_path / "out") == "visibility: 2 of 4 cases change more visibly than by JPEG 2000 at 5:1"

    def test_what_is_reported_of_a_volume_is_measured_as_on_the_whole_of_it(self, tmp_path):
        (tmp_path / "in").mkdir()
        nib.save(nib.Nifti1Image(smooth((24, 44, 40)).stored[0], np.diag([3, 1, 1, 1])), tmp_path / "in/v.nii")
        catalog = scan(tmp_path / "in", 3)
        cohort = Cohort(catalog.cases, ("a",), catalog.refusals, catalog.root)
        image = formats.read(cohort.cases[0], 3)
        lower, upper = image.codec.bounds(torch.from_numpy(image.stored), Budget.parse("30 stored"))
        delta = np.where(np.random.default_rng(0).random(lower.shape) < 0.5, lower, upper)
        delta[:, ::3] = 0
        self.protect(cohort, {cohort.cases[0].sample_id: delta}, tmp_path / "out", "report")
        (found,) = read_visibility(tmp_path / "out")
        assert found.windows == measure_visibility(image, delta)

    def test_a_rerun_adds_nothing_and_a_torn_line_is_dropped(self, cohort, bank, tmp_path):
        self.protect(cohort, bank, tmp_path / "out", "report")
        file = tmp_path / "out" / VISIBILITY
        whole = file.read_bytes()
        self.protect(cohort, bank, tmp_path / "out", "report")
        assert file.read_bytes() == whole
        file.write_bytes(whole + b'{"sample_id": "ca')
        self.protect(cohort, bank, tmp_path / "out", "report")
        assert file.read_bytes() == whole

    def test_what_is_too_visible_is_refused_and_not_written(self, cohort, bank, tmp_path):
        rows = self.protect(cohort, bank, tmp_path / "out", "refuse")
        assert [row.sample_id for row in rows if row.levels] == [case.sample_id for case in cohort.cases][1::2]
        assert len(list((tmp_path / "out/protected").rglob("*.nii"))) == 2
        assert [refusal.reason for refusal in read_refusals(tmp_path / "out")] == ["visibility_gate"] * 2

    def test_asking_for_refusal_later_does_not_keep_what_was_written(self, cohort, bank, tmp_path):
        self.protect(cohort, bank, tmp_path / "out", "none")
        assert summary(tmp_path / "out") == ""
        with pytest.raises(ValueError, match="choose a new output folder"):
            self.protect(cohort, bank, tmp_path / "out", "refuse")


def test_every_slice_is_shown_by_its_own_slope():
    plain = smooth((40, 44, 3))
    factors = np.array([1.0, 2.0, 4.0])
    slices = SliceScaling(2, tuple((1 / factors).tolist()), (0.0, 0.0, 0.0))
    scaled = StoredImage(
        (plain.stored * factors).astype(np.int16), StoredCodec("int16", (0.0, 1500.0), 0.25, slices=slices)
    )
    delta = np.random.default_rng(1).choice([-3, 0, 3], plain.stored.shape)
    (one,) = measure_visibility(plain, delta)
    (other,) = measure_visibility(scaled, (delta * factors).astype(int))
    assert other.psnr == pytest.approx(one.psnr) and other.ssim == pytest.approx(one.ssim)
