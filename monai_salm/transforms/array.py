# SPDX-License-Identifier: Apache-2.0
"""Array transforms on stored values and perturbations; ``meta.py`` tells what they know about an image."""

from __future__ import annotations

import hashlib
import os
import warnings
from contextlib import suppress
from typing import Literal

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, Transform
from monai.utils import TraceKeys, TransformBackends, convert_to_dst_type

from monai_salm.bank import PerturbationBank, image_digest
from monai_salm.perturbations.budget import Budget
from monai_salm.perturbations.masks import Criterion, Scope, SparsityMask
from monai_salm.stored import StoredCodec, lattice_of
from monai_salm.transforms.meta import (
    CodecLike,
    check_same_shape,
    codec_of,
    meta_of,
    plain_array,
    plain_tensor,
    stored_array,
)

__all__ = ["ApplyPerturbation", "ApplySparsityMask", "ComputeSparsityMask", "SnapToStored", "StoredToUnit"]

# MONAI 1.6 allows MetaTensor in weights_only files but not the keys of its trace: PersistentDataset would take every
# image that went through an invertible transform (its own ones, too) for damaged and compute it again (its issue 8599
# is about the same checks).
torch.serialization.add_safe_globals([TraceKeys])


class StoredToUnit(Transform):
    """Stored values to unit intensity: what networks see. Not invertible: values outside the window are clipped.

    Example:
        >>> codec = StoredCodec("int16", window=(0.0, 200.0))
        >>> StoredToUnit()(np.array([[-50, 50, 250]], dtype=np.int16), codec)
        array([[0.  , 0.25, 1.  ]], dtype=float32)
    """

    backend = [TransformBackends.TORCH]

    def __call__(self, img: NdarrayOrTensor, codec: CodecLike | None = None) -> NdarrayOrTensor:
        """float32 of the image's container type.

        Args:
            img: (C, *spatial) stored values.
            codec: how to read them; default: the metadata say it.

        Raises:
            ValueError: When there is no codec, or the image is in unit intensity already.
        """
        known = codec_of(img, codec)
        out = convert_to_dst_type(known.to_unit(plain_tensor(img)), dst=img, dtype=torch.float32)[0]
        if isinstance(out, MetaTensor):
            out.meta["intensity"] = "unit"
        return out


class ComputeSparsityMask(Transform):
    """Which voxels a perturbation may touch (see :py:class:`monai_salm.perturbations.masks.SparsityMask`).

    Deterministic, so that it can be cached: the random criterion draws from ``seed`` and the image's ``sample_id``.

    Args:
        ratio: fraction of the voxels, in (0, 1].
        criterion: ``"foreground"`` or ``"random"`` need the image only; ``"gradient"`` and ``"gradient_input"`` also
            a gradient (or any saliency map) of the image.
        scope: ``"image"``, ``"slice"`` or ``"channel"``.
        seed: of the random criterion.

    Raises:
        ValueError: When an argument is out of range, or the scope needs more than one image.

    Example:
        >>> ComputeSparsityMask(ratio=0.5, criterion="foreground")(np.array([[0.1, 0.9, 0.5, 0.2]], dtype=np.float32))
        array([[False,  True,  True, False]])
    """

    backend = [TransformBackends.TORCH]

    def __init__(
        self, *, ratio: float, criterion: Criterion = "foreground", scope: Scope = "image", seed: int = 0
    ) -> None:
        if scope == "class":
            raise ValueError("mask scope 'class' compares images with each other; a transform sees one: use 'image'")
        self.mask = SparsityMask(ratio=ratio, criterion=criterion, scope=scope)
        self.seed = int(seed)

    def __call__(
        self,
        img: NdarrayOrTensor,
        gradient: NdarrayOrTensor | None = None,
        *,
        sample_id: str | None = None,
        codec: CodecLike | None = None,
    ) -> NdarrayOrTensor:
        """Boolean mask of the image's shape and container type.

        Args:
            img: (C, *spatial) unit intensities; or stored values if a codec is known, whose padding and values outside
                the window are then never chosen.
            gradient: of the image's shape.
            sample_id: for the random criterion; default: from the metadata, else a digest of the image.
            codec: says that ``img`` holds stored values; default: the metadata say it.

        Raises:
            ValueError: When shapes differ or the criterion needs a gradient.
        """
        values = plain_tensor(img)
        movable = None
        if codec is not None or meta_of(img, "intensity") == "stored":
            known = codec_of(img, codec)
            values, movable = known.to_unit(values), known.movable(values)[None]
        if gradient is not None:
            gradient = plain_tensor(gradient).to(torch.float32)
            check_same_shape("gradient", gradient, "image", values)
        name = meta_of(img, "sample_id", sample_id) or image_digest(values)
        seed = int.from_bytes(hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:7], "big")
        mask = self.mask(
            values.to(torch.float32)[None],
            None if gradient is None else gradient[None],
            movable=movable,
            generator=torch.Generator().manual_seed(seed),
        )[0]
        return convert_to_dst_type(mask, dst=img, dtype=torch.bool)[0]


