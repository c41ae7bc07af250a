# SPDX-License-Identifier: Apache-2.0
"""BIDS: which files of a tree are images, and the derivative data set that a protected copy is.

An image gets a name that no raw data set may have (``_desc-protected_``) and a sidecar that names its source. What
accompanies the released images is copied: label files, tables, gradients, inherited sidecars. Layout and keys are
those of the BIDS specification 1.10, "Derivatives".
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from pydicom.datadict import dictionary_VR, tag_for_keyword

from monai_salm import __version__
from monai_salm.io import masks, nifti, worker
from monai_salm.io.base import Case, RefusedError

DESCRIPTION = "dataset_description.json"
PARTICIPANTS = "participants.tsv"
IGNORE = ".bidsignore"
LABEL_SUFFIXES = ("dseg", "mask")
MAX_TEXT_BYTES = 2**26
"""Largest table or sidecar, unpacked."""
PERSONAL = frozenset(
    "PatientID OtherPatientIDs PatientAddress PatientTelephoneNumbers IssuerOfPatientID AccessionNumber StudyID "
    "RequestedProcedureID DeviceSerialNumber StationName PatientsName PatientsBirthDate ScanDate".split()
)
"""Keys that no copy of a sidecar keeps, at any depth. Nor does it keep keys that are the DICOM keyword (PS3.6) of a
person's name, a UID or a date."""
_NAME = re.compile(
    r"(?P<entities>(?:[a-z]+-[A-Za-z0-9+]+_)*)(?P<suffix>[A-Za-z0-9]+)(?P<ending>\.nii|\.nii\.gz|\.json|\.bval|\.bvec|\.tsv|\.tsv\.gz)"
)
_TOP = re.compile(r"README(\.md|\.rst|\.txt)?|CHANGES|LICENSE|CITATION\.cff|participants\.(tsv|json)|\.bidsignore")
_SUBJECT = re.compile(rb"sub-[A-Za-z0-9]+")
_INHERITED = ("BIDSVersion", "License", "Authors", "Acknowledgements", "HowToAcknowledge", "Funding", "EthicsApprovals")
_OF_ANY = (*LABEL_SUFFIXES, "events", "physio", "stim", "channels", "aslcontext")
"""Suffixes of what goes with images of any suffix, such as the events of a functional image."""
_NOT_BIDS = RefusedError("not_bids", "the name does not follow BIDS; rename the file, or protect it as its own export")


def is_tree(root: Path) -> bool:
    """Whether a folder is a BIDS data set: it describes itself and has folders of subjects."""
    return bool(_description(root)) and any(path.is_dir() for path in root.glob("sub-*"))


def protected_name(name: str) -> str:
    """Path of an image in the protected copy.

    Raises:
        RefusedError: When the name is not one of BIDS.

    Example:
        >>> protected_name("sub-01/anat/sub-01_run-2_T1w.nii.gz")
        'sub-01/anat/sub-01_run-2_desc-protected_T1w.nii.gz'
    """
    path = PurePosixPath(name)
    parts = _NAME.fullmatch(path.name)
    if parts is None or not parts["entities"].startswith("sub-") or not parts["ending"].startswith(".nii"):
        raise _NOT_BIDS
    entities = [each for each in parts["entities"].split("_") if each]
    described = [each for each in entities if each.startswith("desc-")]
    if described and described[0].endswith("protected"):
        raise RefusedError("already_protected", "the name says that the file is a protected copy; protect the original")
    others = [each for each in entities if each not in described]
    new = "_".join([*others, f"{''.join(described) or 'desc-'}protected", parts["suffix"]])
    return (path.parent / (new + parts["ending"])).as_posix()


def is_label(name: str) -> bool:
    """Whether a NIfTI file is named as voxel labels, which are never perturbed."""
    parts = _NAME.fullmatch(PurePosixPath(name).name)
    return parts is not None and parts["suffix"] in LABEL_SUFFIXES and parts["ending"].startswith(".nii")


def subject(name: str) -> str:
    """Folder of the subject that a file belongs to, empty for a file that belongs to none."""
    first, *rest = PurePosixPath(name).parts
    return first if rest and first.startswith("sub-") else ""


def folders(name: str) -> list[str]:
    """Folders that a file of a subject lies in, from its own up to the subject's.

    Example:
        >>> folders("sub-01/ses-pre/anat/sub-01_ses-pre_T1w.nii.gz")
        ['sub-01/ses-pre/anat', 'sub-01/ses-pre', 'sub-01']
    """
    return [parent.as_posix() for parent in PurePosixPath(name).parents[:-1]] if subject(name) else []


