"""What forecasts of cached values are made of: their time, their tables, and statistics of every regression.

How they are fitted is in `qcgraph.passes.caching.forecasters`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qcgraph.passes.caching.forecasters import Moments
from qcgraph.plan.schedulers import make_scheduler
from qcgraph.plan.spec import NoiseSchedule

TOGETHER = 128  # channels that are held in float64 at once


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
