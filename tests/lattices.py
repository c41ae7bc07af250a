# SPDX-License-Identifier: Apache-2.0
"""What the tests of perturbations share: generators, a loss per case, and lattices with as much room in every voxel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from monai_salm.perturbations.budget import Lattice

CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def free(shape: Sequence[int], levels: int = 8, unit_step: float = 1 / 255) -> Lattice:
    """Up to ``levels`` steps either way in all voxels of (B, C, *spatial) images."""
    bound = torch.full(tuple(shape), levels, dtype=torch.int16)
    return Lattice(-bound, bound, torch.full((len(bound), *[1] * (bound.ndim - 1)), unit_step))
