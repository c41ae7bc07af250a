# SPDX-License-Identifier: Apache-2.0
"""The trainer: a fit that was killed, or that a handler ended, goes on and ends with the same bytes."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from fits import EACH_KIND, Kill, Killed, cases, trainer, voxel_trainer
from ignite.engine import Events
from monai.handlers import EarlyStopHandler

from monai_salm.engines import PerturbationTrainer
from monai_salm.perturbations.classwise import ClasswiseErrorMinimizing


@pytest.mark.parametrize(
    ("event", "at", "rounds"),
    [(Events.EPOCH_STARTED, 2, 1), (Events.ITERATION_STARTED, 5, 1), (Events.ITERATION_STARTED, 9, 2)],
)
@pytest.mark.parametrize(
    "make", [*EACH_KIND.values(), partial(voxel_trainer, guard=0.5)], ids=[*EACH_KIND, "guarded slices"]
)
def test_a_killed_fit_goes_on_and_ends_with_the_same_bytes(tmp_path, make, event, at, rounds):
    make = partial(make, max_epochs=3)
    whole = make(tmp_path / "whole", model_file=tmp_path / "whole" / "model.pt")
    whole.run()
    with pytest.raises(Killed):
        make(tmp_path / "killed", train_handlers=[Kill(event, at)]).run()
    second = make(tmp_path / "killed", model_file=tmp_path / "killed" / "model.pt")
    assert second.state.epoch == rounds
    second.run()
    assert second.bank.revision == whole.bank.revision
    assert second.passes_per_image == whole.passes_per_image and second.scores == whole.scores
    weights = [torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("whole", "killed")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize("round_", [1, 3])
@pytest.mark.parametrize("damaged", [None, "0.pt", "1.pt", "2.pt"])
def test_a_fit_that_is_killed_within_a_round_goes_on_with_the_other_cases(tmp_path, monkeypatch, round_, damaged):
    monkeypatch.setattr("monai_salm.engines.trainer.KEPT_EVERY_S", -1.0)  # after each batch
    whole = trainer(tmp_path / "whole")
    whole.run()
    killed, perturb = trainer(tmp_path / "killed"), PerturbationTrainer._perturb

    def two_more(self, cases, batch, deltas, position):
        if position == ("round", round_) and len(list(self._unfinished.folder.glob("*.pt"))) == 3:
            raise Killed
        return perturb(self, cases, batch, deltas, position)

    monkeypatch.setattr(PerturbationTrainer, "_perturb", two_more)
    with pytest.raises(Killed):
        killed.run()
    folder = tmp_path / "killed/bank.unfinished"
    assert sorted(path.name for path in folder.iterdir()) == ["0.pt", "1.pt", "2.pt"]
    if damaged:
        content = bytearray((folder / damaged).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / damaged).write_bytes(content)
    seen = []
    monkeypatch.setattr(
        PerturbationTrainer, "_perturb", lambda self, *given: seen.append(given[-1]) or perturb(self, *given)
    )
    again, told = trainer(tmp_path / "killed"), []
    for event in (Events.STARTED, Events.EPOCH_STARTED, Events.EPOCH_COMPLETED, Events.COMPLETED):
        again.add_event_handler(event, lambda event: told.append((event, len(again.scores))), event.name)
    again.run()
    rounds = [
        ("EPOCH_" + name, at - (name == "STARTED")) for at in range(round_, 4) for name in ("STARTED", "COMPLETED")
    ]
    assert told == [("STARTED", round_ - 1), *rounds, ("COMPLETED", 3)], "handlers see the round that goes on too"
    assert again.bank.revision == whole.bank.revision and not folder.exists()
    batches = len(whole.cases.batches(4))
    assert seen.count(("round", round_)) == batches - {None: 2, "2.pt": 1, "1.pt": 0, "0.pt": 0}[damaged]
    assert (again.scores, again.passes_per_image) == (whole.scores, whole.passes_per_image)


@pytest.mark.parametrize("method", ["salm", "classwise"])
def test_it_goes_on_where_other_cases_are_perturbed_together(tmp_path, monkeypatch, method):
    monkeypatch.setattr("monai_salm.engines.trainer.KEPT_EVERY_S", -1.0)
    options = {} if method == "salm" else {"perturbation": ClasswiseErrorMinimizing(), "transplant": False}
    perturb, calls = PerturbationTrainer._perturb, []

    def third_kills(self, *given):
        calls.append(given)
        if len(calls) == 3:
            raise Killed
        return perturb(self, *given)

    monkeypatch.setattr(PerturbationTrainer, "_perturb", third_kills)
    with pytest.raises(Killed):
        trainer(tmp_path, rounds=1, **options).run()
    monkeypatch.setattr(PerturbationTrainer, "_perturb", perturb)
    monkeypatch.setattr(PerturbationTrainer, "_groups", lambda self, cases: cases.batches(len(cases)))  # as on CUDA
    again = trainer(tmp_path, rounds=1, **options)
    again.run()
    assert len(again.bank) == 10 and again.bank.finished
    if method == "classwise":  # all its passes are those of the survey
        assert again.passes_per_image["perturbation"] == 1.0


def test_what_a_method_learned_of_the_cohort_survives_a_kill_and_serves_other_cases(tmp_path):
    options = {"perturbation": ClasswiseErrorMinimizing(), "transplant": False, "dataset": cases(shapes=((12, 12),))}
    whole = trainer(tmp_path / "whole", **options)
    whole.run()

    with pytest.raises(Killed):
        trainer(tmp_path / "killed", train_handlers=[Kill(Events.EPOCH_STARTED, 2)], **options).run()
    second = trainer(tmp_path / "killed", **options | {"perturbation": ClasswiseErrorMinimizing()})
    second.run()
    assert second.bank.revision == whole.bank.revision
    finished = trainer(tmp_path / "killed", **options | {"perturbation": ClasswiseErrorMinimizing()})
    (other,) = finished.perturb(cases(1, shapes=((12, 12),))).values()
    assert torch.equal(other, whole.bank.current("case-0")) and torch.equal(other, whole.bank.current("case-2"))
    assert trainer(tmp_path / "new", **options).perturbation.learned is None, "nothing is left of the fit before"


def test_a_finished_fit_is_not_repeated_but_restores_its_model(tmp_path):
    trainer(tmp_path).run()
    again = trainer(tmp_path, model_file=tmp_path / "model.pt")
    again._iteration = None  # would fail if it were called
    again.run()
    assert (tmp_path / "model.pt").stat().st_mode & 0o777 == 0o600, "the surrogate is for its owner alone"


def test_a_round_after_which_a_handler_ends_the_fit_is_the_result(tmp_path):
    fit = trainer(tmp_path, rounds=30, model_file=tmp_path / "model.pt")
    EarlyStopHandler(patience=2, score_function=lambda engine: 0.0, trainer=fit).attach(fit)
    fit.run()
    assert fit.bank.finished and fit.state.epoch == 3
    assert all(torch.equal(fit.bank[name], delta) for name, delta in fit.deltas.items())
    weights, network = torch.load(tmp_path / "model.pt", weights_only=True), fit.objective.network.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in network.items())


@pytest.mark.parametrize("at", [2, 5])
@pytest.mark.parametrize("how", [RuntimeError, KeyboardInterrupt, None])
def test_a_fit_that_ends_within_a_round_can_be_run_again(tmp_path, how, at):
    whole = trainer(tmp_path / "whole")
    whole.run()
    fit, ended = trainer(tmp_path, model_file=tmp_path / "model.pt"), []

    @fit.on(Events.ITERATION_COMPLETED)
    def end() -> None:
        if ended or fit.state.iteration < at:
            return
        ended.append(at)
        if how:
            raise how
        fit.terminate()

    with pytest.raises(how) if how else nullcontext():
        fit.run()
    assert not fit.bank.finished and not (tmp_path / "model.pt").exists(), "there is no result"
    fit.run()
    assert fit.bank.finished and fit.bank.revision == whole.bank.revision and (tmp_path / "model.pt").exists()
    assert (fit.scores, fit.passes_per_image) == (whole.scores, whole.passes_per_image)


def test_a_model_of_an_unfinished_fit_is_replaced(tmp_path):
    fit = trainer(tmp_path, model_file=tmp_path / "model.pt")
    torch.save({}, tmp_path / "model.pt")
    fit.run()
    assert torch.load(tmp_path / "model.pt", weights_only=True)
