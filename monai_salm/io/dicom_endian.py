# SPDX-License-Identifier: Apache-2.0
"""Big endian data sets become little endian ones, element by element, on the bytes: nothing is decoded for it.

Explicit VR Big Endian is retired (PS3.5 A.3), yet archives still hold it; nobody should write it any more.
"""

from __future__ import annotations

import numpy as np
from pydicom import uid
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset

from monai_salm.io.base import RefusedError
from monai_salm.io.dicom_elements import replace_elements

WORDS = {2: "US SS OW AT", 4: "UL SL FL OF OL", 8: "FD OD UV SV OV"}
"""Bytes per number of each binary value representation (PS3.5 6.2 and 7.3); all others are bytes or text."""
_WORD = {vr: size for size, names in WORDS.items() for vr in names.split()}


def to_little_endian(dataset: Dataset) -> None:
    """Turn a data set freshly parsed as Explicit VR Big Endian into Explicit VR Little Endian, in place.

    Raises:
        RefusedError: ``unsupported_transfer_syntax`` when an element does not say what it is (UN), so that nobody can
            tell where its numbers begin.
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
    value = _swapped(element.value, _WORD.get(str(element.VR), 1))
    if isinstance(element, RawDataElement):
        return element._replace(value=value, is_little_endian=True)
    return DataElement(element.tag, element.VR, value) if isinstance(element.value, bytes) else element


def _swapped(value: bytes | None, size: int) -> bytes | None:
    if not isinstance(value, bytes) or size == 1:
        return value
    return np.frombuffer(value, f"u{size}").byteswap().tobytes()
