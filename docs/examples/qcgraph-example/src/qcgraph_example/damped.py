"""damped: half of the linear extrapolation."""

from __future__ import annotations

from qcgraph.passes.caching.forecasters import Chosen, Forecaster, Samples


def _choose(samples: Samples) -> Chosen:
    pairs = zip(samples.reuse, samples.extrapolation, strict=True)
    chosen = samples.fixed([(reuse + line) / 2 for reuse, line in pairs])
    return chosen, samples.every.error(chosen)


DAMPED = Forecaster("damped", "half of the line through the last two computed values", history=2, choose=_choose)
