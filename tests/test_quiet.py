"""Libraries are quiet within the block, errors are not, and everything is as before after it."""

import logging
import warnings

import pytest

from qcgraph.quiet import quiet


def test_warnings_are_dropped_and_errors_are_not(caplog: pytest.LogCaptureFixture) -> None:
    child = logging.getLogger("quiet_test.child")
    with warnings.catch_warnings(record=True) as warned:
        with quiet("quiet_test"):
            child.warning("dropped")
            child.error("kept")
            warnings.warn("dropped", stacklevel=1)
        child.warning("after")
        warnings.warn("after", stacklevel=1)
    assert caplog.messages == ["kept", "after"]
    assert [str(item.message) for item in warned] == ["after"]


def test_levels_come_back_after_an_error() -> None:
    logger = logging.getLogger("quiet_test")
    logger.setLevel(logging.DEBUG)
    with pytest.raises(ZeroDivisionError), quiet("quiet_test"):
        raise ZeroDivisionError
    assert logger.level == logging.DEBUG
