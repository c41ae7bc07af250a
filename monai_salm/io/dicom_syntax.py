# SPDX-License-Identifier: Apache-2.0
"""Transfer syntaxes: which are read, which are written, by which codec, and which may have lost detail."""

from __future__ import annotations

from pydicom import uid
from pydicom.dataset import Dataset

from monai_salm.io.base import RefusedError

NATIVE = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian)
"""Uncompressed, and written as they were read."""
WRITTEN_COMPRESSED = (uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000Lossless)
"""Compressed without loss, and written as they were read; all others become Explicit VR Little Endian."""
JPEG_LS = (uid.JPEGLSLossless, uid.JPEGLSNearLossless)
JPEG_2000 = (uid.JPEG2000Lossless, uid.JPEG2000, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K)
LOSSY_METHODS = {
    uid.JPEGBaseline8Bit: "ISO_10918_1",
    uid.JPEGExtended12Bit: "ISO_10918_1",
    uid.JPEGLSNearLossless: "ISO_14495_1",
    uid.JPEG2000: "ISO_15444_1",
    uid.HTJ2K: "ISO_15444_15",
}
"""Syntaxes that may be lossy, with the term for LossyImageCompressionMethod (PS3.3 C.7.6.1.1.5.1)."""
_READ = frozenset(
    [*NATIVE, uid.ExplicitVRBigEndian, *WRITTEN_COMPRESSED, *JPEG_LS, *JPEG_2000, *LOSSY_METHODS]
    + [uid.JPEGLossless, uid.JPEGLosslessSV1]
)


def plugin_of(syntax: str) -> str:
    """pydicom's name of the codec for a compressed syntax; python-gdcm, if present, can abort the interpreter."""
    return "pyjpegls" if syntax in JPEG_LS else "pylibjpeg"


def check_syntax(meta: Dataset) -> uid.UID:
    """The transfer syntax that the file meta names.

    Raises:
        RefusedError: ``missing_transfer_syntax``; ``unsupported_transfer_syntax`` unless it can be decoded here.
    """
    syntax = meta.get("TransferSyntaxUID")
    if not syntax:
        raise RefusedError("missing_transfer_syntax", "the file does not say how it is encoded; export it again")
    if syntax not in _READ:
        deflated = syntax == uid.DeflatedExplicitVRLittleEndian
        name = "deflated" if deflated else "unknown, video or not decodable here"
        detail = f"transfer syntax is {name}; convert to Explicit VR Little Endian"
        raise RefusedError("unsupported_transfer_syntax", detail)
    return uid.UID(syntax)
