"""Parts of forecasts: their time, the names of their tables, and statistics of every regression.

`qcgraph.passes.caching.forecasters` fits them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qcgraph.passes.caching.forecasters import Moments
from qcgraph.plan.schedulers import make_scheduler
from qcgraph.plan.spec import NoiseSchedule

TOGETHER = 128  # channels whose products are computed in float64 at once


def log_signal_to_noise(schedule: NoiseSchedule, timesteps: Sequence[float]) -> list[float]:
    """Return half the log of abar / (1 - abar) at timestep values: the time in which solvers step (Lu et al., 2022).

    For a flow, it is the log of (1 - s) / s. At the ends of the schedule the log is infinite; it is taken half a
    training step inside them. Betas that are rescaled to leave no signal at the last timestep have half their least
    nonzero signal there.
    """
    if schedule.is_flow:
        levels = np.clip(np.asarray(timesteps), 0.5, schedule.train_steps - 0.5) / schedule.train_steps
        return [float(value) for value in np.log((1 - levels) / levels)]
    cumulative = np.asarray(make_scheduler("ddim", schedule).alphas_cumprod, dtype=np.float64)
    cumulative = np.maximum(cumulative, cumulative[cumulative > 0].min() / 2)
    values = np.interp(timesteps, np.arange(len(cumulative)), cumulative)
    return [float(value) for value in 0.5 * np.log(values / (1 - values))]


def taylor_gain(times: Sequence[float], step: int, computed: Sequence[int]) -> float:
    """Return k of a linear extrapolation to a step from two computing steps, the last one first; 0 for a single one."""
    if len(computed) < 2:
        return 0.0
    last, before = computed[:2]
    return (times[step] - times[last]) / (times[last] - times[before])


def table_name(value: str) -> str:
    """Return the name of the constant with the coefficients of a cached value, f32[rows, terms + 1, halves, C]."""
    return f"forecast.{value}"


class Products:
    """Inner products of the values of one tensor at some steps, per channel; every regression among them follows.

    They are in float64, which keeps the differences of nearly equal values exact enough.

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
        """Return the statistics of the value at a step, regressed on its values at computing steps.

        Args:
            computed: the computing steps, the last one first, as indices into ``values``.
            step: the forecast step, as an index into ``values``.
        """
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
