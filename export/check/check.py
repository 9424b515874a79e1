"""What was checked of an export, and what was found. Plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

NO_NUMBER = float(np.finfo(np.float32).max)  # stands for a distance that is none, and unlike infinity exists in JSON


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: what was checked.
        variant: the variant it was checked on.
        passed: whether it holds; None where that was not looked at, or makes no sense.
        value: the figure that was found; then not a number.
        limit: what the figure must not exceed.
        detail: the figure in words, with the offenders by name.
    """

    name: str
    variant: str
    passed: bool | None
    value: float
    limit: float
    detail: str

    def __str__(self) -> str:
        """Return it in one line: what was checked where, what came, what was expected, and the detail."""
        where = f"{self.name} of {self.variant}" if self.variant else self.name
        if self.passed is None:
            return f"{where}: {self.detail}"
        return f"{where}: {_figure(self.value)}, at most {_figure(self.limit)} expected: {self.detail}"

    @property
    def failed(self) -> bool:
        """Whether it was looked at and does not hold."""
        return self.passed is not None and not self.passed


def failure_text(checks: Iterable[Check]) -> str:
    """Return what failed of some checks, a line each with its figure and its limit; empty when nothing did."""
    return "\n".join(str(check) for check in checks if check.failed)


def _figure(value: float) -> str:
    return "no number" if value >= NO_NUMBER else f"{value:.3g}"
