# SPDX-License-Identifier: Apache-2.0
"""Victims that segment: trained on patches as MONAI users do, tested on whole clean volumes, class by class."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from monai.data import MetaTensor, get_track_meta, set_track_meta
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.metrics import compute_dice, compute_hausdorff_distance
from monai.networks import one_hot
from monai.transforms import Compose, RandCropByPosNegLabeld, Randomizable, Spacing, SpatialPadd
from monai.utils import convert_to_tensor
from torch import Tensor, nn

from monai_salm.errors import check_number, check_size
from monai_salm.io.base import Case
from monai_salm.perturbations.base import Perturbation
from monai_salm.perturbations.markers import LabelMarker
from monai_salm.verification.arms import RANDOM_NOISE, Volume, VolumeWriter
from monai_salm.verification.description import described
from monai_salm.verification.training import Batches, Task

__all__ = ["Segmentation", "patch_transforms", "volume_scores"]

OVERLAP = 0.25
"""Of neighboring patches when a whole volume is segmented."""
_LOSS = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=True)
_KEYS = ("image", "label")

Transforms = Callable[[dict[str, Tensor]], "Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]"]


def patch_transforms(patch_size: Sequence[int]) -> Compose:
    """One patch per volume, around a foreground voxel or a background voxel with equal chance; no augmentation."""
    size = tuple(patch_size)
    return Compose(
        [SpatialPadd(_KEYS, size), RandCropByPosNegLabeld(_KEYS, "label", size, pos=1, neg=1, num_samples=1)]
    )


@dataclass(frozen=True, eq=False)
class Segmentation(Task):
    """One class per voxel.

    Networks map (B, 1, *patch_size) to (B, n_classes, *patch_size) and are trained with Dice and cross-entropy loss.

    Args:
        classes: their names, background first.
        patch_size: size of the victims' input in voxels. Whole volumes are segmented patch by patch, those smaller than
            a patch are padded.
        transforms: makes one training patch, or a list of them, of ``{"image": (1, *spatial) unit intensities,
            "label": (1, *spatial) class indices}``; default: :py:func:`patch_transforms`.
        resample: edge length of a voxel as the study sees it, relative to the file's: 1.25 makes training and test
            cases coarser, as MONAI's ``Spacing`` does (image linear, label nearest neighbor).

    Raises:
        ValueError: When a size is not positive, or ``resample`` is out of range.
    """

    name: ClassVar[str] = "Segmentation"
    metric: ClassVar[str] = "dice"
    curve_points: ClassVar[int] = 2
    rules: ClassVar[Mapping[str, Any]] = {"ssim_mean": 0.98, "protected_above_chance": None, "utility_within": 0.02}
    controls: ClassVar[Mapping[str, Perturbation]] = {"random_noise": RANDOM_NOISE, "label_marker": LabelMarker(cell=2)}
    not_tested: ClassVar[tuple[str, ...]] = (
        "Label leakage beyond thresholds of the perturbation's (blurred) absolute value: a trained network may read "
        "more of the labels off it.",
        "Patches of other sizes, other losses, ensembles, test-time augmentation and post-processing of segmentations.",
    )
    classes: tuple[str, ...]
    patch_size: tuple[int, ...]
    transforms: Transforms | None = None
    resample: float = 1.0

    def __post_init__(self) -> None:
        check_size("patch_size", self.patch_size)
        check_number("resample", self.resample, least=0.1, most=10)
        given = patch_transforms(self.patch_size) if self.transforms is None else self.transforms
        object.__setattr__(self, "transforms", deepcopy(given))

    @property
    def note(self) -> str:
        return "" if self.resample == 1.0 else f", resampled to {self.resample:g} times the voxel size"

    @property
    def chance(self) -> None:
        return None

    @property
    def learned(self) -> tuple[int, ...]:
        return tuple(range(1, len(self.classes)))

    @property
    def output(self) -> tuple[int, ...]:
        return (len(self.classes), *self.patch_size)

    def describe(self) -> str:
        return f"{self.patch_size} {self.resample:g} {described(self.transforms)}"

    def writer(self, path: Path) -> VolumeWriter:
        return VolumeWriter(path)

    def view(self, unit: Tensor) -> Tensor:
        return self._spaced(unit, "bilinear")

    def truth(
        self, case: Case, mask: np.ndarray | None, spacing: tuple[float, ...]
    ) -> tuple[Tensor, tuple[float, ...]]:
        label = self._spaced(torch.from_numpy(np.ascontiguousarray(mask)), "nearest")
        return label.to(torch.uint8), tuple(self.resample * size for size in spacing)

    def probe(self, data: Sequence[Volume]) -> Tensor:
        return torch.zeros(2, 1, *self.patch_size)

    def count(self, data: Sequence[Volume]) -> int:
        return len(data)

    def part(self, data: Sequence[Volume], cases: Sequence[int]) -> list[Volume]:
        return [data[at] for at in cases]

    def joined(self, data: Sequence[Volume], more: Sequence[Volume]) -> list[Volume]:
        return [*data, *more]

    def mapped(self, data: Sequence[Volume], change: Callable[[Tensor], Tensor]) -> list[Volume]:
        return [replace(volume, image=change(volume.image)) for volume in data]

    def batches(self, data: Sequence[Volume], seed: int, device: torch.device) -> Batches:
        transforms: Any = deepcopy(self.transforms)  # __post_init__ made some if there were none
        if isinstance(transforms, Randomizable):
            transforms.set_random_state(seed=seed)

        def batch(chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            with _untracked():
                made = [transforms({"image": data[at].image, "label": data[at].label}) for at in chosen.tolist()]
            samples = [each for found in made for each in (found if isinstance(found, list | tuple) else [found])]
            images, labels = (torch.stack([self._patch(each[key], key) for each in samples]) for key in _KEYS)
            return images.to(device), labels.to(device)

        return batch

    def losses(self, output: Tensor, truth: Tensor) -> dict[str, Tensor]:
        return {"train_loss": _LOSS(output, truth)}

    @torch.no_grad()
    def evaluate(
        self, network: nn.Module, data: Sequence[Volume], batch_size: int, *, full: bool = True
    ) -> dict[str, Any]:
        """Dice per class, and with ``full`` the 95th percentile of surface distances, see :py:func:`volume_scores`.

        A class counts where a case's truth has it; ``dice`` is the mean over classes of the mean over cases.
        """
        network.eval()
        device = next((weight.device for weight in network.parameters()), torch.device("cpu"))
        inferer = SlidingWindowInferer(self.patch_size, sw_batch_size=batch_size, overlap=OVERLAP)
        in_mm = all(volume.spacing for volume in data)
        dice, hd95 = [], []
        for volume in data:
            logits = inferer(volume.image[None].to(device), network).float().nan_to_num(0.0)
            spacing = volume.spacing if in_mm else (1.0,) * len(self.patch_size)
            each = volume_scores(logits[0].argmax(0).cpu(), volume.label[0], len(self.classes), spacing, surface=full)
            dice.append(each[0])
            hd95.append(each[1])
        names = self.classes[1:]
        found: dict[str, Any] = {"dice": _mean_of(dice), "dice_per_class": dict(zip(names, _means(dice), strict=True))}
        if full:
            found |= {"hd95": _mean_of(hd95), "hd95_per_class": dict(zip(names, _means(hd95), strict=True))}
            found["hd95_unit"] = "mm" if in_mm else "voxels"
        return found

    def _patch(self, value: Any, key: str) -> Tensor:
        """A sample's tensor as the network and the loss take it.

        Raises:
            ValueError: When its size is not the patch's, or a label is not a whole number.
        """
        patch = convert_to_tensor(value, track_meta=False)
        if tuple(patch.shape) != (1, *self.patch_size):
            raise ValueError(
                f"the training transforms give {key}s of shape {tuple(patch.shape)}, the patch is "
                f"{(1, *self.patch_size)}; end them with SpatialPadd and a crop to this size"
            )
        if key == "image":
            return patch.float()
        if patch.is_floating_point() and bool((patch != patch.round()).any()):
            raise ValueError("the training transforms interpolate between labels; give them mode 'nearest' for 'label'")
        return patch.long()

    def _spaced(self, image: Tensor, mode: str) -> Tensor:
        if self.resample == 1.0:
            return image
        dims = image.ndim - 1
        spacing = Spacing([self.resample] * dims, mode=mode, padding_mode="border")
        return convert_to_tensor(spacing(MetaTensor(image, affine=torch.eye(4))), track_meta=False).to(image.dtype)


@contextmanager
def _untracked() -> Iterator[None]:
    """MONAI's transforms give plain tensors meanwhile: the same values, without records that take most of the time."""
    before = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(before)


