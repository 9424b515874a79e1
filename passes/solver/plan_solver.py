"""plan-solver: choose the few steps of a solver whose coefficients are fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

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
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.passes.solver._landscape import landscape, record_target
from qcgraph.pipeline import Pass, PassContext
from qcgraph.pipeline.calibration_budget import target_trajectories
from qcgraph.pipeline.options import AUTO_HINT, MOST_SEED, MOST_TRAJECTORIES, option
from qcgraph.pipeline.workload import Workload
from qcgraph.plan.levels import CLEAN, first_order, levels
from qcgraph.plan.placement import Steps, place
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import Fingerprint, Step, StepPlan, Update
from qcgraph.progress import Progress
from qcgraph.sampling.calibration import calibration_conditions, calibration_noise, encode_latents
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.fitting import fit_updates, judged_rows, with_updates
from qcgraph.sampling.reference import COARSE_STEPS, FINE_STEPS, RecordedRun
from qcgraph.sampling.runner import Array

SHARE = 0.26  # default number of computing steps, relative to those of the run: 13 of 50


@dataclass(frozen=True)
class PlanSolver(Pass):
    """Choose the timesteps that a fitted solver computes, and fit its updates in full precision.

    A linear multistep update ``x' = a * x + b_0 * eps_0 + b_1 * eps_1 + ..`` on chosen timesteps has a few scalars a
    step, and costs nothing when it runs. The steps are those whose final latents come closest to a target run: the best
    ones by dynamic programming over the residuals of jumps, and by climbing on a model of the trajectories (see
    `qcgraph.plan.placement`), are fitted closed loop, and judged on trajectories that they were not fitted to.

    Attributes:
        steps: how many steps compute, or all of the run if it has no more; by default 26 % of them.
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
    target: Literal["converged", "run"] = "converged"
    history: int = option(3, least=0, most=3, hint="3 earlier predictions are enough")
    trajectories: int | None = option(None, least=1, most=MOST_TRAJECTORIES, hint=AUTO_HINT)
    seed: int = option(0, most=MOST_SEED)

    def forwards(self, work: Workload) -> float:
        plan = work.program.facts[StepPlan]
        recorded = COARSE_STEPS + FINE_STEPS if self.target == "converged" else len(plan) + max(1, len(plan) // 2)
        return self._trajectories(work.program) * plan.halves * (recorded + 2 * self._count(plan))

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
        plan, spec = program.facts[StepPlan], program.facts[ModelSpec]
        count = self._trajectories(program)
        conditions = calibration_conditions(count, self.seed, spec)
        initial = calibration_noise(count, self.seed, spec).initial()
        context.progress.note(f"  plan-solver: {count} trajectories, {self.target}")
        target, near = record_target(program, self.target, count, self.seed, context)
        contest = [
            self._fitted(program, conditions, initial, target, steps, context.progress)
            for steps in place(landscape(target, near, initial, self.history), self._count(plan))
        ]
        contest.sort(key=lambda entry: entry.error)
        best = contest[0]
        fact = SolverPlan(
            target=self.target,
            run_steps=len(plan),
            plain=best.plain,
            history=self.history,
            errors=tuple(entry.error for entry in contest),
        )
        latents = tuple(encode_latents(latent) for latent in _targets(target, best.steps))
        return program.with_facts(best.plan, fact, SolverTargets(self.seed, count, latents))

    def _count(self, plan: StepPlan) -> int:
        """Return the number of computing steps."""
        return min(self.steps or max(1, round(SHARE * len(plan))), len(plan))

    def _trajectories(self, program: Program) -> int:
        """Return the number of trajectories to record."""
        return self.trajectories or target_trajectories(program)

    def _fitted(
        self,
        program: Program,
        conditions: Conditions,
        initial: Array,
        target: RecordedRun,
        steps: Steps,
        progress: Progress,
    ) -> _Contestant:
        """Return a plan with fitted updates, and the error of its final latents where it was not fitted."""
        spec, aims = program.facts[ModelSpec], _targets(target, steps)
        plan = _chosen(program.facts[StepPlan], spec, steps)
        fitted, final = fit_updates(TorchRunner(program), plan, spec, conditions, initial, aims, self.history, progress)
        judged = judged_rows(len(initial))
        error = float(np.square(final[judged] - aims[-1][judged], dtype=np.float64).mean())
        plain = tuple(step.update for step in plan.steps)
        return _Contestant(steps, plain, with_updates(plan, [step.update for step in fitted]), error)


@dataclass(frozen=True)
class _Contestant:
    """Steps that were tried, their plain updates, their plan with fitted ones, and the error of their final latents."""

    steps: Steps
    plain: tuple[Update, ...]
    plan: StepPlan
    error: float


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


def _is_kept(update: Update, steps: Sequence[int], row: int, after: int) -> bool:
    """Return whether a step leads to the next timestep of the run, and the steps that it looks back to are chosen."""
    depth = len(update.history)
    needed = range(steps[row] - depth, steps[row] + 1)
    return after == steps[row] + 1 and row >= depth and tuple(needed) == tuple(steps[row - depth : row + 1])
