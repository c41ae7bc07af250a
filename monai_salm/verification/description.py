# SPDX-License-Identifier: Apache-2.0
"""What a transform is, in words: trainings that are kept belong to the transforms that they were made with."""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["code_of", "described"]

_LIBRARIES = {*sys.stdlib_module_names, "torch", "monai", "numpy"}
_PLAIN = bool, int, float, str, bytes
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
    return " ".join(filter(None, [_name(kind), code_of(kind), described(settings) if settings else ""]))


def code_of(kind: type) -> str:
    """Digest of what the methods and plain constants of a class are, and of those that it inherits; empty where a
    library brings all of them. Functions that they call are known by their names alone."""
    parts = []
    for own in kind.__mro__:
        if own.__module__.partition(".")[0] in _LIBRARIES:
            continue
        for name, item in sorted(vars(own).items()):
            for function in _functions(item):
                parts.append(f"{name} {_described_function(function)}")
            if _is_plain(item) and not name.startswith("__"):
                parts.append(f"{name} {described(item)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16] if parts else ""


def _functions(item: Any) -> list[types.FunctionType]:
    """Those of a method, a property or the like, without what is wrapped around them."""
    held = [item, *(getattr(item, name, None) for name in ("__func__", "fget", "fset", "fdel", "func"))]
    found = [inspect.unwrap(each) for each in held if callable(each) and not isinstance(each, type)]
    return [each for each in found if isinstance(each, types.FunctionType)]


def _is_plain(item: Any) -> bool:
    if isinstance(item, tuple | list | set | frozenset):
        return all(map(_is_plain, item))
    if isinstance(item, dict):
        return all(map(_is_plain, (*item, *item.values())))
    return item is None or isinstance(item, _PLAIN)


def _names_in(code: types.CodeType) -> set[str]:
    inside = [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return {*code.co_names}.union(*map(_names_in, inside))


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _described_function(function: types.FunctionType) -> str:
    """What a function does, its defaults, and the constants of its module that it names."""
    named = {name: function.__globals__.get(name) for name in sorted(_names_in(function.__code__))}
    constants = {name: item for name, item in named.items() if item is not None and _is_plain(item)}
    return described([function.__code__, function.__defaults__, function.__kwdefaults__, constants])


def _described_code(value: Any) -> str:
    """What a function does and holds."""
    if isinstance(value, functools.partial):
        return f"partial({described([value.func, value.args, value.keywords])})"
    if isinstance(value, types.MethodType):
        return f"{described(value.__func__)} of {described(value.__self__)}"
    if isinstance(value, types.CodeType):  # constants hold the code of lambdas and comprehensions inside
        content = value.co_code + described([value.co_consts, value.co_names]).encode()
        return hashlib.sha256(content).hexdigest()[:16]
    if isinstance(value, types.BuiltinFunctionType):
        return _name(value)
    held = [cell.cell_contents for cell in value.__closure__ or () if cell.cell_contents is not value]
    held = [_name(each) if isinstance(each, type) else each for each in held]  # a method's own class, for super()
    return f"{_name(value)} {_described_function(value)} {described(held)}"
