# SPDX-License-Identifier: Apache-2.0
"""The study, end to end on tiny files: what each arm shows, and that nothing is trained twice."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from exports import write_labels
from torch import nn

from monai_salm.io import formats
from monai_salm.release.gates import Refusal
from monai_salm.release.identity import owner_id
from monai_salm.release.labels import Cohort, load_cohort
from monai_salm.release.manifest import IntegrityError, link
from monai_salm.release.protect import protect_cohort
from monai_salm.release.visibility import CaseVisibility, VisibilityLog, WindowVisibility
from monai_salm.surrogates import RandomView, SmallCNN
from monai_salm.verification.results import validate_results
from monai_salm.verification.study import VictimStudy
from monai_salm.verification.training import train_network
from monai_salm.verification.victims import Classification, scores

SIZE = 12
STEP = 80
BUDGET = f"{STEP} stored"
QUICK = {"epochs": 20, "batch_size": 8, "learning_rate": 0.02}


class Brightness(nn.Module):
    """Mean and corner: sees the anatomy (how bright the image is) and a marker in the corner."""

    def __init__(self, n_classes: int = 2) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2, momentum=0.3)
        self.head = nn.Linear(2, n_classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        corner = image[..., :2, :2].flatten(1).mean(1)
        return self.head(self.norm(torch.stack([image.flatten(1).mean(1), corner], 1)))


class NormedFeatures(nn.Sequential):
    """Batch normalization of one value per channel, which PyTorch refuses for a batch of one."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def images_of_two_classes(count: int = 24, *, shift: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(count) % 2
    noise = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(count))
    return 0.5 * noise + shift * labels[:, None, None, None], labels


def export(root: Path, count: int = 36, splits: bool = True) -> Cohort:
    """Images of two classes; those of class b are brighter by 100 of 1000. The corners are of one gray.

    All are darker than uniform noise, so a network of brightness that was trained on noise gives them all one class.
    """
    rng = np.random.default_rng(0)
    rows = []
    (root / "images").mkdir(parents=True)
    for index in range(count):
        voxels = rng.integers(100, 400, (SIZE, SIZE)).astype(np.int16) + np.int16(100 * (index % 2))
        voxels[:4, :4] = 300
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), root / "images" / f"i{index:02d}.nii")
        split = "test" if index % 3 == 0 else "train"
        rows.append(f"images/i{index:02d}.nii,{'ab'[index % 2]}" + (f",{split}" if splits else ""))
    write_labels(root, rows)
    return load_cohort(root, spatial_dims=2, window=(0.0, 1000.0))


def markers(cohort: Cohort, step: int = STEP) -> dict[str, np.ndarray]:
    """A corner that tells the class; the lower part moves the other way, so that both classes are equally bright.

    Class b is brighter by 100 in 128 voxels: 100 * 128 = 2 * 80 * (96 - 16).
    """
    deltas = {}
    for case in cohort.cases:
        delta = np.zeros((1, SIZE, SIZE), np.int8)
        delta[:, :4, :4] = step if case.label else -step
        delta[:, 4:] = -step if case.label else step
        deltas[case.sample_id] = delta
    return deltas


def release(folder: Path, *count: int, **options: bool) -> tuple[Cohort, Path]:
    """An export with markers in its protected copy."""
    cohort = export(folder / "in", *count, **options)
    grid = {"spatial_dims": 2, "window": (0.0, 1000.0)}
    protect_cohort(cohort, markers(cohort), budget=BUDGET, output_dir=folder / "out", **grid)
    return cohort, folder / "out"


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> tuple[Cohort, Path]:
    return release(tmp_path_factory.mktemp("study"))


def study(cohort: Cohort, out: Path, **options) -> VictimStudy:
    given = {
        "victims": {"corner": Brightness},
        "seeds": 2,
        "budget": BUDGET,
        "window": (0.0, 1000.0),
        "spatial_dims": 2,
        "spatial_size": (SIZE, SIZE),
        "workers": 1,
        **QUICK,
    }
    return VictimStudy(cohort=cohort, output_dir=out, **given | options)


HELD_OUT = ["held-out cases"]
FIT = {"seed": 3, "surrogate_steps": 9, "batch_size": 4, "transplant": True}


