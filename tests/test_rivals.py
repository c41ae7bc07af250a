# SPDX-License-Identifier: Apache-2.0
"""Rival methods do what their papers say, where the right answer is known."""

from __future__ import annotations

import pytest
import torch
from lattices import CROSS_ENTROPY, gen
from torch import Tensor, nn

from monai_salm.perturbations.autoregression import REACH, processes, run
from monai_salm.perturbations.base import Batch, Objective
from monai_salm.perturbations.budget import Lattice
from monai_salm.perturbations.classwise import ClasswiseErrorMinimizing, OnePixelShortcut
from monai_salm.perturbations.linear import PerturbationInducedLinearization
from monai_salm.perturbations.masks import SparsityMask
from monai_salm.perturbations.patterns import AutoregressiveNoise, ClasswiseNoise, SeparablePatches
from monai_salm.perturbations.robust import RobustObjective
from monai_salm.perturbations.salm import SALM
from monai_salm.perturbations.targeted import ErrorMaximizing, TargetedAdversarial
from monai_salm.surrogates import LinearClassifier, RandomView, SmallCNN, Surrogate

DENSE = {"mask": SparsityMask(ratio=1.0), "momentum": 0.0}
FOUR = torch.tensor([0, 1, 0, 1])


def lattice(image: Tensor, levels: int = 8) -> Lattice:
    """Changes of up to ``levels`` of 255 steps that keep images in 0 to 1."""
    stored = (image * 255).round().to(torch.int16)
    lower, upper = -stored.clamp(max=levels), (255 - stored).clamp(max=levels)
    return Lattice(lower, upper, torch.full((len(image), *[1] * (image.ndim - 1)), 1 / 255))


def linear(weight: Tensor) -> Objective:
    """Two classes with logits (w.x, -w.x) of (1, *spatial) weights; no view."""
    network = LinearClassifier(tuple(weight.shape[1:]), 1, 2)
    network.linear.weight.data = torch.stack([weight, -weight]).flatten(1)
    return Objective(Surrogate(network, tuple(weight.shape[1:])), CROSS_ENTROPY)


class TestAgainstASurrogateOfCleanImages:
    weight = torch.randn(1, 6, 5, generator=gen(9))
    image = torch.full((4, 1, 6, 5), 0.5)
    corner = 8 * torch.stack([weight.sign(), -weight.sign()])[FOUR]

    def found(self, method: SALM) -> Tensor:
        return method(linear(self.weight), self.image, FOUR, lattice(self.image), generator=gen()).float()

    def test_minimizing_goes_to_the_class_itself_and_adversaries_to_the_other(self):
        assert torch.equal(self.found(SALM(**DENSE)), self.corner)
        assert torch.equal(self.found(TargetedAdversarial(num_classes=2, **DENSE)), -self.corner)
        assert torch.equal(self.found(ErrorMaximizing(**DENSE)), -self.corner)

    def test_the_target_is_the_next_class(self):
        network = LinearClassifier((2, 2), 1, 4)
        network.linear.weight.data = torch.eye(4)
        objective, image = Objective(Surrogate(network, (2, 2)), CROSS_ENTROPY), torch.full((4, 1, 2, 2), 0.5)
        method = TargetedAdversarial(num_classes=4, **DENSE)
        delta = method(objective, image, torch.arange(4), lattice(image), generator=gen())
        assert delta.flatten(1).argmax(1).tolist() == [1, 2, 3, 0]

    def test_linearization_releases_the_image_less_what_speaks_for_its_class(self):
        method = PerturbationInducedLinearization(num_classes=2, alone=1.0, steps=20, step_size=0.2, **DENSE)
        assert torch.equal(self.found(method), -self.corner)

    def test_the_second_term_makes_the_linear_classifier_undecided(self):
        image = (self.image + 0.02 * torch.stack([self.weight, -self.weight])[FOUR]).clamp(0, 1)
        objective = linear(self.weight)
        method = PerturbationInducedLinearization(num_classes=2, alone=0.0, steps=40, step_size=0.1, **DENSE)
        delta = method(objective, image, FOUR, lattice(image), generator=gen())
        margins = [objective.network(seen).detach().diff(dim=1).abs().mean() for seen in (image, image + delta / 255)]
        assert margins[1] < 0.3 * margins[0]

    @pytest.mark.parametrize("wrong", [{"num_classes": 1}, {"num_classes": 2, "steps": 0}])
    def test_what_makes_no_sense_is_refused(self, wrong):
        with pytest.raises(ValueError, match="is"):
            TargetedAdversarial(**DENSE | wrong)
        with pytest.raises(ValueError, match="alone is 2"):
            PerturbationInducedLinearization(num_classes=2, alone=2.0, **DENSE)


