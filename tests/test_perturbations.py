# SPDX-License-Identifier: Apache-2.0
"""Bounds of SALM with any mask, and closed-form cases of masks and objective; see also ``test_conformance.py``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lattices import CROSS_ENTROPY, free, gen
from torch import Tensor, nn

from monai_salm.perturbations.base import Objective, Perturbation, frozen
from monai_salm.perturbations.budget import Lattice
from monai_salm.perturbations.codes import Examples, class_codes, voxel_codes, worth
from monai_salm.perturbations.masks import SparsityMask
from monai_salm.perturbations.salm import SALM, RandomSign
from monai_salm.perturbations.voxels import IGNORED, VoxelObjective
from monai_salm.similarity import structural_similarity
from monai_salm.surrogates import RandomView, SmallCNN, Surrogate


class Linear(nn.Module):
    """Surrogate with logits (w.x, -w.x): the gradient of its loss is known in closed form."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.view = nn.Identity()

    def network(self, image: Tensor) -> Tensor:
        logit = (image * self.weight).flatten(1).sum(1)
        return torch.stack([logit, -logit], 1)


def linear(weight: Tensor) -> Objective:
    return Objective(Linear(weight), CROSS_ENTROPY)


def box(shape: tuple[int, ...], levels: int, seed: int = 0) -> Lattice:
    generator = torch.Generator().manual_seed(seed)
    lower = -torch.randint(0, levels + 1, shape, generator=generator).to(torch.int16)
    upper = torch.randint(0, levels + 1, shape, generator=generator).to(torch.int16)
    return Lattice(lower, upper, torch.full((shape[0], *[1] * (len(shape) - 1)), 1 / 255))


