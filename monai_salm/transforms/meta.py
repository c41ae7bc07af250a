# SPDX-License-Identifier: Apache-2.0
"""What the transforms know about an image: its case, how to read its values, and whether they are stored ones.

The metadata say it: ``sample_id``, ``stored_codec`` and ``intensity`` (``"stored"`` or ``"unit"``), strings and numbers
that survive collation, caches and ``weights_only`` loading. Arrays and plain tensors have none; for them the same facts
are arguments of a transform's call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.data import MetaTensor, get_track_meta
from monai.utils import convert_to_tensor
from monai.utils.enums import PostFix
from torch import Tensor

from monai_salm.records import as_array
from monai_salm.stored import StoredCodec

CodecLike = StoredCodec | Mapping[str, Any]


def meta_of(img: Any, key: str, given: Any = None) -> Any:
    """A fact about the image, from its metadata or as given.

    Raises:
        ValueError: When both are there and differ.
    """
    found = img.meta.get(key) if isinstance(img, MetaTensor) else None
    if found is not None and given is not None and found != given:
        raise ValueError(f"the image's metadata say {key} {found!r}, the call says {given!r}; they must agree")
    return given if found is None else found


def told(data: Mapping[Any, Any], key: Any) -> dict[str, Any]:
    """The same facts of the image under a key, as arguments of a transform's call: from the dictionary itself, or from
    the metadata beside the image, where MONAI has them if it does not track them (``image_meta_dict``)."""
    beside = data.get(PostFix.meta(key), {})
    codec = None if beside.get("intensity") == "unit" else data.get("stored_codec", beside.get("stored_codec"))
    return {"sample_id": data.get("sample_id", beside.get("sample_id")), "codec": codec}


def codec_of(img: NdarrayOrTensor, given: CodecLike | None) -> StoredCodec:
    """How to read the image's values: as its metadata say, else as given.

    Raises:
        ValueError: When neither says it, the image is in unit intensity, or it is a batch of images.
    """
    if meta_of(img, "intensity") == "unit":
        raise ValueError(
            "the image is in unit intensity already; this transform takes stored values, as LoadStored gives them"
        )
    meta = meta_of(img, "stored_codec")
    said = given if meta is None else meta
    if said is None:
        raise ValueError("the image has no 'stored_codec': load it with LoadStored, or give the codec in the call")
    if isinstance(said, Mapping) and isinstance(said.get("dtype"), list | tuple):
        raise ValueError("this is a batch of images; take it apart first, with monai.data.decollate_batch")
    return said if isinstance(said, StoredCodec) else StoredCodec.from_meta(said)


def affine_of(spacing: tuple[float, ...]) -> Tensor:
    """(4, 4) from voxel to mm on canonical axes, with the first voxel in the origin; 1 mm where a size is not known."""
    return torch.diag(torch.tensor([*spacing, *[1.0] * (4 - len(spacing))], dtype=torch.float64))


def plain_tensor(img: NdarrayOrTensor) -> Tensor:
    """The values in a type that torch computes with, without the metadata, which slow arithmetic down."""
    values = convert_to_tensor(img, track_meta=get_track_meta())
    values = values.as_tensor() if isinstance(values, MetaTensor) else values
    return values.to({torch.uint16: torch.int32, torch.uint32: torch.int64}.get(values.dtype, values.dtype))


def plain_array(img: NdarrayOrTensor) -> np.ndarray:
    """The values in main memory, of the same type."""
    return as_array(img.as_tensor() if isinstance(img, MetaTensor) else img)


def stored_array(img: NdarrayOrTensor, codec: StoredCodec) -> np.ndarray:
    """The values in the file's own type (torch may hold them in a larger one).

    Raises:
        ValueError: When that type cannot hold them.
    """
    values = plain_array(img)
    kind = np.dtype(codec.dtype).kind
    if (values.dtype.kind in "iu") == (kind in "iu"):
        stored = values.astype(codec.dtype)
        if np.array_equal(stored, values, equal_nan=kind == "f"):
            return stored
    raise ValueError(
        f"the image is {values.dtype} and its file {codec.dtype}: these are not its stored values any more. "
        "Use this transform on what LoadStored gives (in an inverse: after undoing all that changed values)"
    )


def check_same_shape(what: str, values: Any, other: str, reference: Any) -> None:
    """Check that two arrays or tensors, called ``what`` and ``other`` in the error, have one shape.

    Raises:
        ValueError: When they have not.
    """
    if tuple(values.shape) != tuple(reference.shape):
        raise ValueError(f"{what} is {tuple(values.shape)}, {other} {tuple(reference.shape)}; they must have one shape")
