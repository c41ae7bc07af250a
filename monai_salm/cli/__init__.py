# SPDX-License-Identifier: Apache-2.0
"""The command ``monai-salm``. Everything heavy is imported by the command that needs it.

``arguments.py`` is what may be typed, ``commands.py`` what then happens, ``codes.py`` what it exits with.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from monai_salm.cli.arguments import parser
from monai_salm.cli.codes import (
    BAD_INPUT,
    FAILED,
    INTERRUPTED,
    UNREAD,
    exit_code,
    give_up,
    pipe_broke,
    say,
    say_where,
    sentence,
)

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    _open_streams()
    try:
        try:
            return _run(parser().parse_args(arguments))
        finally:
            sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as error:
        if not pipe_broke(error):
            raise
        give_up(sys.stdout)
        return UNREAD
    except OSError as error:  # of the flush: all others were told
        give_up(sys.stdout)
        say(f"the output cannot be written ({error.strerror})")
        return BAD_INPUT


def _run(options: argparse.Namespace) -> int:
    """Run a command; the exit code, also of an error."""
    _quiet_logs(options.debug)
    umask = os.umask(0o077)
    try:
        with _ending_as_interrupted():
            return options.command(options)
    except BrokenPipeError:
        raise
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


def _open_streams() -> None:
    """Standard streams that take all that is written: a closed one leads nowhere, and a letter that the screen's
    encoding does not have is written as its number."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def _ending_as_interrupted() -> Iterator[None]:
    """SIGTERM and SIGHUP, which schedulers and containers send, end a run as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    alone = threading.current_thread() is threading.main_thread()  # no other may say what signals do
    ours = [end for end in ends if alone and signal.getsignal(end) is signal.SIG_DFL]  # nohup ignores one
    for end in ours:
        signal.signal(end, interrupt)
    try:
        yield
    finally:
        for end in ours:
            signal.signal(end, signal.SIG_DFL)


def _quiet_logs(debug: bool) -> None:
    """Warnings only, and no tracebacks: what an error may say of a file is decided here, and not by an engine."""
    handler = logging.StreamHandler(sys.stderr)
    if not debug:
        handler.addFilter(_is_no_traceback)
    # Nothing where the program that calls us has handlers of its own.
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(levelname)s: %(message)s")


def _is_no_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info and not record.name.startswith("ignite.")
