# SPDX-License-Identifier: Apache-2.0
"""Voxel labels: from a label file and its image to class indices on the image's canonical grid.

Labels are never resampled or guessed: image and label must have the same grid, and every value must be one that the
export names. Everything else is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import cast

import numpy as np

from monai_salm.io import dicom, dicom_seg_labels, nifti, worker
from monai_salm.io.base import Case, FileCheck, Mask, RefusedError
from monai_salm.io.kept import while_unchanged

CORNER_TOLERANCE_MM = 0.01
"""Image and label agree when no corner of the volume lies further apart than this, as positions in DICOM SEG files."""
MAX_VALUES = 128
"""A label file with more distinct values than this is taken for an image (some atlases name over 100 structures)."""
_SPARE_VALUES = 32
"""With this many values more than the export names, a label file is taken for an image."""
_LISTED = 5


def read_mask(case: Case, spatial_dims: int) -> np.ndarray:
    """Class index of every voxel of a case.

    Args:
        case: a case with a mask.
        spatial_dims: 2 or 3.

    Returns:
        (1, *spatial) uint8, on the axes and grid of :py:func:`monai_salm.io.formats.read` of the case.

    Raises:
        RefusedError: ``mask_shape``, ``mask_affine``, ``mask_orientation``, ``mask_frame_of_reference`` when image and
            label have different grids; ``mask_missing_slices``, ``mask_repeated_frame``, ``mask_overlap``,
            ``unknown_label_value``, ``mask_is_image``, ``mask_format``; and as the readers of the formats do.
        ValueError: When the case has no mask.
    """
    if case.mask is None:
        raise ValueError(f"{case.sample_id} has no voxel labels; this works on cohorts with masks")
    if case.format == "nifti":
        return worker.call(_read_nifti, case, case.mask, spatial_dims)
    if case.format == "dicom":
        return worker.call(dicom_seg_labels.read, case, case.mask, spatial_dims)
    raise RefusedError("mask_format", f"voxel labels of {case.format} images are not supported; use NIfTI or DICOM")


@worker.isolated
@while_unchanged(4096)
def label_values(path: Path) -> tuple[int, ...]:
    """The distinct values of a NIfTI label file, ascending; cached as long as the file stays the same.

    Raises:
        RefusedError: ``mask_is_image`` when they are no labels; ``mask_format`` when it is no NIfTI file; and as
            ``nifti.read_labels`` does.
    """
    _check_nifti(path)
    values, _ = _distinct(nifti.read_labels(path, None)[0])
    _check_count(len(values), MAX_VALUES)
    return tuple(map(int, values))


def check_image(stored: np.ndarray, mask: Mask) -> None:
    """Refuse an image that holds nothing but label values: most likely a label file stands where the image should.

    Args:
        stored: stored values of the image.
        mask: the voxel labels of the case.

    Raises:
        RefusedError: ``mask_is_image``.
    """
    listed = [value for value in mask.values if value >= 0]
    if np.isin(stored, listed).all():
        raise RefusedError(
            "mask_is_image",
            f"the image holds only label values ({_list(listed)}): is it a label file? Name the image, then its label",
        )


@worker.isolated
def protect(mask: Mask, uids: dicom.UidMapping) -> tuple[PurePosixPath, bytes]:
    """The label file of a protected copy: path relative to the released folder, and bytes.

    A NIfTI file is kept as it is; a SEG file gets the UIDs of the protected images.

    Args:
        mask: voxel labels of an original.
        uids: the release's UID map.

    Raises:
        RefusedError: When the file cannot be written under new UIDs.
    """
    if dicom.is_segmentation(mask.file):
        return dicom.protect_companion(mask.file, uids)
    return PurePosixPath(mask.name), mask.file.read_bytes()


@worker.isolated
def verify(unit: Sequence[Case], images: Mapping[Path, Path], written: Path, spatial_dims: int) -> FileCheck:
    """Compare a written label file with its source, and the labels of the protected images with those of the originals.

    Args:
        unit: the cases that share the label file.
        images: the protected file, under any name, of each original.
        written: the label file of the protected copy, under any name.
        spatial_dims: 2 or 3.

    Raises:
        RefusedError: ``verification_failed``.
    """
    for case in unit:
        mask = cast(Mask, case.mask)
        twin = replace(case, files=tuple(images[path] for path in case.files), mask=replace(mask, file=written))
        if case is unit[0]:
            if dicom.is_segmentation(mask.file):
                dicom.verify_labels(mask.file, written, images.values())
            elif mask.file.read_bytes() != written.read_bytes():
                raise RefusedError("verification_failed", "the written label file differs from its source")
        if not np.array_equal(read_mask(case, spatial_dims), read_mask(twin, spatial_dims)):
            raise RefusedError("verification_failed", "the labels of the protected image are not those of the original")
    return FileCheck(0, 0.0)


def _read_nifti(case: Case, mask: Mask, spatial_dims: int) -> np.ndarray:
    if mask.file == case.files[0]:
        raise RefusedError("mask_is_image", "image and label are one file; name the label file of this image")
    _check_nifti(mask.file)
    voxels, grid = nifti.read_labels(mask.file, spatial_dims)
    _check_grid(nifti.read_grid(case.files[0], spatial_dims), grid)
    return _to_classes(voxels, mask.values)[None]


def _check_nifti(path: Path) -> None:
    if not nifti.sniff(nifti.read_head(path)):
        raise RefusedError("mask_format", "the label file of a NIfTI image must be NIfTI too; convert it")


def _check_grid(image: nifti.Grid, label: nifti.Grid) -> None:
    if image.shape != label.shape:
        fix = "resample the label to the image's grid, or pair each image with its own label"
        if image.axes != label.axes and sorted(image.shape) == sorted(label.shape):
            fix = f"their headers turn the axes differently; save the label with the header of its image, or {fix}"
        raise RefusedError("mask_shape", f"the image has shape {image.shape}, its label {label.shape}; {fix}")
    torn = next((grid.transforms for grid in (image, label) if len(set(grid.transforms)) > 1), None)
    if torn and image.transforms != label.transforms:
        raise RefusedError(
            "mask_orientation",
            f"sform and qform of the {'image' if torn == image.transforms else 'label'} contradict each other "
            f"({' and '.join(torn)} axes), and tools follow the one or the other: the label may be mirrored or turned; "
            "correct the wrong one, and save the label with the header of its image",
        )
    apart = _corner_distance(image, label)
    if not apart <= CORNER_TOLERANCE_MM:
        # Between files of different orientation a copied affine would mirror or turn the labels.
        copy = ", or copy the image's affine if only that is wrong" if image.axes == label.axes else ""
        how_far = f"up to {apart:.4g} mm apart" if np.isfinite(apart) else "apart by an unknown distance"
        raise RefusedError(
            "mask_affine",
            f"the affines of image and label differ: corners of the volume are {how_far} ({CORNER_TOLERANCE_MM:g} mm "
            f"are tolerated); resample the label to the image's grid{copy}",
        )


def _corner_distance(image: nifti.Grid, label: nifti.Grid) -> float:
    """Largest distance in mm between where the two affines put a corner voxel; two undefined affines are equal."""
    if np.array_equal(image.affine, label.affine, equal_nan=True):
        return 0.0
    ends = [(0, extent - 1) for extent in (*image.shape, 1, 1)[:3]]
    corners = np.stack([*np.meshgrid(*ends, indexing="ij"), np.ones((2, 2, 2))]).reshape(4, -1)
    return float(np.linalg.norm(((image.affine - label.affine) @ corners)[:3], axis=0).max())


def _to_classes(voxels: np.ndarray, listed: Sequence[int]) -> np.ndarray:
    """Class index of each voxel; ``listed`` are the voxel values by class index."""
    found, counts = _distinct(voxels)
    _check_count(len(found), len(listed) + _SPARE_VALUES)
    known = {value: index for index, value in enumerate(listed) if value >= 0}
    unknown = [(value, count) for value, count in zip(found, counts, strict=True) if value not in known]
    if unknown:
        told = ", ".join(f"{value:g} ({count} voxels)" for value, count in unknown[:_LISTED])
        more = f" and {len(unknown) - _LISTED} more" if len(unknown) > _LISTED else ""
        raise RefusedError(
            "unknown_label_value",
            f"the label holds {told}{more}, the export names {_list([*known])}; name the value in dataset.json or "
            "correct the label",
        )
    classes = np.array([known[value] for value in found], np.uint8)
    return classes[np.searchsorted(found, voxels)]


def _distinct(voxels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values, ascending, and how often each occurs.

    Raises:
        RefusedError: ``mask_is_image`` when a value is no integer, ``unknown_label_value`` when one is not finite.
    """
    if voxels.dtype.kind in "iu" and int(voxels.max()) - int(voxels.min()) < 2**16:  # many times faster than sorting
        least = int(voxels.min())
        counts = np.bincount((voxels.astype(np.int64) - least).reshape(-1))
        found = np.flatnonzero(counts)
        return found + least, counts[found]
    values, counts = np.unique(voxels, return_counts=True)
    if values.dtype.kind == "f":
        finite = np.isfinite(values)
        if not finite.all():
            raise RefusedError(
                "unknown_label_value",
                f"{int(counts[~finite].sum())} voxels of the label are not finite (NaN or infinite); give them the "
                "number of a class, 0 for the background",
            )
        odd = values != np.floor(values)
        if odd.any():
            raise RefusedError(
                "mask_is_image",
                f"{int(counts[odd].sum())} voxels of the label are no integers: is it an image or a probability map? "
                "Name a label file whose values are class numbers",
            )
    return values, counts


def _check_count(found: int, most: int) -> None:
    if found > most:
        raise RefusedError(
            "mask_is_image",
            f"the label has {found} distinct values, more than {most}: is it an image? Name the image, then its label; "
            "the classes of an atlas must be named in a dataset.json",
        )


def _list(values: Sequence[int]) -> str:
    more = f", ... and {len(values) - 16} more" if len(values) > 16 else ""
    return ", ".join(map(str, values[:16])) + more
