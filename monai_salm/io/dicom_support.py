# SPDX-License-Identifier: Apache-2.0
"""Which DICOM images are protected, and the reason codes by which all others are refused."""

from __future__ import annotations

import re

import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from monai_salm.io.base import RefusedError
from monai_salm.io.dicom_copies import check_copies, undecoded
from monai_salm.io.dicom_frames import ENHANCED, frame_headers, is_enhanced
from monai_salm.io.dicom_guard import refusing
from monai_salm.io.dicom_parse import STANDARD_ROOT
from monai_salm.io.dicom_volume import rescale_of

MANUFACTURER = "monai_salm"
"""Manufacturer in ContributingEquipmentSequence, by which a protected file is recognized."""
MODIFYING_EQUIPMENT = "109103"

# Monochrome single-frame images. Dose and parametric maps are left out: their values are measurements, not pictures.
SOP_CLASSES = frozenset(
    {
        uid.CTImageStorage,
        uid.MRImageStorage,
        uid.PositronEmissionTomographyImageStorage,
        uid.ComputedRadiographyImageStorage,
        uid.DigitalXRayImageStorageForPresentation,
        uid.DigitalXRayImageStorageForProcessing,
        uid.DigitalMammographyXRayImageStorageForPresentation,
        uid.DigitalMammographyXRayImageStorageForProcessing,
        uid.DigitalIntraOralXRayImageStorageForPresentation,
        uid.DigitalIntraOralXRayImageStorageForProcessing,
        uid.XRayAngiographicImageStorage,
        uid.XRayRadiofluoroscopicImageStorage,
        uid.UltrasoundImageStorage,
        uid.NuclearMedicineImageStorage,
        uid.SecondaryCaptureImageStorage,
    }
)
_UID = re.compile(r"[0-9A-Za-z._-]{1,64}")  # hashes, UUIDs and names, as de-identification tools write
_OVERLAYS = [(Tag(group, 0x0010), Tag(group, 0x3000)) for group in range(0x6000, 0x6020, 2)]
_MULTI_FRAME_CLASSES = frozenset(
    {
        uid.EnhancedMRColorImageStorage,
        uid.EnhancedXAImageStorage,
        uid.EnhancedXRFImageStorage,
        uid.XRay3DAngiographicImageStorage,
        uid.XRay3DCraniofacialImageStorage,
        uid.BreastTomosynthesisImageStorage,
        uid.UltrasoundMultiFrameImageStorage,
        uid.EnhancedUSVolumeStorage,
        uid.MultiFrameSingleBitSecondaryCaptureImageStorage,
        uid.MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
        uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
        uid.MultiFrameTrueColorSecondaryCaptureImageStorage,
    }
)


def check_supported(header: Dataset, spatial_dims: int = 3, *, allow_protected: bool = False) -> None:
    """Raise unless the image is one that can be read exactly and written back.

    Args:
        header: from :py:func:`read_header`.
        spatial_dims: 2 or 3; multi-frame images are volumes only.
        allow_protected: let protected copies pass.

    Raises:
        RefusedError: ``unsupported_sop_class``, ``multi_frame``, ``single_slice``, ``already_protected``,
            ``missing_uid``, ``missing_pixel_data``, ``unsupported_pixel_format``, ``unsupported_photometric``,
            ``supplemental_palette``, ``embedded_overlay``, ``modality_lut``, ``invalid_rescale``,
            ``invalid_geometry``, ``pixel_copy``, ``nested_too_deep``, or ``unreadable`` when an attribute of the image
            is broken.
    """
    with refusing("unreadable", "an attribute of the image is missing or broken; export it again"):
        values = undecoded(header)  # before a check decodes any: a picture can be hidden in text, too
        _check_class(header, spatial_dims)
        _check_marks(header, allow_protected)
        _check_pixel_format(header)
        _check_overlays(header)
        _check_values(header)
        check_copies(header, values)


