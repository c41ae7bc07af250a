# SPDX-License-Identifier: Apache-2.0
"""Whether a case can be protected: its voxels are decoded and checked in the child, which returns few numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from monai_salm.io import formats, masks, worker
from monai_salm.io.base import Case, RefusedError, Window
from monai_salm.stored import StoredCodec


@dataclass(frozen=True)
class Sound:
    """What is known of a case that can be protected.

    Args:
        codec: of its image.
        class_voxels: number of voxels of each class; empty without a mask.
    """

    codec: StoredCodec
    class_voxels: tuple[int, ...] = ()


@worker.isolated
def examine(case: Case, spatial_dims: int, window: Window = "auto") -> Sound:
    """Decode a case, and its mask where it has one.

    Args:
        case: the case.
        spatial_dims: 2 or 3.
        window: ``"auto"`` or (low, high) in physical units.

    Raises:
        RefusedError: When the image or the mask cannot be read (see ``formats.read`` and ``masks.read_mask``);
            ``mask_is_image``; ``nothing_to_move`` when no voxel may change.
    """
    image = formats.FORMATS[case.format].read(case, spatial_dims, window)
    counts: tuple[int, ...] = ()
    if case.mask:
        masks.check_image(image.stored, case.mask)
        labels = masks.read_mask(case, spatial_dims)
        counts = tuple(np.bincount(labels.reshape(-1), minlength=len(case.mask.values)).tolist())
    if not image.codec.any_movable(image.stored):
        raise RefusedError("nothing_to_move", "no voxel lies inside the intensity window; choose another window")
    return Sound(image.codec, counts)
