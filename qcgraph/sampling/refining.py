"""Refine all coefficients of a solver together, by their measured effect on its final latents. NumPy only.

A fit in the order of the steps aims at the target of every step, and so spends coefficients on errors that the steps
after it would undo, and leaves some that they amplify. Here all coefficients aim at the final latents alone, by steps
of Gauss and Newton with Levenberg's damping. The effect of a coefficient on the final latents is measured: the latent
after its step is moved, and the run goes on from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.conditions import Conditions, joined
from qcgraph.sampling.fitting import Table, corrected, row_products, with_updates
from qcgraph.sampling.loop import Resumed, Updates, guided, trajectory
from qcgraph.sampling.reference import RecordedRun, walk
from qcgraph.sampling.runner import Array, Runner

MOVE = 0.004  # root mean square by which a latent is moved; latents of unit variance are rounded to 1e-7
DEPENDENT = 1e-10  # mean square of a combination of terms, relative to the largest, below which it is none
# Dampings that are tried, as squares of the final change for each 1 of change of the latent after a step.
DAMPINGS = (1.0, 0.1, 0.01)
BATCH = 32  # latents that run together


@dataclass(frozen=True)
class Refined:
    """A plan whose updates were refined, its run, and the mean squared errors of the final latents.

    Attributes:
        plan: the plan.
        run: its run.
        error: the mean squared error of the final latents.
        before: the same with the updates as they were.
    """

    plan: StepPlan
    run: RecordedRun
    error: float
    before: float


def effects(steps: int, history: int) -> int:
    """Return how many forward passes of a trajectory one measurement of all effects takes."""
    return sum(min(2 + index, 2 + history) * (steps - 1 - index) for index in range(steps))


def refine(
    runner: Runner,
    plan: StepPlan,
    spec: ModelSpec,
    conditions: Conditions,
    run: RecordedRun,
    goal: Array,
    history: int,
    measured: int,
    progress: Progress,
) -> Refined:
    """Refine the updates of a plan by the effects that are measured on some of its trajectories.

    With J the effect of all coefficients on the final latents and r what these lack, the coefficients change by
    ``(J' J + damping)^-1 J' r`` (Levenberg, 1944). Dampings are tried from strong to weak while the error on
    all trajectories falls, and the one with the least is taken, if it is less than before.

    Args:
        runner: runs the variants of the plan; those that reuse take values of the last computing step alone.
        plan: the plan, whose updates add no noise.
        spec: the specification of the denoiser.
        conditions: the conditions of the N trajectories.
        run: their run with the plan as it is.
        goal: the target of the final latents, f32[N,C,H,W].
        history: the number of earlier predictions that an update may use.
        measured: the number of trajectories that effects are measured on.
        progress: reports the steps.
    """
    initial = run.latents[0]
    rows = np.arange(min(measured, len(initial)))
    before = _error(run, goal)
    best = Refined(plan, run, before, before)
    if not before:
        return best
    own = RecordedRun(*(tuple(array[rows] for array in arrays) for arrays in (run.latents, run.predictions)))
    measuring = _Effects(runner, plan, spec, conditions[rows], own, history)
    columns, places = [], []
    for index in progress.track(range(len(plan)), "effects of coefficients"):
        for place, column in measuring.columns(index):
            places.append((index, place))
            columns.append(column.reshape(-1))
    effect = np.stack(columns).astype(np.float64)
    lacking = (goal[rows] - run.latents[-1][rows]).reshape(-1)
    own_products, cross = effect @ effect.T / lacking.size, effect @ lacking / lacking.size
    last = np.inf
    for damping in DAMPINGS:
        change: Table = np.linalg.solve(own_products + damping * np.eye(len(cross)), cross).astype(np.float64)
        moved = _changed(plan, places, change, history)
        run = walk(runner, moved, spec, conditions, initial, progress)
        error = _error(run, goal)
        if error < best.error:
            best = Refined(moved, run, error, before)
        if error > last:
            break
        last = error
    return best


class _Effects:
    """Measures the effect of every coefficient of a plan on the final latents of a run."""

    def __init__(
        self, runner: Runner, plan: StepPlan, spec: ModelSpec, conditions: Conditions, run: RecordedRun, history: int
    ) -> None:
        self._plan, self._spec, self._conditions, self._run = plan, spec, conditions, run
        self._runner, self._history = runner, history

    def columns(self, index: int) -> Iterator[tuple[Table, Array]]:
        """Yield combinations of the terms of a step with a root mean square of 1, and their effects.

        Yields:
            The coefficients of the terms, f64[R], and the change of the final latents for each 1 of them, f32[N,C,H,W].
        """
        run = self._run
        terms = [run.latents[index], *run.predictions[index::-1]][: 2 + self._history]
        products = row_products(terms, np.ones(len(terms[0]), dtype=bool)) / terms[0].size
        sizes, vectors = np.linalg.eigh(products)
        chosen = [
            vectors[:, place] / np.sqrt(size) for place, size in enumerate(sizes) if size > DEPENDENT * sizes.max()
        ]
        stacked = np.stack(terms)
        moves = [np.tensordot(combination, stacked, axes=1).astype(np.float32) for combination in chosen]
        yield from zip(chosen, self._effects(index, moves), strict=True)

    def _effects(self, index: int, moves: Sequence[Array]) -> Iterator[Array]:
        """Yield the change of the final latents for each 1 of a change of the latent after a step."""
        together = max(1, BATCH // len(moves[0]))
        for start in range(0, len(moves), together):
            part = moves[start : start + together]
            after = np.concatenate([self._run.latents[index + 1] + np.float32(MOVE) * move for move in part])
            ends = np.split(self._continued(index, after, len(part)), len(part))
            yield from ((end - self._run.latents[-1]) / np.float32(MOVE) for end in ends)

    def _continued(self, index: int, latent: Array, copies: int) -> Array:
        """Return the final latents after other latents than the recorded ones after a step."""
        run, updates, resumed = self._run, Updates(self._plan), Resumed(self._runner, self._plan, self._spec)
        conditions = joined([self._conditions] * copies)
        for before in range(index + 1):  # for the history of the updates
            given, made = (np.concatenate([known[before]] * copies) for known in (run.latents, run.predictions))
            updates.update(before, given, made)
        if self._plan.reusing:  # for the cached values
            last = max(step for step in range(index + 1) if self._plan.computes(step))
            guided(resumed, last, np.concatenate([run.latents[last]] * copies), conditions, self._plan, self._spec)
        for taken in trajectory(resumed, updates, self._plan, self._spec, conditions, latent, start=index + 1):
            latent = taken.after
        return latent


def _error(run: RecordedRun, goal: Array) -> float:
    error = float(np.square(run.latents[-1] - goal, dtype=np.float64).mean())
    return error if np.isfinite(error) else float("inf")


def _changed(plan: StepPlan, places: Sequence[tuple[int, Table]], change: Table, history: int) -> StepPlan:
    """Return a plan with changed coefficients."""
    sums = [np.zeros(min(2 + index, 2 + history)) for index in range(len(plan))]
    for (index, combination), amount in zip(places, change, strict=True):
        sums[index] += amount * combination
    return with_updates(plan, [corrected(step.update, sums[index]) for index, step in enumerate(plan.steps)])
