# SPDX-License-Identifier: Apache-2.0
"""Starts that have learned something else: weights from a file fit exactly or are refused, turns are learned."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from monai.bundle import ConfigParser
from torch import nn

from monai_salm.surrogates import RandomView, SmallCNN
from monai_salm.verification import pretraining
from monai_salm.verification.defenses import defenses_of
from monai_salm.verification.pretraining import from_weights, last_linear
from monai_salm.verification.training import train_network, victim_digest
from monai_salm.verification.victims import Classification
from monai_salm.workflows import bundle_path

SIZE = 16
MAKE = partial(SmallCNN, 2, 1, 2, features=(4, 8))
QUICK = {"seed": 0, "epochs": 2, "batch_size": 8, "learning_rate": 0.01, "curve_points": 1}
(self_supervised,) = defenses_of(["self_supervised"])


def written(tmp_path: Path, content) -> Path:
    torch.save(content, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def wedges(count: int, seed: int, shape: tuple[int, int] = (SIZE, SIZE)) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise that gets brighter along the first axis; labels that nothing tells."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(0, 1, shape[0])[:, None]
    return 0.7 * ramp + 0.3 * torch.rand(count, 1, *shape, generator=generator), torch.arange(count) % 2


# --------------------------------------------------------------------- files


@pytest.mark.parametrize("wrap", [dict, lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}}])
def test_weights_are_those_of_the_file_and_the_head_is_new(tmp_path, wrap):
    of_ten_classes = SmallCNN(2, 1, 10, features=(4, 8)).state_dict()
    path = written(tmp_path, wrap(of_ten_classes))
    torch.manual_seed(1)
    found = from_weights(MAKE, path).state_dict()
    torch.manual_seed(1)
    fresh = MAKE().state_dict()
    for name, value in found.items():
        assert torch.equal(value, fresh[name] if name.startswith("head.") else of_ten_classes[name]), name


def test_a_file_without_a_head_or_batch_counts_will_do(tmp_path):
    state = {k: v for k, v in MAKE().state_dict().items() if "head" not in k and "num_batches" not in k}
    found = from_weights(MAKE, written(tmp_path, state)).state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_what_does_not_fit_is_named(tmp_path):
    state = MAKE().state_dict()
    del state["features.0.weight"]
    state |= {"conv_seg.bias": torch.zeros(2), "features.4.weight": torch.zeros(1, 2)}
    with pytest.raises(
        ValueError, match="lacks features.0.weight; it has besides conv_seg.bias; it has another shape of"
    ):
        from_weights(MAKE, written(tmp_path, state))


@pytest.mark.parametrize("content", [torch.zeros(3), {}, {"epoch": 3}])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match="weights.pt holds no state dict"):
        from_weights(MAKE, written(tmp_path, content))


class Loud:
    def __reduce__(self):
        return pytest.fail, ("the file was executed",)


def test_nothing_in_a_file_is_executed(tmp_path):
    with pytest.raises(pickle.UnpicklingError):
        from_weights(MAKE, written(tmp_path, {"state_dict": Loud()}))


def test_other_weights_are_another_victim(tmp_path):
    digests = []
    for seed in (0, 1, 1):
        torch.manual_seed(seed)
        path = written(tmp_path, MAKE().state_dict())
        digests.append(victim_digest(partial(from_weights, MAKE, path), torch.rand(2, 1, SIZE, SIZE), 2))
    assert digests[0] != digests[1] == digests[2], "trainings of other weights would be taken for these"


def test_the_overlay_of_the_page_adds_a_victim(tmp_path):
    page = (Path(__file__).resolve().parents[1] / "docs" / "report.md").read_text()
    overlay = yaml.safe_load(page.partition("### Weights from disk")[2].partition("```yaml")[2].partition("```")[0])
    (name,) = overlay
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    parser = ConfigParser()
    parser.read_config([bundle_path("salm_2d_classification") / "configs" / "train.yaml", tmp_path / "overlay.yaml"])
    state = parser.get_parsed_content(f"{name}::make")().state_dict()
    parser[f"{name}::path"] = str(written(tmp_path, state))
    victim = parser.get_parsed_content(name)
    assert pickle.loads(pickle.dumps(victim))()(torch.rand(2, 1, SIZE, SIZE)).shape == (2, 3)
    assert torch.equal(victim().state_dict()["conv1.weight"], state["conv1.weight"])


# --------------------------------------------------------------------- turns


def test_turns_are_learned_without_labels_and_the_victim_starts_from_what_was_learned():
    task = Classification(("a", "b"), RandomView(2, rotate=0.1), (SIZE, SIZE))
    pretext = []

    def learn(data, own, make):
        result = train_network(own, make, data, data, **QUICK | {"epochs": 6})
        pretext.append((data, own, result))
        return result.network

    recipe = self_supervised.recipe(clean=wedges(4, 1))
    train, test = wedges(20, 0), wedges(4, 2)
    assert recipe.data(task, train, test) == (train, test)
    state = recipe.network(MAKE, learn).state_dict()
    (((images, turns), own, result),) = pretext
    assert images.shape == (4 * 24, 1, SIZE, SIZE) and turns.bincount().tolist() == [24] * 4
    assert torch.equal(images[turns == 1][0], train[0][0].rot90(1, (1, 2))) and len(own.classes) == 4
    assert result.row["balanced_accuracy"] > 0.9 and task.augment.flip, "flips are left to the victim's own training"
    learned = result.network.state_dict()
    assert all(torch.equal(value, learned[name]) for name, value in state.items() if not name.startswith("head."))
    assert state["head.weight"].shape == (2, 8)


@pytest.mark.parametrize("shape", [(12, 16), (8, 12, 10)])
def test_images_with_unequal_axes_are_turned_too(shape):
    task = Classification(("a", "b"), RandomView(len(shape)), shape)
    data = torch.rand(6, 1, *shape), torch.arange(6) % 2
    make = partial(SmallCNN, len(shape), 1, 2, features=(4,))
    found = train_network(task, make, data, data, recipe=self_supervised.recipe(), **QUICK)
    assert found.row["balanced_accuracy"] is not None


def test_the_head_is_the_last_linear_layer():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))
    assert last_linear(network) == ("4", network[4])
    assert pretraining._of_turns(lambda: network)[4].out_features == 4
    with pytest.raises(ValueError, match="Sequential.*no linear layer"):
        last_linear(network[:2])
