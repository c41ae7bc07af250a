# SPDX-License-Identifier: Apache-2.0
"""The L-infinity budget of a perturbation, and the lattice of changes it allows in a batch of images."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from monai_salm.perturbations.presets import PRESETS

if TYPE_CHECKING:  # whoever only reads a budget, such as 'monai-salm inspect', starts twice as fast without
    from torch import Tensor

Unit = Literal["window", "physical", "stored"]
_TEXT = re.compile(r"^\s*([-+.\deE]+)\s*(?:/\s*([-+.\deE]+))?\s*(\w+)?\s*$")
_UNIT_NAMES: dict[str | None, Unit] = {None: "window", "window": "window", "stored": "stored", "physical": "physical"}
_UNIT_NAMES |= {"HU": "physical", "hu": "physical"}


@dataclass(frozen=True)
class Budget:
    """Largest absolute change of a voxel.

    Args:
        epsilon: the bound, above 0. For ``unit="window"`` a fraction of the intensity window, at most 1.
        unit: ``"window"`` (fraction of the image's intensity window), ``"physical"`` (HU and the like, after the
            rescale slope) or ``"stored"`` (integers of the file).
        modalities: DICOM modalities that the bound has a meaning for; empty: any.
        own_window: whether the fraction refers to the window that each image brings, so that none may be named.
        said: the text that it was read from, for messages.

    Raises:
        ValueError: When ``epsilon`` is not a finite number above 0, or a window fraction above 1.

    Example:
        >>> Budget.parse("8/255").epsilon == 8 / 255
        True
        >>> Budget.parse("5 HU")
        Budget(epsilon=5.0, unit='physical')
    """

    epsilon: float
    unit: Unit = "window"
    modalities: tuple[str, ...] = field(default=(), repr=False)
    own_window: bool = field(default=False, repr=False)
    said: str = field(default="", repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.unit not in _UNIT_NAMES.values():
            raise ValueError(f"budget unit is {self.unit!r}; use 'window', 'physical' or 'stored'")
        if not math.isfinite(self.epsilon) or self.epsilon <= 0:
            raise ValueError(f"epsilon is {self.epsilon}; it must be above 0, for example '8/255' or '5 HU'")
        if self.unit == "window" and self.epsilon > 1:
            raise ValueError(
                f"epsilon is {self.epsilon} of the window, which is more than the whole window; "
                "write a fraction such as '8/255', or name the unit: '5 HU', '12 stored'"
            )

    @classmethod
    def parse(cls, text: str | float | Budget) -> Budget:
        """Read ``"8/255"``, ``"8/255 window"``, ``"5 HU"``, ``"12 stored"`` or the name of a preset.

        A bare number is a fraction of the window; HU have a meaning in CT only.

        Raises:
            ValueError: When it is none of these.
        """
        if isinstance(text, Budget):
            return text
        preset = PRESETS.get(str(text).strip().lower())
        if preset is not None:
            budget, said = cls.parse(preset.budget), f"{str(text).strip().lower()} ({preset.budget})"
            return replace(budget, modalities=preset.modalities, own_window=budget.unit == "window", said=said)
        match = _TEXT.match(str(text))
        if match is None or match[3] not in _UNIT_NAMES:
            raise ValueError(
                f"cannot read budget {text!r}; write '8/255 window', '5 HU' or '12 stored', or one of the presets "
                + ", ".join(f"{name} ({preset.budget})" for name, preset in PRESETS.items())
            )
        try:
            epsilon = float(match[1]) / float(match[2] or 1)
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(f"cannot read budget {text!r}: {error}") from error
        modalities = ("CT",) if match[3] in ("HU", "hu") else ()
        return cls(epsilon, _UNIT_NAMES[match[3]], modalities, said=str(text).strip())

    def check_modality(self, modality: str) -> None:
        """Refuse an image that the bound has no meaning for.

        Args:
            modality: DICOM modality; empty where the file does not tell, which passes.

        Raises:
            ValueError: When the bound is meant for others.
        """
        if modality and self.modalities and modality not in self.modalities:
            raise ValueError(
                f"epsilon {self.said or self} is for {' and '.join(self.modalities)}, and an image is {modality}; "
                "protect images of this kind on their own, with a budget for them such as '4/255 window'"
            )

    def check_window(self, window: object) -> None:
        """Refuse a named window where the bound is a fraction of the image's own.

        Args:
            window: ``"auto"`` or None for the image's own, else (low, high).

        Raises:
            ValueError: When one is named.
        """
        if self.own_window and window not in (None, "auto"):
            raise ValueError(
                f"epsilon {self.said} is a fraction of each image's own window, and {window} is named as the window; "
                "leave the window out, or write the fraction without the preset's name"
            )

    def levels(self, *, lsb: float, window_width: float) -> int:
        """Lattice steps the budget allows: ``floor(epsilon / lsb)``.

        Args:
            lsb: one lattice step in physical units, above 0.
            window_width: width of the intensity window in physical units.

        Raises:
            ValueError: When the budget is below one step (a perturbation would vanish in rounding) or over the window.
        """
        physical = self.epsilon * {"window": window_width, "physical": 1.0, "stored": lsb}[self.unit]
        if physical > window_width * (1 + 1e-9):
            raise ValueError(f"epsilon {self} is {physical:g}, over the whole intensity window of {window_width:g}")
        levels = math.floor(physical / lsb * (1 + 1e-9))
        if levels < 1:
            least = {"window": lsb / window_width, "physical": lsb, "stored": 1.0}[self.unit]
            raise ValueError(
                f"epsilon {self} is below one stored step ({lsb:g} physical units): nothing would change. "
                f"The smallest epsilon that works here is {least:.6g} {self.unit}"
            )
        return levels

    def __str__(self) -> str:
        return f"{self.epsilon:.6g} {self.unit}"


@dataclass(frozen=True)
class Lattice:
    """The changes that a batch of images allows, in whole lattice steps (one step: the smallest a file can store).

    Args:
        lower: (B, C, *spatial) integers <= 0.
        upper: (B, C, *spatial) integers >= 0.
        unit_step: (B, 1, ...) change of unit intensity per step; negative for inverted images. Where slices are scaled
            differently, it has their number along their axis.

    Example:
        >>> import torch
        >>> box = Lattice(torch.tensor([[-2, 0]]), torch.tensor([[2, 0]]), torch.tensor([[0.5]]))
        >>> box.snap(torch.tensor([[-3.7, 1.2]])).tolist()
        [[-2, 0]]
    """

    lower: Tensor
    upper: Tensor
    unit_step: Tensor

    @property
    def levels(self) -> Tensor:
        """Largest number of steps that any voxel of each image (of each slice) may take; shaped as ``unit_step``."""
        return self.upper.maximum(-self.lower).amax(self.alike, keepdim=True)

    @property
    def alike(self) -> tuple[int, ...]:
        """Axes along which the voxels of an image have one ``unit_step``."""
        return tuple(axis for axis in range(1, self.unit_step.ndim) if self.unit_step.shape[axis] == 1)

    def project(self, delta: Tensor) -> Tensor:
        """Nearest point of the box, still real-valued."""
        return delta.minimum(self.upper).maximum(self.lower)

    def snap(self, delta: Tensor) -> Tensor:
        """Nearest point of the lattice inside the box; the bounds are integers, so rounding cannot leave them."""
        return self.project(delta).round().to(self.lower.dtype)


def as_window(window: Any) -> str | tuple[float, float]:
    """A window as a user gives it: ``"auto"``, or two finite numbers, the lower one first.

    Raises:
        ValueError: When it is neither.
    """
    if isinstance(window, str) and window == "auto":
        return window
    low = high = math.nan
    if not isinstance(window, str):
        with suppress(TypeError, ValueError):
            low, high = map(float, window)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(
            f"window is {window!r}; use 'auto' or two finite numbers in physical units, the lower one first"
        )
    return low, high
