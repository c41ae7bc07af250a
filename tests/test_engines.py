# SPDX-License-Identifier: Apache-2.0
"""The trainer: determinism, one fit and another, cases of different shapes, and what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from fits import Killed, cases, each_kind, stored, trainer, volumes, voxel_trainer
from ignite.engine import Events
from monai.data import CacheDataset, Dataset
from monai.handlers import StatsHandler
from monai.transforms import Compose, Lambdad, OneOf, RandFlipd
from torch import nn

from monai_salm.engines.cases import Cases
from monai_salm.engines.control import with_random_mask
from monai_salm.perturbations.base import Objective
from monai_salm.perturbations.budget import Budget
from monai_salm.perturbations.markers import LabelMarker
from monai_salm.perturbations.masks import SparsityMask
from monai_salm.perturbations.salm import SALM
from monai_salm.stored import StoredCodec, lattice_of
from monai_salm.surrogates import RandomView, SmallCNN, Surrogate


@each_kind
def test_equal_seeds_give_equal_banks_and_others_do_not(tmp_path, make):
    banks = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit = make(tmp_path / name, seed=seed)
        fit.run()
        banks.append(fit.bank.revision)
    assert banks[0] == banks[1] != banks[2]


def test_nothing_is_perturbed_by_a_surrogate_that_was_not_fitted(tmp_path):
    with pytest.raises(ValueError, match="call run"):
        trainer(tmp_path).perturb(cases(1))


@pytest.mark.parametrize("change", [{"steps": 3}, {"seed": 5}])
@each_kind
def test_another_configuration_on_the_same_bank_is_refused(tmp_path, make, change):
    make(tmp_path).run()
    with pytest.raises(ValueError, match="configuration"):
        make(tmp_path, **change)


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


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32"])
def test_cases_that_are_stored_alike_are_read_together_as_one_by_one(dtype):
    codec = StoredCodec(dtype, (20.0, 200.0), padding=(90.0, 95.0))
    items = cases(3, shapes=((5, 7),))
    for at, item in enumerate(items):
        image = torch.randint(0, 256, (1, 5, 7), generator=torch.Generator().manual_seed(at))
        item["image"] = stored(image.to(getattr(torch, dtype)), f"case-{at}", codec)
    read = Cases(items, Budget.parse("8/255"), torch.device("cpu"))
    image, label, lattice = read.read([0, 2], Budget.parse("8/255"))
    assert label.tolist() == [0, 0] and lattice.lower.any()
    for row, at in enumerate((0, 2)):
        assert torch.equal(image[row], read.unit(at))
        expected = lattice_of([read.stored(at)], [codec], Budget.parse("8/255"))
        for found, one in zip(vars(lattice).values(), vars(expected).values(), strict=True):
            assert torch.equal(found[row], one[0]) and found.dtype == one.dtype


def test_passes_are_those_of_the_configuration(tmp_path):
    fit = trainer(tmp_path, cases(8, shapes=((12, 12),)), rounds=3)
    fit.run()
    # 3 rounds of 3 steps on 4 of 8 images, and 3 rounds of 2 steps on all.
    assert fit.passes_per_image == {"surrogate_training": 4.5, "perturbation": 6.0, "total": 10.5}


def test_without_surrogate_steps_the_network_stays_and_the_fit_is_another(tmp_path):
    fit = trainer(tmp_path, rounds=2, surrogate_steps=0, model_file=tmp_path / "model.pt")
    before = {key: value.clone() for key, value in fit.objective.network.state_dict().items()}
    fit.run()
    assert all(torch.equal(before[key], value) for key, value in fit.objective.network.state_dict().items())
    assert fit.passes_per_image == {"surrogate_training": 0.0, "perturbation": 2 * 2.0, "total": 4.0}
    assert all(fit.bank.current(name).any() for name in fit.deltas)
    with pytest.raises(ValueError, match="configuration"):
        trainer(tmp_path, rounds=2, surrogate_steps=1)


def test_another_setting_of_the_loss_is_another_fit(tmp_path):
    network = Surrogate(SmallCNN(2, 1, 2, (4, 8)), (12, 12))
    loss, weighted = (
        torch.nn.CrossEntropyLoss(reduction="none", weight=weight) for weight in (None, torch.tensor([1.0, 9.0]))
    )
    trainer(tmp_path, objective=Objective(network, loss)).run()
    with pytest.raises(ValueError, match="configuration"):
        trainer(tmp_path, objective=Objective(network, weighted))
    smoothed = torch.nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)
    with pytest.raises(ValueError, match="configuration"):
        trainer(tmp_path, objective=Objective(network, smoothed))


@each_kind
def test_other_cases_get_perturbations_without_touching_bank_or_network(tmp_path, make):
    fit = make(tmp_path)
    fit.run()
    before, weights = fit.bank.revision, [w.clone() for w in fit.objective.network.state_dict().values()]
    larger = [tuple(size + 1 for size in fact.shape[1:]) for fact in fit.cases.facts]
    others = volumes(len(larger[0]), 4, shapes=larger) if fit.cases.voxelwise else cases(4, shapes=larger)
    deltas = fit.perturb(others)
    for item in others:
        delta = deltas[item["image"].meta["sample_id"]]
        assert delta.shape == item["image"].shape and delta.any()
    assert len(deltas) == 4 and fit.bank.revision == before
    assert all(map(torch.equal, weights, fit.objective.network.state_dict().values()))
    assert all(torch.equal(delta, deltas[name]) for name, delta in fit.perturb(others).items())


def test_progress_tells_the_time_of_surrogate_and_perturbations_apart(tmp_path, monkeypatch):
    shown, open_bars = [], set()

    def bar(items, doing):
        assert not open_bars, "a terminal shows one bar at a time"
        open_bars.add(doing)
        try:
            for item in items:
                shown.append(doing)
                yield item
        finally:
            open_bars.discard(doing)

    monkeypatch.setattr("monai_salm.engines.trainer.track", bar)
    fit = trainer(tmp_path, rounds=2, steps=3)
    groups = len(fit.cases.batches(fit.batch_size))
    fit.run()
    assert shown == (["training the surrogate"] * 3 + ["perturbing"] * groups) * 2
    stopped = trainer(tmp_path / "stopped", rounds=2, steps=3)
    stopped.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: stopped.terminate())
    stopped.run()
    assert not open_bars


@each_kind
def test_a_control_is_the_same_fit_from_its_beginning_with_a_random_mask(tmp_path, make):
    fit, options = make(tmp_path), {"ratio": 0.4} if make is trainer else {"ratio": 0.3, "scope": "class"}
    controls = [with_random_mask(fit, tmp_path / "before.sqlite")]
    fit.run()
    controls.append(with_random_mask(fit, tmp_path / "after.sqlite"))
    random = SALM(mask=SparsityMask(**options, criterion="random"), steps=2)
    controls.append(make(tmp_path / "said", **{"perturbation" if make is trainer else "method": random}))
    for control in controls:
        control.run()
    assert len({control.bank.revision for control in controls}) == 1 and fit.perturbation.mask.criterion == "gradient"
    marker = voxel_trainer(tmp_path / "marker", method=LabelMarker())
    assert with_random_mask(marker, tmp_path / "control.sqlite") is None, "it has no mask that could be random"


def test_settings_are_free_until_a_round_is_complete(tmp_path):
    trainer(tmp_path)  # only made
    fit = trainer(tmp_path, steps=3)
    fit.optimizer.param_groups[0]["lr"] = fit.base_rates[0] = 1e30
    with pytest.raises(ValueError, match="lower the learning rate"):
        fit.run()
    trainer(tmp_path, steps=4).run()
    assert trainer(tmp_path, steps=4).bank.finished
    with pytest.raises(ValueError, match="configuration"):
        trainer(tmp_path, steps=3)


def test_each_iteration_has_a_loss_also_where_nothing_is_trained(tmp_path):
    losses = []
    fit = trainer(tmp_path, surrogate_steps=0, rounds=2)
    fit.add_event_handler(Events.ITERATION_COMPLETED, lambda: losses.append(float(fit.state.output[0]["loss"])))
    fit.run()
    assert losses == [0.0, 0.0]


def test_a_dataset_that_changes_at_every_reading_is_refused(tmp_path):
    flip = RandFlipd("image", prob=0.5)
    for transform, name in ((flip, "RandFlipd"), (Compose([Compose([flip])]), "RandFlipd"), (OneOf([flip]), "OneOf")):
        with pytest.raises(ValueError, match=f"{name} changes an image at every reading"):
            trainer(tmp_path, Dataset(cases(), transform))
    steady = Compose([Compose([Lambdad("image", lambda image: image)])])
    trainer(tmp_path, CacheDataset(cases(), steady, progress=False))


def test_bad_datasets_are_named(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        trainer(tmp_path, dataset=[])
    with pytest.raises(ValueError, match="only once"):
        trainer(tmp_path, dataset=cases(2) + cases(2))
    with pytest.raises(ValueError, match="device 'cuda:99' cannot be used"):
        trainer(tmp_path, device="cuda:99")
    unsized = Surrogate(SmallCNN(2, 1, 2, (4, 8)))
    with pytest.raises(ValueError, match="spatial_size"):
        trainer(tmp_path, objective=Objective(unsized, nn.CrossEntropyLoss(reduction="none")))
    with pytest.raises(ValueError, match="1 or more"):
        trainer(tmp_path, rounds=0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rounds": 0}, "rounds is 0; it must be a whole number, 1 or more"),
        ({"rounds": 10**21}, "rounds is 10+; it must be a whole number, 1 or more and at most 1e"),
        ({"batch_size": None}, "batch_size is None; it must be a whole number, 1 or more"),
        ({"batch_size": float("inf")}, "batch_size is inf; it must be a whole number"),
        ({"surrogate_steps": -3}, "surrogate_steps is -3; it must be a whole number, 0 or more"),
        ({"surrogate_steps": float("nan")}, "surrogate_steps is nan; it must be a whole number"),
        ({"seed": None}, "seed is None; it must be a whole number"),
        ({"seed": 2.5}, "seed is 2.5; it must be a whole number"),
    ],
)
def test_numbers_out_of_range_are_told_before_anything_is_written(tmp_path, options, told):
    with pytest.raises(ValueError, match=told):
        trainer(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_numbers_may_be_those_of_an_array_or_a_tensor(tmp_path):
    plain = {"seed": 3, "batch_size": 4, "surrogate_steps": 3, "rounds": 2}
    size, rate = np.array([12, 12]), torch.tensor(1e-2)
    fits = [trainer(tmp_path / "plain", **plain)]
    network = Surrogate(SmallCNN(2, 1, 2, (4, 8)), size)
    network.load_state_dict(fits[0].objective.network.state_dict())
    objective = Objective(network, nn.CrossEntropyLoss(reduction="none"), view=RandomView(2))
    optimizer = torch.optim.Adam(network.parameters(), rate)
    options = {name: np.int64(value) for name, value in plain.items()}
    fits.append(trainer(tmp_path / "array", objective=objective, optimizer=optimizer, **options))
    for fit in fits:
        fit.run()
    assert fits[0].bank.revision == fits[1].bank.revision


@pytest.mark.parametrize("most", [None, 0])
def test_the_order_of_the_labels_does_not_decide_which_class_has_which_code(tmp_path, monkeypatch, most):
    if most is not None:  # as of images so large that this many voxels are none of them
        monkeypatch.setattr("monai_salm.engines.cases.EXAMPLES", most)
    generator = torch.Generator().manual_seed(0)
    wave = 3 * torch.sin(torch.arange(32) * torch.pi / 2).expand(32, 32)
    cohorts = {False: [], True: []}
    for at in range(80):
        noise = 128 + 12 * torch.randn(1, 32, 32, generator=generator)
        image = (noise + (wave.T, wave)[at % 2]).round().to(torch.uint8)
        for other, cohort in cohorts.items():
            cohort.append({"image": stored(image, f"case-{at}"), "label": (at + other) % 2})
    surrogate = Surrogate(SmallCNN(2, 1, 2, (4, 8)), (32, 32))
    objective = Objective(surrogate, nn.CrossEntropyLoss(reduction="none"))
    fits = [trainer(tmp_path / str(at), cohorts[at], objective=copy.deepcopy(objective)) for at in (False, True)]
    codes, reversed_ = (fit.samples.codes.diff(dim=2).abs().mean((1, 2, 3)) for fit in fits)
    assert codes[0] < codes[1] / 4 and reversed_[1] < reversed_[0] / 4, (
        "horizontal waves get vertical ones, and vice versa"
    )


def test_of_many_cases_those_that_tell_which_class_gets_which_code_are_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.setattr("monai_salm.engines.cases.EXAMPLES", 0)
    fit, read = trainer(tmp_path, cases(60)), []
    unit = fit.cases.unit
    monkeypatch.setattr(fit.cases, "unit", lambda at: read.append(at) or unit(at))
    assert len(fit.samples.codes) == 2
    assert read == [*range(0, 60, 8), *range(1, 60, 8)], "slices of one patient are neighbors"


def test_a_cohort_of_one_class_can_be_fitted(tmp_path):
    fit = trainer(tmp_path, cases(label=lambda at: 0), rounds=1)
    fit.run()
    assert fit.bank.finished and len(fit.samples.codes) == 1


@pytest.mark.parametrize("error", [ValueError("Jane Doe"), OSError(28, "Full", "Jane Doe"), Killed("Jane Doe")])
def test_an_error_is_told_by_who_called_the_fit_and_by_no_log(tmp_path, caplog, error):
    def fail() -> None:
        raise error

    handlers = [StatsHandler(iteration_log=False, epoch_log=False, name=name) for name in ("monai_salm", None)]
    for round_, handler in enumerate(handlers):
        fit = trainer(tmp_path / str(round_), train_handlers=[handler])
        fit.add_event_handler(Events.EPOCH_STARTED, fail)
        with caplog.at_level("INFO"), pytest.raises(type(error), match="Jane Doe") as caught:
            fit.run()
        assert caught.value is error
    fit.logger.warning("something else")
    assert not [record for record in caplog.records if record.exc_info or "Jane Doe" in record.getMessage()]
    assert caplog.messages[-1] == "something else"