def methods(ratio: float) -> list[Perturbation]:
    return [
        SALM(mask=SparsityMask(ratio=ratio)),
        SALM(mask=SparsityMask(ratio=ratio, criterion="gradient_input")),
        SALM(mask=SparsityMask(ratio=ratio, criterion="random", scope="class"), psnr=36.0),
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

    def test_it_is_restored_after_an_error_too(self):
        network = nn.Dropout().train()
        with pytest.raises(RuntimeError), frozen(network):
            raise RuntimeError
        assert network.training

    def test_what_is_not_finite_is_refused(self):
        image = torch.full((1, 1, 4, 4), float("nan"))
        objective = linear(torch.ones(1, 4, 4))
        with pytest.raises(ValueError, match="finite"):
            SALM(mask=SparsityMask(ratio=1.0))(
                objective, image, torch.tensor([0]), box(image.shape, 2), generator=gen()
            )

    def test_shapes_that_differ_are_named(self):
        objective = linear(torch.ones(1, 4, 4))
        with pytest.raises(ValueError, match="differ"):
            SALM(mask=SparsityMask(ratio=1.0))(
                objective, torch.zeros(1, 1, 4, 4), torch.tensor([0]), box((1, 1, 4, 5), 2), generator=gen()
            )


class TestClosedForm:
    def test_dense_descent_on_a_linear_surrogate_ends_in_the_corner(self):
        weight = torch.tensor([[[1.0, -1.0], [0.5, -2.0]]])
        objective = linear(weight)
        image, label, lattice = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 1]), free((2, 1, 2, 2), 3)
        delta = SALM(mask=SparsityMask(ratio=1.0), steps=4)(objective, image, label, lattice, generator=gen())
        assert torch.equal(delta[0], (3 * weight.sign()).to(torch.int16))
        assert torch.equal(delta[1], -delta[0])

    def test_a_sparse_mask_picks_the_heaviest_weights(self):
        weight = torch.tensor([[[1.0, -1.0], [0.5, -2.0]]])
        objective = linear(weight)
        image, lattice = torch.full((1, 1, 2, 2), 0.5), free((1, 1, 2, 2), 3)
        delta = SALM(mask=SparsityMask(ratio=0.25))(objective, image, torch.tensor([0]), lattice, generator=gen())
        assert delta.tolist() == [[[[0, 0], [0, -3]]]]

    def test_passes_and_the_mean_loss_are_counted_per_image(self):
        image, delta = torch.rand(3, 1, 2, 2), torch.zeros(3, 1, 2, 2)
        objective = linear(torch.ones(1, 2, 2))
        losses = objective(image, delta, torch.zeros(3, dtype=torch.long), gen()).detach()
        assert objective.passes == 3 and objective.mean() == pytest.approx(float(losses.mean()))
        objective.reset_mean()
        assert objective.mean() == 0

    def test_every_call_chooses_its_mask_anew(self):
        image = torch.rand(2, 1, 8, 8, generator=gen())
        lattice, label = free(image.shape, 4), torch.tensor([0, 1])
        objective = Objective(Surrogate(SmallCNN(2, 1, 2, (4, 4)), [8, 8]), CROSS_ENTROPY)
        start = torch.zeros(image.shape, dtype=torch.int16)
        start[..., 0] = 1
        method = SALM(mask=SparsityMask(ratio=0.2, criterion="random"))
        delta = method(objective, image, label, lattice, start, generator=gen())
        assert (delta != 0)[..., 1:].any(), "or voxels that one round leaves at 0 stay there"

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_a_loss_that_is_not_of_each_label_is_refused(self, reduction):
        loss, image = nn.CrossEntropyLoss(reduction=reduction), torch.rand(2, 1, 4, 4)
        with pytest.raises(ValueError, match=r"returned \(\) for \(2,\) labels; give it reduction='none'"):
            Objective(linear(torch.ones(1, 4, 4)).network, loss)(image, image, torch.tensor([0, 1]), gen())
        network = Surrogate(nn.Conv2d(1, 2, 1))
        with pytest.raises(ValueError, match=r"for \(2, 4, 4\) labels; give it reduction='none'"):
            VoxelObjective(network, loss, tile_size=(4, 4))(image, image, (image > 0.5).int(), gen())

    @pytest.mark.parametrize("dims", [2, 3])
    @pytest.mark.parametrize("psnr", [33.0, 36.0, 48.0])
    def test_every_image_keeps_its_psnr_by_steps_in_proportion_to_the_gradient(self, dims, psnr):
        shape = (2, 1, *[24, 25, 9][:dims])
        weight = torch.randn(shape[1:], generator=gen())
        objective = linear(weight)
        limit = torch.full(shape, 255, dtype=torch.int16)  # a budget of 8/255 in steps of 1/32
        lattice = Lattice(-limit, limit, torch.tensor([1.0, -1.0]).reshape(2, *[1] * (dims + 1)) * 8 / 255 / 255)
        steps = SALM(mask=SparsityMask(ratio=1.0), psnr=psnr)(
            objective, torch.full(shape, 0.5), torch.tensor([0, 1]), lattice, generator=gen()
        )
        error = (steps * lattice.unit_step).square().flatten(1).mean(1)
        assert (-10 * error.log10() >= psnr).all() and (-10 * error.log10() < psnr + 0.1).all()
        wanted = torch.stack([weight, weight])  # class 0 up, class 1 down, on an inverted image
        assert torch.equal(steps.sign()[steps != 0], wanted.sign()[steps != 0])
        for moved, size in zip(steps.abs(), weight.abs().expand(shape), strict=True):
            below = moved < moved.max() if psnr < 40 else moved > 0
            assert float((moved[below] / size[below]).std() / (moved[below] / size[below]).mean()) < 0.3
        assert steps.abs().amax() == 255 or psnr == 48.0

    @pytest.mark.parametrize("dims", [2, 3])
    def test_every_image_keeps_its_ssim_and_those_that_do_anyway_stay(self, dims):
        shape = (3, 1, *[24, 25, 13][:dims])
        image = torch.stack([0.4 + 0.1 * torch.rand(shape[1:], generator=gen()) ** power for power in (1, 4, 40)])
        image[0] = torch.rand(shape[1:], generator=gen())  # noise hides it; the others are smoother and smoother
        weight, label = torch.randn(shape[1:], generator=gen()), torch.zeros(3, dtype=torch.long)
        lattice = free(shape, 255, 8 / 255 / 255)
        kept = {}
        for least in (None, 0.95):
            method = SALM(mask=SparsityMask(ratio=0.6), psnr=36.0, ssim=least)
            steps = method(linear(weight), image, label, lattice, generator=gen())
            kept[least] = steps, structural_similarity(image, image + steps * lattice.unit_step)
        loose, bound = kept[None], kept[0.95]
        assert loose[1][0] > 0.95 > loose[1][1] > loose[1][2]
        assert torch.equal(loose[0][0], bound[0][0]) and (bound[1][1:] >= 0.95).all() and (bound[1][1:] < 0.952).all()
        error = (bound[0] * lattice.unit_step).square().flatten(1).mean(1)
        assert (-10 * error.log10() >= 36).all()
        alone = SALM(mask=SparsityMask(ratio=0.6), ssim=0.95)
        steps = alone(linear(weight), image, label, lattice, generator=gen())
        assert (structural_similarity(image, image + steps * lattice.unit_step) >= 0.95).all()

    def test_a_gradient_that_is_the_same_in_every_voxel_is_no_special_case(self):
        surrogate = nn.Module()
        surrogate.view, surrogate.network = nn.Identity(), lambda seen: torch.stack([m := seen.mean((1, 2, 3)), -m], 1)
        image = torch.full((2, 1, 6, 6), 0.5)
        steps = SALM(mask=SparsityMask(ratio=1.0), psnr=45.0)(
            Objective(surrogate, CROSS_ENTROPY), image, torch.tensor([0, 1]), box(image.shape, 9), generator=gen()
        )
        assert (steps[0] >= 0).all() and (steps[1] <= 0).all() and steps.any()

    def test_a_budget_that_keeps_the_psnr_anyway_is_used_up(self):
        weight = torch.rand(1, 8, 8, generator=gen()) ** 6  # gradients of every size
        image, label, lattice = torch.full((1, 1, 8, 8), 0.5), torch.tensor([0]), box((1, 1, 8, 8), 3)
        made = [
            SALM(mask=SparsityMask(ratio=0.9), psnr=psnr)(linear(weight), image, label, lattice, generator=gen())
            for psnr in (None, 20.0)
        ]
        assert torch.equal(*made) and made[0].any()

    def test_voxels_with_little_room_are_not_weakened_twice(self):
        weight = torch.linspace(0.1, 1, 64).reshape(1, 8, 8)
        limit = torch.full((1, 1, 8, 8), 800, dtype=torch.int16)
        limit[..., ::2] = 200
        lattice = Lattice(-limit, limit, torch.full((1, 1, 1, 1), 8 / 255 / 800))
        steps = SALM(mask=SparsityMask(ratio=1.0), psnr=36.0)(
            linear(weight),
            torch.full((1, 1, 8, 8), 0.5),
            torch.tensor([0]),
            lattice,
            generator=gen(),
        )
        roomy = steps[..., 1::2]
        threshold = (weight[..., 1::2] * 800 / roomy)[roomy < 800].mean()
        assert torch.allclose(steps.float(), (weight * 800 / threshold).minimum(limit[0]).round(), atol=1)

    def test_an_image_without_a_gradient_stays_as_it_is_and_harms_no_other(self):
        weight = torch.rand(1, 8, 8, generator=gen()) * 1e3
        image = torch.stack([torch.full((1, 8, 8), 0.5), torch.zeros(1, 8, 8)])  # logits too far apart for a loss
        steps = SALM(mask=SparsityMask(ratio=1.0), psnr=36.0)(
            linear(weight), image, torch.tensor([0, 0]), box(image.shape, 9), generator=gen()
        )
        assert not steps[0].any() and steps[1].any()

    def test_settings_out_of_range_are_refused(self):
        mask = SparsityMask(ratio=0.4)
        wrong = [
            {"steps": 0},
            {"steps": 2.5},
            {"steps": None},
            {"step_size": 0},
            {"momentum": 1.0},
        ]
        for options in (
            *wrong,
            *({"psnr": psnr} for psnr in (0, -36, 61, float("nan"), "36", "null", True)),
            {"ssim": 1},
        ):
            with pytest.raises(ValueError, match=str(*options)):
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

    @staticmethod
    def peak(code):
        """Mean frequency of a (*size) texture per axis, in cycles per voxel, of its strongest components."""
        power = torch.fft.fftn(code).abs().square()
        cycles = torch.stack(torch.meshgrid(*map(torch.fft.fftfreq, code.shape), indexing="ij"), -1).abs()
        power = power * (power > 0.1 * power.max())
        return (power[..., None] * cycles).flatten(0, -2).sum(0) / power.sum()

    @pytest.mark.parametrize("size", [(28, 28), (64, 64), (32, 32, 32)])
    def test_codes_of_classes_have_the_same_fineness_in_directions_of_their_own(self, size):
        first, second = (self.peak(code[0]) for code in class_codes(size, 2, seed=1))
        for peak, axis in ((first, 0), (second, 1)):
            assert peak.argmax() == axis and abs(peak.norm() - 0.25) < 0.05

    @pytest.mark.parametrize(("size", "classes"), [((64, 64), 2), ((64, 64), 3), ((32, 32, 32), 3)])
    def test_codes_of_voxels_are_fine_along_one_axis_each(self, size, classes):
        codes, blank = voxel_codes(size, classes, seed=1), len(size) - 2
        assert codes.shape == (classes, 1, *size) and codes[blank:].abs().min() == 1
        assert not codes[:blank].any(), "the background of volumes has none"
        peaks = [self.peak(code) for code in codes[blank:, 0]]
        assert all(abs(peak.max() - 0.4) < 0.05 for peak in peaks) and peaks[0].min() < 0.06
        assert len({int(peak.argmax()) for peak in peaks[: len(size)]}) == min(classes - blank, len(size))

    @staticmethod
    def striped(axes, amplitude):
        """Sixty noisy images of each class, with waves of 4 voxels along an axis of its own."""
        labels = torch.arange(len(axes)).repeat_interleave(60)
        wave = amplitude * torch.sin(torch.arange(32) * torch.pi / 2).expand(32, 32)
        waves = torch.stack([wave.T, wave])[torch.tensor(axes)][labels]
        images = 0.5 + 0.05 * torch.randn(len(labels), 1, 32, 32, generator=gen()) + waves[:, None]
        return Examples(images, labels, rms=4 / 255)

    @pytest.mark.parametrize("axes", [(0, 1), (1, 0)])
    def test_no_class_has_the_code_that_it_resembles(self, axes):
        peaks = [self.peak(code[0]).argmax() for code in class_codes((32, 32), 2, 1, self.striped(axes, 0.01))]
        assert peaks == [1 - axes[0], 1 - axes[1]], "its own texture would teach what it is"

    def test_without_a_reason_codes_are_not_exchanged(self):
        plain = class_codes((32, 32), 2, seed=1)
        unlike = self.striped((0, 1), 0.0)
        images = torch.rand(6, 1, 32, 32, generator=gen())
        single, labels = Examples(images[:3], torch.tensor([0, 0, 1]), 4 / 255), torch.arange(2).repeat(3)
        blank = Examples(images * 0, labels, 4 / 255)
        assert all(torch.equal(plain, class_codes((32, 32), 2, 1, each)) for each in (unlike, single, blank))

    @pytest.mark.parametrize("classes", [1, 40])
    def test_images_are_not_read_where_an_exchange_cannot_gain_enough(self, classes):
        unread = Examples(iter(lambda: pytest.fail("read"), None), torch.arange(classes).repeat(3), rms=4 / 255)
        assert torch.equal(class_codes((16, 16), classes, 1, unread), class_codes((16, 16), classes, 1))

    def test_images_that_cannot_be_compared_exchange_no_codes(self):
        nothing = self.striped((0, 1), 0.01)._replace(rms=float("nan"))
        assert torch.equal(class_codes((32, 32), 2, 1, nothing), class_codes((32, 32), 2, 1))

    def test_a_reader_of_codes_that_classes_resemble_tells_clean_images_apart(self):
        power = torch.randn(40, 2, generator=gen()).double()
        labels = torch.arange(40) % 2
        power[torch.arange(40), labels] += 3
        own, other = (worth(power, power + 9, labels, torch.tensor(codes)) for codes in ((0, 1), (1, 0)))
        assert own > 0.95 and other < 0.05

    def test_images_of_few_voxels_have_codes_too(self):
        assert class_codes((8, 8, 3), 2, seed=1).std() > 0.9 and voxel_codes((3, 3), 2, seed=1)[1].abs().min() == 1


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
        with pytest.raises(ValueError, match="mask_ratio is"):
            SparsityMask(ratio=ratio)

    def test_names_are_checked(self):
        with pytest.raises(ValueError, match="use one of gradient"):
            SparsityMask(ratio=0.1, criterion="saliency")
        with pytest.raises(ValueError, match="needs a gradient"):
            SparsityMask(ratio=0.1)(torch.zeros(1, 1, 2, 2))
        with pytest.raises(ValueError, match="needs the labels"):
            SparsityMask(ratio=0.1, scope="class")(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))


