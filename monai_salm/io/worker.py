# SPDX-License-Identifier: Apache-2.0
"""Runs functions in a child process that parses, decodes and encodes untrusted bytes, so a bad file costs only itself.

Codecs are native code, and a broken file can crash, hang or bloat the process that runs them. Each process of ours
keeps one child, started at first use and again after it died; it receives a function with arguments and returns the
result. The child has limits on memory, time and open files, gains no privileges, and loads neither torch nor MONAI. Its
standard streams lead to ``/dev/null``, and no text of an exception that is not ours leaves it: such texts quote values
of the file.

This module's own reasons for a refusal: ``codec_crash`` (the child died), ``too_slow``, ``too_large`` (memory) and
``unreadable`` (any other exception that a broken file caused).
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from monai_salm.errors import is_ours
from monai_salm.io.base import Case, RefusedError
from monai_salm.io.worker_wire import ClosedError, receive, send

SECONDS = 30.0
"""Processor time that a call may take, whatever the size of its files."""
BYTES_PER_SECOND = 1 << 20
"""A call gets one more second per so many bytes of its files; the slowest codec here reads four times as fast."""
WALL = 6
"""Limit by the clock, in multiples of that of processor time: other processes may use the processor, too."""
START_SECONDS = 300.0
MEMORY_BYTES = min(16 << 30, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
"""Memory that the child may take on top of what it has when it starts."""
OPEN_FILES = 64

_START = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from monai_salm.io import worker; worker.serve()"
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    # For glibc: keep buffers of the size of a slice for the next slice, return those of a volume to the system. Asking
    # the system for each buffer of a slice takes as long as all else that is done with it.
    "MALLOC_MMAP_THRESHOLD_": str(8 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(32 << 20),
}
_NO_NEW_PRIVS = 38
_CRASHED = "codec_crash", "the process that read the file died of it; export the image uncompressed"
_SLOW = "too_slow", "reading the file took longer than an image of its size can take; export it again"
_LARGE = "too_large", "reading the file takes more memory than there is; export it in smaller parts"

Result = TypeVar("Result")
Given = ParamSpec("Given")


def call(function: Callable[Given, Result], *arguments: Given.args, **named: Given.kwargs) -> Result:
    """What ``function(*arguments, **named)`` returns, computed in the child.

    Args:
        function: a module's function; in the child itself it is simply called.
        *arguments: anything that can be pickled. The sizes of the files among them extend the time limit.
        **named: likewise.

    Raises:
        RefusedError: What the function raises, and this module's own reasons.
        ValueError: What the function raises by itself (not what a library under it does).
        OSError: When the system denies a file; without its name.
    """
    if _Child.inside:
        return function(*arguments, **named)
    return _begin("call", partial(function, **named), arguments, _seconds((arguments, named)))[1]


def isolated(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Decorate a module's function so that it always runs in the child, see :py:func:`call`."""

    @wraps(function)
    def anywhere(*arguments: Given.args, **named: Given.kwargs) -> Result:
        return function(*arguments, **named) if _Child.inside else call(anywhere, *arguments, **named)

    return anywhere


def stream(function: Callable[..., Iterable[Result]], *arguments: Any) -> Iterator[Result]:
    """Yield what a generator function yields in the child, which computes each item only when it is asked for.

    Other calls may come in between. Arguments and exceptions are as for :py:func:`call`.
    """
    if _Child.inside:
        yield from function(*arguments)
        return
    seconds = _seconds(arguments)
    child, number = _begin("open", function, arguments, seconds)
    del arguments  # the child has them: free the memory here
    try:
        while item := child.ask("next", number, (), seconds):
            yield item.pop()  # so that no reference to it is left while the next one is made
    finally:
        child.drop(number)


def stop() -> None:
    """End this process's child, if it has one; the next call starts another."""
    global _child
    if _child is not None:
        _child.end()
        _child = None


# ---------------------------------------------------------------- the parent's side

_child: _Child | None = None
_guard = threading.Lock()


def _current() -> _Child:
    global _child
    with _guard:
        if _child is None or not _child.alive:
            _child = _Child()
        return _child


def _begin(what: str, function: Any, arguments: Any, seconds: float) -> tuple[_Child, Any]:
    """Send a request; to another child if the first one died of another thread's file before it was asked."""
    while True:
        child = _current()
        with suppress(_GoneError):
            return child, child.ask(what, function, arguments, seconds)


def _forget() -> None:
    """After a fork: the child belongs to the other process, which alone may talk to it."""
    global _child, _guard
    if _child is not None:
        _child.disown()
    _child, _guard = None, threading.Lock()


class _GoneError(RefusedError):
    """The child had died before it was asked."""


