# SPDX-License-Identifier: Apache-2.0
"""Bad input of a bundle ends its command with a sentence, and nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bundle_runs import FLAT, SIZES, SMALL, Result, command, execute, one_by_one
from exports import write_labels, write_npz, write_series

BAD_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "no export named": ({"dataset_dir": None}, "dataset_dir is not set"),
    "wrong folder": ({"dataset_dir": "not_there"}, "not_there does not exist"),
    "empty folder": ({"dataset_dir": "empty"}, "empty is empty; name the folder"),
    "no images": ({"dataset_dir": "letters"}, "holds no 2D image"),
    "one class": ({"dataset_dir": "one"}, "one class"),
    "epsilon 0": ({"epsilon": "0"}, "above 0"),
    "epsilon over the window": ({"epsilon": "2"}, "window"),
    "epsilon below one step": ({"epsilon": "1/1000"}, "The smallest epsilon that works here"),
    "mask ratio above 1": ({"mask_ratio": 1.5}, "above 0 and at most 1"),
    "output inside the input": ({"dataset_dir": "good", "output_dir": "good/out"}, "lies inside the export"),
    "output not empty": ({"output_dir": "letters"}, "choose an empty or new folder"),
}
each_mistake = pytest.mark.parametrize("mistake", BAD_INPUT)


@pytest.fixture(scope="module")
def refused(tmp_path_factory) -> tuple[Path, dict[str, Result[str]]]:
    """Every mistake of the table, made once with the real command."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name in ("empty", "letters", "good", "one"):
        (folder / name).mkdir()
    write_npz(folder / "in.npz", (16, 16))
    write_npz(folder / "good" / "in.npz", (16, 16))
    (folder / "letters" / "letter.txt").write_text("To whom it may concern")
    write_labels(folder / "letters", ["letter.txt,a", "other.txt,b"])
    write_labels(folder / "one", [f"{path.name},a" for path in write_series(folder / "one", "one", 3)])

    jobs = []
    for index, (wrong, _) in enumerate(BAD_INPUT.values()):
        overrides = SMALL | SIZES[FLAT] | {"dataset_dir": "in.npz", "output_dir": f"out_{index}"} | wrong
        given = {key: value for key, value in overrides.items() if value is not None}
        jobs.append(command(FLAT, "fit", **given))
    return folder, dict(zip(BAD_INPUT, one_by_one(jobs, folder), strict=True))


@pytest.mark.parametrize("config", ["train.yaml", "inference.yaml"])
def test_a_wrong_path_ends_the_process_with_an_error(tmp_path, config):
    result = execute(command(FLAT, None, config=config, dataset_dir="not_there", output_dir="out"), tmp_path, 1)
    assert "ValueError: export not_there does not exist; check dataset_dir" in result.stderr
    assert not (tmp_path / "out").exists()


@each_mistake
def test_bad_input_ends_the_command_with_a_sentence(refused, mistake):
    folder, results = refused
    result = results[mistake]
    assert result.returncode not in (0, 3), f"{mistake}: exit code {result.returncode}"
    kinds = ("ValueError: ", "monai_salm.")
    sentences = [line for line in result.stderr.splitlines() if line.startswith(kinds)]
    assert any(BAD_INPUT[mistake][1] in line for line in sentences), f"{mistake}:\n{result.stderr}"
    assert not list(folder.glob("*/models")) and not list(folder.glob("*/protected"))
    assert not (folder / "good" / "out").exists()
    assert {path.name for path in (folder / "letters").iterdir()} == {"letter.txt", "labels.csv"}
