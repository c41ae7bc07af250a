# SPDX-License-Identifier: Apache-2.0
"""What a scan finds: takes the files of an export one by one, and makes cases, refusals and companions of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from pydicom.dataset import Dataset
from pydicom.uid import MediaStorageDirectoryStorage

from monai_salm.io import dicom, nifti, npz, raster, worker
from monai_salm.io.base import Case, RefusedError
from monai_salm.release import bids
from monai_salm.release.companions import Companion, CompanionFiles
from monai_salm.release.decathlon import DATASET_FILE
from monai_salm.release.folders import OTHER_CHANNELS, other_channels
from monai_salm.release.gates import (
    Refusal,
    Refused,
    ReleasedFiles,
    check_deidentified,
    check_name,
    same_uids,
    uids_of,
    unknown,
)
from monai_salm.release.identity import patient_in, pseudonym
from monai_salm.release.pairing import Found
from monai_salm.release.progress import track
from monai_salm.release.voxels import VoxelLabels

_APPLE_DOUBLE = b"\x00\x05\x16\x07"
"""How files begin that macOS puts beside others on foreign disks (``._name``); they are ignored."""


class Findings:
    """Cases, refusals, label files and companions of an export.

    Args:
        root: the export, as an absolute path.
        spatial_dims: 2 or 3.
        voxels: what tells the voxel labels, if something does.
        require_deidentified: see :py:func:`monai_salm.release.catalog.scan`.
    """

    def __init__(self, root: Path, spatial_dims: int, voxels: VoxelLabels | None, require_deidentified: bool) -> None:
        self.cases: list[Case] = []
        self.refusals: list[Refusal] = []
        self.refused_names: dict[str, tuple[str, ...]] = {}
        self.masks = Found()
        self._root = root
        self._spatial_dims = spatial_dims
        self._voxels = voxels
        self._mask_names = voxels.mask_names if voxels else frozenset()
        self._require_deidentified = require_deidentified
        self._is_bids = bids.is_tree(root)
        self._colors: dict[Path, int] = {}
        """1 or 3 for each PNG and TIFF image."""
        self._headers: dict[Path, Dataset] = {}
        """Of DICOM images."""
        self._broken: dict[Path, RefusedError] = {}
        """Why a DICOM file that has a header cannot be protected."""
        self._unread: dict[str, list[RefusedError]] = defaultdict(list)
        """Why files gave no header, by their SeriesInstanceUID."""
        self._series_in: dict[Path, set[str]] = defaultdict(set)
        """SeriesInstanceUIDs of the images in a folder."""
        self._owners: dict[str, str] = {}
        """``sample_id`` of the case of each DICOM image, by SOPInstanceUID."""
        self._companions = CompanionFiles()
        self._segmentations: list[tuple[Path, str]] = []
        """SEG files that are voxel labels, and their SOPInstanceUIDs."""

    def name(self, path: Path) -> str:
        """POSIX path relative to the export; the file's own name if the export is that file."""
        return path.name if path == self._root else path.relative_to(self._root).as_posix()

    def tells_labels(self, path: Path) -> bool:
        """Whether the file is the ``dataset.json`` that was read for the voxel labels."""
        return self._voxels is not None and self.name(path) == DATASET_FILE

    def enters(self, folder: Path) -> bool:
        """Whether to look into a folder. At the top of a BIDS tree only subjects and label files are of interest."""
        name = self.name(folder)
        is_beside_subjects = self._is_bids and folder.parent == self._root and not name.startswith("sub-")
        return not is_beside_subjects or any(mask.startswith(f"{name}/") for mask in self._mask_names)

    def refuse(self, names: Sequence[str], error: RefusedError, sample_id: str = "") -> None:
        """Refuse what has these real names, under the ``sample_id`` of a case, else a pseudonym of the first name."""
        name = sample_id or pseudonym(names[0])
        self.refusals.append(Refusal(name, error.reason, error.detail))
        self.refused_names[name] = tuple(names)

    def refuse_all(self, refused: Iterable[Refused]) -> None:
        """Refuse each of these, see :py:meth:`refuse`."""
        for each in refused:
            self.refuse(*each)

    def read(self, files: Sequence[Path]) -> None:
        """Read the headers of all files of the export, and make cases of them."""
        released = ReleasedFiles(self._root, files)
        for path in track(files, "reading headers"):
            self._add(path, released)
        self._close_series()
        self._leave_out_other_channels()

    def resolve_companions(self) -> list[Companion]:
        """Companions of the cases; those of nothing else are refused."""
        kept, refused = self._companions.resolve({case.sample_id for case in self.cases}, self._owners, self._broken)
        self.refuse_all(refused)
        return kept

    def _add(self, path: Path, released: ReleasedFiles) -> None:
        """Take one file by its content."""
        try:
            head = nifti.read_head(path)
            released.check(path)
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
        """Refuse a file that gave no header, and with it the volume of its series.

        A label file that a table names is not refused itself: the cases that need it are.
        """
        uids = uids_of(path)
        self._unread[uids[1]].append(error)
        is_label = is_named = self.name(path) in self._mask_names
        with suppress(RefusedError):
            is_label = is_named or bool(self._voxels) and worker.call(dicom.is_segmentation, path)
        if is_label:
            self.masks.broken[self.name(path)] = error
        if not is_named:
            self.refuse([self.name(path), *filter(None, uids)], error)

    def _add_image(self, path: Path, form: str) -> None:
        """Take a NIfTI file, with a case for each of its volumes, or a PNG or TIFF image."""
        name, count = check_name(self.name(path)), 1
        if self._is_bids and form == "nifti" and bids.is_label(name):
            bids.check_companion(path, name, self._require_deidentified)
            return
        if form == "nifti":
            count = worker.call(nifti.count_volumes, path, self._spatial_dims)
        else:
            self._colors[path] = worker.call(raster.count_colors, path, self._spatial_dims)
        if self._require_deidentified:
            worker.call((nifti if form == "nifti" else raster).check_no_text, path)
        # A row of a label table may name the whole subject or session of a BIDS tree.
        others, target = (bids.folders(name), bids.protected_name(name)) if self._is_bids else ([], "")
        for index in range(count):
            names = (name,) if count == 1 else nifti.volume_names(PurePosixPath(name), index)
            self.cases.append(
                Case(
                    sample_id=pseudonym(names[0]),
                    format=form,
                    files=(path,),
                    names=(*names, *others),
                    group=pseudonym(patient_in(name) or name),
                    index=None if count == 1 else index,
                    target=target,
                )
            )

    def _leave_out_other_channels(self) -> None:
        """Refuse the images that a network for most of the others cannot take."""
        others = other_channels(self._root, self.cases, self._colors)
        refused = {case.sample_id for case in others}
        self.cases = [case for case in self.cases if case.sample_id not in refused]
        self.refuse_all((case.names, OTHER_CHANNELS, case.sample_id) for case in others)

    def _add_other(self, path: Path, head: bytes) -> None:
        """Take a file of no format that is protected: it accompanies images of a BIDS tree, or is refused."""
        if self._is_bids:
            bids.check_companion(path, self.name(path))
        elif not head.startswith(_APPLE_DOUBLE):
            raise unknown(path, head)

    def _add_npz(self, path: Path) -> None:
        archive = PurePosixPath(check_name(self.name(path)))
        for split, numbers in worker.call(npz.labels, path, self._spatial_dims).items():
            for index, label in enumerate(numbers.tolist()):
                names = npz.case_names(archive, split, index)
                own = pseudonym(names[0])
                self.cases.append(Case(own, "npz", (path,), names, group=own, index=index, label=label, split=split))

    def _add_dicom(self, path: Path) -> None:
        header = worker.call(dicom.read_scan_header, path)
        if header.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
            return  # a DICOMDIR under another name
        name, is_companion = self.name(path), dicom.is_companion(header)
        if self._require_deidentified and is_companion:
            check_deidentified(header)
        if self._voxels and dicom.is_segmentation(header):
            uid, _ = worker.call(dicom.read_companion, path)  # checks that its pixels are segments and nothing else
            self._segmentations.append((path, uid))
            self.masks.segmentations[name] = path, dicom.seg_header(header)
            return
        if is_companion and name not in self._mask_names:
            self._companions.add(path, name)
            return
        if name in self._mask_names:
            self.masks.files[name] = path  # an image that is named as a label file
        if not _text(header, "SeriesInstanceUID"):
            raise RefusedError("no_series", "the file has no SeriesInstanceUID; export the images again")
        self._headers[path] = header
        try:
            if self._require_deidentified:
                check_deidentified(header)
            dicom.check_supported(header, self._spatial_dims)
        except RefusedError as error:
            self._broken[path] = error

    def _close_series(self) -> None:
        """Turn the DICOM headers into cases."""
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
            if self._spatial_dims == 3:
                self._add_volumes(paths)
            else:
                self._add_instances(paths)
        self._headers.clear()

    def _add_instances(self, paths: Sequence[Path]) -> None:
        """Add the images of a series, each as its own case."""
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
        """Add the volumes of a series, all or none: one, or several where each file holds many frames."""
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
            sample_id = pseudonym(own)
            files = tuple(part[index] for index in order)
            names = (*self._dicom_names(part, whole=own == uid), own)
            self.cases.append(Case(sample_id, "dicom", files, names, _patient(headers[0])))
            self._owners |= {_text(self._headers[path], "SOPInstanceUID"): sample_id for path in part}

    def _dicom_names(self, paths: Sequence[Path], whole: bool = True) -> list[str]:
        """Names of a case: its files, their folders where these hold no other series, and the UID of the study."""
        # The folder of the export itself is no name; it is the parent of the root where the export is one file.
        folders = sorted({path.parent for path in paths} - {self._root, self._root.parent})
        if not whole or self._spatial_dims == 3 and any(len(self._series_in[folder]) > 1 for folder in folders):
            folders = []
        return [*map(self.name, (*paths, *folders)), _text(self._headers[paths[0]], "StudyInstanceUID")]


def _patient(header: Dataset) -> str:
    return pseudonym(
        _text(header, "PatientID") or _text(header, "StudyInstanceUID") or _text(header, "SeriesInstanceUID")
    )


def _text(header: Dataset, keyword: str) -> str:
    return str(header.get(keyword) or "").strip()
