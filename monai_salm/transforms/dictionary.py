# SPDX-License-Identifier: Apache-2.0
"""Dictionary versions of the array transforms.

Facts about an image that its metadata do not tell (arrays and plain tensors have none) are looked up in the dictionary
under the same names, ``sample_id`` and ``stored_codec``, and in the metadata that ``LoadStoredd`` puts beside the image
too, as ``LoadImaged(image_only=False)`` does: ``image_meta_dict``.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from typing import Any, Literal

from monai.config import KeysCollection
from monai.transforms import InvertibleTransform, MapTransform
from monai.utils import ensure_tuple, ensure_tuple_rep
from monai.utils.enums import PostFix

from monai_salm.bank import PerturbationBank
from monai_salm.io.base import Window
from monai_salm.perturbations.budget import Budget
from monai_salm.perturbations.masks import Criterion, Scope
from monai_salm.release.catalog import Catalog
from monai_salm.release.labels import Cohort
from monai_salm.transforms.array import (
    ApplyPerturbation,
    ApplySparsityMask,
    ComputeSparsityMask,
    SnapToStored,
    StoredToUnit,
)
from monai_salm.transforms.files import LoadMask, LoadStored, SaveStored
from monai_salm.transforms.meta import told

Data = Mapping[Hashable, Any]


class LoadStoredd(MapTransform):
    """Dictionary version of :py:class:`monai_salm.transforms.LoadStored`.

    Args:
        keys: of the sources: cases (:py:class:`monai_salm.io.base.Case`) or paths.
        spatial_dims: 2 for images, 3 for volumes.
        window: ``"auto"`` or (low, high) in physical units.
        root: the export that paths belong to.
        allow_missing_keys: do not raise if a key is missing.
    """

    backend = LoadStored.backend

    def __init__(
        self,
        keys: KeysCollection,
        *,
        spatial_dims: int,
        window: Window = "auto",
        root: str | os.PathLike[str] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.load = LoadStored(spatial_dims=spatial_dims, window=window, root=root)

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key], d[PostFix.meta(key)] = self.load.read(d[key])
        return d


class LoadMaskd(MapTransform):
    """Dictionary version of :py:class:`monai_salm.transforms.LoadMask`.

    Args:
        keys: of the cases (:py:class:`monai_salm.io.base.Case`) whose masks are read.
        spatial_dims: 2 for images, 3 for volumes.
        allow_missing_keys: do not raise if a key is missing.
    """

    backend = LoadMask.backend

    def __init__(self, keys: KeysCollection, *, spatial_dims: int, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.load = LoadMask(spatial_dims=spatial_dims)

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.load(d[key])
        return d


class StoredToUnitd(MapTransform):
    """Dictionary version of :py:class:`monai_salm.transforms.StoredToUnit`.

    Args:
        keys: of stored images.
        allow_missing_keys: do not raise if a key is missing.
    """

    backend = StoredToUnit.backend

    def __init__(self, keys: KeysCollection, *, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.to_unit = StoredToUnit()

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.to_unit(d[key], told(d, key)["codec"])
            if (beside := PostFix.meta(key)) in d:
                d[beside] = {**d[beside], "intensity": "unit"}
        return d


class ComputeSparsityMaskd(MapTransform):
    """Dictionary version of :py:class:`monai_salm.transforms.ComputeSparsityMask`; the masks get keys of their own.

    Args:
        keys: of images.
        ratio: fraction of the voxels, in (0, 1].
        criterion: ``"foreground"``, ``"random"``, ``"gradient"`` or ``"gradient_input"``.
        scope: ``"image"``, ``"slice"`` or ``"channel"``.
        seed: of the random criterion.
        gradient_keys: of the gradients, one or one per image key; for the gradient criteria.
        mask_keys: of the masks, one per image key; default: the image's key with ``"_mask"`` appended.
        allow_missing_keys: do not raise if a key is missing.
    """

    backend = ComputeSparsityMask.backend

    def __init__(
        self,
        keys: KeysCollection,
        *,
        ratio: float,
        criterion: Criterion = "foreground",
        scope: Scope = "image",
        seed: int = 0,
        gradient_keys: KeysCollection | None = None,
        mask_keys: KeysCollection | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mask = ComputeSparsityMask(ratio=ratio, criterion=criterion, scope=scope, seed=seed)
        self.gradient_keys = ensure_tuple_rep(gradient_keys, len(self.keys))
        self.mask_keys = tuple(f"{key}_mask" for key in self.keys) if mask_keys is None else ensure_tuple(mask_keys)
        if len(self.mask_keys) != len(self.keys):
            raise ValueError(f"{len(self.mask_keys)} mask keys for {len(self.keys)} image keys; give one each")

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        d = dict(data)
        for key, gradient_key, mask_key in self.key_iterator(d, self.gradient_keys, self.mask_keys):
            gradient = None if gradient_key is None else d[gradient_key]
            d[mask_key] = self.mask(d[key], gradient, **told(d, key))
        return d


class ApplySparsityMaskd(MapTransform):
    """Dictionary version of :py:class:`monai_salm.transforms.ApplySparsityMask`.

    Args:
        keys: of perturbations.
        mask_keys: of the masks, one or one per perturbation.
        allow_missing_keys: do not raise if a key is missing.
    """

    backend = ApplySparsityMask.backend

    def __init__(self, keys: KeysCollection, mask_keys: KeysCollection, *, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mask_keys = ensure_tuple_rep(mask_keys, len(self.keys))
        self.apply = ApplySparsityMask()

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        d = dict(data)
        for key, mask_key in self.key_iterator(d, self.mask_keys):
            d[key] = self.apply(d[key], d[mask_key])
        return d


class ApplyPerturbationd(MapTransform, InvertibleTransform):
    """Dictionary version of :py:class:`monai_salm.transforms.ApplyPerturbation`, with inverse.

    Args:
        keys: of clean stored images.
        bank: the perturbations, or the path of their file.
        allow_missing_keys: do not raise if a key is missing. A perturbation may never be missing.

    Example:
        .. code-block:: python

            Compose([
                LoadStoredd("image", spatial_dims=3),
                ApplyPerturbationd("image", bank="out/bank.sqlite"),
                StoredToUnitd("image"),
            ])
    """

    backend = ApplyPerturbation.backend

    def __init__(
        self, keys: KeysCollection, bank: PerturbationBank | str | os.PathLike[str], *, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.apply = ApplyPerturbation(bank)

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.apply(d[key], **told(d, key))
        return d

    def inverse(self, data: Data) -> dict[Hashable, Any]:
        """Clean stored values; see :py:meth:`monai_salm.transforms.ApplyPerturbation.inverse`."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.apply.inverse(d[key], **told(d, key))
        return d


