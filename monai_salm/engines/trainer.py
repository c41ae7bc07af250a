# SPDX-License-Identifier: Apache-2.0
"""The fit: a surrogate and the perturbations of a whole cohort, trained in turn, as a MONAI trainer."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import Trainer
from monai.utils import CommonKeys
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import Dataset

from monai_salm import __version__
from monai_salm.bank import PerturbationBank
from monai_salm.engines.cases import Cases, Steps, derive, generator_of, samples_of
from monai_salm.engines.errors import leave_to_the_caller
from monai_salm.engines.kept import UnfinishedRound, load_weights, save_weights
from monai_salm.errors import check_number
from monai_salm.perturbations.base import Objective, Perturbation
from monai_salm.perturbations.budget import Budget
from monai_salm.records import Record, as_array, smallest_type
from monai_salm.release.progress import track
from monai_salm.surrogates import TextureReader

KEPT_EVERY_S = 20.0
"""Seconds between two writes of an unfinished round's perturbations; a killed run loses those since the last one."""


class PerturbationTrainer(Trainer):
    """Alternates surrogate steps and perturbation steps over a cohort.

    An epoch is a round: ``surrogate_steps`` optimizer steps, then one call of the perturbation for every case, so that
    in the end every perturbation belongs to the final surrogate. Each round is one transaction of the bank, with all
    that is needed to go on: a run that was killed goes on from there and ends with the same bytes (on the same CPU and
    versions); the bank alone does that, a ``CheckpointLoader`` does not. Everything random in the fit is drawn from
    ``seed`` and the position in the run, so no generator state is kept; the network's initial weights are the caller's
    (``monai.utils.set_determinism`` before it is built).

    A handler that terminates the fit at the end of a round, such as MONAI's ``EarlyStopHandler``, makes that round the
    result. Within a round nothing is the result: the next run goes on from the last complete one.

    With ``transplant`` the surrogate sees the perturbation of one case on the image of another and has to tell the
    former's class: nothing but the perturbation can help. In the first round, when there are none, it learns to read
    :py:func:`monai_salm.perturbations.codes.class_codes`. Without, it is trained on the protected images themselves,
    and the first perturbations are zero: error-minimizing noise as published (arXiv 2101.04898).

    Args:
        device: where to compute.
        max_epochs: rounds at most.
        dataset: items ``{"image": stored values from LoadStored, "label": class index}``, or with (1, *spatial) class
            indices from LoadMask for voxel labels. Shapes may differ; nothing random may be in its transform.
        objective: surrogate, loss and views; its network is trained here.
        optimizer: of the surrogate's parameters. Each round warms its learning rate up and lets it fall to 0, so that a
            schedule of yours would have no effect.
        perturbation: the method, such as :py:class:`monai_salm.perturbations.salm.SALM`.
        budget: largest change of a voxel, see :py:meth:`Budget.parse`.
        bank_file: where the perturbations go (SQLite); an unfinished fit there is continued.
        surrogate_steps: optimizer steps in a round; 0 for methods that ask no network, or one that knows enough.
        batch_size: images per step of either kind. Where whole images have labels, a GPU perturbs more at once, as many
            as :py:data:`monai_salm.engines.cases.VOXELS_AT_ONCE` allows: fewer, larger steps.
        patch_size: with voxel labels, voxels per axis of what the surrogate trains on; default: the objective's tile.
        transplant: train the surrogate on perturbations moved to other images, see above.
        seed: of everything random; the secret of the release.
        model_file: where the final surrogate's weights go; None: nowhere.
        surrogate_file: weights of an earlier fit, as ``model_file`` has them. The surrogate is then used as it is, with
            ``surrogate_steps`` or not: each round only makes perturbations, so that further cases are protected alike.
        train_handlers: ignite handlers; every iteration puts ``[{"loss": ...}]`` in ``state.output``, 0 where the
            surrogate is not trained, or an earlier run has done it.

    Raises:
        ValueError: When a number is out of range, the dataset is empty or random, an id occurs twice, the budget does
            not fit an image, or the bank holds a fit with another configuration; when the surrogate has no
            ``spatial_size`` and whole images have labels; when the weights are not of this network, and when the device
            cannot be used.
    """

    interrupt_resume_enabled = False  # ignite's way to go on within a round, which is ours only at its beginning

    def __init__(
        self,
        *,
        device: torch.device | str,
        max_epochs: int,
        dataset: Dataset,
        objective: Objective,
        optimizer: Optimizer,
        perturbation: Perturbation,
        budget: Budget | str | float,
        bank_file: str | os.PathLike[str],
        surrogate_steps: int = 20,
        batch_size: int = 32,
        patch_size: Sequence[int] | None = None,
        transplant: bool = True,
        seed: int = 0,
        model_file: str | os.PathLike[str] | None = None,
        surrogate_file: str | os.PathLike[str] | None = None,
        train_handlers: Sequence[Any] | None = None,
    ) -> None:
        for name, value in (("rounds", max_epochs), ("batch_size", batch_size)):
            check_number(name, value, least=1, most=1e9, whole=True)
        check_number("surrogate_steps", surrogate_steps, least=0, most=1e9, whole=True)
        check_number("seed", seed, whole=True)
        max_epochs, batch_size, surrogate_steps, seed = map(int, (max_epochs, batch_size, surrogate_steps, seed))
        self.untrained = copy.deepcopy((objective, optimizer))
        self.objective, self.optimizer, self.perturbation = objective, optimizer, perturbation
        self.budget, self.batch_size, self.seed = Budget.parse(budget), batch_size, seed
        self.model_file, self.transplant, self.patch_size = model_file, transplant, patch_size
        self.surrogate_steps = surrogate_steps
        self.base_rates = [float(group["lr"]) for group in optimizer.param_groups]
        check_number("learning_rate", min(self.base_rates), above=0, most=1000)
        self._compute_device, self.surrogate_file = _usable(device), surrogate_file
        self.trains = surrogate_steps > 0 and surrogate_file is None
        if surrogate_file is not None:
            load_weights(self.objective.network, Path(surrogate_file))
        self.objective.to(self._compute_device)
        self.cases = Cases(dataset, self.budget, self._compute_device)
        self._steps = Steps(len(self.cases), batch_size, seed)
        super().__init__(
            device=self._compute_device,
            max_epochs=max_epochs,
            data_loader=self._steps,
            epoch_length=surrogate_steps if self.trains else 1,  # a round needs a step: without training, an idle one
            decollate=False,
        )
        leave_to_the_caller(self)
        self.samples = samples_of(self.cases, objective, patch_size, coded=transplant, seed=derive(seed, "codes"))
        Path(bank_file).parent.mkdir(parents=True, exist_ok=True)
        fingerprint = self.fingerprint()
        self.bank = PerturbationBank(bank_file, fingerprint=fingerprint, create=True)
        self._unfinished = UnfinishedRound(self.bank.path.with_suffix(".unfinished"), fingerprint)
        self.scores: list[float] = []
        self.surrogate_passes = self.perturbation_passes = 0
        self.seconds = 0.0
        self._bar = track(range(0), "")
        self._prime()
        self.perturbation.learned = None  # a method may come from another fit
        self._initial: dict[str, Any] = {}
        self._restore()
        self.add_event_handler(Events.EPOCH_STARTED, self._begin_round)
        self.add_event_handler(Events.EPOCH_COMPLETED, self._end_round)
        self._register_handlers(train_handlers or ())  # after ours, so that they see the round's loss

    def run(self) -> None:  # type: ignore[override]  # as in MONAI's trainers
        """Fit from what an earlier run has done to the end; returns at once when the bank is finished."""
        fitting = not self.bank.finished
        if fitting:
            self._fit()
        if not self.bank.finished:  # a handler ended it
            return
        self._unfinished.clear()
        if self.model_file is not None and (fitting or not Path(self.model_file).is_file()):
            save_weights(self.objective.network, Path(self.model_file))

    def _fit(self) -> None:
        if self._initial:  # an earlier run of this object did not end
            self._restore()
        else:
            self._initial = copy.deepcopy(self._state())
        self._kept = self._unfinished.read(self.state.epoch + 1, self._compute_device)
        if self._kept:
            self._load(self._kept[0], self.state.epoch)
        try:
            super().run()
        finally:
            self._bar.close()  # a handler may have ended the round
        if not self.bank.finished and 0 < self.state.epoch == len(self.scores):
            self._commit(final=True)

    def perturb(self, dataset: Dataset) -> dict[str, Tensor]:
        """Perturbations of other cases by the frozen surrogate, from none in as many calls as a case had in the fit.

        Neither the surrogate nor the bank changes.

        Args:
            dataset: items as for the fit.

        Returns:
            (C, *spatial) integer lattice steps by sample id.

        Raises:
            ValueError: When there was no fit yet.
        """
        if not self.state.epoch:
            raise ValueError("nothing was fitted that other cases could be perturbed by; call run() first")
        cases = Cases(dataset, self.budget, self._compute_device)
        deltas: dict[str, Tensor] = {}
        for call in range(self.state.epoch):
            for batch in track(self._groups(cases), "perturbing"):
                deltas |= self._perturb(cases, batch, deltas, ("other", call))
        return deltas

    @property
    def passes_per_image(self) -> dict[str, float]:
        """Forward and backward passes through the surrogate per image, by purpose."""
        training, perturbing = (n / len(self.cases) for n in (self.surrogate_passes, self.perturbation_passes))
        return {"surrogate_training": training, "perturbation": perturbing, "total": training + perturbing}

    def fingerprint(self) -> str:
        """Digest of all that decides the perturbations: configuration, cases and version."""
        objective = self.objective
        parts: dict[str, Any] = {
            "version": __version__,
            "network": str(objective.network),
            "objective": [_settings(objective.loss), _settings(objective.view), self.transplant],
            "optimizer": [type(self.optimizer).__name__, str(sorted(self.optimizer.defaults.items()))],
            "perturbation": str(self.perturbation),
            "budget": str(self.budget),
            "rounds": [self.state.max_epochs, self.state.epoch_length, self.batch_size, self.seed],
            "cases": [[fact.sample_id, fact.label, fact.digest] for fact in self.cases.facts],
        }
        if self.cases.voxelwise:
            parts["samples"] = [self.samples.size, objective.extra_repr()]
        elif objective.extra_repr():
            parts["options"] = objective.extra_repr()
        if self.surrogate_file is not None:
            parts["surrogate"] = hashlib.sha256(Path(self.surrogate_file).read_bytes()).hexdigest()
        elif not self.trains:
            parts["surrogate"] = "untrained"
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _begin_round(self) -> None:
        torch.manual_seed(derive(self.seed, "round", self.state.epoch))  # dropout and the like
        self.objective.network.train()
        self._bar = track(range(self.state.epoch_length), "training the surrogate")

    def _iteration(self, engine: Any, batchdata: list[int]) -> list[dict[str, Tensor]]:
        """One optimizer step on perturbed images; ``batchdata`` are positions in the dataset."""
        if self._kept or not self.trains:  # an earlier run has trained the surrogate, or nobody does
            return [{CommonKeys.LOSS: torch.zeros(())}]
        started, before = time.monotonic(), self.objective.passes
        generator = self._generator("step", engine.state.iteration)
        clean, delta, label = self.samples(batchdata, self.deltas, generator)
        image = clean
        if self.transplant:
            image = image[torch.randperm(len(image), generator=generator).to(image.device)]
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * self._warmth((engine.state.iteration - 1) % engine.state.epoch_length)
        loss = self.objective(image, delta, label, generator).mean()
        if self.objective.guard_weight:
            loss = loss + self.objective.guard_loss(clean, label, generator).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.surrogate_passes += self.objective.passes - before
        self.seconds += time.monotonic() - started
        next(self._bar, None)
        return [{CommonKeys.LOSS: loss.detach()}]

    def _warmth(self, step: int) -> float:
        """Factor of the learning rate at ``step`` of a round: up over the first fifth, then a cosine down to 0."""
        position = (step + 1) / self.state.epoch_length
        return min(1.0, 5 * position) * (0.5 + 0.5 * math.cos(math.pi * max(0.0, position - 0.2) / 0.8))

    def _end_round(self) -> None:
        """Perturb all cases but those of which an earlier run kept the perturbations, and keep the round."""
        _, done, tally = self._kept or ({}, {}, {})
        self._kept = None
        self.scores.append(self._perturb_all(done, tally))
        self.state.metrics["perturbed_loss"] = self.scores[-1]
        self._commit(final=self.state.epoch == self.state.max_epochs)

    def _perturb_all(self, done: dict[str, Tensor], tally: Mapping[str, float]) -> float:
        """One call of the perturbation for every case that is not done; returns the mean objective on the way."""
        self._bar.close()
        if not done:
            self._unfinished.begin(self.state.epoch, self._state())
        started, before = time.monotonic() - tally.get("seconds", 0.0), self.objective.passes
        self.objective.reset_mean()
        self.perturbation.survey(
            self.objective,
            (self.cases.read(batch, self.budget) for batch in self.cases.batches(self.batch_size)),
            generator=self._generator("survey", self.state.epoch),
        )
        if tally:  # what the survey counts is in it
            before = self.objective.passes - int(tally["passes"])
            self.objective.reset_mean(tally["sum"], int(tally["count"]))
        fresh: dict[str, Tensor] = {}
        written = time.monotonic()
        groups = self._groups(self.cases)
        left = [[at for at in batch if self.cases.facts[at].sample_id not in done] for batch in groups]
        for batch in track([batch for batch in left if batch], "perturbing"):
            fresh |= self._perturb(self.cases, batch, self.deltas, ("round", self.state.epoch))
            if time.monotonic() - written > KEPT_EVERY_S and fresh:
                counted = {"passes": self.objective.passes - before, "seconds": time.monotonic() - started}
                self._unfinished.add(fresh, counted | dict(zip(("sum", "count"), self.objective.tally, strict=True)))
                done |= fresh
                fresh, written = {}, time.monotonic()
        self.deltas |= done | fresh
        self.perturbation_passes += self.objective.passes - before
        self.seconds += time.monotonic() - started
        return self.objective.mean()

    def _groups(self, cases: Cases) -> list[list[int]]:
        """Cases that are perturbed together: each has a perturbation of its own, whatever is beside it."""
        alike = self._compute_device.type == "cpu" or cases.voxelwise
        return cases.batches(self.batch_size if alike else len(cases))

    def _perturb(
        self, cases: Cases, batch: Sequence[int], deltas: Mapping[str, Tensor], position: tuple
    ) -> dict[str, Tensor]:
        """One call of the perturbation for cases of one shape, which goes on from ``deltas`` where they have any."""
        facts = [cases.facts[at] for at in batch]
        image, label, lattice = cases.read(batch, self.budget)
        begin = None
        if facts[0].sample_id in deltas:  # then those of the others are there too
            begin = torch.stack([deltas[fact.sample_id].to(image.device) for fact in facts])
        generator = self._generator(*position, facts[0].sample_id)
        found = self.perturbation(self.objective, image, label, lattice, begin, generator=generator)
        types = (getattr(torch, smallest_type(fact.levels)) for fact in facts)
        return {fact.sample_id: delta.to(kind) for fact, kind, delta in zip(facts, types, found.cpu(), strict=True)}

    def _generator(self, *position: Any) -> torch.Generator:
        return generator_of(self.seed, *position)

    def _state(self) -> dict[str, Any]:
        """What the fit needs to go on from here, besides the perturbations."""
        return {
            "network": self.objective.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scores": self.scores,
            "passes": [self.surrogate_passes, self.perturbation_passes],
            "seconds": self.seconds,
            "learned": self.perturbation.learned,
        }

    def _commit(self, *, final: bool) -> None:
        blob = io.BytesIO()
        torch.save(self._state(), blob)
        self.bank.commit(
            self._records(), round_=self.state.epoch, score=self.scores[-1], state=blob.getvalue(), final=final
        )

    def _records(self) -> Iterator[Record]:
        for fact in self.cases.facts:
            yield Record(fact.sample_id, self.deltas[fact.sample_id], fact.digest, fact.levels, fact.codec.step)

    def _prime(self) -> None:
        reader = self.objective.network.network
        begins = self.surrogate_file is None and self.bank.state() is None
        if self.transplant and begins and isinstance(reader, TextureReader):
            reader.look_for(self.samples.codes, self._generator("prime"))

    def _restore(self) -> None:
        """Everything as the last complete round left it, or as it was before the first."""
        round_, blob = self.bank.state() or (0, b"")
        state = copy.deepcopy(self._initial)
        if round_:
            state = torch.load(io.BytesIO(blob), map_location=self._compute_device, weights_only=True)
        if state:
            self._load(state, round_)
        self.deltas: dict[str, Tensor] = {}
        if round_ and not self.bank.finished:
            self.deltas = {fact.sample_id: self.bank.current(fact.sample_id) for fact in self.cases.facts}

    def _load(self, state: dict[str, Any], round_: int) -> None:
        self.objective.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scores, self.seconds = state["scores"], state["seconds"]
        self.surrogate_passes, self.perturbation_passes = state["passes"]
        self.perturbation.learned = state.get("learned")
        self.state.epoch = round_
        self.state.iteration = round_ * self.state.epoch_length
        self._steps.start = self.state.iteration


def _settings(module: Any) -> str:
    """What decides its outcome, of which its text tells only a part; not whether it trains just now."""
    if not isinstance(module, torch.nn.Module):
        return str(module)
    simple = bool, int, float, str, tuple
    plain = {name: value for name, value in vars(module).items() if isinstance(value, simple) and name != "training"}
    weights = {name: hashlib.sha256(as_array(held).tobytes()).hexdigest() for name, held in module.state_dict().items()}
    return f"{module} {sorted(plain.items())} {sorted(weights.items())}"


def _usable(device: torch.device | str) -> torch.device:
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # what torch raises depends on how it was built
        raise ValueError(f"device {str(device)!r} cannot be used on this machine; use 'cpu', or none") from error
    return torch.device(device)
