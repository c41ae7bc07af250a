# SPDX-License-Identifier: Apache-2.0
"""The statistics, the verdict and the schema of ``report.json``, on rows whose right answer is known."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from monai_salm.verification.leakage import label_leakage
from monai_salm.verification.results import build_results, validate_results, write_json
from monai_salm.verification.strength import closed_gap, closed_gap_auc, closed_gap_per_class, summarize
from monai_salm.verification.verdict import VerdictRules, decide

METRIC = "balanced_accuracy"
LEVELS = {"clean": 0.9, "protected": 0.5, "random_noise": 0.89, "random_mask": 0.6, "blind": 0.5}
FIDELITY = {
    "n_cases": 4,
    "ssim": {"mean": 0.97, "std": 0.01, "min": 0.96},
    "psnr": {"mean": 38.0, "std": 0.5, "min": 37.0},
    "max_error_stored": 8,
    "max_error_physical": 8.0,
    "max_error_window": 0.03,
    "unit": "HU",
    "mask_fraction_asked": 0.2,
    "mask_fraction": {"mean": 0.19, "min": 0.18, "max": 0.2},
}
BUDGET = {
    "epsilon": 8,
    "unit": "stored",
    "window_fraction": {"min": 0.03, "max": 0.03},
    "physical": {"min": 8.0, "max": 8.0},
    "stored": {"min": 8, "max": 8},
    "physical_unit": "HU",
}


def make_rows(
    levels: dict[str, float] | None = None, victims: int = 2, seeds: int = 3, metric: str = METRIC, noise: float = 0.0
) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "arm": arm,
            "victim": f"net{v}",
            "seed": s,
            metric: level + noise * rng.standard_normal(),
            "recall": {"a": level},
        }
        for arm, level in {**LEVELS, **(levels or {})}.items()
        for v in range(victims)
        for s in range(seeds)
    ]


def make_results(rows: list[dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    rows = make_rows() if rows is None else rows
    parts = {
        "task": "test",
        "metric": METRIC,
        "rows": rows,
        "classes": ["a", "b"],
        "chance": 0.5,
        "fidelity": FIDELITY,
        "budget": BUDGET,
    }
    return build_results(**{**parts, **changes})


def set_metric(rows: list[dict[str, Any]], value: float, **which: str) -> None:
    """Give all rows of an arm, a victim, or both, another value."""
    for row in rows:
        if which.items() <= row.items():
            row[METRIC] = value


def verdict_of(rows: list[dict[str, Any]], **changes: Any) -> tuple[str, str]:
    parts = {"chance": 0.5, "fidelity": FIDELITY, "budget": BUDGET, **changes}
    decision = decide(rows, METRIC, **parts)
    return decision.verdict, decision.reasons[0]


@pytest.mark.parametrize(("protected", "gap"), [(0.5, 1.0), (0.9, 0.0), (0.7, 0.5), (0.4, 1.0), (1.0, -0.25)])
def test_closed_gap_is_exact_without_noise(protected: float, gap: float) -> None:
    found = closed_gap(make_rows({"protected": protected}), METRIC)
    assert found["mean"] == pytest.approx(gap)
    assert (found["low"], found["high"]) == (pytest.approx(gap), pytest.approx(gap))
    assert found["n"] == 6 and found["n_unusable"] == 0


def test_closed_gap_takes_any_metric() -> None:
    rows = make_rows({"protected": 0.6}, metric="dice")
    assert closed_gap(rows, "dice")["mean"] == pytest.approx(0.75)


def test_closed_gap_averages_blind_per_victim() -> None:
    rows = make_rows({"protected": 0.5}, victims=1)
    for row, value in zip([r for r in rows if r["arm"] == "blind"], (0.3, 0.5, 0.7), strict=True):
        row[METRIC] = value
    assert closed_gap(rows, METRIC)["mean"] == pytest.approx(1.0)


def test_trainings_below_the_floor_do_not_make_up_for_one_that_learned() -> None:
    rows = make_rows(victims=1)
    protected = [row for row in rows if row["arm"] == "protected"]
    for row, value in zip(protected, (0.05, 0.05, 0.9), strict=True):
        row[METRIC] = row["auc"] = value
    for row in rows:
        row.setdefault("auc", 0.9)
    assert closed_gap(rows, METRIC)["mean"] == pytest.approx(2 / 3)
    assert closed_gap_auc(rows)["mean"] == pytest.approx(2 / 3)


def test_closed_gap_weighs_victims_equally() -> None:
    rows = make_rows({"protected": 0.9})
    rows += [{**r, "victim": "many", "seed": s} for s in range(30) for r in rows[:: len(rows) // 5][:5]]
    set_metric(rows, 0.5, victim="many", arm="protected")
    assert closed_gap(rows, METRIC)["mean"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("clean", [0.5, 0.5 + 1e-12, 0.45, 0.59])
def test_closed_gap_is_undefined_where_clean_is_blind(clean: float) -> None:
    found = closed_gap(make_rows({"clean": clean}), METRIC)
    assert found["mean"] is None and found["low"] is None and found["high"] is None
    assert found["n"] == 0 and found["n_unusable"] == 6


def test_one_clean_training_that_hardly_learned_does_not_decide() -> None:
    rows = make_rows({"protected": 0.6}, victims=1)
    next(row for row in rows if row["arm"] == "clean")[METRIC] = 0.51
    found = closed_gap(rows, METRIC)
    assert found["mean"] == pytest.approx((0.51 + 0.9 + 0.9 - 3 * 0.6) / (0.51 + 0.9 + 0.9 - 3 * 0.5))
    assert (found["low"], found["high"]) == (pytest.approx(-0.9), pytest.approx(0.75))  # of that one: not -0.09 / 0.01
    assert found["n"] == 3


def test_closed_gap_falls_back_to_chance_without_blind_arm() -> None:
    rows = [row for row in make_rows({"protected": 0.6}) if row["arm"] != "blind"]
    assert closed_gap(rows, METRIC)["mean"] is None
    assert closed_gap(rows, METRIC, chance=0.5)["mean"] == pytest.approx(0.75)


def test_interval_contains_mean_and_is_deterministic() -> None:
    rows = make_rows({"protected": 0.6}, noise=0.05)
    found = closed_gap(rows, METRIC)
    assert found == closed_gap(rows, METRIC)
    for part in (found, *found["by_victim"].values()):
        assert part["low"] <= part["mean"] <= part["high"]
        assert part["high"] - part["low"] > 0.01


def test_interval_covers_disagreement_between_victims() -> None:
    rows = make_rows()
    set_metric(rows, 0.9, victim="net1", arm="protected")
    found = closed_gap(rows, METRIC)
    assert found["mean"] == pytest.approx(0.5)
    assert found["low"] == pytest.approx(0.0) and found["high"] == pytest.approx(1.0)


def test_victims_that_rank_rightly_have_learned_whatever_their_threshold() -> None:
    auc = {"clean": 0.95, "protected": 0.85, "random_noise": 0.95, "random_mask": 0.6, "blind": 0.3}
    rows = [{**row, "auc": auc[row["arm"]]} for row in make_rows()]
    results = make_results(rows)
    assert results["closed_gap"]["mean"] == pytest.approx(1.0)
    by_auc = {arm: part["mean"] for arm, part in results["closed_gap_auc"].items()}
    wanted = {
        "protected": 0.1 / 0.45,
        "random_noise": 0.0,
        "random_mask": 0.35 / 0.45,
    }  # the floor is chance, not blind
    assert by_auc == pytest.approx(wanted)
    assert results["verdict"] == "not protected" and "AUC" in results["verdict_reasons"][0]
    assert verdict_of(rows, rules=VerdictRules(closed_gap_auc=None))[0] == "protected"
    assert "closed_gap_auc" not in make_results()
    # A victim that ranks wrongly does not make up for one that ranks rightly, and one that never learned says nothing.
    for other, protected in ((0.95, 0.0), (0.55, 0.5)):
        odd = {"clean": other, "protected": protected}
        mixed = [{**row, "auc": odd.get(row["arm"], 0.5)} if row["victim"] == "net1" else row for row in rows]
        low = [{**row, "auc": 0.94} if (row["arm"], row["victim"]) == ("protected", "net0") else row for row in mixed]
        (check,) = [each for each in make_results(low)["verdict_checks"] if each["rule"] == "closed_gap_auc"]
        assert check["passed"] == (other == 0.95), check


def test_single_pair_has_no_interval() -> None:
    found = closed_gap(make_rows(victims=1, seeds=1), METRIC)
    assert found["mean"] == pytest.approx(1.0) and found["low"] is None


def test_closed_gap_pairs_by_seed_and_ignores_nan() -> None:
    rows = make_rows({"protected": 0.7}, victims=1)
    next(r for r in rows if r["arm"] == "protected")[METRIC] = float("nan")
    rows.append({"arm": "protected", "victim": "net0", "seed": 99, METRIC: 0.0})
    assert closed_gap(rows, METRIC)["n"] == 2


def test_summary_uses_sample_standard_deviation() -> None:
    rows = make_rows(victims=1)
    for row, value in zip([r for r in rows if r["arm"] == "clean"], (0.8, 0.9, 1.0), strict=True):
        row[METRIC] = value
    cell = summarize(rows, METRIC)["clean"]["by_victim"]["net0"]
    assert cell["n"] == 3
    assert cell[METRIC] == {"mean": pytest.approx(0.9), "std": pytest.approx(0.1)}
    assert cell["recall"]["a"]["mean"] == pytest.approx(0.9)
    assert summarize(make_rows(seeds=1, victims=1), METRIC)["clean"]["all"][METRIC]["std"] is None


def test_perfect_protection_is_protected() -> None:
    verdict, reason = verdict_of(make_rows(noise=0.005))
    assert verdict == "protected"
    assert "closed gap" in reason


@pytest.mark.parametrize(
    ("levels", "verdict", "words"),
    [
        ({"protected": 0.9}, "not protected", "closed gap 0.000"),
        ({"protected": 0.6}, "protected", "closed gap 0.750"),
        ({"clean": 0.55}, "inconclusive", "clean arm did not learn"),
        ({"random_noise": 0.6}, "inconclusive", "Random noise"),
        ({"blind": 0.85}, "inconclusive", "clean arm did not learn"),
    ],
)
def test_verdict_follows_levels(levels: dict[str, float], verdict: str, words: str) -> None:
    found, reason = verdict_of(make_rows(levels))
    assert found == verdict
    assert words in reason


def test_the_verdict_names_who_loses_least() -> None:
    rows = make_rows()
    assert {row["victim"] for row in rows} == {"net0", "net1"}
    set_metric(rows, 0.6, victim="net1", arm="protected")
    verdict, reason = verdict_of(rows)
    assert verdict == "protected" and "lose 88 % of what clean images teach them on average, net1 75 % (" in reason
    helped = make_rows({"clean": 0.8, "random_noise": 0.8, "protected": 0.9})
    assert "lose only 0 % of what clean images teach them on average, net0 0 % (closed gap -" in verdict_of(helped)[1]


def test_one_victim_that_did_not_learn_makes_it_inconclusive() -> None:
    rows = make_rows(victims=4)
    set_metric(rows, 0.55, victim="net3", arm="clean")
    verdict, reason = verdict_of(rows)
    assert verdict == "inconclusive"
    assert "net3" in reason


@pytest.mark.parametrize(("victims", "seeds", "words"), [(2, 2, "Too few usable seeds"), (1, 3, "Too few victims")])
def test_small_study_is_inconclusive(victims: int, seeds: int, words: str) -> None:
    verdict, reason = verdict_of(make_rows(victims=victims, seeds=seeds))
    assert verdict == "inconclusive" and words in reason


def test_missing_control_is_inconclusive_unless_switched_off() -> None:
    rows = [row for row in make_rows() if row["arm"] != "random_noise"]
    verdict, reason = verdict_of(rows)
    assert verdict == "inconclusive" and reason.startswith("The random-noise control was not run")
    assert verdict_of(rows, rules=VerdictRules(control_within=None))[0] == "protected"


def test_a_control_that_hinders_one_victim_is_not_made_up_for() -> None:
    rows = make_rows()
    set_metric(rows, 0.79, victim="net1", arm="random_noise")
    verdict, reason = verdict_of(rows)
    assert verdict == "inconclusive" and "by -0.110 with net1" in reason


def test_good_mean_with_wide_interval_is_inconclusive() -> None:
    rows = make_rows(victims=3)
    set_metric(rows, 0.84, victim="net2", arm="protected")
    rules = {"protected_above_chance": None}
    verdict, reason = verdict_of(rows, rules=VerdictRules(**rules, closed_gap_per_victim=None))
    assert verdict == "inconclusive" and "lower bound" in reason
    verdict, reason = verdict_of(rows, rules=VerdictRules(**rules))
    assert verdict == "not protected" and reason.startswith("Of all victims net2 loses least"), "others do not help it"


def test_metric_above_chance_is_not_protected() -> None:
    rows = make_rows({"protected": 0.66, "blind": 0.65, "clean": 0.95, "random_noise": 0.95})
    verdict, reason = verdict_of(rows)
    assert verdict == "not protected" and "chance" in reason
    assert verdict_of(rows, chance=None)[0] == "protected"


@pytest.mark.parametrize(
    ("change", "verdict", "words"),
    [
        ({"ssim": {"mean": 0.94}}, "not protected", "SSIM"),
        ({"max_error_stored": 9}, "not protected", "stored 9 of 8"),
        ({"max_error_physical": 8.01}, "not protected", "physical"),
        ({"ssim": {"mean": None}}, "inconclusive", "SSIM was not measured"),
        ({"ssim": {"mean": float("nan")}}, "inconclusive", "SSIM was not measured"),
    ],
)
def test_fidelity_rules(change: dict[str, Any], verdict: str, words: str) -> None:
    found, reason = verdict_of(make_rows(), fidelity={**FIDELITY, **change})
    assert found == verdict and words in reason


HALF_PROTECTED = {"clean": (0.9, 0.8), "protected": (0.4, 0.8), "random_noise": (0.9, 0.8), "blind": (0.4, 0.3)}
"""Class a is protected, class b is not; their mean looks half protected."""


def segmentation_rows(levels: dict[str, tuple[float, float]] = HALF_PROTECTED) -> list[dict[str, Any]]:
    return [
        {
            "arm": arm,
            "victim": victim,
            "seed": seed,
            "dice": (a + b) / 2,
            "dice_per_class": {"a": a, "b": b},
            "hd95": 2.0,
            "hd95_per_class": {"a": 1.0, "b": 3.0},
        }
        for arm, (a, b) in levels.items()
        for victim in ("net0", "net1")
        for seed in range(3)
    ]


@pytest.mark.parametrize(
    ("changed", "verdict", "words"),
    [
        ({}, "protected", ""),
        ({"protected": (0.1, 0.58)}, "not protected", "Of all classes b is protected least (closed gap 0.400;"),
        ({"clean": (0.9, 0.15)}, "inconclusive", "closed gap is undefined for b"),
        ({"clean": (0.15, 0.9), "protected": (0.1, 0.6)}, "not protected", "classes b is protected least"),
    ],
    ids=["all", "weak", "not learned", "weak and not learned"],
)
def test_a_class_without_protection_is_not_made_up_for(changed: dict[str, Any], verdict: str, words: str) -> None:
    levels = {"clean": (0.9, 0.9), "protected": (0.1, 0.1), "random_noise": (0.9, 0.9), "blind": (0.1, 0.1), **changed}
    rows = segmentation_rows(levels)
    lenient = {"control_within": None, "closed_gap_mean": 0.4, "closed_gap_low": 0.3, "closed_gap_per_victim": None}
    parts = {"fidelity": FIDELITY, "budget": BUDGET}
    found = decide(rows, "dice", rules=VerdictRules(**lenient), **parts)
    assert found.verdict == verdict and words in found.reasons[0]
    off = VerdictRules(**lenient, closed_gap_per_class=None)
    assert decide(rows, "dice", rules=off, **parts).verdict == "protected"


def test_one_class_is_judged_by_the_mean_alone() -> None:
    rows = [{**row, "dice_per_class": {"a": row["dice"]}} for row in segmentation_rows()]
    rules = [check.rule for check in decide(rows, "dice").checks]
    assert "closed_gap_mean" in rules and "closed_gap_per_class" not in rules


def test_closed_gap_per_class_shows_what_the_mean_hides() -> None:
    rows = segmentation_rows()
    assert closed_gap(rows, "dice")["mean"] == pytest.approx(0.5)
    found = closed_gap_per_class(rows, "dice")
    assert found["a"]["mean"] == pytest.approx(1.0) and found["b"]["mean"] == pytest.approx(0.0)
    assert found["a"]["by_victim"]["net1"]["n"] == 3
    assert closed_gap_per_class(make_rows(), METRIC) == {}


def test_class_that_a_row_lacks_is_no_pair() -> None:
    rows = segmentation_rows()
    next(row for row in rows if row["arm"] == "protected")["dice_per_class"]["a"] = None
    assert closed_gap_per_class(rows, "dice")["a"]["n"] == 5


def test_segmentation_results_hold_what_exists_per_class() -> None:
    leakage = {arm: {"best": {"mean": value, "std": 0.1}} for arm, value in (("protected", 0.8), ("random_noise", 0.2))}
    results = make_results(
        segmentation_rows(), metric="dice", chance=None, classes=["background", "a", "b"], leakage=leakage
    )
    assert results["closed_gap_per_class"]["b"]["mean"] == pytest.approx(0.0)
    assert set(results["closed_gap_controls_per_class"]["random_noise"]) == {"a", "b"}
    assert len(results["warnings"]) == 1 and results["leakage"] == leakage
    cell = results["summary"]["clean"]["all"]
    assert cell["dice_per_class"]["a"] == {"mean": pytest.approx(0.9), "std": pytest.approx(0.0)}
    assert cell["hd95"]["mean"] == 2.0 and cell["hd95_per_class"]["b"]["mean"] == 3.0
    validate_results(results)
    plain = make_results()
    assert not {"closed_gap_per_class", "closed_gap_controls_per_class", "leakage", "warnings"} & plain.keys()
    assert set(plain["summary"]["clean"]["all"]) == {"n", METRIC, "recall"}


def test_report_of_another_minor_version_is_valid() -> None:
    validate_results({**make_results(), "schema_version": "2.7"})


def utility(*differences: float | None) -> list[dict[str, Any]]:
    return [
        {
            "victim": "net",
            "seed": seed,
            "difference": 0.0,
            "per_class": {"a": {"difference": 0.0}, "b": {"difference": d}},
        }
        for seed, d in enumerate(differences)
    ]


@pytest.mark.parametrize(
    ("rows", "verdict", "words"),
    [
        (utility(0.01, -0.01), "protected", ""),
        (utility(0.03, -0.03), "not protected", "0.030 differently on protected ones for b"),
        ([{"difference": 0.5}], "not protected", "the headline metric"),
        ([], "inconclusive", "was not measured"),
        (utility(None), "protected", ""),
    ],
)
def test_utility_rule_takes_the_worst_class(rows: list[dict[str, Any]], verdict: str, words: str) -> None:
    found, reason = verdict_of(make_rows(), utility=rows, rules=VerdictRules(utility_within=0.02))
    assert found == verdict and words in reason
    assert verdict_of(make_rows(), utility=rows)[0] == "protected"


def test_results_survive_a_json_round_trip(tmp_path: Path) -> None:
    results = make_results(make_rows(noise=0.02), config={"path": Path("x"), "lr": np.float32(0.5), "n": np.int64(3)})
    path = tmp_path / "sub" / "report.json"
    write_json(results, path)
    loaded = json.loads(path.read_text(encoding="utf-8"))
    assert loaded == results
    validate_results(loaded)
    assert loaded["config"] == {"path": "x", "lr": 0.5, "n": 3}
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_json_has_no_nan(tmp_path: Path) -> None:
    rows = make_rows()
    rows[0][METRIC] = math.nan
    results = make_results(rows, fidelity={**FIDELITY, "psnr": {"mean": math.inf, "std": None, "min": None}})
    write_json(results, tmp_path / "report.json")
    loaded = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert loaded["arms"][0][METRIC] is None and loaded["fidelity"]["psnr"]["mean"] is None


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(OSError, match="No space"):
        write_json(make_results(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("key", ["verdict", "closed_gap.mean", "fidelity.ssim.mean", "budget.stored.max", "not_tested"])
def test_missing_key_is_named(key: str) -> None:
    results = make_results()
    *parents, last = key.split(".")
    part = results
    for parent in parents:
        part = part[parent]
    del part[last]
    with pytest.raises(ValueError, match=f"missing key '{key}'"):
        validate_results(results)


@pytest.mark.parametrize(("key", "value"), [("classes", "ab"), ("chance", "half"), ("timing", None), ("task", 3)])
def test_wrong_type_is_named(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"key '{key}' must be"):
        validate_results({**make_results(), key: value})


def test_unknown_verdict_and_version_are_refused() -> None:
    with pytest.raises(ValueError, match="'maybe'"):
        validate_results({**make_results(), "verdict": "maybe"})
    with pytest.raises(ValueError, match=r"'1\.5'"):
        validate_results({**make_results(), "schema_version": "1.5"})


def test_row_errors_name_the_row() -> None:
    results = make_results()
    broken = copy.deepcopy(results)
    del broken["arms"][2][METRIC]
    with pytest.raises(ValueError, match=r"arms\[2\].*balanced_accuracy"):
        validate_results(broken)
    with pytest.raises(ValueError, match="repeats"):
        validate_results({**results, "arms": [*results["arms"], results["arms"][0]]})


def test_unmeasured_parts_may_be_null() -> None:
    results = make_results(fidelity=None, budget=None)
    assert results["verdict"] == "inconclusive"
    validate_results(results)


def test_every_key_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "report.md").read_text(encoding="utf-8")
    leakage = label_leakage(torch.ones(1, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool))
    measured = {arm: {"best": {"mean": value}} for arm, value in (("protected", 1.0), ("random_noise", 0.0))}
    results = make_results(segmentation_rows(), metric="dice", leakage=measured)
    rules, row = set(results["verdict_rules"]), set(results["arms"][0])
    keys = {*results, *rules, *row, *FIDELITY, *BUDGET, *leakage, "psnr_foreground", "by_estimator", "hd95_unit"}
    missing = {key for key in keys if f"`{key}`" not in text}
    assert not missing