def _check_class(header: Dataset, spatial_dims: int) -> None:
    sop_class = header.get("SOPClassUID")
    frames = int(header.get("NumberOfFrames") or 1)
    if is_enhanced(header) and frames == 1:
        detail = "an enhanced image is protected as a volume, and this one has one frame; convert it to a classic image"
        raise RefusedError("single_slice", detail)
    if is_enhanced(header) and spatial_dims == 2:
        raise RefusedError("multi_frame", "an image with many frames is a volume: protect it with --dim 3")
    if sop_class in _MULTI_FRAME_CLASSES or sop_class in SOP_CLASSES and frames != 1:
        raise RefusedError("multi_frame", "of kinds with many frames only enhanced CT, MR and PET are protected")
    if sop_class not in SOP_CLASSES | ENHANCED:
        kinds = "CT, MR, PET, X-ray, US, NM, SC"
        raise RefusedError("unsupported_sop_class", f"not a kind of image that is protected ({kinds})")


def _check_marks(header: Dataset, allow_protected: bool) -> None:
    if is_protected(header) and not allow_protected:
        raise RefusedError("already_protected", "this file is a protected copy; protect the original instead")
    check_identity(header)


def is_protected(header: Dataset) -> bool:
    """Whether a file bears the mark of a protected copy."""
    for item in header.get("ContributingEquipmentSequence") or ():
        purposes = [code.get("CodeValue") for code in item.get("PurposeOfReferenceCodeSequence") or ()]
        if item.get("Manufacturer") == MANUFACTURER and MODIFYING_EQUIPMENT in purposes:
            return True
    return False


def check_identity(header: Dataset) -> None:
    """Raise unless study, series and instance have UIDs.

    Raises:
        RefusedError: ``missing_uid``.
    """
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        value = header.get(keyword)
        if not (isinstance(value, str) and _UID.fullmatch(value)) or value.startswith(STANDARD_ROOT):
            raise RefusedError("missing_uid", f"{keyword} is missing or broken; export the image again")


def _check_pixel_format(header: Dataset) -> None:
    if header.pixel_element is None:
        raise RefusedError("missing_pixel_data", "the file holds no pixel data")
    if header.pixel_element != "PixelData":
        raise RefusedError("unsupported_pixel_format", "floating-point pixel data are not supported yet")
    if header.get("PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2") or header.SamplesPerPixel != 1:
        raise RefusedError("unsupported_photometric", "color and palette images are not supported; only monochrome")
    if header.get("PixelPresentation") in ("COLOR", "MIXED", "TRUE_COLOR"):
        raise RefusedError(
            "supplemental_palette", "some values are shown in color, which a change could turn on or off"
        )
    if header.BitsAllocated not in (8, 16):
        raise RefusedError("unsupported_pixel_format", "only 8 and 16 bits per pixel are supported")
    if not 2 <= header.BitsStored <= header.BitsAllocated or header.PixelRepresentation not in (0, 1):
        raise RefusedError("unsupported_pixel_format", "Bits Stored or Pixel Representation is not possible")
    if header.HighBit != header.BitsStored - 1:
        raise RefusedError("unsupported_pixel_format", "High Bit is not Bits Stored - 1; convert the image")
    if min(header.Rows, header.Columns) < 1:
        raise RefusedError("unsupported_pixel_format", "the image has no rows or no columns")


def _check_overlays(header: Dataset) -> None:
    for rows, data in _OVERLAYS:
        # An overlay without data of its own lies in unused bits of the pixels (retired, PS3.3 C.9.2 of 2004).
        if rows in header and data not in header:
            raise RefusedError("embedded_overlay", "an overlay lies inside the pixel data; convert it to overlay data")


def _check_values(header: Dataset) -> None:
    if header.get("ModalityLUTSequence"):
        raise RefusedError("modality_lut", "values go through a Modality LUT; only slope and intercept are supported")
    with refusing("invalid_rescale", "rescale slope or intercept is not a number; repair the header"):
        scalings = [rescale_of(frame) for frame in frame_headers(header)]
    if not np.isfinite(scalings).all() or not all(slope for slope, _ in scalings):
        raise RefusedError("invalid_rescale", "rescale slope or intercept is not finite, or the slope is 0")
