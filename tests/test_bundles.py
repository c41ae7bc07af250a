# SPDX-License-Identifier: Apache-2.0
"""The bundles' configs, read and not run; their networks alone; and what a study cannot be."""

from __future__ import annotations

import ast
import json
import math
import pydoc
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bundle_runs import BUNDLES, FLAT, SIZES, VOLUME, VOXELS, Result, config_file, each_bundle, one_by_one
from monai.bundle import ConfigParser

from monai_salm import workflows


@pytest.fixture(autouse=True)
def _fail_on_duplicate_keys(monkeypatch):
    monkeypatch.setenv("MONAI_FAIL_ON_DUPLICATE_CONFIG", "1")


def targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)


@each_bundle
@pytest.mark.parametrize("which", ["train.yaml", "inference.yaml"])
def test_every_target_is_a_full_dotted_path_that_imports(name, which):
    found = set(targets(ConfigParser.load_config_file(config_file(name, which))))
    assert len(found) > 5
    for target in found:
        assert "." in target and pydoc.locate(target) is not None, f"{name}/{which}: {target} does not import"


def test_a_key_that_is_there_twice_is_noticed(tmp_path):
    """MONAI_FAIL_ON_DUPLICATE_CONFIG is set for every test here; this one shows that it works."""
    text = Path(config_file(FLAT, "train.yaml")).read_text()
    (tmp_path / "twice.yaml").write_text(text + "\nepsilon: 4/255\n")
    with pytest.raises(ValueError, match="epsilon"):
        ConfigParser.load_config_file(str(tmp_path / "twice.yaml"))


@each_bundle
def test_training_and_inference_agree(name):
    train, inference = (
        ConfigParser.load_config_file(config_file(name, which)) for which in ("train.yaml", "inference.yaml")
    )
    meta = json.loads(Path(config_file(name, "metadata.json")).read_text())
    size = "tile_size" if name == VOXELS else "spatial_size"  # of what the surrogate sees
    shared = {*train} & {*inference} - {"imports", "initialize", "run", "batch_size"}
    assert shared >= {"network_def", "cohort", "protect_cohort", "epsilon", size}
    for key in shared:
        assert train[key] == inference[key], f"{name}: {key} differs"
    assert inference["initialize"] == [*train["initialize"], *train["protect"]]
    parsed = ConfigParser(train).get_parsed_content(size)
    assert parsed == meta["network_data_format"]["inputs"]["image"]["spatial_shape"]
    assert train["study"]["config"]["bundle"] == name
    assert set(train["study"]["config"]) >= {"epsilon", "seeds", "epochs", "window"}


@pytest.mark.parametrize("which", ["train.yaml", "inference.yaml"])
def test_the_classification_bundles_differ_only_where_images_and_volumes_do(which):
    """They are one configuration twice, since a bundle has to stand alone."""
    texts = [Path(config_file(name, which)).read_text() for name in (FLAT, VOLUME)]
    gray = [text.replace('"@in_channels"', "1").replace("@in_channels", "1").replace(FLAT, VOLUME) for text in texts]
    flat, volume = map(yaml.safe_load, gray)
    differ = {key for key in {*flat, *volume} if flat.get(key) != volume.get(key)}
    assert differ <= {
        "imports",
        "in_channels",
        "spatial_dims",
        "spatial_size",
        "batch_size",
        "epochs",
        "victim_batch_size",
    }


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, tuple[Result[str], Result[str], Path, torch.nn.Module]]:
    """verify_net_in_out and ckpt_export of every bundle, with random weights."""
    folder, jobs, networks = tmp_path_factory.mktemp("networks"), [], {}
    for name in BUNDLES:
        parser = ConfigParser()
        parser.read_config(config_file(name, "inference.yaml"))
        networks[name] = parser.get_parsed_content("network_def").eval()
        torch.save(networks[name].state_dict(), folder / f"{name}.pt")
        files = ["--config_file", config_file(name, "inference.yaml")]
        files += ["--meta_file", config_file(name, "metadata.json")]
        base = [sys.executable, "-m", "monai.bundle"]
        jobs.append([*base, "verify_net_in_out", "network_def", *files, "--device", "cpu"])
        paths = ["--filepath", str(folder / f"{name}.ts"), "--ckpt_file", str(folder / f"{name}.pt")]
        jobs.append([*base, "ckpt_export", "network_def", *paths, *files])
    done = one_by_one(jobs, folder)
    return {
        name: (done[2 * i], done[2 * i + 1], folder / f"{name}.ts", networks[name]) for i, name in enumerate(BUNDLES)
    }


