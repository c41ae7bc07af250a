# SPDX-License-Identifier: Apache-2.0
"""What took long to make of files, and is wanted again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")
Reader = TypeVar("Reader", bound=Callable[..., Any])


def state_of(path: Path) -> tuple[int, ...]:
    """What changes when a file does, whoever sets its time back."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def while_unchanged(most: int) -> Callable[[Reader], Reader]:
    """Decorate a function of a file and of more: so many results are kept, each as long as its file stays the same."""

    def decorate(function: Reader) -> Any:
        kept = lru_cache(most)(lambda state, *arguments: function(*arguments))

        @wraps(function)
        def remembered(path: Path, *more: Any) -> Any:
            return kept(state_of(path), path, *more)

        return remembered

    return decorate


class Kept(Generic[Value]):
    """Values by key, up to so much of them.

    Args:
        most: of all sizes together, in any unit.
        drop_newest: whether the value that came last makes room for the next one: of many that are wanted again in the
            order in which they came, the first ones are then still there. Else the one that was not wanted for longest.
    """

    def __init__(self, most: int, *, drop_newest: bool = False) -> None:
        self._most, self._drop_newest = most, drop_newest
        self._values: OrderedDict[Any, tuple[Value, int]] = OrderedDict()
        self._size = 0

    def get(self, key: Any) -> Value | None:
        """The value, if it is still there."""
        if key in self._values and not self._drop_newest:
            self._values.move_to_end(key)
        return self._values.get(key, (None, 0))[0]

    def keep(self, key: Any, value: Value, size: int) -> Value:
        """The same value."""
        if key not in self._values:
            while self._values and self._size + size > self._most:
                self._size -= self._values.popitem(last=self._drop_newest)[1][1]
            self._values[key] = value, size
            self._size += size
        return value
