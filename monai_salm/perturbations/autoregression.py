# SPDX-License-Identifier: Apache-2.0
"""Autoregressive processes on a grid: a voxel is a weighted sum of those before it within 3 voxels per axis."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

REACH = 2
"""Voxels per axis that a rule looks back."""
MARGIN = 2
"""Further voxels per axis at the beginning that are cut off: they still show the random start."""
CANDIDATES = 2048
TRIAL = {2: 40, 3: 24}
"""Voxels per axis over which a process has to stay bounded, by number of axes."""
BOUNDED = 1.0
"""Largest root mean square of a process that starts with that of 1."""


def run(rules: Tensor, size: Sequence[int], generator: torch.Generator) -> Tensor:
    """Let processes run from random starts.

    Runs are as long as the trial that ``processes`` made of them, or they might explode: a larger image is a mosaic.

    Args:
        rules: (B, C, 3**dims - 1) weights of the preceding voxels, the farthest first.
        size: (*spatial) of what is returned.
        generator: of the starts.

    Returns:
        (B, C, *size) values.

    Example:
        >>> constant = torch.full((1, 1, 8), 1 / 8)
        >>> float(run(constant, (30, 30), torch.Generator().manual_seed(0)).std()) < 0.3
        True
    """
    values = torch.empty(*rules.shape[:2], *size)
    longest = TRIAL[len(size)]
    for corner in product(*[range(0, length, longest) for length in size]):
        piece = [min(longest, length - at) for at, length in zip(corner, size, strict=True)]
        span = (..., *[slice(at, at + length) for at, length in zip(corner, piece, strict=True)])
        values[span] = _run(rules, piece, generator)
    return values


def _run(rules: Tensor, size: Sequence[int], generator: torch.Generator) -> Tensor:
    """All voxels whose coordinates have one sum depend on lesser sums only, and are computed at once."""
    full = [length + REACH + MARGIN for length in size]
    values = torch.randn(*rules.shape[:2], *full, generator=generator)
    flat = values.flatten(2)  # a view: voxels before the rule's reach stay random
    places = torch.stack(torch.meshgrid(*[torch.arange(length) for length in full], indexing="ij"), -1).flatten(0, -2)
    strides = torch.tensor(values.stride()[2:])
    back = torch.tensor(list(product(range(REACH, -1, -1), repeat=len(full)))[:-1]) @ strides
    inside = (places >= REACH).all(1)
    wave = places.sum(1)
    for front in range(REACH * len(full), int(wave.max()) + 1):
        at = (inside & (wave == front)).nonzero()[:, 0]
        flat[:, :, at] = torch.einsum("bcnk,bck->bcn", flat[:, :, at[:, None] - back], rules)
    return values[(..., *[slice(REACH + MARGIN, None)] * len(full))]


@lru_cache(maxsize=8)
def processes(seed: int, count: int, channels: int, dims: int) -> Tensor:
    """Rules that stay bounded and tell each other apart: a farthest-point search among random ones.

    Args:
        seed: of the candidates.
        count: number of rules.
        channels: of an image; each has a rule of its own.
        dims: spatial axes.

    Returns:
        (count, channels, 3**dims - 1) weights, of sum 1.

    Raises:
        ValueError: When too few candidates stay bounded.
    """
    generator = torch.Generator().manual_seed(seed)
    kept: list[Tensor] = []
    trials: list[Tensor] = []
    size = [TRIAL[dims]] * dims
    for _ in range(CANDIDATES // 256):
        rules = torch.randn(256, channels, (REACH + 1) ** dims - 1, generator=generator)
        rules = rules / rules.sum(2, keepdim=True)
        trial = run(rules, size, generator)
        power = trial.square().flatten(2).mean(2)
        bounded = ((power < BOUNDED**2) & (power > 1e-6)).all(1)
        kept.append(rules[bounded])
        trials.append(trial[bounded])
    rules, signals = torch.cat(kept), torch.cat(trials)
    if len(rules) < count:
        raise ValueError(f"{len(rules)} of {CANDIDATES} random rules stay bounded, {count} are asked for")
    signals = signals / signals.square().flatten(1).mean(1).sqrt().reshape(-1, *[1] * (dims + 1))
    chosen, least = [0], torch.full((len(rules),), torch.inf)
    while len(chosen) < count:
        last = slice(chosen[-1], chosen[-1] + 1)
        apart = torch.minimum(_responses(rules[last], signals)[:, 0], _responses(rules, signals[last])[0])
        least = torch.minimum(least, apart)
        chosen.append(int(least.argmax()))
    return rules[chosen]


def _responses(rules: Tensor, signals: Tensor) -> Tensor:
    """(N, M) mean size of what each of (M, C, K) rules leaves of (N, C, *spatial) signals: 0 of those that follow."""
    count, channels = rules.shape[:2]
    kernels = F.pad(rules, (0, 1), value=-1.0).transpose(0, 1)
    kernels = kernels.reshape(channels * count, 1, *[REACH + 1] * (signals.ndim - 2))
    convolve = F.conv2d if signals.ndim == 4 else F.conv3d
    left = convolve(signals, kernels, groups=channels).abs().flatten(2).mean(2)
    return left.reshape(-1, channels, count).mean(1)