def voxel_labels(dims: int) -> Tensor:
    """(2, 1, ...) labels: a block of class 1, some voxels of class 2 in the first image only."""
    size = (20, 18, 10)[:dims]
    label = torch.zeros(2, 1, *size, dtype=torch.uint8)
    label[(..., *[slice(4, 9)] * dims)] = 1
    label[(0, 0, *[slice(12, 15), slice(2, 6), slice(1, 3)][:dims])] = 2
    return label


@pytest.mark.parametrize("dims", [2, 3])
class TestVoxelMasks:
    """Masks that follow voxel labels, and those that must not."""

    @pytest.mark.parametrize("ratio", [0.05, 0.2, 0.9])
    @pytest.mark.parametrize("criterion", ["gradient", "gradient_input", "foreground", "random", "label"])
    def test_class_scope_is_as_dense_in_each_class(self, dims, criterion, ratio):
        label = voxel_labels(dims)
        image = torch.rand(label.shape, generator=gen())
        gradient = torch.randn(label.shape, generator=gen(1)) * (1 + 100 * (label == 1))  # lures all into class 1
        chooser = SparsityMask(ratio=ratio, criterion=criterion, scope="class")
        mask = chooser(image, gradient, label=label, generator=gen(2))
        for own, truth in zip(mask, label, strict=True):
            for index in truth.unique():
                size = int((truth == index).sum())
                assert int(own[truth == index].sum()) == max(1, round(ratio * size))

    def test_class_scope_takes_the_best_of_each_class(self, dims):
        label = voxel_labels(dims)
        gradient = torch.randn(label.shape, generator=gen(1))
        mask = SparsityMask(ratio=0.3, scope="class")(gradient, gradient, label=label)
        for own, truth, score in zip(mask, label, gradient.abs(), strict=True):
            for index in truth.unique():
                inside = truth == index
                assert score[inside & own].min() >= score[inside & ~own].max()

    def test_class_scope_never_leaves_what_may_move(self, dims):
        label = voxel_labels(dims)
        image = torch.rand(label.shape, generator=gen())
        movable = torch.rand(label.shape, generator=gen(1)) < 0.5
        movable &= label != 2  # a class of which nothing may move
        mask = SparsityMask(ratio=0.3, scope="class")(image, image, label=label, movable=movable)
        assert not (mask & ~movable).any() and not mask[label == 2].any()
        for own, truth in zip(mask, label, strict=True):
            for index in (0, 1):  # the fraction refers to all voxels of the class
                assert int(own[truth == index].sum()) == round(0.3 * int((truth == index).sum()))

    def test_class_scope_of_a_case_without_foreground_is_image_scope(self, dims):
        gradient = torch.randn(voxel_labels(dims).shape, generator=gen())
        label = torch.zeros(gradient.shape, dtype=torch.uint8)
        masks = [SparsityMask(ratio=0.2, scope=scope)(gradient, gradient, label=label) for scope in ("class", "image")]
        assert torch.equal(*masks)

    def test_image_scope_does_not_see_the_label(self, dims):
        label = voxel_labels(dims)
        gradient = torch.randn(label.shape, generator=gen())
        for criterion in ("gradient", "gradient_input", "foreground", "random"):
            chooser = SparsityMask(ratio=0.2, criterion=criterion)
            with_label = chooser(gradient, gradient, label=label, generator=gen(1))
            assert torch.equal(with_label, chooser(gradient, gradient, generator=gen(1)))
            assert (with_label.flatten(1).sum(1) == round(0.2 * label[0].numel())).all()

    def test_the_label_criterion_takes_labeled_voxels_first_then_those_near(self, dims):
        label = voxel_labels(dims)
        image = torch.rand(label.shape, generator=gen())
        share = float((label > 0).float().flatten(1).mean(1).min())
        few = SparsityMask(ratio=0.5 * share, criterion="label")(image, label=label)
        assert (label[few] > 0).all()
        more = SparsityMask(ratio=min(1.0, 1.5 * share + 0.1), criterion="label")(image, label=label)
        assert more[label > 0].all() and (more & (label == 0)).any()

    def test_the_label_criterion_grows_outward(self, dims):
        label = torch.zeros(1, 1, *[41] * dims, dtype=torch.uint8)
        label[(..., *[20] * dims)] = 1
        mask = SparsityMask(ratio=(7 / 41) ** dims, criterion="label")(torch.zeros(label.shape), label=label)
        reach = (mask[0, 0].nonzero() - 20).abs().sum(1)
        assert mask[(0, 0, *[20] * dims)] and reach.max() <= 3 * dims
        inner = torch.stack(torch.meshgrid(*[torch.arange(41) - 20] * dims, indexing="ij")).abs().sum(0) <= 2
        assert mask[0, 0][inner].all()

    @pytest.mark.parametrize("label", [None, torch.tensor([0, 1])])
    def test_the_label_criterion_needs_voxel_labels(self, dims, label):
        image = torch.rand(2, 1, *[6] * dims)
        with pytest.raises(ValueError, match="needs voxel labels"):
            SparsityMask(ratio=0.2, criterion="label")(image, label=label)

    def test_voxel_labels_of_another_shape_are_refused(self, dims):
        image = torch.rand(2, 1, *[8] * dims)
        label = torch.ones(2, 1, *[6] * dims, dtype=torch.uint8)
        for options in ({"criterion": "label"}, {"scope": "class"}):
            with pytest.raises(ValueError, match="differ"):
                SparsityMask(ratio=0.2, **options)(image, image, label=label)

    def test_salm_keeps_the_ratio_within_each_class(self, dims):
        label = voxel_labels(dims)
        image = torch.rand(label.shape, generator=gen())
        lattice = free(label.shape, 4)
        torch.manual_seed(0)
        network = Surrogate(nn.Sequential((nn.Conv2d, nn.Conv3d)[dims - 2](1, 3, 3, padding=1)))
        objective = VoxelObjective(network, CROSS_ENTROPY, tile_size=(9,) * dims, halo=1)
        method = SALM(mask=SparsityMask(ratio=0.2, scope="class"))
        delta = method(objective, image, label, lattice, generator=gen())
        for own, truth in zip(delta, label, strict=True):
            for index in truth.unique():
                size = int((truth == index).sum())
                assert 0 < int((own[truth == index] != 0).sum()) <= round(0.2 * size)


def test_the_index_of_ignored_voxels_is_no_class():
    """Voxel labels are bytes; the last value is taken."""
    assert IGNORED == torch.iinfo(torch.uint8).max
