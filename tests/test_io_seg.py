# SPDX-License-Identifier: Apache-2.0
"""DICOM SEG files: frame to slice by UID and position, and everything that must be refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dicom_files import write_enhanced
from exports import SIZE, edit_dicom, write_segmentation, write_series
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset, dcmread
from pydicom.uid import JPEGLSLossless, RLELossless, generate_uid

from monai_salm.io import dicom, formats
from monai_salm.io.base import Case, Mask, RefusedError
from monai_salm.io.masks import read_mask

N = 4


def one_hot(classes: np.ndarray, count: int = 2) -> np.ndarray:
    """(slices, rows, columns) class indices -> (slices, rows, columns, segments)."""
    return np.stack([classes == number for number in range(1, count + 1)], -1).astype(np.uint8)


def truth(seed: int = 0, empty: tuple[int, ...] = ()) -> np.ndarray:
    """(slices, rows, columns) class indices 0, 1 and 2."""
    classes = np.random.default_rng(seed).integers(0, 3, (N, SIZE, SIZE)).astype(np.uint8)
    classes[list(empty)] = 0
    return classes


def canonical(classes: np.ndarray) -> np.ndarray:
    """As the series of ``write_series`` lies: columns to the left, rows to posterior, slices to superior."""
    return classes.transpose(2, 1, 0)[None, ::-1, ::-1]


def case_of(paths: list[Path], seg: Path, values: tuple[int, ...] = (0, 1, 2)) -> Case:
    return Case("case-0", "dicom", tuple(paths), ("A",), "p", mask=Mask(seg, seg.name, values))


@pytest.fixture
def series(tmp_path) -> list[Path]:
    return write_series(tmp_path / "A", "one", N)


def refused(case: Case, reason: str, *words: str, spatial_dims: int = 3) -> None:
    with pytest.raises(RefusedError) as error:
        read_mask(case, spatial_dims)
    assert error.value.reason == reason, error.value
    for word in words:
        assert word in error.value.detail, error.value.detail


def shuffle_frames(dataset: Dataset, seed: int = 1) -> None:
    """Frames and their pixels (BINARY, SIZE x SIZE bits each) in another order."""
    frames = list(dataset.PerFrameFunctionalGroupsSequence)
    order = np.random.default_rng(seed).permutation(len(frames))
    pixels = np.frombuffer(dataset.PixelData, np.uint8).reshape(len(frames), -1)
    dataset.PerFrameFunctionalGroupsSequence = [frames[index] for index in order]
    dataset.PixelData = pixels[order].tobytes()


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_segmentation_lies_where_its_image_lies(tmp_path, series, kind, spatial_dims):
    classes = truth(empty=(1,))
    pixels = classes if kind == "LABELMAP" else one_hot(classes)
    options = {"max_fractional_value": 200} if kind == "FRACTIONAL" else {}
    seg = write_segmentation(
        tmp_path / "seg", series, pixels.astype(float if options else np.uint8), kind=kind, **options
    )
    if spatial_dims == 3:
        found = read_mask(case_of(series, seg), 3)
        assert found.dtype == np.uint8 and found.shape == formats.read(case_of(series, seg), 3).stored.shape
        np.testing.assert_array_equal(found, canonical(classes))
    else:
        for path, expected in zip(series, classes, strict=True):
            np.testing.assert_array_equal(read_mask(case_of([path], seg), 2), expected[None])


def test_the_order_of_frames_and_files_means_nothing(tmp_path, series):
    classes = truth()
    seg = write_segmentation(tmp_path / "seg", series, one_hot(classes))
    edit_dicom(seg, shuffle_frames)
    for files in (series, series[::-1], sorted(series)):
        np.testing.assert_array_equal(read_mask(case_of(files, seg), 3), canonical(classes))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), empty=st.sets(st.integers(0, N - 1), max_size=N - 1), order=st.permutations(range(N)))
def test_any_order_and_any_left_out_frames_give_the_same_labels(tmp_path_factory, seed, empty, order):
    folder = tmp_path_factory.mktemp("seg")
    series = write_series(folder / "A", "one", N)
    classes = truth(seed, tuple(empty))
    shuffled = [series[index] for index in order]
    seg = write_segmentation(folder / "seg", shuffled, one_hot(classes[list(order)]))
    edit_dicom(seg, lambda dataset: shuffle_frames(dataset, seed))
    np.testing.assert_array_equal(read_mask(case_of(series, seg), 3), canonical(classes))


def frames_of(path: Path) -> list[Dataset]:
    return list(dcmread(path).PerFrameFunctionalGroupsSequence)


def forget_sources(dataset: Dataset) -> None:
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        del frame.DerivationImageSequence


def test_frames_without_source_are_placed_by_position(tmp_path, series):
    seg = write_segmentation(tmp_path / "seg", series, one_hot(truth()))
    edit_dicom(seg, forget_sources)
    np.testing.assert_array_equal(read_mask(case_of(series, seg), 3), canonical(truth()))
    np.testing.assert_array_equal(read_mask(case_of(series[1:2], seg), 2), truth()[1:2])


def test_frames_without_position_are_placed_by_source(tmp_path, series):
    """As of radiographs, which have no place in the patient."""
    for path in series:
        edit_dicom(path, forget_place)
    seg = write_segmentation(tmp_path / "seg", series[:1], one_hot(truth()[:1]))
    np.testing.assert_array_equal(read_mask(case_of(series[:1], seg), 2), truth()[:1])
    edit_dicom(seg, forget_sources)
    refused(case_of(series[:1], seg), "mask_unplaced", spatial_dims=2)


def forget_place(dataset: Dataset) -> None:
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient"):
        delattr(dataset, keyword)


@pytest.mark.parametrize(
    ("shift", "named", "fits"), [(0.009, False, True), (0.12, True, True), (0.12, False, False), (0.5, True, False)]
)
def test_uid_and_position_must_agree(tmp_path, series, shift, named, fits):
    """To 5 % of the gap of 2.5 mm where a frame names its one source, else to 0.01 mm."""
    seg = write_segmentation(tmp_path / "seg", series, one_hot(truth()))

    def move(dataset: Dataset) -> None:
        position = dataset.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0]
        position.ImagePositionPatient = [0, 0, float(position.ImagePositionPatient[2]) + shift]

    edit_dicom(seg, move)
    if not named:
        edit_dicom(seg, forget_sources)
    if fits:
        np.testing.assert_array_equal(read_mask(case_of(series, seg), 3), canonical(truth()))
    elif named:
        refused(case_of(series, seg), "mask_affine", "0.5 mm", "0.125 mm are tolerated")
    else:
        refused(case_of(series, seg), "mask_missing_slices", "1 of 5 slices", "up to 0.12 mm", "0.01 mm are tolerated")


def test_one_slice_alone_tells_its_gap_in_its_header(tmp_path, series):
    seg = write_segmentation(tmp_path / "seg", series[:1], one_hot(truth()[:1]))

    def move(dataset: Dataset) -> None:
        dataset.ImagePositionPatient = [0, 0, 0.12]
        dataset.SpacingBetweenSlices = dataset.SliceThickness = None

    edit_dicom(series[0], move)
    refused(case_of(series[:1], seg), "mask_affine", "0.01 mm are tolerated", spatial_dims=2)
    edit_dicom(series[0], lambda dataset: setattr(dataset, "SpacingBetweenSlices", 2.5))
    np.testing.assert_array_equal(read_mask(case_of(series[:1], seg), 2), truth()[:1])


def test_a_frame_on_another_slice_than_its_source_is_refused(tmp_path, series):
    seg = write_segmentation(tmp_path / "seg", series, one_hot(truth()))

    def swap(dataset: Dataset) -> None:
        first, last = dataset.PerFrameFunctionalGroupsSequence[0], dataset.PerFrameFunctionalGroupsSequence[-1]
        first.PlanePositionSequence, last.PlanePositionSequence = (
            last.PlanePositionSequence,
            first.PlanePositionSequence,
        )

    edit_dicom(seg, swap)
    refused(case_of(series, seg), "mask_affine", "7.5 mm")
    refused(case_of(series[:1], seg), "mask_affine", spatial_dims=2)


@pytest.mark.parametrize(
    ("shift", "wrong", "reason", "words"),
    [
        (0.1, 0, "", ""),
        (0.2, 0, "mask_affine", "0.2 mm"),
        (0, 1, "mask_affine", "7.5 mm from the slice that it names"),
        (0, 5, "mask_missing_slices", "5 of 6 slices"),
    ],
)
def test_frames_of_a_multi_frame_image_are_known_by_their_number(tmp_path, shift, wrong, reason, words):
    image = write_enhanced(tmp_path / "image", frames=5)
    place = [frame.PlanePositionSequence[0].ImagePositionPatient[2] for frame in frames_of(image)]
    classes = np.random.default_rng(0).integers(0, 3, (5, 32, 36)).astype(np.uint8)
    seg = write_segmentation(tmp_path / "seg", [image], one_hot(classes))

    def change(dataset: Dataset) -> None:
        for frame in dataset.PerFrameFunctionalGroupsSequence:
            frame.PlanePositionSequence[0].ImagePositionPatient[2] += shift
            frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber += wrong

    edit_dicom(seg, change)
    if reason:
        refused(case_of([image], seg), reason, words)
    else:
        np.testing.assert_array_equal(read_mask(case_of([image], seg), 3), canonical(classes[np.argsort(place)]))


def test_references_to_missing_slices_are_refused_with_their_number(tmp_path):
    longer = write_series(tmp_path / "A", "one", N + 2)
    classes = np.ones((N + 2, SIZE, SIZE), np.uint8)
    seg = write_segmentation(tmp_path / "seg", longer, one_hot(classes))
    refused(case_of(longer[:N], seg), "mask_missing_slices", f"2 of {N + 2} slices", "complete the series")

    def forget(dataset: Dataset) -> None:
        del dataset.ReferencedSeriesSequence
        for frame in dataset.PerFrameFunctionalGroupsSequence:
            del frame.DerivationImageSequence

    edit_dicom(seg, forget)
    refused(case_of(longer[:N], seg), "mask_missing_slices", "2 of 2 slices")


def test_overlapping_segments_are_refused_unless_they_are_one_class(tmp_path, series):
    pixels = one_hot(truth())
    pixels[2, 3, 4] = pixels[1, 0, 0] = 1
    seg = write_segmentation(tmp_path / "seg", series, pixels)
    refused(case_of(series, seg), "mask_overlap", "2 voxels")
    seg = write_segmentation(tmp_path / "same", series, pixels, labels=("Lesion", "Lesion"))
    found = read_mask(case_of(series, seg, (0, 1)), 3)
    np.testing.assert_array_equal(found, canonical((pixels.any(-1)).astype(np.uint8)))


@pytest.mark.parametrize(("kind", "words"), [("BINARY", " of segment 1 for"), ("LABELMAP", " for")])
def test_two_frames_of_one_segment_for_one_slice_are_refused_with_its_number(tmp_path, series, kind, words):
    seg = write_segmentation(tmp_path / "seg", series, truth() if kind == "LABELMAP" else one_hot(truth()), kind=kind)

    def repeat(dataset: Dataset) -> None:
        first, second = dataset.PerFrameFunctionalGroupsSequence[1:3]
        for name in ("DerivationImageSequence", "PlanePositionSequence"):
            setattr(second, name, getattr(first, name))

    edit_dicom(seg, repeat)
    said = f"frames 2 and 3 of the segmentation are both{words} slice 3 of {N}"
    refused(case_of(series, seg), "mask_repeated_frame", said)
    refused(case_of(series[2:3], seg), "mask_repeated_frame", "slice 1 of 1", spatial_dims=2)


@pytest.mark.parametrize("largest", [100, 200, 255])
def test_a_fraction_counts_above_half_of_its_maximum(tmp_path, series, largest):
    fractions = np.zeros((N, SIZE, SIZE, 2))
    fractions[0, 0, :4, 0] = 0.0, 0.49, 0.5, 0.51
    fractions[0, 0, :4, 1] = 1 - fractions[0, 0, :4, 0]
    seg = write_segmentation(tmp_path / "seg", series, fractions, kind="FRACTIONAL", max_fractional_value=largest)
    np.testing.assert_array_equal(read_mask(case_of(series[:1], seg), 2)[0, 0, :4], [2, 2, 0, 1])


@pytest.mark.parametrize("largest", [1, 2, 3, 5])
def test_of_a_small_maximum_the_steps_above_half_count(tmp_path, series, largest):
    fractions = np.zeros((N, SIZE, SIZE, 1))
    fractions[0, 0, : largest + 1, 0] = np.arange(largest + 1) / largest
    options = {"kind": "FRACTIONAL", "max_fractional_value": largest}
    seg = write_segmentation(tmp_path / "seg", series, fractions, ("Liver",), **options)
    found = read_mask(case_of(series[:1], seg, (0, 1)), 2)[0, 0, : largest + 1]
    np.testing.assert_array_equal(found, [2 * step > largest for step in range(largest + 1)])


def test_classes_follow_the_export_and_not_the_numbers_of_segments(tmp_path, series):
    seg = write_segmentation(tmp_path / "seg", series, one_hot(truth()))
    classes = np.array([0, 3, 1], np.uint8)[truth()]
    np.testing.assert_array_equal(read_mask(case_of(series, seg, (0, 2, -1, 1)), 3), canonical(classes))
    refused(case_of(series, seg, (0, 1)), "unknown_label_value")


def test_a_segment_called_background_is_no_class(tmp_path, series):
    seg = write_segmentation(tmp_path / "seg", series, one_hot(truth()), labels=("Background", "Tumor"))
    assert dicom.read_seg_header(seg).segments == ((2, "Tumor"),)
    np.testing.assert_array_equal(
        read_mask(case_of(series, seg, (0, 2)), 3), canonical((truth() == 2).astype(np.uint8))
    )


def set_all(keyword: str, value: object) -> Callable[[Dataset], None]:
    def change(dataset: Dataset) -> None:
        for item in _items(dataset):
            if keyword in item:
                setattr(item, keyword, value)

    return change


def _items(dataset: Dataset) -> list[Dataset]:
    nested = [item for element in dataset if element.VR == "SQ" for item in element.value]
    return [dataset, *(inner for item in nested for inner in _items(item))]


@pytest.mark.parametrize(
    ("keyword", "value", "reason", "words"),
    [
        ("FrameOfReferenceUID", generate_uid(entropy_srcs=["x"]), "mask_frame_of_reference", ["frames of reference"]),
        ("ImageOrientationPatient", [0, 1, 0, 1, 0, 0], "mask_affine", ["direction cosines", "1 (0.0001"]),
        ("PixelSpacing", [0.7, 0.661468], "mask_affine", ["pixel spacings", "0.03853 mm"]),
        ("Columns", SIZE // 2, "mask_shape", [f"{SIZE} x {SIZE}", f"{SIZE} x {SIZE // 2}"]),
    ],
)
def test_another_grid_is_refused_and_said_what_differs(tmp_path, series, keyword, value, reason, words):
    seg = write_segmentation(tmp_path / "seg", series, one_hot(truth()))
    edit_dicom(seg, set_all(keyword, value))
    refused(case_of(series, seg), reason, *words)


def test_a_label_file_of_another_kind_is_refused(tmp_path, series):
    refused(case_of(series, series[0]), "mask_is_image", "DICOM SEG")
    (tmp_path / "label.nii").write_bytes(b"x" * 400)
    refused(case_of(series, tmp_path / "label.nii"), "mask_format")


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9, 0.999])
def test_a_truncated_segmentation_is_refused(tmp_path, series, keep):
    seg = write_segmentation(tmp_path / "seg", series, one_hot(truth()))
    content = seg.read_bytes()
    seg.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(RefusedError) as error:
        read_mask(case_of(series, seg), 3)
    assert "P1" not in str(error.value)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_segmentation_is_read_or_refused_and_nothing_else(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    if not folder.exists():
        write_segmentation(folder / "seg", write_series(folder / "A", "one", N), one_hot(truth()))
    series, seg = sorted((folder / "A").iterdir()), folder / "broken"
    content = bytearray((folder / "seg").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(132, len(content) - 1))] = data.draw(st.integers(0, 255))
    seg.write_bytes(content)
    try:
        found = read_mask(case_of(series, seg), 3)
    except RefusedError:
        return
    assert found.shape == (1, SIZE, SIZE, N) and found.max() <= 2


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless])
def test_lossless_compressed_segmentations_are_read(tmp_path, series, syntax):
    options = {"kind": "LABELMAP", "transfer_syntax_uid": str(syntax), "omit_empty_frames": False}
    seg = write_segmentation(tmp_path / "seg", series, truth(), **options)
    np.testing.assert_array_equal(read_mask(case_of(series, seg), 3), canonical(truth()))


def test_spacing_is_that_of_pixels_and_slices(series):
    case = case_of(series, series[0])
    assert formats.read(case, 3).spacing == pytest.approx((0.661468, 0.661468, 2.5))
    assert formats.read(case_of(series[:1], series[0]), 2).spacing == pytest.approx((0.661468, 0.661468))


def test_spacing_follows_its_axis(tmp_path):
    paths = write_series(tmp_path / "A", "one", 3)
    for path in paths:
        dataset = dcmread(path)
        dataset.PixelSpacing = [0.5, 0.25]
        dataset.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]  # sagittal
        dataset.ImagePositionPatient = [10 * float(dataset.ImagePositionPatient[2]), 0, 0]
        dataset.save_as(path)
    case = Case("case-0", "dicom", tuple(paths), ("A",), "p")
    assert formats.read(case, 3).spacing == pytest.approx((25.0, 0.25, 0.5))
    assert formats.read(Case("c", "dicom", (paths[0],), ("A",), "p"), 2).spacing == pytest.approx((0.5, 0.25))


def test_a_copy_of_a_segmentation_is_parsed_anew(tmp_path, series):
    seg = write_segmentation(tmp_path / "seg", series, one_hot(truth()))
    read_mask(case_of(series, seg), 3)
    other = write_segmentation(tmp_path / "other", series, one_hot(truth(5)))
    shutil.copy(other, seg)
    np.testing.assert_array_equal(read_mask(case_of(series, seg), 3), canonical(truth(5)))