def trainer(deltas: dict[str, np.ndarray]) -> SimpleNamespace:
    """What a study asks of a trainer, which would perturb held-out cases by ``deltas``."""

    def perturb(dataset: list[str]) -> dict[str, np.ndarray]:
        assert dataset is HELD_OUT
        return deltas

    made = {"perturbation": SimpleNamespace(mask=SimpleNamespace(ratio=0.1)), "base_rates": [0.01], "seconds": 5.0}
    made |= {"state": SimpleNamespace(max_epochs=3), "objective": SimpleNamespace(view="as it is"), "perturb": perturb}
    passes = {"surrogate_training": 3.0, "perturbation": 4.0, "total": 7.0}
    return SimpleNamespace(**FIT | made, passes_per_image=passes)


def means(results: dict) -> dict[str, float]:
    return {arm: part["all"]["balanced_accuracy"]["mean"] for arm, part in results["summary"].items()}


def untimed(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize(("size", "told"), [(SIZE // 2, False), (SIZE // 2 - 1, True)])
def test_files_far_finer_than_what_the_networks_saw_are_warned_of(released, tmp_path, size, told):
    shutil.copytree(released[1], tmp_path / "out")
    results = study(released[0], tmp_path / "out", spatial_size=(size, size), seeds=1, epochs=1).run()
    warnings = results.get("warnings", [])
    assert [f"see images at {size} x {size}, and files have up to {SIZE} x {SIZE}" in each for each in warnings] == (
        [True] if told else []
    )


# -------------------------------------------------------------------- victims


def test_victim_learns_and_is_deterministic_for_a_seed():
    train, test = images_of_two_classes(40), images_of_two_classes(20)
    make, task = partial(SmallCNN, 2, 1, 2, features=(4, 8)), Classification(("a", "b"), RandomView(2))
    options = {"epochs": 10, "learning_rate": 0.02, "batch_size": 8}
    torch.manual_seed(5)
    first = train_network(task, make, train, test, seed=1, **options)
    state = torch.get_rng_state()
    torch.manual_seed(6)
    again = train_network(task, make, train, test, seed=1, **options)
    other = train_network(task, make, train, test, seed=2, **options)
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)  # the global state was not touched
    assert untimed([first.row]) == untimed([again.row])
    assert all(map(torch.equal, first.network.state_dict().values(), again.network.state_dict().values()))
    assert first.row["curve"] != other.row["curve"]
    assert first.row["balanced_accuracy"] > 0.9
    assert first.row["curve"][-1]["balanced_accuracy"] == first.row["balanced_accuracy"]
    assert first.row["curve"][-1]["train_loss"] < first.row["curve"][0]["train_loss"]


@pytest.mark.parametrize(("count", "batch_size"), [(5, 4), (9, 8), (3, 1), (1, 1)])
def test_batch_of_one_does_not_crash(count, batch_size):
    images, labels = images_of_two_classes(count)
    options = {"seed": 0, "epochs": 2, "batch_size": batch_size}
    result = train_network(Classification(("a", "b")), NormedFeatures, (images, labels), (images, labels), **options)
    assert len(result.row["curve"]) == 2


def test_curve_of_a_long_training_is_thinned_but_ends_with_the_result():
    data = images_of_two_classes(4)
    row = train_network(Classification(("a", "b")), Brightness, data, data, seed=0, epochs=9, curve_points=3).row
    known = [point["epoch"] for point in row["curve"] if point["balanced_accuracy"] is not None]
    assert known == [3, 6, 9]


def test_scores_of_three_classes_by_hand():
    probability = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5]])
    found = scores(probability, torch.tensor([0, 0, 1, 2]), ["x", "y", "z"])
    assert found["recall"] == {"x": 0.5, "y": 1.0, "z": 1.0}
    assert found["accuracy"] == 0.75
    assert found["balanced_accuracy"] == pytest.approx(2.5 / 3)
    assert found["auc"] == pytest.approx(1.0)


def test_diverged_victim_is_no_evidence():
    data = images_of_two_classes(4)
    options = {"seed": 0, "epochs": 2, "learning_rate": float("inf")}
    result = train_network(Classification(("a", "b")), Brightness, data, data, **options)
    assert result.row["balanced_accuracy"] is None and "auc" not in result.row


# ---------------------------------------------------------------------- study


