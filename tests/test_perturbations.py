# SPDX-License-Identifier: Apache-2.0
"""The invariants of every perturbation method, and closed-form cases of masks and objective."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from monai_salm.perturbations.base import Objective, Perturbation, frozen
from monai_salm.perturbations.budget import Lattice
from monai_salm.perturbations.codes import class_codes
from monai_salm.perturbations.masks import SparsityMask
from monai_salm.perturbations.salm import SALM, RandomSign
from monai_salm.surrogates import RandomView, SmallCNN, Surrogate

CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")


class Linear(nn.Module):
    """Surrogate with logits (w.x, -w.x): the gradient of its loss is known in closed form."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.view = nn.Identity()

    def network(self, image: Tensor) -> Tensor:
        logit = (image * self.weight).flatten(1).sum(1)
        return torch.stack([logit, -logit], 1)


def box(shape: tuple[int, ...], levels: int, seed: int = 0) -> Lattice:
    generator = torch.Generator().manual_seed(seed)
    lower = -torch.randint(0, levels + 1, shape, generator=generator).to(torch.int16)
    upper = torch.randint(0, levels + 1, shape, generator=generator).to(torch.int16)
    return Lattice(lower, upper, torch.full((shape[0], *[1] * (len(shape) - 1)), 1 / 255))


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def methods(ratio: float) -> list[Perturbation]:
    return [
        SALM(mask=SparsityMask(ratio=ratio)),
        SALM(mask=SparsityMask(ratio=ratio, criterion="gradient_input"), refresh="step"),
        SALM(mask=SparsityMask(ratio=ratio, criterion="random", scope="class")),
        SALM(mask=SparsityMask(ratio=ratio, criterion="foreground", scope="channel")),
        RandomSign(mask=SparsityMask(ratio=ratio, criterion="random")),
    ]


class TestInvariants:
    @settings(max_examples=15, deadline=None)
    @given(st.sampled_from([0.1, 0.4, 1.0]), st.integers(1, 20), st.sampled_from([2, 3]), st.integers(0, 1000))
    def test_every_method_stays_on_the_lattice_inside_budget_and_mask(self, ratio, levels, dims, seed):
        shape = (3, 1, *[7, 9, 6][:dims])
        image, label = torch.rand(shape, generator=gen(seed)), torch.tensor([0, 1, 1])
        lattice = box(shape, levels, seed)
        surrogate = Surrogate(SmallCNN(dims, 1, 2, (4, 4)), [8] * dims)
        objective = Objective(surrogate, CROSS_ENTROPY, view=RandomView(dims))
        for method in methods(ratio):
            delta = method(objective, image, label, lattice, generator=gen(seed))
            assert delta.dtype == torch.int16 and not delta.requires_grad
            assert (delta >= lattice.lower).all() and (delta <= lattice.upper).all()
            voxels = image[0].numel()
            assert ((delta != 0).flatten(1).sum(1) <= max(1, round(ratio * voxels)) + 1).all()

    def test_the_network_is_left_as_it_was(self):
        surrogate = Surrogate(SmallCNN(2, 1, 2), [8, 8]).train()
        surrogate.network.head.weight.requires_grad_(False)
        surrogate.network.head.bias.grad = torch.ones(2)
        before, state = copy.deepcopy(surrogate.state_dict()), torch.get_rng_state()
        objective = Objective(surrogate, CROSS_ENTROPY, view=RandomView(2))
        image = torch.rand(2, 1, 8, 8, generator=gen())
        SALM(mask=SparsityMask(ratio=0.5))(objective, image, torch.tensor([0, 1]), box(image.shape, 4), generator=gen())
        assert all(torch.equal(before[key], value) for key, value in surrogate.state_dict().items())
        assert all(module.training for module in surrogate.modules())
        assert [p.requires_grad for p in surrogate.network.head.parameters()] == [False, True]
        assert torch.equal(surrogate.network.head.bias.grad, torch.ones(2))
        assert torch.equal(state, torch.get_rng_state())

    def test_it_is_restored_after_an_error_too(self):
        network = nn.Dropout().train()
        with pytest.raises(RuntimeError), frozen(network):
            raise RuntimeError
        assert network.training

    def test_equal_seeds_give_equal_perturbations(self):
        image = torch.rand(2, 1, 8, 8, generator=gen())
        surrogate = Surrogate(SmallCNN(2, 1, 2), [8, 8])
        runs = [
            SALM(mask=SparsityMask(ratio=0.3, criterion="random"))(
                Objective(surrogate, CROSS_ENTROPY, view=RandomView(2)),
                image,
                torch.tensor([0, 1]),
                box(image.shape, 4),
                generator=gen(seed),
            )
            for seed in (1, 1, 2)
        ]
        assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])

    def test_what_is_not_finite_is_refused(self):
        image = torch.full((1, 1, 4, 4), float("nan"))
        objective = Objective(Linear(torch.ones(1, 4, 4)), CROSS_ENTROPY)
        with pytest.raises(ValueError, match="finite"):
            SALM(mask=SparsityMask(ratio=1.0))(
                objective, image, torch.tensor([0]), box(image.shape, 2), generator=gen()
            )

    def test_shapes_that_differ_are_named(self):
        objective = Objective(Linear(torch.ones(1, 4, 4)), CROSS_ENTROPY)
        with pytest.raises(ValueError, match="differ"):
            SALM(mask=SparsityMask(ratio=1.0))(
                objective, torch.zeros(1, 1, 4, 4), torch.tensor([0]), box((1, 1, 4, 5), 2), generator=gen()
            )


