# SPDX-License-Identifier: Apache-2.0
"""What a broken codec can do to the process that runs it; imported by the child of ``monai_salm.io.worker``."""

from __future__ import annotations

import importlib
import os
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from monai_salm.io import formats, soundness, worker
from monai_salm.io.base import Case, RefusedError

SECRET = "DOE^JANE"


def fine(*given: Any) -> tuple[Any, ...]:
    return given


def process() -> dict[str, Any]:
    """What the child is and may do."""
    limits = {
        name: resource.getrlimit(getattr(resource, name)) for name in ("RLIMIT_CORE", "RLIMIT_FSIZE", "RLIMIT_AS")
    }
    with open("/proc/self/status") as status:
        facts = dict(line.split(":", 1) for line in status)
    modules = [name for name in ("torch", "monai", "matplotlib") if name in sys.modules]
    return {"pid": os.getpid(), "modules": modules, "no_new_privs": facts["NoNewPrivs"].strip()} | limits


def die(number: int) -> None:
    os.kill(os.getpid(), number)


def leave() -> None:
    os._exit(0)


def sleep() -> None:
    time.sleep(600)


def spin() -> None:
    while True:
        pass


def bloat() -> Any:
    return np.ones(1 << 40, np.uint8)


def recurse() -> None:
    recurse()


def tell() -> None:
    """A library that quotes what it read, in every way."""
    warnings.warn(f"invalid value {SECRET}", stacklevel=1)
    os.write(1, SECRET.encode())
    os.write(2, SECRET.encode())
    np.dtype(SECRET)


def refuse() -> None:
    raise RefusedError("some_reason", "what to do")


def interrupt() -> None:
    raise KeyboardInterrupt


def write(path: str) -> None:
    with open(path, "wb") as file:
        file.write(bytes(100))
        file.flush()


class _Command:
    def __reduce__(self) -> Any:
        return os.system, ("exit 1",)


def take_over() -> Any:
    """An answer that would run a program in the process that reads it."""
    return _Command()


def give(what: str) -> Any:
    """A class of ours or of a library, by ``module:name``."""
    module, _, name = what.partition(":")
    return getattr(importlib.import_module(module), name)


def count(last: int, then: int = 0) -> Iterator[int]:
    yield from range(last)
    if then:
        os.kill(os.getpid(), then)


@worker.isolated
def examine_or_die(case: Case, spatial_dims: int, window: Any) -> Any:
    """``soundness.examine``, but a file whose name says so kills the process."""
    if "killer" in case.names[0]:
        os.abort()
    return soundness.examine(case, spatial_dims, window)


def protect_and_die(unit: Any, deltas: Any, options: Any) -> Iterator[Any]:
    """``formats.protect``, but the process dies when half of the files are written."""
    written = formats._protect(unit, deltas, options)
    if "killer" in unit[0].names[0]:
        yield from islice(written, len(formats.files_of(unit)) // 2)
        os.abort()
    yield from written