def test_marker_takes_the_anatomy_away_and_blind_is_chance(released, out):
    cohort, _ = released
    fit = trainer(markers(cohort))
    random_mask = {name: np.roll(delta, (3, 3), (1, 2)) for name, delta in markers(cohort, 1).items()}
    plain = WindowVisibility(0.0, 1000.0, 30.0, 0.9, 45.0, 0.99)
    VisibilityLog(out).keep([CaseVisibility("a", (plain,)), CaseVisibility("b", (replace(plain, psnr=None),))])
    results = study(
        cohort,
        out,
        victims={"corner": Brightness, "cnn": partial(SmallCNN, 2, 1, 2, features=(4, 8))},
        config={"epsilon": BUDGET},
        rules={"ssim_mean": 0.1, "min_seeds": 2},
    ).run(fit, {"random_mask": SimpleNamespace(bank=random_mask, seconds=6.0)}, HELD_OUT)
    validate_results(results)
    told = {"mask": str(fit.perturbation), "rounds": 3, "learning_rate": 0.01, "view": "as it is"}
    assert results["config"] == {"epsilon": BUDGET, **FIT, **told}
    assert results["fidelity"]["mask_fraction_asked"] == 0.1
    assert results["timing"].items() >= {"fit": 5.0, "fit of the random-mask control": 6.0}.items()
    found = means(results)
    assert list(found) == ["clean", "protected", "random_noise", "random_mask", "blind"]
    assert found["clean"] > 0.9
    assert found["random_noise"] > 0.9
    assert found["random_mask"] > 0.9
    assert results["summary"]["protected"]["by_victim"]["corner"]["balanced_accuracy"]["mean"] <= 0.6
    assert results["closed_gap"]["by_victim"]["corner"]["mean"] > 0.7
    assert results["summary"]["blind"]["by_victim"]["corner"]["balanced_accuracy"] == {"mean": 0.5, "std": 0.0}
    assert len(results["arms"]) == 5 * 2 * 2
    assert results["chance"] == 0.5
    assert results["fidelity"]["max_error_stored"] == STEP
    assert results["fidelity"]["mask_fraction"]["mean"] == pytest.approx(112 / SIZE**2)
    assert (results["fidelity"]["n_more_visible"], results["fidelity"]["n_visibility_cases"]) == (1, 2)
    assert "1 of 2 images" in (out / "report.html").read_text()
    assert results["budget"]["stored"] == {"min": STEP, "max": STEP}
    assert results["budget"]["window_fraction"]["max"] == pytest.approx(STEP / 1000)
    assert results["cohort"]["held_out"] == 12
    assert results["cohort"]["released"] == 24
    # The frozen clean model: the same cases in the same order, so its clean part is the clean arm's result.
    by_training = {(row["victim"], row["seed"]): row for row in results["arms"] if row["arm"] == "clean"}
    assert len(results["utility"]) == 4
    for row in results["utility"]:
        assert row["clean"] == by_training[row["victim"], row["seed"]]["balanced_accuracy"]
        assert row["difference"] == pytest.approx(row["protected"] - row["clean"])
    assert json.loads((out / "report.json").read_text()) == results
    html = (out / "report.html").read_text()
    assert "<html" in html
    assert html.count("Signed difference of") == 4
    assert not (out / "private" / "arms").exists()


def test_nothing_is_trained_twice(released, out, trained):
    cohort, _ = released
    first = study(cohort, out, epochs=3).run()
    assert len(trained) == 8
    again = study(cohort, out, epochs=3).run()
    assert len(trained) == 8
    assert again["arms"] == first["arms"]
    study(cohort, out, epochs=3, seeds=3).run()
    assert [options["seed"] for options in trained[8:]] == [2] * 4
    study(cohort, out, epochs=2).run()
    assert len(trained) == 12 + 8
    study(cohort, out, epochs=3, augment=RandomView(2, rotate=0.1), seeds=1).run()
    study(cohort, out, epochs=3, augment=RandomView(2, rotate=0.2), seeds=1).run()
    assert len(trained) == 20 + 2 * 4
    study(
        cohort, out, epochs=3, budget="79 stored", rules={"within_budget": False}
    ).run()  # only the random control is another
    assert len(trained) == 28 + 2


