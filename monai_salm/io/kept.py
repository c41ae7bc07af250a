# SPDX-License-Identifier: Apache-2.0
"""What took long to make, and is wanted again."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Generic, TypeVar

__all__ = ["Kept"]

Value = TypeVar("Value")


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