@worker.isolated
def check_companion(path: Path, name: str, deidentified: bool = False) -> None:
    """Make sure that a file may be copied as it is: by its name it accompanies images, by its content it holds none.

    Args:
        path: the file.
        name: its path relative to the tree.
        deidentified: whether the header of a label file may hold no text either.

    Raises:
        RefusedError: When it may not.
    """
    if is_label(name):
        masks.label_values(path)
        nifti.check_copied(path, deidentified)
        return
    parts = _NAME.fullmatch(PurePosixPath(name).name)
    if not (_TOP.fullmatch(name) or name == DESCRIPTION or (parts and not parts["ending"].startswith(".nii"))):
        raise RefusedError("unknown_file", "the file is no image and nothing that accompanies one in BIDS")
    text = _text(path)
    if name.endswith(".json"):
        _json(text)


def derivative(root: Path, cases: Sequence[Case]) -> dict[str, bytes]:
    """Files of the protected copy besides images and the labels of cases.

    Args:
        root: the tree that was protected.
        cases: what was written.

    Returns:
        Content by path relative to the released folder.
    """
    images = {case.file_name.as_posix(): case.released_name.as_posix() for case in cases}
    subjects = {subject(name) for name in images}
    taken = {case.mask.name for case in cases if case.mask}
    near: dict[str, dict[str, str]] = {}
    for name, copy in images.items():
        near.setdefault(subject(name), {})[name] = copy
    found: dict[str, bytes] = {}
    for name in _companions(root, subjects):
        if name not in taken and _wanted(name, near.get(subject(name), ()) if subject(name) else images):
            with suppress(RefusedError):  # the scan has reported it
                found[name] = _copied(root / name, name)
    raw = _description(root)
    # Required of a derivative; an image of a raw data set is as the scanner made it.
    stripped = {} if raw.get("DatasetType") == "derivative" else {"SkullStripped": False}
    for name, copy in images.items():
        own = found.pop(_sidecar(name), b"{}")
        named = {subject(name), *map(bytes.decode, _SUBJECT.findall(own))}
        copies = {before: after for each in named for before, after in near.get(each, {}).items()}
        found[_sidecar(copy)] = _sidecar_of_copy(own, name, copies, stripped)
    if PARTICIPANTS in found:
        found[PARTICIPANTS] = _of_subjects(found[PARTICIPANTS], subjects)
    found[DESCRIPTION] = _bytes(_derived(raw))
    found[IGNORE] = found.get(IGNORE, b"").rstrip(b"\n") + b"\nlabels.csv\n"
    return found


def _companions(root: Path, subjects: Iterable[str]) -> Iterator[str]:
    """Names of regular files at the top and in the folders of subjects that are no images."""
    places = [*root.iterdir(), *(path for each in subjects if each for path in (root / each).rglob("*"))]
    for path in sorted(places):
        name = path.relative_to(root).as_posix()
        parts = _NAME.fullmatch(path.name)
        known = _TOP.fullmatch(name) or (parts and (is_label(name) or not parts["ending"].startswith(".nii")))
        if known and path.is_file() and not path.is_symlink():
            yield name


def _wanted(name: str, images: Iterable[str]) -> bool:
    """Whether a companion goes with any of some released images; lists of scans, with originals and dates, never do."""
    parts = _NAME.fullmatch(PurePosixPath(name).name)
    return bool(_TOP.fullmatch(name)) or (parts is not None and any(_goes_with(name, parts, each) for each in images))


def _goes_with(name: str, parts: re.Match[str], image: str) -> bool:
    """Whether a companion goes with an image, by the inheritance principle: it lies in the folder of the image or one
    above, no entity contradicts the image's, and its suffix is that of the image or goes with any."""
    its = _NAME.fullmatch(PurePosixPath(image).name)
    if its is None or not PurePosixPath(image).parent.is_relative_to(PurePosixPath(name).parent):
        return False
    mine, other = _entities(parts), _entities(its)
    if any(other.get(key, value) != value for key, value in mine.items()):
        return False
    return parts["suffix"] in _OF_ANY or (parts["suffix"] == its["suffix"] and mine.keys() <= other.keys())


def _entities(parts: re.Match[str]) -> dict[str, str]:
    return dict(each.split("-", 1) for each in parts["entities"].split("_") if each)


def _sidecar(image: str) -> str:
    return re.sub(r"\.nii(\.gz)?$", ".json", image)


