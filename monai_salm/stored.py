# SPDX-License-Identifier: Apache-2.0
"""Stored value <-> physical unit <-> unit intensity, and the lattice of changes that a file can hold."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # the process that reads files needs no torch, and starts faster and smaller without
    from torch import Tensor

    from monai_salm.perturbations.budget import Budget, Lattice

_SLAB_VOXELS = 1 << 20
"""What is computed at once of a large image, so that the processor's cache holds it (of slices scaled alike)."""
_INT32_MAX = 2**31 - 1
FLOAT_STEPS = 4096
"""Float files have no smallest step of their own; their window is cut into as many steps as 12-bit images have."""


@dataclass(frozen=True)
class SliceScaling:
    """Slope and intercept of each slice of a volume, where they vary (PET, some MR).

    Args:
        axis: spatial axis along which the slices lie, 0 for x.
        slopes: of each slice.
        intercepts: of each slice.
    """

    axis: int
    slopes: tuple[float, ...]
    intercepts: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.slopes) != len(self.intercepts) or not np.isfinite([*self.slopes, *self.intercepts]).all():
            raise ValueError("every slice needs one finite slope and intercept")
        if len(set(np.sign(self.slopes))) != 1 or not all(self.slopes):
            raise ValueError("the slopes of a volume must have one sign and not be 0")

    def to_physical(self, stored: np.ndarray) -> np.ndarray:
        """Physical values of a (1, *spatial) volume, double."""
        return stored * self.spread(self.slopes, stored) + self.spread(self.intercepts, stored)

    def spread(self, numbers: Sequence[float], like: Tensor | np.ndarray) -> Any:
        """One number per slice, double, of the kind of ``like``: a (C, *spatial) volume over which it broadcasts.

        Raises:
            ValueError: When the volume has another number of slices.
        """
        shape = [1] * like.ndim
        shape[1 + self.axis] = len(self.slopes)
        if like.shape[1 + self.axis] != len(self.slopes):
            raise ValueError(f"a codec of {len(self.slopes)} slices does not fit an image {tuple(like.shape)}")
        spread = np.array(numbers, np.float64).reshape(shape)
        if isinstance(like, np.ndarray):
            return spread
        import torch

        return torch.from_numpy(spread).to(like.device)


