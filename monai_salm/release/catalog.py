# SPDX-License-Identifier: Apache-2.0
"""What is in an export: the cases that can be protected, and every other file with the reason why it cannot.

Files are known by their content, never by their ending; links and devices are never followed. Nothing is guessed: a
series with one broken slice is refused as a whole, and two files with one instance UID are both refused.

Patients, for splits that keep them together: DICOM files by PatientID (by study where it is empty); other files by what
their path says, see :py:func:`monai_salm.release.identity.patient_in`, else each file is its own patient.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pydicom.dataset import Dataset
from pydicom.uid import MediaStorageDirectoryStorage

from monai_salm.io import dicom, nifti, npz, raster, worker
from monai_salm.io.base import Case, RefusedError, Window
from monai_salm.perturbations.budget import Budget, as_window
from monai_salm.release import bids
from monai_salm.release.companions import Companion, CompanionFiles
from monai_salm.release.decathlon import DATASET_FILE
from monai_salm.release.folders import OTHER_CHANNELS, other_channels
from monai_salm.release.gates import (
    IGNORED,
    Refusal,
    ReleasedFiles,
    check_deidentified,
    check_name,
    same_uids,
    summary,
    uids_of,
    unknown,
)
from monai_salm.release.identity import patient_in, pseudonym
from monai_salm.release.pixel_check import sound_cases
from monai_salm.release.progress import track
from monai_salm.release.voxels import Found, VoxelLabels, class_names, pair

APPLE_DOUBLE = b"\x00\x05\x16\x07"  # how files begin that macOS puts beside others on foreign disks, ``._name``


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
            voxel labels does not fit it; when the window is none; or when the budget is for another modality.
    """
    root = Path(root)
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims is {spatial_dims}; use 2 for slices or 3 for volumes")
    if not root.exists():
        raise ValueError(f"export {root} does not exist; check the path")
    window = as_window(window)
    classes = class_names(voxels, classes) if voxels else ()
    findings = _Findings(root.absolute(), spatial_dims, voxels, require_deidentified)
    files = list(_walk(root.absolute(), findings))
    findings.released = ReleasedFiles(root.absolute(), files)
    if not files and not findings.refusals:
        raise ValueError(f"export {root} is empty; name the folder that holds the images")
    for path in track(files, "reading headers"):
        findings.add(path)
    findings.close_series()
    findings.leave_out_other_channels()
    if voxels:
        refused = [name for names in findings.refused_names.values() for name in names]
        findings.cases, refusals = pair(voxels, classes, findings.cases, findings.masks, refused, spatial_dims)
        for each in refusals:
            findings.refuse(*each)
    if check_pixels:
        findings.cases, findings.class_voxels, refused_pixels = sound_cases(
            findings.cases, spatial_dims, window, budget
        )
        for each in refused_pixels:
            findings.refuse(*each)
    companions = tuple(findings.resolve_companions())
    if not findings.cases:
        raise ValueError(
            f"export {root} holds no {spatial_dims}D image that can be protected. Refused: {summary(findings.refusals)}"
        )
    cases = sorted(findings.cases, key=lambda case: findings.name(case.files[0]))
    refusals = tuple(findings.refusals)
    return Catalog(root, tuple(cases), refusals, findings.refused_names, classes, findings.class_voxels, companions)


