"""plan-solver: choose the few steps of a solver whose coefficients are fitted, and what each of them computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from qcgraph.errors import UsageError
from qcgraph.facts import (
    CachePlan,
    Compensation,
    EqualizationPlan,
    Precision,
    QuantPlan,
    Ranges,
    SolverPlan,
    SolverTargets,
)
from qcgraph.ir.program import Program
from qcgraph.ir.structure import macs_by_variant
from qcgraph.passes.solver._landscape import landscape, record_target
from qcgraph.pipeline import Pass, PassContext, Pipeline
from qcgraph.pipeline.calibration_budget import target_trajectories
from qcgraph.pipeline.options import AUTO_HINT, MOST_SEED, MOST_TRAJECTORIES, option
from qcgraph.pipeline.workload import Workload
from qcgraph.plan.levels import CLEAN, first_order, levels
from qcgraph.plan.placement import MIXED, Placement, Steps, place
from qcgraph.plan.schedule import CONDITIONAL
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import Fingerprint, Step, StepPlan, Update
from qcgraph.progress import Progress
from qcgraph.sampling.calibration import calibration_conditions, calibration_noise, encode_latents
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.fitting import fit_updates, judged_rows, with_updates
from qcgraph.sampling.reference import COARSE_STEPS, FINE_STEPS, RecordedRun
from qcgraph.sampling.refining import DAMPINGS, effects, refine
from qcgraph.sampling.runner import Array, Runner

SHARE = 0.26  # default number of computing steps, relative to those of the run: 13 of 50
EFFECTS = 0.5  # arithmetic of measuring the effects of coefficients, relative to that of recording the target
WORST_SHARE = 0.1  # share of the trajectories that are the worst ones, which count for as much as all
CACHED = "plan-cache{interval=2 blocks=guidance},insert-cache"
# Trajectories on which effects are measured at least; with fewer, the coefficients are not refined. On cifar10, 8 and 5
# steps gain 2.1 and 1.7 dB by 8 and 15 trajectories; 13 steps gain nothing by 3.
FEWEST_MEASURED = 5


@dataclass(frozen=True)
class PlanSolver(Pass):
    """Choose the timesteps of a fitted solver and what each of them computes, and fit its updates in full precision.

    A linear multistep update ``x' = a * x + b_0 * eps_0 + b_1 * eps_1 + ..`` on chosen timesteps has a few scalars a
    step, and costs nothing when it runs. The steps are those whose final latents come closest to a target run: the best
    ones by dynamic programming over the residuals of jumps, and by climbing on a model of the trajectories (see
    `qcgraph.plan.placement`), are fitted closed loop to half of the trajectories, and judged on the others, by the mean
    of their errors and by the worst tenth. The updates of the best set are then fitted to all trajectories. At last,
    all coefficients are refined together (see `qcgraph.sampling.refining`), where that is affordable.

    Where steps may reuse the difference of the halves of guidance, they compute the conditional half alone, for about
    half of the work. More steps then have the work of ``steps``. They take part in the contest, on a cached program of
    their own; what each step of the best set computes is left to plan-cache.

    Attributes:
        steps: the work, in steps that compute everything, or all of the run if it has no more; by default 26 % of them.
        reuse: ``off``: every step computes everything; ``guidance``: some may compute the conditional half alone.
        measured: take the measured latency of variants as their cost, where it can be measured, else
            multiply-accumulates.
        target: ``converged``: the trajectory that solvers converge to with many steps; ``run``: the run of the
            scheduler as it is.
        history: how many earlier predictions an update may use.
        trajectories: how many to record; by default as many as a fixed amount of arithmetic allows, 2 to 64.
        seed: the seed of the trajectories.
    """

    name: ClassVar[str] = "plan-solver"
    requires: ClassVar[tuple[type, ...]] = (ModelSpec, StepPlan)
    precedes: ClassVar[tuple[type, ...]] = (
        SolverPlan,
        EqualizationPlan,
        CachePlan,
        Ranges,
        QuantPlan,
        Compensation,
        Precision,
    )
    provides: ClassVar[tuple[type, ...]] = (SolverPlan, SolverTargets)
    samples: ClassVar[bool] = True

    steps: int | None = option(None, least=1, hint="13 of 50 steps are about as good as 50")
    reuse: Literal["off", "guidance"] = "off"
    measured: bool = False
    target: Literal["converged", "run"] = "converged"
    history: int = option(3, least=0, most=3, hint="3 earlier predictions are enough")
    trajectories: int | None = option(None, least=1, most=MOST_TRAJECTORIES, hint=AUTO_HINT)
    seed: int = option(0, most=MOST_SEED)

    def forwards(self, work: Workload) -> float:
        plan = work.program.facts[StepPlan]
        count, steps = self._trajectories(work.program), self._count(plan)
        measured = self._effects_on(plan, steps, count)
        tried = 2 + (MIXED if self._may_reuse(plan) else 0)
        passes = self._recorded(plan) + (tried + 1 + (len(DAMPINGS) if measured else 0)) * steps
        return plan.halves * (count * passes + measured * effects(steps, self.history))

    def foreseen(self, program: Program) -> Program:
        """Return the program with as many steps, evenly spaced and with plain updates."""
        plan = program.facts[StepPlan]
        steps = np.linspace(0, len(plan) - 1, self._count(plan)).round().astype(int).tolist()
        return program.with_facts(_chosen(plan, program.facts[ModelSpec], tuple(steps)))

    def check(self, captured: Program) -> None:
        """Refuse schedulers that add noise."""
        plan = captured.facts[StepPlan]
        if any(step.update.noise for step in plan.steps):
            raise UsageError(
                f"{plan.fingerprint.scheduler} adds fresh noise at every step, so that fewer steps draw other images, "
                "and there is no trajectory to fit a solver to",
                hint="take a deterministic scheduler, ddim or dpmsolver++ for example, or --solver as-is",
            )

    def run(self, program: Program, context: PassContext) -> Program:
        self.check(program)
        with ExitStack() as stack:
            ways = [
                _Way(made, stack.enter_context(context.running(made))) for made in (program, *self._reusing(program))
            ]
            return self._planned(ways, context)

    def _planned(self, ways: Sequence[_Way], context: PassContext) -> Program:
        """Return the program with a fitted solver, from ways to run it: the first one computes both halves."""
        program = ways[0].program
        plan, spec = program.facts[StepPlan], program.facts[ModelSpec]
        count = self._trajectories(program)
        conditions = calibration_conditions(count, self.seed, spec)
        initial = calibration_noise(count, self.seed, spec).initial()
        context.progress.note(f"  plan-solver: {count} trajectories, {self.target}")
        target, near = record_target(program, ways[0].runner, self.target, count, self.seed, context)
        half = self._half_cost(ways[-1].program, context) if len(ways) > 1 else None
        places = landscape(target, near, initial, self.history, plan.fingerprint.guidance if half else None)
        trials = _Trials(ways, conditions, initial, target, self.history, context.progress)
        ranked = trials.ranked(place(places, self._count(plan), half))
        best = ranked[0].placement
        way, plain = trials.prepared(best)
        chosen, found = trials.fitted(best)
        aims = _targets(target, best.steps)
        measured, refined = self._effects_on(plan, len(chosen), count), None
        if measured:
            refined = refine(
                way.runner, chosen, spec, conditions, found, aims[-1], self.history, measured, context.progress
            )
            chosen, aims = refined.plan, [*refined.run.latents[1:-1], aims[-1]]
        fact = SolverPlan(
            target=self.target,
            run_steps=len(plan),
            plain=tuple(step.update for step in plain.steps),
            history=self.history,
            errors=tuple(entry.error for entry in ranked),
            refined=(refined.before, refined.error) if refined else None,
            modes=chosen.modes,
        )
        latents = tuple(encode_latents(latent) for latent in aims)
        computing = _taking(chosen, plan, [plan.computing] * len(chosen))
        return program.with_facts(computing, fact, SolverTargets(self.seed, count, latents))

    def _reusing(self, program: Program) -> Iterator[Program]:
        """Yield the program with a variant of the conditional half, if steps may take one."""
        if self._may_reuse(program.facts[StepPlan]):
            yield Pipeline.parse(CACHED).run(program)

    def _may_reuse(self, plan: StepPlan) -> bool:
        """Return whether steps may compute one half of guidance; without guidance there is none."""
        return self.reuse == "guidance" and plan.halves > 1

    def _half_cost(self, program: Program, context: PassContext) -> float | None:
        """Return the cost of a step of the conditional half relative to a whole one; None where it saves nothing."""
        arithmetic = {name: float(macs) for name, macs in macs_by_variant(program.variants).items()}
        costs = context.costs.measure(program) if context.costs and self.measured else arithmetic
        half = costs[CONDITIONAL] / costs[program.computing]
        return half if half < 1 else None

    def _effects_on(self, plan: StepPlan, steps: int, trajectories: int) -> int:
        """Return on how many trajectories the effects of the coefficients are measured; 0 where that takes too long."""
        affordable = EFFECTS * trajectories * self._recorded(plan) / max(1, effects(steps, self.history))
        return 0 if min(affordable, trajectories) < FEWEST_MEASURED else min(int(affordable), trajectories)

    def _recorded(self, plan: StepPlan) -> int:
        """Return the number of forward passes that recording a trajectory takes."""
        return COARSE_STEPS + FINE_STEPS if self.target == "converged" else len(plan) + max(1, len(plan) // 2)

    def _count(self, plan: StepPlan) -> int:
        """Return the number of computing steps."""
        return min(self.steps or max(1, round(SHARE * len(plan))), len(plan))

    def _trajectories(self, program: Program) -> int:
        """Return the number of trajectories to record."""
        return self.trajectories or target_trajectories(program)


@dataclass(frozen=True)
class _Way:
    """A program that takes steps, and what runs it."""

    program: Program
    runner: Runner


@dataclass(frozen=True)
class _Tried:
    """A set of steps that was tried.

    Attributes:
        placement: the steps, and what they compute.
        error: the mean squared error of the final latents, on trajectories that were left out of the fit.
        score: the mean of this error and of that of the worst tenth.
    """

    placement: Placement
    error: float
    score: float


@dataclass(frozen=True)
class _Trials:
    """Fits and samples sets of steps, and judges them.

    Attributes:
        ways: the program, and after it a program of which some steps compute one half of guidance, where there is one.
        conditions: the conditions of N trajectories.
        initial: their noise, f32[N,C,H,W].
        target: the run that is aimed at.
        history: how many earlier predictions an update may use.
        progress: reports the steps.
    """

    ways: Sequence[_Way]
    conditions: Conditions
    initial: Array
    target: RecordedRun
    history: int
    progress: Progress

    def ranked(self, placements: Sequence[Placement]) -> list[_Tried]:
        """Return the sets of steps, the best first: fitted to half of the trajectories, judged on the others."""
        apart = judged_rows(len(self.initial), of=2)
        learned = apart if apart.all() else ~apart  # a single trajectory teaches and judges
        tried = []
        for placement in placements:
            _, run = self.fitted(placement, learned)
            left = np.square(run.latents[-1][apart] - self.target.latents[-1][apart], dtype=np.float64)
            errors = left.reshape(len(left), -1).mean(axis=1)
            worst = np.quantile(errors, 1 - WORST_SHARE)
            tried.append(_Tried(placement, float(errors.mean()), float(errors.mean() + worst) / 2))
        finite = [entry for entry in tried if np.isfinite(entry.score)]
        return sorted(finite or tried, key=lambda entry: entry.score)

    def fitted(
        self, placement: Placement, learned: npt.NDArray[np.bool_] | None = None
    ) -> tuple[StepPlan, RecordedRun]:
        """Return a plan of these steps with updates that are fitted to some trajectories, and the run of all."""
        way, plan = self.prepared(placement)
        spec, aims = way.program.facts[ModelSpec], _targets(self.target, placement.steps)
        updates, run = fit_updates(
            way.runner,
            plan,
            spec,
            self.conditions,
            self.initial,
            aims,
            self.history,
            self.progress,
            learned,
        )
        return with_updates(plan, [step.update for step in updates]), run

    def prepared(self, placement: Placement) -> tuple[_Way, StepPlan]:
        """Return the way that takes these steps, and their plan with plain updates."""
        way = self.ways[not all(placement.whole)]
        kinds = way.program.facts[StepPlan]
        variants = [kinds.computing if whole else CONDITIONAL for whole in placement.whole]
        full, spec = self.ways[0].program.facts[StepPlan], way.program.facts[ModelSpec]
        chosen = _chosen(full, spec, placement.steps)
        return way, _taking(chosen, kinds, variants)


def _targets(target: RecordedRun, steps: Steps) -> list[Array]:
    """Return the target of the latent after each step."""
    return [target.latents[step] for step in (*steps[1:], len(target.predictions))]


def _chosen(plan: StepPlan, spec: ModelSpec, steps: Steps) -> StepPlan:
    """Return the plan that computes these steps of another one, with plain updates.

    Where a step and all that its update looks back to stand next to each other in the other plan, the plain update is
    that of the plan; else it is the first-order update to the next chosen timestep.
    """
    alphas, sigmas = levels(spec.noise_schedule, plan.timesteps)
    known = [*((float(alpha), float(sigma)) for alpha, sigma in zip(alphas, sigmas, strict=True)), CLEAN]
    following = (*steps[1:], len(plan))
    made = []
    for row, (step, after) in enumerate(zip(steps, following, strict=True)):
        own = plan.steps[step].update
        update = (
            own if _is_kept(own, steps, row, after) else first_order(spec.noise_schedule, known[step], known[after])
        )
        made.append(Step(plan.steps[step].timestep, update, plan.computing, row=row))
    mark = plan.fingerprint
    fingerprint = Fingerprint(mark.model, mark.scheduler, mark.steps, mark.guidance, "fitted")
    return replace(plan, fingerprint=fingerprint, steps=tuple(made))


def _taking(plan: StepPlan, like: StepPlan, variants: Sequence[str]) -> StepPlan:
    """Return a plan whose steps take these variants of another plan."""
    steps = tuple(replace(step, variant=name) for step, name in zip(plan.steps, variants, strict=True))
    return replace(plan, steps=steps, roles=like.roles)


def _is_kept(update: Update, steps: Sequence[int], row: int, after: int) -> bool:
    """Return whether a step leads to the next timestep of the run, and the steps that it looks back to are chosen."""
    depth = len(update.history)
    needed = range(steps[row] - depth, steps[row] + 1)
    return after == steps[row] + 1 and row >= depth and tuple(needed) == tuple(steps[row - depth : row + 1])
