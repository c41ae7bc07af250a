# SPDX-License-Identifier: Apache-2.0
"""An error that ends a fit is told once, by whoever called the fit, and not by an engine's log before that.

Its text may hold a patient's name or a path. The error goes on to the caller with text and traceback, so that nothing
is lost: ``monai-salm`` shows them with ``--debug``, Python and ``monai.bundle`` in any case.
"""

from __future__ import annotations

import logging

from ignite.engine import Engine

__all__ = ["leave_to_the_caller"]

STATS_LOGGER = "monai_salm"
"""Where the bundles' StatsHandler logs, which would log the error with its traceback."""


def leave_to_the_caller(engine: Engine) -> None:
    """Keep errors that end the engine out of the log."""
    for logger in (engine.logger, logging.getLogger(STATS_LOGGER)):
        logger.addFilter(_is_no_end)


def _is_no_end(record: logging.LogRecord) -> bool:
    return not record.exc_info and "is terminating due to" not in str(record.msg)
