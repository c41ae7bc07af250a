# SPDX-License-Identifier: Apache-2.0
"""From measured rows to ``report.json``: assembling, checking and writing it.

Every key is documented in ``docs/report.md``; the numbers come from ``strength`` and the verdict from ``verdict``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from monai_salm.release.commit import write_atomically
from monai_salm.verification.leakage import leakage_warnings
from monai_salm.verification.strength import Row, arms_of, closed_gap, closed_gap_auc, closed_gap_per_class, summarize
from monai_salm.verification.verdict import INCONCLUSIVE, NOT_PROTECTED, PROTECTED, VerdictRules, decide

__all__ = ["SCHEMA_VERSION", "build_results", "validate_results", "write_json"]

SCHEMA_VERSION = "2.0"
_NUMBER = (int, float, type(None))
_REQUIRED: dict[str, tuple[type, ...]] = {
    "schema_version": (str,),
    "created": (str,),
    "task": (str,),
    "verdict": (str,),
    "verdict_reasons": (list,),
    "verdict_rules": (dict,),
    "metric": (str,),
    "chance": _NUMBER,
    "classes": (list,),
    "closed_gap": (dict,),
    "closed_gap.mean": _NUMBER,
    "closed_gap.low": _NUMBER,
    "closed_gap.high": _NUMBER,
    "closed_gap.confidence": (float,),
    "closed_gap.n": (int,),
    "closed_gap.by_victim": (dict,),
    "summary": (dict,),
    "arms": (list,),
    "utility": (list,),
    "fidelity": (dict, type(None)),
    "fidelity.n_cases": (int,),
    "fidelity.ssim.mean": _NUMBER,
    "fidelity.psnr.mean": _NUMBER,
    "fidelity.max_error_stored": _NUMBER,
    "fidelity.max_error_physical": _NUMBER,
    "fidelity.max_error_window": _NUMBER,
    "fidelity.unit": (str, type(None)),
    "fidelity.mask_fraction_asked": _NUMBER,
    "fidelity.mask_fraction.mean": _NUMBER,
    "budget": (dict, type(None)),
    "budget.epsilon": _NUMBER,
    "budget.unit": (str,),
    "budget.window_fraction.max": _NUMBER,
    "budget.physical.max": _NUMBER,
    "budget.stored.max": _NUMBER,
    "budget.physical_unit": (str, type(None)),
    "passes_per_image": (dict,),
    "timing": (dict,),
    "cohort": (dict,),
    "config": (dict,),
    "versions": (dict,),
    "machine": (dict,),
    "not_tested": (list,),
}
_ROW_REQUIRED: dict[str, tuple[type, ...]] = {"arm": (str,), "victim": (str,), "seed": (int,)}
_DEFENSE_REQUIRED: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "what": (str,),
    "conclusive": (bool,),
    "clean": _NUMBER,
    "protected": _NUMBER,
    "restored": _NUMBER,
    "closed_gap.mean": _NUMBER,
    "arms": (list,),
}
_VERDICTS = (PROTECTED, NOT_PROTECTED, INCONCLUSIVE)


def build_results(
    *,
    task: str,
    metric: str,
    rows: Sequence[Row],
    classes: Sequence[str],
    chance: float | None,
    fidelity: Mapping[str, Any] | None,
    budget: Mapping[str, Any] | None,
    utility: Sequence[Mapping[str, Any]] = (),
    defenses: Sequence[Mapping[str, Any]] = (),
    leakage: Mapping[str, Any] | None = None,
    passes_per_image: Mapping[str, float] | None = None,
    timing: Mapping[str, float] | None = None,
    cohort: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
    machine: Mapping[str, Any] | None = None,
    not_tested: Sequence[str] = (),
    warnings: Sequence[str] = (),
    rules: VerdictRules | None = None,
    created: str | None = None,
) -> dict[str, Any]:
    """Assemble and validate the contents of ``report.json`` (see ``docs/report.md``).

    Args:
        task: One line that names the cohort and the task, for the heading.
        rows: Victim trainings; they become ``arms``.
        created: ISO 8601 time; now, in UTC, if not given.
        metric, classes, chance, fidelity, budget, utility, defenses, leakage, passes_per_image, timing, cohort, config,
            versions, machine, not_tested, rules: As in ``docs/report.md``.
        warnings: Besides those that follow from ``leakage``.

    Returns:
        Plain JSON types only; NaN and infinity have become ``None``.

    Raises:
        ValueError: When a part does not fit the schema.
    """
    rules = rules or VerdictRules()
    gap = closed_gap(rows, metric, chance=chance)
    decision = decide(
        rows, metric, chance=chance, fidelity=fidelity, budget=budget, utility=utility, gap=gap, rules=rules
    )
    others = [arm for arm in arms_of(rows) if arm not in ("clean", "protected", "blind")]
    per_class = {arm: closed_gap_per_class(rows, metric, arm) for arm in ("protected", *others)}
    by_auc = {arm: closed_gap_auc(rows, arm) for arm in ("protected", *others)} if metric != "auc" else {}
    optional = {
        "closed_gap_auc": {arm: gap for arm, gap in by_auc.items() if gap},
        "closed_gap_per_class": per_class.pop("protected"),
        "closed_gap_controls_per_class": {arm: gaps for arm, gaps in per_class.items() if gaps},
        "defenses": defenses,
        "leakage": leakage,
        "warnings": [*warnings, *leakage_warnings(leakage)],
    }
    results = {
        "schema_version": SCHEMA_VERSION,
        "created": created or datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "task": task,
        "verdict": decision.verdict,
        "verdict_reasons": decision.reasons,
        "verdict_rules": asdict(rules),
        "verdict_checks": [asdict(check) for check in decision.checks],
        "metric": metric,
        "chance": chance,
        "classes": classes,
        "closed_gap": gap,
        "closed_gap_controls": {arm: closed_gap(rows, metric, arm, chance=chance) for arm in others},
        "summary": summarize(rows, metric),
        "arms": rows,
        "utility": utility,
        "fidelity": fidelity,
        "budget": budget,
        "passes_per_image": passes_per_image or {},
        "timing": timing or {},
        "cohort": cohort or {},
        "config": config or {},
        "versions": versions or {},
        "machine": machine or {},
        "not_tested": not_tested,
        **{key: part for key, part in optional.items() if part},
    }
    plain: dict[str, Any] = _plain(results)
    validate_results(plain)
    return plain


def _plain(value: Any) -> Any:
    """Plain JSON types: numpy scalars and arrays unpacked, NaN and infinity as ``None``, anything else as text."""
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def _require(part: Mapping[str, Any], key: str, types: tuple[type, ...], where: str) -> None:
    """Check one dotted key. Keys below a part that is ``None`` (not measured) are not required."""
    value: Any = part
    for step in key.split("."):
        if value is None:
            return
        if not isinstance(value, Mapping) or step not in value:
            raise ValueError(f"{where}: missing key {key!r}; docs/report.md lists the keys of schema {SCHEMA_VERSION}.")
        value = value[step]
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        names = " or ".join("null" if t is type(None) else t.__name__ for t in types)
        raise ValueError(f"{where}: key {key!r} must be {names}, got {type(value).__name__} ({str(value)[:60]}).")


def validate_results(results: Mapping[str, Any]) -> None:
    """Check the contents of ``report.json`` against schema 2; what a later 2.x adds is not asked for.

    Args:
        results: Plain JSON types, as :func:`build_results` returns them or ``json.load`` reads them.

    Raises:
        ValueError: When a key is missing or of a wrong type, a verdict or version is unknown, or a training (arm,
            victim, seed) occurs twice. The message names the key.
    """
    for key, types in _REQUIRED.items():
        _require(results, key, types, "report.json")
    if results["schema_version"].split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        found = results["schema_version"]
        raise ValueError(f"report.json: schema_version is {found!r}, not like {SCHEMA_VERSION!r}; run verify again.")
    if results["verdict"] not in _VERDICTS:
        raise ValueError(f"report.json: verdict is {results['verdict']!r}, must be one of {', '.join(_VERDICTS)}.")
    for index, part in enumerate(results.get("defenses", ())):
        for key, types in _DEFENSE_REQUIRED.items():
            _require(part, key, types, f"report.json: defenses[{index}]")
    seen = set()
    for index, row in enumerate(results["arms"]):
        for key, types in {**_ROW_REQUIRED, results["metric"]: _NUMBER}.items():
            _require(row, key, types, f"report.json: arms[{index}]")
        if not isinstance(row.get(f"{results['metric']}_per_class", {}), Mapping):
            raise ValueError(f"report.json: arms[{index}]: key '{results['metric']}_per_class' must be an object.")
        training = (row["arm"], row["victim"], row["seed"])
        if training in seen:
            raise ValueError(f"report.json: arms[{index}] repeats (arm, victim, seed) = {training}; keep one row.")
        seen.add(training)


def write_json(results: Mapping[str, Any], path: str | Path) -> None:
    """Write ``report.json`` atomically.

    Args:
        results: What :func:`build_results` returned, which is valid and plain.
        path: File to write.
    """
    write_atomically(json.dumps(results, indent=2, allow_nan=False, ensure_ascii=False) + "\n", path)
