"""Fit the coefficients of sampler updates on running trajectories, in the order of the steps. NumPy only."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import Earlier, StepPlan, Update
from qcgraph.progress import Progress
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.loop import Request, advanced
from qcgraph.sampling.reference import RecordedRun, record
from qcgraph.sampling.runner import Array, Runner

Table = npt.NDArray[np.float64]
# Ridge of a regression relative to the mean square of its terms; the one with the least error on trajectories that were
# left out is taken. Neighbouring predictions are nearly equal, so that small ones matter. Infinity: the plain update.
RIDGES = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, np.inf)
JUDGED = 4  # one trajectory of this many is left out while a ridge is chosen


@dataclass(frozen=True)
class FittedUpdate:
    """An update that was fitted, and how well.

    Attributes:
        update: the update.
        ridge: the relative ridge; infinity where the plain update was kept.
        error: root mean square of the next latents less their targets, on trajectories that the coefficients were not
            fitted to.
        plain_error: the same with the plain update.
    """

    update: Update
    ridge: float
    error: float
    plain_error: float


class FittingUpdater:
    """An updater that fits every update to the target of its step, and goes on from the fitted result.

    The correction of the plain update is a linear combination of the latent, the prediction and earlier predictions,
    found by least squares over all values of all trajectories, with a ridge towards no correction.

    Args:
        plan: the plan, with the plain updates.
        targets: the target of the latent after each step, f32[N,C,H,W].
        history: the number of earlier predictions that an update may use.
        learned: the trajectories that the updates are fitted to, bool[N]; all of them by default. The others follow.
    """

    def __init__(
        self, plan: StepPlan, targets: Sequence[Array], history: int, learned: npt.NDArray[np.bool_] | None = None
    ) -> None:
        self._plan, self._targets, self._history = plan, targets, history
        self._learned = slice(None) if learned is None else learned
        depth = max(history, *(len(step.update.history) for step in plan.steps))
        self._earlier: deque[tuple[Array, Array]] = deque(maxlen=depth)  # the latest first
        self.fitted: list[FittedUpdate] = []

    def update(self, index: int, latent: Array, prediction: Array) -> Array:
        """Return the latent [N,C,H,W] after a step, by the update that is fitted to it."""
        plain, target = self._plan.steps[index].update, self._targets[index]
        residual = target - advanced(plain, latent, prediction, self._earlier)
        terms = [latent, prediction, *(past for _, past in self._earlier)][: 2 + self._history]
        correction, ridge, errors = regressed([term[self._learned] for term in terms], residual[self._learned])
        update = corrected(plain, correction)
        self.fitted.append(FittedUpdate(update, ridge, *errors))
        result = advanced(update, latent, prediction, self._earlier)
        self._earlier.appendleft((latent, prediction))
        return result


def fit_updates(
    runner: Runner,
    plan: StepPlan,
    spec: ModelSpec,
    conditions: Conditions,
    initial: Array,
    targets: Sequence[Array],
    history: int,
    progress: Progress,
    learned: npt.NDArray[np.bool_] | None = None,
) -> tuple[tuple[FittedUpdate, ...], RecordedRun]:
    """Fit the updates of a plan closed loop: every step starts from the latents that the fitted ones before it led to.

    Args:
        runner: runs the variants of the plan.
        plan: the plan, with plain updates that add no noise.
        spec: the specification of the denoiser.
        conditions: the conditions of the N trajectories.
        initial: their initial noise, f32[N,C,H,W].
        targets: the target of the latent after each step, f32[N,C,H,W].
        history: the number of earlier predictions that an update may use.
        progress: reports the steps.
        learned: the trajectories that the updates are fitted to, bool[N]; all of them by default.

    Returns:
        The fitted updates, and the run of all N trajectories with them.
    """
    fitting = FittingUpdater(plan, targets, history, learned)
    run = record(Request(runner, plan, spec), fitting, plan, spec, conditions, initial, progress, "solver")
    return tuple(fitting.fitted), run


def with_updates(plan: StepPlan, updates: Sequence[Update]) -> StepPlan:
    """Return a plan with other updates, one for each step."""
    steps = tuple(replace(step, update=update) for step, update in zip(plan.steps, updates, strict=True))
    return replace(plan, steps=steps)


def judged_rows(count: int, of: int = JUDGED) -> npt.NDArray[np.bool_]:
    """Return which of N trajectories are left out, one of ``of``, while a fit is chosen, bool[N]; one judges itself."""
    return np.arange(count) % of == of - 1 if count >= of else np.arange(count) == count - 1


def regressed(terms: Sequence[Array], residual: Array) -> tuple[Table, float, tuple[float, float]]:
    """Return the coefficients of terms that best explain a residual, with the ridge that generalizes best.

    Args:
        terms: R terms, each f32[N,...].
        residual: what they should add up to, f32[N,...].

    Returns:
        The coefficients f64[R] fitted to all N, the relative ridge, and the root mean square of what is left on the
        trajectories that were left out, with and without the terms.
    """
    apart = judged_rows(len(residual))
    learned, judged = (row_products([*terms, residual], rows) for rows in (~apart, apart))
    everything = learned + judged
    learned, judged = (part if part[-1, -1] > 0 else everything for part in (learned, judged))
    # Of equal errors the largest ridge: what explains nothing leaves the plain update.
    best = min(reversed(RIDGES), key=lambda ridge: _left(judged, _solved(learned, ridge)))
    count = max(1, int(apart.sum())) * residual[0].size
    left, plain = (_left(judged, _solved(learned, ridge)) for ridge in (best, np.inf))
    return _solved(everything, best), best, (float(np.sqrt(left / count)), float(np.sqrt(plain / count)))


def row_products(terms: Sequence[Array], rows: npt.NDArray[np.bool_]) -> Table:
    """Return the inner products of terms [N,...] over some rows, f64[R,R]."""
    flat = np.stack([term[rows].reshape(-1).astype(np.float64) for term in terms])
    products: Table = flat @ flat.T
    return products


def _solved(products: Table, ridge: float) -> Table:
    """Return the coefficients of all but the last term that come closest to the last one."""
    own, cross = products[:-1, :-1], products[:-1, -1]
    scale = float(np.trace(own)) / len(own)
    if not (np.isfinite(ridge) and scale > 0 and cross.any()):
        return np.zeros(len(own))
    return np.asarray(np.linalg.solve(own + ridge * scale * np.eye(len(own)), cross), dtype=np.float64)


def _left(products: Table, coefficients: Table) -> float:
    """Return the squared length of the last term less a combination of the others."""
    full = np.append(-coefficients, 1.0)
    return max(0.0, float(full @ products @ full))


def corrected(plain: Update, correction: Table) -> Update:
    """Return an update with a correction added: of the latent, the prediction, and earlier predictions."""
    latent, prediction, *earlier = (float(value) for value in correction)
    known = [*plain.history, *[Earlier(0.0, 0.0)] * (len(earlier) - len(plain.history))]
    history = [
        Earlier(term.latent, term.noise_prediction + (earlier[place] if place < len(earlier) else 0.0))
        for place, term in enumerate(known)
    ]
    while history and history[-1] == Earlier(0.0, 0.0):
        history.pop()
    return Update(plain.latent + latent, plain.noise_prediction + prediction, plain.noise, tuple(history))