class TestClosedForm:
    def test_dense_descent_on_a_linear_surrogate_ends_in_the_corner(self):
        weight = torch.tensor([[[1.0, -1.0], [0.5, -2.0]]])
        objective = Objective(Linear(weight), CROSS_ENTROPY)
        lattice = Lattice(
            torch.full((2, 1, 2, 2), -3, dtype=torch.int16),
            torch.full((2, 1, 2, 2), 3, dtype=torch.int16),
            torch.ones(2, 1, 1, 1) / 255,
        )
        image, label = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 1])
        delta = SALM(mask=SparsityMask(ratio=1.0), steps=4)(objective, image, label, lattice, generator=gen())
        assert torch.equal(delta[0], (3 * weight.sign()).to(torch.int16))
        assert torch.equal(delta[1], -delta[0])

    def test_a_sparse_mask_picks_the_heaviest_weights(self):
        weight = torch.tensor([[[1.0, -1.0], [0.5, -2.0]]])
        objective = Objective(Linear(weight), CROSS_ENTROPY)
        lattice = Lattice(
            torch.full((1, 1, 2, 2), -3, dtype=torch.int16),
            torch.full((1, 1, 2, 2), 3, dtype=torch.int16),
            torch.ones(1, 1, 1, 1) / 255,
        )
        image = torch.full((1, 1, 2, 2), 0.5)
        delta = SALM(mask=SparsityMask(ratio=0.25))(objective, image, torch.tensor([0]), lattice, generator=gen())
        assert delta.tolist() == [[[[0, 0], [0, -3]]]]

    def test_inverted_images_move_the_other_way(self):
        objective = Objective(Linear(torch.ones(1, 1, 2)), CROSS_ENTROPY)
        bounds = torch.full((1, 1, 1, 2), 3, dtype=torch.int16)
        lattice = Lattice(-bounds, bounds, torch.full((1, 1, 1, 1), -1 / 255))
        image = torch.full((1, 1, 1, 2), 0.5)
        delta = SALM(mask=SparsityMask(ratio=1.0))(objective, image, torch.tensor([0]), lattice, generator=gen())
        assert delta.tolist() == [[[[-3, -3]]]]

    def test_passes_and_the_mean_loss_are_counted_per_image(self):
        image, delta = torch.rand(3, 1, 2, 2), torch.zeros(3, 1, 2, 2)
        objective = Objective(Linear(torch.ones(1, 2, 2)), CROSS_ENTROPY)
        losses = objective(image, delta, torch.zeros(3, dtype=torch.long), gen()).detach()
        assert objective.passes == 3 and objective.mean() == pytest.approx(float(losses.mean()))
        objective.reset_mean()
        assert objective.mean() == 0

    def test_a_mask_once_chosen_keeps_its_support_unless_it_is_refreshed(self):
        image = torch.rand(2, 1, 8, 8, generator=gen())
        bounds = torch.full(image.shape, 4, dtype=torch.int16)
        lattice, label = Lattice(-bounds, bounds, torch.full((2, 1, 1, 1), 1 / 255)), torch.tensor([0, 1])
        objective = Objective(Surrogate(SmallCNN(2, 1, 2, (4, 4)), [8, 8]), CROSS_ENTROPY)
        start = torch.zeros(image.shape, dtype=torch.int16)
        start[..., 0] = 1
        for refresh, same in (("once", True), ("call", False), ("step", False)):
            method = SALM(mask=SparsityMask(ratio=0.2, criterion="random"), refresh=refresh)
            delta = method(objective, image, label, lattice, start, generator=gen())
            assert ((delta != 0)[..., 1:].any() == (not same)) and (delta != 0).any()

    def test_settings_out_of_range_are_refused(self):
        mask = SparsityMask(ratio=0.4)
        for options in ({"steps": 0}, {"step_size": 0}, {"momentum": 1.0}, {"look": 0}, {"refresh": "never"}):
            with pytest.raises(ValueError):
                SALM(mask=mask, **options)