class TestRobustObjective:
    def objective(self, steps: int = 4, radius: float = 0.1) -> tuple[RobustObjective, Objective, tuple]:
        torch.manual_seed(0)
        network = Surrogate(SmallCNN(2, 1, 2, (4, 8)), (8, 8)).eval()
        image = torch.rand(4, 1, 8, 8, generator=gen(1))
        given = (image, torch.zeros_like(image), FOUR)
        return (
            RobustObjective(network, CROSS_ENTROPY, radius=radius, steps=steps),
            Objective(network, CROSS_ENTROPY),
            given,
        )

    def test_the_loss_is_that_of_an_attack_within_the_radius(self):
        robust, plain, given = self.objective()
        assert (robust(*given, gen()) > plain(*given, gen()) + 1e-3).all()
        attack = robust.harden(given[0], FOUR) - given[0]
        assert 0.9 * robust.radius < attack.abs().max() <= robust.radius + 1e-6
        assert torch.allclose(plain(given[0], attack, FOUR, gen()), robust(*given, gen()), atol=1e-6)

    def test_the_passes_of_the_attack_are_counted(self):
        robust, _, given = self.objective(steps=3)
        robust.gradient(*given, gen())
        assert robust.passes == 4 * (1 + 3)

    def test_radius_and_steps_tell_fits_apart(self):
        assert self.objective(3)[0].extra_repr() != self.objective(4)[0].extra_repr()
        with pytest.raises(ValueError, match="radius"):
            self.objective(radius=0.0)


class TestPatterns:
    def applied(self, method, image: Tensor, label: Tensor) -> Tensor:
        objective = Objective(Surrogate(nn.Identity()), CROSS_ENTROPY)
        method.survey(objective, iter([Batch(image, label, lattice(image))]), generator=gen(1))
        return method(objective, image, label, lattice(image), generator=gen(2)).float()

    def test_noise_is_the_same_in_all_batches_and_another_in_each_class(self):
        image = torch.full((4, 1, 9, 9), 0.5)
        one, other = (self.applied(ClasswiseNoise(seed=3), image[:count], FOUR[:count]) for count in (4, 2))
        assert torch.equal(one[:2], other) and torch.equal(one[0], one[2]) and not torch.equal(one[0], one[1])
        assert (one.abs() == 8).all()

    @pytest.mark.parametrize("size", [(28, 28), (31, 40), (12, 14, 16)])
    def test_patches_are_constant_and_near_the_corner_of_their_class(self, size):
        image = torch.full((4, 1, *size), 0.5)
        delta = self.applied(SeparablePatches(seed=3, cells=4), image, FOUR)
        assert len(delta[0].unique()) <= min(4 ** len(size), 17)
        signs = delta.sign()
        assert torch.equal(signs[0], signs[2]) and not torch.equal(delta[0], delta[2])
        assert (signs[0] != signs[1]).any() and delta.abs().mean() > 0.85 * 8

    def test_patches_lie_at_the_same_fraction_of_images_of_another_size(self, monkeypatch):
        monkeypatch.setattr("monai_salm.perturbations.patterns.SPREAD", 0.0)
        method = SeparablePatches(seed=3)
        small, large = (self.applied(method, torch.full((2, 1, *size), 0.5), FOUR[:2]) for size in ((8, 8), (16, 24)))
        assert torch.equal(small.repeat_interleave(2, 2).repeat_interleave(3, 3), large)

    @pytest.mark.parametrize("dims", [2, 3])
    def test_a_rule_leaves_nothing_of_its_own_class_and_something_of_the_other(self, dims):
        rules = processes(5, 3, 1, dims)
        assert torch.allclose(rules.sum(2), torch.ones(3, 1), atol=1e-4)
        signals = run(rules, [20] * dims, gen())
        deviation = signals.flatten(1).square().mean(1).sqrt()
        kernels = torch.cat([rules, torch.full((3, 1, 1), -1.0)], 2).reshape(3, 1, *[REACH + 1] * dims)
        left = (nn.functional.conv2d if dims == 2 else nn.functional.conv3d)(signals, kernels)
        size = left.abs().flatten(2).mean(2) / deviation[:, None]
        assert size.diagonal().max() < 1e-3 and (size + torch.eye(3)).min() > 0.1

    def test_the_rule_is_readable_from_what_is_stored(self, monkeypatch):
        monkeypatch.setattr("monai_salm.perturbations.patterns.CUT", 2.5)  # cut off less
        image = torch.full((4, 1, 28, 28), 0.5)
        delta = self.applied(AutoregressiveNoise(seed=5, count=2), image, FOUR)
        kernels = torch.cat([processes(5, 2, 1, 2), torch.full((2, 1, 1), -1.0)], 2).reshape(2, 1, 3, 3)
        left = nn.functional.conv2d(delta, kernels).abs().flatten(2).mean(2)
        assert torch.equal(left.argmin(1), FOUR) and not torch.equal(delta[0], delta[2])

    def test_processes_stay_bounded_in_images_larger_than_their_trial(self):
        signals = run(processes(5, 2, 1, 2), (300, 130), gen())
        assert signals.shape == (2, 1, 300, 130) and signals.square().mean() < 4 and signals.isfinite().all()

    def test_a_class_without_a_rule_is_named(self):
        with pytest.raises(ValueError, match="raise count"):
            self.applied(AutoregressiveNoise(seed=0, count=1), torch.full((4, 1, 8, 8), 0.5), FOUR)


