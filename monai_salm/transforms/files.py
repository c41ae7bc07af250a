# SPDX-License-Identifier: Apache-2.0
"""Array transforms between files and stored values; no other reader or writer keeps them exact."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.data import MetaTensor, get_track_meta
from monai.transforms import Transform
from monai.utils import MetaKeys, TransformBackends, convert_to_tensor
from torch import Tensor

from monai_salm.io import dicom, formats, nifti, raster, worker
from monai_salm.io.base import Case, RefusedError, Window
from monai_salm.io.masks import read_mask
from monai_salm.perturbations.budget import Budget, as_window
from monai_salm.records import image_digest
from monai_salm.release import commit
from monai_salm.release.catalog import Catalog
from monai_salm.release.custody import KEY
from monai_salm.release.identity import UidMap, load_or_create_key, pseudonym
from monai_salm.release.labels import Cohort
from monai_salm.transforms.meta import affine_of, check_same_shape, meta_of, stored_array

__all__ = ["LoadMask", "LoadStored", "SaveStored", "case_of"]


class LoadStored(Transform):
    """Stored values of an image, exactly as its file holds them, on its own grid with canonical axes.

    Unlike ``monai.transforms.LoadImage`` it applies no rescale slope and loses no bit; ``uint16`` becomes ``int32``,
    which torch can compute with. The metadata get ``sample_id``, ``stored_codec`` and ``intensity="stored"``; their
    ``filename_or_obj``, after which ``SaveImage`` names files, is the ``sample_id`` too, for the file's own name may be
    personal; their affine has the voxels' size on these axes (RAS+ for volumes), so that ``Spacing`` and
    ``Orientation`` know them, but no origin and no rotation: to bring images of other readers onto this grid, load
    those with MONAI.

    Args:
        spatial_dims: 2 for images, 3 for volumes.
        window: ``"auto"`` or (low, high) in physical units; becomes unit intensity 0 and 1.
        root: the export that paths belong to. A NIfTI file's ``sample_id`` is a digest of its path below it, so that
            it agrees with that of :py:func:`monai_salm.release.catalog.scan`; default: of its name.

    Raises:
        ValueError: When ``spatial_dims`` is neither 2 nor 3.

    Example:
        >>> import nibabel, tempfile
        >>> path = Path(tempfile.mkdtemp(), "image.nii")
        >>> nibabel.save(nibabel.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4)), path)
        >>> image = LoadStored(spatial_dims=3)(path)
        >>> image.shape, image.dtype, image.meta["sample_id"]
        (torch.Size([1, 3, 4, 5]), torch.int16, 'case-580cbf99d37738b4')
    """

    backend = [TransformBackends.NUMPY]

    def __init__(
        self, *, spatial_dims: int, window: Window = "auto", root: str | os.PathLike[str] | None = None
    ) -> None:
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims is {spatial_dims}; use 2 for images or 3 for volumes")
        self.spatial_dims = spatial_dims
        self.window = as_window(window)
        self.root = None if root is None else str(root)

    def __call__(self, source: Case | str | os.PathLike[str]) -> Tensor:
        """Read a case, an image file, or the folder of one DICOM series.

        Returns:
            (C, *spatial) stored values; C is 3 of RGB images, else 1.

        Raises:
            RefusedError: When the file cannot be protected.
        """
        return self.read(source)[0]

    def read(self, source: Case | str | os.PathLike[str]) -> tuple[Tensor, dict[str, Any]]:
        """The same, and the metadata beside it, whether or not MONAI tracks them."""
        case = source if isinstance(source, Case) else case_of(source, self.spatial_dims, root=self.root)
        image = formats.read(case, self.spatial_dims, self.window)
        meta = _meta(case, image.spacing) | {"stored_codec": image.codec.to_meta(), "intensity": "stored"}
        return _tracked(image.stored, meta), meta


class LoadMask(Transform):
    """Class index of each voxel of a case, on the grid and axes that :py:class:`LoadStored` gives the image.

    Args:
        spatial_dims: 2 for images, 3 for volumes.

    Raises:
        ValueError: When ``spatial_dims`` is neither 2 nor 3.
    """

    backend = [TransformBackends.NUMPY]

    def __init__(self, *, spatial_dims: int) -> None:
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims is {spatial_dims}; use 2 for images or 3 for volumes")
        self.spatial_dims = spatial_dims

    def __call__(self, source: Case) -> Tensor:
        """Read the mask of a case of a cohort with voxel labels.

        Returns:
            (1, *spatial) uint8; 0 is the background.

        Raises:
            RefusedError: When image and label do not fit each other.
            ValueError: When the case has no mask.
        """
        mask = read_mask(source, self.spatial_dims)
        return _tracked(mask, _meta(source, formats.read_spacing(source, self.spatial_dims)))


class SaveStored(Transform):
    """Write protected images as files of their own format, derived from their sources (see ``release``).

    One file per case (a series: per slice) goes to ``output_dir/protected``, verified before it is visible; nothing but
    voxels (and what marks a derived DICOM file) differs from the source. A whole release with manifest, labels (of
    voxels too) and archives is the business of :py:func:`monai_salm.release.protect.protect_cohort`.

    Args:
        output_dir: a new or empty folder outside of the export.
        catalog: the export's cases, from :py:func:`monai_salm.release.catalog.scan` or with their labels.
        budget: the bound that no change may exceed.
        spatial_dims: 2 or 3.
        window: as it was for reading.
        key_file: secret of the new DICOM UIDs; default ``output_dir/private/release.key``, made on first use.

    Raises:
        ValueError: When the output folder overlaps the export or holds foreign files.
    """

    backend = [TransformBackends.NUMPY]

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        catalog: Catalog | Cohort,
        *,
        budget: Budget | str | float,
        spatial_dims: int,
        window: Window = "auto",
        key_file: str | os.PathLike[str] | None = None,
    ) -> None:
        self.output_dir = Path(output_dir).absolute()
        self.cases = {case.sample_id: case for case in catalog.cases}
        self.budget = Budget.parse(budget)
        self.load = LoadStored(spatial_dims=spatial_dims, window=window)
        commit.check_output(catalog.root, self.output_dir)
        commit.open_output(self.output_dir)
        self.uids = UidMap(load_or_create_key(self.output_dir / KEY if key_file is None else key_file))
        self.when = datetime.now(timezone.utc).replace(microsecond=0)

    def __call__(self, img: NdarrayOrTensor, sample_id: str | None = None) -> NdarrayOrTensor:
        """Write one image; returns it as it came.

        Args:
            img: (C, *spatial) protected stored values on the grid of the source file.
            sample_id: the case; default: the metadata say it.

        Raises:
            KeyError: When the catalog has no such case.
            ValueError: When the case is held out or part of an archive, or the image left budget, grid or type.
            RefusedError: When the file cannot be protected or its written copy does not verify.
            OutputError: When the disk is full or cannot be written.
        """
        name = meta_of(img, "sample_id", sample_id)
        if name not in self.cases:
            raise KeyError(f"no case {name!r} in the catalog: scan the export that the image comes from")
        case = self.cases[name]
        if case.split == "test" or case.index is not None:
            what = "held out for the test" if case.split == "test" else "part of a file with others"
            raise ValueError(f"{name} is {what}: leave it out here (release.protect_cohort knows how to treat it)")
        delta, limits = self._delta(case, img)
        files = formats.protect(
            (case,),
            lambda _: delta,
            uids=self.uids,
            when=self.when,
            spatial_dims=self.load.spatial_dims,
            window=self.load.window,
        )
        commit.commit(self.output_dir, (self._staged(case, file, limits) for file in files))
        return img

    def _staged(self, case: Case, file: formats.ProtectedFile, limits: tuple[float, float]) -> commit.Staged[Any]:
        def verify(path: Path) -> Any:
            return formats.verify(case.format, file.source, path, *limits)

        return commit.Staged(commit.PROTECTED / file.name, file.content, verify)

    def _delta(self, case: Case, img: NdarrayOrTensor) -> tuple[np.ndarray, tuple[float, float]]:
        """Lattice steps from the source to ``img``, and the largest change that is allowed, stored and physical."""
        source = formats.read(case, self.load.spatial_dims, self.load.window)
        codec = source.codec
        protected = stored_array(img, codec)
        check_same_shape(f"{case.sample_id}: protected image", protected, "source", source.stored)
        change = protected.astype(np.float64) - source.stored.astype(np.float64)
        delta = np.rint(np.nan_to_num(change) / codec.step).astype(np.int32)
        lower, upper = codec.bounds(torch.from_numpy(source.stored), self.budget)
        outside = (delta < lower.numpy()) | (delta > upper.numpy())
        if outside.any() or image_digest(codec.add(source.stored, delta)) != image_digest(protected):
            raise ValueError(
                f"{case.sample_id}: {int(outside.sum())} voxels are outside the budget of {self.budget}, the window "
                "or the lattice: use ApplyPerturbation, or SnapToStored before adding"
            )
        return delta, (codec.levels(self.budget) * codec.step, codec.physical_limit(self.budget))


def _meta(case: Case, spacing: tuple[float, ...]) -> dict[str, Any]:
    """Metadata that tell which case it is and how it lies, to us and to MONAI."""
    named = {"sample_id": case.sample_id, MetaKeys.ORIGINAL_CHANNEL_DIM: 0, "filename_or_obj": case.sample_id}
    return named | {"affine": affine_of(spacing)}


def _tracked(values: np.ndarray, meta: dict[str, Any]) -> Tensor:
    tensor = convert_to_tensor(values, track_meta=get_track_meta())
    if isinstance(tensor, MetaTensor):
        tensor.meta = {**tensor.meta, **meta}
    return tensor


def case_of(path: str | os.PathLike[str], spatial_dims: int, *, root: str | os.PathLike[str] | None = None) -> Case:
    """The case of one image file, or of the folder of one DICOM series.

    Args:
        path: the file or folder.
        spatial_dims: 2 or 3.
        root: the export that it belongs to, see :py:class:`LoadStored`.

    Raises:
        FileNotFoundError: When there is nothing.
        ValueError: When it does not lie in ``root``.
        RefusedError: When it is of another kind, or a folder does not hold exactly one series.
    """
    path = Path(path).absolute()
    if not path.exists():
        raise FileNotFoundError(f"there is no image at {path}; check the path")
    name = path.name if root is None else _name_in(Path(root), path)
    if path.is_file() and nifti.sniff(nifti.read_head(path)):
        if worker.call(nifti.count_volumes, path, spatial_dims) > 1:
            raise RefusedError("several_images", "the file holds several; hand over cases from release.catalog.scan")
        return Case(pseudonym(name), "nifti", (path,), (name,), pseudonym(name))
    form = raster.sniff(nifti.read_head(path)) if path.is_file() else None
    if form:
        worker.call(raster.count_colors, path, spatial_dims)
        return Case(pseudonym(name), form, (path,), (name,), pseudonym(name))
    files = [path] if path.is_file() else sorted(entry for entry in path.iterdir() if dicom.looks_like_dicom(entry))
    if not files or not dicom.looks_like_dicom(files[0]):
        raise RefusedError(
            "unknown_file", "neither DICOM nor NIfTI, PNG or TIFF; hand over cases from release.catalog.scan instead"
        )
    headers = [worker.call(dicom.read_header, file) for file in files]
    if path.is_dir() and (others := sum(map(dicom.is_companion, headers))):
        raise RefusedError(
            "unsupported_sop_class",
            f"{others} of {len(files)} files of the folder hold no image (DICOM SEG, a report or the like); hand over "
            "a folder of the images alone, or cases from release.catalog.scan",
        )
    for header in headers:
        dicom.check_supported(header, spatial_dims)
    if len({header.SeriesInstanceUID for header in headers}) > 1 or (spatial_dims == 2 and len(files) > 1):
        raise RefusedError("several_images", "the folder holds several; hand over cases from release.catalog.scan")
    if spatial_dims == 3:
        files = [files[index] for index in dicom.order_files(headers)]
    uid = str(headers[0].SeriesInstanceUID if spatial_dims == 3 else headers[0].SOPInstanceUID)
    return Case(pseudonym(uid), "dicom", tuple(files), (name, uid), pseudonym(uid))


def _name_in(root: Path, path: Path) -> str:
    """Name of a file as a scan of the export gives it: where it lies in truth, for a scan follows no links."""
    folder, place = root.resolve(), path.resolve()
    if not place.is_relative_to(folder):
        leads = "" if place == path else f" leads to {place}, which"
        raise ValueError(f"{path}{leads} does not lie in {folder}; root must be the export that the image belongs to")
    return place.name if place == folder else place.relative_to(folder).as_posix()
