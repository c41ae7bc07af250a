# SPDX-License-Identifier: Apache-2.0
"""Whether an error's text may be shown, and checks of the most frequent fault of an input, a number out of range.

An error that our own code raises is about the input, and its text is safe to show; a library's text may quote a file.
"""

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
    """Raise unless a value is a finite number (no bool) in a range.

    Args:
        name: what the value is called.
        value: anything.
        least: smallest value that is allowed.
        above: the value must be greater than this.
        most: largest value that is allowed.
        whole: whether it must be an integer.

    Raises:
        ValueError: When it is not; the text has the name, the value and the range.

    Example:
        >>> check_number("rounds", 2.5, least=1, whole=True)
        Traceback (most recent call last):
        ...
        ValueError: rounds is 2.5; it must be a whole number, 1 or more
    """
    if isinstance(value, Integral if whole else Real) and not isinstance(value, bool):
        if -math.inf < value < math.inf and least <= value <= most and value > above:
            return
    limits = [
        f"{least:g} or more" if least > -math.inf else "",
        f"above {above:g}" if above > -math.inf else "",
        f"at most {most:g}" if most < math.inf else "",
    ]
    allowed = " and ".join(filter(None, limits))
    number = "whole number" if whole else "number"
    raise ValueError(f"{name} is {value!r}; it must be a {number}{', ' if allowed else ''}{allowed}")


def check_size(name: str, value: object, dims: int | None = None) -> list[int]:
    """The value as a size in voxels: one whole number above 0 for each axis.

    Args:
        name: what the value is called.
        value: anything; numbers may be those of an array or a tensor.
        dims: number of axes; default: 2 or 3 are allowed.

    Raises:
        ValueError: When it is no such size.
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) not in ((dims,) if dims else (2, 3)):
        raise ValueError(f"{name} is {value!r}; it must have {dims or '2 or 3'} numbers")
    for side in value:
        check_number(f"a side of {name}", side, least=1, whole=True)
    return [int(side) for side in value]
