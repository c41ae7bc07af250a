# SPDX-License-Identifier: Apache-2.0
"""DICOM, as the other rooms see it: exact stored values in, derived instances of the same kind out.

Inside: ``dicom_parse`` (untrusted bytes to a data set), ``dicom_pixels`` (pixel data to integers and back),
``dicom_volume`` (is a series a volume, and canonical axes), ``dicom_read`` (what is supported; images and codecs) and
``dicom_write`` (the derived file and its verification).
"""

from __future__ import annotations

from monai_salm.io.dicom_parse import looks_like_dicom, read_header
from monai_salm.io.dicom_read import CT_WINDOW, SOP_CLASSES, check_supported, read
from monai_salm.io.dicom_volume import order_volume
from monai_salm.io.dicom_write import DECLARED_KEYWORDS, UidMapping, protect, verify

__all__ = [
    "CT_WINDOW",
    "DECLARED_KEYWORDS",
    "SOP_CLASSES",
    "UidMapping",
    "check_supported",
    "looks_like_dicom",
    "order_volume",
    "protect",
    "read",
    "read_header",
    "verify",
]
