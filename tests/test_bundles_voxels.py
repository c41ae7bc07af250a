# SPDX-License-Identifier: Apache-2.0
"""The bundle of voxel labels, run: volumes and slices, with label files or segmentations."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_runs import (
    BOTH,
    RATIOS,
    SIZES,
    SMALL,
    VOXELS,
    Volumes,
    check_properties,
    check_series,
    command,
    config_file,
    contents,
    exact_deltas,
    execute,
    one_by_one,
)
from exports import write_decathlon, write_labels
from monai.bundle import ConfigParser
from test_bundles_volumes import check_nifti_header
from voxel_exports import write_segmented

from monai_salm.io.masks import read_mask
from monai_salm.release.custody import read_refusals
from monai_salm.release.labels import load_cohort
from monai_salm.release.protect import read_protected
from monai_salm.verification.results import validate_results

FEW: dict[str, Any] = SMALL | {"batch_size": 4, "victim_batch_size": 4, "workers": 1}


def splits_of(export: Path, splits: str) -> Path:
    """A Decathlon export of noise, split by first letters (train, val, x for test)."""
    named = {"t": "train", "v": "val", "x": "test"}
    write_labels(export, [f"imagesTr/v{at:02d}.nii.gz,,{named[each]}" for at, each in enumerate(splits)], "mask")
    return export


@pytest.fixture(scope="module")
def voxels(tmp_path_factory) -> Volumes:
    """Everything in one command; the volumes are neither multiples of the network's stride nor of one shape."""
    folder = tmp_path_factory.mktemp("voxels")
    export, out = folder / "in", folder / "out"
    splits_of(write_decathlon(export, 7, (21, 18, 17)), "tttttvx")
    before = contents(export)
    result = execute(command(VOXELS, None, **(FEW | SIZES[VOXELS]), dataset_dir=export, output_dir=out), folder, 3)
    assert "Verdict: inconclusive" in result.stdout and "Traceback" not in result.stderr
    return Volumes(export, out, before)


def test_volumes_with_voxel_labels_are_written_and_their_label_files_are_the_same(voxels):
    assert contents(voxels.export) == voxels.before, "the export is only read"
    cohort = load_cohort(voxels.export, spatial_dims=3)
    assert len(exact_deltas(cohort, voxels.out, 3, RATIOS[VOXELS])) == 6 and not read_refusals(voxels.out)
    written = contents(voxels.out / "protected")
    names = [f"v{at:02d}.nii.gz" for at in range(6)]
    assert set(written) == {
        "dataset.json",
        "labels.csv",
        *(f"{folder}/{name}" for name in names for folder in ("imagesTr", "labelsTr")),
    }
    for name in names:
        assert written[f"labelsTr/{name}"] == voxels.before[f"labelsTr/{name}"]
        check_nifti_header(voxels.export / "imagesTr" / name, voxels.out / "protected" / "imagesTr" / name)


def test_the_report_of_voxel_labels_tells_each_class_the_marker_and_leakage(voxels):
    report = json.loads((voxels.out / "report.json").read_text())
    validate_results(report)
    assert report["metric"] == "dice" and report["verdict"] == "inconclusive"
    arms = {"clean", "protected", "random_noise", "random_mask", "label_marker", "blind"}
    assert {row["arm"] for row in report["arms"]} == arms
    assert {row["victim"] for row in report["arms"]} == {"unet", "segresnet", "attention_unet"}
    assert all(set(row["dice_per_class"]) == {"Core", "Rim"} for row in report["arms"])
    assert set(report["leakage"]) >= {"protected", "label_marker", "random_mask"}
    assert {row["victim"] for row in report["utility"]} == {"unet", "segresnet", "attention_unet"}
    assert report["config"]["bundle"] == VOXELS and report["config"]["tile_size"] == [16, 16, 16]
    assert "criterion='gradient'" in report["config"]["mask"] and report["passes_per_image"]["total"] > 0
    assert "Core" in (voxels.out / "report.html").read_text()


CHANGES: dict[str, Any] = {
    "epsilon": "4/255",
    "mask_ratio": 0.3,
    "mask_criterion": "label",
    "perturbation_steps": 4,
    "surrogate_steps": 3,
    "spatial_size": [8, 8, 8],
    "kernel_size": 3,
    "tile_size": [24, 24, 24],
    "halo": 12,
    "seed": 1,
}