class ApplySparsityMask(Transform):
    """Zero outside a mask. Exact for integers.

    Example:
        >>> ApplySparsityMask()(np.array([[3, -4]], dtype=np.int8), np.array([[True, False]]))
        array([[3, 0]], dtype=int8)
    """

    backend = [TransformBackends.TORCH]

    def __call__(self, perturbation: NdarrayOrTensor, mask: NdarrayOrTensor) -> NdarrayOrTensor:
        """(C, *spatial) perturbation, of the type it came in.

        Args:
            perturbation: (C, *spatial).
            mask: of the same shape, or (1, *spatial) for all channels; kept where it is not 0.

        Raises:
            ValueError: When shapes differ.
        """
        values = plain_tensor(perturbation)
        keep = plain_tensor(mask).to(values.device) != 0
        if keep.shape[1:] != values.shape[1:] or keep.shape[0] not in (1, values.shape[0]):
            check_same_shape("mask", keep, "perturbation", values)
        return convert_to_dst_type(torch.where(keep, values, torch.zeros_like(values)), dst=perturbation)[0]


class ApplyPerturbation(InvertibleTransform):
    """Add a bank's perturbation to the stored image that it was fitted on; exact, and so is the inverse.

    To be used on stored values (after :py:class:`LoadStored`), before any transform that changes values or grid: the
    bank checks the image's digest. A case that the bank does not have is an error: it would go out unprotected.

    Args:
        bank: the perturbations, or the path of their file.

    Example:
        >>> import tempfile, pathlib
        >>> from monai_salm.bank import Record
        >>> image = np.array([[10, 20]], dtype=np.int16)
        >>> bank = PerturbationBank(pathlib.Path(tempfile.mkdtemp(), "bank.sqlite"), create=True)
        >>> record = Record("case-1", torch.tensor([[1, -1]]), image_digest(image), levels=2)
        >>> bank.commit([record], round_=0, score=0.0, state=b"")
        >>> apply = ApplyPerturbation(bank)
        >>> protected = apply(image, "case-1")
        >>> protected, apply.inverse(protected, "case-1")
        (array([[11, 19]], dtype=int16), array([[10, 20]], dtype=int16))
    """

    backend = [TransformBackends.NUMPY]

    def __init__(self, bank: PerturbationBank | str | os.PathLike[str]) -> None:
        self.bank = bank if isinstance(bank, PerturbationBank) else PerturbationBank(bank)

    def __call__(
        self, img: NdarrayOrTensor, sample_id: str | None = None, codec: CodecLike | None = None
    ) -> NdarrayOrTensor:
        """Protected stored values, of the type they came in.

        Args:
            img: (C, *spatial) stored values.
            sample_id: the case; default: the metadata say it.
            codec: how to read the values; default: the metadata say it, and integers can do without.

        Raises:
            KeyError: When the bank has no perturbation for this case.
            ValueError: When there is no ``sample_id``, or the image is not the one that was fitted.
        """
        name, stored, known = self._parts(img, sample_id, codec)
        delta = self.bank.load(name, stored, step=known.step)
        out = convert_to_dst_type(known.add(stored, delta.numpy()), dst=img)[0]
        if isinstance(out, MetaTensor):
            self.push_transform(out, extra_info={"sample_id": name})
        return out

    def inverse(
        self, img: NdarrayOrTensor, sample_id: str | None = None, codec: CodecLike | None = None
    ) -> NdarrayOrTensor:
        """The clean stored values, checked against the digest of the image that was fitted.

        What is in unit intensity, or in other values than integers where the file holds these, passes as it is: a
        prediction, say, which ``Invertd`` brings back to the image's grid.

        Raises:
            ValueError: When they cannot be restored exactly (float files round).
        """
        out = img
        if isinstance(img, MetaTensor):
            out = img.clone()
            sample_id = self.pop_transform(out)["extra_info"]["sample_id"]
            if meta_of(out, "intensity") == "unit":
                return out
            kind = np.dtype(codec_of(out, codec).dtype)
            if out.is_floating_point() and kind.kind in "iu":
                values = plain_array(out)
                if not (values == values.astype(kind)).all():
                    return out
                img = MetaTensor(values.astype(kind), meta=out.meta)  # the image perhaps, of which a type changed
                with suppress(ValueError):
                    return convert_to_dst_type(self._clean(img, sample_id, codec), dst=out)[0]
                return out
        return convert_to_dst_type(self._clean(img, sample_id, codec), dst=out)[0]

    def _clean(self, img: NdarrayOrTensor, sample_id: str | None, codec: CodecLike | None) -> np.ndarray:
        name, stored, known = self._parts(img, sample_id, codec)
        record = self.bank.record(name)
        if stored.shape == tuple(record.delta.shape):
            clean = known.add(stored, -record.delta.to(torch.int64).numpy())
            if image_digest(clean) == record.image_digest:
                return clean
        raise ValueError(
            f"{name}: subtracting the perturbation does not give back the image that it was fitted on. Another "
            "transform changed the values, the bank is another one, or the file holds floats, which round"
        )

    def _parts(
        self, img: NdarrayOrTensor, sample_id: str | None, codec: CodecLike | None
    ) -> tuple[str, np.ndarray, StoredCodec]:
        name = meta_of(img, "sample_id", sample_id)
        if name is None:
            raise ValueError("the image has no 'sample_id': load it with LoadStored, or name the case in the call")
        if codec is None and meta_of(img, "stored_codec") is None and plain_array(img).dtype.kind in "iu":
            # The digest ties the perturbation to this image, so that its sum is known to fit.
            known = StoredCodec(plain_array(img).dtype.name, window=(0.0, 1.0))
        else:
            known = codec_of(img, codec)
        return name, stored_array(img, known), known


