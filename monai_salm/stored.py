# SPDX-License-Identifier: Apache-2.0
"""Stored value <-> physical unit <-> unit intensity, and the lattice of changes that a file can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # the process that reads files needs no torch, and starts faster and smaller without
    from torch import Tensor

    from monai_salm.perturbations.budget import Budget, Lattice

FLOAT_STEPS = 4096
"""Float files have no smallest step of their own; their window is cut into as many steps as 12-bit images have."""


@dataclass(frozen=True)
class StoredCodec:
    """How one image's stored values are to be read, and which of them may move.

    ``physical = slope * stored + intercept``; the window's ends become unit intensity 0 and 1 (1 and 0 if
    ``inverted``).

    Args:
        dtype: numpy name of the file's type, ``"int16"``, ``"float32"``, ...
        window: (low, high) in physical units; values outside are never touched and never reached.
        slope: physical units per stored value, not 0 (DICOM RescaleSlope, NIfTI scl_slope).
        intercept: physical value of stored 0.
        stored_range: inclusive range of values the file can hold (BitsStored); default: that of ``dtype``.
        padding: inclusive range of stored values that stand for "no image"; never touched, never reached.
        inverted: low values are bright (DICOM MONOCHROME1).
        unit: name of the physical unit, ``"HU"`` or ``"a.u."``.
        modality: DICOM modality, such as ``"CT"``; empty where the file does not tell.

    Raises:
        ValueError: When the window is empty, the slope 0 or not finite, or the type not a real number type.

    Example:
        >>> import torch
        >>> codec = StoredCodec("int16", window=(-160.0, 240.0), intercept=-1024.0, unit="HU")
        >>> codec.to_unit(torch.tensor([[1064]], dtype=torch.int16)).item()
        0.5
    """

    dtype: str
    window: tuple[float, float]
    slope: float = 1.0
    intercept: float = 0.0
    stored_range: tuple[float, float] | None = None
    padding: tuple[float, float] | None = None
    inverted: bool = False
    unit: str = "a.u."
    modality: str = ""

    def __post_init__(self) -> None:
        kind = np.dtype(self.dtype).kind
        if kind not in "iuf":
            raise ValueError(f"stored type {self.dtype!r} is not an integer or float type")
        if not np.isfinite([self.slope, self.intercept, *self.window]).all() or self.slope == 0:
            raise ValueError(
                f"slope {self.slope}, intercept {self.intercept} and window {self.window} must be finite, slope not 0"
            )
        if not self.window[0] < self.window[1]:
            raise ValueError(f"window {self.window} is empty: a constant image cannot be protected")
        if self.stored_range is None:
            info = np.iinfo(self.dtype) if kind in "iu" else np.finfo(self.dtype)
            object.__setattr__(self, "stored_range", (info.min, info.max))

    @property
    def width(self) -> float:
        """Width of the window in physical units."""
        return self.window[1] - self.window[0]

    @property
    def step(self) -> float:
        """Stored distance of one lattice step: 1 for integer files."""
        if np.dtype(self.dtype).kind in "iu":
            return 1.0
        return self.width / abs(self.slope) / FLOAT_STEPS

    @property
    def lsb(self) -> float:
        """Physical size of one lattice step."""
        return abs(self.slope) * self.step

    @property
    def unit_step(self) -> float:
        """Change of unit intensity per lattice step; negative if brightness falls as stored values grow."""
        return self.slope * self.step / self.width * (-1.0 if self.inverted else 1.0)

    def levels(self, budget: Budget) -> int:
        """Lattice steps that ``budget`` allows in this image.

        Raises:
            ValueError: When the budget is for another modality, or does not fit (see :py:meth:`Budget.levels`).
        """
        budget.check_modality(self.modality)
        return budget.levels(lsb=self.lsb, window_width=self.width)

    def to_unit(self, stored: Tensor) -> Tensor:
        """Unit intensity in [0, 1], float32, clipped at the window's ends; NaN becomes 0."""
        # Double only inside: float32 cannot hold the integers of a 32-bit file.
        unit = (stored.double() * self.slope + (self.intercept - self.window[0])) / self.width
        unit = unit.clamp_(0, 1).nan_to_num_(0.0).float()
        return 1 - unit if self.inverted else unit

    def movable(self, stored: Tensor | np.ndarray) -> Any:
        """True where a voxel may be changed: inside the window, the stored range, finite and not padding."""
        low, high = self._open_range()
        inside = (stored >= low) & (stored <= high)
        if self.padding is not None:
            inside &= (stored < self.padding[0]) | (stored > self.padding[1])
        return inside

    def bounds(self, stored: Tensor, budget: Budget) -> tuple[Tensor, Tensor]:
        """Least and largest change of each voxel in lattice steps (int16 or int32), both 0 where it may not move."""
        import torch

        levels = self.levels(budget)
        low, high = self._open_range()
        values = stored.double()
        lower = ((low - values) / self.step).ceil_().clamp_(-levels, 0)
        upper = ((high - values) / self.step).floor_().clamp_(0, levels)
        if self.padding is not None:
            above, below = values > self.padding[1], values < self.padding[0]
            gap_down = ((self.padding[1] - values) / self.step).floor_() + 1
            gap_up = ((self.padding[0] - values) / self.step).ceil_() - 1
            lower = torch.where(above, torch.maximum(lower, gap_down.clamp_(max=0)), lower)
            upper = torch.where(below, torch.minimum(upper, gap_up.clamp_(min=0)), upper)
        dtype = torch.int16 if levels <= 32767 else torch.int32
        movable = self.movable(stored)
        zero = torch.zeros((), dtype=torch.float64, device=stored.device)
        return torch.where(movable, lower, zero).to(dtype), torch.where(movable, upper, zero).to(dtype)

    def add(self, stored: np.ndarray, delta: np.ndarray) -> np.ndarray:
        """Stored values of the protected image, in the file's own type.

        Args:
            stored: original values, of ``dtype``.
            delta: lattice steps, an integer array of the same shape.

        Raises:
            ValueError: When shapes or types differ or the sum would not fit the stored range.
        """
        if stored.shape != delta.shape or delta.dtype.kind not in "iu":
            raise ValueError(
                f"delta {delta.dtype}{delta.shape} does not fit the stored image {stored.dtype}{stored.shape}"
            )
        if stored.dtype.newbyteorder("=") != np.dtype(self.dtype):
            raise ValueError(f"stored image is {stored.dtype}, its codec says {self.dtype}")
        moved = delta != 0
        protected = stored.copy()
        if stored.dtype.kind == "f":
            protected[moved] = (stored[moved].astype(np.float64) + delta[moved] * self.step).astype(stored.dtype)
            return protected
        values = stored[moved].astype(np.int64) + delta[moved]
        low, high = self.stored_range or (0, 0)
        if values.size and (values.min() < low or values.max() > high):
            raise ValueError(f"protected values {values.min()}..{values.max()} leave the stored range {low}..{high}")
        protected[moved] = values
        return protected

    def to_meta(self) -> dict[str, Any]:
        """Strings and floats only, so that it survives collation, pickling and ``weights_only`` loading."""
        meta = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return meta | {"padding": list(self.padding or (float("nan"), float("nan")))}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> StoredCodec:
        """Inverse of :py:meth:`to_meta`."""
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in meta.items()
        }
        return cls(**fields | {"padding": None if np.isnan(fields["padding"][0]) else fields["padding"]})

    def _open_range(self) -> tuple[float, float]:
        """Stored values inside both the window and the stored range."""
        ends = sorted((edge - self.intercept) / self.slope for edge in self.window)
        assert self.stored_range is not None
        return max(ends[0], self.stored_range[0]), min(ends[1], self.stored_range[1])


