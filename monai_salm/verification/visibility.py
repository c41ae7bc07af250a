# SPDX-License-Identifier: Apache-2.0
"""The visibility gate: a protected image against its own JPEG 2000 copy at 5:1, in the windows of its file.

Readers could not tell such copies of abdominal CT from the originals (Eur Radiol 2007;17:1529), while copies at
10:1 were found out. That is a yardstick for each image of its own, and no proof that nobody sees anything.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from monai_salm.io.base import Case, Outline, RefusedError, StoredImage
from monai_salm.release.visibility import CaseVisibility, WindowVisibility
from monai_salm.similarity import structural_similarity
from monai_salm.stored import StoredCodec
from monai_salm.verification.filters import jpeg2000_copy

__all__ = ["COMPRESSION", "Mode", "VisibilityGate", "measure_visibility"]

Mode = Literal["report", "refuse", "none"]

COMPRESSION = 5
"""Ratio of the JPEG 2000 copy, to the bits that the image's own values need."""
CROP = 256
"""Most voxels per side of what is compared: the part of a larger image with the strongest perturbation."""
PLANES = 8
"""Most slices of a volume that are compared: those with the strongest perturbation."""
WINDOWS = 4
"""Most windows: the narrowest ones, which show most."""


class VisibilityGate:
    """Measures a case before it is written, and keeps it out of the release if asked to.

    Nothing is ever made weaker to pass: what is too visible is reported, or refused.

    Args:
        mode: ``"report"`` measures only, ``"refuse"`` also refuses, ``"none"`` does nothing.

    Raises:
        ValueError: When there is no such mode.
    """

    def __init__(self, mode: Mode = "report") -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"visibility is {mode!r}; use one of {', '.join(get_args(Mode))}")
        self.mode = mode

    @property
    def refuses(self) -> bool:
        """Whether it may refuse a case."""
        return self.mode == "refuse"

    def slices(self, outline: Outline, delta: np.ndarray) -> tuple[int, list[int]]:
        """Spatial axis and indices of the slices that :py:meth:`__call__` would compare, of an image that has more."""
        if self.mode == "none":
            return 0, []
        if delta.ndim == 3:
            return 0, [*range(delta.shape[1])]
        axis = _axis(outline)
        return axis, _chosen(delta, axis)

    def __call__(self, case: Case, image: StoredImage, delta: np.ndarray) -> CaseVisibility:
        """Compare in each window.

        Args:
            case: whose image it is.
            image: the original.
            delta: (1, *spatial) lattice steps.

        Raises:
            RefusedError: ``visibility_gate`` when the image is more visible than allowed, and mode is ``"refuse"``.
        """
        found = CaseVisibility(case.sample_id, measure_visibility(image, delta))
        worst = next((window for window in found.windows if not window.less_visible), None)
        if self.refuses and worst is not None:
            raise RefusedError(
                "visibility_gate",
                f"in the window {worst.low:g} to {worst.high:g} {image.codec.unit} the protected image has PSNR "
                f"{_decibels(worst.psnr)} and SSIM {worst.ssim:.4f}, its own JPEG 2000 copy at {COMPRESSION}:1 has "
                f"{_decibels(worst.psnr_compressed)} and {worst.ssim_compressed:.4f}; fit again with a lower epsilon "
                "or mask ratio",
            )
        return found


def measure_visibility(image: StoredImage, delta: np.ndarray) -> tuple[WindowVisibility, ...]:
    """A protected image beside its own compressed copy, in each window that its file lists (else in its codec's).

    Of a volume the slices with the strongest perturbation are compared (across its thickest axis), of a large slice
    the part with the strongest: both bounds are this module's constants.

    Args:
        image: the original.
        delta: (1, *spatial) lattice steps.
    """
    codec = image.codec
    listed = sorted(image.windows or (codec.window,), key=lambda ends: ends[1] - ends[0])[:WINDOWS]
    planes = _planes(image, np.asarray(delta))
    clean = [_physical(before, own) for before, _, own in planes]
    protected = [_physical(own.add(before, change), own) for before, change, own in planes]
    compressed = [_compressed(before, own) for before, _, own in planes]
    return tuple(
        WindowVisibility(*window, *_likeness(clean, protected, window), *_likeness(clean, compressed, window))
        for window in listed
    )


