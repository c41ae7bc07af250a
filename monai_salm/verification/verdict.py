# SPDX-License-Identifier: Apache-2.0
"""The verdict of a study: its rules, and how they are applied to measured rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from monai_salm.verification.strength import Row, closed_gap, floor_of, mean_of, pairs_of, values_of, victims_of

__all__ = ["INCONCLUSIVE", "NOT_PROTECTED", "PROTECTED", "Check", "Decision", "VerdictRules", "decide"]

PROTECTED, NOT_PROTECTED, INCONCLUSIVE = "protected", "not protected", "inconclusive"
_TOLERANCE = 1e-6  # relative; for float arithmetic in physical and window units, stored units are integers


@dataclass(frozen=True)
class VerdictRules:
    """When a study counts as protection. ``None`` switches an optional rule off.

    Args:
        min_seeds: Paired (clean and protected) seeds that every victim needs.
        min_victims: Victims that have such pairs.
        clean_learned: The mean clean metric must reach ``floor + clean_learned * (1 - floor)``, where ``floor`` is the
            larger of the mean blind metric and chance.
        clean_above_blind: Every victim's mean clean metric must exceed its blind floor by at least this much.
        control_within: The mean random-noise control may lie at most this far below the clean mean. Optional.
        closed_gap_mean: Least mean closed gap.
        closed_gap_low: Least lower bound of its interval.
        protected_above_chance: The mean protected metric may exceed chance by at most this much. Optional, and not
            applied where chance is not defined (segmentation).
        ssim_mean: Least mean SSIM between clean and protected images.
        within_budget: The largest error must stay inside the budget in every unit in which both are known.
    """

    min_seeds: int = 3
    min_victims: int = 2
    clean_learned: float = 0.25
    clean_above_blind: float = 0.10
    control_within: float | None = 0.10
    closed_gap_mean: float = 0.70
    closed_gap_low: float = 0.50
    protected_above_chance: float | None = 0.15
    ssim_mean: float = 0.95
    within_budget: bool = True


@dataclass(frozen=True)
class Check:
    """One rule applied to one study: which rule, whether it holds, what was found, and the verdict if it fails."""

    rule: str
    passed: bool
    finding: str
    otherwise: str


@dataclass(frozen=True)
class Decision:
    """A verdict, its reasons in words (the deciding one first), and every check that led to it."""

    verdict: str
    reasons: tuple[str, ...]
    checks: tuple[Check, ...]


def _fidelity_checks(fidelity: Row | None, budget: Row | None, rules: VerdictRules) -> list[Check]:
    fidelity, budget = fidelity or {}, budget or {}
    checks = []
    if rules.within_budget:
        units = {"stored": "max_error_stored", "physical": "max_error_physical", "window_fraction": "max_error_window"}
        measured = [(u, fidelity.get(key), (budget.get(u) or {}).get("max")) for u, key in units.items()]
        known = [(unit, error, limit) for unit, error, limit in measured if error is not None and limit is not None]
        over = [(u, e, limit) for u, e, limit in known if e > limit * (1 + _TOLERANCE)]
        state = "exceeds" if over else "stays inside" if known else "was not compared with"
        detail = "; ".join(f"{u.replace('_', ' ')} {e:.4g} of at most {limit:.4g}" for u, e, limit in over or known)
        text = f"The largest error {state} the budget" + (f": {detail}." if detail else ".")
        checks.append(Check("within_budget", bool(known and not over), text, NOT_PROTECTED if over else INCONCLUSIVE))
    ssim = (fidelity.get("ssim") or {}).get("mean")
    known_ssim = ssim is not None and math.isfinite(ssim)
    text = f"Mean SSIM is {ssim:.4f} (at least {rules.ssim_mean:g})." if known_ssim else "SSIM was not measured."
    passed = known_ssim and ssim >= rules.ssim_mean
    return [*checks, Check("ssim_mean", bool(passed), text, NOT_PROTECTED if known_ssim else INCONCLUSIVE)]


def _study_checks(rows: Sequence[Row], metric: str, chance: float | None, rules: VerdictRules) -> list[Check]:
    """Checks of the experiment itself; a study that fails one of them cannot say anything about protection."""
    counts = {victim: len(pairs_of(rows, metric, "protected", victim)) for victim in victims_of(rows)}
    paired = [victim for victim, count in counts.items() if count]
    seeds = min((counts[victim] for victim in paired), default=0)
    clean, blind = mean_of(values_of(rows, metric, "clean")), mean_of(values_of(rows, metric, "blind"))
    floors = [f for f in (blind, chance) if f is not None]
    needed = max(floors) + rules.clean_learned * (1 - max(floors)) if floors else None
    learned = clean is not None and needed is not None and clean >= needed
    margins = {}
    for victim in paired:
        mine, floor = mean_of(values_of(rows, metric, "clean", victim)), floor_of(rows, metric, victim, chance)
        margins[victim] = mine - floor if mine is not None and floor is not None else float("-inf")
    weak = [victim for victim, margin in margins.items() if margin < rules.clean_above_blind]
    found = [
        (
            "clean_learned",
            learned,
            f"The clean arm {'learned' if learned else 'did not learn'}: mean clean {metric} is {_show(clean)}, at least "
            f"{_show(needed)} is needed.",
        ),
        (
            "clean_above_blind",
            not weak and bool(paired),
            f"The clean arm did not learn: not clearly above blind for {', '.join(weak) or 'any victim'} (a margin of at "
            f"least {rules.clean_above_blind:g} is needed)."
            if weak or not paired
            else f"Every victim's clean {metric} exceeds its blind floor by at least {min(margins.values()):.3f}.",
        ),
        ("min_seeds", seeds >= rules.min_seeds, _enough("seeds per victim", seeds, rules.min_seeds)),
        ("min_victims", len(paired) >= rules.min_victims, _enough("victims", len(paired), rules.min_victims)),
    ]
    if rules.control_within is not None:
        control = mean_of(values_of(rows, metric, "random_noise"))
        known = control is not None and clean is not None
        loss = clean - control if known else None
        held = loss is not None and loss <= rules.control_within
        text = f"Random noise of the same budget changes {metric} by {-loss:+.3f}" if known else ""
        text += "." if held else f": something other than the optimized pattern destroys learning (at most "
        text += "" if held else f"-{rules.control_within:g} is allowed)."
        found.append(("control_within", held, text if known else "The random-noise control was not run."))
    return [Check(rule, passed, text, INCONCLUSIVE) for rule, passed, text in found]


def _strength_checks(
    rows: Sequence[Row], metric: str, chance: float | None, gap: Mapping[str, Any], rules: VerdictRules
) -> list[Check]:
    mean, low, high = gap["mean"], gap["low"], gap["high"]
    interval = f" ({100 * gap['confidence']:g} % interval {_show(low)} to {_show(high)})" if low is not None else ""
    text = (
        f"Training on the protected copy loses {100 * mean:.0f} % of what the images teach" if mean is not None else ""
    )
    text += f": closed gap {_show(mean)}{interval}, at least {rules.closed_gap_mean:g} is needed."
    if mean is None:
        text = "The closed gap is undefined: a victim has no seed whose clean metric exceeds its blind floor."
    otherwise = INCONCLUSIVE if mean is None else NOT_PROTECTED
    checks = [Check("closed_gap_mean", mean is not None and mean >= rules.closed_gap_mean, text, otherwise)]
    protected = mean_of(values_of(rows, metric, "protected"))
    if rules.protected_above_chance is not None and chance is not None and protected is not None:
        limit = chance + rules.protected_above_chance
        text = f"Mean protected {metric} is {_show(protected)} (chance {_show(chance)}, at most {_show(limit)})."
        checks.append(Check("protected_above_chance", protected <= limit, text, NOT_PROTECTED))
    if mean is not None:  # a good mean with a wide interval is a lack of evidence, not evidence of failure
        held = low is not None and low >= rules.closed_gap_low
        text = f"The closed gap's lower bound is {_show(low)} (at least {rules.closed_gap_low:g})."
        checks.append(Check("closed_gap_low", held, text, INCONCLUSIVE))
    return checks


def _show(value: float | None) -> str:
    return "n/a" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _enough(what: str, found: int, needed: int) -> str:
    return f"{'Enough' if found >= needed else 'Too few'} {what}: {found} (at least {needed})."


def decide(
    rows: Sequence[Row],
    metric: str,
    *,
    chance: float | None = None,
    fidelity: Mapping[str, Any] | None = None,
    budget: Mapping[str, Any] | None = None,
    gap: Mapping[str, Any] | None = None,
    rules: VerdictRules | None = None,
) -> Decision:
    """Apply the rules in order: images, then the experiment, then strength. The first rule that fails decides.

    Args:
        rows: Victim trainings.
        metric: Name of the headline metric.
        chance: What guessing reaches, ``1 / n_classes`` for balanced accuracy; ``None`` where it is not defined.
        fidelity: The ``fidelity`` part of ``report.json``.
        budget: The ``budget`` part of ``report.json``.
        gap: The result of :func:`closed_gap`, computed if not given.
        rules: The rules, :class:`VerdictRules` with its defaults if not given.

    Returns:
        The verdict (``"protected"``, ``"not protected"`` or ``"inconclusive"``), its reasons, and all checks.
    """
    rules = rules or VerdictRules()
    gap = gap or closed_gap(rows, metric, chance=chance)
    strength = _strength_checks(rows, metric, chance, gap, rules)
    checks = [*_fidelity_checks(fidelity, budget, rules), *_study_checks(rows, metric, chance, rules), *strength]
    failed = [check for check in checks if not check.passed]
    told = failed or [*strength, *(check for check in checks if check not in strength)]
    verdict = failed[0].otherwise if failed else PROTECTED
    return Decision(verdict, tuple(check.finding for check in told), tuple(checks))
