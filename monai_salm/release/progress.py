# SPDX-License-Identifier: Apache-2.0
"""Progress with an estimate of the time left: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")
LINE_EVERY_S = 10.0


def track(items: Sequence[Item], doing: str) -> Generator[Item, None, None]:
    """Hand out ``items`` one by one and show on standard error how far they are.

    Args:
        items: what is worked on; its length is the total.
        doing: a verb, such as ``"checking"``. Never the name of a file.
    """
    console = Console(file=sys.stderr)
    return _bar(items, doing, console) if console.is_terminal else _lines(items, doing)


def _bar(items: Sequence[Item], doing: str, console: Console) -> Generator[Item, None, None]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield from progress.track(items, description=doing)


def _lines(items: Sequence[Item], doing: str) -> Generator[Item, None, None]:
    total = len(items)
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last >= LINE_EVERY_S:
            left = (now - start) / done * (total - done) if done else 0
            print(f"{doing} {done}/{total}, about {left:.0f} s left", file=sys.stderr, flush=True)
            last = now
        yield item
