"""plan-steps: decide which steps compute and which reuse, by their cost and by their effect on the images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from qcgraph.errors import UsageError
from qcgraph.facts import CachePlan, Compensation, ForecastFit, QuantizedSites, SchedulePlan
from qcgraph.ir.program import Program
from qcgraph.ir.structure import macs_by_variant
from qcgraph.passes.caching._reuse_errors import OpenLoop, Rehearsal, reuse_errors
from qcgraph.passes.caching._trajectories import Trajectories, record, weights
from qcgraph.passes.caching.forecasters import forecaster_named, known_forecasters
from qcgraph.pipeline import Pass, PassContext
from qcgraph.pipeline.calibration_budget import RECORD_MACS, affordable_trajectories, trajectory_macs
from qcgraph.pipeline.options import AUTO_HINT, MOST_SEED, MOST_TRAJECTORIES, option
from qcgraph.pipeline.workload import Workload
from qcgraph.plan.schedule import Mode, climb, dps, expected_error, least_share, plan
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan

WEIGHT_SAMPLES = 8
COST_STEPS = 200  # steps in which ratios of costs are rounded, half a percent each
FEWEST_WEIGHTS = 4  # least number of steps whose weight is measured; weights of other steps are interpolated
PLACES = 60  # pairs of computing steps that a skipped step is measured from, about


@dataclass(frozen=True)
class PlanSteps(Pass):
    """Find the cache schedule that changes the images least, by dynamic programming over measured errors.

    ``joint``: the error of skipping a step, in every mode and from every pair of last computing steps, is measured on
    recorded trajectories of the program as it is (quantized or not) by running the variant itself, against full
    precision where the captured model is known, less the error of computing the step, and weighted by the effect of an
    error at that step on the final latent. The schedule of least summed error within the budget can then be improved by
    exchanging steps, judged by the true error of the final latents. ``dps`` is CacheQuant's schedule: L1 distance of
    cached values, one mode, bounded windows, an interval and no budget.

    Attributes:
        strategy: ``joint`` or ``dps``.
        budget: the cost of sampling relative to computing every step, for ``joint``.
        interval: the steps per computing step, for ``dps``.
        forecast: the forecaster of the cached values.
        measured: take the measured latency of variants as their cost, where it can be measured, else
            multiply-accumulates. A budget that no schedule meets by the measured costs is raised to the least one.
        weighting: weight an error at a step by the ``solver``'s coefficient of the prediction there, or by its
            ``measured`` effect on the final latent, which takes longer.
        gap: the most steps from a computing step to the next one, and to a step that reuses it.
        rounds: the cache schedules to try by climbing. On few trajectories, climbing overfits to them; off by default.
        trajectories: how many to measure on; by default as many as a fixed amount of arithmetic allows, 2 to 16.
        seed: the seed of the trajectories.
    """

    name: ClassVar[str] = "plan-steps"
    requires: ClassVar[tuple[type, ...]] = (CachePlan, ModelSpec, StepPlan)
    precedes: ClassVar[tuple[type, ...]] = (ForecastFit, Compensation)
    provides: ClassVar[tuple[type, ...]] = (SchedulePlan,)
    samples: ClassVar[bool] = True

    strategy: Literal["joint", "dps"] = "joint"
    budget: float = option(0.3, above=0, most=1, hint="0.3 is 30 % of what computing every step costs")
    interval: int = option(3, least=1, hint="1 computes every step, 3 every third")
    forecast: str = option("affine", among=known_forecasters)
    measured: bool = False
    weighting: Literal["solver", "measured"] = "solver"
    gap: int = option(12, least=1)
    rounds: int = 0
    trajectories: int | None = option(None, least=1, most=MOST_TRAJECTORIES, hint=AUTO_HINT)
    seed: int = option(0, most=MOST_SEED)

    def forwards(self, work: Workload) -> float:
        count = self.trajectories or affordable_trajectories(work.program)
        probes = sum(work.run(mode) for mode in work.program.facts[CachePlan].modes) * PLACES
        exact = int(QuantizedSites in work.program.facts)  # predictions of full precision, beside those of the program
        return count * work.trajectory * (1 + (exact + probes if self.strategy == "joint" else 0))

    def run(self, program: Program, context: PassContext) -> Program:
        modes = program.facts[CachePlan].modes
        if not modes or not set(modes) <= set(program.variants):
            context.refuse("step plan", "no variant reuses, so every step computes")
            return program.with_facts(SchedulePlan(self.strategy, "", 1.0, None, None))
        measuring = context.costs if self.measured else None
        arithmetic = {name: float(macs) for name, macs in macs_by_variant(program.variants).items()}
        costs = measuring.measure(program) if measuring else arithmetic
        relative = {name: rounded(cost / costs[program.computing]) for name, cost in costs.items()}
        count = self.trajectories or affordable_trajectories(program)
        is_judged = self.strategy == "joint" and QuantizedSites in program.facts
        origin = context.origin if is_judged else None
        trajectories = record(program, count, self.seed, context.progress, origin)
        expected: float | None = None
        rehearsed: float | None = None
        if self.strategy == "dps":
            schedule = self._dps(program, trajectories)
        else:
            schedule, expected, rehearsed = self._joint(program, trajectories, relative, context)
        steps = program.facts[StepPlan].with_modes(schedule)
        spent = sum(relative[step.variant] for step in steps.steps) / len(steps)
        measured_on = measuring.runtime if measuring else ""
        fact = SchedulePlan(self.strategy, measured_on, spent, expected, rehearsed)
        return program.with_facts(steps, fact)

    def _dps(self, program: Program, trajectories: Trajectories) -> tuple[str | None, ...]:
        mode = next(iter(program.facts[CachePlan].modes))
        return tuple(None if computes else mode for computes in dps(differences(trajectories), self.interval))

    def _joint(
        self, program: Program, trajectories: Trajectories, relative: Mapping[str, float], context: PassContext
    ) -> tuple[tuple[str | None, ...], float, float]:
        steps, progress = len(program.facts[StepPlan]), context.progress
        modes = [Mode(name, relative[name]) for name in program.facts[CachePlan].modes if relative[name] < 1]
        if not modes:
            raise UsageError("no variant that reuses is faster than computing", hint="compile with --cache off")
        forecaster = OpenLoop(program, trajectories, forecaster_named(self.forecast))
        weight = weights(program, trajectories, *self._weighing(program, trajectories), progress)
        names, gap = [mode.name for mode in modes], min(self.gap, steps - 1)
        errors = reuse_errors(program, trajectories, forecaster, weight, names, gap, progress)
        budget, least = self.budget, least_share(errors, modes, steps)
        if self.measured and context.costs and budget < least:
            # Milliseconds differ from machine to machine, and from one minute to the next: what is near will do.
            context.refuse("step plan", f"by the measured costs no schedule meets the budget {budget:g}; it is {least}")
            budget = least
        found = plan(errors, modes, steps, budget * steps)
        rehearsal = Rehearsal(program, trajectories, forecaster)
        ticks = iter(progress.track(range(self.rounds + 1), "schedules"))

        def evaluate(schedule: tuple[str | None, ...]) -> float:
            next(ticks, None)
            known = math.isfinite(expected_error(schedule, errors, modes))  # false where a gap is too long
            return rehearsal.final_error(schedule) if known else math.inf

        schedule, true_error = climb(found.modes, evaluate, rounds=self.rounds + 1, seed=self.seed)
        return schedule, expected_error(schedule, errors, modes), true_error

    def _weighing(self, program: Program, trajectories: Trajectories) -> tuple[int, int]:
        """Return the number of steps and the number of trajectories on which weights are measured."""
        samples, steps = min(WEIGHT_SAMPLES, len(trajectories.conditions)), len(program.facts[StepPlan])
        affordable = int(2 * RECORD_MACS / (trajectory_macs(program) * samples))
        return (max(FEWEST_WEIGHTS, min(affordable, steps)) if self.weighting == "measured" else 0), samples


def differences(trajectories: Trajectories) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return CacheQuant's distance of steps, f64[T,T]: the sum over cached values of |F_t - F_i|_1."""
    steps = len(trajectories.predictions)
    result = np.zeros((steps, steps))
    for values in trajectories.values.values():
        for first in range(steps):
            for second in range(first + 1, steps):
                result[first, second] += float((values[second] - values[first]).abs().sum())
    return result


def rounded(ratio: float) -> float:
    """Return a ratio of costs rounded up, so that the noise of a measurement does not change the plan."""
    return math.ceil(ratio * COST_STEPS) / COST_STEPS
