# SPDX-License-Identifier: Apache-2.0
"""MONAI transforms: stored values in, masks, perturbations, protected files out. Array classes and dictionary ones."""

from __future__ import annotations

from monai_salm.transforms.array import (
    ApplyPerturbation,
    ApplySparsityMask,
    ComputeSparsityMask,
    SnapToStored,
    StoredToUnit,
)
from monai_salm.transforms.dictionary import (
    ApplyPerturbationD,
    ApplyPerturbationd,
    ApplyPerturbationDict,
    ApplySparsityMaskD,
    ApplySparsityMaskd,
    ApplySparsityMaskDict,
    ComputeSparsityMaskD,
    ComputeSparsityMaskd,
    ComputeSparsityMaskDict,
    LoadStoredD,
    LoadStoredd,
    LoadStoredDict,
    SaveStoredD,
    SaveStoredd,
    SaveStoredDict,
    SnapToStoredD,
    SnapToStoredd,
    SnapToStoredDict,
    StoredToUnitD,
    StoredToUnitd,
    StoredToUnitDict,
)
from monai_salm.transforms.files import LoadStored, SaveStored

__all__ = [
    "ApplyPerturbation",
    "ApplyPerturbationD",
    "ApplyPerturbationDict",
    "ApplyPerturbationd",
    "ApplySparsityMask",
    "ApplySparsityMaskD",
    "ApplySparsityMaskDict",
    "ApplySparsityMaskd",
    "ComputeSparsityMask",
    "ComputeSparsityMaskD",
    "ComputeSparsityMaskDict",
    "ComputeSparsityMaskd",
    "LoadStored",
    "LoadStoredD",
    "LoadStoredDict",
    "LoadStoredd",
    "SaveStored",
    "SaveStoredD",
    "SaveStoredDict",
    "SaveStoredd",
    "SnapToStored",
    "SnapToStoredD",
    "SnapToStoredDict",
    "SnapToStoredd",
    "StoredToUnit",
    "StoredToUnitD",
    "StoredToUnitDict",
    "StoredToUnitd",
]
