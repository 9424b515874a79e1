"""The results of checks of an export. Plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

NO_NUMBER = float(np.finfo(np.float32).max)  # in place of an undefined distance; unlike infinity, JSON has it


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: the subject of the check.
        variant: the variant that was checked.
        passed: whether the check holds; None where it was not made, or does not apply.
        value: the figure that was found; `NO_NUMBER` without one.
        limit: the largest allowed figure.
        detail: the figure in words, with the offenders by name.
    """

    name: str
    variant: str
    passed: bool | None
    value: float
    limit: float
    detail: str

    def __str__(self) -> str:
        """Return one line: name and variant, the figure, its limit, and the detail."""
        where = f"{self.name} of {self.variant}" if self.variant else self.name
        if self.passed is None:
            return f"{where}: {self.detail}"
        return f"{where}: {_figure(self.value)}, at most {_figure(self.limit)} expected: {self.detail}"

    @property
    def failed(self) -> bool:
        """Whether the check was made and does not hold."""
        return self.passed is not None and not self.passed


def failure_text(checks: Iterable[Check]) -> str:
    """Return the failed ones of some checks, a line each with its figure and its limit; empty when none failed."""
    return "\n".join(str(check) for check in checks if check.failed)


def _figure(value: float) -> str:
    return "no number" if value >= NO_NUMBER else f"{value:.3g}"