def test_killed_study_goes_on_and_ends_with_the_same_rows(released, out, trained):
    cohort, _ = released
    whole = study(cohort, out, epochs=3).run()
    ledger = out / "private" / "study.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[:3]) + lines[3][:40])  # the fourth was being written
    (out / "private" / "arms").mkdir()
    (out / "private" / "arms" / "left.f32").write_bytes(b"x")
    trained.clear()
    again = study(cohort, out, epochs=3).run()
    assert len(trained) == 5
    assert untimed(again["arms"]) == untimed(whole["arms"])
    assert len([line for line in ledger.read_text().splitlines() if line.endswith("}")]) == 8
    # Weights that are gone are made again, for the utility of clean models only.
    for path in (out / "private" / "victims").iterdir():
        path.unlink()
    study(cohort, out, epochs=3).run()
    assert len(trained) == 5 + 2


def test_worker_processes_give_the_same_rows(released, out):
    cohort, _ = released
    options = {"victims": {"cnn": partial(SmallCNN, 2, 1, 2, features=(4,))}, "epochs": 3, "augment": RandomView(2)}
    ledger = out / "private" / "study.jsonl"
    side_by_side = study(cohort, out, workers=2, **options).run(trainer(markers(cohort)), None, HELD_OUT)
    ledger.unlink()
    alone = study(cohort, out, workers=1, **options).run(trainer(markers(cohort)), None, HELD_OUT)
    assert untimed(side_by_side["arms"]) == untimed(alone["arms"])
    assert side_by_side["utility"] == alone["utility"]


def test_victims_that_cannot_travel_are_trained_here(released, out, caplog):
    cohort, _ = released
    results = study(cohort, out, victims={"local": lambda: Brightness()}, workers=2, seeds=1, epochs=1).run()
    assert len(results["arms"]) == 4
    assert "one process" in caplog.text


def test_without_test_split_written_files_of_held_out_cases_give_utility(tmp_path):
    cohort, out = release(tmp_path, 24, splits=False)
    results = study(cohort, out, seeds=1, epochs=2).run()
    assert results["cohort"]["held_out"] == len(cohort.held_out) > 0
    assert len(results["utility"]) == 1


def test_verdict_decides_the_exit_code(released, out, capsys):
    cohort, _ = released
    failed = study(cohort, out, epochs=1, rules={"min_seeds": 9, "ssim_mean": 0.9999})
    with pytest.raises(ValueError, match="not run"):
        failed.raise_for_verdict()
    failed.run()
    with pytest.raises(SystemExit) as caught:
        failed.raise_for_verdict()
    assert caught.value.code == 3
    shown = capsys.readouterr()
    assert failed.results is not None
    assert failed.results["verdict_reasons"][0] in shown.err
    assert "report.html" in shown.out and "the verdict asks for 0.9999: a fit with" in shown.out
    lenient = {"closed_gap_mean": -9, "closed_gap_low": -9, "protected_above_chance": None, "ssim_mean": -1}
    lenient |= {"min_seeds": 1, "min_victims": 1, "clean_learned": -9, "clean_above_blind": -9, "control_within": None}
    passed = study(cohort, out, rules=lenient)
    passed.run()
    passed.raise_for_verdict()
    assert "the verdict asks for" not in capsys.readouterr().out


def test_one_case_of_a_control_is_missing(released, out):
    cohort, _ = released
    control = markers(cohort)
    del control[cohort.train[3].sample_id]
    with pytest.raises(ValueError, match="control 'random_mask'.* no perturbation for case-"):
        study(cohort, out).run(controls={"random_mask": control})


def test_missing_protected_file_is_an_integrity_error(released, out):
    cohort, _ = released
    manifest = out / "private" / "manifest.jsonl"
    lines = manifest.read_text().splitlines(keepends=True)
    path = next((out / "protected").rglob("*.nii"))
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(IntegrityError, match="missing or changed"):
        study(cohort, out).run()
    path.write_bytes(content)
    manifest.write_text("".join(lines[:-2]))  # the last image, and labels.csv
    for line in lines[-2:]:
        (out / "protected" / json.loads(line)["file"]).unlink()
    with pytest.raises(IntegrityError, match="1 released cases have no protected file"):
        study(cohort, out).run()


