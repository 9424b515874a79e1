"""taylor: linear extrapolation in the log signal-to-noise ratio (TaylorSeer, arXiv 2503.06923).

The gains are (1 + k, -k, 0, 0) with k = (u - u_r) / (u_r - u_r') and u the log signal-to-noise ratio.
"""

from __future__ import annotations

from qcgraph.passes.caching.forecasters.forecaster import Chosen, Forecaster, Samples


def _choose(samples: Samples) -> Chosen:
    chosen = samples.fixed(samples.extrapolation)
    return chosen, samples.every.error(chosen)


TAYLOR = Forecaster("taylor", "the line through the last two computed values", history=2, choose=_choose)
