# SPDX-License-Identifier: Apache-2.0
"""NIfTI of every kind that is taken, drawn at random: what is written is the source but for the voxels that move."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from exports import write_decathlon, write_label, write_labels, write_nifti
from hypothesis import given, settings
from hypothesis import strategies as st
from test_io_nifti import plain, write
from test_protect import bank_of, protect

from monai_salm.io import formats, nifti
from monai_salm.io.base import Case, RefusedError
from monai_salm.io.masks import read_mask
from monai_salm.release.catalog import scan
from monai_salm.release.labels import load_cohort
from monai_salm.release.protect import read_protected
from monai_salm.transforms import LoadStored

ENDINGS = (".nii", ".nii.gz")


def cases_of(path: Path, count: int) -> list[Case]:
    if count == 1:
        return [Case("case-0", "nifti", (path,), (path.name,), "g")]
    names = [nifti.volume_names(Path(path.name), index) for index in range(count)]
    return [Case(f"case-{index}", "nifti", (path,), name, "g", index) for index, name in enumerate(names)]


def steps_up(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """One step up, at a third of the voxels inside an interval."""
    delta = np.zeros(image.shape, np.int8)
    inside = np.flatnonzero((image >= low) & (image <= high))
    delta.flat[inside[::3]] = 1
    return delta


@given(
    dtype=st.sampled_from(nifti.SUPPORTED_TYPES),
    order=st.sampled_from("<>"),
    kind=st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]),
    ending=st.sampled_from(ENDINGS),
    scale=st.sampled_from([None, (0.0, 3.0), (float("nan"), 1.0), (2.0, -7.0), (-0.25, 100.0), (1e-3, 0.0)]),
    comment=st.binary(max_size=40),
    volumes=st.integers(1, 3),
    flips=st.tuples(*[st.sampled_from([1, -1])] * 3),
    axes=st.permutations([0, 1, 2]),
    trailing=st.binary(max_size=9),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=120, deadline=None)
def test_every_byte_but_those_of_moved_voxels_is_kept(
    tmp_path_factory, dtype, order, kind, ending, scale, comment, volumes, flips, axes, trailing, seed
):
    rng = np.random.default_rng(seed)
    is_float = np.dtype(dtype).kind == "f"
    values = rng.normal(0, 50, (3, 4, 5, volumes)) if is_float else rng.integers(10, 100, (3, 4, 5, volumes))
    voxels = values.astype(dtype)
    if is_float:
        voxels[0, 0, 0] = np.nan
        voxels[0, 0, 1] = np.inf
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) * flips)[list(axes)]
    slope, inter = scale or (None, 0.0)
    folder = tmp_path_factory.mktemp("exact")
    shape = voxels.shape if volumes > 1 else voxels.shape[:3]
    source = write(
        folder / f"a{ending}",
        voxels.reshape(shape),
        order=order,
        kind=kind,
        slope=slope,
        inter=inter,
        comment=comment,
        affine=affine,
    )
    content = plain(source.read_bytes()) + trailing
    source.write_bytes(gzip.compress(content) if ending == ".nii.gz" else content)
    assert nifti.count_volumes(source, 3) == volumes

    cases = cases_of(source, volumes)
    images = {case.sample_id: nifti.read(case, 3, "auto") for case in cases}
    deltas = {}
    for name, image in images.items():
        ends = sorted((edge - image.codec.intercept) / image.codec.slope for edge in image.codec.window)
        deltas[name] = steps_up(image.stored, ends[0], ends[1] - image.codec.step)
    options = {"spatial_dims": 3, "window": "auto"}
    ((name, written),) = nifti.protect(cases, lambda case: deltas[case.sample_id], **options)
    assert name.as_posix() == source.name
    assert written == next(nifti.protect(cases, lambda case: deltas[case.sample_id], **options))[1]
    if ending == ".nii.gz":
        assert written[:2] == b"\x1f\x8b" and written[3] == 0 and written[4:8] == bytes(4), "no name, no time"
    (copy := folder / f"b{ending}").write_bytes(written)

    before, after = np.frombuffer(content, np.uint8), np.frombuffer(plain(written), np.uint8)
    assert len(before) == len(after)
    item = np.dtype(dtype).itemsize
    start = len(content) - len(trailing) - voxels.size * item
    touched = np.unique((np.flatnonzero(before != after) - start) // item)
    moved = sum(np.count_nonzero(delta) for delta in deltas.values())
    assert len(touched) == moved and (touched >= 0).all() and (touched < voxels.size).all()

    check = nifti.verify(source, copy, max(image.codec.step for image in images.values()))
    assert check.changed == moved
    for case, twin in zip(cases, cases_of(copy, volumes), strict=True):
        image = images[case.sample_id]
        expect = image.codec.add(image.stored, deltas[case.sample_id])
        np.testing.assert_array_equal(nifti.read(twin, 3, "auto").stored, expect)
    # An independent reader: on the volumes' own axes nothing but the moved voxels differs, and NaN stays NaN.
    old, new = nib.load(source), nib.load(copy)
    assert old.header.binaryblock == new.header.binaryblock
    raw_old, raw_new = (np.asanyarray(each.dataobj.get_unscaled()) for each in (old, new))
    assert np.count_nonzero(~((raw_old == raw_new) | ((raw_old != raw_old) & (raw_new != raw_new)))) == moved


def write_four(path: Path, seed: int = 0, volumes: int = 3) -> Path:
    """A 4D file whose volumes have ranges of their own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(seed).integers(0, 1000, (6, 7, 5, volumes)) * (1 + np.arange(volumes))
    nib.save(nib.Nifti1Image(voxels.astype(np.int16), np.diag([1, 1, 2, 1])), path)
    return path