class TestOnePixel:
    def images(self) -> Tensor:
        image = 0.2 + 0.6 * torch.rand(4, 1, 10, 12, generator=gen())
        image[::2, 0, 3, 4], image[1::2, 0, 7, 2] = 0.05, 0.95  # the same in every image of a class
        return image

    def test_the_most_telling_voxel_becomes_the_far_extreme(self):
        image, objective = self.images(), Objective(Surrogate(nn.Identity()), CROSS_ENTROPY)
        method, box = OnePixelShortcut(), lattice(image, 255)
        method.survey(
            objective, iter([Batch(image[:3], FOUR[:3], box), Batch(image[3:], FOUR[3:], box)]), generator=gen()
        )
        delta = method(objective, image, FOUR, box, generator=gen())
        assert ((delta != 0).flatten(1).sum(1) == 1).all()
        stored = (image * 255).round() + delta
        assert (stored[::2, 0, 3, 4] == 255).all() and (stored[1::2, 0, 7, 2] == 0).all()
        larger = torch.full((1, 1, 20, 24), 0.5)
        moved = method(objective, larger, FOUR[:1], lattice(larger, 255), generator=gen())
        assert moved.nonzero().tolist() == [[0, 0, 7, 9]]

    def test_no_two_classes_get_the_same_voxel_and_extreme(self):
        image = torch.zeros(4, 1, 4, 4)  # every voxel is as telling as any other
        method = OnePixelShortcut(ratio=0.25)
        method.survey(Objective(nn.Identity(), CROSS_ENTROPY), iter([Batch(image, FOUR, None)]), generator=gen())
        rows = [{tuple(row) for row in method.learned[index].tolist()} for index in (0, 1)]
        assert len(rows[0]) == len(rows[1]) == 4 and not rows[0] & rows[1]

    def test_colors_are_searched_together(self):
        image = 0.2 + 0.6 * torch.rand(4, 3, 5, 5, generator=gen())
        image[:, :, 1, 2] = torch.tensor([0.0, 1.0, 0.0])
        method, objective = OnePixelShortcut(), Objective(nn.Identity(), CROSS_ENTROPY)
        method.survey(objective, iter([Batch(image, torch.zeros(4).long(), None)]), generator=gen())
        assert method.learned[0].tolist() == [pytest.approx([1.5 / 5, 2.5 / 5, 1.0, 0.0, 1.0])]


class TestClasswiseErrorMinimizing:
    def test_all_images_of_a_class_get_what_lowers_their_mean_loss(self):
        weight = torch.randn(1, 6, 5, generator=gen(9))
        image = torch.full((4, 1, 6, 5), 0.5)
        objective, method = linear(weight), ClasswiseErrorMinimizing(step_size=0.5)
        batches = [Batch(image[at : at + 2], FOUR[at : at + 2], lattice(image[:2])) for at in (0, 2)]
        method.survey(objective, iter(batches), generator=gen())
        assert objective.passes == 4
        delta = method(objective, image, FOUR, lattice(image), generator=gen())
        assert torch.equal(delta.float(), 8 * torch.stack([weight.sign(), -weight.sign()])[FOUR])

    def test_images_of_another_size_get_the_same_pattern_resized(self):
        objective = Objective(Surrogate(SmallCNN(2, 1, 2, (4, 4)), (8, 8)), CROSS_ENTROPY, view=RandomView(2))
        small, large = torch.full((2, 1, 8, 8), 0.5), torch.full((2, 1, 16, 24), 0.5)
        method = ClasswiseErrorMinimizing(step_size=0.3)
        batches = [Batch(image, FOUR[:2], lattice(image)) for image in (small, large)]
        method.survey(objective, iter(2 * batches), generator=gen())
        one, other = (method(objective, each, label, box, generator=gen()) for each, label, box in batches)
        assert torch.equal(one.repeat_interleave(2, 2).repeat_interleave(3, 3), other) and one.any()
