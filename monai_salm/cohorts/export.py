# SPDX-License-Identifier: Apache-2.0
"""What the exports of all tasks share: a plan of all files before any pixel, studies, NIfTI files, completeness."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from monai_salm.cohorts.anatomy import Geometry, load_template

__all__ = ["Plan", "Study", "digest", "table", "to_stored", "write_nifti"]


@dataclass(frozen=True)
class Study(ABC):
    """One study of one patient: everything about it but its pixels is decided.

    Args:
        geometry: of its images.
        seed: that of the export.
        patient: number of the patient.
        study: number of the study of this patient.
        files: relative paths of all files that `write` writes.
    """

    geometry: Geometry
    seed: int
    patient: int
    study: int
    files: tuple[str, ...]

    @abstractmethod
    def write(self, root: Path, template: NDArray[np.float32]) -> None:
        """Draw the images and write the files below `root`."""

    def digest(self, *parts: object) -> bytes:
        """Bytes that depend on the parameters of the export and this study only."""
        return digest(self.geometry.dim, self.seed, self.patient, self.study, *parts)

    def generator(self, purpose: str) -> np.random.Generator:
        """Random numbers that depend on the same, and on what they are for."""
        return np.random.default_rng(np.frombuffer(self.digest(purpose), dtype=np.uint32))

    @property
    def affine(self) -> NDArray[np.float64]:
        """From voxel to millimeters, axes pointing right, anterior, superior; each study lies a little differently."""
        rng = np.random.default_rng([self.seed, self.patient, self.study])
        x, y, z = self.geometry.spacing
        affine = np.diag([x, y, z * self.geometry.level_step, 1.0])
        affine[:3, 3] = np.array([-80.0, -110.0, -60.0]) + np.round(rng.uniform(-5, 5, 3), 2)
        return affine

    def slice_affine(self, index: int) -> NDArray[np.float64]:
        """The affine of the slice `index` as a file of its own."""
        offset = np.eye(4)
        offset[2, 3] = index
        return self.affine @ offset


@dataclass(frozen=True)
class Plan:
    """An export before it is written.

    Args:
        geometry: of its images.
        studies: in the order in which they are written.
        tables: name and content of the files that describe the images; the last one is written last of all files, so
            that an export that has it is complete.
    """

    geometry: Geometry
    studies: tuple[Study, ...]
    tables: dict[str, bytes]

    def is_written(self, output: Path) -> bool:
        """Whether `output` holds this export and nothing else.

        Raises:
            FileExistsError: When `output` holds anything else, so that nothing is ever mixed or overwritten.
        """
        if not output.exists() or (output.is_dir() and not any(output.iterdir())):
            return False
        paths = {name: output / name for name in self.tables}
        if all(path.is_file() and path.read_bytes() == self.tables[name] for name, path in paths.items()):
            present = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
            if present == set(self.tables).union(*(study.files for study in self.studies)):
                return True
        raise FileExistsError(
            f"output {str(output)!r} is not empty and is not a complete demo export with these parameters; "
            "delete it or name another folder"
        )

    def write(self, output: Path, progress: bool = True) -> None:
        """Write all files into the empty folder `output`, which is created."""
        with _one_thread():
            template = load_template(self.geometry)
            output.mkdir(parents=True, exist_ok=True)
            for study in track(self.studies, description="demo export", disable=not progress):
                study.write(output, template)
        for name, content in self.tables.items():
            (output / name).write_bytes(content)


def digest(*parts: object) -> bytes:
    """32 bytes that depend on `parts` only."""
    return hashlib.sha256("/".join(map(str, ("monai_salm demo", *parts))).encode()).digest()


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> bytes:
    """A CSV file.

    Example:
        >>> table(("case", "label"), [("a.nii", "none")])
        b'case,label\\na.nii,none\\n'
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()


def to_stored(physical: NDArray[np.float32], slope: float, intercept: float, low: int, high: int) -> NDArray[np.int64]:
    """Integers from `low` to `high`; physical value = slope * stored value + intercept."""
    return np.clip(np.rint((physical - intercept) / slope), low, high).astype(np.int64)


def write_nifti(
    path: Path,
    stored: NDArray[np.generic],
    affine: NDArray[np.float64],
    scaling: tuple[float, float] | None = None,
    codes: tuple[int, int] = (1, 1),
) -> None:
    """Write a compressed NIfTI file; its folder is created.

    Args:
        path: ending in ``.nii.gz``.
        stored: voxels as the file holds them, shape (X, Y, Z).
        affine: from voxel to millimeters.
        scaling: slope and intercept of the header; by default it says that there is no scaling.
        codes: sform and qform code of the header, not both 0.
    """
    image = nib.Nifti1Image(stored, affine, dtype=stored.dtype)
    image.set_sform(affine, code=codes[0])
    image.set_qform(affine, code=codes[1])
    image.header.set_xyzt_units("mm", "sec")
    if scaling is not None:
        image.header.set_slope_inter(*scaling)  # after the data: nibabel then writes the integers as they are
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=4, mtime=0))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch sum in one order: a convolution on two threads rounds differently, and so do the stored integers."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
