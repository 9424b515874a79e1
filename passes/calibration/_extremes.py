"""The range of values that calibration has not seen, from the ranges of those that it has."""

from __future__ import annotations

import math

import torch

ROWS = 1024  # rows whose largest value a range has to cover: 512 latents with both halves of guidance


class Extremes:
    """The largest values of the rows that were added, and the largest that is expected of more rows.

    The largest values of rows are about Gumbel distributed, with the scale b = sqrt(6) / pi times their standard
    deviation. The largest of M of them then exceeds the largest of N by b ln(M / N) on average.
    """

    def __init__(self) -> None:
        self._largest = self._sum = self._squares = torch.empty(0)
        self._count = 0

    def add(self, values: torch.Tensor) -> None:
        """Add the largest values of rows, f32[R] or f32[R,C]; a NaN among them stays visible as a NaN."""
        largest, exact = values.amax(dim=0), values.double()
        total, squares = exact.sum(dim=0), (exact**2).sum(dim=0)
        first = not self._count
        self._largest = largest if first else torch.maximum(self._largest, largest)
        self._sum = total if first else self._sum + total
        self._squares = squares if first else self._squares + squares
        self._count += len(values)

    @property
    def largest(self) -> torch.Tensor:
        """The largest value that was added, [] or [C]."""
        return self._largest

    @property
    def expected(self) -> torch.Tensor:
        """The largest value that is expected of `ROWS` rows, [] or [C]; at least the largest that was added."""
        variance = (self._squares / self._count - (self._sum / self._count) ** 2).clamp(min=0)
        growth = math.sqrt(6) / math.pi * math.log(max(1, ROWS / self._count))
        return (self._largest + growth * variance.sqrt()).float()
