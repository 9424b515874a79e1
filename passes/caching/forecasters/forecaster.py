"""A forecaster: a name, and a function that chooses the coefficients of one forecast."""

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
    """The samples that one forecast is fitted to.

    Attributes:
        folds: the statistics of disjoint samples.
        every: the statistics of all samples.
        taylor: k of the linear extrapolation (see `qcgraph.passes.caching._forecast.taylor_gain`).
        values: the number of different computed values; an extrapolation needs two.
    """

    folds: Sequence[Moments]
    every: Moments
    taylor: float
    values: int

    @property
    def reuse(self) -> list[float]:
        """The coefficients of the regressors that keep the last value unchanged."""
        return [1.0, *[0.0] * (self._terms - 1)]

    @property
    def extrapolation(self) -> list[float]:
        """The coefficients of the linear extrapolation, or of reuse where there is one value."""
        return [1.0, self.taylor, *[0.0] * (self._terms - 2)] if self._terms > 1 else self.reuse

    @property
    def _terms(self) -> int:
        return self.every.cross.shape[1] - 1

    def fixed(self, coefficients: Sequence[float]) -> Tensor:
        """Return the given coefficients without an offset for every channel, f64[C, terms + 1]."""
        return torch.tensor([*coefficients, 0.0], dtype=torch.float64).expand(len(self.every.power), -1)


Chosen: TypeAlias = tuple[Tensor, float]  # coefficients of the regressors f64[C, terms + 1], and their squared error


@dataclass(frozen=True)
class Forecaster:
    """A way to forecast a cached value from its last computed values.

    Attributes:
        name: the name in recipes and passes.
        description: what the forecaster does, in a few words.
        history: the number of last computed values that the forecast uses.
        choose: the function that chooses the coefficients of one forecast and returns their summed squared error.
    """

    name: str
    description: str
    history: int
    choose: Callable[[Samples], Chosen]


@dataclass(frozen=True)
class Fit:
    """Coefficients of one forecast.

    Attributes:
        gains: the gains of the values and last the offset, f64[terms + 1, C].
        error: the summed squared error on the samples; on left-out samples where these chose the coefficients.
        reuse_error: the summed squared error of plain reuse.
    """

    gains: Tensor
    error: float
    reuse_error: float


def fit(forecaster: Forecaster, folds: Sequence[Moments], taylor: float, *, values: int) -> Fit:
    """Fit the coefficients of one forecast.

    Args:
        forecaster: the forecaster that chooses the coefficients.
        folds: the statistics of disjoint samples.
        taylor: see `Samples`.
        values: see `Samples`.
    """
    samples = Samples(folds, reduce(add, folds), taylor, values)
    coefficients, error = forecaster.choose(samples)
    return Fit(gains_of(coefficients), error, samples.every.error(samples.fixed(samples.reuse)))
