# SPDX-License-Identifier: Apache-2.0
"""The bundle of volumes, run: DICOM series and NIfTI files."""

from __future__ import annotations

import gzip
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
    VOLUME,
    Volumes,
    check_properties,
    check_series,
    contents,
    exact_deltas,
    execute,
    run,
)
from exports import write_labels, write_nifti, write_series

from monai_salm.release.custody import read_refusals
from monai_salm.release.labels import load_cohort
from monai_salm.release.protect import read_protected
from monai_salm.verification.results import validate_results


def check_nifti_header(before: Path, after: Path) -> None:
    one, other = (gzip.open(path).read() for path in (before, after))
    start = int(np.frombuffer(one[108:112], "<f4")[0])  # vox_offset
    assert one[:start] == other[:start] and len(one) == len(other) and one[start:] != other[start:]


def check_twins(cohort: Any, out: Path) -> None:
    """The protected series and NIfTI volumes of a cohort."""
    twins = read_protected(cohort, out)
    for case in cohort.released:
        files = twins[case.sample_id].files
        if case.format == "dicom":
            check_series(case.files, files[0].parent, RATIOS[VOLUME] + 0.01)
        else:
            check_nifti_header(case.files[0], files[0])
            assert files[0] == out / "protected" / case.files[0].relative_to(cohort.root)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory) -> Volumes:
    folder = tmp_path_factory.mktemp("volumes")
    export, out, rows = folder / "in", folder / "out", []
    for index in range(3):
        write_series(export / "mr" / f"s{index}", f"s{index}", 6 + index, patient=f"P{index}")
        write_nifti(export / "nifti" / f"v{index}.nii.gz", index, (14, 15, 9))
        rows += [f"mr/s{index},{'ab'[index % 2]}", f"nifti/v{index}.nii.gz,{'ba'[index % 2]}"]
    write_labels(export, rows)
    before = contents(export)
    for stage in ("fit", "protect"):
        run(VOLUME, stage, folder, dataset_dir=export, output_dir=out)
    return Volumes(export, out, before)


def test_dicom_series_and_nifti_volumes_are_fitted_and_written_together(volumes):
    export, out = volumes.export, volumes.out
    assert contents(export) == volumes.before, "the export is only read"
    cohort = load_cohort(export, spatial_dims=3)
    assert len(exact_deltas(cohort, out, 3)) == 6 and not read_refusals(out)
    check_twins(cohort, out)
    assert (out / "protected" / "labels.csv").is_file()


@pytest.mark.data
def test_a_real_mr_series_and_real_nifti_volumes_are_fitted_and_written(data_dir, tmp_path):
    export = tmp_path / "in"
    (series,) = (path for path in (data_dir / "dicom_series").iterdir() if path.is_dir())
    shutil.copytree(series, export / "mr")
    rows = ["mr,head"]
    for path in sorted((data_dir / "Task04_Hippocampus" / "imagesTr").glob("*.nii.gz"))[:4]:
        shutil.copy(path, export)
        rows.append(f"{path.name},hippocampus")
    write_labels(export, rows)
    out = tmp_path / "out"
    run(VOLUME, "both", tmp_path, both=BOTH, dataset_dir=export, output_dir=out)
    cohort = load_cohort(export, spatial_dims=3)
    assert len(exact_deltas(cohort, out, 3)) == 5 and not read_refusals(out)
    assert sorted(len(case.files) for case in cohort.released) == [1, 1, 1, 1, 130]
    check_twins(cohort, out)


def test_monai_salm_protects_and_verifies_with_the_bundle(tmp_path):
    for index in range(8):
        write_nifti(tmp_path / "in" / f"v{index}.nii.gz", index, (14, 15, 9))
    write_labels(
        tmp_path, [f"v{index}.nii.gz,{'ab'[index % 2]},{'test' if index > 5 else 'train'}" for index in range(8)]
    )
    sets = [f"--set={key}={value}" for key, value in (SMALL | SIZES[VOLUME]).items()]
    base = [sys.executable, "-m", "monai_salm.cli"]
    labels = ["--labels", str(tmp_path / "labels.csv")]
    protect = [*base, "protect", str(tmp_path / "in"), str(tmp_path / "out"), *labels, "--dim", "3", *sets]
    result = execute([*protect, "--no-verify"], tmp_path, 0)
    assert f"protected files: {tmp_path / 'out' / 'protected'}" in result.stdout
    written = contents(tmp_path / "out" / "protected")
    assert len(written) == 6 + 1 and not (tmp_path / "out" / "report.json").exists()
    result = execute([*base, "verify", str(tmp_path / "out")], tmp_path, None)
    assert result.returncode == 3, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    validate_results(report)
    assert f"verdict: {report['verdict']}" in result.stdout and report["cohort"]["released"] == 6
    assert contents(tmp_path / "out" / "protected") == written
    assert execute(protect, tmp_path, None).returncode == 3, "the same command again goes on, and verifies"


@pytest.mark.filterwarnings("ignore:parsing config_file")
def test_no_property_of_a_training_is_missing(volumes, tmp_path):
    check_properties(VOLUME, "train", volumes.export, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:parsing config_file")
def test_no_property_of_an_inference_is_missing(volumes):
    check_properties(VOLUME, "infer", volumes.export, volumes.out)
