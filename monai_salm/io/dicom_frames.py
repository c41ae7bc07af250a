# SPDX-License-Identifier: Apache-2.0
"""Enhanced CT, MR and PET: one file holds all slices of a volume, and functional groups say what each frame is.

Sources: PS3.3 C.7.6.16 (functional groups), C.7.6.16.2.6 (derivation), C.8.16.1.1 (frame type).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.tag import Tag

from monai_salm.io.base import RefusedError
from monai_salm.io.dicom_parse import read_header
from monai_salm.io.dicom_volume import order_volume

ENHANCED_CT = frozenset({uid.EnhancedCTImageStorage, uid.LegacyConvertedEnhancedCTImageStorage})
ENHANCED = ENHANCED_CT | {
    uid.EnhancedMRImageStorage,
    uid.LegacyConvertedEnhancedMRImageStorage,
    uid.EnhancedPETImageStorage,
    uid.LegacyConvertedEnhancedPETImageStorage,
}

_ROOT = (
    "SOPClassUID SOPInstanceUID FrameOfReferenceUID Modality Rows Columns PhotometricInterpretation BitsAllocated "
    "BitsStored HighBit PixelRepresentation PixelPaddingValue PixelPaddingRangeLimit"
).split()
_MACROS = {
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelMeasuresSequence": ("PixelSpacing",),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept", "RescaleType"),
    "FrameVOILUTSequence": ("WindowCenter", "WindowWidth", "VOILUTFunction"),
}
_FRAME_TYPES = ("CTImageFrameTypeSequence", "MRImageFrameTypeSequence", "PETFrameTypeSequence")
FRAME_TAGS = frozenset({Tag("FrameType"), Tag("DerivationImageSequence")})
"""What protection may change inside functional groups, besides what it may change anywhere."""


def is_enhanced(header: Dataset) -> bool:
    """Whether the file is a multi-frame image of a supported kind."""
    return str(header.get("SOPClassUID")) in ENHANCED  # str: a broken file may have several values there


def groups(dataset: Dataset) -> tuple[list[Dataset], list[Dataset]]:
    """Items of the shared functional groups (at most one, in a sound file) and of those of each frame."""
    return (
        list(dataset.get("SharedFunctionalGroupsSequence") or ()),
        list(dataset.get("PerFrameFunctionalGroupsSequence") or ()),
    )


def macro_of(keyword: str, own: Dataset, shared: Dataset) -> Dataset | None:
    """The item of a functional group macro that holds for a frame: its own, else the one that all frames share."""
    return next(iter(own.get(keyword) or shared.get(keyword) or ()), None)


def frame_headers(header: Dataset) -> list[Dataset]:
    """One header per frame, with the attributes of a single-frame image; of other images just their own header.

    Raises:
        RefusedError: ``invalid_geometry`` when the functional groups do not say what each frame is.
    """
    if not is_enhanced(header):
        return [header]
    shared, frames = groups(header)
    if len(frames) != int(header.get("NumberOfFrames") or 1) or len(shared) > 1:
        raise RefusedError("invalid_geometry", "the functional groups do not tell of each frame where it lies")
    of_all = shared[0] if shared else Dataset()
    return [_frame_header(header, number, own, of_all) for number, own in enumerate(frames, 1)]


def _frame_header(header: Dataset, number: int, own: Dataset, shared: Dataset) -> Dataset:
    frame = Dataset()
    frame.ReferencedFrameNumber = number  # segmentations refer to it by this number
    for keyword in _ROOT:
        if keyword in header:
            frame[keyword] = header[keyword]
    for macro, keywords in _MACROS.items():
        item = macro_of(macro, own, shared) or Dataset()
        for keyword in keywords:
            if keyword in item:
                frame[keyword] = item[keyword]
    return frame


def order_files(headers: Sequence[Dataset]) -> list[int]:
    """Indices of files in spatial order, if they are one volume: the slices of a series, or one multi-frame file.

    Raises:
        RefusedError: As ``order_volume``; ``mixed_geometry`` when a multi-frame file is not alone.
    """
    if not any(map(is_enhanced, headers)):
        return order_volume(headers)
    if len(headers) > 1:
        raise RefusedError("mixed_geometry", "the series mixes single-frame and multi-frame images; split the series")
    order_volume(frame_headers(headers[0]))
    return [0]


def headers_of(paths: Sequence[Path], spatial_dims: int) -> list[Dataset]:
    """One header per frame of a case's files, read from disk; of a volume in spatial order.

    Raises:
        RefusedError: As ``read_header``, :py:func:`frame_headers` and ``order_volume``.
    """
    headers = [frame for path in paths for frame in frame_headers(read_header(path))]
    return headers if spatial_dims == 2 else [headers[index] for index in order_volume(headers)]


def frame_types(dataset: Dataset) -> Iterator[Dataset]:
    """Every item of the functional groups that may hold a FrameType."""
    for group in chain(*groups(dataset)):
        for keyword in _FRAME_TYPES:
            yield from group.get(keyword) or ()


def add_derivation(dataset: Dataset, make: Callable[[], Dataset]) -> None:
    """Append an item to the derivation of every frame.

    It goes into the shared groups; into those of each frame where frames have derivations of their own, which take
    precedence, or where nothing is shared.
    """
    shared, frames = groups(dataset)
    own = not shared or any("DerivationImageSequence" in frame for frame in frames)
    for group in frames if own else shared:
        group.DerivationImageSequence = Items([*(group.get("DerivationImageSequence") or ()), make()])
