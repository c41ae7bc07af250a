# SPDX-License-Identifier: Apache-2.0
"""What a study is made of: everything that it reads from image files, in one pass over the cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_salm.engines.cases import generator_of
from monai_salm.io import formats
from monai_salm.io.base import Case, StoredImage, Window
from monai_salm.io.masks import read_mask
from monai_salm.perturbations.budget import Budget
from monai_salm.release.labels import Cohort
from monai_salm.release.progress import track
from monai_salm.stored import StoredCodec
from monai_salm.verification.arms import Deltas, applied, delta_of, perturbed
from monai_salm.verification.fidelity import SSIM_CASES, Fidelity, ssim_sample
from monai_salm.verification.leakage import LEAKAGE_CASES, Leakage
from monai_salm.verification.report import Example
from monai_salm.verification.training import Task

__all__ = ["Material", "Settings", "own_arms"]

_EXAMPLES = 4
_UNITS = {"window": "window_fraction", "physical": "physical", "stored": "stored"}


@dataclass(frozen=True)
class Settings:
    """How images are read.

    Args:
        controls: perturbations of all training cases, by the name of the arm that is made of them.
        held_out_deltas: makes perturbations of the test cases that have no written copy; None: nothing does.
        cohort, task, spatial_dims, window, budget, device, seed: as of
            :py:class:`monai_salm.verification.study.VictimStudy`.
    """

    cohort: Cohort
    task: Task
    spatial_dims: int
    window: Window
    budget: Budget
    controls: Mapping[str, Deltas]
    held_out_deltas: Callable[[], Deltas] | None
    device: torch.device
    seed: int


def own_arms(task: Task) -> tuple[str, ...]:
    """Arms that a study makes itself, in the report's order; those of its controls come before the last."""
    return ("clean", "protected", *task.controls, "blind")


