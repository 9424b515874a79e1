"""Keep libraries from printing warnings about problems that qcgraph checks and reports itself."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Let libraries report only errors while the block runs; exceptions are not affected.

    Args:
        names: the loggers whose warnings are dropped, with the loggers below them; all Python warnings are dropped.
    """
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def without_log(name: str) -> Iterator[None]:
    """Drop all messages of one logger while the block runs, even errors, because they are also raised; in any thread.

    Args:
        name: the name of the logger; the loggers below it are not affected.
    """

    def drop(_: logging.LogRecord) -> bool:
        return False

    logger = logging.getLogger(name)
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)
