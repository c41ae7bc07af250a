# SPDX-License-Identifier: Apache-2.0
"""What is left of a protection against defenses: the study's part of it, from tiny files to the report."""

from __future__ import annotations

import pytest
from test_study import release, study

from monai_salm.io.base import Case
from monai_salm.verification.defenses import defenses_of
from monai_salm.verification.resistance import clean_part, resistance
from monai_salm.verification.results import validate_results
from monai_salm.verification.setting import not_tested
from monai_salm.verification.verdict import VerdictRules


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return release(tmp_path_factory.mktemp("resistance"))


def rows(clean: float, protected: float, blind: float | None = 0.5) -> list[dict]:
    values = {"clean": clean, "protected": protected} | ({} if blind is None else {"blind": blind})
    return [
        {"arm": arm, "victim": "cnn", "seed": seed, "dice": value + 0.01 * seed, "curve": []}
        for arm, value in values.items()
        for seed in (0, 1)
    ]


def part_of(plain: list[dict], defended: list[dict]) -> dict:
    (part,) = resistance(plain, {"blur_1": defended}, defenses_of(["jpeg_10", "blur_1"]), "dice", 0.5, VerdictRules())
    return part


def test_a_defense_is_measured_against_the_clean_arm_with_the_same_defense():
    part = part_of(rows(0.9, 0.5), rows(0.8, 0.65, None))
    assert part["name"] == "blur_1" and part["conclusive"]
    assert part["closed_gap"]["mean"] == pytest.approx(0.15 / 0.3, abs=0.03)
    assert part["restored"] == pytest.approx(0.15 / 0.4)
    assert all("curve" not in row for row in part["arms"])


def test_a_defense_that_spoils_clean_training_proves_nothing():
    part = part_of(rows(0.9, 0.5), rows(0.52, 0.5, None))
    assert part["closed_gap"]["mean"] is None and not part["conclusive"]
    part = part_of(rows(0.9, 0.5), rows(0.615, 0.5, None))
    assert part["closed_gap"]["mean"] > 0.7 and not part["conclusive"]


def test_nothing_is_restored_where_nothing_was_lost():
    assert part_of(rows(0.9, 0.88), rows(0.9, 0.9, None))["restored"] is None


def case(name: str, group: str) -> Case:
    return Case(name, "nifti", (), (), group)


def test_the_clean_part_shares_no_patient_with_the_rest_and_both_have_all_classes():
    cases = [case(f"c{at}", f"p{at // 2}") for at in range(24)]
    present = {one.sample_id: frozenset({at // 2 % 2}) for at, one in enumerate(cases)}
    spare = clean_part(cases, present, (0, 1))
    assert len(spare) == 12
    own, rest = ({cases[at].group for at in half} for half in (spare, set(range(24)) - set(spare)))
    assert not own & rest
    assert {tuple(present[cases[at].sample_id]) for at in spare} == {(0,), (1,)}
    assert clean_part(cases[:4], present, (0, 1)) == (), "one patient of each class cannot be halved"


def test_study_with_defenses_reports_them_and_keeps_what_is_done(released, out, trained, capsys):
    cohort, _ = released
    names = ["blur_1", "clean_20", "early_stop"]
    plain = study(cohort, out, epochs=8).run()
    assert "defenses" not in plain
    trained.clear()
    found = study(cohort, out, epochs=8, defenses=names).run()
    said = capsys.readouterr().out
    assert len(trained) == 3 * 2 * 2 and "3 defenses: 12 trainings to do, about" in said
    ahead = sum(defense.cost for defense in defenses_of(names)) * 2 / len(set(row["arm"] for row in plain["arms"]))
    assert f"3 defenses follow the ordinary trainings, about {ahead:.1f} times as long" in said.split("3 defenses:")[0]
    spare = [options["recipe"].clean for options in trained]
    assert all(clean is None or len(clean[0]) == 6 for clean in spare)
    assert (found["verdict"], found["arms"]) == (plain["verdict"], plain["arms"])
    validate_results(found)
    assert [part["name"] for part in found["defenses"]] == names
    rows = [row for part in found["defenses"] for row in part["arms"] if row["arm"] == "protected"]
    assert all(row["auc"] is not None for row in rows)
    assert all(
        part["closed_gap_auc"]["by_victim"].keys() == part["closed_gap"]["by_victim"].keys()
        for part in found["defenses"]
    )
    assert {(row["arm"], row["seed"]) for row in found["defenses"][0]["arms"]} == {
        (arm, seed) for arm in ("clean", "protected") for seed in (0, 1)
    }
    text = (out / "report.html").read_text()
    assert "Gaussian blur, sigma 1 voxel" in text and "half of the held-out patients" in text
    assert "Gaussian blur" not in (study(cohort, out, epochs=8).run() and (out / "report.html").read_text())
    again = study(cohort, out, epochs=8, defenses=names).run()
    assert len(trained) == 12 and again["defenses"] == found["defenses"]


def test_a_defense_that_lacked_clean_cases_is_said_and_listed_as_untested(released, out, monkeypatch, capsys):
    monkeypatch.setattr("monai_salm.verification.study.clean_part", lambda *_: ())
    found = study(released[0], out, epochs=1, defenses=["blur_1", "clean_20"]).run()
    assert "left out, too few held-out patients: clean_20\n" in capsys.readouterr().out
    assert [part["name"] for part in found["defenses"]] == ["blur_1"]
    assert any("mixture" in text for text in found["not_tested"])


def test_what_was_tested_is_not_listed_as_untested():
    nothing, standard = not_tested(), not_tested([defense.name for defense in defenses_of("standard")])
    assert any("JPEG" in text for text in nothing) and not any("JPEG" in text for text in standard)
    assert any("mixture" in text for text in nothing) and not any("mixture" in text for text in standard)
    assert any(text.startswith("Adversarial") for text in standard) and "other strengths" in standard[0]


def test_a_defense_that_does_not_exist_is_refused_before_any_file_is_read(released, out):
    with pytest.raises(ValueError, match="no set of defenses 'all'"):
        study(released[0], out, defenses="all")
