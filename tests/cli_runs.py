# SPDX-License-Identifier: Apache-2.0
"""A bundle whose stages cost nothing, for tests of the command line, and what a refusal of it looks like."""

from __future__ import annotations

from pathlib import Path

from monai_salm.cli.codes import BAD_INPUT

ROOT = Path(__file__).resolve().parents[1]
LABELS = [f"images/v{index}.nii.gz,{'ab'[index % 2]}" for index in range(4)]
# The ids that the bundles promise, with stages that cost nothing.
STUB = """\
imports:
  - $import sys
  - $import pathlib
  - $import test_protect
  - $import monai_salm
  - $import monai_salm.release.protect
bundle_root: .
dataset_dir: null
labels: null
output_dir: null
epsilon: 2 stored
mask_ratio: 0.4
window: auto
seed: 0
at_fit: null
at_verify: null
verdict: protected
shard: null
rename: false
defenses: null
cohort:
  _target_: monai_salm.release.labels.load_cohort
  dataset_dir: "@dataset_dir"
  labels: "@labels"
  spatial_dims: 3
  window: "@window"
  seed: "@seed"
written:
  _target_: monai_salm.release.protect.protect_cohort
  cohort: "@cohort"
  bank: $test_protect.bank_of(@cohort)
  budget: "@epsilon"
  output_dir: "@output_dir"
  spatial_dims: 3
  shard: "@shard"
  rename: "@rename"
fit: ["$@at_fit", "$@cohort"]
protect: ["$@written"]
verify:
  - $@at_verify
  - '$pathlib.Path(@output_dir, "report.json").write_text(''{"verdict": "%s"}'' % @verdict)'
run: ["$@at_fit", "$@cohort", "$@written", "$@at_verify",
  '$pathlib.Path(@output_dir, "report.json").write_text(''{"verdict": "%s"}'' % @verdict)']
"""


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    """Bad input: code 2 and one sentence that has the words, without a traceback."""
    code, _, err = result
    said = [line for line in err.splitlines() if line.startswith("monai-salm: ")]
    assert code == BAD_INPUT, err
    assert "Traceback" not in err and len(said) == 1, err
    for word in words:
        assert word in said[0]
