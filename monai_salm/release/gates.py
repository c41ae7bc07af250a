# SPDX-License-Identifier: Apache-2.0
"""Refusals, and the checks of any format: no format fits, not de-identified, a UID twice, or protected already."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydicom.dataset import Dataset

from monai_salm.io import dicom, worker
from monai_salm.io.base import RefusedError
from monai_salm.release import commit as door
from monai_salm.release.manifest import LEFT_BY_SYSTEMS, PROTECTED, IntegrityError, read_chain

IGNORED = ("dicomdir", "labels.csv", *LEFT_BY_SYSTEMS)
"""Names (in lower case) of files that are no images and are read elsewhere or made anew."""
_ARCHIVES = (b"PK\3\4", b"PK\5\6", b"7z\xbc\xaf\x27\x1c", b"Rar!")
"""How archives begin: zip, empty zip, 7z and rar."""
Refused = tuple[Sequence[str], RefusedError, str]
"""Real names of what is refused, why, and its ``sample_id``; that is empty unless it is one case."""


@dataclass(frozen=True)
class Refusal:
    """A file, series or case that will not be protected.

    Args:
        name: pseudonym of its path (of the case, where it has one).
        reason: stable snake_case code.
        detail: what was found and what to do; nothing personal.
    """

    name: str
    reason: str
    detail: str


def tally(reasons: Iterable[str] | Mapping[str, int]) -> str:
    """Reasons with their counts, in words: ``"2 broken_file, 1 too_large"``."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(Counter(reasons).items()))


def summary(refusals: Sequence[Refusal | RefusedError]) -> str:
    """Reasons with their counts, and the detail of the most frequent: ``"2 broken_file; broken_file: repair it"``.

    Where that detail names another reason as its cause, the detail of the cause.
    """
    reasons = Counter(refusal.reason for refusal in refusals)
    most = next((each for each in refusals if reasons[each.reason] == max(reasons.values())), None)
    if most is None:
        return "none"
    cause = next((each for each in refusals if each.reason != most.reason and each.reason in most.detail), most)
    return f"{tally(reasons)}; {cause.reason}: {cause.detail}"


def check_name(name: str) -> str:
    """The name of a file whose copy keeps it.

    Raises:
        RefusedError: ``file_name``.
    """
    if any("\udc80" <= letter <= "\udcff" for letter in name):  # how the system hands over what is not UTF-8
        raise RefusedError("file_name", "the file's name is not UTF-8, so that no table can hold it; rename the file")
    return name


def check_deidentified(header: Dataset) -> None:
    """Raise unless a DICOM file says of itself that its patient cannot be told from it.

    BurnedInAnnotation is asked of images only: a SEG file or a report has no picture that text could be burned into.

    Raises:
        RefusedError: ``not_deidentified`` when PatientIdentityRemoved is not YES, or BurnedInAnnotation is not NO.
    """
    removed = str(header.get("PatientIdentityRemoved") or "").strip() == "YES"
    burned = str(header.get("BurnedInAnnotation") or "").strip()
    no_picture = getattr(header, "pixel_element", None) is None or header.get("Modality") == "SEG"
    clean = burned == "NO" or (not burned and no_picture)
    if not removed or not clean:
        missing = [] if removed else ["PatientIdentityRemoved is not YES"]
        missing += [] if clean else ["BurnedInAnnotation is not NO"]
        raise RefusedError("not_deidentified", f"{' and '.join(missing)}; de-identify the export first")


def unknown(path: Path, head: bytes) -> RefusedError:
    """The refusal of a file that is none of the formats; ``head`` are its first bytes."""
    if path.suffix.lower() == ".img" and any(path.with_suffix(ending).is_file() for ending in (".hdr", ".HDR")):
        return RefusedError("nifti_pair", "the voxels of a .hdr/.img pair; convert it to a single .nii file")
    if head[:3] == b"\xff\xd8\xff":
        return RefusedError("jpeg_image", "JPEG cannot hold exact changes; export the image as PNG, TIFF or DICOM")
    if head.startswith(_ARCHIVES) or head[257:262] == b"ustar":  # the latter is tar
        return RefusedError("unknown_file", "an archive of files; unpack it first, and protect the folder")
    return RefusedError("unknown_file", "the content is neither DICOM nor NIfTI, PNG, TIFF or an .npz archive")


def uids_of(path: Path) -> tuple[str, ...]:
    """UIDs of instance, series and study of a refused file, which a table may use as its name; empty where unknown."""
    try:
        return worker.call(dicom.read_uids, path)
    except RefusedError:
        return "", "", ""


def same_uids(files: Iterable[tuple[Path, str]]) -> dict[Path, RefusedError]:
    """The refusal of each DICOM file that has no SOPInstanceUID, or shares it: a PACS keeps only one of such files.

    Args:
        files: each file of the export, and its SOPInstanceUID.
    """
    seen: dict[str, list[Path]] = defaultdict(list)
    for path, uid in files:
        seen[uid].append(path)
    refused = {}
    for uid, paths in seen.items():
        if len(paths) > 1 or not uid:
            detail = f"{len(paths)} files have one SOPInstanceUID" if uid else "there is no SOPInstanceUID"
            refused |= dict.fromkeys(paths, RefusedError("duplicate_uid", f"{detail}; remove copies"))
    return refused


class ReleasedFiles:
    """Files that manifests near an export list as protected, known by their content.

    NIfTI files, archives and pictures carry no mark of their own: a protected copy is known only while the manifest
    lies in the export or beside it.

    Args:
        root: the export.
        files: what it holds.
    """

    def __init__(self, root: Path, files: Iterable[Path]) -> None:
        beside = root.parent.glob(door.MANIFESTS) if root.is_dir() else ()
        manifests = [*beside, *(path for path in files if path.match(door.MANIFESTS))]
        self._digests = {digest for path in manifests for digest in _listed(path)}

    def check(self, path: Path) -> None:
        """Raise when the file is a protected one.

        Raises:
            RefusedError: ``already_protected``.
        """
        if self._digests and door.sha256_of(path) in self._digests:
            raise RefusedError(
                "already_protected", "a manifest lists this very file as a protected one; protect the original instead"
            )


def _listed(path: Path) -> set[str]:
    """Digests of the protected images in a manifest; empty where the file is no manifest of ours."""
    if path.is_symlink():
        return set()
    try:
        records, _ = read_chain(path)
    except (IntegrityError, OSError):
        return set()
    return {str(record.get("sha256")) for record in records if record.get("state") == PROTECTED}