class _Child:
    """One child process and the socket to it."""

    inside = False
    """Whether this process is itself such a child."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs.fileno()), json.dumps(sys.path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **_ENVIRONMENT},
            )
        self._socket = ours
        self._lock = threading.Lock()
        self._dropped: list[int] = []
        self.alive = True
        try:
            receive(ours, time.monotonic() + START_SECONDS)
        except (ClosedError, TimeoutError):
            self.end()
            raise RuntimeError("the process that reads files cannot be started; is monai_salm installed?") from None

    def ask(self, what: str, target: Any, arguments: Any, seconds: float) -> Any:
        """Send one request and wait for its answer; a child that fails to answer is ended."""
        with self._lock:
            if not self.alive:
                raise _GoneError(_CRASHED[0], "the process that read the file died of another one; run again")
            deadline = time.monotonic() + seconds * WALL
            try:
                while self._dropped:
                    send(self._socket, ("close", self._dropped.pop(), (), seconds), deadline)
                    receive(self._socket, deadline)
                send(self._socket, (what, target, arguments, seconds), deadline)
                kind, *answer = receive(self._socket, deadline)
            except (ClosedError, TimeoutError) as error:
                self.end()
                slow = isinstance(error, TimeoutError) or self._process.returncode == -signal.SIGXCPU
                raise RefusedError(*(_SLOW if slow else _CRASHED)) from None
            except BaseException:  # an interrupt: the answer would be taken for that of the next request
                self.end()
                raise
        if kind == "done":
            return answer[0]
        raise _ERRORS[kind](*answer)

    def drop(self, number: int) -> None:
        """Close a stream with the next request, not now: garbage collection may call this in the middle of one."""
        self._dropped.append(number)

    def end(self) -> None:
        """Close the socket, which ends an idle child, and kill it in case it is busy."""
        self.alive = False
        self._socket.close()
        with suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()

    def disown(self) -> None:
        """Forget a child of the process that this one was forked from."""
        self._socket.close()
        self._process.returncode = 0  # or its destructor complains that it still runs


_ERRORS: Mapping[str, Callable[..., Exception]] = {"refused": RefusedError, "value": ValueError, "system": OSError}


def _seconds(arguments: Any) -> float:
    """Processor time that a call may take: by the sizes of all files that its arguments name."""
    size = 0
    for path in set(_paths(arguments)):
        with suppress(OSError):
            size += path.stat().st_size
    return SECONDS + size / BYTES_PER_SECOND


def _paths(found: Any) -> Iterator[Path]:
    if isinstance(found, Path):
        yield found
    elif isinstance(found, Case):
        yield from (*found.files, *([found.mask.file] if found.mask else []))
    elif isinstance(found, Mapping):
        yield from _paths((*found, *found.values()))
    elif isinstance(found, (tuple, list)):
        for each in found:
            yield from _paths(each)


os.register_at_fork(after_in_child=_forget)
atexit.register(stop)

# ---------------------------------------------------------------- the child's side


def serve() -> None:
    """Answer requests until the parent closes its end of the socket."""
    _Child.inside = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the parent says what ends
    from monai_salm.io import soundness  # noqa: F401  load everything before the limits apply

    gc.freeze()  # looking for garbage in what is loaded would take a tenth of the time that files take
    parent = socket.socket(fileno=int(sys.argv[1]))
    _limit()
    opened: dict[int, Iterator[Any]] = {}
    send(parent, ("ready",), None)
    with suppress(ClosedError):
        while True:
            what, target, arguments, seconds = receive(parent, None, trusted=True)
            _limit_time(seconds)
            answer = _answer(opened, what, target, arguments)
            del target, arguments
            try:
                send(parent, answer, None)
            except MemoryError as error:  # while the message was made, so nothing of it is sent yet
                send(parent, _told(error), None)
            del answer


def _answer(opened: dict[int, Iterator[Any]], what: str, target: Any, arguments: Any) -> tuple[Any, ...]:
    try:
        if what == "call":
            return "done", target(*arguments)
        if what == "open":
            number = max(opened, default=0) + 1
            opened[number] = iter(target(*arguments))
            return "done", number
        if what == "next":
            item = next(opened[target], opened)
            return "done", None if item is opened else [item]
        opened.pop(target, None)
        return "done", None
    except BaseException as error:  # a broken file can raise anything, and a codec in Rust even what is no Exception
        return _told(error)


def _told(error: BaseException) -> tuple[Any, ...]:
    """The answer that tells the parent of an exception, without texts that are not ours."""
    if isinstance(error, RefusedError):
        return "refused", error.reason, error.detail
    if isinstance(error, MemoryError):
        return "refused", *_LARGE
    if isinstance(error, OSError):
        return "system", error.errno, error.strerror
    if isinstance(error, ValueError) and is_ours(error):
        return "value", str(error)
    return "refused", "unreadable", f"the file is broken ({type(error).__name__}); export it again"


def _limit() -> None:
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_NOFILE: OPEN_FILES}
    with suppress(OSError):  # only where the system tells how much memory is in use
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limits[resource.RLIMIT_AS] = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
    for which, most in limits.items():
        hard = resource.getrlimit(which)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (most, most))
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)


def _limit_time(seconds: float) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + seconds) + 1
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
