# SPDX-License-Identifier: Apache-2.0
"""DICOM, as the other rooms see it: exact stored values in, derived instances of the same kind out.

What the modules are for, from bytes up:

- ``dicom_guard``, ``dicom_parse``, ``dicom_elements``, ``dicom_endian``: untrusted bytes to a data set;
- ``dicom_syntax``, ``dicom_pixels``: transfer syntaxes; pixel data to integers and back;
- ``dicom_volume``, ``dicom_frames``: is a series a volume, and canonical axes; many frames in one file;
- ``dicom_support``, ``dicom_copies``: which images are protected; does a file hold its image twice;
- ``dicom_read``, ``dicom_write``, ``dicom_verify``: images and their codecs; the derived file; its check;
- ``dicom_seg``, ``dicom_seg_labels``, ``dicom_companion``: segmentations, voxel labels by them, other companions.
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
