# SPDX-License-Identifier: Apache-2.0
"""How much of a protection is left against third parties that fight it: the trainings, their cost, what they say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from monai_salm.io.base import Case
from monai_salm.verification.defenses import Defense
from monai_salm.verification.description import described
from monai_salm.verification.jobs import Job, Ledger
from monai_salm.verification.strength import Row, closed_gap, closed_gap_auc, mean_of, values_of
from monai_salm.verification.verdict import VerdictRules, learning_checks

__all__ = ["announcement", "clean_part", "defended", "expected_seconds", "resistance"]

Training = tuple[str, str, int]
"""Arm, victim and seed."""

ARMS = ("clean", "protected")
_LEAST_LOSS = 0.05
"""Of the headline metric, clean minus protected: of less nobody can say what part a defense restores."""


def clean_part(cases: Sequence[Case], present: Mapping[str, frozenset[int]], learned: Sequence[int]) -> tuple[int, ...]:
    """Places of the held-out cases that the third party has: half of the patients of each kind of patient.

    Args:
        cases: the held-out cases.
        present: classes of each, by ``sample_id``.
        learned: classes that both halves must have.

    Returns:
        Places in ``cases``; empty where the halves would not have all classes.
    """
    groups: dict[str, list[int]] = {}
    for at, case in enumerate(cases):
        groups.setdefault(case.group or case.sample_id, []).append(at)
    found = {name: frozenset().union(*(present[cases[at].sample_id] for at in each)) for name, each in groups.items()}
    # By name, which is a digest: an order that has nothing to do with the images.
    order = sorted(groups, key=lambda name: (sorted(found[name]), hashlib.sha256(name.encode()).digest()))
    halves = order[::2], order[1::2]
    if any(not set(learned) <= frozenset().union(*(found[name] for name in half)) for half in halves):
        return ()
    return tuple(sorted(at for name in halves[0] for at in groups[name]))


def defended(
    jobs: Mapping[Training, Job], defenses: Iterable[Defense], spare: tuple[int, ...]
) -> dict[str, dict[Training, Job]]:
    """Trainings on the clean and the protected arm with each defense, by its name.

    Args:
        jobs: the ordinary trainings.
        defenses: those that need clean cases are left out where there are none.
        spare: see :py:func:`clean_part`.
    """
    found: dict[str, dict[Training, Job]] = {}
    for defense in defenses:
        own = spare if defense.needs_clean else ()
        if defense.needs_clean and not own:
            continue
        mark = described(defense.recipe)
        found[defense.name] = {
            training: replace(job, key=_key(job.key, mark, own), recipe=defense.recipe, spare=own, keep=False)
            for training, job in jobs.items()
            if training[0] in ARMS
        }
    return found


def _restored(clean: float | None, protected: float | None, defended: float | None) -> float | None:
    """Part of what the protected arm lost that victims have again who defend themselves; None: it lost too little."""
    if clean is None or protected is None or defended is None or clean - protected <= _LEAST_LOSS:
        return None
    return (defended - protected) / (clean - protected)


def _key(*decisive: Any) -> str:
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def announcement(jobs: Iterable[Training], defenses: Sequence[Defense]) -> str:
    """How long defenses will take as far as can be told before any training is done, as a sentence.

    Args:
        jobs: the ordinary trainings.
        defenses: what follows them.
    """
    both = [arm in ARMS for arm, _, _ in jobs]
    cost = sum(both) / len(both) * sum(defense.cost for defense in defenses)
    return f"{len(defenses)} defenses follow the ordinary trainings, about {cost:.1f} times as long as these together"


def expected_seconds(
    jobs: Mapping[str, Mapping[Training, Job]],
    plain: Mapping[Training, Job],
    ledger: Ledger,
    costs: Mapping[str, float],
    workers: int,
) -> tuple[int, float]:
    """How many trainings are left to do, and about how long they take.

    Args:
        jobs: see :py:func:`defended`.
        plain: the ordinary trainings; all are done.
        ledger: has the time of each.
        costs: of a training with each defense, relative to an ordinary one.
        workers: trainings side by side.
    """
    left = [(name, training) for name, mine in jobs.items() for training, job in mine.items() if job not in ledger]
    seconds = sum(costs[name] * ledger[plain[training]]["seconds"] for name, training in left)
    return len(left), seconds / max(1, min(workers, len(left)))


def resistance(
    rows: Sequence[Row],
    defended_rows: Mapping[str, Sequence[Row]],
    defenses: Iterable[Defense],
    metric: str,
    chance: float | None,
    rules: VerdictRules,
) -> list[dict[str, Any]]:
    """The part ``defenses`` of ``docs/report.md``.

    The closed gap under a defense is ``(clean - protected) / (clean - blind)``, of victims that are both trained with
    it, and the blind floor of the ordinary study. What a defense restores is the part of the ordinary loss that is
    gone, ``(protected with it - protected) / (clean - protected)``, of ordinary means.

    Args:
        rows: ordinary trainings.
        defended_rows: trainings with each defense, by its name.
        defenses: in the order of the result.
        metric: the headline metric.
        chance: what guessing reaches, None where it is not defined.
        rules: say when the clean arm has learned.
    """
    plain_clean, plain_protected = (mean_of(values_of(rows, metric, arm)) for arm in ARMS)
    floor, parts = [row for row in rows if row["arm"] == "blind"], []
    for defense in defenses:
        if defense.name not in defended_rows:
            continue
        mine = list(defended_rows[defense.name])
        gap = closed_gap([*mine, *floor], metric, chance=chance)
        clean, protected = (mean_of(values_of(mine, metric, arm)) for arm in ARMS)
        checks = learning_checks([*mine, *floor], metric, list(gap["by_victim"]), chance, rules)
        learned = gap["mean"] is not None and all(check.passed for check in checks)
        parts.append(
            {
                "name": defense.name,
                "what": defense.what,
                "needs_clean": defense.needs_clean,
                "conclusive": learned,
                "clean": clean,
                "protected": protected,
                "closed_gap": gap,
                "closed_gap_auc": closed_gap_auc(mine),
                "restored": _restored(plain_clean, plain_protected, protected),
                "arms": [{name: value for name, value in row.items() if name != "curve"} for row in mine],
            }
        )
    return parts
