# SPDX-License-Identifier: Apache-2.0
"""Decode every case of an export once, and refuse what is broken or cannot be changed."""

from __future__ import annotations

from collections.abc import Sequence

from monai_salm.io import formats
from monai_salm.io.base import Case, RefusedError, Window
from monai_salm.io.soundness import Sound, examine
from monai_salm.perturbations.budget import Budget
from monai_salm.release.gates import Refused
from monai_salm.release.pairing import shared_mask
from monai_salm.release.progress import track
from monai_salm.stored import StoredCodec


def sound_cases(
    cases: Sequence[Case], spatial_dims: int, window: Window, budget: Budget | None = None
) -> tuple[list[Case], dict[str, tuple[int, ...]], list[Refused]]:
    """Decode every case; a unit with a case that cannot be protected is refused as a whole.

    Args:
        cases: of the export.
        spatial_dims: 2 or 3.
        window: ``"auto"`` or (low, high) in physical units.
        budget: refuse an image in which it is less than one stored step, or which it is not meant for.

    Returns:
        The cases that are sound, the voxels of each class by sample id, and what is refused.
    """
    kept: list[Case] = []
    class_voxels: dict[str, tuple[int, ...]] = {}
    refused: list[Refused] = []
    bar = track(cases, "checking pixels")  # advanced by hand: a refused unit ends early
    for unit in formats.units(cases):
        culprit = unit[0]
        try:
            for culprit in unit:
                next(bar, None)
                sound = _check_case(culprit, spatial_dims, window)
                if culprit.mask:
                    class_voxels[culprit.sample_id] = sound.class_voxels
                if budget is not None:
                    _check_budget(sound.codec, budget)
            kept += unit
        except RefusedError as error:
            if unit[0].mask and len(unit) > 1:  # images that share a label file: each has its own reason
                refused += [
                    (case.names, error if case is culprit else shared_mask(case, error.reason), case.sample_id)
                    for case in unit
                ]
            else:  # one case, or all cases of one file, which are refused under its name
                file = [] if unit[0].index is None else [unit[0].file_name.as_posix()]
                names = [*file, *(name for case in unit for name in case.names)]
                refused.append((names, error, unit[0].sample_id if len(unit) == 1 else ""))
    for _ in bar:  # the cases of refused units that were not looked at
        pass
    return kept, class_voxels, refused


def _check_case(case: Case, spatial_dims: int, window: Window) -> Sound:
    try:
        return examine(case, spatial_dims, window)
    except RefusedError:
        raise
    except Exception as error:  # codecs fed with broken files raise anything; their text may hold personal values
        raise RefusedError("unreadable_pixels", f"decoding failed ({type(error).__name__}); export it again") from error


def _check_budget(codec: StoredCodec, budget: Budget) -> None:
    try:
        codec.levels(budget)
    except ValueError as error:
        raise RefusedError("budget", str(error)) from error
