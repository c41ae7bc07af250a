# SPDX-License-Identifier: Apache-2.0
"""What ``Perturbation`` promises, for every method of the package, also those that are yet to be written."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil

import pytest
import torch
from lattices import CROSS_ENTROPY, free, gen
from torch import Tensor, nn

from monai_salm import perturbations
from monai_salm.perturbations.base import Batch, Objective, Perturbation
from monai_salm.perturbations.budget import Budget, Lattice
from monai_salm.perturbations.classwise import ClasswiseErrorMinimizing, OnePixelShortcut
from monai_salm.perturbations.masks import SparsityMask
from monai_salm.perturbations.patterns import ClassPattern
from monai_salm.perturbations.robust import RobustObjective
from monai_salm.perturbations.voxels import VoxelObjective
from monai_salm.stored import StoredCodec, lattice_of
from monai_salm.surrogates import PaddedNetwork, RandomView, SmallCNN, Surrogate

FOLLOWS_THE_CLASS = (ClassPattern, OnePixelShortcut)
"""What their perturbations look like depends on the class given, hardly or not at all on the image."""
BLIND = ("ClasswiseNoise", "SeparablePatches", "AutoregressiveNoise", "RandomSign", "LabelMarker", "OnePixelShortcut")
"""They ask no network."""
NOTHING_RANDOM = ("ContourInterior", "LabelMarker", "OnePixelShortcut")
"""Functions of images, labels and network."""


def every_method() -> list[type[Perturbation]]:
    for module in pkgutil.iter_modules(perturbations.__path__, f"{perturbations.__name__}."):
        importlib.import_module(module.name)
    found, ahead = [], [Perturbation]
    while ahead:
        for method in ahead.pop().__subclasses__():
            ahead.append(method)
            public = method.__module__.startswith("monai_salm.") and not method.__name__.startswith("_")
            if public and not inspect.isabstract(method):
                found.append(method)
    return sorted(set(found), key=lambda method: method.__name__)


def build(method: type[Perturbation], *, voxelwise: bool = False, seed: int = 0) -> Perturbation:
    """With a sparse random mask and few steps, where a method has such settings; else as it comes."""
    quick = {"mask": SparsityMask(ratio=0.3, criterion="random"), "steps": 3, "seed": seed}
    quick |= {"count": 2, "num_classes": 3 if voxelwise else 2}
    names = {name for kind in method.__mro__ if kind is not object for name in inspect.signature(kind).parameters}
    return method(**{name: value for name, value in quick.items() if name in names})


each_method = pytest.mark.parametrize("method", every_method(), ids=lambda method: method.__name__)


class Spy(nn.Module):
    """Remembers all perturbations at which the objective was evaluated."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective, self.seen, self.passes = objective, [], 0

    @property
    def network(self) -> nn.Module:
        return self.objective.network

    def forward(self, image: Tensor, delta: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        self.seen.append(delta.detach().clone())
        return self.objective(image, delta, label, generator)

    def gradient(self, image: Tensor, delta: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        self.seen.append(delta.detach().clone())
        return self.objective.gradient(image, delta, label, generator)


class Setting:
    """Two images of classes 0 and 1, or with a class per voxel, a lattice with voxels that may not move, a network."""

    SHAPES = {2: (2, 1, 11, 9), 3: (2, 1, 7, 6, 5)}

    def __init__(self, dims: int, voxelwise: bool, *, robust: bool = False, view: bool = True) -> None:
        torch.manual_seed(0)
        shape = self.SHAPES[dims]
        self.image, self.voxelwise = torch.rand(shape, generator=gen(1)), voxelwise
        lower, upper = (torch.randint(0, 7, shape, generator=gen(at)).to(torch.int16) for at in (2, 3))
        lower[0, :, 0], upper[0, :, 0] = 0, 0
        self.lattice = Lattice(-lower, upper, torch.full((2, *[1] * (dims + 1)), 1 / 255))
        options = {"view": RandomView(dims) if view else None}
        if not voxelwise:
            kind, more = (RobustObjective, {"radius": 2 / 255}) if robust else (Objective, {})
            surrogate = Surrogate(SmallCNN(dims, 1, 2, (4, 4)), [8] * dims)
            self.objective, self.label = kind(surrogate, CROSS_ENTROPY, **options, **more), torch.tensor([0, 1])
            return
        conv, norm = ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[dims - 2]
        layers = nn.Sequential(conv(1, 4, 3, padding=1), norm(4), nn.Dropout(), nn.ReLU(), conv(4, 3, 3, padding=1))
        options |= {"tile_size": (6,) * dims, "halo": 2}
        self.objective = VoxelObjective(Surrogate(PaddedNetwork(layers, 2)), CROSS_ENTROPY, **options)
        self.label = torch.randint(0, 3, shape, generator=gen(3), dtype=torch.uint8)

    def apply(
        self, method: Perturbation, *, start: Tensor | None = None, seed: int = 0, objective: nn.Module | None = None
    ) -> Tensor:
        """Survey and call, as the trainer does."""
        objective = objective or self.objective
        method.survey(objective, iter([Batch(self.image, self.label, self.lattice)]), generator=gen(seed + 100))
        return method(objective, self.image, self.label, self.lattice, start, generator=gen(seed))


def refuses(method: type[Perturbation], dims: int, voxelwise: bool) -> bool:
    """Whether labels of the other kind, or slices, are all that the method takes."""
    by_class = {"PerturbationInducedLinearization"} | {
        kind.__name__ for kind in every_method() if issubclass(kind, FOLLOWS_THE_CLASS)
    }
    by_voxel = {"LabelMarker", "ContourInterior", "SliceSpectrum"}
    return method.__name__ in (by_class if voxelwise else by_voxel) or (method.__name__, dims) == ("SliceSpectrum", 2)


def test_methods_are_found():
    names = {method.__name__ for method in every_method()}
    rivals = {"SeparablePatches", "AutoregressiveNoise", "ClasswiseNoise", "OnePixelShortcut", "ErrorMaximizing"}
    rivals |= {"TargetedAdversarial", "PerturbationInducedLinearization", "ClasswiseErrorMinimizing"}
    assert {"SALM", "RandomSign", "LabelMarker", "ContourInterior", "SliceSpectrum"} | rivals <= names
    assert not {name for name in names if name.startswith("_")} and "ClassPattern" not in names


@pytest.mark.parametrize("kind", ["voxels", "classes", "robust"])
@pytest.mark.parametrize("dims", [2, 3])
@each_method
def test_invariants_hold(method, dims, kind):
    voxelwise = kind == "voxels"
    setting = Setting(dims, voxelwise, robust=kind == "robust")
    lattice, network = setting.lattice, setting.objective.network.train()
    next(network.parameters()).requires_grad_(False)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    flags = [parameter.requires_grad for parameter in network.parameters()]
    weights, rng, given = copy.deepcopy(network.state_dict()), torch.get_rng_state(), setting.image.clone()
    spy, found = Spy(setting.objective), []
    start = lattice.snap(3.0 * torch.randn(setting.image.shape, generator=gen(4)))
    options = [{"seed": 5}, {"seed": 5}, {"seed": 6, "start": start}]
    if refuses(method, dims, voxelwise):
        with pytest.raises(ValueError, match="labels|volumes"):  # says what it needs
            setting.apply(build(method, voxelwise=voxelwise), objective=spy)
    else:
        found = [setting.apply(build(method, voxelwise=voxelwise), objective=spy, **each) for each in options]
        assert torch.equal(found[0], found[1])
        assert bool(spy.seen) != (method.__name__ in BLIND)
    for delta in found:
        assert delta.dtype == lattice.lower.dtype and delta.shape == setting.image.shape and not delta.requires_grad
        assert (delta >= lattice.lower).all() and (delta <= lattice.upper).all() and delta.any()
    if method.__name__ != "PerturbationInducedLinearization":  # it also shows the negative, alone
        for delta in spy.seen:  # nothing is asked of the network that could not be stored
            assert (delta >= lattice.lower * lattice.unit_step - 1e-6).all()
            assert (delta <= lattice.upper * lattice.unit_step + 1e-6).all()
    for delta in spy.seen:
        steps = delta / lattice.unit_step
        assert (steps - steps.round()).abs().max() < 1e-3
    assert all(torch.equal(weights[key], value) for key, value in network.state_dict().items())
    assert all(module.training for module in network.modules())
    assert [parameter.requires_grad for parameter in network.parameters()] == flags
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in network.parameters())
    assert torch.equal(rng, torch.get_rng_state()) and torch.equal(setting.image, given)


@pytest.mark.parametrize("kind", ["uint8", "int16"])
@each_method
def test_what_is_added_stays_in_the_stored_range_and_the_window(method, kind):
    """Images with voxels at both ends of the window, and outside of it: the latter stay as they are."""
    window = (0.0, 200.0) if kind == "uint8" else (-160.0, 240.0)
    codec, setting = StoredCodec(kind, window), Setting(3, refuses(method, 3, False))
    shape = setting.image.shape
    stored = torch.randint(int(window[0]) - (kind == "int16") * 50, int(window[1]) + 50, shape, generator=gen(7))
    stored[0, 0, 0, 0], stored[0, 0, 0, 1] = int(window[0]), int(window[1])
    stored = stored.to(getattr(torch, kind))
    setting.image = torch.stack([codec.to_unit(one) for one in stored])
    setting.lattice = lattice_of(list(stored), [codec, codec], Budget.parse("8/255"))
    delta = setting.apply(build(method, voxelwise=setting.voxelwise)).int()
    moved, inside = stored.int() + delta, (stored >= window[0]) & (stored <= window[1])
    assert delta.any() and not delta[~inside].any() and delta.abs().max() <= codec.levels(Budget.parse("8/255"))
    assert moved[inside].min() >= window[0] and moved[inside].max() <= window[1]


@each_method
def test_settings_show_in_the_text_that_tells_fits_apart(method):
    for name, value in vars(build(method)).items():
        assert f"{name}={value!r}" in repr(build(method))
    if not refuses(method, 3, False):
        used = build(method)
        Setting(3, False).apply(used)
        assert repr(used) == repr(build(method))  # what was learned of a cohort is no setting


@each_method
def test_another_seed_gives_other_perturbations(method):
    setting = Setting(3, refuses(method, 3, False))
    one, other = (setting.apply(build(method, voxelwise=setting.voxelwise, seed=at), seed=at) for at in (0, 1))
    if method.__name__ in NOTHING_RANDOM and method.__name__ in BLIND:
        assert torch.equal(one, other)
    else:  # the random view at least
        assert not torch.equal(one, other)


@each_method
def test_inverted_images_move_the_other_way(method):
    """A negative slope turns stored steps around: what the network sees is the same."""
    setting = Setting(3, refuses(method, 3, False))
    found = []
    for sign in (1, -1):
        setting.lattice = free(setting.image.shape, 6, sign / 255)
        found.append(setting.apply(build(method, voxelwise=setting.voxelwise)))
    if method.__name__ in ("RandomSign", "LabelMarker"):  # they do not look
        assert torch.equal(found[0], found[1])
    elif method.__name__ == "PerturbationInducedLinearization":  # it begins with random steps
        assert not torch.equal(found[0], found[1])
    elif method.__name__ != "SliceSpectrum":  # so does it
        assert torch.equal(found[0], -found[1])


@each_method
def test_the_label_decides_and_random_signs_do_not_know_it(method):
    setting = Setting(3, refuses(method, 3, False), view=False)
    known, shuffled = build(method, voxelwise=setting.voxelwise), (setting.label + 1) % (3 if setting.voxelwise else 2)
    one = setting.apply(known)
    other = known(setting.objective, setting.image, shuffled, setting.lattice, generator=gen())
    assert torch.equal(one, other) == (method.__name__ == "RandomSign")


CLASS_FOLLOWERS = [method for method in every_method() if issubclass(method, FOLLOWS_THE_CLASS)]


@pytest.mark.parametrize("shape", [(16, 16), (10, 10, 10)], ids=["2d", "3d"])
@pytest.mark.parametrize("method", CLASS_FOLLOWERS, ids=lambda method: method.__name__)
def test_a_class_is_read_from_the_perturbations_of_images_that_were_labeled_at_random(method, shape):
    """Labels that have nothing to do with the images: who knows perturbations of some cases tells those of others."""
    count = 48
    image = torch.rand(count, 1, *shape, generator=gen(1))
    label = torch.randint(0, 2, (count,), generator=gen(2))
    lattice = free(image.shape)
    torch.manual_seed(0)
    objective = Objective(Surrogate(SmallCNN(len(shape), 1, 2, (4, 4)), [8] * len(shape)), CROSS_ENTROPY)
    known = build(method)
    known.survey(objective, iter([Batch(image, label, lattice)]), generator=gen(3))
    delta = known(objective, image, label, lattice, generator=gen(4)).float()
    spectrum = torch.fft.fftn(delta, dim=tuple(range(2, delta.ndim))).abs()
    features = torch.cat([delta.flatten(1), spectrum.flatten(1)], 1)
    first, rest = features[: count // 2], features[count // 2 :]
    centers = torch.stack([first[label[: count // 2] == index].mean(0) for index in (0, 1)])
    assert (torch.cdist(rest, centers).argmin(1) == label[count // 2 :]).float().mean() >= 0.95


@pytest.mark.parametrize("method", [ClasswiseErrorMinimizing, OnePixelShortcut])
def test_methods_that_look_at_a_cohort_say_so_when_they_have_not(method):
    setting = Setting(2, False)
    with pytest.raises(ValueError, match="call survey"):
        method()(setting.objective, setting.image, setting.label, setting.lattice, generator=gen())
