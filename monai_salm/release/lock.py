# SPDX-License-Identifier: Apache-2.0
"""One writer for each output folder: a lock that names its process, and that outlives no crash.

The process that holds the folder locks a file there (``flock``), which also works across containers; the system unlocks
it when the process ends. For file systems without such locks the file says which process of which boot of which machine
that is: what a dead process of this machine held is taken over. Whether a process of another machine is alive cannot be
known here, so that is an error that says what to do.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from monai_salm.release import commit as door

_held: dict[Path, int] = {}
"""Descriptors of the lock files that this process holds."""
_turn = threading.Lock()
"""Held by the thread of this process that reads or changes ``_held``."""


def _forget() -> None:
    """In a forked child: it holds nothing, and must not keep a file locked after its parent has ended."""
    global _turn
    _turn = threading.Lock()  # a thread of the parent may have had the other
    for path in list(_held):
        _close(path)


def _close(path: Path) -> None:
    if path in _held:
        os.close(_held.pop(path))


os.register_at_fork(after_in_child=_forget)


class LockedError(RuntimeError):
    """Another process writes into the output folder."""


def take(output_dir: Path, name: str = door.LOCK, wait_s: float = 0.0) -> bool:
    """Take the folder for this process, until :py:func:`give_back` or the end of the process.

    Args:
        output_dir: an output folder that is there, with ``private/``.
        name: of the lock's file.
        wait_s: how long to wait for another process.

    Returns:
        False when this process has it already.

    Raises:
        LockedError: When another process that is alive, or may be, holds it.
    """
    until = time.monotonic() + wait_s
    while True:
        try:
            with _turn:
                return _take(output_dir, name)
        except LockedError:
            if time.monotonic() >= until:
                raise
        time.sleep(0.1)


def _take(output_dir: Path, name: str) -> bool:
    path, mine = output_dir.resolve() / name, _myself()
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if path in _held and os.path.sameopenfile(handle, _held[path]):
            return False
        unlocked, holder = _lock(handle), _holder(handle)
        if unlocked and (holder in (None, mine) or not _may_be_alive(holder)):
            _write(handle, json.dumps(mine))
            _close(path)
            _held[path] = os.dup(handle)
            return True
    finally:
        os.close(handle)
    holder = holder or mine | {"pid": "?"}  # it has locked the file and not yet written it
    who = f"process {holder.get('pid')} on {'this' if _is_here(holder) else 'another'} machine"
    fix = f". If it does not run any more, remove {name} there and run again" if unlocked else ""
    raise LockedError(f"{who} writes into the output folder; wait for it{fix}")


def give_back(output_dir: Path, name: str = door.LOCK) -> None:
    """End what :py:func:`take` began; nothing if this process does not hold the folder."""
    path = output_dir.resolve() / name
    with _turn:
        if path in _held:
            try:
                _write(_held[path], "")
            finally:
                _close(path)


@contextlib.contextmanager
def holding(output_dir: Path, name: str = door.LOCK, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the folder in a block, see :py:func:`take`; a process that holds it already keeps it afterwards."""
    taken = take(output_dir, name, wait_s)
    try:
        yield
    finally:
        if taken:
            give_back(output_dir, name)


def _lock(handle: int) -> bool:
    """Lock the file; False if another process has done so."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # some network file systems have no such locks
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _holder(handle: int) -> dict[str, object] | None:
    """The process that the file names; None where it is empty, or a crash left it half written."""
    try:
        content = json.loads(os.pread(handle, 4096, 0))
    except (OSError, ValueError):  # some network file systems let nobody read a locked file
        return None
    return content if isinstance(content, dict) else None


def _write(handle: int, text: str) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, text.encode(), 0)
    os.fsync(handle)


def _myself() -> dict[str, object]:
    return {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(), "started": _started(os.getpid())}


def _is_here(holder: dict[str, object]) -> bool:
    return holder.get("host") == socket.gethostname()


def _may_be_alive(holder: dict[str, object]) -> bool:
    if not _is_here(holder):
        return True
    pid = holder.get("pid")
    return holder.get("boot") == _boot() and isinstance(pid, int) and _started(pid) == holder.get("started") != ""


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux: process ids alone
        return ""


def _started(pid: int) -> str:
    """When a process started, in ticks since the boot, which tells apart processes that got the same id; empty where
    it has ended, ``"alive"`` where only that is known."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else rest[18]
    except (OSError, ValueError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "alive"