def test_a_file_of_several_cases_is_missing_whatever_else_was_refused(released, out):
    cohort, _ = released
    lost = replace(cohort.train[0], sample_id="case-lost", names=("many.nii/0/",), index=0)
    more = replace(cohort, cases=(*cohort.cases, lost))
    ledger = (out / "private" / "refusals.jsonl").absolute()

    def refuse(name: str) -> None:
        ledger.write_text(link([asdict(Refusal(name, "broken_file", ""))])[0])

    refuse("case-other")
    with pytest.raises(IntegrityError, match="case-lost"):
        study(more, out)._twins()
    refuse(owner_id(lost))
    assert "case-lost" not in study(more, out)._twins()


def test_unprotected_folder_and_missing_classes_are_named(released, out, tmp_path):
    cohort, _ = released
    with pytest.raises(ValueError, match="run protect first"):
        study(cohort, tmp_path / "nothing").run()
    with pytest.raises(ValueError, match="no case is held out for split 'val'"):
        study(cohort, out, eval_split="val").run()
    with pytest.raises(ValueError, match="no case is held out for split 'test'"):
        study(replace(cohort, held_out_ids=frozenset()), out).run()
    only_a = frozenset(case.sample_id for case in cohort.held_out if case.label == 0)
    with pytest.raises(ValueError, match=r"no case of class b is held out for split 'test' \(\d+ of others are\)"):
        study(replace(cohort, held_out_ids=only_a), out).run()
    without_b = tuple(case for case in cohort.cases if case.split == "test" or case.label == 0)
    with pytest.raises(ValueError, match="no training cases that were protected of class b"):
        study(replace(cohort, cases=without_b), out).run()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"spatial_size": (8, 8, 8)}, "spatial_size"),
        ({"eval_split": "train"}, "eval_split"),
        ({"victims": {}}, "needs a victim"),
        ({"seeds": [1, 1]}, "different seeds"),
        ({"seeds": 0}, "seeds is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"epochs": 0}, "epochs"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"budget": "0 stored"}, "above 0"),
    ],
)
def test_wrong_arguments_are_refused(released, out, options, words):
    with pytest.raises(ValueError, match=words):
        study(released[0], out, **options)


def test_a_control_of_a_name_that_is_taken_is_refused(released, out):
    with pytest.raises(ValueError, match="may not be called blind"):
        study(released[0], out).run(controls={"blind": {}})


def test_victim_with_wrong_number_of_outputs_is_refused(released, out):
    with pytest.raises(ValueError, match="build it with 2 outputs"):
        study(released[0], out, victims={"three": partial(Brightness, 3)}).run()


def test_full_disk_is_named_and_scratch_is_gone(released, out, monkeypatch):
    from monai_salm.release.commit import OutputError
    from monai_salm.verification.arms import ArmWriter

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ArmWriter, "add", full)
    with pytest.raises(OutputError, match="no space left"):
        study(released[0], out).run()
    assert not (out / "private" / "arms").exists()


def test_volumes_are_studied_too(tmp_path):
    rng, rows = np.random.default_rng(1), []
    (tmp_path / "in").mkdir()
    for index in range(12):
        voxels = rng.integers(300, 600, (7, 8, 6)).astype(np.int16) + np.int16(100 * (index % 2))
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "in" / f"v{index:02d}.nii.gz")
        rows.append(f"v{index:02d}.nii.gz,{'ab'[index % 2]},{'train' if index < 8 else 'test'}")
    write_labels(tmp_path / "in", rows)
    cohort = load_cohort(tmp_path / "in", spatial_dims=3)
    deltas = {}
    for case in cohort.cases:
        image = formats.read(case, 3)
        low, high = image.codec.window
        deltas[case.sample_id] = ((image.stored > low + 3) & (image.stored < high - 3)).astype(np.int8)
    protect_cohort(cohort, deltas, budget="2 stored", output_dir=tmp_path / "out", spatial_dims=3)
    results = study(
        cohort,
        tmp_path / "out",
        spatial_dims=3,
        spatial_size=(6, 6, 6),
        window="auto",
        budget="2 stored",
        victims={"cnn": partial(SmallCNN, 3, 1, 2, features=(4,))},
        seeds=[7],
        epochs=2,
    ).run(trainer(deltas), None, HELD_OUT)
    assert [row["seed"] for row in results["arms"]] == [7] * 4
    assert results["fidelity"]["max_error_stored"] == 1
    assert len(results["utility"]) == 1
