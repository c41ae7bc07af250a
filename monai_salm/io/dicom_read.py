# SPDX-License-Identifier: Apache-2.0
"""Which DICOM files are supported, and the exact stored integers and codec of a slice or a volume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset

from monai_salm.io.base import Case, RefusedError, StoredImage, Window
from monai_salm.io.dicom_parse import check_syntax, parse, read_bytes, refusing
from monai_salm.io.dicom_pixels import decode, stored_dtype, stored_range
from monai_salm.io.dicom_volume import (
    from_canonical,
    order_volume,
    orientation_of,
    rescale_of,
    spacing_of,
    to_canonical,
)
from monai_salm.stored import SliceScaling, StoredCodec, auto_window

__all__ = [
    "CT_WINDOW",
    "MANUFACTURER",
    "MODIFYING_EQUIPMENT",
    "SOP_CLASSES",
    "Slices",
    "check_supported",
    "load",
    "read",
]

MANUFACTURER = "monai_salm"
"""Our name in ContributingEquipmentSequence: the mark by which a protected file is recognized."""
MODIFYING_EQUIPMENT = "109103"

CT_WINDOW = (-160.0, 240.0)
"""HU, soft tissue; for CT files that name no window."""

_MODALITIES = frozenset({"CT", "MR", "CR", "DX", "MG", "IO", "XA", "RF", "US", "NM", "PT", "OT"})
_READ_IN_THEIR_WINDOW = ("CT", "CR", "DX")
"""Modalities whose files mostly list the window that they are displayed in; of MR it is a habit of the scanner."""

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
_MULTI_FRAME_CLASSES = frozenset(
    {
        uid.EnhancedCTImageStorage,
        uid.LegacyConvertedEnhancedCTImageStorage,
        uid.EnhancedMRImageStorage,
        uid.EnhancedMRColorImageStorage,
        uid.LegacyConvertedEnhancedMRImageStorage,
        uid.EnhancedPETImageStorage,
        uid.LegacyConvertedEnhancedPETImageStorage,
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


def check_supported(header: Dataset, *, allow_protected: bool = False) -> None:
    """Raise unless the image is one that can be read exactly and written back.

    Args:
        header: from :py:func:`read_header`.

    Raises:
        RefusedError: ``unsupported_sop_class``, ``multi_frame``, ``already_protected``, ``missing_uid``,
            ``unsupported_transfer_syntax``, ``missing_transfer_syntax``, ``missing_pixel_data``,
            ``unsupported_pixel_format``, ``unsupported_photometric``, ``embedded_overlay``, ``modality_lut``,
            ``invalid_rescale``, ``private_pixel_copy``, or ``unreadable`` when an attribute of the image is broken.
    """
    with refusing("unreadable", "an attribute of the image is missing or broken; export it again"):
        _check_class(header)
        _check_identity(header, allow_protected)
        check_syntax(header.file_meta)
        _check_pixel_format(header)
        _check_overlays(header)
        _check_values(header)
        _check_private(header)


def _check_class(header: Dataset) -> None:
    sop_class = header.get("SOPClassUID")
    if sop_class in _MULTI_FRAME_CLASSES or sop_class in SOP_CLASSES and int(header.get("NumberOfFrames") or 1) != 1:
        raise RefusedError("multi_frame", "multi-frame images are not supported yet; export single-frame images")
    if sop_class not in SOP_CLASSES:
        kinds = "CT, MR, PET, X-ray, US, NM, SC"
        raise RefusedError("unsupported_sop_class", f"not a kind of image that is protected ({kinds})")


def _check_identity(header: Dataset, allow_protected: bool) -> None:
    for item in header.get("ContributingEquipmentSequence") or ():
        purposes = [code.get("CodeValue") for code in item.get("PurposeOfReferenceCodeSequence") or ()]
        if item.get("Manufacturer") == MANUFACTURER and MODIFYING_EQUIPMENT in purposes and not allow_protected:
            raise RefusedError("already_protected", "this file is a protected copy; protect the original instead")
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        value = header.get(keyword)
        if not isinstance(value, str) or not value or value.startswith("1.2.840.10008."):
            raise RefusedError("missing_uid", f"{keyword} is missing or broken; export the image again")


def _check_pixel_format(header: Dataset) -> None:
    if header.pixel_element is None:
        raise RefusedError("missing_pixel_data", "the file holds no pixel data")
    if header.pixel_element != "PixelData":
        raise RefusedError("unsupported_pixel_format", "floating-point pixel data are not supported yet")
    if header.get("PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2") or header.SamplesPerPixel != 1:
        raise RefusedError("unsupported_photometric", "color and palette images are not supported; only monochrome")
    if header.BitsAllocated not in (8, 16):
        raise RefusedError("unsupported_pixel_format", "only 8 and 16 bits per pixel are supported")
    if not 2 <= header.BitsStored <= header.BitsAllocated or header.PixelRepresentation not in (0, 1):
        raise RefusedError("unsupported_pixel_format", "Bits Stored or Pixel Representation is not possible")
    if header.HighBit != header.BitsStored - 1:
        raise RefusedError("unsupported_pixel_format", "High Bit is not Bits Stored - 1; convert the image")
    if min(header.Rows, header.Columns) < 1:
        raise RefusedError("unsupported_pixel_format", "the image has no rows or no columns")


def _check_overlays(header: Dataset) -> None:
    for group in range(0x6000, 0x6020, 2):
        # An overlay without data of its own lies in unused bits of the pixels (retired, PS3.3 C.9.2 of 2004).
        if (group, 0x0010) in header and (group, 0x3000) not in header:
            raise RefusedError("embedded_overlay", "an overlay lies inside the pixel data; convert it to overlay data")


def _check_values(header: Dataset) -> None:
    if header.get("ModalityLUTSequence"):
        raise RefusedError("modality_lut", "values go through a Modality LUT; only slope and intercept are supported")
    with refusing("invalid_rescale", "rescale slope or intercept is not a number; repair the header"):
        slope, intercept = rescale_of(header)
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        raise RefusedError("invalid_rescale", "rescale slope or intercept is not finite, or the slope is 0")


def _check_private(header: Dataset) -> None:
    """A private element as long as the image is taken for a copy of its pixels: it would leave unprotected."""
    size = int(header.Rows) * int(header.Columns) * int(header.BitsAllocated) // 8
    for tag in header.keys():
        value = header.get_item(tag).value if tag.is_private else None
        if isinstance(value, bytes) and size <= len(value) <= size + 1 and size >= 4096:
            raise RefusedError("private_pixel_copy", "a private element is as long as the pixels; remove it first")


@dataclass(frozen=True)
class Slices:
    """A case as read, with the way back from canonical axes to its files.

    Args:
        image: stored integers and codec.
        files: the source of each slice, in spatial order.
        orientation: nibabel orientation of (columns, rows, slices); None for 2D.
    """

    image: StoredImage
    files: tuple[Path, ...]
    orientation: NDArray[Any] | None

    def planes(self, values: NDArray[Any]) -> NDArray[Any]:
        """(1, *spatial) on canonical axes -> (slices, rows, columns) as in ``files``."""
        return values if self.orientation is None else from_canonical(values[0], self.orientation)


def read(case: Case, spatial_dims: int, window: Window = "auto") -> StoredImage:
    """The stored integers of one slice, (1, rows, columns), or of a series as a RAS+ volume, (1, x, y, z).

    Args:
        case: one file for 2D, all slices of the volume in any order for 3D.
        spatial_dims: 2 or 3.
        window: ``"auto"`` or (low, high) in physical units. ``"auto"`` is for CT, CR and DX the first linear window of
            the file (for a volume: of its lowest slice), else for CT -160..240 HU; for all others percentiles 0.5 and
            99.5.

    Raises:
        RefusedError: See :py:func:`check_supported`, ``order_volume`` and ``dicom_pixels.decode``; and
            ``constant_image``.
    """
    return load(case, spatial_dims, window).image


def load(case: Case, spatial_dims: int, window: Window = "auto") -> Slices:
    """As :py:func:`read`, with what is needed to write the image back."""
    if spatial_dims not in (2, 3) or (spatial_dims == 2 and len(case.files) != 1):
        raise ValueError(f"spatial_dims is {spatial_dims} for {len(case.files)} files; 2 takes one file, 3 a series")
    headers, planes = [], []
    for path in case.files:
        dataset = parse(read_bytes(path))
        check_supported(dataset, allow_protected=True)
        planes.append(decode(dataset))
        del dataset.PixelData
        headers.append(dataset)
    order = order_volume(headers) if spatial_dims == 3 else [0]
    headers = [headers[index] for index in order]
    stored = np.stack([planes[index] for index in order])
    orientation = orientation_of(headers[0], headers[-1]) if spatial_dims == 3 else None
    if orientation is not None:
        stored = to_canonical(stored, orientation)[None]
    codec = _codec(headers, stored, orientation, window)
    windows = tuple(dict.fromkeys(each for header in headers for each in _file_windows(header)))
    image = StoredImage(stored, codec, spacing_of(headers, orientation), windows)
    return Slices(image, tuple(case.files[index] for index in order), orientation)


def _codec(
    headers: Sequence[Dataset], stored: NDArray[Any], orientation: NDArray[Any] | None, window: Window
) -> StoredCodec:
    header, padding = headers[0], _padding(headers[0])
    inside = np.full(stored.shape, True) if padding is None else (stored < padding[0]) | (stored > padding[1])
    values = stored[inside]
    if values.size == 0 or values.min() == values.max():
        raise RefusedError("constant_image", "all pixels outside the padding are equal: there is nothing to protect")
    slices = _slice_scaling(headers, orientation)
    slope, intercept = min(map(rescale_of, headers), key=lambda scaling: abs(scaling[0]))
    is_ct = header.SOPClassUID == uid.CTImageStorage
    modality = "CT" if is_ct else _modality(header)
    if isinstance(window, str):
        if window != "auto":
            raise ValueError(f"window is {window!r}; use 'auto' or (low, high) in physical units")
        listed = _file_windows(header) if modality in _READ_IN_THEIR_WINDOW else ()
        if listed or is_ct:
            window = listed[0] if listed else CT_WINDOW
        elif slices:
            window = auto_window(slices.to_physical(stored)[inside], 1.0, 0.0)
        else:
            window = auto_window(values, slope, intercept)
    return StoredCodec(
        dtype=stored_dtype(header).name,
        window=(float(window[0]), float(window[1])),
        slope=slope,
        intercept=intercept,
        stored_range=stored_range(header),
        padding=padding,
        inverted=header.PhotometricInterpretation == "MONOCHROME1",
        unit="HU" if is_ct else "a.u.",
        modality=modality,
        slices=slices,
    )


def _modality(header: Dataset) -> str:
    """One of the modalities that we know of, as the value will show up in messages; empty for all others."""
    value = header.get("Modality")
    return str(value) if value in _MODALITIES else ""


def _slice_scaling(headers: Sequence[Dataset], orientation: NDArray[Any] | None) -> SliceScaling | None:
    """Slope and intercept of each slice on canonical axes; None where they are the same for all."""
    scalings = [rescale_of(header) for header in headers]
    if orientation is None or len(set(scalings)) == 1:
        return None
    axis, direction = orientation[2]
    slopes, intercepts = zip(*scalings[:: int(direction)], strict=True)
    return SliceScaling(int(axis), slopes, intercepts)


def _padding(header: Dataset) -> tuple[float, float] | None:
    """Inclusive range of stored values that are padding (PS3.3 C.7.5.1.1.2)."""
    with refusing("unreadable", "the pixel padding value is broken; repair the header"):
        ends = [header.get(keyword) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
        if ends[0] is None:
            return None
        # Some scanners write the value of a signed image as unsigned: only its bits count.
        bits = [_bits(end) for end in ends if end is not None]
        values = np.array(bits, dtype=np.uint16).astype(stored_dtype(header)).tolist()
        return float(min(values)), float(max(values))


def _bits(value: int | bytes) -> int:
    return (int.from_bytes(value, "little") if isinstance(value, bytes) else int(value)) & 0xFFFF


def _file_windows(header: Dataset) -> list[tuple[float, float]]:
    """The linear windows of the file in physical units (PS3.3 C.11.2.1.2)."""
    with refusing("unreadable", "the display window is broken; name a window instead of 'auto'"):
        shrink = {"LINEAR": 1.0, "LINEAR_EXACT": 0.0}.get(header.get("VOILUTFunction") or "LINEAR")
        if shrink is None:
            return []
        centers, widths = (_numbers(header.get(keyword)) for keyword in ("WindowCenter", "WindowWidth"))
        ends = [
            (center - shrink / 2 - (width - shrink) / 2, center - shrink / 2 + (width - shrink) / 2)
            for center, width in zip(centers, widths, strict=False)
            if width > shrink
        ]
        return [(low, high) for low, high in ends if np.isfinite([low, high]).all()]


def _numbers(value: float | Sequence[float] | None) -> list[float]:
    if value is None or value == "":
        return []
    return [float(each) for each in (value if isinstance(value, Sequence) else [value])]
