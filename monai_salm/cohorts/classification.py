# SPDX-License-Identifier: Apache-2.0
"""The classification task: studies with and without a focal lesion, as DICOM series and NIfTI files.

The two classes survive flips: ``none`` and ``lesion`` (a dark, infarct-like spot of random place, size and contrast).
Two thirds of the patients are DICOM series, one third NIfTI files; ``labels.csv`` is ``case,label,split``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage

from monai_salm.cohorts.anatomy import Geometry, acquire, deform
from monai_salm.cohorts.export import Plan, Study, digest, table, to_stored, write_nifti
from monai_salm.cohorts.lesions import add_spot

__all__ = ["LABELS", "plan", "simulate"]

LABELS = ("none", "lesion")
GEOMETRY = {
    2: Geometry(
        dim=2,
        box=((14, 182), (22, 214), (57, 114)),
        shape=(112, 128, 19),
        spacing=(1.5, 1.5, 3.0),
        level_step=3,
        radius=(13, 19),
        contrast=(0.27, 0.39),
        noise=0.025,
    ),
    3: Geometry(
        dim=3,
        box=((20, 176), (24, 210), (0, 156)),
        shape=(52, 62, 52),
        spacing=(3.0, 3.0, 3.0),
        level_step=1,
        radius=(24, 31),
        contrast=(0.46, 0.62),
        noise=0.02,
    ),
}
DEFAULT_PATIENTS = {2: 96, 3: 153}
NIFTI_PERIOD = 3  # every third patient is exported as NIfTI
TEST_FRACTION = 0.26
SECOND_STUDY_PERIOD = 4  # every fourth DICOM patient has a follow-up study
# Stored value = (physical - intercept) / slope. The physical range is the same for all; the stored integers differ.
SCALING = {"u2": (1.0, 0.0), "i2": (1.25, -40.0), "nifti": (1.1, -16.0)}


def plan(spatial_dims: int, seed: int, n_patients: int | None = None) -> Plan:
    """Decide all studies, files, splits and labels. Patients are split within each format, labels within each split.

    Args:
        spatial_dims: 2 for a case per DICOM instance and per single-slice NIfTI file of shape (112, 128, 1),
            3 for a case per series and per NIfTI volume of shape (52, 62, 52).
        seed: decides everything random.
        n_patients: at least 6; by default 96 in 2D (480 cases) and 153 in 3D (179 cases).
    """
    n_patients = DEFAULT_PATIENTS[spatial_dims] if n_patients is None else n_patients
    studies = _studies(spatial_dims, seed, n_patients)
    rows = [(case, label, item.split) for item in studies for case, label in zip(item.cases, item.labels, strict=True)]
    return Plan(GEOMETRY[spatial_dims], tuple(studies), {"labels.csv": table(("case", "label", "split"), rows)})


def simulate(
    template: NDArray[np.float32], labels: Sequence[str], geometry: Geometry, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Draw the magnitude image of one study.

    Args:
        template: what `load_template` returns.
        labels: one label for a volume; in 2D one for each slice of the result.
        geometry: that of the template.
        rng: decides everything random.

    Returns:
        Physical values, shape (X, Y, Z), axes pointing right, anterior, superior; in 2D, Z is the number of labels.
    """
    t1, tissue = deform(template, geometry, len(labels), rng)
    for index, label in enumerate(labels):
        if label != "none":
            target = ... if geometry.dim == 3 else np.s_[:, :, index]
            t1[target] = add_spot(t1[target], tissue[target], geometry, rng)
    return acquire(t1, geometry, rng)


@dataclass(frozen=True)
class _Series(Study):
    """A study and the label of each of its cases. A DICOM study has a file per slice, from the feet up."""

    is_dicom: bool
    split: str
    labels: tuple[str, ...]

    @property
    def cases(self) -> tuple[str, ...]:
        """The cases as ``labels.csv`` names them."""
        is_folder = self.is_dicom and self.geometry.dim == 3
        return (Path(self.files[0]).parent.as_posix(),) if is_folder else self.files

    @property
    def n_slices(self) -> int:
        return _n_slices(self.geometry.dim, self.is_dicom)

    def uid(self, *parts: object) -> UID:
        """A UID below 2.25 (a UUID as an integer) that is the same in each run."""
        return UID(f"2.25.{int.from_bytes(self.digest('uid', *parts)[:16], 'big')}")

    def write(self, root: Path, template: NDArray[np.float32]) -> None:
        physical = simulate(template, self.labels, self.geometry, self.generator("pixels"))
        (_write_dicom if self.is_dicom else _write_nifti)(root, self, physical)


