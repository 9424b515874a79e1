"""What a forecaster is: a name, and a fit of the coefficients of one forecast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TypeAlias

import torch
from torch import Tensor

from qcgraph.passes.caching.forecasters.moments import Moments, gains_of


@dataclass(frozen=True)
class Samples:
    """What one forecast is fitted to.

    Attributes:
        folds: statistics of disjoint samples.
        every: those of all samples.
        taylor: k of the linear extrapolation (see `qcgraph.passes.caching._forecast.taylor_gain`).
        values: how many of the computed values differ; with one there is nothing to extrapolate.
    """

    folds: Sequence[Moments]
    every: Moments
    taylor: float
    values: int

    @property
    def reuse(self) -> list[float]:
        """The coefficients of the regressors that take the last value as it is."""
        return [1.0, *[0.0] * (self._terms - 1)]

    @property
    def extrapolation(self) -> list[float]:
        """The coefficients of the linear extrapolation; those of reuse where there is one value."""
        return [1.0, self.taylor, *[0.0] * (self._terms - 2)] if self._terms > 1 else self.reuse

    @property
    def _terms(self) -> int:
        return self.every.cross.shape[1] - 1

    def fixed(self, coefficients: Sequence[float]) -> Tensor:
        """Return the same coefficients without an offset for every channel, f64[C, terms + 1]."""
        return torch.tensor([*coefficients, 0.0], dtype=torch.float64).expand(len(self.every.power), -1)


Chosen: TypeAlias = tuple[Tensor, float]  # coefficients of the regressors f64[C, terms + 1], and their squared error


@dataclass(frozen=True)
class Forecaster:
    """A way to forecast a cached value from those that were computed last.

    Attributes:
        name: what recipes and passes call it.
        description: what it does, in a few words.
        history: how many of the last computed values it looks back to.
        choose: chooses the coefficients of one forecast, and says what their summed squared error is.
    """

    name: str
    description: str
    history: int
    choose: Callable[[Samples], Chosen]


@dataclass(frozen=True)
class Fit:
    """Coefficients of one forecast.

    Attributes:
        gains: f64[terms + 1, C], the offset last.
        error: its summed squared error on the samples, left out in turn where it was chosen by that.
        reuse_error: that of taking the last value as it is.
    """

    gains: Tensor
    error: float
    reuse_error: float


def fit(forecaster: Forecaster, folds: Sequence[Moments], taylor: float, *, values: int) -> Fit:
    """Fit the coefficients of one forecast.

    Args:
        forecaster: how.
        folds: statistics of disjoint samples.
        taylor: see `Samples`.
        values: see `Samples`.
    """
    samples = Samples(folds, reduce(add, folds), taylor, values)
    coefficients, error = forecaster.choose(samples)
    return Fit(gains_of(coefficients), error, samples.every.error(samples.fixed(samples.reuse)))
