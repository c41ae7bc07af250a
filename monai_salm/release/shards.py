# SPDX-License-Identifier: Apache-2.0
"""Shards: parts of a release that separate processes write, each with its own journal and manifest."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from monai_salm.release import commit as door

MAX_SHARDS = 9999


@dataclass(frozen=True)
class Shard:
    """Part ``index`` (from 1) of ``count``.

    Raises:
        ValueError: When there is no such part.

    Example:
        >>> Shard.parse("2/4").manifest, Shard().manifest
        ('manifest-2-of-4.jsonl', 'manifest.jsonl')
    """

    index: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count <= MAX_SHARDS:
            raise ValueError(f"there is no shard {self.index} of {self.count}; count from 1, up to {MAX_SHARDS}")

    @classmethod
    def parse(cls, text: str | Shard | None) -> Shard:
        """The shard of ``"I/N"``; a shard is returned as it is, and None means the whole release."""
        if text is None:  # an empty text, as of a variable that is not set, is no way to ask for all of it
            return cls()
        if isinstance(text, Shard):
            return text
        numbers = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text)
        if not numbers:
            raise ValueError(f"shard {text!r} is not I/N, such as 1/4")
        return cls(int(numbers[1]), int(numbers[2]))

    @property
    def manifest(self) -> str:
        """Name of its public manifest."""
        return self.named(door.MANIFEST)

    @property
    def journal(self) -> str:
        """Name of its journal."""
        return self.named(door.JOURNAL)

    @property
    def refusals(self) -> str:
        """Name of the list of what it refused."""
        return self.named(door.REFUSALS)

    @property
    def lock(self) -> str:
        """Name of the lock that its process holds."""
        return f"{door.PRIVATE}/lock-{self.part}" if self.part else door.LOCK

    @property
    def part(self) -> str:
        """What its names have that others have not, ``"2-of-4"``; empty where one process writes everything."""
        return "" if self.count == 1 else f"{self.index}-of-{self.count}"

    def holds(self, digest: bytes) -> bool:
        """Whether a unit is in this part, by a keyed digest of it, which spreads units evenly."""
        return int.from_bytes(digest[:8], "big") % self.count == self.index - 1

    def named(self, name: str) -> str:
        """Name of its own file beside those of other shards, in place of ``name.jsonl``."""
        return name.replace(".jsonl", f"-{self.part}.jsonl") if self.part else name


def shards_of(count: int) -> Iterator[Shard]:
    """All parts of a release."""
    return (Shard(index, count) for index in range(1, count + 1))
