# SPDX-License-Identifier: Apache-2.0
"""Checks a written DICOM file against its source. Both are read from their bytes; pydicom alone parses the copy.

Elements of the source may come from the cache of ``dicom_parse``, which compares the bytes; nothing of a copy does.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag

from monai_salm.io.base import FileCheck, RefusedError, compare
from monai_salm.io.dicom_frames import FRAME_TAGS, frame_headers, frame_types, groups, is_enhanced
from monai_salm.io.dicom_guard import refusing
from monai_salm.io.dicom_parse import STANDARD_ROOT, holds_items, parse, read_bytes, read_header
from monai_salm.io.dicom_pixels import decode
from monai_salm.io.dicom_seg import read_seg_header
from monai_salm.io.dicom_support import is_protected
from monai_salm.io.dicom_volume import rescale_of
from monai_salm.io.dicom_write import DECLARED_TAGS, REMOVED_TAGS

_FAILED = "verification_failed"
_parse_written = partial(parse, by_pydicom=True)


def verify(
    source: bytes | str | os.PathLike[str],
    written: bytes | str | os.PathLike[str],
    limit: float,
    *,
    physical: float = math.inf,
    allow_unchanged: bool = False,
) -> FileCheck:
    """Compare a written file, parsed and decoded afresh, with its source.

    Args:
        source: the original file, or its bytes.
        written: the protected file, or its bytes.
        limit: largest change allowed, in stored units.
        physical: largest change allowed, in physical units, by this file's own rescale slope.
        allow_unchanged: accept a file without a changed pixel, as slices of a volume may be; the caller must check that
            ``changed`` summed over the volume is above 0.

    Raises:
        RefusedError: ``verification_failed``, with the rule that does not hold: pixels, UIDs, marks of a derived
            image, or an element that changed and is not one of :py:data:`DECLARED_KEYWORDS`.
    """
    before = parse(_bytes(source))
    with refusing(_FAILED, "the written file cannot be compared with its source"):
        after = _read_back(_parse_written, _bytes(written))
        nested = REMOVED_TAGS | FRAME_TAGS if is_enhanced(before) else REMOVED_TAGS
        undeclared = list(_undeclared_changes(before, after, DECLARED_TAGS, nested))  # before anything is decoded
        _require(not undeclared, f"elements {undeclared[:4]} changed, which is not declared")
        _check_marks(before, after)
        checks, allowed = [], []
        for index, frame in enumerate(frame_headers(before)):
            allowed.append(min(limit, physical / abs(rescale_of(frame)[0]) * (1 + 1e-9)))
            old, new = decode(before, index), _read_back(partial(decode, frame=index, afresh=True), after)
            _require(old.shape == new.shape and old.dtype == new.dtype, "size or type of the pixels changed")
            checks.append(compare(old, new, allowed[-1], allow_unchanged=True))
        changed = sum(check.changed for check in checks)
        _require(changed or allow_unchanged, "the written file equals its source: nothing was protected")
        return FileCheck(changed, max(check.max_abs for check in checks), max(allowed))


def verify_companion(source: Path, written: Path) -> None:
    """Compare a written companion with its source: new UIDs, and nothing else changed.

    Args:
        source: the original file.
        written: the file of the protected copy, under any name.

    Raises:
        RefusedError: ``verification_failed``, with the rule that does not hold.
    """
    before = parse(read_bytes(source))
    with refusing(_FAILED, "the written companion cannot be compared with its source"):
        after = _read_back(_parse_written, read_bytes(written))
        undeclared = list(_undeclared_changes(before, after, REMOVED_TAGS, REMOVED_TAGS))
        _require(not undeclared, f"elements {undeclared[:4]} of the companion changed, which is not declared")
        _check_identity(before, after)


def verify_labels(source: Path, written: Path, images: Iterable[Path]) -> None:
    """As :py:func:`verify_companion` for a segmentation, which must refer to written images only.

    Args:
        source: the original SEG file.
        written: the SEG file of the protected copy, under any name.
        images: the protected images that it belongs to, under any names.

    Raises:
        RefusedError: ``verification_failed``, with the rule that does not hold.
    """
    verify_companion(source, written)
    with refusing(_FAILED, "the written segmentation cannot be compared with its source"):
        known = {str(read_header(image).SOPInstanceUID) for image in images}
        lost = len(read_seg_header(written).instances - known)
        _require(not lost, f"the segmentation refers to {lost} images that are not released with it")


def _read_back(step: Callable[[Any], Any], argument: Any) -> Any:
    try:
        return step(argument)
    except RefusedError as error:
        raise RefusedError(_FAILED, f"the written file cannot be read back ({error.reason})") from None


def _bytes(file: bytes | str | os.PathLike[str]) -> bytes:
    return file if isinstance(file, bytes) else read_bytes(file)


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise RefusedError(_FAILED, rule)


def _check_marks(before: Dataset, after: Dataset) -> None:
    _check_identity(before, after)
    _require(after.get("ImageType", [""])[0] == "DERIVED", "ImageType does not begin with DERIVED")
    _require(is_protected(after), "the mark of a protected file is missing")
    if is_enhanced(before):
        _check_frames(before, after)


def _check_frames(before: Dataset, after: Dataset) -> None:
    """Raise unless every frame is marked as derived, and the items of its derivation before are unchanged."""
    for old_type, new_type in zip(frame_types(before), frame_types(after), strict=True):
        marked = ["DERIVED", *list(old_type.get("FrameType") or ())[1:]]
        _require(list(new_type.FrameType)[: len(marked)] == marked, "a FrameType is not that of a derived frame")
    shared, added = len(groups(after)[0]), []
    for old_group, new_group in zip(chain(*groups(before)), chain(*groups(after)), strict=True):
        old, new = (list(group.get("DerivationImageSequence") or ()) for group in (old_group, new_group))
        kept = [
            _undeclared_changes(*pair, REMOVED_TAGS, REMOVED_TAGS) for pair in zip(old, new[: len(old)], strict=True)
        ]
        _require(not any(map(list, kept)), "what derived a frame before has changed")
        added.append(len(new) == len(old) + 1)
    of_all, of_each = added[:shared], added[shared:]
    _require(any(of_all) != any(of_each) and any(of_all) != all(of_each), "the derivation of a frame is missing")


def _check_identity(before: Dataset, after: Dataset) -> None:
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"):
        same = after.get(keyword) == before.get(keyword) and before.get(keyword)
        _require(not same or str(before.get(keyword)).startswith(STANDARD_ROOT), f"{keyword} is the source's")
    _require(after.file_meta.MediaStorageSOPInstanceUID == after.SOPInstanceUID, "file meta and instance UID differ")
    _require(not any(after.preamble), "the preamble is not empty")


def _undeclared_changes(
    before: Dataset, after: Dataset, declared: frozenset[BaseTag], nested: frozenset[BaseTag]
) -> Iterator[BaseTag]:
    """Tags at any depth that were added, removed or changed, except mapped UIDs.

    Args:
        before: the source.
        after: the copy.
        declared: tags that may differ at this level.
        nested: tags that may differ in items of sequences.
    """
    # By plain integers: comparing tags that are equal but not identical calls a slow function of pydicom.
    old, new = ({int(tag): element for tag, element in dataset.items()} for dataset in (before, after))
    differ = {tag for tag in old.keys() & new.keys() if _differ(old[tag], new[tag])}
    for tag in map(BaseTag, sorted((differ | old.keys() ^ new.keys()) - declared)):
        if tag.element == 0:
            continue
        if tag not in old or tag not in new:
            yield tag
            continue
        values = old[tag].value, new[tag].value
        both_raw = all(isinstance(value, bytes) for value in values)
        one, other = before[tag], after[tag]
        sequences = holds_items(values[0]) and holds_items(values[1]) and one.VR == other.VR == "SQ"
        if sequences and len(one.value) == len(other.value):
            for old_item, new_item in zip(one.value, other.value, strict=True):
                yield from _undeclared_changes(old_item, new_item, nested, nested)
        elif not (one.VR == other.VR == "UI" and _is_mapped(one.value, other.value)) and (both_raw or one != other):
            yield tag


def _differ(old: DataElement | RawDataElement, new: DataElement | RawDataElement) -> bool:
    """Whether two elements of one tag differ, other than in the padding of undecoded values."""
    return old.value != new.value and _raw(old) != _raw(new) or _retyped(old.VR, new.VR)


def _raw(element: DataElement | RawDataElement) -> Any:
    """The value of an element, without padding while it is undecoded."""
    return element.value.rstrip(b" \0") if isinstance(element.value, bytes) else element.value


def _retyped(old: str | None, new: str | None) -> bool:
    """Whether the value representation changed. Implicit files have none, and UN stands for any."""
    return old != new and not {old, new} & {None, "UN"} and len(old) == len(new) == 2  # type: ignore[arg-type]


def _is_mapped(old: Any, new: Any) -> bool:
    """Whether each UID is the same or was replaced by one below 2.25, which UIDs of the standard must not be."""
    olds, news = ([value] if isinstance(value, str) else list(value) for value in (old, new))
    return len(olds) == len(news) and all(
        after == before or (after.startswith("2.25.") and not before.startswith(STANDARD_ROOT))
        for before, after in zip(olds, news, strict=True)
    )
