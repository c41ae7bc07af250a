# SPDX-License-Identifier: Apache-2.0
"""Who raised an error: texts of our own code are about the input and safe to show, a library's may be neither. And what
is said of the most frequent fault of an input, a number out of range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real


def is_ours(error: BaseException) -> bool:
    """Whether our own code raised it, and not a library below it (torch, NumPy, a codec).

    Example:
        >>> is_ours(ValueError("never raised"))
        False
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("monai_salm.")


def check_number(
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    whole: bool = False,
) -> None:
    """Raise unless a value is a finite number in a range; true and false are none.

    Args:
        name: what the value is called.
        value: anything.
        least: what it may be at least.
        above: what it must be above.
        most: what it may be at most.
        whole: whether it must be an integer.

    Raises:
        ValueError: Which value it is, and what it must be.

    Example:
        >>> check_number("rounds", 2.5, least=1, whole=True)
        Traceback (most recent call last):
        ...
        ValueError: rounds is 2.5; it must be a whole number, 1 or more
    """
    kind = Integral if whole else Real
    if isinstance(value, kind) and not isinstance(value, bool) and -math.inf < value < math.inf:
        if least <= value <= most and value > above:
            return
    limits = (f"{least:g} or more" * (least > -math.inf), f"above {above:g}" * (above > -math.inf))
    told = " and ".join(filter(None, [*limits, f"at most {most:g}" * (most < math.inf)]))
    raise ValueError(f"{name} is {value!r}; it must be a {'whole ' * whole}number{told and ', ' + told}")


def check_size(name: str, value: object, dims: int | None = None) -> list[int]:
    """A size in voxels, a whole number above 0 for each axis.

    Args:
        name: what the value is called.
        value: anything.
        dims: how many axes there are; default: 2 or 3.

    Raises:
        ValueError: When it is none.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) not in ((dims,) if dims else (2, 3)):
        raise ValueError(f"{name} is {value!r}; it must have {dims or '2 or 3'} numbers")
    for side in value:
        check_number(f"a side of {name}", side, least=1, whole=True)
    return [int(side) for side in value]
