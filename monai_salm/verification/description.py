# SPDX-License-Identifier: Apache-2.0
"""What a transform is, in words: trainings that are kept belong to the transforms that they were made with."""

from __future__ import annotations

import enum
import functools
import hashlib
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["described"]

_CALLABLES = functools.partial, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.CodeType


def described(value: Any) -> str:
    """Type and settings of a transform and of everything in it, always in the same words; random states are left out.

    Example:
        >>> from monai.transforms import RandFlip
        >>> described(RandFlip(0.5)) == described(RandFlip(0.5)), described(RandFlip(0.5)) == described(RandFlip(1))
        (True, False)
    """
    if isinstance(value, np.random.RandomState | np.random.Generator):
        return ""
    if value is None or isinstance(value, bool | int | float | str | bytes | enum.Enum | torch.dtype | np.dtype):
        return repr(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {described(item)}' for key, item in value.items())}}}"
    if isinstance(value, set | frozenset):
        return described(sorted(described(item) for item in value))
    if isinstance(value, list | tuple):
        return f"[{', '.join(described(item) for item in value)}]"
    if isinstance(value, Tensor | np.ndarray):
        content = np.asarray(value)
        return f"{content.dtype}{content.shape} {hashlib.sha256(content.tobytes()).hexdigest()}"
    if isinstance(value, _CALLABLES):
        return _described_code(value)
    kind = value if isinstance(value, type) else type(value)
    settings = {} if isinstance(value, type) else dict(sorted(getattr(value, "__dict__", {}).items()))
    return f"{kind.__module__}.{kind.__qualname__} {described(settings) if settings else ''}".rstrip()


def _described_code(value: Any) -> str:
    """What a function does and holds, save what it reads from its module."""
    if isinstance(value, functools.partial):
        return f"partial({described([value.func, value.args, value.keywords])})"
    if isinstance(value, types.MethodType):
        return f"{described(value.__func__)} of {described(value.__self__)}"
    if isinstance(value, types.CodeType):  # constants hold the code of lambdas and comprehensions inside
        content = value.co_code + described([value.co_consts, value.co_names]).encode()
        return hashlib.sha256(content).hexdigest()[:16]
    name = f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, types.BuiltinFunctionType):
        return name
    held = [cell.cell_contents for cell in value.__closure__ or () if cell.cell_contents is not value]
    return f"{name} {described([value.__code__, value.__defaults__, value.__kwdefaults__, held])}"
