# SPDX-License-Identifier: Apache-2.0
"""New identities: keyed UIDs, the key's file, and pseudonyms for cases."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import uuid
from pathlib import Path, PurePosixPath

from pydicom.datadict import dictionary_VR, keyword_for_tag, private_dictionary_VR
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID

from monai_salm.io.base import Case, Mask
from monai_salm.io.dicom_guard import MAX_DEPTH, too_deep
from monai_salm.io.dicom_parse import STANDARD_ROOT, holds_items

KEY_BYTES = 32
_ENDINGS = (".nii.gz", ".nii", ".npz", ".png", ".tif", ".tiff")
_PATIENT = re.compile(
    r"""
    (?<![^/]) sub-[a-z0-9]+ (?=/)  # the folder of a subject in BIDS, and the name of a file there
    | (?<![^/]) sub-[a-z0-9]+ (?= (?:_[a-z]+-[a-z0-9]+)* _[a-z0-9]*[a-z][a-z0-9]* \. )
    | (?<![^/]) (?:patient|subject)s?/ [^/]*\d[^/]* (?=/)
    | (?<![a-z0-9]) (?:sub | subject | patient | pat | (?<![^/])pt | pt(?=\d))  # PT within a name is PET
      (?: \d[a-z0-9]*
        | [-_ (]+ [a-z]{2,3} (?= [-_ ]+ (?:slice|image|img|frame|view) (?![a-z]) )  # initials
        | (?: [-_ (]+ (?:[a-z]{2,} | t[12][a-z]*) )* [-_ (]+ [a-z]*\d[a-z0-9]*
        | [-_ (]+ [a-z] (?![a-z0-9]) )
    """,
    re.IGNORECASE | re.VERBOSE,
)

KEPT_UID_KEYWORDS = frozenset(
    """
    SOPClassUID RelatedGeneralSOPClassUID OriginalSpecializedSOPClassUID ReferencedSOPClassUID
    ReferencedSOPClassUIDInFile ReferencedRelatedGeneralSOPClassUIDInFile MediaStorageSOPClassUID SOPClassesInStudy
    SOPClassesSupported PertinentSOPClassesInStudy PertinentSOPClassesInSeries AffectedSOPClassUID RequestedSOPClassUID
    RTVCommunicationSOPClassUID ManufacturerDeviceClassUID
    TransferSyntaxUID ReferencedTransferSyntaxUIDInFile AvailableTransferSyntaxUID StoredInstanceTransferSyntaxUID
    MACCalculationTransferSyntaxUID EncryptedContentTransferSyntaxUID FlowTransferSyntaxUID
    CodingSchemeUID ContextUID ContextGroupExtensionCreatorUID MappingResourceUID
    TemplateExtensionOrganizationUID TemplateExtensionCreatorUID
    ImplementationClassUID PrivateInformationCreatorUID InstanceCreatorUID CreatorVersionUID StorageMediaFileSetUID
    """.split()
)
"""UI elements that name a class, a syntax, a coding scheme or a piece of software, not an instance: never mapped."""
_MAY_HOLD_UIDS = frozenset({"SQ", "UI", "UN", None})
"""Value representations of elements that may hold UIDs; UN and None (not told) may be anything."""


def is_mapped_uid_tag(tag: BaseTag | int | str) -> bool:
    """Whether UIDs in this element (tag or keyword) name instances and are therefore mapped; private tags are.

    Example:
        >>> is_mapped_uid_tag("ReferencedSOPInstanceUID"), is_mapped_uid_tag("ReferencedSOPClassUID")
        (True, False)
    """
    keyword = tag if isinstance(tag, str) else keyword_for_tag(Tag(tag))
    return keyword not in KEPT_UID_KEYWORDS


class UidMap:
    """A keyed map of UIDs without any state, so that parts of a release agree without a shared table.

    ``2.25.<integer of a UUID>`` (PS3.5 B.2), the UUID being the first 128 bits of HMAC-SHA256(key, uid) in the shape
    of version 8 (RFC 9562 5.8). Without the key nobody can test a guess; with another key the release is unlinkable.

    Args:
        key: at least 16 secret bytes, usually from :py:func:`load_or_create_key`.

    Raises:
        ValueError: When the key is shorter.

    Example:
        >>> uids = UidMap(bytes(32))
        >>> uids("1.2.3") == uids("1.2.3"), uids("1.2.3") == UidMap(bytes([1]) * 32)("1.2.3")
        (True, False)
    """

    def __init__(self, key: bytes) -> None:
        if len(key) < 16:
            raise ValueError(f"UID key has {len(key)} bytes; use at least 16, for example from load_or_create_key")
        self._key = bytes(key)

    def __call__(self, uid: str) -> str:
        """The new UID of ``uid`` (padding does not count)."""
        digest = hmac.new(self._key, str(uid).strip(" \0").encode(), hashlib.sha256).digest()
        bits = int.from_bytes(digest[:16], "big")
        bits = bits & ~(0xF << 76) | 0x8 << 76  # version 8
        bits = bits & ~(0x3 << 62) | 0x2 << 62  # variant of RFC 9562
        return f"2.25.{uuid.UUID(int=bits).int}"

    def map_dataset(self, dataset: Dataset, depth: int = 0) -> None:
        """Replace every instance UID at any depth, in place; other elements stay as they were read.

        Only for a dataset freshly parsed from bytes: items that two sequences share would be mapped twice. UIDs
        inside private elements of unknown type are not recognized. ``depth`` is that of an item in a sequence.

        Raises:
            RefusedError: ``nested_too_deep`` when sequences are nested more than 32 deep.
        """
        if depth > MAX_DEPTH:
            raise too_deep()
        for tag, element in list(dataset.items()):
            if element.VR not in _MAY_HOLD_UIDS:
                continue
            vr = element.VR if element.VR not in (None, "UN") else _type_of(dataset, tag)
            if vr == "SQ" and holds_items(element.value):
                for item in dataset[tag].value or ():
                    self.map_dataset(item, depth + 1)
            elif vr == "UI" and is_mapped_uid_tag(tag):
                element = dataset[tag]
                if isinstance(element.value, (MultiValue, list)):
                    element.value = [self._new_value(uid) for uid in element.value]
                elif element.value:
                    element.value = self._new_value(element.value)

    def _new_value(self, uid: str) -> UID:
        return UID(uid if not uid or uid.startswith(STANDARD_ROOT) else self(uid))


def _type_of(dataset: Dataset, tag: BaseTag) -> str | None:
    """Value representation that the dictionaries give for an element that does not tell its own.

    The element is not decoded: that would write it back in another form.
    """
    try:
        if not tag.is_private:
            return str(dictionary_VR(tag))
        if tag.is_private_creator:
            return "LO"
        creator = dataset.get(Tag(tag.group, tag.element >> 8))
        return None if creator is None else str(private_dictionary_VR(tag, str(creator.value)))
    except KeyError:
        return None


def load_or_create_key(path: str | os.PathLike[str]) -> bytes:
    """Read a key of 32 bytes, or make one of random bytes that only its owner can read.

    The file appears complete or not at all, also when several processes start at once: all get the same key.

    Raises:
        PermissionError: When group or others may read the file.
        ValueError: When it is not a regular file of exactly 32 bytes.
    """
    path = Path(path)
    if not path.exists():
        _create_key(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise ValueError(f"key file {path} is not a regular file; name a file of {KEY_BYTES} bytes or a new one")
        if mode & 0o077:
            raise PermissionError(f"key file {path} is open to others (mode {mode & 0o777:04o}); run: chmod 600 {path}")
        key = file.read(KEY_BYTES + 1)
    if len(key) != KEY_BYTES:
        more = "more than " if len(key) > KEY_BYTES else ""
        raise ValueError(
            f"key file {path} has {more}{min(len(key), KEY_BYTES)} bytes instead of {KEY_BYTES}; restore it, or name a "
            "new file (UIDs will then differ from those of earlier releases)"
        )
    return key


def _create_key(path: Path) -> None:
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        os.link(part, path)  # unlike rename, never replaces a key that another process has just made
    except FileExistsError:
        pass
    finally:
        part.unlink()


def patient_in(name: str) -> str:
    """What names the patient in the path of a file, empty where nothing does.

    The first of: ``patient``, ``subject``, ``sub``, ``pat`` (and ``pt``, where a name begins with it or its number
    follows at once) with all that follows up to the first number in the same name, or with a single letter, or with two
    or three where a slice, an image, a frame or a view follows; a folder with a number in one that is called
    ``patients`` or ``subjects``; ``sub-LABEL`` of a BIDS folder or file. Words alone are no patient
    (``patient_scans``). What stands before does not count, for an image and its other series often lie in folders of
    their own: ``patient_7`` of two sites is one patient.

    Example:
        >>> [patient_in(name) for name in ("t1/Patient_7_slice_2.png", "PT_CT_000.nii", "sub-01_T1w.nii", "x_PT.nii")]
        ['patient_7', 'pt_ct_000', 'sub-01', '']
    """
    found = _PATIENT.search(name)
    return found[0].lower() if found else ""


def pseudonym(text: str) -> str:
    """Stable name for a case without any key: ``"case-"`` and 16 hex digits of SHA-256.

    Example:
        >>> pseudonym("1.2.3")
        'case-c47f5b18b8a430e6'
    """
    return f"case-{hashlib.sha256(_name_bytes(text)).hexdigest()[:16]}"


def keyed_name(key: bytes, name: PurePosixPath, folder: str) -> PurePosixPath:
    """A name for a released file that tells nothing of its name in the export but the ending (``.nii.gz``)."""
    digest = hmac.new(key, _name_bytes(f"name:{name}"), hashlib.sha256).hexdigest()[:32]
    ending = next((ending for ending in _ENDINGS if name.name.lower().endswith(ending)), "")
    return PurePosixPath(folder, digest + ending)


def _name_bytes(text: str) -> bytes:
    """Bytes of a text that may be a file's name: Python has those that are no UTF-8 as surrogates."""
    return text.encode(errors="surrogateescape")


def owner_id(case: Case) -> str:
    """``sample_id`` of the manifest rows of a case's image files: the case, or the file that it shares with others."""
    return case.sample_id if case.index is None else pseudonym(case.file_name.as_posix())


def mask_id(mask: Mask) -> str:
    """``sample_id`` of the manifest row of a label file."""
    return pseudonym(mask.name)