@worker.isolated
def _copied(path: Path, name: str) -> bytes:
    """What the copy has of a companion: its bytes, of a sidecar without the keys that name a person, device or day.

    Raises:
        RefusedError: As :py:func:`check_companion`.
    """
    check_companion(path, name)
    content = path.read_bytes()
    if not name.endswith(".json"):
        return content
    told = _json(content.decode("utf-8-sig"))
    kept = _impersonal(told)
    return content if kept == told else _bytes(kept)


@worker.isolated
def _sidecar_of_copy(own: bytes, name: str, copies: Mapping[str, str], stated: Mapping[str, Any]) -> bytes:
    """The sidecar of an image's copy.

    Args:
        own: the sidecar of the image, as the copy may have it.
        name: of the image.
        copies: names of the copies of images that the sidecar may name, by their names.
        stated: what holds where the own sidecar does not say it.
    """
    told = _with_new_names(_json(own.decode("utf-8-sig")), name, copies)
    of_copy = {"Description": "Copy that is protected against training", "Sources": [f"bids:raw:{name}"]}
    return _bytes({**stated, **told, **of_copy})


def _impersonal(value: Any) -> Any:
    if isinstance(value, list):
        return [_impersonal(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: _impersonal(item) for key, item in value.items() if not _is_personal(key)}


def _is_personal(key: str) -> bool:
    tag = tag_for_keyword(key)
    return key in PERSONAL or (tag is not None and dictionary_VR(tag) in ("PN", "UI", "DA", "DT"))


def _with_new_names(sidecar: dict[str, Any], name: str, copies: Mapping[str, str]) -> dict[str, Any]:
    """A sidecar whose ``IntendedFor`` names the copies, in the form in which it named the originals."""

    def new(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        plain = value.removeprefix("bids::")
        first = "" if plain.startswith("sub-") else f"{subject(name)}/"
        copy = copies.get(first + plain)
        return value.removesuffix(plain) + copy.removeprefix(first) if copy else value

    said = sidecar.get("IntendedFor")
    if said is None:
        return sidecar
    return sidecar | {"IntendedFor": list(map(new, said)) if isinstance(said, list) else new(said)}


@worker.isolated
def _of_subjects(table: bytes, subjects: Collection[str]) -> bytes:
    """``participants.tsv`` with the rows of some subjects."""
    lines = table.splitlines(keepends=True)
    return b"".join(
        [*lines[:1], *(row for row in lines[1:] if row.split(b"\t")[0].strip().decode("utf-8") in subjects)]
    )


def _derived(raw: dict[str, Any]) -> dict[str, Any]:
    """``dataset_description.json`` of the copy."""
    doi = raw.get("DatasetDOI")
    source = {"DOI": doi} if isinstance(doi, str) else {}
    return {
        "Name": f"{raw.get('Name', 'Unnamed')}, protected copy",
        **{key: raw[key] for key in _INHERITED if key in raw},
        "DatasetType": "derivative",
        "GeneratedBy": [
            {
                "Name": "monai-salm",
                "Version": __version__,
                "Description": "Voxels moved within a budget, so that models trained on the copy do not generalize",
            }
        ],
        "SourceDatasets": [source] if source else [{"URL": "../.."}],
        "DatasetLinks": {"raw": doi if source else "../.."},
    }


def _description(root: Path) -> dict[str, Any]:
    """Content of ``dataset_description.json``, empty where the file is not one of BIDS."""
    path = root / DESCRIPTION
    try:
        content = _read_json(path) if path.is_file() else {}
    except RefusedError:
        return {}
    return content if isinstance(content.get("BIDSVersion"), str) else {}


@worker.isolated
def _read_json(path: Path) -> dict[str, Any]:
    return _json(_text(path))


def _text(path: Path) -> str:
    """Text of a table or sidecar.

    Raises:
        RefusedError: When it is not text, or too long.
    """
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as stream:
            content = stream.read(MAX_TEXT_BYTES + 1)
            text = content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise RefusedError("not_text", "the file is named as a table or sidecar and holds no text") from error
    if len(content) > MAX_TEXT_BYTES or "\0" in text:
        raise RefusedError("not_text", "the file is named as a table or sidecar and holds something else")
    return text


def _json(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RefusedError("broken_json", "the file is no JSON; correct it") from error
    if not isinstance(content, dict):
        raise RefusedError("broken_json", "the file is no JSON object; correct it")
    return content


def _bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
