# SPDX-License-Identifier: Apache-2.0
"""The command ``monai-salm``. Everything heavy is imported by the command that needs it.

``arguments.py`` parses, ``commands.py`` has a function per command, ``codes.py`` exit codes and messages of errors.
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
    except OSError as error:  # only the flush can raise it here: _run handles those of commands
        give_up(sys.stdout)
        say(f"the output cannot be written ({error.strerror})")
        return BAD_INPUT


def _run(options: argparse.Namespace) -> int:
    """Run a command and turn its errors into messages; returns the exit code."""
    _quiet_logs(options.debug)
    umask = os.umask(0o077)
    try:
        with _ending_as_interrupted():
            _check_place()
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
    """Make sure that writing to the standard streams cannot fail: replace a closed one by the null device, and write a
    character that the encoding of the terminal lacks as an escape."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _check_place() -> None:
    """What Python and the libraries need of the place that they are started in, told before they fail without it."""
    if (encoding := sys.getfilesystemencoding()) != "utf-8":
        raise ValueError(f"names of files are taken for {encoding} here, and are UTF-8; set PYTHONUTF8=1")
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ValueError("the current folder is not there any more; change to another one") from None


@contextmanager
def _ending_as_interrupted() -> Iterator[None]:
    """SIGTERM and SIGHUP, which schedulers and containers send, end a run as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    is_main = threading.current_thread() is threading.main_thread()  # only this thread may set handlers
    ours = [end for end in ends if is_main and signal.getsignal(end) is signal.SIG_DFL]  # nohup ignores SIGHUP
    for end in ours:
        signal.signal(end, interrupt)
    try:
        yield
    finally:
        for end in ours:
            signal.signal(end, signal.SIG_DFL)


def _quiet_logs(debug: bool) -> None:
    """Log warnings only, and no tracebacks: they quote files, and what may be said of a file is decided here alone."""
    handler = logging.StreamHandler(sys.stderr)
    if not debug:
        handler.addFilter(lambda record: not record.exc_info and not record.name.startswith("ignite."))
    # Does nothing where the calling program has set handlers of its own.
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(levelname)s: %(message)s")