class Material:
    """Arms, test cases, fidelity, leakage and examples.

    ``arms`` and ``test`` are on disk; ``test_protected`` has protected copies of the test cases, None unless all of
    them have one. ``present`` has the classes of each case that was read, by ``sample_id``.

    Args:
        settings: how to read.
        train: cases to train on; each has a twin.
        held_out: cases to test on.
        twins: the written copy of each released case, by ``sample_id``.
        folder: an empty folder for the arms.
    """

    def __init__(
        self,
        settings: Settings,
        train: Sequence[Case],
        held_out: Sequence[Case],
        twins: Mapping[str, Case],
        folder: Path,
    ) -> None:
        self._settings, self._twins = settings, twins
        self._train = {case.sample_id for case in train}
        self._held_out = {case.sample_id for case in held_out}
        self._deltas = self._held_out_deltas()
        self._ssim = ssim_sample(twins, SSIM_CASES[settings.spatial_dims])
        self._shown = _spread_over_classes(train)
        self._leaks = ssim_sample(self._train, LEAKAGE_CASES)
        self._limits: list[tuple[int, StoredCodec]] = []
        self._largest = (0,) * settings.spatial_dims
        self.fidelity, self.leakage = Fidelity(settings.device), Leakage(settings.device)
        self.examples: list[Example] = []
        self.present: dict[str, frozenset[int]] = {}
        *first, last = own_arms(settings.task)
        # Files are numbered: the name of a control need not be a file name.
        writer = settings.task.writer
        names = enumerate([*first, *settings.controls, last])
        self._writers = {name: writer(folder / f"{index}.f32") for index, name in names}
        self._test, self._test_protected = writer(folder / "test.f32"), writer(folder / "utility.f32")
        wanted = self._train | self._held_out | twins.keys()
        for case in track([case for case in settings.cohort.cases if case.sample_id in wanted], "reading cases"):
            self._read(case)
        self.arms = {name: writer.close() for name, writer in self._writers.items()}
        self.test = self._test.close()
        complete = self._test_protected.close()
        self.test_protected = complete if complete.count == self.test.count else None

    @property
    def warnings(self) -> list[str]:
        """What the report must say of these images."""
        return self._settings.task.warnings(self._largest)

    def budget(self) -> dict[str, Any]:
        """The ``budget`` part of ``docs/report.md``, over the released cases."""
        asked = self._settings.budget
        units = {codec.unit for _, codec in self._limits}
        parts = {
            "window_fraction": [levels * codec.lsb / codec.width for levels, codec in self._limits],
            "physical": [levels * codec.lsb for levels, codec in self._limits],
            "stored": [levels * codec.step for levels, codec in self._limits],
        }
        ranges = {name: {"min": min(values), "max": max(values)} for name, values in parts.items()}
        unit = next(iter(units)) if len(units) == 1 else None
        return {"epsilon": asked.epsilon, "unit": _UNITS[asked.unit], **ranges, "physical_unit": unit}

    def _held_out_deltas(self) -> Deltas | None:
        given = self._settings.held_out_deltas
        return given() if given and self._held_out - self._twins.keys() else None

    def _read(self, case: Case) -> None:
        settings, task, name = self._settings, self._settings.task, case.sample_id
        clean = formats.read(case, settings.spatial_dims, settings.window)
        mask = read_mask(case, settings.spatial_dims) if settings.cohort.voxelwise else None
        self.present[name] = frozenset({case.label} if mask is None else np.unique(mask).tolist())
        self._largest = tuple(map(max, self._largest, clean.stored.shape[1:]))
        unit, truth = _unit(clean), task.truth(case, mask, clean.spacing)
        twin = self._twins.get(name)
        written = None if twin is None else formats.read(twin, settings.spatial_dims, settings.window)
        if written is not None:
            self.fidelity.add(clean, written, ssim=name in self._ssim, foreground=None if mask is None else mask > 0)
            self._limits.append((clean.codec.levels(settings.budget), clean.codec))
            if name in self._train:
                self._add_to_arms(case, clean, written, mask, truth)
            if name in self._shown:
                self.examples.append(self._example(case, clean, written, mask))
        if name in self._held_out:
            self._test.add(task.view(unit), truth)
            if written is not None:
                self._test_protected.add(task.view(_unit(written)), truth)
            elif self._deltas is not None:
                delta = delta_of(self._deltas, name, clean, "held_out_deltas")
                self._test_protected.add(task.view(perturbed(clean, delta)), truth)

    def _add_to_arms(
        self, case: Case, clean: StoredImage, written: StoredImage, mask: np.ndarray | None, truth: Any
    ) -> None:
        settings, task, name = self._settings, self._settings.task, case.sample_id
        deltas, label = {}, torch.tensor([case.label]) if mask is None else torch.from_numpy(mask)[None]
        for control, method in task.controls.items():
            generator = generator_of(settings.seed, control, name)
            deltas[control] = applied(method, clean, label, settings.budget, generator)
        for control, given in settings.controls.items():
            deltas[control] = delta_of(given, name, clean, f"control {control!r}: its perturbations")
        shown = task.view(_unit(clean))
        self._writers["clean"].add(shown, truth)
        self._writers["protected"].add(task.view(_unit(written)), truth)
        for control, delta in deltas.items():
            self._writers[control].add(task.view(perturbed(clean, delta)), truth)
        nothing = torch.rand(shown.shape, generator=generator_of(settings.seed, "blind", name))
        self._writers["blind"].add(nothing, truth)
        if mask is not None and name in self._leaks:
            for arm, delta in {"protected": _change(clean, written), **deltas}.items():
                self.leakage.add(arm, delta, mask > 0)

    def _example(self, case: Case, clean: StoredImage, written: StoredImage, mask: np.ndarray | None) -> Example:
        """The image, or an axial slice of a volume: the middle one, or the one with most foreground."""
        settings, name, change = self._settings, case.sample_id, _change(clean, written)
        images = {
            "clean": _unit(clean).numpy(),
            "protected": clean.codec.to_unit(torch.from_numpy(written.stored)).numpy(),
            "delta": _strongest(change),
            "mask": (change != 0).any(0, keepdims=True),
        }
        if mask is not None:
            images["label"] = mask
        if settings.spatial_dims == 3:
            at = clean.stored.shape[-1] // 2
            if mask is not None and mask.any():
                at = int((mask > 0).sum(axis=(0, 1, 2)).argmax())
            # As radiologists look at it: the patient's right on the left side, the front above.
            images = {kind: image[..., at].transpose(0, 2, 1)[:, ::-1, ::-1] for kind, image in images.items()}
        return Example(
            title=name if mask is not None else f"{settings.cohort.classes[case.label]} ({name})",
            max_delta=clean.codec.levels(settings.budget) * clean.codec.step,
            **{kind: _plane(image) for kind, image in images.items()},
        )


def _unit(image: StoredImage) -> Tensor:
    return image.codec.to_unit(torch.from_numpy(image.stored))


def _change(clean: StoredImage, written: StoredImage) -> np.ndarray:
    """(C, *spatial) written minus clean in stored units; 0 where a value is not finite, which is never changed."""
    change = written.stored.astype(np.float64) - clean.stored.astype(np.float64)
    return np.nan_to_num(change, posinf=0.0, neginf=0.0)


def _plane(image: np.ndarray) -> np.ndarray:
    """(H, W) of one channel, (H, W, 3) of three."""
    return image[0] if len(image) == 1 else image.transpose(1, 2, 0)


def _strongest(change: np.ndarray) -> np.ndarray:
    """(1, *spatial) of a (C, *spatial) change: in each voxel that of the channel that changed most."""
    return np.take_along_axis(change, np.abs(change).argmax(0)[None], axis=0)


def _spread_over_classes(cases: Sequence[Case]) -> set[str]:
    """Up to four cases, from as many classes as possible."""
    by_class: dict[int, list[str]] = {}
    for case in cases:
        by_class.setdefault(case.label, []).append(case.sample_id)
    rounds = [name for turn in range(_EXAMPLES) for names in by_class.values() for name in names[turn : turn + 1]]
    return set(rounds[:_EXAMPLES])