class TestCodes:
    @pytest.mark.parametrize(("size", "classes"), [((32, 32), 2), ((28, 28), 9), ((16, 16, 16), 4)])
    def test_codes_are_signs_that_differ_by_class_and_seed(self, size, classes):
        codes = class_codes(size, classes, seed=1)
        assert codes.shape == (classes, 1, *size) and set(codes.unique().tolist()) == {-1.0, 1.0}
        assert torch.equal(codes, class_codes(size, classes, seed=1))
        assert not torch.equal(codes, class_codes(size, classes, seed=2))
        flat = codes.flatten(1)
        off_diagonal = (flat @ flat.T / flat.shape[1]).fill_diagonal_(0)
        assert off_diagonal.abs().max() < 0.5


class TestMasks:
    @given(st.floats(0.01, 1.0), st.sampled_from(["image", "slice", "channel", "class"]), st.integers(0, 100))
    def test_the_ratio_holds_in_every_scope(self, ratio, scope, seed):
        image = torch.rand(4, 2, 5, 6, 7, generator=gen(seed))
        gradient = torch.randn(image.shape, generator=gen(seed + 1))
        mask = SparsityMask(ratio=ratio, scope=scope)(image, gradient, label=torch.tensor([0, 1, 0, 1]))
        per = {"image": mask.flatten(1), "class": mask.flatten(1), "channel": mask.flatten(2)}.get(scope)
        per = mask.movedim(-1, 1).flatten(2) if per is None else per
        count = per.sum(-1)
        assert (count == (per.shape[-1] if ratio == 1 else max(1, round(ratio * per.shape[-1])))).all()

    def test_class_scope_shares_one_mask_per_class(self):
        gradient = torch.randn(4, 1, 6, 6, generator=gen())
        mask = SparsityMask(ratio=0.2, scope="class")(gradient, gradient, label=torch.tensor([0, 1, 0, 1]))
        assert torch.equal(mask[0], mask[2]) and torch.equal(mask[1], mask[3]) and not torch.equal(mask[0], mask[1])

    def test_voxels_that_may_not_move_are_never_chosen(self):
        image = torch.rand(2, 1, 6, 6, generator=gen())
        movable = torch.rand(image.shape, generator=gen(1)) < 0.3
        for criterion in ("gradient", "gradient_input", "foreground", "random"):
            for ratio in (0.5, 1.0):
                mask = SparsityMask(ratio=ratio, criterion=criterion)(image, image, movable=movable, generator=gen())
                assert not (mask & ~movable).any()

    @pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan")])
    def test_ratio_outside_its_range_is_refused(self, ratio):
        with pytest.raises(ValueError, match="mask ratio"):
            SparsityMask(ratio=ratio)

    def test_names_are_checked(self):
        with pytest.raises(ValueError, match="use one of gradient"):
            SparsityMask(ratio=0.1, criterion="saliency")
        with pytest.raises(ValueError, match="needs a gradient"):
            SparsityMask(ratio=0.1)(torch.zeros(1, 1, 2, 2))
        with pytest.raises(ValueError, match="needs the labels"):
            SparsityMask(ratio=0.1, scope="class")(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