def auto_window(
    stored: np.ndarray, slope: float, intercept: float, padding: tuple[float, float] | None = None
) -> tuple[float, float]:
    """Percentiles 0.5 and 99.5 of the finite, non-padding values in physical units (the usual choice for MR).

    Raises:
        ValueError: When the image is constant or has no finite value.
    """
    values = stored[np.isfinite(stored)] if stored.dtype.kind == "f" else stored.reshape(-1)
    if padding is not None:
        values = values[(values < padding[0]) | (values > padding[1])]
    if values.size == 0:
        raise ValueError("the image has no finite value outside its padding")
    low, high = sorted(float(edge) * slope + intercept for edge in np.percentile(values, [0.5, 99.5]))
    if low == high:
        low, high = sorted(float(edge) * slope + intercept for edge in (values.min(), values.max()))
    if low == high:
        raise ValueError(f"the image is constant ({low:g}): there is nothing to protect")
    return low, high


def lattice_of(stored: Sequence[Tensor], codecs: Sequence[StoredCodec], budget: Budget) -> Lattice:
    """Lattice of a batch of stored images (C, *spatial) of one shape, with one codec each."""
    import torch

    from monai_salm.perturbations.budget import Lattice

    bounds = [codec.bounds(image, budget) for image, codec in zip(stored, codecs, strict=True)]
    steps = torch.tensor([codec.unit_step for codec in codecs], dtype=torch.float32, device=stored[0].device)
    return Lattice(
        torch.stack([lower for lower, _ in bounds]),
        torch.stack([upper for _, upper in bounds]),
        steps.reshape(-1, *[1] * stored[0].ndim),
    )
