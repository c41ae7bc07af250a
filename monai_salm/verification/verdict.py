# SPDX-License-Identifier: Apache-2.0
"""The verdict of a study: its rules, and how they are applied to measured rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from monai_salm.verification.strength import (
    Row,
    closed_gap,
    closed_gap_auc,
    closed_gap_per_class,
    floor_of,
    mean_of,
    values_of,
)

__all__ = [
    "INCONCLUSIVE",
    "NOT_PROTECTED",
    "PROTECTED",
    "Check",
    "Decision",
    "VerdictRules",
    "decide",
    "learning_checks",
]

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
        closed_gap_per_victim: Least mean closed gap of every victim. Optional.
        closed_gap_per_class: Least mean closed gap of every class, where rows tell more than one. Optional.
        closed_gap_low: Least lower bound of its interval.
        closed_gap_auc: Least mean closed gap of the AUC, where victims have one and clean ones learned by it. Optional.
        protected_above_chance: The mean protected metric may exceed chance by at most this much. Optional, and not
            applied where chance is not defined (segmentation).
        ssim_mean: Least mean SSIM between clean and protected images.
        utility_within: A frozen clean-trained model may score at most this differently on protected copies of the
            held-out cases: of every class the mean absolute difference over victims and seeds, of the headline metric
            where it has no values per class. Optional.
        within_budget: The largest error must stay inside the budget in every unit in which both are known.
    """

    min_seeds: int = 3
    min_victims: int = 2
    clean_learned: float = 0.25
    clean_above_blind: float = 0.10
    control_within: float | None = 0.10
    closed_gap_mean: float = 0.70
    closed_gap_per_victim: float | None = 0.50
    closed_gap_per_class: float | None = 0.50
    closed_gap_low: float = 0.50
    closed_gap_auc: float | None = 0.50
    protected_above_chance: float | None = 0.15
    ssim_mean: float = 0.95
    utility_within: float | None = None
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


def _image_checks(fidelity: Row | None, budget: Row | None, utility: Sequence[Row], rules: VerdictRules) -> list[Check]:
    fidelity = fidelity or {}
    ssim = (fidelity.get("ssim") or {}).get("mean")
    if ssim is None or not math.isfinite(ssim):
        check = Check("ssim_mean", False, "SSIM was not measured.", INCONCLUSIVE)
    else:
        text = f"Mean SSIM is {ssim:.4f} (at least {rules.ssim_mean:g} is needed)."
        check = Check("ssim_mean", ssim >= rules.ssim_mean, text, NOT_PROTECTED)
    checks = [_budget_check(fidelity, budget or {}), check] if rules.within_budget else [check]
    return checks if rules.utility_within is None else [*checks, _utility_check(utility, rules.utility_within)]


def _budget_check(fidelity: Row, budget: Row) -> Check:
    units = {"stored": "max_error_stored", "physical": "max_error_physical", "window_fraction": "max_error_window"}
    pairs = [(unit, fidelity.get(key), (budget.get(unit) or {}).get("max")) for unit, key in units.items()]
    known = [(unit, error, limit) for unit, error, limit in pairs if error is not None and limit is not None]
    over = [(unit, error, limit) for unit, error, limit in known if error > limit * (1 + _TOLERANCE)]
    detail = "; ".join(f"{unit.replace('_', ' ')} {error:.4g} of {limit:.4g}" for unit, error, limit in over or known)
    if not known:
        return Check("within_budget", False, "The largest error was not compared with the budget.", INCONCLUSIVE)
    state = "exceeds" if over else "stays inside"
    return Check("within_budget", not over, f"The largest error {state} the budget: {detail}.", NOT_PROTECTED)


def _utility_check(utility: Sequence[Row], within: float) -> Check:
    differences: dict[str, list[float]] = {}
    for row in utility:
        for name, part in (row.get("per_class") or {"the headline metric": row}).items():
            if part.get("difference") is not None:
                differences.setdefault(name, []).append(abs(part["difference"]))
    if not differences:
        text = "What protection does to a model trained on clean images was not measured."
        return Check("utility_within", False, text, INCONCLUSIVE)
    means = {name: sum(values) / len(values) for name, values in differences.items()}
    name = max(means, key=lambda each: means[each])
    text = f"A model trained on clean images scores {_show(means[name])} differently on protected ones for {name}, "
    text += f"{'the most of all classes' if len(means) > 1 else 'on average'} (at most {within:g} is allowed)."
    return Check("utility_within", means[name] <= within, text, NOT_PROTECTED)


