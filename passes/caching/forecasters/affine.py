"""affine: all gains by ridge regression, shrunk towards the better of reuse and taylor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import product
from operator import add

import numpy as np

from qcgraph.passes.caching.forecasters.forecaster import Chosen, Forecaster, Samples
from qcgraph.passes.caching.forecasters.moments import Moments

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 1e3)  # relative to the second moment of each regressor; 1e3 keeps the prior
ONE_FOLD_RIDGE = 1e-2  # strength towards reuse where no other samples exist to choose a strength on


def _choose(samples: Samples) -> Chosen:
    """Choose the prior and the strength that predict left-out samples best; with one fold, shrink a little to reuse."""
    every = samples.every
    if len(samples.folds) == 1:
        chosen = every.ridge(samples.reuse, ONE_FOLD_RIDGE, offset=False)
        return chosen, every.error(chosen)
    priors = [samples.reuse, samples.extrapolation] if samples.values > 1 else [samples.reuse]
    candidates = list(product(priors, RIDGES))
    errors = [_left_out(samples.folds, prior, ridge) for prior, ridge in candidates]
    best = int(np.argmin(errors))
    prior, ridge = candidates[best]
    return every.ridge(prior, ridge, offset=False), errors[best]


def _left_out(folds: Sequence[Moments], prior: Sequence[float], ridge: float) -> float:
    """Return the summed error on each fold of the coefficients that are fitted on the other folds."""
    total = 0.0
    for index, fold in enumerate(folds):
        rest = reduce(add, [other for place, other in enumerate(folds) if place != index])
        total += fold.error(rest.ridge(prior, ridge, offset=False))
    return total


AFFINE = Forecaster("affine", "the last three computed values, fitted per channel and step", history=3, choose=_choose)