@each_bundle
def test_the_network_has_the_input_and_output_of_the_metadata(exports, name):
    result = exports[name][0]
    assert result.returncode == 0, result.stderr


@each_bundle
def test_the_network_exports_to_torchscript_and_says_the_same(exports, name):
    _, result, path, network = exports[name]
    assert result.returncode == 0, result.stderr
    exported = torch.jit.load(path)
    usual = SIZES[name]["spatial_size"]
    for size in (usual, [40, 29, 22][: len(usual)]):  # resizing or padding is part of the network
        image = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(exported(image), network(image))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (VOXELS, {"spatial_size": [30, 30, 30]}, r"victim 'unet' .* images of \(30, 30, 30\).*multiples"),
        (VOXELS, {"num_classes": 5}, "victim 'unet' .* with 2 classes .*change it, num_classes"),
        (FLAT, {"num_classes": 5}, "victim 'small_cnn' .* with 3 classes"),
        (VOLUME, {"num_classes": 2}, "victim 'small_cnn' .* with 3 classes"),
        (FLAT, {"spatial_size": 64}, "spatial_size is 64; it must have 2 numbers"),
        (FLAT, {"defenses": "foo"}, "no set of defenses 'foo'"),
        (VOLUME, {"epochs": 0}, "epochs of victims is 0; it must be a whole number, 1 or more"),
        (VOLUME, {"seeds": 0}, "seeds is 0; it must be a whole number, 1 or more"),
        (FLAT, {"seeds": 10**21}, "seeds is 10+; .* at most 10000"),
        (FLAT, {"epochs": "abc"}, "epochs of victims is 'abc'; it must be a whole number"),
        (VOLUME, {"victim_batch_size": 2.5}, "batch_size of victims is 2.5; it must be a whole number"),
        (VOXELS, {"victim_learning_rate": "fast"}, "learning_rate of victims is 'fast'; it must be a number"),
        (FLAT, {"victim_learning_rate": math.inf}, "learning_rate of victims is inf; it must be a number"),
        (VOXELS, {"resample": 0}, "resample is 0; it must be a number, 0.1 or more and at most 10"),
        *((name, {"workers": 0}, "workers is 0; it must be a whole number, 1 or more") for name in BUNDLES),
        (FLAT, {"spatial_size": ["a", "b"]}, "a side of spatial_size is 'a'"),
        (FLAT, {"seeds": ["a"]}, "a seed is 'a'; it must be a whole number"),
        (FLAT, {"seeds": 1.5}, "seeds is 1.5; it must be a whole number"),
        *((name, {"workers": "abc"}, "workers is 'abc'; it must be a whole number") for name in BUNDLES),
        *((name, {}, "") for name in BUNDLES),
    ],
)
def test_a_study_that_cannot_be_is_told_before_the_fit(tmp_path, name, change, words):
    parser = ConfigParser()
    parser.read_config(config_file(name, "train.yaml"))
    classes = ["a", "b"] if name == VOXELS else ["a", "b", "c"]
    told = f"classes={classes}, voxelwise={name == VOXELS}, tested=lambda split: ()"
    cohort = f"$__import__('types').SimpleNamespace({told})"
    parser.update({"cohort": cohort, "output_dir": str(tmp_path), **change})
    check = "run::0"
    if not words:
        assert parser.get_parsed_content(check) is None
    else:
        with pytest.raises(RuntimeError) as error:
            parser.get_parsed_content(check)
        assert re.search(words, str(workflows._unwrapped(error.value)))
    assert not list(tmp_path.iterdir()), "neither bank nor control was opened"


def test_the_readme_of_a_bundle_names_run_ids_that_exist():
    for name in BUNDLES:
        ids = ConfigParser.load_config_file(config_file(name, "train.yaml"))
        text = (workflows.bundle_path(name) / "docs" / "README.md").read_text()
        for run_id in ("fit", "protect", "verify"):
            assert f"`{run_id}`" in text and isinstance(ids[run_id], list)
        first, *stages = ids["run"]
        assert first.startswith("$@study.check(") and ids["check"] == [first]
        assert stages == [*ids["fit"], *ids["protect"], *ids["verify"]], name
        for expression in ids["run"]:
            ast.parse(expression.removeprefix("$").replace("@", "").replace("::", "."))
