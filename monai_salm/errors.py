# SPDX-License-Identifier: Apache-2.0
"""Who raised an error: texts of our own code are about the input and safe to show, a library's may be neither."""

from __future__ import annotations


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