def test_each_volume_of_a_4d_file_is_a_case_with_its_own_window_and_the_file_is_written_whole(tmp_path):
    for index in range(4):
        write_four(tmp_path / "in" / f"sub-{index}" / "bold.nii.gz", index)
        (tmp_path / "in" / f"sub-{index}" / "notes.txt").write_text("0 1000\n")
    write_labels(tmp_path / "in", [f"sub-{index}/bold.nii.gz,{'ab'[index % 2]}" for index in range(4)])
    cohort = load_cohort(tmp_path / "in", spatial_dims=3)
    assert len(cohort.cases) == 12 and len({case.group for case in cohort.cases}) == 4
    assert [case.label for case in cohort.cases] == [0] * 3 + [1] * 3 + [0] * 3 + [1] * 3
    highs = [formats.read(case, 3).codec.window[1] for case in cohort.cases[:3]]
    assert highs[1] > 1.5 * highs[0] and highs[2] > 2.5 * highs[0]
    of_files = [{case.sample_id in cohort.held_out_ids for case in cohort.cases[at : at + 3]} for at in (0, 3, 6, 9)]
    assert all(len(found) == 1 for found in of_files), "volumes of one file are held out together"

    bank = bank_of(cohort)
    rows = protect(cohort, bank, tmp_path / "out")
    assert [row.file for row in rows if row.levels] == [f"sub-{index}/bold.nii.gz" for index in range(4)]
    for case in cohort.cases:
        twin = read_protected(cohort, tmp_path / "out")[case.sample_id]
        difference = formats.read(twin, 3).stored.astype(int) - formats.read(case, 3).stored
        np.testing.assert_array_equal(difference, bank[case.sample_id])
    table = (tmp_path / "out" / "protected" / "labels.csv").read_text().splitlines()
    assert table == ["case,label,split", *(f"sub-{index}/bold.nii.gz,{'ab'[index % 2]},train" for index in range(4))]
    shared = (tmp_path / "out" / "protected").rename(tmp_path / "shared")
    assert len(load_cohort(shared, spatial_dims=3).cases) == 12


def test_a_4d_file_is_released_with_all_its_volumes_or_not_at_all(tmp_path):
    source = write_four(tmp_path / "a.nii")
    cases = cases_of(source, 3)
    delta = np.ones((1, 6, 7, 5), np.int8)
    with pytest.raises(RefusedError, match="incomplete_file"):
        next(nifti.protect(cases[:2], lambda _: delta, spatial_dims=3, window=(-10, 5000)))
    with pytest.raises(RefusedError, match="no_such_image"):
        nifti.read(Case("c", "nifti", (source,), ("a.nii",), "g"), 3, "auto")
    with pytest.raises(RefusedError, match="several_images"):
        LoadStored(spatial_dims=3)(source)
    voxels = np.asanyarray(nib.load(source).dataobj).copy()
    voxels[..., 1] = 7
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), source)
    write_nifti(tmp_path / "b.nii")
    catalog = scan(tmp_path, 3)
    assert [refusal.reason for refusal in catalog.refusals] == ["constant_image"]
    assert [case.names[0] for case in catalog.cases] == ["b.nii"]


def test_a_4d_file_of_several_contrasts_keeps_its_voxel_labels(tmp_path):
    root = write_decathlon(tmp_path / "in", 4)
    for index in range(4):
        write_four(root / "imagesTr" / f"v{index:02d}.nii.gz", index, 2)
    cohort = load_cohort(root, spatial_dims=3)
    assert cohort.voxelwise and len(cohort.cases) == 8
    labels = [path.read_bytes() for path in sorted((root / "labelsTr").iterdir())]
    protect(cohort, bank_of(cohort), tmp_path / "out")
    written = tmp_path / "out" / "protected"
    assert [path.read_bytes() for path in sorted((written / "labelsTr").iterdir())] == labels
    twins = read_protected(cohort, tmp_path / "out")
    for case in cohort.cases:
        np.testing.assert_array_equal(read_mask(case, 3), read_mask(twins[case.sample_id], 3))
    assert len(load_cohort(written.rename(tmp_path / "shared"), spatial_dims=3).cases) == 8


def test_labels_of_several_volumes_are_refused(tmp_path):
    path = write_label(tmp_path / "a.nii", np.zeros((3, 3, 3, 2), np.uint8))
    with pytest.raises(RefusedError, match="multi_volume"):
        nifti.read_labels(path, 3)


def test_pairs_of_header_and_voxels_are_refused_by_name(tmp_path):
    voxels = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    nib.save(nib.Nifti1Pair(voxels, np.eye(4)), tmp_path / "a.hdr")
    nib.AnalyzeImage(voxels, np.eye(4)).to_filename(tmp_path / "b.hdr")
    content = bytearray((tmp_path / "b.hdr").read_bytes())
    write_nifti(tmp_path / "good.nii")
    assert len(content) == 348
    found = scan(tmp_path, 3)
    reasons = {found.refused_names[refusal.name][0]: refusal.reason for refusal in found.refusals}
    expected = {"a.hdr": "nifti_pair", "a.img": "nifti_pair", "b.hdr": "analyze_pair", "b.img": "nifti_pair"}
    assert reasons == expected


def test_a_gzip_bomb_is_read_no_further_than_its_header_promises(tmp_path):
    source = write(tmp_path / "a.nii", np.arange(60, dtype=np.int16).reshape(3, 4, 5))
    bomb = gzip.compress(source.read_bytes() + bytes(2**26))
    assert len(bomb) < 2**17
    (tmp_path / "bomb.nii.gz").write_bytes(bomb)
    with pytest.raises(RefusedError, match="trailing_data"):
        nifti.read(Case("c", "nifti", (tmp_path / "bomb.nii.gz",), ("bomb.nii.gz",), "g"), 3, "auto")