@dataclass(frozen=True)
class StoredCodec:
    """How one image's stored values are to be read, and which of them may move.

    ``physical = slope * stored + intercept``; the window's ends become unit intensity 0 and 1 (1 and 0 if
    ``inverted``).

    Args:
        dtype: numpy name of the file's type, ``"int16"``, ``"float32"``, ...
        window: (low, high) in physical units; values outside are never touched and never reached.
        slope: physical units per stored value, not 0 (DICOM RescaleSlope, NIfTI scl_slope). Where it varies between
            slices: the smallest, so that ``levels`` is what the budget allows at most.
        intercept: physical value of stored 0.
        stored_range: inclusive range of values the file can hold (BitsStored); default: that of ``dtype``.
        padding: inclusive range of stored values that stand for "no image"; never touched, never reached.
        inverted: low values are bright (DICOM MONOCHROME1).
        unit: name of the physical unit, ``"HU"`` or ``"a.u."``.
        modality: DICOM modality, such as ``"CT"``; empty where the file does not tell.
        slices: slope and intercept of each slice, None where all have ``slope`` and ``intercept``.

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
    slices: SliceScaling | None = None

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
        """Lattice steps that ``budget`` allows in this image; the most of any slice.

        Raises:
            ValueError: When the budget is for another modality, or does not fit, in any slice (see
                :py:meth:`Budget.levels`).
        """
        return max(self.slice_levels(budget))

    def slice_levels(self, budget: Budget) -> tuple[int, ...]:
        """As :py:meth:`levels`, of each slice; one number where all are scaled alike."""
        budget.check_modality(self.modality)
        slopes = self.slices.slopes if self.slices else (self.slope,)
        return tuple(budget.levels(lsb=abs(slope) * self.step, window_width=self.width) for slope in slopes)

    def physical_limit(self, budget: Budget) -> float:
        """Largest change in physical units, where one in stored units does not hold for every slice; else infinite."""
        if self.slices is None or budget.unit == "stored":
            return math.inf
        return budget.epsilon * (self.width if budget.unit == "window" else 1.0)

    def to_unit(self, stored: Tensor) -> Tensor:
        """Unit intensity in [0, 1], float32, clipped at the window's ends; NaN becomes 0."""
        import torch

        if self.slices is None and stored.numel() > _SLAB_VOXELS:
            parts = [self.to_unit(part) for part in stored.reshape(-1).split(_SLAB_VOXELS)]
            return torch.cat(parts).reshape(stored.shape)
        # Double only inside: float32 cannot hold the integers of a 32-bit file.
        slope, intercept = self._scaling(stored)
        unit = (stored.double() * slope + (intercept - self.window[0])) / self.width
        unit = unit.clamp_(0, 1).nan_to_num_(0.0).float()
        return 1 - unit if self.inverted else unit

    def unit_steps(self, like: Tensor) -> Tensor | float:
        """:py:attr:`unit_step` of each voxel of a (C, *spatial) image: a number, or one per slice that broadcasts."""
        if self.slices is None:
            return self.unit_step
        return (self._scaling(like)[0] * (self.step / self.width * (-1.0 if self.inverted else 1.0))).float()

    def part(self, corner: Sequence[int], size: Sequence[int]) -> StoredCodec:
        """The codec of a part of the image, by its first voxel and its size along each spatial axis."""
        if self.slices is None:
            return self
        first, axis = corner[self.slices.axis], self.slices.axis
        return self.of_slices(range(first, min(first + size[axis], len(self.slices.slopes))))

    def of_slice(self, index: int) -> StoredCodec:
        """The codec of one slice, along the axis of ``slices``; of an image whose slices are scaled alike its own."""
        if self.slices is None:
            return self
        return replace(self, slope=self.slices.slopes[index], intercept=self.slices.intercepts[index], slices=None)

    def slabs(self, shape: Sequence[int]) -> Iterator[tuple[slice, StoredCodec]]:
        """An image (C, *spatial) in parts along its first spatial axis, with the codec of each.

        What is computed of a large volume takes many times its memory, unless it is computed part by part.
        """
        thick = max(1, shape[1] * _SLAB_VOXELS // max(math.prod(shape), 1))
        for start in range(0, shape[1], thick):
            corner, size = (start, *(0 for _ in shape[2:])), (thick, *shape[2:])
            yield slice(start, start + thick), self.part(corner, size)

    def any_movable(self, stored: np.ndarray) -> bool:
        """Whether any voxel of a (C, *spatial) image may be changed."""
        return any(part.movable(stored[:, span]).any() for span, part in self.slabs(stored.shape))

    def movable(self, stored: Tensor | np.ndarray) -> Any:
        """True where a voxel may be changed: inside the window, the stored range, finite and not padding."""
        low, high = self._open_range(stored)
        padding = self.padding
        if self.slices is None and isinstance(stored, np.ndarray) and stored.dtype.kind in "iu":
            # Compared with a float, integers become doubles first, which takes ten times as long.
            low, high = math.ceil(low), math.floor(high)
            padding = padding and (math.ceil(padding[0]), math.floor(padding[1]))
        elif not isinstance(stored, np.ndarray) and not stored.is_floating_point():
            stored = stored.double()  # torch would compare 32-bit integers as float32, which cannot hold them
        inside = (stored >= low) & (stored <= high)
        if padding is not None:
            inside &= (stored < padding[0]) | (stored > padding[1])
        return inside

    def bounds(self, stored: Tensor, budget: Budget) -> tuple[Tensor, Tensor]:
        """Least and largest change of each voxel in lattice steps (int16 or int32), both 0 where it may not move."""
        import torch

        if self.slices is None and stored.numel() > _SLAB_VOXELS:
            parts = [self.bounds(part, budget) for part in stored.reshape(-1).split(_SLAB_VOXELS)]
            lower, upper = (torch.cat(each).reshape(stored.shape) for each in zip(*parts, strict=True))
            return lower, upper
        most = min(self.levels(budget), _INT32_MAX)
        levels = self.slices.spread(self.slice_levels(budget), stored) if self.slices else torch.tensor(most)
        low, high = self._open_range(stored)
        values = stored.double()
        lower = ((low - values) / self.step).ceil_().clamp_(max=0).maximum(-levels.to(values))
        upper = ((high - values) / self.step).floor_().clamp_(min=0).minimum(levels.to(values))
        if self.padding is not None:
            above, below = values > self.padding[1], values < self.padding[0]
            gap_down = ((self.padding[1] - values) / self.step).floor_() + 1
            gap_up = ((self.padding[0] - values) / self.step).ceil_() - 1
            lower = torch.where(above, torch.maximum(lower, gap_down.clamp_(max=0)), lower)
            upper = torch.where(below, torch.minimum(upper, gap_up.clamp_(min=0)), upper)
        dtype = torch.int16 if most <= 32767 else torch.int32
        movable = self.movable(values)
        zero = torch.zeros((), dtype=torch.float64, device=stored.device)
        return torch.where(movable, lower, zero).to(dtype), torch.where(movable, upper, zero).to(dtype)

    def allows(self, stored: np.ndarray, delta: np.ndarray) -> bool:
        """Whether a change keeps :py:meth:`bounds`, those of a budget aside: it needs no torch.

        Args:
            stored: original values of one slice, or of an image whose slices are scaled alike.
            delta: lattice steps of the same shape.
        """
        moved = delta != 0
        if stored.dtype.kind in "iu":  # far from every edge, which is soon said of whole numbers
            target = np.add(stored, delta, dtype=_wide(stored, delta), casting="unsafe")
            sure = self.movable(stored) & self.movable(target)
            if self.padding is not None:
                sure &= (stored < self.padding[0]) == (target < self.padding[0])
            moved &= ~sure
        moved = np.flatnonzero(moved)
        low, high = self._open_range(stored)
        values, steps = (each.reshape(-1)[moved].astype(np.float64) for each in (stored, delta))
        inside = (values >= low) & (steps >= (low - values) / self.step)
        inside &= (values <= high) & (steps <= (high - values) / self.step)
        if self.padding is not None:
            first, last = self.padding
            below = (values < first) & (steps < (first - values) / self.step)
            inside &= below | (values > last) & (steps > (last - values) / self.step)
        return bool(inside.all())

    def of_slices(self, indices: Sequence[int]) -> StoredCodec:
        """The codec of some slices, along the axis of ``slices``."""
        if self.slices is None:
            return self
        slopes, intercepts = ([found[at] for at in indices] for found in (self.slices.slopes, self.slices.intercepts))
        return replace(self, slices=SliceScaling(self.slices.axis, tuple(slopes), tuple(intercepts)))

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
        if stored.dtype.kind == "f":
            moved = delta != 0
            protected = stored.copy()
            protected[moved] = (stored[moved].astype(np.float64) + delta[moved] * self.step).astype(stored.dtype)
            return protected
        protected = np.empty_like(stored)
        low, high = self.stored_range or (0, 0)
        for span, _ in self.slabs(stored.shape):
            values = np.add(stored[:, span], delta[:, span], dtype=_wide(stored, delta), casting="unsafe")
            if values.size and (values.min() < low or values.max() > high):
                raise ValueError(
                    f"protected values {values.min()}..{values.max()} leave the stored range {low}..{high}"
                )
            protected[:, span] = values
        return protected

    def to_meta(self) -> dict[str, Any]:
        """Strings, bools, floats and lists of floats: they survive collation, pickling and ``weights_only`` loading,
        and the items of a batch agree in type."""
        slices = json.dumps(asdict(self.slices)) if self.slices else ""  # a list's length would break collation
        padding = self.padding or (math.nan, math.nan)
        return {key: _floats(value) for key, value in (asdict(self) | {"padding": padding, "slices": slices}).items()}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> StoredCodec:
        """Inverse of :py:meth:`to_meta`, also after collation and decollation; a part of it raises ValueError."""
        if lacks := sorted(cls.__dataclass_fields__.keys() - meta.keys()):
            raise ValueError(f"the codec lacks {', '.join(lacks)}; give all that to_meta() made, as LoadStored does")
        fields: dict[str, Any] = {key: _plain(value) for key, value in meta.items()}
        slices = json.loads(fields["slices"] or "null")
        if slices:
            slices = SliceScaling(slices["axis"], tuple(slices["slopes"]), tuple(slices["intercepts"]))
        padding = None if np.isnan(fields["padding"][0]) else fields["padding"]
        return cls(**fields | {"padding": padding, "slices": slices})

    def _scaling(self, stored: Tensor | np.ndarray) -> tuple[Any, Any]:
        if self.slices is None:
            return self.slope, self.intercept
        return self.slices.spread(self.slices.slopes, stored), self.slices.spread(self.slices.intercepts, stored)

    def _open_range(self, stored: Tensor | np.ndarray) -> tuple[Any, Any]:
        """Stored values inside both the window and the stored range."""
        slope, intercept = self._scaling(stored)
        ends = [(edge - intercept) / slope for edge in self.window]
        low, high = ends if self.slope > 0 else ends[::-1]
        assert self.stored_range is not None
        if self.slices is None:
            return max(low, self.stored_range[0]), min(high, self.stored_range[1])
        return low.clip(min=self.stored_range[0]), high.clip(max=self.stored_range[1])


def _floats(value: Any) -> Any:
    if isinstance(value, tuple):
        return [float(item) for item in value]
    return value if isinstance(value, (str, bool)) else float(value)


def _plain(value: Any) -> Any:
    """Without the arrays and tensors that collation makes of numbers."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(_plain(item) for item in value) if isinstance(value, (list, tuple)) else value


def _wide(stored: np.ndarray, delta: np.ndarray) -> type:
    """An integer type that holds their sum."""
    return np.int32 if max(stored.dtype.itemsize, delta.dtype.itemsize) < 4 else np.int64


def auto_window(stored: np.ndarray, slope: float, intercept: float) -> tuple[float, float]:
    """Percentiles 0.5 and 99.5 of the finite values in physical units (the usual choice for MR).

    Raises:
        ValueError: When the image is constant or has no finite value.
    """
    values = stored[np.isfinite(stored)] if stored.dtype.kind == "f" else stored.reshape(-1)
    if values.size == 0:
        raise ValueError("the image has no finite value")
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
    steps = [codec.unit_steps(image) for image, codec in zip(stored, codecs, strict=True)]
    if any(isinstance(step, torch.Tensor) for step in steps):  # one per slice: of all images, if not along one axis
        shape = torch.broadcast_shapes(*(step.shape for step in steps if isinstance(step, torch.Tensor)))
        unit_step = torch.stack([torch.as_tensor(step, device=stored[0].device).expand(shape) for step in steps])
    else:
        unit_step = torch.tensor(steps, device=stored[0].device).reshape(-1, *[1] * stored[0].ndim)
    return Lattice(
        torch.stack([lower for lower, _ in bounds]), torch.stack([upper for _, upper in bounds]), unit_step.float()
    )
