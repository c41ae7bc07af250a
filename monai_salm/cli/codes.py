# SPDX-License-Identifier: Apache-2.0
"""Exit codes, and what may be said of an error: messages name no file that could be personal."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TextIO

from monai_salm.errors import is_ours

DONE, FAILED, BAD_INPUT, NOT_PROTECTED, INTEGRITY, LOCKED, INTERRUPTED, UNREAD = 0, 1, 2, 3, 4, 5, 130, 141
EXIT_CODES = """\
exit codes:
  0    done: everything is protected, and verified where asked
  1    an error in the program; the traceback says where
  2    the arguments or the input cannot be used, or OUT was made with other settings; nothing was written that was not
       whole
  3    a file was refused, or the verdict is not "protected", or there was nothing to check ("inconclusive")
  4    a file of OUT is not what was written, is missing, or does not belong; share nothing of the folder
  5    another process writes into OUT
  130  interrupted; the same command goes on
  141  what reads the output (such as 'head') has ended before the command; the same command goes on
"""


def exit_code(error: Exception) -> int | None:
    """Exit code of an error whose own text explains it to the user; None for a fault of the program."""
    if type(error).__module__.startswith("monai_salm."):
        return {"IntegrityError": INTEGRITY, "LockedError": LOCKED}.get(type(error).__name__, BAD_INPUT)
    is_explained = isinstance(error, OSError) or (isinstance(error, ValueError) and is_ours(error))
    return BAD_INPUT if is_explained else None


def sentence(error: Exception, options: argparse.Namespace) -> str:
    """Text of an error that has an exit code. It names only files that the command line names, or that are ours."""
    if isinstance(error, OSError) and error.strerror:
        named = _named(error, options)
        return f"{error.strerror}: {named}" if named else error.strerror
    return str(error)


def _named(error: OSError, options: argparse.Namespace) -> str:
    """What may be said of the file of an error; empty where nothing may.

    Names of files in an export, and of released files, may be personal.
    """
    if str(error.filename) in {str(value) for value in vars(options).values() if isinstance(value, Path)}:
        return str(error.filename)
    if not isinstance(error.filename, str | os.PathLike):
        return ""
    path = Path(os.path.abspath(error.filename))  # takes out "..", so that "../out" is not in "."
    folders = (getattr(options, name, None) for name in ("export", "out"))
    export, out = (Path(os.path.abspath(each)) if each else None for each in folders)
    if export and path.is_relative_to(export):
        return str(options.export) if path == export else f"a file or folder in {options.export}"
    if out is None:
        return ""
    inside = path.relative_to(out) if path.is_relative_to(out) else Path()
    if len(inside.parts) < 2 or inside.parts[0] == "private" or getattr(options, "names", False):
        return str(inside) if inside.parts else ""
    return f"a file in {inside.parts[0]}/" + ("; --names tells which" if hasattr(options, "names") else "")


def pipe_broke(error: BaseException) -> bool:
    """Whether nobody reads the output any more; rich turns that into a SystemExit."""
    return isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError)


def say_where(error: Exception) -> None:
    """Print the traceback of a fault without its text: libraries quote what they read, names of patients included."""
    import traceback

    print("Traceback (most recent call last):", *traceback.format_tb(error.__traceback__), file=sys.stderr, sep="\n")
    loading = isinstance(error, ImportError)  # whose text is about the installation
    kept_back = f": {error}" if loading else "; its text is kept back, --debug shows it"
    say(f"a fault of the program ({type(error).__name__}){kept_back}")


def say(text: str) -> None:
    """Print a line for the user to standard error."""
    try:
        print(f"monai-salm: {text}", file=sys.stderr, flush=True)
    except OSError:  # of a terminal that was closed
        give_up(sys.stderr)


def give_up(stream: TextIO) -> None:
    """Point a broken standard stream to the null device: Python flushes it when it ends, and would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
