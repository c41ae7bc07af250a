# SPDX-License-Identifier: Apache-2.0
"""Which cases a study keeps from its victims, to test them: those that the labels name, or else a seeded part."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from monai_salm.io.base import Case

HELD_OUT_FRACTION = 0.25
"""Part of each class (with voxel labels, of the patients) that is held out where no test cases are named."""


def held_out_ids(cases: Sequence[Case], seed: int, present: Mapping[str, set[int]] | None = None) -> frozenset[str]:
    """The cases that a study tests on, by sample id: those of split ``test``, or else some patients of split ``train``.

    Args:
        cases: labeled cases.
        seed: decides which patients are chosen.
        present: classes of the voxels of each case, by sample id; None where cases are labeled as a whole.
    """
    named = frozenset(case.sample_id for case in cases if case.split == "test")
    if named:
        return named
    patients: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        if case.split == "train":
            patients[case.group].append(case)
    chosen = _of_each_class(patients, seed) if present is None else _of_each_voxel_class(patients, seed, present)
    return frozenset(case.sample_id for patient in chosen for case in patients[patient])


def _of_each_class(patients: Mapping[str, Sequence[Case]], seed: int) -> list[str]:
    """Patients, taken until each class has lent its part, but never a class's last patient."""
    total = Counter(case.label for members in patients.values() for case in members)
    taken: Counter[int] = Counter()
    chosen: list[str] = []
    for patient in _shuffled(patients, seed):
        counts = Counter(case.label for case in patients[patient])
        is_wanted = any(taken[label] < max(1, round(HELD_OUT_FRACTION * total[label])) for label in counts)
        if is_wanted and all(taken[label] + count < total[label] for label, count in counts.items()):
            chosen.append(patient)
            taken += counts
    return chosen


def _of_each_voxel_class(
    patients: Mapping[str, Sequence[Case]], seed: int, present: Mapping[str, set[int]]
) -> list[str]:
    """A part of the patients: one with each class first, where possible, but never the last one who has a class."""
    has = {
        patient: set().union(*(present[case.sample_id] for case in members)) for patient, members in patients.items()
    }
    left = Counter(label for labels in has.values() for label in labels)
    order = [patient for patient in _shuffled(patients, seed) if all(left[label] > 1 for label in has[patient])]
    first = {label: patient for patient in reversed(order) for label in has[patient]}
    rarest_first = [first[label] for label in sorted(first, key=lambda label: (left[label], label))]
    wanted = max(1, round(HELD_OUT_FRACTION * len(patients)))
    chosen: list[str] = []
    for patient in dict.fromkeys([*rarest_first, *order]):
        if len(chosen) < wanted < len(patients) and all(left[label] > 1 for label in has[patient]):
            left -= Counter(has[patient])
            chosen.append(patient)
    return chosen


def _shuffled(patients: Iterable[str], seed: int) -> list[str]:
    """Patients by a hash of the seed and their name, so that the order does not depend on that of the files."""
    return sorted(patients, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
