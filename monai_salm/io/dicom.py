# SPDX-License-Identifier: Apache-2.0
"""DICOM, as the other rooms see it: exact stored values in, derived instances of the same kind out.

Inside: ``dicom_parse``, ``dicom_elements`` and ``dicom_endian`` (untrusted bytes to a data set), ``dicom_support``
(what is protected, what is refused and by which name), ``dicom_copies`` (does a file hold its image twice),
``dicom_pixels`` (pixel data to integers and back), ``dicom_volume`` (is a series a volume, and canonical axes),
``dicom_frames`` (many frames in one file), ``dicom_read`` (images and codecs), ``dicom_seg`` (segmentations),
``dicom_companion`` (what goes along with images), ``dicom_write`` (the derived file) and ``dicom_verify`` (its check).
"""

from __future__ import annotations

from monai_salm.io.dicom_companion import is_companion, read_companion
from monai_salm.io.dicom_frames import is_enhanced, order_files
from monai_salm.io.dicom_parse import identify, identify_all, looks_like_dicom, read_header, read_scan_header, read_uids
from monai_salm.io.dicom_read import CT_WINDOW, layout_of, read, read_slices, read_spacing
from monai_salm.io.dicom_seg import (
    SEG_CLASSES,
    SegHeader,
    is_segmentation,
    read_seg_header,
    seg_header,
)
from monai_salm.io.dicom_seg_labels import check_frames, missing_slices
from monai_salm.io.dicom_support import SOP_CLASSES, check_supported
from monai_salm.io.dicom_verify import verify, verify_companion, verify_labels
from monai_salm.io.dicom_volume import order_volume
from monai_salm.io.dicom_write import DECLARED_KEYWORDS, UidMapping, protect, protect_companion

__all__ = [
    "CT_WINDOW",
    "DECLARED_KEYWORDS",
    "SEG_CLASSES",
    "SOP_CLASSES",
    "SegHeader",
    "UidMapping",
    "check_frames",
    "check_supported",
    "identify",
    "identify_all",
    "is_companion",
    "is_enhanced",
    "is_segmentation",
    "layout_of",
    "looks_like_dicom",
    "missing_slices",
    "order_files",
    "order_volume",
    "protect",
    "protect_companion",
    "read",
    "read_companion",
    "read_header",
    "read_scan_header",
    "read_seg_header",
    "read_slices",
    "read_spacing",
    "read_uids",
    "seg_header",
    "verify",
    "verify_companion",
    "verify_labels",
]