class SnapToStored(Transform):
    """A real-valued perturbation to the nearest one that the file can hold, inside the budget.

    Args:
        budget: the bound: a :py:class:`Budget`, or text such as ``"8/255"`` or ``"5 HU"``.
        unit: what the perturbation is given in: ``"unit"`` intensity or ``"stored"`` values.

    Raises:
        ValueError: When a name is unknown or the budget cannot be read.

    Example:
        >>> codec = StoredCodec("int16", window=(0.0, 100.0))
        >>> image = np.array([[50, 50, 99]], dtype=np.int16)
        >>> SnapToStored("4 stored")(np.array([[0.024, -0.5, 0.5]], dtype=np.float32), image, codec)
        array([[ 2, -4,  1]], dtype=int16)
    """

    backend = [TransformBackends.TORCH]

    def __init__(self, budget: Budget | str | float, unit: Literal["unit", "stored"] = "unit") -> None:
        if unit not in ("unit", "stored"):
            raise ValueError(f"perturbation unit is {unit!r}; use 'unit' or 'stored'")
        self.budget = Budget.parse(budget)
        self.unit = unit

    def __call__(
        self, perturbation: NdarrayOrTensor, img: NdarrayOrTensor, codec: CodecLike | None = None
    ) -> NdarrayOrTensor:
        """Integer lattice steps (int16, or int32 for large budgets) in the perturbation's container type.

        Args:
            perturbation: (C, *spatial) real numbers.
            img: the clean stored image, of the same shape.
            codec: how to read its values; default: its metadata say it.

        Raises:
            ValueError: When shapes differ, a value is not finite, or the budget is below one step of this image.
        """
        known = codec_of(img, codec)
        stored = torch.from_numpy(stored_array(img, known))
        values = plain_tensor(perturbation).double().cpu()
        check_same_shape("perturbation", values, "image", stored)
        if not torch.isfinite(values).all():
            raise ValueError("the perturbation has values that are not finite; find out where they come from")
        steps = values / (known.unit_steps(values) if self.unit == "unit" else known.step)
        snapped = lattice_of([stored], [known], self.budget).snap(steps[None])[0]
        if values.any() and not snapped.any():
            warnings.warn("every change was below half a stored step or not allowed: nothing is left", stacklevel=2)
        return convert_to_dst_type(snapped, dst=perturbation, dtype=snapped.dtype)[0]
