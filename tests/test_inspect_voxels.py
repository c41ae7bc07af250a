# SPDX-License-Identifier: Apache-2.0
"""``monai-salm inspect`` on exports with voxel labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from exports import class_map, write_decathlon, write_label, write_labels
from voxel_exports import SHAPE, edit_dataset, write_segmented

from monai_salm import cli
from monai_salm.cli.codes import BAD_INPUT, DONE, NOT_PROTECTED
from monai_salm.release.labels import load_cohort


@pytest.fixture
def inspect(capsys):
    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main(["inspect", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


def table(text: str) -> list[list[str]]:
    """Cells of the first table."""
    lines = [line for line in text.splitlines() if line[:1] in ("┃", "│")]
    return [[cell.strip() for cell in line.strip("┃│").replace("┃", "│").split("│")] for line in lines]


def test_inspect_counts_cases_and_voxels_of_each_class_by_split(inspect, tmp_path):
    write_decathlon(tmp_path, 4)
    write_label(tmp_path / "labelsTr" / "v03.nii.gz", class_map(SHAPE, 3, classes=2))
    splits = ["train", "train", "val", "test"]
    write_labels(tmp_path, [f"imagesTr/v0{index}.nii.gz,,{split}" for index, split in enumerate(splits)], "mask")
    code, out, _ = inspect(tmp_path, "--dim", 3)
    assert code == DONE and "4 cases of 4 patients" in out
    counts = [np.bincount(class_map(SHAPE, index, 2 if index == 3 else 3).ravel(), minlength=3) for index in range(4)]
    rows = table(out)
    assert rows[0] == [
        "class",
        "train",
        "train voxels",
        "val",
        "val voxels",
        "test",
        "test voxels",
        "all",
        "all voxels",
    ]
    for label, name in enumerate(["background", "Core", "Rim"]):
        voxels = [int(count[label]) for count in counts]
        test = voxels[3]
        expected = [2, voxels[0] + voxels[1], 1, voxels[2], int(test > 0), test, 3 + (test > 0), sum(voxels)]
        assert rows[label + 1] == [name, *map(str, expected)]


def test_inspect_lists_masks_that_do_not_fit(inspect, tmp_path):
    write_decathlon(tmp_path, 3, test=1)
    write_label(tmp_path / "labelsTr" / "v00.nii.gz", class_map((6, 7, 4)))
    code, out, _ = inspect(tmp_path, "--dim", 3, "--all", "--names")
    assert code == NOT_PROTECTED and "1 refused: 1 mask_shape" in out
    assert "labelsTr/v01.nii.gz" in out and "(6, 7, 4)" in out


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_inspect_finds_segmentations(inspect, tmp_path, spatial_dims):
    write_segmented(tmp_path)
    code, out, _ = inspect(tmp_path, "--dim", spatial_dims)
    assert code == DONE and [row[0] for row in table(out)] == ["class", "background", "Liver", "Tumor"]
    assert "verification holds" in out


def test_inspect_tells_what_protect_will_end_with(inspect, tmp_path):
    write_decathlon(tmp_path, 4)
    code, out, _ = inspect(tmp_path, "--dim", 3)
    assert code == DONE and "--no-verify" not in out
    edit_dataset(tmp_path, labels={"0": "background", "1": "Core", "2": "Rim", "3": "Never"})
    with pytest.raises(ValueError) as caught:
        load_cohort(tmp_path, spatial_dims=3).tested()
    code, out, _ = inspect(tmp_path, "--dim", 3)
    assert code == DONE and "no case has a voxel of class Never" in str(caught.value)
    assert f"'protect' will need --no-verify, or end with: {caught.value}\n" in out


def test_inspect_tells_a_broken_dataset_json(inspect, tmp_path):
    write_decathlon(tmp_path, 2)
    (tmp_path / "dataset.json").write_text("{")
    code, _, err = inspect(tmp_path, "--dim", 3)
    assert code == BAD_INPUT and "dataset.json" in err and "Traceback" not in err


def test_inspect_reads_real_hippocampi(inspect, data_dir: Path):
    code, out, _ = inspect(data_dir / "Task04_Hippocampus", "--dim", 3)
    assert code == DONE and table(out)[2] == ["Anterior", "130", "221323", "130", "221323"]
