# SPDX-License-Identifier: Apache-2.0
"""The embedded demo cohort: T1-weighted brain MR with a simulated focal lesion, as a hospital would export it.

The anatomy is the MNI152 template with its gray and white matter maps, from the nilearn wheel (no download); MONAI's
random transforms vary it per study. The task has two classes that survive flips: ``none`` and ``lesion`` (a dark,
infarct-like spot of random place, size and contrast). Two thirds of the patients are DICOM series, one third NIfTI
files, and ``labels.csv`` (``case,label,split``) is written last: an export that has one is complete.

Example:
    ``python -m monai_salm.cohorts.demo --dim 2 --output build/demo/export``
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage
from rich.progress import track

from monai_salm.cohorts.anatomy import GEOMETRY, LABELS, load_template, simulate

__all__ = ["write_demo_export"]

DEFAULT_PATIENTS = {2: 96, 3: 153}
NIFTI_PERIOD = 3  # every third patient is exported as NIfTI
TEST_FRACTION = 0.26
SECOND_STUDY_PERIOD = 4  # every fourth DICOM patient has a follow-up study
# Stored value = (physical - intercept) / slope. The physical range is the same for all; the stored integers differ.
SCALING = {"u2": (1.0, 0.0), "i2": (1.25, -40.0), "nifti": (1.1, -16.0)}


@dataclass(frozen=True)
class _Series:
    """One study of one patient: what it is called, which files it becomes, and the label of each of its cases."""

    dim: int
    seed: int
    patient: int
    study: int
    is_dicom: bool
    split: str
    labels: tuple[str, ...]
    files: tuple[str, ...]  # relative paths; for DICOM one per slice, from the feet up

    @property
    def cases(self) -> tuple[str, ...]:
        """The cases as ``labels.csv`` names them."""
        return (Path(self.files[0]).parent.as_posix(),) if self.is_dicom and self.dim == 3 else self.files

    @property
    def n_slices(self) -> int:
        return _n_slices(self.dim, self.is_dicom)

    def digest(self, *parts: object) -> bytes:
        """Bytes that depend on the parameters of the export and this study only."""
        return _digest(self.dim, self.seed, self.patient, self.study, *parts)

    def uid(self, *parts: object) -> UID:
        """A UID below 2.25 (a UUID as an integer) that is the same in each run."""
        return UID(f"2.25.{int.from_bytes(self.digest('uid', *parts)[:16], 'big')}")

    def generator(self) -> np.random.Generator:
        return np.random.default_rng(np.frombuffer(self.digest("pixels"), dtype=np.uint32))


def _digest(*parts: object) -> bytes:
    return hashlib.sha256("/".join(map(str, ("monai_salm demo", *parts))).encode()).digest()


def _n_slices(dim: int, is_dicom: bool) -> int:
    if dim == 3:
        return GEOMETRY[3].shape[2]
    return 4 if is_dicom else 5


def _file_names(dim: int, seed: int, patient: int, study: int, is_dicom: bool) -> tuple[str, ...]:
    """Relative paths of the files of a study. The names of DICOM slices sort in another order than the slices."""
    n_slices, tag = _n_slices(dim, is_dicom), _digest(dim, seed, patient, study, "name").hex()[:6].upper()
    if not is_dicom:
        n_files = n_slices if dim == 2 else 1
        return tuple(f"PAT{patient:03d}/T1W_{tag}_{index:02d}.nii.gz" for index in range(n_files))
    order = np.random.default_rng([dim, seed, patient, study]).permutation(n_slices)
    if np.all(np.diff(order) > 0):
        order = order[::-1]
    return tuple(f"PAT{patient:03d}/ST{study:03d}/SE{tag}/IM{number:04d}" for number in order)


def _plan(dim: int, seed: int, n_patients: int) -> list[_Series]:
    """Decide all studies, files, splits and labels. Patients are split within each format, labels within each split."""
    rng = np.random.default_rng([dim, seed, n_patients])
    formats = {True: [], False: []}
    for patient in range(n_patients):
        formats[patient % NIFTI_PERIOD != NIFTI_PERIOD - 1].append(patient)
    plan = []
    for is_dicom, patients in formats.items():
        order = rng.permutation(patients)
        n_test = max(1, round(TEST_FRACTION * len(order)))
        for split, members in (("test", order[:n_test]), ("train", order[n_test:])):
            studies = [
                (int(patient), study)
                for patient in sorted(members)
                for study in range(2 if is_dicom and patients.index(patient) % SECOND_STUDY_PERIOD == 0 else 1)
            ]
            per_study = _n_slices(dim, is_dicom) if dim == 2 else 1
            labels = iter(rng.permutation(np.resize(LABELS, per_study * len(studies))).tolist())
            for patient, study in studies:
                files = _file_names(dim, seed, patient, study, is_dicom)
                own = tuple(next(labels) for _ in range(per_study))
                plan.append(_Series(dim, seed, patient, study, is_dicom, split, own, files))
    return sorted(plan, key=lambda series: (series.patient, series.study))


def _labels_csv(plan: Sequence[_Series]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("case", "label", "split"))
    for series in plan:
        writer.writerows((case, label, series.split) for case, label in zip(series.cases, series.labels, strict=True))
    return text.getvalue()


def _affine(series: _Series) -> NDArray[np.float64]:
    """From voxel to millimeters, axes pointing right, anterior, superior; each study lies a little differently."""
    rng = np.random.default_rng([series.seed, series.patient, series.study])
    x, y, z = GEOMETRY[series.dim].spacing
    affine = np.diag([x, y, z * GEOMETRY[series.dim].level_step, 1.0])
    affine[:3, 3] = np.array([-80.0, -110.0, -60.0]) + np.round(rng.uniform(-5, 5, 3), 2)
    return affine


def _to_stored(physical: NDArray[np.float32], scaling: str, low: int, high: int) -> NDArray[np.int64]:
    slope, intercept = SCALING[scaling]
    return np.clip(np.rint((physical - intercept) / slope), low, high).astype(np.int64)


def _write_nifti(root: Path, series: _Series, physical: NDArray[np.float32]) -> None:
    stored = _to_stored(physical, "nifti", -32768, 32767).astype(np.int16)
    affine = _affine(series)
    for index, name in enumerate(series.files):
        offset = np.eye(4)
        offset[2, 3] = index
        part = stored if series.dim == 3 else stored[:, :, index : index + 1]
        image = nib.Nifti1Image(part, affine @ offset, dtype=np.int16)
        image.set_sform(affine @ offset, code=1)
        image.set_qform(affine @ offset, code=1)
        image.header.set_xyzt_units("mm", "sec")
        image.header.set_slope_inter(*SCALING["nifti"])  # after the data: nibabel then writes the integers as they are
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=4, mtime=0))


def _write_dicom(root: Path, series: _Series, physical: NDArray[np.float32]) -> None:
    kind = "i2" if (series.patient + series.study) % 2 else "u2"
    low, high = (-32768, 32767) if kind == "i2" else (0, 4095)
    # DICOM points left and posterior where NIfTI points right and anterior; rows are the second axis.
    stored = _to_stored(physical, kind, low, high)[::-1, ::-1].transpose(2, 1, 0).astype(f"<{kind}")
    corner = np.array([physical.shape[0] - 1, physical.shape[1] - 1, 0, 1])
    affine = _affine(series)
    header = _header(series, kind, physical)
    (root / series.files[0]).parent.mkdir(parents=True, exist_ok=True)
    for index, (name, pixels) in enumerate(zip(series.files, stored, strict=True)):
        right, anterior, superior = (affine @ (corner + [0, 0, index, 0]))[:3]
        header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = series.uid("instance", index)
        header.InstanceNumber = index + 1
        header.ImagePositionPatient = [round(float(value), 4) for value in (-right, -anterior, superior)]
        header.SliceLocation = round(float(superior), 4)
        header.Rows, header.Columns = pixels.shape
        header.PixelData = pixels.tobytes()
        header["PixelData"].VR = "OW"
        header.save_as(root / name, enforce_file_format=True)


def _header(series: _Series, kind: str, physical: NDArray[np.float32]) -> Dataset:
    """What the slices of a series share: all Type 1 and Type 2 attributes of MR Image Storage (PS3.3 A.4)."""
    x, y, _ = GEOMETRY[series.dim].spacing
    slope, intercept = SCALING[kind]
    low, high = np.percentile(physical, (1, 99.5))
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header = Dataset()
    header.file_meta = meta
    _identify(header, series)
    header.SOPClassUID, header.ImageType = MRImageStorage, ["ORIGINAL", "PRIMARY", "OTHER"]
    header.ScanningSequence, header.SequenceVariant, header.ScanOptions = "GR", "SP", ""
    header.MRAcquisitionType, header.RepetitionTime, header.EchoTime, header.EchoTrainLength = "3D", 9.2, 3.4, 1
    header.FlipAngle, header.MagneticFieldStrength = 8, 1.5
    header.SliceThickness = GEOMETRY[series.dim].spacing[2]
    header.SpacingBetweenSlices = GEOMETRY[series.dim].spacing[2] * GEOMETRY[series.dim].level_step
    header.ImageOrientationPatient, header.PixelSpacing = [1, 0, 0, 0, 1, 0], [y, x]
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.PixelRepresentation = (
        16,
        12 if kind == "u2" else 16,
        int(kind == "i2"),
    )
    header.HighBit = header.BitsStored - 1
    header.RescaleSlope, header.RescaleIntercept, header.RescaleType = slope, intercept, "US"
    header.WindowCenter, header.WindowWidth = round(float(low + high) / 2), round(float(high - low))
    return header


def _identify(header: Dataset, series: _Series) -> None:
    """Whose study it is: a person who does not exist, with a name and a number as in a hospital."""
    header.SpecificCharacterSet = "ISO_IR 100"
    header.PatientName, header.PatientID = (
        f"Demo^Patient{series.patient:03d}",
        f"DEMO{series.seed}-{series.patient:05d}",
    )
    header.PatientBirthDate = f"{1940 + series.patient * 7 % 60}{1 + series.patient % 12:02d}15"
    header.PatientSex = "FM"[series.patient % 2]
    header.StudyDate = f"{2021 + series.study}{1 + series.patient % 12:02d}{1 + series.patient % 28:02d}"
    header.StudyTime, header.StudyID = f"{8 + series.patient % 9:02d}3000", str(series.study + 1)
    header.AccessionNumber, header.ReferringPhysicianName = f"A{series.patient:04d}{series.study}", "Demo^Doctor"
    header.Modality, header.SeriesNumber, header.SeriesDescription = "MR", 1, "T1w GRE"
    header.Manufacturer, header.PatientPosition, header.BodyPartExamined = "monai_salm demo", "HFS", "BRAIN"
    header.PositionReferenceIndicator, header.AcquisitionNumber = "", 1
    header.StudyInstanceUID, header.SeriesInstanceUID = series.uid("study"), series.uid("series")
    header.FrameOfReferenceUID = series.uid("frame")


def _is_written(output: Path, plan: Sequence[_Series]) -> bool:
    """Whether `output` holds this export and nothing else.

    Raises:
        FileExistsError: When `output` holds anything else, so that nothing is ever mixed or overwritten.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    labels = output / "labels.csv"
    if labels.is_file() and labels.read_bytes() == _labels_csv(plan).encode():
        present = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
        if present == {"labels.csv"}.union(*(series.files for series in plan)):
            return True
    raise FileExistsError(
        f"output {str(output)!r} is not empty and is not a complete demo export with these parameters; "
        "delete it or name another folder"
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch sum in one order: a convolution on two threads rounds differently, and so do the stored integers."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def write_demo_export(
    output: str | Path, spatial_dims: int, seed: int = 0, n_patients: int | None = None, progress: bool = True
) -> bool:
    """Write the demo cohort; the same arguments give the same bytes.

    Args:
        output: folder to write; it is created, and may hold nothing but the same export.
        spatial_dims: 2 for a case per DICOM instance and per single-slice NIfTI file of shape (112, 128, 1),
            3 for a case per series and per NIfTI volume of shape (52, 62, 52).
        seed: decides labels, split, names, UIDs and pixels.
        n_patients: number of patients, at least 6; by default 96 in 2D (480 cases) and 153 in 3D (179 cases).
        progress: whether to show a progress bar.

    Returns:
        Whether anything was written; False when the export was already there.

    Raises:
        ValueError: When `spatial_dims` is not 2 or 3, `seed` is negative or there are fewer than 6 patients.
        FileExistsError: When `output` holds anything else than this export.
        ImportError: When nilearn is not installed.
    """
    if spatial_dims not in GEOMETRY:
        raise ValueError(f"spatial_dims is {spatial_dims!r}; use 2 or 3")
    if seed < 0:
        raise ValueError(f"seed is {seed}; use 0 or more")
    n_patients = DEFAULT_PATIENTS[spatial_dims] if n_patients is None else n_patients
    if not 6 <= n_patients <= 999:
        raise ValueError(f"n_patients is {n_patients}; use 6 to 999, so that both formats have a train and a test part")
    output = Path(output)
    plan = _plan(spatial_dims, seed, n_patients)
    if _is_written(output, plan):
        return False
    with _one_thread():
        template = load_template(spatial_dims)
        output.mkdir(parents=True, exist_ok=True)
        for series in track(plan, description="demo export", disable=not progress):
            write = _write_dicom if series.is_dicom else _write_nifti
            write(output, series, simulate(template, series.labels, series.generator()))
    (output / "labels.csv").write_bytes(_labels_csv(plan).encode())
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of ``python -m monai_salm.cohorts.demo``."""
    parser = argparse.ArgumentParser(prog="python -m monai_salm.cohorts.demo", description="Write the demo cohort.")
    parser.add_argument("--dim", type=int, choices=sorted(GEOMETRY), required=True, help="2D slices or 3D volumes")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, new or empty")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another cohort (default: 0)")
    options = parser.parse_args(arguments)
    try:
        written = write_demo_export(options.output, options.dim, options.seed)
    except (FileExistsError, ImportError, ValueError) as error:
        parser.error(str(error))
    print(f"{options.output}: {'written' if written else 'already there'}")


if __name__ == "__main__":
    main()
