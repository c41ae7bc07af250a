# SPDX-License-Identifier: Apache-2.0
"""Writes DICOM: a source file and new pixels make a derived instance of the same kind; companions get new UIDs."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone, tzinfo
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.tag import Tag

from monai_salm import __version__
from monai_salm.io.base import Case, RefusedError, Window, move
from monai_salm.io.dicom_elements import (
    decode_items,
    encode_element,
    encode_item,
    encode_items,
    pad,
    write_elements,
)
from monai_salm.io.dicom_frames import add_derivation, frame_types, is_enhanced
from monai_salm.io.dicom_guard import refusing
from monai_salm.io.dicom_parse import parse, read_bytes
from monai_salm.io.dicom_pixels import decode, encode
from monai_salm.io.dicom_read import layout_of
from monai_salm.io.dicom_support import MANUFACTURER, MODIFYING_EQUIPMENT, check_supported
from monai_salm.io.dicom_syntax import LOSSY_METHODS, NATIVE

IMPLEMENTATION_CLASS_UID = "2.25.200132710468809192837894090341728322117"
"""The UUID of version 5 of this project's page on PyPI."""
IMPLEMENTATION_VERSION_NAME = "MONAI_SALM"
DERIVATION = "Pixel values were changed sparsely, within a small bound, against unauthorized model training."
CONTRIBUTION = "Protection against unauthorized model training; not for diagnostic use"
SERIES_SUFFIX = " [protected]"
_ADDITION = ("113042", "Pixel by pixel addition")

DECLARED_KEYWORDS = frozenset(
    """
    ImageType InstanceCreationDate InstanceCreationTime SeriesDescription DerivationDescription DerivationCodeSequence
    SourceImageSequence ContributingEquipmentSequence SmallestImagePixelValue LargestImagePixelValue
    SmallestPixelValueInSeries LargestPixelValueInSeries SmallestImagePixelValueInPlane LargestImagePixelValueInPlane
    LossyImageCompression LossyImageCompressionRatio LossyImageCompressionMethod IconImageSequence
    MACParametersSequence DigitalSignaturesSequence PixelData ExtendedOffsetTable ExtendedOffsetTableLengths
    ContentQualification SourceImageEvidenceSequence RetrieveURL RetrieveURI
    """.split()
)
"""Elements that protection may change, besides instance UIDs, retired group lengths and the file meta."""

# Small copies of the unprotected image, what holds for the old bytes or the old encoding only, and addresses, which
# contain the old UIDs.
_REMOVED = frozenset(
    """
    IconImageSequence MACParametersSequence DigitalSignaturesSequence SmallestPixelValueInSeries
    LargestPixelValueInSeries SmallestImagePixelValueInPlane LargestImagePixelValueInPlane ExtendedOffsetTable
    ExtendedOffsetTableLengths RetrieveURL RetrieveURI
    """.split()
)
REMOVED_TAGS = frozenset(Tag(keyword) for keyword in _REMOVED)
DECLARED_TAGS = frozenset(Tag(keyword) for keyword in DECLARED_KEYWORDS)


class UidMapping(Protocol):
    """The part of ``release.identity.UidMap`` that is needed here: ``io`` must not import ``release``."""

    def __call__(self, uid: str) -> str: ...

    def map_dataset(self, dataset: Dataset) -> None: ...