class _Findings:
    """Cases and refusals of a scan that is under way."""

    def __init__(self, root: Path, spatial_dims: int, voxels: VoxelLabels | None, require_deidentified: bool) -> None:
        self.root = root
        self.spatial_dims = spatial_dims
        self.cases: list[Case] = []
        self.refusals: list[Refusal] = []
        self.refused_names: dict[str, tuple[str, ...]] = {}
        self.class_voxels: dict[str, tuple[int, ...]] = {}
        self.masks = Found()
        self.colors: dict[Path, int] = {}
        self.released = ReleasedFiles(root, ())
        self._require_deidentified = require_deidentified
        self.bids = bids.is_tree(root)
        self._voxels = voxels
        self._mask_names = voxels.mask_names if voxels else frozenset()
        self._headers: dict[Path, Dataset] = {}
        self._broken: dict[Path, RefusedError] = {}
        self._unread: dict[str, list[RefusedError]] = defaultdict(list)  # by the series of files without a header
        self._series_in: dict[Path, set[str]] = defaultdict(set)
        self._owners: dict[str, str] = {}
        self._companions = CompanionFiles()
        self._segmentations: list[tuple[Path, str]] = []  # with voxel labels: each SEG file and its SOPInstanceUID

    def name(self, path: Path) -> str:
        """Relative POSIX path; the file's own name if the export is that file."""
        return path.name if path == self.root else path.relative_to(self.root).as_posix()

    def tells_labels(self, path: Path) -> bool:
        """Whether the file is the ``dataset.json`` that was read for the voxel labels."""
        return self._voxels is not None and self.name(path) == DATASET_FILE

    def enters(self, folder: Path) -> bool:
        """Whether to look into a folder: at the top of a BIDS tree only into those of subjects, and of label files."""
        name = self.name(folder)
        outside = self.bids and folder.parent == self.root and not name.startswith("sub-")
        return not outside or any(mask.startswith(f"{name}/") for mask in self._mask_names)

    def refuse(self, names: Sequence[str], error: RefusedError, name: str = "") -> None:
        name = name or pseudonym(names[0])
        self.refusals.append(Refusal(name, error.reason, error.detail))
        self.refused_names[name] = tuple(names)

    def add(self, path: Path) -> None:
        """Take one file by its content."""
        try:
            head = nifti.read_head(path)
            self.released.check(path)
            if head[128:132] == b"DICM":
                self._add_dicom(path)
            elif self.name(path) in self._mask_names:
                if nifti.sniff(head):
                    worker.call(nifti.check_copied, path, self._require_deidentified)
                self.masks.files[self.name(path)] = path
            elif nifti.sniff(head):
                self._add_image(path, "nifti")
            elif form := raster.sniff(head):
                self._add_image(path, form)
            elif npz.sniff(head) and worker.call(npz.is_archive, path):
                self._add_npz(path)
            elif head[:2] in (b"\x02\0", b"\x08\0"):  # DICOM without its file header: refused by that name
                self._add_dicom(path)
            else:
                self._add_other(path, head)
        except RefusedError as error:
            self._refuse_file(path, error)
        except OSError as error:
            self._refuse_file(path, RefusedError("unreadable_file", f"the file cannot be opened ({error.strerror})"))

    def _refuse_file(self, path: Path, error: RefusedError) -> None:
        """Refuse a file that gave no header; its series may not do without it. A label file is refused by its cases."""
        uids = uids_of(path)
        self._unread[uids[1]].append(error)
        named = labels = self.name(path) in self._mask_names
        with suppress(RefusedError):
            labels = labels or bool(self._voxels) and worker.call(dicom.is_segmentation, path)
        if labels:
            self.masks.broken[self.name(path)] = error
        if not named:
            self.refuse([self.name(path), *filter(None, uids)], error)

    def _add_image(self, path: Path, form: str) -> None:
        name, count = check_name(self.name(path)), 1
        if self.bids and form == "nifti" and bids.is_label(name):
            bids.check_companion(path, name, self._require_deidentified)
            return
        if form == "nifti":
            count = worker.call(nifti.count_volumes, path, self.spatial_dims)
        else:
            self.colors[path] = worker.call(raster.count_colors, path, self.spatial_dims)
        if self._require_deidentified:
            worker.call((nifti if form == "nifti" else raster).check_no_text, path)
        # A row of a label table may name the whole subject or session of a BIDS tree.
        others, target = (bids.folders(name), bids.protected_name(name)) if self.bids else ([], "")
        for index in range(count):
            names = (name,) if count == 1 else nifti.volume_names(PurePosixPath(name), index)
            at = None if count == 1 else index
            own = (pseudonym(names[0]), form, (path,), (*names, *others), pseudonym(patient_in(name) or name), at)
            self.cases.append(Case(*own, target=target))

    def leave_out_other_channels(self) -> None:
        """Refuse the images that a network for most of the others cannot take."""
        others = {case.sample_id: case for case in other_channels(self.root, self.cases, self.colors)}
        self.cases = [case for case in self.cases if case.sample_id not in others]
        for name, case in others.items():
            self.refuse(case.names, OTHER_CHANNELS, name)

    def _add_other(self, path: Path, head: bytes) -> None:
        if self.bids:
            bids.check_companion(path, self.name(path))
        elif not head.startswith(APPLE_DOUBLE):
            raise unknown(path, head)

    def _add_npz(self, path: Path) -> None:
        archive = PurePosixPath(check_name(self.name(path)))
        for split, numbers in worker.call(npz.labels, path, self.spatial_dims).items():
            for index, label in enumerate(numbers.tolist()):
                names = npz.case_names(archive, split, index)
                own = pseudonym(names[0])
                self.cases.append(Case(own, "npz", (path,), names, own, index, label, split))

    def _add_dicom(self, path: Path) -> None:
        header = worker.call(dicom.read_scan_header, path)
        if header.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
            return  # a DICOMDIR under another name
        if self._require_deidentified and dicom.is_companion(header):
            check_deidentified(header)
        if self._voxels and dicom.is_segmentation(header):
            uid, _ = worker.call(dicom.read_companion, path)  # pixels are segments, no others may hide in it
            self._segmentations.append((path, uid))
            self.masks.segmentations[self.name(path)] = path, dicom.seg_header(header)
            return
        if dicom.is_companion(header) and self.name(path) not in self._mask_names:
            self._companions.add(path, self.name(path))
            return
        if self.name(path) in self._mask_names:
            self.masks.files[self.name(path)] = path  # an image that is named as a label file
        if not _text(header, "SeriesInstanceUID"):
            raise RefusedError("no_series", "the file has no SeriesInstanceUID; export the images again")
        self._headers[path] = header
        try:
            if self._require_deidentified:
                check_deidentified(header)
            dicom.check_supported(header, self.spatial_dims)
        except RefusedError as error:
            self._broken[path] = error

    def close_series(self) -> None:
        """Turn the DICOM headers read so far into cases."""
        images = [(path, _text(header, "SOPInstanceUID")) for path, header in self._headers.items()]
        for path, error in same_uids([*images, *self._companions.uids(), *self._segmentations]).items():
            self._broken.setdefault(path, error)
        for path, _ in self._segmentations:
            if path in self._broken:
                del self.masks.segmentations[self.name(path)]
                self._refuse_file(path, self._broken[path])
        series: dict[str, list[Path]] = defaultdict(list)
        for path, header in self._headers.items():
            series[_text(header, "SeriesInstanceUID")].append(path)
            self.masks.instances[_text(header, "SOPInstanceUID")] = _text(header, "SeriesInstanceUID")
            self._series_in[path.parent].add(_text(header, "SeriesInstanceUID"))
        for paths in series.values():
            if self.spatial_dims == 3:
                self._add_volumes(paths)
            else:
                self._add_instances(paths)
        self._headers.clear()

    def resolve_companions(self) -> list[Companion]:
        """Companions of the cases; those of nothing else are refused."""
        kept, refused = self._companions.resolve({case.sample_id for case in self.cases}, self._owners, self._broken)
        for each in refused:
            self.refuse(*each)
        return kept

    def _add_instances(self, paths: Sequence[Path]) -> None:
        for path in paths:
            header = self._headers[path]
            uid = _text(header, "SOPInstanceUID")
            names = (*self._dicom_names([path]), uid, _text(header, "SeriesInstanceUID"))
            if path in self._broken:
                self.refuse(names, self._broken[path])
            else:
                self.cases.append(Case(pseudonym(uid), "dicom", (path,), names, _patient(header)))
                self._owners[uid] = pseudonym(uid)

    def _add_volumes(self, paths: Sequence[Path]) -> None:
        """The volumes of a series, mostly one; several where each file holds many frames. All or none are added."""
        headers = [self._headers[path] for path in paths]
        uid = _text(headers[0], "SeriesInstanceUID")
        try:
            unread = self._unread[uid]
            if broken := [*unread, *(self._broken[path] for path in paths if path in self._broken)]:
                told = f"{len(broken)} of {len(paths) + len(unread)} files of a series: {broken[0].detail}"
                raise RefusedError(broken[0].reason, told)
            parts = [[path] for path in paths] if all(map(dicom.is_enhanced, headers)) else [paths]
            orders = [dicom.order_files([self._headers[path] for path in part]) for part in parts]
        except RefusedError as error:
            self.refuse((*self._dicom_names(paths), uid), error, pseudonym(uid))
            return
        for part, order in zip(parts, orders, strict=True):
            own = uid if len(parts) == 1 else _text(self._headers[part[0]], "SOPInstanceUID")
            files = tuple(part[index] for index in order)
            names = (*self._dicom_names(part, whole=own == uid), own)
            self.cases.append(Case(pseudonym(own), "dicom", files, names, _patient(headers[0])))
            self._owners |= {_text(self._headers[path], "SOPInstanceUID"): pseudonym(own) for path in part}

    def _dicom_names(self, paths: Sequence[Path], whole: bool = True) -> list[str]:
        """Paths of the files, their folder where that names them without doubt, and the UID of their study."""
        folders = sorted({path.parent for path in paths} - {self.root, self.root.parent})  # the export may be one file
        if not whole or self.spatial_dims == 3 and any(len(self._series_in[folder]) > 1 for folder in folders):
            folders = []
        return [*map(self.name, (*paths, *folders)), _text(self._headers[paths[0]], "StudyInstanceUID")]


def _walk(folder: Path, findings: _Findings) -> Iterator[Path]:
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


def _patient(header: Dataset) -> str:
    return pseudonym(
        _text(header, "PatientID") or _text(header, "StudyInstanceUID") or _text(header, "SeriesInstanceUID")
    )


def _text(header: Dataset, keyword: str) -> str:
    return str(header.get(keyword) or "").strip()
