# SPDX-License-Identifier: Apache-2.0
"""One case's perturbation, the digests that tie it to its image, and its compact form."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # the process that reads files needs no torch, and starts faster and smaller without
    from torch import Tensor

TYPES = ("int8", "int16", "int32")
"""A perturbation is kept in the first of these that holds its budget."""
_SLAB_BYTES = 32 << 20
_BLOCK_BYTES = 1 << 18
"""Copied at a time by :py:func:`contiguous`; fits in a processor's cache."""
_LINE_BYTES = 64
COLUMNS = ("sample_id", "dtype", "shape", "levels", "step", "image_digest", "digest", "payload")
"""Names of :py:func:`pack`'s values: text, text, JSON, integer, float, hex, hex, bytes."""


class OtherSettingsError(ValueError):
    """What is on disk was made with other settings, or from other images."""


@dataclass(frozen=True)
class Record:
    """One case's perturbation.

    Args:
        sample_id: the case.
        delta: (C, *spatial) integer lattice steps.
        image_digest: :py:func:`image_digest` of the clean stored image, in the file's own type.
        levels: most steps that the budget allows in this image.
        step: stored distance of one lattice step (``StoredCodec.step``): 1 for integer files.
    """

    sample_id: str
    delta: Tensor
    image_digest: str
    levels: int
    step: float = 1.0


def smallest_type(levels: int) -> str:
    """The first of :py:data:`TYPES` that holds steps up to ``levels``; empty where none does."""
    return next((name for name in TYPES if levels <= np.iinfo(name).max), "")


def image_digest(stored: Tensor | np.ndarray) -> str:
    """SHA-256 over type, shape and values of a stored image; equal for tensors and arrays of either byte order.

    Example:
        >>> import torch
        >>> pixels = np.arange(4, dtype=np.int16).reshape(1, 2, 2)
        >>> image_digest(pixels) == image_digest(torch.from_numpy(pixels))
        True
        >>> image_digest(pixels) == image_digest(pixels.astype(np.int32))
        False
    """
    values = as_array(stored)
    return _digest([values.dtype.newbyteorder("=").name, list(values.shape)], values)


def pack(record: Record) -> tuple[Any, ...]:
    """The values of :py:data:`COLUMNS`. The payload has one bit per voxel (whether it moves), then the changes.

    Raises:
        ValueError: When the perturbation is not of integers or leaves its budget.
    """
    delta = as_array(record.delta)
    if delta.dtype.kind not in "iu":
        raise ValueError(f"{record.sample_id}: a perturbation is {delta.dtype}; the bank holds integer lattice steps")
    most = max(int(delta.max(initial=0)), -int(delta.min(initial=0)))
    if most > record.levels:
        raise ValueError(f"{record.sample_id}: a change of {most} lattice steps is over the budget of {record.levels}")
    dtype = smallest_type(record.levels)
    if not dtype:
        raise ValueError(f"{record.sample_id}: a budget of {record.levels} lattice steps is over what 32 bits hold")
    delta = delta.astype(np.dtype(dtype).newbyteorder("<"))
    moved = delta != 0
    payload = zlib.compress(np.packbits(moved).tobytes() + delta[moved].tobytes(), 1)
    shape, levels, step = json.dumps(delta.shape), int(record.levels), float(record.step)
    header = [record.sample_id, dtype, shape, levels, step, record.image_digest]
    return (*header, _digest(header, delta), payload)


def unpack(row: tuple[Any, ...]) -> Record:
    """Inverse of :py:func:`pack`.

    Raises:
        ValueError: When the values do not agree with their digest.
    """
    sample_id, dtype, shape, levels, step, image, digest, payload = row
    try:
        count = math.prod(json.loads(shape))
        data = zlib.decompress(payload)
        split = -(-count // 8)
        moved = np.unpackbits(np.frombuffer(data[:split], np.uint8), count=count).astype(bool)
        delta = np.zeros(count, dtype)
        delta[moved] = np.frombuffer(data[split:], np.dtype(dtype).newbyteorder("<"))
        delta = delta.reshape(json.loads(shape))
        intact = _digest([sample_id, dtype, shape, levels, step, image], delta) == digest
    except (zlib.error, ValueError, TypeError, OverflowError, MemoryError):
        intact = False
    if not intact:
        raise ValueError(f"the record of {sample_id!r} does not agree with its digest")
    import torch

    return Record(sample_id, torch.from_numpy(delta), image, levels, step)


def as_array(values: Tensor | np.ndarray) -> np.ndarray:
    """The same values as an array, in main memory."""
    return values if isinstance(values, np.ndarray) else values.detach().cpu().numpy()


def contiguous(values: np.ndarray) -> np.ndarray:
    """The same values in C order, as ``np.ascontiguousarray``, but several times faster for a transposed volume.

    Reading an array across its order in memory takes a cache line for each value, and lines that are a power of two
    apart evict each other. So each block is copied in its own order first, into a buffer whose rows are one cache line
    longer, and transposed from there.
    """
    if values.ndim < 3 or values.flags.c_contiguous:
        return np.ascontiguousarray(values)
    found = np.empty(values.shape, values.dtype)
    thick = min(max(1, _BLOCK_BYTES * values.shape[1] // max(values.nbytes, 1)), values.shape[1])
    size = (values.shape[0], thick, *values.shape[2:])
    order = np.argsort(np.abs(values.strides))[::-1]  # axes as they lie in memory
    rows = [size[axis] for axis in order]
    rows[-1] += _LINE_BYTES // values.itemsize
    block = np.empty(rows, values.dtype).transpose(np.argsort(order))[tuple(map(slice, size))]
    for start in range(0, values.shape[1], thick):
        part = values[:, start : start + thick]
        block[:, : part.shape[1]] = part
        found[:, start : start + thick] = block[:, : part.shape[1]]
    return found


def _digest(header: list[Any], values: np.ndarray) -> str:
    digest = hashlib.sha256(json.dumps(header).encode() + b"\n")
    for part in _parts(values):
        digest.update(contiguous(part).astype(values.dtype.newbyteorder("<"), copy=False))
    return digest.hexdigest()


def _parts(values: np.ndarray) -> Iterator[np.ndarray]:
    """Parts of (C, *spatial) values in C order, so that a volume in another order need not be copied as a whole."""
    if values.ndim < 2 or values.flags.c_contiguous:
        yield values
        return
    for channel in values:
        thick = max(1, _SLAB_BYTES * len(channel) // max(channel.nbytes, 1))
        yield from (channel[start : start + thick] for start in range(0, len(channel), thick))