def _planes(image: StoredImage, delta: NDArray[np.integer]) -> list[tuple[np.ndarray, np.ndarray, StoredCodec]]:
    """The parts of original and perturbation that are compared, each with its codec."""
    codec = image.codec
    planes = [(*pair, codec) for pair in zip(image.stored, delta, strict=True)]  # each color is a picture of its own
    if image.stored.ndim == 4:
        axis = _axis(image)
        stored, change = (np.moveaxis(values[0], axis, 0) for values in (image.stored, delta))
        planes = [(stored[at], change[at], codec.of_slice(at)) for at in _chosen(delta, axis)]
    return [(before[part], change[part], own) for before, change, own in planes for part in [_strongest(change)]]


def _axis(image: StoredImage | Outline) -> int:
    """The spatial axis across the slices of a volume."""
    if image.codec.slices:
        return image.codec.slices.axis
    return int(np.argmax(image.spacing)) if image.spacing else 2


def _chosen(delta: NDArray[np.integer], axis: int) -> list[int]:
    """The slices of a volume with the strongest perturbation."""
    energy = [np.square(change.astype(np.float64)).sum() for change in np.moveaxis(delta[0], axis, 0)]
    return sorted(np.argsort(np.negative(energy), kind="stable")[:PLANES].tolist())


def _strongest(change: np.ndarray) -> tuple[slice, slice]:
    """The part of at most CROP by CROP voxels that holds most of the perturbation."""
    sums = np.square(change.astype(np.float64))
    for axis, length in enumerate(change.shape):
        total = np.insert(np.cumsum(sums, axis), 0, 0.0, axis)
        size = min(CROP, length)
        ends = np.arange(size, length + 1)
        sums = total.take(ends, axis) - total.take(ends - size, axis)
    top, left = np.unravel_index(int(np.argmax(sums)), sums.shape)
    return slice(int(top), int(top) + CROP), slice(int(left), int(left) + CROP)


def _physical(stored: np.ndarray, codec: StoredCodec) -> NDArray[np.float64]:
    return np.nan_to_num(stored.astype(np.float64)) * codec.slope + codec.intercept


def _compressed(stored: np.ndarray, codec: StoredCodec) -> NDArray[np.float64]:
    """Physical values of a plane after lossy JPEG 2000; padding stays as it is."""
    values = np.nan_to_num(stored.astype(np.float64))
    image = np.ones(values.shape, bool)
    if codec.padding is not None:
        image = (values < codec.padding[0]) | (values > codec.padding[1])
    low, high = (values[image].min(), values[image].max()) if image.any() else (0.0, 0.0)
    if stored.dtype.kind == "f" or high - low > 65535:  # has no bit depth that a codec would take
        low, high = sorted((end - codec.intercept) / codec.slope for end in codec.window)
    step = max(codec.step, (high - low) / 65535)
    levels = np.rint((values.clip(low, high) - low) / step).astype(np.uint16)
    bits = max(8, int(levels.max()).bit_length())
    copy = jpeg2000_copy(levels, bits, COMPRESSION).astype(np.float64) * step + low
    return _physical(np.where(image, copy, values), codec)


def _likeness(
    before: list[NDArray[np.float64]], after: list[NDArray[np.float64]], window: tuple[float, float]
) -> tuple[float | None, float]:
    """PSNR over all planes and mean SSIM of what a display shows of them."""
    shown = [
        tuple(torch.from_numpy((plane - window[0]) / (window[1] - window[0])).clamp(0, 1) for plane in pair)
        for pair in zip(before, after, strict=True)
    ]
    error = sum(float((one - other).square().sum()) for one, other in shown) / sum(one.numel() for one, _ in shown)
    ssim = [float(structural_similarity(one[None, None].float(), other[None, None].float())) for one, other in shown]
    return -10 * float(np.log10(error)) if error > 0 else None, float(np.mean(ssim))


def _decibels(psnr: float | None) -> str:
    return "without bound" if psnr is None else f"{psnr:.1f} dB"
