"""What was checked of an export, and what was found. Plain data."""

from __future__ import annotations

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

    @property
    def failed(self) -> bool:
        """Whether it was looked at and does not hold."""
        return self.passed is not None and not self.passed
