"""dec: a gain and an offset for every channel, CacheQuant's correction of the cache (arXiv 2503.01323).

The gains are (A, 0, 0, C) with A = Cov / Var and C = mean - A * mean_r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcgraph.passes.caching.forecasters.forecaster import Chosen, Forecaster, Samples
from qcgraph.passes.caching.forecasters.moments import Moments


def _choose(samples: Samples) -> Chosen:
    chosen = _least_squares(samples.every)
    return chosen, samples.every.error(chosen)


def _least_squares(moments: Moments) -> Tensor:
    """Return the gain and offset of least squared error per channel, without shrinking."""
    mean, goal = moments.gram[:, 0, -1] / moments.count, moments.cross[:, -1] / moments.count
    variance = moments.gram[:, 0, 0] / moments.count - mean**2
    covariance = moments.cross[:, 0] / moments.count - mean * goal
    gain = torch.where(variance > 1e-12 * mean**2, covariance / variance.clamp(min=1e-300), torch.ones_like(mean))
    result = torch.zeros_like(moments.cross)
    result[:, 0], result[:, -1] = gain, goal - gain * mean
    return result


DEC = Forecaster("dec", "a gain and an offset of the last value, as CacheQuant corrects it", history=1, choose=_choose)
