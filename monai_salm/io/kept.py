# SPDX-License-Identifier: Apache-2.0
"""Caches of what takes long to read from files."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")
Reader = TypeVar("Reader", bound=Callable[..., Any])


def state_of(path: Path) -> tuple[int, ...]:
    """Numbers that change when a file does, even if its time of modification is set back."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def while_unchanged(most: int) -> Callable[[Reader], Reader]:
    """Decorate a function whose first argument is a file: cache ``most`` results while their files are the same."""

    def decorate(function: Reader) -> Any:
        kept = lru_cache(most)(lambda state, *arguments: function(*arguments))

        @wraps(function)
        def remembered(path: Path, *more: Any) -> Any:
            return kept(state_of(path), path, *more)

        return remembered

    return decorate


class Kept(Generic[Value]):
    """A cache of values by key, limited by the sum of their sizes.

    Args:
        most: limit of that sum, in any unit.
        drop_newest: drop the newest value to make room, instead of the least recently used one. That is better where
            more values than fit are asked for again in the order in which they came: the first ones are still there.
    """

    def __init__(self, most: int, *, drop_newest: bool = False) -> None:
        self._most, self._drop_newest = most, drop_newest
        self._values: OrderedDict[Any, tuple[Value, int]] = OrderedDict()
        self._size = 0

    def get(self, key: Any) -> Value | None:
        """The value, or None where there is none (any more)."""
        if key in self._values and not self._drop_newest:
            self._values.move_to_end(key)
        return self._values.get(key, (None, 0))[0]

    def keep(self, key: Any, value: Value, size: int) -> Value:
        """Put a value in the cache, unless the key has one; returns ``value``."""
        if key not in self._values:
            while self._values and self._size + size > self._most:
                self._size -= self._values.popitem(last=self._drop_newest)[1][1]
            self._values[key] = value, size
            self._size += size
        return value