class SnapToStoredd(MapTransform):
    """Dictionary version of :py:class:`monai_salm.transforms.SnapToStored`.

    Args:
        keys: of perturbations.
        image_keys: of the clean stored images, one or one per perturbation.
        budget: the bound.
        unit: ``"unit"`` intensity or ``"stored"`` values.
        allow_missing_keys: do not raise if a key is missing.
    """

    backend = SnapToStored.backend

    def __init__(
        self,
        keys: KeysCollection,
        image_keys: KeysCollection,
        budget: Budget | str | float,
        unit: Literal["unit", "stored"] = "unit",
        *,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_keys = ensure_tuple_rep(image_keys, len(self.keys))
        self.snap = SnapToStored(budget, unit)

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        d = dict(data)
        for key, image_key in self.key_iterator(d, self.image_keys):
            d[key] = self.snap(d[key], d[image_key], told(d, image_key)["codec"])
        return d


class SaveStoredd(MapTransform):
    """Dictionary version of :py:class:`monai_salm.transforms.SaveStored`.

    Args:
        keys: of protected stored images.
        output_dir: a new or empty folder outside of the export.
        catalog: the export's cases.
        budget: the bound that no change may exceed.
        spatial_dims: 2 or 3.
        window: as it was for reading.
        key_file: secret of the new DICOM UIDs.
        allow_missing_keys: do not raise if a key is missing.
    """

    backend = SaveStored.backend

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str | os.PathLike[str],
        catalog: Catalog | Cohort,
        *,
        budget: Budget | str | float,
        spatial_dims: int,
        window: Window = "auto",
        key_file: str | os.PathLike[str] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.save = SaveStored(
            output_dir, catalog, budget=budget, spatial_dims=spatial_dims, window=window, key_file=key_file
        )

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.save(d[key], told(d, key)["sample_id"])
        return d


LoadMaskD = LoadMaskDict = LoadMaskd
LoadStoredD = LoadStoredDict = LoadStoredd
StoredToUnitD = StoredToUnitDict = StoredToUnitd
ComputeSparsityMaskD = ComputeSparsityMaskDict = ComputeSparsityMaskd
ApplySparsityMaskD = ApplySparsityMaskDict = ApplySparsityMaskd
ApplyPerturbationD = ApplyPerturbationDict = ApplyPerturbationd
SnapToStoredD = SnapToStoredDict = SnapToStoredd
SaveStoredD = SaveStoredDict = SaveStoredd
