# SPDX-License-Identifier: Apache-2.0
"""Sends Python objects through a socket: arrays without copies, and from the untrusted side only plain data."""

from __future__ import annotations

import io
import pickle
import socket
import struct
import sys
import time
from dataclasses import is_dataclass
from typing import Any

from monai_salm.io.dicom_guard import silence_parsers

MAX_BUFFERS = 1 << 24
_COUNT = struct.Struct("<Q")
_NUMPY = {"_reconstruct", "_frombuffer", "scalar", "ndarray", "dtype"}
_NAMED = {
    "builtins": {"bytearray", "bytes", "complex", "float", "frozenset", "int", "list", "set", "str"},
    "pathlib": {"PosixPath", "PurePosixPath"},
}
_PYDICOM = {f"pydicom.{part}" for part in ("dataset", "dataelem", "multival", "sequence", "tag", "uid", "valuerep")}


class ClosedError(Exception):
    """The other side is gone."""


def send(to: socket.socket, message: Any, deadline: float | None) -> None:
    """Send a message: the number of buffers, their sizes, then the buffers: the pickle and its arrays.

    Raises:
        ClosedError: When nobody listens.
        TimeoutError: When it takes longer than until ``deadline`` (as ``time.monotonic`` tells the time).
    """
    arrays: list[pickle.PickleBuffer] = []
    body = pickle.dumps(message, protocol=5, buffer_callback=arrays.append)
    views = [memoryview(body), *(array.raw() for array in arrays)]
    sizes = (len(views), *(view.nbytes for view in views))
    try:
        for view in (memoryview(struct.pack(f"<{len(sizes)}Q", *sizes)), *views):
            while view.nbytes:
                to.settimeout(_left(deadline))
                view = view[to.send(view) :]
    except (BrokenPipeError, ConnectionResetError):
        raise ClosedError from None


def receive(of: socket.socket, deadline: float | None, *, trusted: bool = False) -> Any:
    """Receive a message.

    Args:
        of: the socket.
        deadline: as for :py:func:`send`.
        trusted: whether the message may name any class and function; else anything but plain data is an error.

    Raises:
        ClosedError: When the other side is gone, or sent what it must not.
        TimeoutError: See :py:func:`send`.
    """
    (count,) = _COUNT.unpack(_read(of, _COUNT.size, deadline))
    if not 0 < count <= MAX_BUFFERS:
        raise ClosedError
    sizes = struct.unpack(f"<{count}Q", _read(of, count * _COUNT.size, deadline))
    body, *arrays = (_read(of, size, deadline) for size in sizes)
    if trusted:
        return pickle.loads(body, buffers=arrays)
    silence_parsers()  # pydicom warns about odd values as it unpickles them
    try:
        return _PlainData(io.BytesIO(body), buffers=arrays).load()
    except Exception:  # not only UnpicklingError: a pickle is a program, and this one may be hostile
        raise ClosedError from None


def _read(of: socket.socket, size: int, deadline: float | None) -> bytearray:
    try:
        buffer = bytearray(size)
    except (MemoryError, OverflowError):
        raise ClosedError from None
    view = memoryview(buffer)
    while view.nbytes:
        of.settimeout(_left(deadline))
        try:
            count = of.recv_into(view)
        except ConnectionResetError:
            raise ClosedError from None
        if not count:
            raise ClosedError
        view = view[count:]
    return buffer


def _left(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _PlainData(pickle.Unpickler):
    """Unpickles arrays, dataclasses of ours, and data sets of pydicom: classes whose constructors do no harm."""

    def find_class(self, module: str, name: str) -> Any:
        """The class, if it is one of those and its module is loaded already."""
        found = getattr(sys.modules.get(module), name, None)
        if module.partition(".")[0] == "numpy":
            allowed = name in _NUMPY
        elif module.partition(".")[0] in _NAMED:
            allowed = name in _NAMED[module.partition(".")[0]]
        elif module.startswith("monai_salm."):
            allowed = isinstance(found, type) and is_dataclass(found)
        else:
            allowed = isinstance(found, type) and found.__module__ == module and module in _PYDICOM
        if found is None or not allowed:
            raise pickle.UnpicklingError
        return found
