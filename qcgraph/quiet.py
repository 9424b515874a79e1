"""Keeps libraries from printing warnings about what qcgraph checks and says itself."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Let libraries report only errors while the block runs; what they raise is raised anyway.

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
    """Drop what one logger says while the block runs, errors too, because they are also raised; in any thread.

    Args:
        name: the logger; those below it are not concerned.
    """

    def drop(_: logging.LogRecord) -> bool:
        return False

    logger = logging.getLogger(name)
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)