def _n_slices(dim: int, is_dicom: bool) -> int:
    if dim == 3:
        return GEOMETRY[3].shape[2]
    return 4 if is_dicom else 5


def _file_names(dim: int, seed: int, patient: int, study: int, is_dicom: bool) -> tuple[str, ...]:
    """Relative paths of the files of a study. The names of DICOM slices sort in another order than the slices."""
    n_slices, tag = _n_slices(dim, is_dicom), digest(dim, seed, patient, study, "name").hex()[:6].upper()
    if not is_dicom:
        n_files = n_slices if dim == 2 else 1
        return tuple(f"PAT{patient:03d}/T1W_{tag}_{index:02d}.nii.gz" for index in range(n_files))
    order = np.random.default_rng([dim, seed, patient, study]).permutation(n_slices)
    if np.all(np.diff(order) > 0):
        order = order[::-1]
    return tuple(f"PAT{patient:03d}/ST{study:03d}/SE{tag}/IM{number:04d}" for number in order)


def _studies(dim: int, seed: int, n_patients: int) -> list[_Series]:
    rng = np.random.default_rng([dim, seed, n_patients])
    formats = {True: [], False: []}
    for patient in range(n_patients):
        formats[patient % NIFTI_PERIOD != NIFTI_PERIOD - 1].append(patient)
    series = []
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
                series.append(_Series(GEOMETRY[dim], seed, patient, study, files, is_dicom, split, own))
    return sorted(series, key=lambda item: (item.patient, item.study))


def _write_nifti(root: Path, series: _Series, physical: NDArray[np.float32]) -> None:
    stored = to_stored(physical, *SCALING["nifti"], -32768, 32767).astype(np.int16)
    for index, name in enumerate(series.files):
        part = stored if series.geometry.dim == 3 else stored[:, :, index : index + 1]
        write_nifti(root / name, part, series.slice_affine(index), SCALING["nifti"])


def _write_dicom(root: Path, series: _Series, physical: NDArray[np.float32]) -> None:
    kind = "i2" if (series.patient + series.study) % 2 else "u2"
    low, high = (-32768, 32767) if kind == "i2" else (0, 4095)
    # DICOM points left and posterior where NIfTI points right and anterior; rows are the second axis.
    stored = to_stored(physical, *SCALING[kind], low, high)[::-1, ::-1].transpose(2, 1, 0).astype(f"<{kind}")
    corner = np.array([physical.shape[0] - 1, physical.shape[1] - 1, 0, 1])
    header = _header(series, kind, physical)
    (root / series.files[0]).parent.mkdir(parents=True, exist_ok=True)
    for index, (name, pixels) in enumerate(zip(series.files, stored, strict=True)):
        right, anterior, superior = (series.affine @ (corner + [0, 0, index, 0]))[:3]
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
    x, y, _ = series.geometry.spacing
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
    header.SliceThickness = series.geometry.spacing[2]
    header.SpacingBetweenSlices = series.geometry.spacing[2] * series.geometry.level_step
    header.ImageOrientationPatient, header.PixelSpacing = [1, 0, 0, 0, 1, 0], [y, x]
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored = 16, 12 if kind == "u2" else 16
    header.HighBit, header.PixelRepresentation = header.BitsStored - 1, int(kind == "i2")
    header.RescaleSlope, header.RescaleIntercept, header.RescaleType = slope, intercept, "US"
    header.WindowCenter, header.WindowWidth = round(float(low + high) / 2), round(float(high - low))
    return header


def _identify(header: Dataset, series: _Series) -> None:
    """Whose study it is: a person who does not exist, with a name and a number as in a hospital."""
    header.SpecificCharacterSet = "ISO_IR 100"
    header.PatientName = f"Demo^Patient{series.patient:03d}"
    header.PatientID = f"DEMO{series.seed}-{series.patient:05d}"
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
