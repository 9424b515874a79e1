"""Forecasts of cached values: their coefficients by formula, or fitted from streaming sufficient statistics.

A forecast is an affine of the last computed values of a cached tensor (see passes/caching/insert_forecast). All of
these are cases of it, by the gains on D_r, D_r', D_r'' and the offset:

* reuse:   (1, 0, 0, 0)
* taylor:  (1 + k, -k, 0, 0), k = (u - u_r) / (u_r - u_r') with u the log signal-to-noise ratio (TaylorSeer)
* dec:     (A, 0, 0, C), A = Cov / Var, C = mean - A * mean_r per channel (CacheQuant's correction of the cache)
* affine:  all gains, ridge regression towards the better of reuse and taylor
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from operator import add

import numpy as np
import torch
from torch import Tensor

from qcgraph.plan.schedulers import make_scheduler
from qcgraph.plan.spec import NoiseSchedule

KINDS = ("reuse", "taylor", "dec", "affine")
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 1e3)  # relative to the second moment of each regressor; the last keeps the prior
TOGETHER = 128  # channels that are held in float64 at once
ONE_FOLD_RIDGE = 1e-2  # towards reuse, where there are no other samples to choose by


def log_signal_to_noise(schedule: NoiseSchedule, timesteps: Sequence[float]) -> list[float]:
    """Half the log of abar / (1 - abar) at timestep values: the time in which solvers step (Lu et al., 2022).

    Of a flow, the log of (1 - s) / s. Its ends, at which that is infinite, are taken half a training step inside; so is
    the last timestep of betas that are rescaled to leave no signal there, by half the least signal of the others.
    """
    if schedule.is_flow:
        levels = np.clip(np.asarray(timesteps), 0.5, schedule.train_steps - 0.5) / schedule.train_steps
        return [float(value) for value in np.log((1 - levels) / levels)]
    cumulative = np.asarray(make_scheduler("ddim", schedule).alphas_cumprod, dtype=np.float64)
    cumulative = np.maximum(cumulative, cumulative[cumulative > 0].min() / 2)
    values = np.interp(timesteps, np.arange(len(cumulative)), cumulative)
    return [float(value) for value in 0.5 * np.log(values / (1 - values))]


def taylor_gain(times: Sequence[float], step: int, computed: Sequence[int]) -> float:
    """k of a linear extrapolation to a step from the last two computed ones (last first), 0 when there is only one."""
    if len(computed) < 2:
        return 0.0
    last, before = computed[:2]
    return (times[step] - times[last]) / (times[last] - times[before])


def table_name(value: str) -> str:
    """The constant that holds the coefficients of a cached value, f32[rows, terms + 1, halves, C]."""
    return f"forecast.{value}"


class Moments:
    """Sufficient statistics of the regression of a value on those computed before, per channel, in float64.

    The regressors are the last value, its differences to each one before it, and one: differences keep a normal
    equation of nearly equal values solvable.

    Args:
        terms: how many computed values there are.
        channels: of the value.
    """

    def __init__(self, terms: int, channels: int) -> None:
        self.gram = torch.zeros(channels, terms + 1, terms + 1, dtype=torch.float64)
        self.cross = torch.zeros(channels, terms + 1, dtype=torch.float64)
        self.power = torch.zeros(channels, dtype=torch.float64)
        self.count = 0

    def add(self, values: Sequence[Tensor], target: Tensor) -> None:
        """Count samples in.

        Args:
            values: the computed values, the last one first, each [..., C].
            target: what came of them, [..., C].
        """
        last, *before = (value.double() for value in values)
        columns = [last, *(last - value for value in before), torch.ones_like(last)]
        regressors = torch.stack([column.flatten(0, -2).T for column in columns], dim=1)  # [C, terms + 1, S]
        goal = target.double().flatten(0, -2).T.unsqueeze(2)  # [C, S, 1]
        self.gram += torch.bmm(regressors, regressors.transpose(1, 2))
        self.cross += torch.bmm(regressors, goal).squeeze(2)
        self.power += goal.square().sum(dim=(1, 2))
        self.count += goal.shape[1]

    def __add__(self, other: Moments) -> Moments:
        result = Moments(self.gram.shape[1] - 1, len(self.power))
        result.gram, result.cross = self.gram + other.gram, self.cross + other.cross
        result.power, result.count = self.power + other.power, self.count + other.count
        return result

    def ridge(self, prior: Sequence[float], strength: float, *, offset: bool) -> Tensor:
        """Coefficients of the regressors nearest to the samples and to a prior, f64[C, terms + 1].

        ``(G + strength * diag(G)) (c - prior) = b - G prior``, per channel.
        """
        used = torch.arange(len(prior) + offset)
        towards = torch.zeros(self.cross.shape[1], dtype=torch.float64)
        towards[: len(prior)] = torch.tensor(prior, dtype=torch.float64)
        gram = self.gram[:, used][:, :, used]
        diagonal = torch.diagonal(gram, dim1=1, dim2=2)
        tiny = torch.finfo(torch.float64).tiny + 1e-12 * diagonal.amax(dim=1, keepdim=True)
        residual = (self.cross - self.gram @ towards)[:, used]
        solved = torch.linalg.solve(gram + torch.diag_embed(strength * diagonal + tiny), residual)
        result = towards.expand(len(self.cross), -1).clone()
        result[:, used] += solved
        return result

    def error(self, coefficients: Tensor) -> float:
        """The summed squared error of coefficients of the regressors [C, terms + 1] on these samples."""
        fitted = (coefficients * (self.gram @ coefficients.unsqueeze(2)).squeeze(2)).sum()
        return max(0.0, float(self.power.sum() - 2 * (coefficients * self.cross).sum() + fitted))


class Products:
    """Inner products of the values of one tensor at some steps, per channel: every regression among them follows.

    They are in float64, from which differences of nearly equal values come out right.

    Args:
        values: per step, each [..., C].
    """

    def __init__(self, values: Sequence[Tensor]) -> None:
        flat = [value.flatten(0, -2) for value in values]  # [S, C]
        self._count = len(flat[0])
        products, sums = [], []
        for start in range(0, flat[0].shape[1], TOGETHER):
            part = torch.stack([value[:, start : start + TOGETHER].T for value in flat], dim=1).double()  # [C', T, S]
            products.append(torch.bmm(part, part.transpose(1, 2)))
            sums.append(part.sum(dim=2))
        self._products, self._sums = torch.cat(products), torch.cat(sums)

    def moments(self, computed: Sequence[int], step: int) -> Moments:
        """The statistics of one value on those at computed steps, the last one first; by their place in ``values``."""
        result = Moments(len(computed), len(self._sums))
        # The regressors as combinations of the values: the last one, and its differences to those before it.
        mixing = torch.eye(len(computed), dtype=torch.float64).neg()
        mixing[:, 0] = 1.0
        chosen = self._products[:, list(computed)]  # [C, terms, T]
        result.gram[:, :-1, :-1] = mixing @ chosen[:, :, list(computed)] @ mixing.T
        result.gram[:, :-1, -1] = result.gram[:, -1, :-1] = self._sums[:, list(computed)] @ mixing.T
        result.gram[:, -1, -1] = result.count = self._count
        result.cross[:, :-1] = chosen[:, :, step] @ mixing.T
        result.cross[:, -1] = self._sums[:, step]
        result.power[:] = self._products[:, step, step]
        return result


def gains_of(coefficients: Tensor) -> Tensor:
    """From coefficients of the regressors [C, terms + 1] to those of the values and the offset, [terms + 1, C]."""
    last, *differences, offset = coefficients.unbind(dim=1)
    gains = [last + sum(differences, torch.zeros_like(last)), *(-value for value in differences), offset]
    return torch.stack(gains)


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


def fit(kind: str, folds: Sequence[Moments], taylor: float, *, values: int) -> Fit:
    """The coefficients of a kind of forecast.

    An affine forecast is shrunk towards reuse or towards taylor, by the strength that predicts left-out samples best;
    with one fold there are none, and it is shrunk a little towards reuse.

    Args:
        kind: one of `KINDS`.
        folds: statistics of disjoint samples.
        taylor: k of the extrapolation (see `taylor_gain`).
        values: how many of the computed values differ; with one there is nothing to extrapolate.
    """
    every = reduce(add, folds)
    terms = every.cross.shape[1] - 1
    priors = _priors(terms, taylor)
    reuse = _fixed(every, priors[0])
    if kind in ("reuse", "taylor"):
        chosen = reuse if kind == "reuse" else _fixed(every, priors[-1])
        return Fit(gains_of(chosen), every.error(chosen), every.error(reuse))
    if kind == "dec":
        chosen = _least_squares(every)
        return Fit(gains_of(chosen), every.error(chosen), every.error(reuse))
    if len(folds) == 1:
        chosen = every.ridge(priors[0], ONE_FOLD_RIDGE, offset=False)
        return Fit(gains_of(chosen), every.error(chosen), every.error(reuse))
    candidates = list(product(priors if values > 1 else priors[:1], RIDGES))
    errors = [_left_out(folds, prior, ridge) for prior, ridge in candidates]
    best = int(np.argmin(errors))
    prior, ridge = candidates[best]
    return Fit(gains_of(every.ridge(prior, ridge, offset=False)), errors[best], every.error(reuse))


def _priors(terms: int, taylor: float) -> list[list[float]]:
    """Reuse and, where there are two values, the linear extrapolation, as coefficients of the regressors."""
    reuse = [1.0, *[0.0] * (terms - 1)]
    return [reuse, [1.0, taylor, *[0.0] * (terms - 2)]] if terms > 1 else [reuse]


def _fixed(moments: Moments, prior: Sequence[float]) -> Tensor:
    return torch.tensor([*prior, 0.0], dtype=torch.float64).expand(len(moments.power), -1)


def _least_squares(moments: Moments) -> Tensor:
    """CacheQuant's correction: gain and offset per channel, without shrinking."""
    mean, goal = moments.gram[:, 0, -1] / moments.count, moments.cross[:, -1] / moments.count
    variance = moments.gram[:, 0, 0] / moments.count - mean**2
    covariance = moments.cross[:, 0] / moments.count - mean * goal
    gain = torch.where(variance > 1e-12 * mean**2, covariance / variance.clamp(min=1e-300), torch.ones_like(mean))
    result = torch.zeros_like(moments.cross)
    result[:, 0], result[:, -1] = gain, goal - gain * mean
    return result


def _left_out(folds: Sequence[Moments], prior: Sequence[float], ridge: float) -> float:
    """The error on each fold of what was fitted on the others, summed."""
    total = 0.0
    for index, fold in enumerate(folds):
        rest = reduce(add, [other for place, other in enumerate(folds) if place != index])
        total += fold.error(rest.ridge(prior, ridge, offset=False))
    return total
