# SPDX-License-Identifier: Apache-2.0
"""What tests of transforms share: an export of series and volumes, and a bank of perturbations for it."""

from __future__ import annotations

import pytest
from exports import write_nifti, write_series
from perturbed import fit

from monai_salm.bank import PerturbationBank
from monai_salm.release.catalog import Catalog, scan


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """Two DICOM series and two NIfTI volumes, all of one shape."""
    root = tmp_path_factory.mktemp("export")
    for name in ("one", "two"):
        write_series(root / name, name)
        write_nifti(root / f"{name}.nii.gz", seed=len(name), shape=(16, 16, 4))
    return scan(root, 3, check_pixels=False)


@pytest.fixture(scope="module")
def bank(export: Catalog, tmp_path_factory: pytest.TempPathFactory) -> PerturbationBank:
    return fit(export.cases, tmp_path_factory.mktemp("bank") / "bank.sqlite", 3)
