# SPDX-License-Identifier: Apache-2.0
"""Companions of images: segmentations, contours, reports, presentation states, registrations: files without image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydicom import uid
from pydicom.dataset import Dataset

from monai_salm.io.base import MAX_NOTES_BYTES, RefusedError
from monai_salm.io.dicom_guard import refusing
from monai_salm.io.dicom_parse import holds_pixels, read_header
from monai_salm.io.dicom_seg import SEG_CLASSES
from monai_salm.io.dicom_support import check_identity

COMPANION_CLASSES = frozenset(
    {
        *SEG_CLASSES,
        uid.RTStructureSetStorage,
        uid.BasicTextSRStorage,
        uid.EnhancedSRStorage,
        uid.ComprehensiveSRStorage,
        uid.Comprehensive3DSRStorage,
        uid.ExtensibleSRStorage,
        uid.MammographyCADSRStorage,
        uid.ChestCADSRStorage,
        uid.XRayRadiationDoseSRStorage,
        uid.KeyObjectSelectionDocumentStorage,
        uid.GrayscaleSoftcopyPresentationStateStorage,
        uid.ColorSoftcopyPresentationStateStorage,
        uid.PseudoColorSoftcopyPresentationStateStorage,
        uid.BlendingSoftcopyPresentationStateStorage,
        uid.SpatialRegistrationStorage,
        uid.DeformableSpatialRegistrationStorage,
        uid.SpatialFiducialsStorage,
    }
)
_MANAGEMENT = "1.2.840.10008.3.1.2."
"""SOP classes of studies, patients and procedure steps begin so; a reference to one refers to no file."""


def is_companion(header: Dataset) -> bool:
    """Whether the file is of a kind that is released together with the images it refers to."""
    return str(header.get("SOPClassUID")) in COMPANION_CLASSES  # str: a broken file may have several values there


def read_companion(path: Path) -> tuple[str, frozenset[str]]:
    """SOPInstanceUID of a companion, and those of all instances that it refers to.

    Raises:
        RefusedError: ``missing_uid``, ``companion_with_pixels``, ``unreadable``, and as ``read_header`` does.
    """
    header = read_header(path)
    with refusing("unreadable", "a reference of the file is broken; export it again"):
        check_identity(header)
        if (header.pixel_element and header.SOPClassUID not in SEG_CLASSES) or "EncapsulatedDocument" in header:
            detail = "the file holds pixels or a document, which its kind has no place for"
            raise RefusedError("companion_with_pixels", detail)
        if holds_pixels(header) or sum(_private_sizes(header)) >= MAX_NOTES_BYTES:
            detail = "a sequence or large private elements may hold an unprotected image; remove them first"
            raise RefusedError("companion_with_pixels", detail)
        return str(header.SOPInstanceUID), frozenset(_references(header))


def _private_sizes(dataset: Dataset) -> Iterator[int]:
    """Size in bytes of each undecoded private element, at any depth."""
    for tag, element in list(dataset.items()):
        value = element.value
        if dataset[tag].VR == "SQ":
            for item in dataset[tag].value or ():
                yield from _private_sizes(item)
        elif tag.is_private and isinstance(value, bytes):
            yield len(value)


def _references(dataset: Dataset) -> Iterator[str]:
    """Instance UIDs that any item refers to."""
    named, kind = dataset.get("ReferencedSOPInstanceUID"), str(dataset.get("ReferencedSOPClassUID") or "")
    if named and not kind.startswith(_MANAGEMENT):
        yield str(named)
    for element in dataset:
        for item in (element.value or ()) if element.VR == "SQ" else ():
            yield from _references(item)