def _study_checks(
    rows: Sequence[Row], metric: str, chance: float | None, gap: Mapping[str, Any], rules: VerdictRules
) -> list[Check]:
    """Checks of the experiment itself; a study that fails one of them cannot say anything about protection."""
    usable = {victim: part["n"] for victim, part in gap["by_victim"].items()}
    return [
        *learning_checks(rows, metric, list(usable), chance, rules),
        _size_check("min_seeds", "usable seeds per victim", min(usable.values(), default=0), rules.min_seeds),
        _size_check("min_victims", "victims", sum(n > 0 for n in usable.values()), rules.min_victims),
        *([] if rules.control_within is None else [_control_check(rows, metric, list(usable), rules.control_within)]),
    ]


def learning_checks(
    rows: Sequence[Row], metric: str, victims: Sequence[str], chance: float | None, rules: VerdictRules
) -> list[Check]:
    """Whether the clean arm has learned what could be taken away: the rules ``clean_learned`` (of the mean) and
    ``clean_above_blind`` (of each of ``victims``)."""
    clean, blind = mean_of(values_of(rows, metric, "clean")), mean_of(values_of(rows, metric, "blind"))
    floor = max((f for f in (blind, chance) if f is not None), default=None)
    needed = None if floor is None else floor + rules.clean_learned * (1 - floor)
    learned = clean is not None and needed is not None and clean >= needed
    text = f"The clean arm {'learned' if learned else 'did not learn'}: mean clean {_words(metric)} is {_show(clean)} "
    first = Check("clean_learned", learned, text + f"(at least {_show(needed)} is needed).", INCONCLUSIVE)

    margins = {}
    for victim in victims:
        mine, below = mean_of(values_of(rows, metric, "clean", victim)), floor_of(rows, metric, victim, chance)
        margins[victim] = -math.inf if mine is None or below is None else mine - below
    weak = [victim for victim, lead in margins.items() if lead < rules.clean_above_blind]
    margin = f"(at least {rules.clean_above_blind:g} is needed)"
    text = f"The clean arm did not learn clearly more than blind for {', '.join(weak) or 'any victim'} {margin}."
    if margins and not weak:
        least = _show(min(margins.values()))
        text = f"Every victim's clean {_words(metric)} exceeds its blind floor by {least} or more {margin}."
    return [first, Check("clean_above_blind", bool(margins) and not weak, text, INCONCLUSIVE)]


def _size_check(rule: str, what: str, found: int, needed: int) -> Check:
    text = f"{'Enough' if found >= needed else 'Too few'} {what}: {found} (at least {needed} needed)."
    return Check(rule, found >= needed, text, INCONCLUSIVE)


def _control_check(rows: Sequence[Row], metric: str, victims: Sequence[str], within: float) -> Check:
    changes = {}
    for victim in victims:
        clean, control = (mean_of(values_of(rows, metric, arm, victim)) for arm in ("clean", "random_noise"))
        if clean is not None and control is not None:
            changes[victim] = control - clean
    if len(changes) < max(1, len(victims)):
        text = "The random-noise control was not run, or a victim has no result with it."
        return Check("control_within", False, text, INCONCLUSIVE)
    worst = min(changes, key=lambda name: changes[name])
    held = changes[worst] >= -within
    text = f"Random noise of the same budget changes {_words(metric)} by {changes[worst]:+.3f} "
    text += f"with {worst}, which it hinders most (it may fall by {within:g} at most)"
    text += "." if held else ": something other than the optimized pattern destroys learning."
    return Check("control_within", held, text, INCONCLUSIVE)


def _strength_checks(
    rows: Sequence[Row], metric: str, chance: float | None, gap: Mapping[str, Any], rules: VerdictRules
) -> list[Check]:
    checks = [_gap_check(gap, rules.closed_gap_mean)]
    by_victim = _means(gap["by_victim"])
    if rules.closed_gap_per_victim is not None and len(by_victim) > 1:
        checks.append(_victim_check(by_victim, rules.closed_gap_per_victim))
    per_class = {name: part["mean"] for name, part in closed_gap_per_class(rows, metric).items()}
    if rules.closed_gap_per_class is not None and len(per_class) > 1:
        checks.append(_class_check(per_class, rules.closed_gap_per_class))
    protected = mean_of(values_of(rows, metric, "protected"))
    if rules.protected_above_chance is not None and chance is not None and protected is not None:
        limit = chance + rules.protected_above_chance
        text = (
            f"Mean protected {_words(metric)} is {_show(protected)} (chance {_show(chance)}, at most {_show(limit)})."
        )
        checks.append(Check("protected_above_chance", protected <= limit, text, NOT_PROTECTED))
    gaps = _means(closed_gap_auc(rows).get("by_victim", {})).values()
    if rules.closed_gap_auc is not None and gaps:
        ranked = sum(gaps) / len(gaps)
        text = f"By AUC, which does not depend on a threshold, they lose {_percent(ranked)} "
        text += f"(closed gap {_show(ranked)}; at least {rules.closed_gap_auc:g} is needed)."
        checks.append(Check("closed_gap_auc", ranked >= rules.closed_gap_auc, text, NOT_PROTECTED))
    if gap["mean"] is not None:  # a good mean with a wide interval is a lack of evidence, not evidence of failure
        held = gap["low"] is not None and gap["low"] >= rules.closed_gap_low
        text = f"The closed gap's lower bound is {_show(gap['low'])} (at least {rules.closed_gap_low:g} is needed)."
        checks.append(Check("closed_gap_low", held, text, INCONCLUSIVE))
    return checks


