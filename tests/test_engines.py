# SPDX-License-Identifier: Apache-2.0
"""The trainer: determinism, resume with equal bytes, best so far, cases of different shapes."""

from __future__ import annotations

import pytest
import torch
from ignite.engine import Events
from monai.data import MetaTensor

from monai_salm.engines import PerturbationTrainer
from monai_salm.perturbations.base import Objective
from monai_salm.perturbations.masks import SparsityMask
from monai_salm.perturbations.salm import SALM
from monai_salm.stored import StoredCodec
from monai_salm.surrogates import RandomView, SmallCNN, Surrogate
from monai_salm.transforms.meta import codec_to_meta


class Killed(BaseException):
    """Stands for a kill between two rounds."""


def cases(count: int = 10, shapes=((12, 12), (10, 14)), label=lambda at: at % 2) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    codec = codec_to_meta(StoredCodec("uint8", (0.0, 255.0)))
    items = []
    for at in range(count):
        stored = torch.randint(120, 136, (1, *shapes[at % len(shapes)]), generator=generator).to(torch.uint8)
        meta = {"sample_id": f"case-{at}", "stored_codec": codec, "intensity": "stored"}
        items.append({"image": MetaTensor(stored, meta=meta), "label": label(at)})
    return items


def trainer(folder, dataset=None, rounds=3, steps=2, **options) -> PerturbationTrainer:
    torch.manual_seed(0)
    surrogate = Surrogate(SmallCNN(2, 1, 2, (4, 8)), (12, 12))
    return PerturbationTrainer(
        device="cpu",
        max_epochs=rounds,
        dataset=cases() if dataset is None else dataset,
        objective=Objective(surrogate, torch.nn.CrossEntropyLoss(reduction="none"), view=RandomView(2)),
        optimizer=torch.optim.Adam(surrogate.parameters(), 1e-2),
        perturbation=SALM(mask=SparsityMask(ratio=0.4), steps=steps, look=1),
        budget="8/255",
        bank_file=folder / "bank.sqlite",
        **{"surrogate_steps": 3, "batch_size": 4} | options,
    )


def test_equal_seeds_give_equal_banks_and_others_do_not(tmp_path):
    banks = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit = trainer(tmp_path / name, seed=seed)
        fit.run()
        banks.append(fit.bank.revision)
    assert banks[0] == banks[1] != banks[2]


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_killed_fit_goes_on_and_ends_with_the_same_bytes(tmp_path, stop_after):
    whole = trainer(tmp_path / "whole", model_file=tmp_path / "whole" / "model.pt")
    whole.run()

    class KillAfter:
        def attach(self, engine):
            event = Events.EPOCH_STARTED if stop_after < 3 else Events.ITERATION_STARTED
            engine.add_event_handler(event, self)

        def __call__(self, engine):
            last_step = stop_after == 3 and engine.state.iteration == 9
            if last_step or (stop_after < 3 and engine.state.epoch > stop_after):
                raise Killed

    first = trainer(tmp_path / "killed", train_handlers=[KillAfter()])
    with pytest.raises(Killed):
        first.run()
    second = trainer(tmp_path / "killed", model_file=tmp_path / "killed" / "model.pt")
    assert second.state.epoch == min(stop_after, 2)
    second.run()
    assert second.bank.revision == whole.bank.revision
    assert second.passes_per_image == whole.passes_per_image and second.scores == whole.scores
    weights = [torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("whole", "killed")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_finished_fit_is_not_repeated_but_restores_its_model(tmp_path):
    trainer(tmp_path).run()
    again = trainer(tmp_path, model_file=tmp_path / "model.pt")
    again._iteration = None  # would fail if it were called
    again.run()
    assert (tmp_path / "model.pt").is_file()


def test_another_configuration_on_the_same_bank_is_refused(tmp_path):
    trainer(tmp_path).run()
    with pytest.raises(ValueError, match="configuration"):
        trainer(tmp_path, seed=5)


@pytest.mark.parametrize("transplant", [True, False])
def test_the_perturbation_tells_the_surrogate_the_class(tmp_path, transplant):
    fit = trainer(tmp_path, cases(24), rounds=3, steps=8, surrogate_steps=60, transplant=transplant)
    fit.run()
    assert fit.scores[-1] < 0.6  # ln 2 = 0.69 without any information


def test_every_case_is_perturbed_within_budget_and_ratio(tmp_path):
    fit = trainer(tmp_path)
    fit.run()
    for item in cases():
        delta = fit.bank.load(item["image"].meta["sample_id"], item["image"])
        assert delta.shape == item["image"].shape and delta.dtype == torch.int8
        assert 0 < (delta != 0).float().mean() <= 0.41 and delta.abs().max() <= 8


def test_passes_are_those_of_the_configuration(tmp_path):
    fit = trainer(tmp_path, cases(8, shapes=((12, 12),)), rounds=3)
    fit.run()
    # 3 rounds of 3 steps on 4 of 8 images, and 3 rounds of 2 steps on all.
    assert fit.passes_per_image == {"surrogate_training": 4.5, "perturbation": 6.0, "total": 10.5}


def test_other_cases_get_perturbations_without_touching_the_bank(tmp_path):
    fit = trainer(tmp_path)
    fit.run()
    before = fit.bank.revision
    deltas = fit.perturb(cases(3))
    assert sorted(deltas) == ["case-0", "case-1", "case-2"] and all((delta != 0).any() for delta in deltas.values())
    assert fit.bank.revision == before


def test_it_stops_when_the_loss_has_settled(tmp_path):
    fit = trainer(tmp_path, rounds=30, settle=0.99)
    fit.run()
    assert fit.bank.finished and fit.state.epoch == 4


def test_bad_datasets_are_named(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        trainer(tmp_path, dataset=[])
    with pytest.raises(ValueError, match="only once"):
        trainer(tmp_path, dataset=cases(2) + cases(2))
    with pytest.raises(ValueError, match="1 or more"):
        trainer(tmp_path, rounds=0)
