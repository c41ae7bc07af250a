# SPDX-License-Identifier: Apache-2.0
"""Calls into pydicom and codecs on untrusted files: any exception becomes a refusal, and no text of theirs gets out.

Messages, warnings and log records of these libraries quote values of the file, so they may hold a patient's name.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from monai_salm.io.base import RefusedError

MAX_DEPTH = 32
"""Sequences nested deeper than this are an attack, not an image (pydicom issue 2330)."""
_LOGGERS = tuple(map(logging.getLogger, ("pydicom", "highdicom", "pylibjpeg", "openjpeg", "jpeg_ls")))


@contextmanager
def refusing(reason: str, detail: str) -> Iterator[None]:
    """Turn any exception inside the ``with`` block into a :py:class:`RefusedError` with this fixed text."""
    silence_parsers()
    try:
        yield
    except RefusedError:
        raise
    except BaseException as error:  # a broken file can raise anything, RecursionError and MemoryError included
        # A panic of the RLE codec, which is Rust, is no Exception; neither is KeyboardInterrupt, which must pass.
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        if isinstance(error, MemoryError):
            raise RefusedError("too_large", "the file takes more memory than there is") from None
        if isinstance(error, RecursionError):
            raise too_deep() from None
        raise RefusedError(reason, detail) from None  # else a traceback would print the original's text


def too_deep() -> RefusedError:
    """The refusal of a file whose sequences are nested deeper than :py:data:`MAX_DEPTH`."""
    return RefusedError("nested_too_deep", f"sequences are nested more than {MAX_DEPTH} deep; repair the file")


def silence_parsers() -> None:
    """Suppress warnings and log records of pydicom, highdicom and the codecs, for the whole process.

    Called again before each use, because others may reset filters and levels; ``warnings.catch_warnings`` would be
    tidier but is not safe with threads.
    """
    for logger in _LOGGERS:
        if logger.level <= logging.CRITICAL:  # setting it anew would empty the caches of all loggers, which takes time
            logger.setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module=r"(pydicom|highdicom)\b")
