# SPDX-License-Identifier: Apache-2.0
"""The trainer: determinism, resume with equal bytes, best so far, cases of different shapes."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Events
from monai.data import CacheDataset, Dataset, MetaTensor
from monai.handlers import EarlyStopHandler, StatsHandler
from monai.transforms import Compose, Lambdad, OneOf, RandFlipd
from torch import nn

from monai_salm.engines import PerturbationTrainer
from monai_salm.engines.cases import Cases, Patches
from monai_salm.engines.control import with_random_mask
from monai_salm.perturbations.base import Objective
from monai_salm.perturbations.budget import Budget
from monai_salm.perturbations.classwise import ClasswiseErrorMinimizing
from monai_salm.perturbations.markers import LabelMarker
from monai_salm.perturbations.masks import SparsityMask
from monai_salm.perturbations.salm import SALM
from monai_salm.perturbations.voxels import IGNORED, VoxelObjective
from monai_salm.stored import SliceScaling, StoredCodec, lattice_of
from monai_salm.surrogates import PaddedNetwork, RandomView, SmallCNN, Surrogate, TextureReader


class Killed(BaseException):
    """Stands for a kill between two rounds."""


def stored(image: torch.Tensor, name: str, codec: StoredCodec | None = None) -> MetaTensor:
    """A stored image as LoadStored gives it."""
    codec = codec or StoredCodec("uint8", (0.0, 255.0))
    return MetaTensor(image, meta={"sample_id": name, "stored_codec": codec.to_meta(), "intensity": "stored"})


def cases(count: int = 10, shapes=((12, 12), (10, 14)), label=lambda at: at % 2) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    items = []
    for at in range(count):
        image = torch.randint(120, 136, (1, *shapes[at % len(shapes)]), generator=generator).to(torch.uint8)
        items.append({"image": stored(image, f"case-{at}"), "label": label(at)})
    return items


def trainer(folder, dataset=None, rounds=3, steps=2, **options) -> PerturbationTrainer:
    torch.manual_seed(0)
    surrogate = Surrogate(SmallCNN(2, 1, 2, (4, 8)), (12, 12))
    given = {
        "objective": Objective(surrogate, nn.CrossEntropyLoss(reduction="none"), view=RandomView(2)),
        "device": "cpu",
        "max_epochs": rounds,
        "surrogate_steps": 3,
        "batch_size": 4,
        "perturbation": SALM(mask=SparsityMask(ratio=0.4), steps=steps),
        "budget": "8/255",
    } | options
    given.setdefault("optimizer", torch.optim.Adam(given["objective"].network.parameters(), 1e-2))
    return PerturbationTrainer(
        dataset=cases() if dataset is None else dataset, bank_file=folder / "bank.sqlite", **given
    )


VOLUMES = {2: ((14, 12), (10, 16), (6, 7)), 3: ((10, 8, 7), (8, 9, 10), (12, 6, 1))}


def volumes(dims: int, count: int = 7, classes: int = 3, shapes=None) -> list[dict]:
    """Cases with voxel labels; the last one has no foreground."""
    items = cases(count, shapes or VOLUMES[dims])
    for at, item in enumerate(items):
        label = torch.zeros(item["image"].shape, dtype=torch.uint8)
        for index in range(1, classes if at < count - 1 else 1):
            label[(..., *[slice(2 * index, 2 * index + 2), slice(3, 6), slice(0, 3)][:dims])] = index
        item["label"] = MetaTensor(label, meta={"sample_id": item["image"].meta["sample_id"]})
    return items


def segmenter(dims: int, classes: int = 3, guarded: bool = False) -> Surrogate:
    torch.manual_seed(0)
    conv, norm = ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[dims - 2]

    def network() -> nn.Module:
        layers = [conv(1, 6, 3, padding=1), norm(6), nn.ReLU(), conv(6, classes, 3, padding=1)]
        return PaddedNetwork(nn.Sequential(*layers), 2)

    return Surrogate(network(), guard=network() if guarded else None)


def voxel_trainer(
    folder, dims=2, dataset=None, steps=2, tile=8, halo=2, method=None, surrogate=None, guard=0.0, axes=None, **options
):
    surrogate = surrogate or segmenter(dims, guarded=guard > 0)
    given = {"view": RandomView(dims), "tile_size": (tile,) * (axes or dims), "halo": halo, "guard_weight": guard}
    options["objective"] = VoxelObjective(surrogate, nn.CrossEntropyLoss(reduction="none"), **given)
    options["perturbation"] = method or SALM(mask=SparsityMask(ratio=0.3, scope="class"), steps=steps)
    return trainer(folder, volumes(dims) if dataset is None else dataset, rounds=2, **options)


class Kill:
    """Ends a fit before its second round, or within it."""

    def __init__(self, event: Events, at: int) -> None:
        self.event, self.at = event, at

    def attach(self, engine):
        engine.add_event_handler(self.event(once=self.at), self)

    def __call__(self, engine):
        raise Killed


EACH_KIND = {"classes": trainer, "slices": voxel_trainer, "volumes": partial(voxel_trainer, dims=3)}
each_kind = pytest.mark.parametrize("make", EACH_KIND.values(), ids=EACH_KIND)


@each_kind
def test_equal_seeds_give_equal_banks_and_others_do_not(tmp_path, make):
    banks = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit = make(tmp_path / name, seed=seed)
        fit.run()
        banks.append(fit.bank.revision)
    assert banks[0] == banks[1] != banks[2]


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


def test_nothing_is_perturbed_by_a_surrogate_that_was_not_fitted(tmp_path):
    with pytest.raises(ValueError, match="call run"):
        trainer(tmp_path).perturb(cases(1))


def test_a_finished_fit_is_not_repeated_but_restores_its_model(tmp_path):
    trainer(tmp_path).run()
    again = trainer(tmp_path, model_file=tmp_path / "model.pt")
    again._iteration = None  # would fail if it were called
    again.run()
    assert (tmp_path / "model.pt").stat().st_mode & 0o777 == 0o600, "the surrogate is for its owner alone"


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


class TestVoxelLabels:
    """The same trainer, where every voxel has a label."""

    @pytest.mark.parametrize("dims", [2, 3])
    def test_every_volume_is_perturbed_on_its_own_grid_within_budget_and_ratio(self, tmp_path, dims):
        fit = voxel_trainer(tmp_path, dims)
        fit.run()
        for item in volumes(dims):
            image, label = item["image"], item["label"].as_tensor()
            delta = fit.bank.load(image.meta["sample_id"], image)
            assert delta.shape == image.shape and delta.dtype == torch.int8 and delta.abs().max() <= 8
            for index in label.unique():
                of_class = delta[label == index] != 0
                assert 0 < int(of_class.sum()) <= max(1, round(0.3 * len(of_class)))

    @pytest.mark.parametrize("change", [{"tile": 6}, {"halo": 1}, {"patch_size": np.array([7, 7])}, {"guard": 0.1}])
    def test_another_setting_of_voxel_labels_on_the_same_bank_is_refused(self, tmp_path, change):
        voxel_trainer(tmp_path).run()
        with pytest.raises(ValueError, match="configuration"):
            voxel_trainer(tmp_path, **change)

    def test_the_guard_learns_the_task_from_clean_images(self, tmp_path):
        dataset, losses = volumes(2, classes=2), []
        for item in dataset:  # bright where labeled
            item["image"][item["label"] == 1] = item["image"].max()
        for steps in (1, 80):
            fit = voxel_trainer(tmp_path / f"{steps}", 2, dataset, guard=0.5, surrogate_steps=steps, max_epochs=1)
            fit.run()
            image, label, _ = fit.cases.read([0], fit.budget)
            fit.objective.eval()
            losses.append(float(fit.objective.guard_loss(image, label, fit._generator("test")).detach()))
        assert losses[1] < 0.7 * losses[0]
        with_guard = fit.passes_per_image
        without = voxel_trainer(tmp_path / "none", 2, dataset, surrogate_steps=80, max_epochs=1)
        without.run()
        assert with_guard == {name: 2 * passes for name, passes in without.passes_per_image.items()}

    def test_a_texture_reader_starts_with_pieces_of_the_codes(self, tmp_path):
        surrogate = Surrogate(TextureReader(2, 1, 3, features=6, kernel_size=3))
        begun = voxel_trainer(tmp_path, surrogate=surrogate, halo=3)
        codes = begun.samples.codes
        pieces = codes.unfold(2, 3, 1).unfold(3, 3, 1).flatten(0, 3).flatten(1)
        pieces = pieces - pieces.mean(1, keepdim=True)
        pieces = pieces / pieces.norm(dim=1, keepdim=True)
        filters = surrogate.network.filters[0].weight.detach().flatten(1)
        assert torch.allclose((pieces @ filters[0::2].T).amax(0), torch.ones(3), atol=1e-5)
        assert torch.allclose(filters[0::2], -filters[1::2])

    @pytest.mark.parametrize("options", [{"patch_size": (8, 8, 8)}, {"tile": 8, "axes": 3}])
    def test_sizes_of_other_axes_are_told_before_anything_is_trained(self, tmp_path, options):
        name = "patch_size" if "patch_size" in options else "tile_size"
        with pytest.raises(ValueError, match=rf"{name} is \(8, 8, 8\); it must have 2 numbers"):
            voxel_trainer(tmp_path, **{"patch_size": (8, 8)} | options)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("size", [0, (8, 0), (8.5, 8), "88", (None, 8)])
    def test_what_is_no_size_of_a_patch_is_told(self, tmp_path, size):
        with pytest.raises(ValueError, match="patch_size is "):
            voxel_trainer(tmp_path, patch_size=size)

    def test_an_objective_without_tiles_is_told_to_name_a_patch(self, tmp_path):
        objective = Objective(segmenter(2), nn.CrossEntropyLoss(reduction="none"))
        with pytest.raises(ValueError, match="VoxelObjective, or a patch_size"):
            trainer(tmp_path, volumes(2), objective=objective)

    def test_other_labels_are_another_fit(self, tmp_path):
        voxel_trainer(tmp_path).run()
        other = volumes(2)
        other[0]["label"][0, 0, 0] = 1
        with pytest.raises(ValueError, match="configuration"):
            voxel_trainer(tmp_path, dataset=other)

    def test_cases_without_any_foreground_can_be_fitted(self, tmp_path):
        fit = voxel_trainer(tmp_path, dataset=volumes(2, 3, classes=1))
        fit.run()
        assert fit.bank.finished and fit.cases.n_classes == 1

    @pytest.mark.parametrize("transplant", [True, False])
    def test_the_perturbation_tells_the_surrogate_the_classes(self, tmp_path, transplant):
        dataset = volumes(2, 12, classes=2, shapes=((14, 12),))
        options = {"max_epochs": 3, "surrogate_steps": 60, "transplant": transplant}
        fit = voxel_trainer(tmp_path, dataset=dataset, steps=8, tile=12, **options)
        fit.run()
        assert fit.scores[-1] < 0.6  # ln 2 = 0.69 without any information, two classes of equal weight

    def test_a_method_that_follows_the_label_goes_through_the_same_fit(self, tmp_path):
        fit = voxel_trainer(tmp_path, method=LabelMarker(cell=1))
        fit.run()
        for item in volumes(2):
            delta = fit.bank.load(item["image"].meta["sample_id"], item["image"])
            assert torch.equal(delta != 0, item["label"].as_tensor() > 0)

    @pytest.mark.parametrize("shape", [(1, 13, 12), (1, 12, 14), (2, 14, 12), (14, 12)])
    def test_image_and_labels_of_different_shape_are_refused(self, tmp_path, shape):
        dataset = volumes(2, 2)
        dataset[0]["label"] = torch.zeros(shape, dtype=torch.uint8)
        with pytest.raises(ValueError, match="differ in shape") as refusal:
            voxel_trainer(tmp_path, dataset=dataset)
        assert "case-0" in str(refusal.value)
        assert "(1, 14, 12)" in str(refusal.value) and str(shape) in str(refusal.value)


def patches(image: torch.Tensor, label: torch.Tensor, size: tuple[int, ...], *, coded: bool = False) -> Patches:
    dataset = [{"image": stored(image, "one"), "label": label}]
    return Patches(Cases(dataset, Budget.parse("8/255"), torch.device("cpu")), size, coded=coded, seed=0)


def numbered(size: tuple[int, ...]) -> torch.Tensor:
    """Intensities that tell where a voxel lies, all above 0."""
    count = torch.tensor(size).prod()
    return (1 + torch.arange(count) % 250).reshape(1, *size).to(torch.uint8)


class TestPatches:
    @settings(max_examples=60, deadline=None)
    @given(
        st.integers(2, 3).flatmap(lambda n: st.tuples(*[st.lists(st.integers(1, 9), min_size=n, max_size=n)] * 2)),
        st.integers(0, 1000),
    )
    def test_they_are_cut_alike_and_padding_has_no_label(self, sizes, seed):
        volume, size = map(tuple, sizes)
        generator = torch.Generator().manual_seed(seed)
        image = numbered(volume)
        label = torch.randint(0, 3, image.shape, generator=generator, dtype=torch.uint8)
        delta = image.to(torch.int16)
        seen, moved, truth = patches(image, label, size).sample(0, delta, generator)
        assert seen.shape == moved.shape == truth.shape == (1, *size)
        inside = truth != IGNORED
        assert int(inside.sum()) == torch.tensor([min(pair) for pair in zip(volume, size, strict=True)]).prod()
        assert not seen[~inside].any() and not moved[~inside].any()
        assert torch.allclose(seen, moved) and (seen[inside] > 0).all()
        kept = [min(pair) for pair in zip(volume, size, strict=True)]
        windows = label[0]
        values = image[0]
        for axis, length in enumerate(kept):
            windows, values = windows.unfold(axis, length, 1), values.unfold(axis, length, 1)
        cut = (255 * seen[inside]).round().to(torch.uint8)
        same = (windows.reshape(-1, cut.numel()) == truth[inside]) & (values.reshape(-1, cut.numel()) == cut)
        assert same.all(1).any()

    def test_a_smaller_volume_lies_in_the_middle(self):
        image = numbered((3, 5))
        seen, _, truth = patches(image, torch.ones_like(image), (8, 8)).sample(0, None, torch.Generator())
        assert torch.equal((255 * seen[0, 3:6, 2:7]).round().to(torch.uint8), image[0])
        assert (truth[0, 3:6, 2:7] == 1).all() and int((truth == IGNORED).sum()) == 64 - 15

    @pytest.mark.parametrize("shape", [(40, 30), (20, 24, 22), (40, 30, 1)])
    def test_most_lie_around_a_labeled_voxel_at_any_place_of_them(self, shape):
        image = numbered(shape)
        label = torch.zeros_like(image)
        place = [length // 3 for length in shape]
        label[(0, *place)] = 2
        cutter, generator = patches(image, label, (8,) * len(shape)), torch.Generator().manual_seed(0)
        places = []
        for _ in range(200):
            truth = cutter.sample(0, None, generator)[2]
            if (truth == 2).any():
                places.append((truth == 2).nonzero()[0, 1:])
        share = (8 / torch.tensor(shape).clamp(min=8)).prod()
        assert 0.65 < len(places) / 200 < 0.85 + float(share)
        found = torch.stack(places)
        assert all(len(found[:, axis].unique()) > 5 for axis, length in enumerate(shape) if length > 8)

    def test_a_volume_without_labels_is_cut_anywhere(self):
        image = numbered((30, 30))
        cutter, generator = patches(image, torch.zeros_like(image), (4, 4)), torch.Generator().manual_seed(0)
        corners = {float(cutter.sample(0, None, generator)[0][0, 0, 0]) for _ in range(50)}
        assert len(corners) > 20

    def test_codes_stand_in_each_class_but_not_outside_of_the_image(self):
        image = numbered((12, 12))
        label = torch.zeros_like(image)
        label[0, 2:6], label[0, 8:] = 1, 2
        cutter, generator = patches(image, label, (16, 16), coded=True), torch.Generator().manual_seed(0)
        amplitudes = set()
        for _ in range(20):
            _, delta, truth = cutter.sample(0, None, generator)
            assert torch.equal(delta != 0, truth != IGNORED)
            amplitude = delta.abs().max()
            assert torch.allclose(delta[delta != 0].abs(), amplitude) and 1 <= float(amplitude) * 255 / 8 <= 4.001
            amplitudes.add(float(amplitude))
        assert len(amplitudes) > 10


def sliced_cases(count: int = 6) -> list[dict]:
    """Volumes of three slices with slopes of their own, the brightest slice with the finest steps."""
    generator = torch.Generator().manual_seed(0)
    slices = SliceScaling(2, (0.05, 0.1, 0.5), (0.0, 0.0, 10.0))
    codec = StoredCodec("int16", (0.0, 200.0), 0.05, slices=slices)
    items = []
    for at in range(count):
        physical = 60 + 20 * torch.rand((1, 8, 9, 3), generator=generator)
        image = (physical / torch.tensor([0.05, 0.1, 0.5])).round().to(torch.int16)
        items.append({"image": stored(image, f"case-{at}", codec), "label": at % 2})
    return items


def test_fit_of_volumes_whose_slices_are_scaled_differently_uses_each_slices_own_bound(tmp_path):
    dataset = sliced_cases()
    surrogate = Surrogate(SmallCNN(3, 1, 2, (4, 8)), (8, 8, 3))
    objective = Objective(surrogate, nn.CrossEntropyLoss(reduction="none"), view=RandomView(3))
    method = SALM(mask=SparsityMask(ratio=0.5), steps=2, step_size=1.0)
    fit = trainer(tmp_path, dataset, rounds=1, objective=objective, perturbation=method, budget="2 physical")
    fit.run()
    for item in dataset:
        delta = torch.as_tensor(fit.bank[item["image"].meta["sample_id"]]).abs()
        assert delta.amax((0, 1, 2)).tolist() == [40, 20, 4]  # floor(2 / slope)


def test_patches_of_such_volumes_are_read_by_the_slices_that_they_lie_in():
    dataset = sliced_cases()
    for item in dataset:
        item["label"] = (torch.arange(8 * 9 * 3).reshape(1, 8, 9, 3) % 3 == 0).to(torch.uint8)
    patches = Patches(Cases(dataset, Budget.parse("2 physical"), torch.device("cpu")), (4, 4, 2), coded=True, seed=0)
    steps = {"case-0": torch.full((1, 8, 9, 3), 4, dtype=torch.int16)}
    for seed in range(4):
        image, delta, _ = patches([0], steps, torch.Generator().manual_seed(seed))
        assert 0.29 < float(image.min()) and float(image.max()) < 0.46  # 60..80, and 10 more in one slice, of 200
        change = {round(float(each) * 200, 3) for each in delta.unique()}
        assert change in ({0.2, 0.4}, {0.4, 2.0})  # four steps of two neighboring slopes


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