def volume_scores(
    predicted: Tensor, truth: Tensor, n_classes: int, spacing: Sequence[float], *, surface: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Dice and HD95 (95th percentile of the symmetric surface distance) of each foreground class in one image.

    Args:
        predicted: (*spatial) class indices.
        truth: (*spatial) class indices. What it lacks is NaN in both results.
        n_classes: background included.
        spacing: size of a voxel per axis; its unit is that of HD95. A class that was not found anywhere counts as the
            diagonal of the image.
        surface: measure HD95; NaN otherwise.

    Returns:
        two arrays of ``n_classes - 1`` numbers.

    Example:
        >>> truth = torch.zeros(8, 8, 8, dtype=torch.long)
        >>> truth[2:6, 2:6, 2:6] = 1
        >>> dice, hd95 = volume_scores(truth.roll(1, 0), truth, 2, (2.0, 1.0, 1.0))
        >>> dice.tolist(), hd95.tolist()
        ([0.75], [2.0])
    """
    found, real = (one_hot(labels[None, None], n_classes) for labels in (predicted, truth))
    dice = compute_dice(found, real, include_background=False)[0].double().numpy()
    if not surface:
        return dice, np.full_like(dice, np.nan)
    with warnings.catch_warnings():  # of classes that are not there, and MONAI 1.6 of how it calls itself
        warnings.simplefilter("ignore")
        hd95 = compute_hausdorff_distance(found, real, percentile=95, spacing=list(spacing))[0].double().numpy()
    diagonal = math.hypot(*(size * length for size, length in zip(spacing, truth.shape, strict=True)))
    return dice, np.where(np.isnan(dice), np.nan, np.where(np.isfinite(hd95), hd95, diagonal))


def _means(cases: Sequence[np.ndarray]) -> list[float | None]:
    """Mean over the cases that have a class; None where none has."""
    columns = np.stack(cases).T
    return [float(column[np.isfinite(column)].mean()) if np.isfinite(column).any() else None for column in columns]


def _mean_of(cases: Sequence[np.ndarray]) -> float | None:
    known = [value for value in _means(cases) if value is not None]
    return sum(known) / len(known) if known else None
