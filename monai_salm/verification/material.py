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

from monai_salm.io import formats
from monai_salm.io.base import Case, StoredImage, Window
from monai_salm.perturbations.budget import Budget
from monai_salm.release.labels import Cohort
from monai_salm.release.progress import track
from monai_salm.stored import StoredCodec
from monai_salm.surrogates import ResizeView
from monai_salm.verification.arms import ArmWriter, Deltas, delta_of, generator_of, perturbed, random_signs
from monai_salm.verification.fidelity import Fidelity, ssim_sample
from monai_salm.verification.report import Example

__all__ = ["OWN_ARMS", "Material", "Settings"]

OWN_ARMS = ("clean", "protected", "random_noise", "blind")
_EXAMPLES = 4
_UNITS = {"window": "window_fraction", "physical": "physical", "stored": "stored"}


@dataclass(frozen=True)
class Settings:
    """How images are read; see :py:class:`monai_salm.verification.study.VictimStudy`."""

    cohort: Cohort
    spatial_dims: int
    spatial_size: tuple[int, ...]
    window: Window
    budget: Budget
    controls: Mapping[str, Deltas]
    held_out_deltas: Callable[[], Deltas] | Deltas | None
    ssim_cases: int
    device: torch.device
    seed: int


class Material:
    """Arms, test cases, fidelity and examples.

    ``arms`` and ``test`` are on disk; ``test_protected`` has protected copies of the test cases, None unless all of
    them have one.

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
        self._resize = ResizeView(settings.spatial_size)
        self._train = {case.sample_id for case in train}
        self._held_out = {case.sample_id for case in held_out}
        self._deltas = self._held_out_deltas()
        self._ssim = ssim_sample(twins, settings.ssim_cases)
        self._shown = _spread_over_classes(train)
        self._limits: list[tuple[int, StoredCodec]] = []
        self.fidelity = Fidelity(settings.device)
        self.examples: list[Example] = []
        names = [*OWN_ARMS[:-1], *settings.controls, OWN_ARMS[-1]]
        # Files are numbered: the name of a control need not be a file name.
        self._writers = {name: ArmWriter(folder / f"{index}.f32") for index, name in enumerate(names)}
        self._test, self._test_protected = ArmWriter(folder / "test.f32"), ArmWriter(folder / "utility.f32")
        wanted = self._train | self._held_out | twins.keys()
        for case in track([case for case in settings.cohort.cases if case.sample_id in wanted], "reading cases"):
            self._read(case)
        self.arms = {name: writer.close() for name, writer in self._writers.items()}
        self.test = self._test.close()
        complete = self._test_protected.close()
        self.test_protected = complete if len(complete.labels) == len(self.test.labels) else None

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
        unreleased = self._held_out - self._twins.keys()
        return given() if unreleased and callable(given) else given  # type: ignore[return-value]

    def _read(self, case: Case) -> None:
        settings, name = self._settings, case.sample_id
        clean = formats.read(case, settings.spatial_dims, settings.window)
        unit = clean.codec.to_unit(torch.from_numpy(clean.stored))
        twin = self._twins.get(name)
        written = None if twin is None else formats.read(twin, settings.spatial_dims, settings.window)
        if written is not None:
            self.fidelity.add(clean, written, ssim=name in self._ssim)
            self._limits.append((clean.codec.levels(settings.budget), clean.codec))
            if name in self._train:
                self._add_to_arms(case, clean, unit, written)
            if name in self._shown:
                self.examples.append(self._example(case, clean, written))
        if name in self._held_out:
            self._add(self._test, unit, case)
            if written is not None:
                self._add(self._test_protected, _unit(written), case)
            elif self._deltas is not None:
                delta = delta_of(self._deltas, name, clean, "held_out_deltas")
                self._add(self._test_protected, perturbed(clean, delta), case)

    def _add_to_arms(self, case: Case, clean: StoredImage, unit: Tensor, written: StoredImage) -> None:
        settings, name = self._settings, case.sample_id
        noise = random_signs(clean, settings.budget, generator_of(settings.seed, "random_noise", name))
        self._add(self._writers["clean"], unit, case)
        self._add(self._writers["protected"], _unit(written), case)
        self._add(self._writers["random_noise"], perturbed(clean, noise), case)
        for control, deltas in settings.controls.items():
            delta = delta_of(deltas, name, clean, f"control {control!r}: its perturbations")
            self._add(self._writers[control], perturbed(clean, delta), case)
        nothing = torch.rand(1, *settings.spatial_size, generator=generator_of(settings.seed, "blind", name))
        self._writers["blind"].add(nothing, case.label)

    def _add(self, writer: ArmWriter, unit: Tensor, case: Case) -> None:
        writer.add(self._resize(unit[None])[0], case.label)

    def _example(self, case: Case, clean: StoredImage, written: StoredImage) -> Example:
        """The image, or the middle axial slice of a volume, the patient's right hand on the left side."""
        change = written.stored.astype(np.float64) - clean.stored.astype(np.float64)
        after = clean.codec.to_unit(torch.from_numpy(written.stored)).numpy()
        images = [_unit(clean).numpy(), after, np.nan_to_num(change), (change != 0) & np.isfinite(change)]
        if self._settings.spatial_dims == 3:
            middle = [image[..., image.shape[-1] // 2] for image in images]  # x to the right, y to the front
            images = [image.transpose(0, 2, 1)[:, ::-1, ::-1] for image in middle]
        planes = [image[0] for image in images]
        limit = clean.codec.levels(self._settings.budget) * clean.codec.step
        title = f"{self._settings.cohort.classes[case.label]} ({case.sample_id})"
        return Example(title, *planes, stored_unit="stored units", max_delta=limit)


def _unit(image: StoredImage) -> Tensor:
    return image.codec.to_unit(torch.from_numpy(image.stored))


def _spread_over_classes(cases: Sequence[Case]) -> set[str]:
    """Up to four cases, from as many classes as possible."""
    by_class: dict[int, list[str]] = {}
    for case in cases:
        by_class.setdefault(case.label, []).append(case.sample_id)
    rounds = [name for turn in range(_EXAMPLES) for names in by_class.values() for name in names[turn : turn + 1]]
    return set(rounds[:_EXAMPLES])
