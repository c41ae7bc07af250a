# SPDX-License-Identifier: Apache-2.0
"""Turns big endian data sets to little endian by swapping the bytes of undecoded values.

Explicit VR Big Endian is retired (PS3.5 A.3), yet archives still hold it; nobody should write it any more.
"""

from __future__ import annotations

import numpy as np
from pydicom import uid
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset

from monai_salm.io.base import RefusedError
from monai_salm.io.dicom_elements import replace_elements

_WORDS = {2: "US SS OW AT", 4: "UL SL FL OF OL", 8: "FD OD UV SV OV"}
"""Value representations by bytes per number (PS3.5 6.2 and 7.3); all others hold bytes or text."""
_WORD_BYTES = {vr: size for size, names in _WORDS.items() for vr in names.split()}


def to_little_endian(dataset: Dataset) -> None:
    """Turn a data set freshly parsed as Explicit VR Big Endian into Explicit VR Little Endian, in place.

    Raises:
        RefusedError: ``unsupported_transfer_syntax`` when an element is of unknown type (UN), so that the size of its
            numbers is unknown.
    """
    _convert(dataset)
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian


def _convert(dataset: Dataset) -> None:
    for tag in list(dataset.keys()):
        if dataset.get_item(tag).VR == "SQ":
            for item in dataset[tag].value or ():
                _convert(item)
    replace_elements(dataset, [_converted(dataset.get_item(tag)) for tag in dataset.keys()])
    dataset.set_original_encoding(False, True, dataset.original_character_set)


def _converted(element: DataElement | RawDataElement) -> DataElement | RawDataElement:
    if element.VR == "UN" and element.value:
        raise RefusedError(
            "unsupported_transfer_syntax",
            "a big endian file with elements of unknown type; convert to Explicit VR Little Endian",
        )
    value = _swapped(element.value, _WORD_BYTES.get(str(element.VR), 1))
    if isinstance(element, RawDataElement):
        return element._replace(value=value, is_little_endian=True)
    return DataElement(element.tag, element.VR, value) if isinstance(element.value, bytes) else element


def _swapped(value: bytes | None, size: int) -> bytes | None:
    if not isinstance(value, bytes) or size == 1:
        return value
    return np.frombuffer(value, f"u{size}").byteswap().tobytes()