def _means(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Those that are defined, by name."""
    return {name: part["mean"] for name, part in parts.items() if part["mean"] is not None}


def _percent(gap: float) -> str:
    """What is lost; where training on protected images even helps, nothing is."""
    return f"{100 * max(gap, 0.0):.0f} %"


def _gap_check(gap: Mapping[str, Any], needed: float) -> Check:
    mean, low, high = gap["mean"], gap["low"], gap["high"]
    if mean is None:
        text = "The closed gap is undefined: the clean metric of some victim hardly exceeds its blind floor."
        return Check("closed_gap_mean", False, text, INCONCLUSIVE)
    interval = "" if low is None else f", {100 * gap['confidence']:g} % interval {_show(low)} to {_show(high)}"
    only = "" if mean >= needed else "only "
    parts = _means(gap["by_victim"])
    weakest = min(parts, key=lambda name: parts[name])
    text = f"Victims trained on the protected copy lose {only}{_percent(mean)} of what clean images teach them"
    text += f" on average, {weakest} {_percent(parts[weakest])} " if len(parts) > 1 else " "
    text += f"(closed gap {_show(mean)}{interval}; at least {needed:g} is needed)."
    return Check("closed_gap_mean", mean >= needed, text, NOT_PROTECTED)


def _victim_check(gaps: Mapping[str, float], needed: float) -> Check:
    """That no network learns behind a good mean of all."""
    weakest = min(gaps, key=lambda name: gaps[name])
    text = f"Of all victims {weakest} loses least (closed gap {_show(gaps[weakest])}; at least {needed:g} is needed of "
    return Check("closed_gap_per_victim", gaps[weakest] >= needed, text + "each).", NOT_PROTECTED)


def _class_check(gaps: Mapping[str, float | None], needed: float) -> Check:
    """That no class is left unprotected behind a good mean; one that is known to be weak counts before unknown ones."""
    known = {name: gap for name, gap in gaps.items() if gap is not None}
    weakest = min(known, key=lambda name: known[name], default=None)
    held = weakest is None or known[weakest] >= needed
    if held and len(known) < len(gaps):
        unknown = ", ".join(name for name in gaps if name not in known)
        text = f"The closed gap is undefined for {unknown}: some victim did not learn this from clean images."
        return Check("closed_gap_per_class", False, text, INCONCLUSIVE)
    text = f"Of all classes {weakest} is protected least (closed gap {_show(known.get(str(weakest)))}; "
    return Check("closed_gap_per_class", held, text + f"at least {needed:g} is needed of each).", NOT_PROTECTED)


def _show(value: float | None) -> str:
    return "n/a" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def decide(
    rows: Sequence[Row],
    metric: str,
    *,
    chance: float | None = None,
    fidelity: Mapping[str, Any] | None = None,
    budget: Mapping[str, Any] | None = None,
    utility: Sequence[Row] = (),
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
        utility: The ``utility`` part of ``report.json``.
        gap: The result of :func:`closed_gap`, computed if not given.
        rules: The rules, :class:`VerdictRules` with its defaults if not given.

    Returns:
        The verdict (``"protected"``, ``"not protected"`` or ``"inconclusive"``), its reasons, and all checks.
    """
    rules = rules or VerdictRules()
    gap = gap or closed_gap(rows, metric, chance=chance)
    strength = _strength_checks(rows, metric, chance, gap, rules)
    images = _image_checks(fidelity, budget, utility, rules)
    measured = [check for check in images if check.otherwise == NOT_PROTECTED]
    unmeasured = [check for check in images if check.otherwise != NOT_PROTECTED]
    checks = [*measured, *_study_checks(rows, metric, chance, gap, rules), *unmeasured, *strength]
    failed = [check for check in checks if not check.passed]
    told = failed or [*strength, *(check for check in checks if check not in strength)]
    verdict = failed[0].otherwise if failed else PROTECTED
    return Decision(verdict, tuple(check.finding for check in told), tuple(checks))