def protect(
    case: Case,
    delta: NDArray[Any],
    *,
    spatial_dims: int,
    window: Window,
    uids: UidMapping,
    when: datetime,
) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Derived files of a case, one per slice, in the order of ``case.files``.

    Args:
        case: as in ``dicom.read``.
        delta: (1, *spatial) integers, lattice steps on canonical axes, as fitted to ``dicom.read`` of this case.
        spatial_dims: 2 or 3.
        window: as in ``dicom.read``; padding and values outside it must not move.
        uids: the release's UID map.
        when: time of the run, the same for all files of a release.

    Yields:
        Relative path ``<study>/<series>/<instance>.dcm`` of mapped UIDs, and the file's bytes.

    Raises:
        RefusedError: As in ``dicom.read``; ``nothing_changed``; ``delta_outside_bounds`` when a voxel moves that must
            not or goes where it must not; ``unwritable``.
        ValueError: When ``delta`` does not fit the image.
    """
    layout = layout_of(case, spatial_dims, window)
    if delta.shape != layout.outline.shape or delta.dtype.kind not in "iu":
        raise ValueError(f"delta {delta.dtype}{delta.shape} does not fit the stored image {layout.outline.shape}")
    if not delta.any():
        raise RefusedError("nothing_changed", "the perturbation is zero everywhere: the copy would not be protected")
    for path, frames in layout.frames(delta).items():
        dataset = parse(read_bytes(path))
        elements = dict(dataset.items())
        check_supported(dataset)
        planes = [move(decode(dataset, index), *frame) for index, frame in enumerate(frames)]
        for tag, element in list(dataset.items()):
            if element is not elements[tag]:  # a check decoded it; undecoded it is written exactly as it was
                dataset[tag] = elements[tag]
        yield _derive(dataset, np.stack(planes), uids, when)


def _derive(dataset: Dataset, planes: NDArray[Any], uids: UidMapping, when: datetime) -> tuple[PurePosixPath, bytes]:
    with refusing("unwritable", "the derived file cannot be written; export the image again"):
        implicit = dataset.original_encoding[0]
        reference = _source_reference(dataset, uids, implicit)
        evidence = _source_evidence(dataset, uids, implicit) if is_enhanced(dataset) else None
        uids.map_dataset(dataset)
        _remove_stale(dataset)
        syntax = _set_pixels(dataset, planes)
        _describe(dataset, when)
        if evidence is not None:
            _describe_frames(dataset, reference, evidence, implicit)
        else:
            _describe_image(dataset, reference, implicit)
        _append_item(dataset, "ContributingEquipmentSequence", _equipment(when, implicit))
        return _path(dataset), _to_bytes(dataset, syntax)


def protect_companion(source: Path, uids: UidMapping) -> tuple[PurePosixPath, bytes]:
    """The copy of a companion (a segmentation, a report): unchanged but for its UIDs.

    Args:
        source: a companion of the originals.
        uids: the release's UID map.

    Returns:
        Relative path as in :py:func:`protect`, and the file's bytes.

    Raises:
        RefusedError: ``unwritable``, and as ``parse`` does.
    """
    dataset = parse(read_bytes(source))
    with refusing("unwritable", "the file cannot be written under new UIDs; export it again"):
        uids.map_dataset(dataset)
        _remove_stale(dataset)
        return _path(dataset), _to_bytes(dataset, dataset.file_meta.TransferSyntaxUID)


def _path(dataset: Dataset) -> PurePosixPath:
    return PurePosixPath(dataset.StudyInstanceUID, dataset.SeriesInstanceUID, f"{dataset.SOPInstanceUID}.dcm")


def _source_reference(dataset: Dataset, uids: UidMapping, implicit: bool) -> bytes:
    """An item that refers to the source by a keyed pseudonym: its UID would identify it, its mapped UID is the copy."""
    return encode_item(
        implicit=implicit,
        ReferencedSOPClassUID=dataset.SOPClassUID,
        ReferencedSOPInstanceUID=_pseudonym(dataset, "SOPInstanceUID", uids),
        PurposeOfReferenceCodeSequence=_code("121322", "Source image for image processing operation", implicit),
    )


def _source_evidence(dataset: Dataset, uids: UidMapping, implicit: bool) -> bytes:
    """An item with study, series and instance of the source (PS3.3 C.17.2.1), by pseudonyms as in the reference."""
    instance = encode_item(
        implicit=implicit,
        ReferencedSOPClassUID=dataset.SOPClassUID,
        ReferencedSOPInstanceUID=_pseudonym(dataset, "SOPInstanceUID", uids),
    )
    series = encode_item(
        implicit=implicit,
        SeriesInstanceUID=_pseudonym(dataset, "SeriesInstanceUID", uids),
        ReferencedSOPSequence=instance,
    )
    study = _pseudonym(dataset, "StudyInstanceUID", uids)
    return encode_item(implicit=implicit, StudyInstanceUID=study, ReferencedSeriesSequence=series)


def _pseudonym(dataset: Dataset, keyword: str, uids: UidMapping) -> str:
    return uids(f"source of {dataset[keyword].value}")


@lru_cache
def _code(value: str, meaning: str, implicit: bool) -> bytes:
    return encode_item(implicit=implicit, CodeValue=value, CodingSchemeDesignator="DCM", CodeMeaning=meaning)


@lru_cache
def _equipment(when: datetime, implicit: bool) -> bytes:
    return encode_item(
        implicit=implicit,
        Manufacturer=MANUFACTURER,
        ManufacturerModelName="SALM",
        SoftwareVersions=__version__,
        ContributionDateTime=when.strftime("%Y%m%d%H%M%S%z"),
        ContributionDescription=CONTRIBUTION,
        PurposeOfReferenceCodeSequence=_code(MODIFYING_EQUIPMENT, "Modifying Equipment", implicit),
    )


def _remove_stale(dataset: Dataset) -> None:
    """Remove the elements of :py:data:`REMOVED_TAGS`, at any depth."""
    for tag in REMOVED_TAGS.intersection(dataset.keys()):
        del dataset[tag]
    for element in dataset.values():
        if not element.is_raw and isinstance(element.value, Items):  # all sequences were parsed by the UID map
            for item in element.value:
                _remove_stale(item)


def _set_pixels(dataset: Dataset, planes: NDArray[Any]) -> str:
    """Replace the pixels, and what describes them; returns their transfer syntax."""
    encoded = len(dataset.PixelData)
    value, vr, syntax = encode(planes, dataset)
    dataset["PixelData"] = DataElement(Tag("PixelData"), vr, value, is_undefined_length=syntax not in NATIVE)
    _mark_lossy(dataset, planes.nbytes / max(encoded, 1))
    for keyword, extreme in (("SmallestImagePixelValue", np.min), ("LargestImagePixelValue", np.max)):
        if keyword in dataset:
            vr = "SS" if dataset.PixelRepresentation else "US"
            dataset[keyword] = DataElement(Tag(keyword), vr, int(extreme(planes)))
    return syntax


def _mark_lossy(dataset: Dataset, ratio: float) -> None:
    """Mark an image as lossy whose source was encoded with loss but does not say so (PS3.3 C.7.6.1.1.5).

    ``00`` (not lossy) is believed unless the syntax is JPEG baseline or extended, which always lose detail.
    """
    syntax = dataset.file_meta.TransferSyntaxUID
    method = LOSSY_METHODS.get(syntax)
    mark = dataset.get("LossyImageCompression")
    if method is None or mark == "01" or (mark == "00" and method != "ISO_10918_1"):
        return
    dataset.LossyImageCompression = "01"
    if not dataset.get("LossyImageCompressionMethod"):
        dataset.LossyImageCompressionMethod = method
        dataset.LossyImageCompressionRatio = f"{ratio:.2f}"


def _describe(dataset: Dataset, when: datetime) -> None:
    dataset.ImageType = _derived_type(dataset.get("ImageType"))
    local = when.astimezone(_zone(dataset))
    dataset.InstanceCreationDate = local.strftime("%Y%m%d")
    dataset.InstanceCreationTime = local.strftime("%H%M%S")
    _append_text(dataset, "SeriesDescription", SERIES_SUFFIX, "LO", 64)


def _zone(dataset: Dataset) -> tzinfo:
    """Time zone of the times in the file (PS3.3 C.12.1.1.8); UTC where it does not tell."""
    said = re.fullmatch(r"([+-])(\d\d)([0-5]\d)", str(dataset.get("TimezoneOffsetFromUTC") or "").strip())
    if said is None or int(said[2]) > 14:
        return timezone.utc
    offset = timedelta(hours=int(said[2]), minutes=int(said[3]))
    return timezone(offset if said[1] == "+" else -offset)


def _describe_image(dataset: Dataset, reference: bytes, implicit: bool) -> None:
    _append_text(dataset, "DerivationDescription", " " + DERIVATION, "ST", 1024)
    _append_item(dataset, "SourceImageSequence", reference)
    _append_item(dataset, "DerivationCodeSequence", _code(*_ADDITION, implicit))


def _describe_frames(dataset: Dataset, reference: bytes, evidence: bytes, implicit: bool) -> None:
    """As :py:func:`_describe_image`, for enhanced images, whose derivation stands in the functional groups."""
    derivation = encode_item(
        implicit=implicit,
        DerivationDescription=DERIVATION,
        DerivationCodeSequence=_code(*_ADDITION, implicit),
        SourceImageSequence=reference,
    )
    for item in frame_types(dataset):
        item.FrameType = _derived_type(item.get("FrameType"))
    if "ContentQualification" in dataset:
        dataset.ContentQualification = "RESEARCH"
    add_derivation(dataset, lambda: decode_items(derivation, implicit=implicit)[0])
    _append_item(dataset, "SourceImageEvidenceSequence", evidence)


def _derived_type(image_type: Any) -> list[str]:
    values = [image_type] if isinstance(image_type, str) else list(image_type or [])
    return ["DERIVED", *(values[1:] or ["PRIMARY"])]


def _append_text(dataset: Dataset, keyword: str, suffix: str, vr: str, room: int) -> None:
    """Append ASCII to a text of at most ``room`` bytes, if it fits, without decoding it.

    That is right in every character set, even where the file declares a wrong one.
    """
    tag = Tag(keyword)
    element = dataset.get_item(tag) if tag in dataset else None
    if element is None or not element.value:
        dataset[tag] = DataElement(tag, vr, suffix.strip())
    elif isinstance(element, RawDataElement) and isinstance(element.value, bytes):
        value = element.value.rstrip(b" \0") + suffix.encode("ascii")
        if len(value) <= room:
            value += b" " * (len(value) % 2)
            dataset[tag] = element._replace(value=value, length=len(value))


def _append_item(dataset: Dataset, keyword: str, item: bytes) -> None:
    tag, value = Tag(keyword), encode_items(dataset, keyword) + item
    dataset[tag] = RawDataElement(tag, "SQ", len(value), value, 0, dataset.original_encoding[0], True)


def _to_bytes(dataset: Dataset, syntax: str) -> bytes:
    """The bytes of a file: preamble, new file meta (PS3.10 7.1), and the data set."""
    if not (dataset.SOPClassUID and dataset.SOPInstanceUID):
        raise ValueError("a file needs a class and an instance UID")
    meta = b"".join(
        encode_element(keyword, value, implicit=False)
        for keyword, value in (
            ("FileMetaInformationVersion", b"\0\1"),
            ("MediaStorageSOPClassUID", dataset.SOPClassUID),
            ("MediaStorageSOPInstanceUID", dataset.SOPInstanceUID),
            ("TransferSyntaxUID", syntax),
            ("ImplementationClassUID", IMPLEMENTATION_CLASS_UID),
            ("ImplementationVersionName", IMPLEMENTATION_VERSION_NAME),
        )
    )
    length = encode_element("FileMetaInformationGroupLength", struct.pack("<L", len(meta)), implicit=False)
    dataset.file_meta.TransferSyntaxUID = syntax
    pad(dataset)
    preamble = bytes(128)  # the source's could hold another image or a program (CVE-2019-11687)
    return b"".join([preamble, b"DICM", length, meta, *write_elements(dataset)])
