# SPDX-License-Identifier: Apache-2.0
"""The command ``monai-salm``. Everything heavy is imported by the command that needs it.

``arguments.py`` is what may be typed, ``commands.py`` what then happens, ``codes.py`` what it exits with.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from monai_salm.cli.arguments import parser
from monai_salm.cli.codes import (
    BAD_INPUT,
    DONE,
    EXIT_CODES,
    FAILED,
    INTEGRITY,
    INTERRUPTED,
    LOCKED,
    NOT_PROTECTED,
    exit_code,
    say,
    say_where,
    sentence,
)

__all__ = [
    "BAD_INPUT",
    "DONE",
    "EXIT_CODES",
    "FAILED",
    "INTEGRITY",
    "INTERRUPTED",
    "LOCKED",
    "NOT_PROTECTED",
    "main",
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = parser().parse_args(arguments)
    _quiet_logs()
    umask = os.umask(0o077)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        say("interrupted; what is finished is kept. Run the same command again to go on")
        return INTERRUPTED
    except Exception as error:
        if options.debug:
            raise
        code = exit_code(error)
        if code is None:
            say_where(error)
            return FAILED
        say(sentence(error, options))
        return code
    finally:
        os.umask(umask)


def _quiet_logs() -> None:
    import logging

    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s: %(message)s")