def test_another_setting_on_the_same_output_is_an_error_and_inference_goes_on(voxels):
    before = contents(voxels.out / "protected")
    places = {"dataset_dir": voxels.export, "output_dir": voxels.out}
    jobs = [command(VOXELS, "fit", **(FEW | SIZES[VOXELS] | places | {name: value})) for name, value in CHANGES.items()]
    sizes = {"tile_size": SIZES[VOXELS]["tile_size"], "device": "cpu"}
    jobs.append(command(VOXELS, None, config="inference.yaml", **sizes, **places))
    *changed, inference = one_by_one(jobs, voxels.export.parent)
    for name, result in zip(CHANGES, changed, strict=True):
        assert result.returncode == 1, name
        assert "the configuration, the images or monai_salm changed" in result.stderr, f"{name}:\n{result.stderr}"
    assert inference.returncode == 0, inference.stderr
    said = [line for line in inference.stdout.splitlines() if line.startswith("Dice of the surrogate")]
    assert len(said) == 1 and 0 <= float(said[0].rsplit(":")[1]) <= 1
    assert contents(voxels.out / "protected") == before


def test_slices_with_voxel_labels_go_through_the_stages_with_spatial_dims_2_alone(tmp_path):
    export, out = splits_of(write_decathlon(tmp_path / "in", 6, (21, 18, 1)), "ttttvx"), tmp_path / "out"
    sizes = {"spatial_size": [16, 16], "tile_size": [16, 16]}
    settings = FEW | sizes | {"spatial_dims": 2, "dataset_dir": export, "output_dir": out}
    fit, protect, verify = one_by_one(
        [command(VOXELS, stage, **settings) for stage in ("fit", "protect", "verify")], tmp_path
    )
    assert (fit.returncode, protect.returncode, verify.returncode) == (0, 0, 3), verify.stderr
    exact_deltas(load_cohort(export, spatial_dims=2), out, 2, RATIOS[VOXELS])
    report = json.loads((out / "report.json").read_text())
    validate_results(report)
    assert {len(row["dice_per_class"]) for row in report["arms"]} == {2} and report["cohort"]["released"] == 5
    parser = ConfigParser()
    parser.read_config(config_file(VOXELS, "train.yaml"))
    parser["spatial_dims"] = 2
    for key in ("spatial_size", "tile_size"):
        assert len(parser.get_parsed_content(key)) == 2


@pytest.mark.data
def test_real_hippocampi_with_voxel_labels_are_fitted_and_written(data_dir, tmp_path):
    source, export, out = data_dir / "Task04_Hippocampus", tmp_path / "in", tmp_path / "out"
    content = json.loads((source / "dataset.json").read_text())
    content["training"] = content["training"][:4]
    for pair in content["training"]:
        for name in pair.values():
            (export / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, export / name)
    (export / "dataset.json").write_text(json.dumps(content))
    before = contents(export)
    settings = FEW | SIZES[VOXELS] | {"dataset_dir": export, "output_dir": out}
    execute(command(VOXELS, "both", both=BOTH, **settings), tmp_path)
    cohort = load_cohort(export, spatial_dims=3)
    assert len(exact_deltas(cohort, out, 3, RATIOS[VOXELS])) == 4 and not read_refusals(out)
    written = contents(out / "protected")
    labels = {name for name in before if name.startswith("labelsTr/")}
    assert len(labels) == 4 and all(written[name] == before[name] for name in labels)


def test_monai_salm_picks_the_bundle_and_writes_series_with_their_segmentations(tmp_path):
    export, out = tmp_path / "in", tmp_path / "out"
    truth = write_segmented(export, "ABCD", 17)
    sets = [f"--set={key}={value}" for key, value in (FEW | SIZES[VOXELS]).items()]
    base = [sys.executable, "-m", "monai_salm.cli"]
    result = execute([*base, "protect", str(export), str(out), *sets], tmp_path, None)
    assert result.returncode == 3 and "verdict: inconclusive" in result.stdout, result.stderr
    kept = json.loads((out / "private" / "run-config.json").read_text())
    assert kept["bundle"] == VOXELS and "spatial_dims" not in kept["overrides"]
    cohort = load_cohort(export, spatial_dims=3)
    assert len(exact_deltas(cohort, out, 3, RATIOS[VOXELS])) == len(truth) == 4
    for case in cohort.released:
        twin = read_protected(cohort, out)[case.sample_id]
        np.testing.assert_array_equal(read_mask(twin, 3), read_mask(case, 3))
        check_series(case.files, twin.files[0].parent, RATIOS[VOXELS] + 0.01)
    report = json.loads((out / "report.json").read_text())
    assert report["arms"][0]["dice_per_class"].keys() == {"Liver", "Tumor"}


@pytest.mark.filterwarnings("ignore:parsing config_file")
def test_no_property_of_a_training_is_missing(voxels, tmp_path):
    check_properties(VOXELS, "train", voxels.export, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:parsing config_file")
def test_no_property_of_an_inference_is_missing(voxels):
    check_properties(VOXELS, "infer", voxels.export, voxels.out)
