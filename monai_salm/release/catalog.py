# SPDX-License-Identifier: Apache-2.0
"""What is in an export: the cases that can be protected, and every other file with the reason why it cannot.

Files are known by their content, never by their ending; links and devices are never followed. Nothing is guessed: a
series with one broken slice is refused as a whole, and two files with one instance UID are both refused.

Patients, for splits that keep them together: DICOM files by PatientID (by study where it is empty); other files by what
their path says, see :py:func:`monai_salm.release.identity.patient_in`, else each file is its own patient.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from monai_salm.io.base import Case, RefusedError, Window
from monai_salm.perturbations.budget import Budget, as_window
from monai_salm.release.companions import Companion
from monai_salm.release.findings import Findings
from monai_salm.release.gates import IGNORED, Refusal, summary
from monai_salm.release.pairing import pair
from monai_salm.release.pixel_check import sound_cases
from monai_salm.release.voxels import VoxelLabels, class_names


@dataclass(frozen=True)
class Catalog:
    """An export's cases in a fixed order, and what was refused.

    Args:
        root: the export, a folder or one archive.
        cases: what can be protected.
        refusals: everything else.
        refused_names: the real names (paths, UIDs) behind each refusal's pseudonym. Personal: never to be logged.
        classes: names of the classes of voxels, the background first; empty without voxel labels.
        class_voxels: voxels of each class in each case, by sample id; empty where they were not counted.
        companions: files that refer to the cases and are released with them.
    """

    root: Path
    cases: tuple[Case, ...]
    refusals: tuple[Refusal, ...]
    refused_names: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    classes: tuple[str, ...] = ()
    class_voxels: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    companions: tuple[Companion, ...] = ()


def scan(
    root: Path | str,
    spatial_dims: int,
    *,
    window: Window = "auto",
    check_pixels: bool = True,
    voxels: VoxelLabels | None = None,
    classes: Sequence[str] = (),
    require_deidentified: bool = False,
    budget: Budget | None = None,
) -> Catalog:
    """List the cases of an export.

    Args:
        root: a folder, searched to any depth, or one file.
        spatial_dims: 2: each single-frame DICOM instance, NIfTI slice, PNG and TIFF is a case. 3: each DICOM series
            and each NIfTI volume is. Archives hold one or the other.
        window: ``"auto"`` or (low, high) in physical units; an image with no voxel inside is refused.
        check_pixels: decode every case once and refuse what is broken or constant; otherwise only headers are read.
        voxels: what tells the voxel labels, from :py:func:`monai_salm.release.voxels.find_voxel_labels`. Cases then
            have masks (checked with the pixels), label files are no cases, and what has no label is refused.
        classes: of an earlier release, for the voxel labels; see :py:func:`monai_salm.release.voxels.class_names`.
        require_deidentified: refuse DICOM files that do not say that they are de-identified, and NIfTI, PNG and TIFF
            files with free text, dates or the like. Archives cannot say.
        budget: refuse (with the pixels) an image in which it is less than one stored step.

    Raises:
        ValueError: When the folder is missing, empty, or holds nothing that can be protected; when what tells the
            voxel labels does not fit it; when the window is not one; or when the budget is for another modality.
    """
    root = Path(root)
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims is {spatial_dims}; use 2 for slices or 3 for volumes")
    if not root.exists():
        raise ValueError(f"export {root} does not exist; check the path")
    window = as_window(window)
    classes = class_names(voxels, classes) if voxels else ()
    findings = Findings(root.absolute(), spatial_dims, voxels, require_deidentified)
    files = list(_walk(root.absolute(), findings))
    if not files and not findings.refusals:
        raise ValueError(f"export {root} is empty; name the folder that holds the images")
    findings.read(files)
    if voxels:
        refused = [name for names in findings.refused_names.values() for name in names]
        findings.cases, refusals = pair(voxels, classes, findings.cases, findings.masks, refused, spatial_dims)
        findings.refuse_all(refusals)
    class_voxels: dict[str, tuple[int, ...]] = {}
    if check_pixels:
        findings.cases, class_voxels, refusals = sound_cases(findings.cases, spatial_dims, window, budget)
        findings.refuse_all(refusals)
    companions = tuple(findings.resolve_companions())
    if not findings.cases:
        raise ValueError(
            f"export {root} holds no {spatial_dims}D image that can be protected. Refused: {summary(findings.refusals)}"
        )
    cases = sorted(findings.cases, key=lambda case: findings.name(case.files[0]))
    return Catalog(
        root, tuple(cases), tuple(findings.refusals), findings.refused_names, classes, class_voxels, companions
    )


def _walk(folder: Path, findings: Findings) -> Iterator[Path]:
    """Regular files in a fixed order; whatever else is there is refused."""
    if folder.is_file():
        yield folder
        return
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        detail = f"the folder cannot be opened ({error.strerror}); check its permissions"
        findings.refuse([findings.name(folder)], RefusedError("unreadable_file", detail))
        return
    for entry in entries:
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False) and findings.enters(path):
            yield from _walk(path, findings)
        elif entry.is_dir(follow_symlinks=False):
            detail = "only folders of subjects are taken from a BIDS tree; protect this one as its own export"
            findings.refuse([findings.name(path)], RefusedError("no_subject", detail))
        elif not entry.is_file(follow_symlinks=False):
            detail = "links, devices and sockets are never followed; copy the file itself"
            findings.refuse([findings.name(path)], RefusedError("not_a_file", detail))
        elif entry.name.lower() not in IGNORED and not findings.tells_labels(path):
            yield path
