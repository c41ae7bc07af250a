# SPDX-License-Identifier: Apache-2.0
"""Defenses: what each filter does to an image and each recipe to a training, and that none is told the method."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from torch import nn

from monai_salm.surrogates import RandomView, SmallCNN
from monai_salm.verification import defenses, filters
from monai_salm.verification.arms import Volume
from monai_salm.verification.defenses import DEFENSES, Defense, defenses_of
from monai_salm.verification.description import described
from monai_salm.verification.segmenters import Segmentation
from monai_salm.verification.training import Recipe, train_network
from monai_salm.verification.victims import Classification

SIZE = 16
TASK = Classification(("a", "b"), RandomView(2, rotate=0.1))
QUICK = {"seed": 0, "epochs": 2, "batch_size": 4, "learning_rate": 0.01, "curve_points": 1}
MAKE = partial(SmallCNN, 2, 1, 2, features=(4,))
by_name = {defense.name: defense for defense in DEFENSES}


def waves(shape: tuple[int, ...], cycles: float) -> torch.Tensor:
    """(1, *shape) stripes along the first axis, between 0.25 and 0.75."""
    along = torch.arange(shape[0], dtype=torch.float32).reshape(-1, *[1] * (len(shape) - 1))
    return (0.5 + 0.25 * torch.cos(2 * torch.pi * cycles * along)).expand(1, *shape).contiguous()


def cases(count: int = 12, seed: int = 0, gap: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise images; those of class b are brighter."""
    labels = torch.arange(count) % 2
    noise = torch.rand(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    return 0.6 * noise + gap * labels[:, None, None, None], labels


def marked(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """With stripes that tell the class."""
    stripes = 0.1 * (waves((SIZE, SIZE), 0.5) - 0.5) * 4
    return images + (labels * 2 - 1)[:, None, None, None] * stripes


FILTERS = [defense for defense in DEFENSES if getattr(defense.recipe, "func", None) is defenses.Filtered]


@pytest.mark.parametrize("shape", [(1, 20, 17), (3, 16, 18), (1, 9, 8, 7)], ids=["gray", "color", "volume"])
@pytest.mark.parametrize("defense", FILTERS, ids=lambda defense: defense.name)
def test_a_filter_keeps_size_and_range_and_changes_the_image_but_not_its_argument(defense, shape):
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    before = image.clone()
    seen = defense.recipe().change(image)
    assert type(seen) is torch.Tensor and seen.shape == image.shape and seen.dtype == torch.float32
    assert torch.equal(image, before) and not torch.equal(seen, image)
    assert -0.3 < float(seen.min()) and float(seen.max()) < 1.3  # low-pass filters ring
    assert torch.equal(defense.recipe().change(image), seen)


@pytest.mark.parametrize("shape", [(32, 32), (32, 16, 16)])
@pytest.mark.parametrize(
    ("change", "kept_cycles", "lost_cycles"),
    [
        (partial(filters.low_pass, cut=0.25), 3 / 32, 0.5),
        (partial(filters.blur, sigma=1.5), 1 / 32, 0.5),
        (partial(filters.median, radius=1), 1 / 32, 0.5),
        (partial(filters.respaced, factor=2.0), 1 / 32, 0.5),
    ],
    ids=["low_pass", "blur", "median", "respaced"],
)
def test_smoothing_keeps_what_is_coarse_and_removes_what_is_fine(change, kept_cycles, lost_cycles, shape):
    inner = (slice(None), *[slice(6, -6)] * len(shape))
    coarse, fine = waves(shape, kept_cycles), waves(shape, lost_cycles)
    assert float((change(coarse) - coarse)[inner].abs().max()) < 0.05
    lost = float(change(fine)[inner].var() / fine[inner].var())
    assert lost < 0.05 or change.func is filters.median  # a median of stripes may be the stripes shifted
    assert not torch.allclose(change(fine), fine, atol=0.1)


def test_lossy_codecs_lose_more_the_stronger_they_are():
    image = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(1))
    errors = [float((filters.jpeg(image, quality) - image).square().mean()) for quality in (10, 30, 50, 75, 95)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 10 * errors[-1]
    first, second = (float((filters.jpeg2000(image, ratio) - image).square().mean()) for ratio in (4, 30))
    assert 0 < first < second


def test_jpeg_keeps_fine_differences_of_brightness_and_none_of_color():
    fine = (torch.arange(32).float() % 2 - 0.5).expand(3, 32, 32) / 4
    color = torch.tensor([0.587, -0.299, 0.0])[:, None, None]  # of no luminance
    for change, kept in ((fine, True), (fine * color, False)):
        after = filters.jpeg(0.5 + change, 95) - 0.5
        assert (float((after * change).sum() / change.square().sum()) > 0.9) == kept
        assert kept or float(after.square().sum() / change.square().sum()) < 0.1


def test_narrowed_window_stretches_its_middle():
    image = torch.tensor([[[0.1, 0.2, 0.5, 0.8, 0.9]]])
    assert torch.allclose(filters.narrowed(image, 0.2, 0.8), torch.tensor([[[0.0, 0.0, 0.5, 1.0, 1.0]]]), atol=1e-6)


@pytest.mark.parametrize("defense", DEFENSES, ids=lambda defense: defense.name)
def test_every_defense_trains_and_one_seed_gives_one_result(defense):
    train, test, clean = cases(8), cases(6, 1), cases(6, 2)
    rows = []
    for _ in range(2):
        state = torch.get_rng_state()
        result = train_network(TASK, MAKE, train, test, recipe=defense.recipe(clean=clean), **QUICK)
        assert torch.equal(torch.get_rng_state(), state)
        rows.append({name: value for name, value in result.row.items() if name != "seconds"})
        assert all(value.isfinite().all() for value in result.network.state_dict().values())
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    "name", ["jpeg_30", "blur_1", "strong_affine", "intensity", "cutout", "adversarial", "clean_20"]
)
def test_defenses_for_voxels_train_on_voxel_labels(name):
    assert by_name[name].voxels
    volumes = [Volume(torch.rand(1, 8, 8, 8), (torch.rand(1, 8, 8, 8) > 0.7).to(torch.uint8)) for _ in range(3)]
    task = Segmentation(("background", "lesion"), (8, 8, 8))
    make = partial(nn.Conv3d, 1, 2, 3, padding=1)
    found = train_network(
        task, make, volumes, volumes[:1], seed=0, epochs=1, batch_size=2, recipe=by_name[name].recipe(clean=volumes[:1])
    )
    assert found.row["dice"] is not None


def test_no_recipe_is_ordinary_training():
    train, test = cases(8), cases(6, 1)
    plain, given = (train_network(TASK, MAKE, train, test, recipe=recipe, **QUICK) for recipe in (None, Recipe()))
    assert plain.row["curve"] == given.row["curve"]


def test_orthogonal_projection_takes_a_linear_marker_away():
    images, labels = cases(40, gap=0.0)
    shown = marked(images, labels)
    recipe = by_name["orthogonal"].recipe()
    (before, _), (after, _) = (shown, labels), recipe.data(TASK, (shown, labels), (images, labels))[0]
    stripes = (waves((SIZE, SIZE), 0.5) - 0.5).flatten()
    spread = [
        abs(
            float(((each.flatten(1) @ stripes)[labels == 1]).mean() - ((each.flatten(1) @ stripes)[labels == 0]).mean())
        )
        for each in (before, after)
    ]
    assert spread[1] < 0.2 * spread[0]
    flat = shown.flatten(1) - shown.flatten(1).mean(0)
    weight, bias = defenses.linear_classifier(flat, labels)
    assert bool(((flat @ weight.T + bias).argmax(1) == labels).all())


def test_orthogonal_projection_takes_one_direction_of_two_classes_and_no_other():
    images, labels = cases(40)
    (seen, _), _ = by_name["orthogonal"].recipe().data(TASK, (images, labels), (images, labels))
    lost = torch.linalg.svdvals((images - seen).flatten(1))
    assert lost[0] > 0.1 and lost[1] < 1e-4 * lost[0]


def test_a_linear_classifier_knows_how_often_a_class_is():
    labels = (torch.arange(40) % 10 == 0).long()
    weight, bias = defenses.linear_classifier(torch.zeros(40, 3), labels)
    assert not weight.any() and float((bias[0] - bias[1]).exp()) == pytest.approx(9, rel=0.01)


def test_clean_cases_are_a_fifth_of_what_is_trained_on():
    train, clean = cases(16), cases(3, 5)
    recipe = by_name["clean_20"].recipe(clean=clean)
    images, labels = recipe.data(TASK, train, clean)[0]
    assert len(images) == len(labels) == 20
    assert torch.equal(images[16:], clean[0][[0, 0, 1, 2]]) and torch.equal(labels[16:], clean[1][[0, 0, 1, 2]])


def test_clean_cases_that_come_sorted_are_mixed_in_from_every_class():
    images, labels = cases(12, 5)
    order = labels.argsort(stable=True)
    sorted_cases = images[order], labels[order]
    _, mixed = by_name["clean_20"].recipe(clean=sorted_cases).data(TASK, cases(16), sorted_cases)[0]
    assert mixed[16:].tolist() == [0, 0, 1, 1]


class Scripted(nn.Module):
    """Its accuracy on the cases of :py:func:`cases` is what its weight says."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        right = (image.flatten(1).mean(1) > 0.45).float() * 2 - 1
        return torch.stack([-self.weight * right, self.weight * right], 1)


def test_early_stopping_goes_back_to_the_best_epoch():
    network, recipe = Scripted(), by_name["early_stop"].recipe(clean=cases(8))
    for value, done in ((-1.0, 1 / 3), (2.0, 2 / 3), (-3.0, 1.0)):
        with torch.no_grad():
            network.weight.fill_(value)
        recipe.end_epoch(TASK, network, done)
    assert float(network.weight) == 2.0


def test_a_frozen_encoder_stays_and_its_head_is_new():
    train, test, clean = cases(8), cases(6, 1), cases(8, 2)
    start = by_name["pretrained"].recipe(clean=clean)
    learned = train_network(TASK, MAKE, clean, clean, **QUICK).network.state_dict()
    begun = start.network(MAKE, lambda data: train_network(TASK, MAKE, data, data, **QUICK).network).state_dict()
    assert all(torch.equal(value, learned[name]) for name, value in begun.items())
    found = train_network(TASK, MAKE, train, test, recipe=by_name["frozen_encoder"].recipe(clean=clean), **QUICK)
    ended = found.network.network.state_dict()
    for name, value in ended.items():
        assert torch.equal(value, learned[name]) != name.startswith("head"), name


def test_a_victim_without_a_last_layer_to_renew_is_named():
    clean = cases(4)
    make = partial(nn.Sequential, nn.Conv2d(1, 2, SIZE), nn.Flatten())
    with pytest.raises(ValueError, match="Sequential.*leave out frozen_encoder"):
        train_network(TASK, make, clean, clean, recipe=by_name["frozen_encoder"].recipe(clean=clean), **QUICK)


def test_the_attack_stays_inside_its_bound_and_raises_the_loss():
    images, labels = cases(8)
    network = MAKE().eval()
    seen = []
    network.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
    recipe = defenses.Adversarial(0.05, 3)
    attacked = recipe.losses(TASK, network, images, labels, torch.Generator().manual_seed(0))["train_loss"]
    assert len(seen) == 4 and float((seen[-1] - images).abs().max()) <= 0.05 + 1e-6
    assert float(attacked) > float(TASK.losses(network(images), labels)["train_loss"])


def test_the_worst_augmentation_is_trained_on():
    images, labels = cases(6)
    network, seen = MAKE().eval(), []
    network.register_forward_hook(lambda _, given, out: seen.append(out.detach()))
    recipe = by_name["worst_of_5"].recipe()
    loss = recipe.losses(TASK, network, images, labels, torch.Generator().manual_seed(0))["train_loss"]
    tried = torch.stack([nn.functional.cross_entropy(out, labels, reduction="none") for out in seen[:5]])
    assert len(seen) == 6 and float(loss) == pytest.approx(float(tried.max(0).values.mean()), abs=1e-5)
    for done, count in ((0.4, 6), (0.5, 2)):  # in the second half one augmentation, any of them
        recipe.end_epoch(TASK, network, done)
        seen.clear()
        recipe.losses(TASK, network, images, labels, torch.Generator().manual_seed(0))
        assert len(seen) == count


AUGMENTED = [defense for defense in DEFENSES if getattr(defense.recipe, "func", None) is defenses.Augmented]


@pytest.mark.parametrize("shape", [(24, 24), (12, 12, 12)])
@pytest.mark.parametrize("defense", AUGMENTED, ids=lambda defense: defense.name)
def test_voxel_labels_go_where_the_image_goes(defense, shape):
    truth = torch.zeros(16, 1, *shape, dtype=torch.uint8)
    truth[(..., *[slice(2, 9)] * len(shape))] = 1
    images = 0.2 + 0.6 * truth.float()
    change, generator = defense.recipe().change, torch.Generator().manual_seed(0)
    seen, labels = change(images, truth, generator)
    assert seen.shape == images.shape and labels.shape == truth.shape and labels.dtype == truth.dtype
    assert not torch.equal(seen, images) and bool(seen.isfinite().all())
    kept = seen != 0  # the rest was erased
    for label in (0, 1):
        found = seen[kept & (labels == label)] > 0.5
        assert float((found == label).float().mean()) > 0.8
    again = change(images, truth, torch.Generator().manual_seed(0))
    assert torch.equal(again[0], seen) and torch.equal(again[1], labels)


@pytest.mark.parametrize("shape", [(8, 8), (6, 6, 6)])
def test_cutmix_weighs_the_losses_by_the_size_of_the_box(shape):
    generator = torch.Generator().manual_seed(0)
    kept = torch.cat([defenses.CutMixed().weight(torch.zeros(2, 1, *shape), generator) for _ in range(300)])
    assert set(kept.unique().tolist()) == {0.0, 1.0} and kept.shape[1:] == (1, *shape)
    assert 0.5 < float(kept.mean()) < 0.8  # half would be kept if no box left the image


def test_adversarial_training_knows_the_size_of_the_budget():
    (found,) = defenses.defenses_of(["adversarial"], epsilon=0.01)
    assert (found.recipe().epsilon, by_name["adversarial"].recipe().epsilon) == (0.01, 8 / 255)
    assert found.recipe(clean="own").clean == "own"


def test_names_are_unique_and_levels_are_known():
    assert len(by_name) == len(DEFENSES) and set(defenses_of("standard")) < set(defenses_of("full")) == set(DEFENSES)
    assert all(defense.voxels for defense in defenses_of("full", voxelwise=True))
    assert [defense.name for defense in defenses_of(["mixup", "jpeg_10"])] == ["mixup", "jpeg_10"]
    with pytest.raises(ValueError, match="no set of defenses 'all'"):
        defenses_of("all")
    with pytest.raises(ValueError, match="no defense jpg; there are jpeg_10"):
        defenses_of(["jpg"])
    marks = {described(defense.recipe) for defense in DEFENSES}
    assert len(marks) == len(DEFENSES), "two defenses would share their trainings"


def test_no_defense_is_told_the_method():
    names = {name for defense in DEFENSES for name in inspect.signature(defense.recipe).parameters}
    assert names <= {"clean", "change", "count", "epsilon", "steps"}
    assert {field for field in Defense.__dataclass_fields__} == {
        "name",
        "what",
        "recipe",
        "cost",
        "standard",
        "voxels",
        "needs_clean",
    }
