"""fit-solver: fit the coefficients of the sampler's updates to the program as it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from qcgraph.facts import Precision, SolverFit, SolverPlan, SolverTargets
from qcgraph.ir.program import Program
from qcgraph.pipeline import Pass, PassContext
from qcgraph.pipeline.workload import Workload
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.calibration import calibration_conditions, calibration_noise, decode_latents
from qcgraph.sampling.fitting import fit_updates, with_updates


@dataclass(frozen=True)
class FitSolver(Pass):
    """Fit the updates of the steps that plan-solver chose, closed loop, on the quantized and cached program.

    The coefficients of a step are fitted to the target of its latent by least squares over all values of all
    trajectories, with a ridge towards the plain update that is chosen on trajectories that were left out. The next step
    starts from the latents that this leads to, so that every step corrects what the ones before it left, errors of
    quantization and of the cache included.
    """

    name: ClassVar[str] = "fit-solver"
    requires: ClassVar[tuple[type, ...]] = (ModelSpec, StepPlan, SolverPlan, SolverTargets)
    precedes: ClassVar[tuple[type, ...]] = (Precision,)
    provides: ClassVar[tuple[type, ...]] = (SolverFit,)
    samples: ClassVar[bool] = True

    def forwards(self, work: Workload) -> float:
        targets = work.program.facts.get(SolverTargets)
        return (targets.trajectories if targets else work.trajectories) * work.trajectory * work.share

    def run(self, program: Program, context: PassContext) -> Program:
        plan, spec = program.facts[StepPlan], program.facts[ModelSpec]
        solver, targets = program.facts[SolverPlan], program.facts[SolverTargets]
        conditions = calibration_conditions(targets.trajectories, targets.seed, spec)
        initial = calibration_noise(targets.trajectories, targets.seed, spec).initial()
        context.progress.note(f"  fit-solver: {targets.trajectories} trajectories")
        with context.running(program) as runner:
            fitted, _ = fit_updates(
                runner,
                with_updates(plan, solver.plain),
                spec,
                conditions,
                initial,
                [decode_latents(latents, spec.latent_shape) for latents in targets.latents],
                solver.history,
                context.progress,
            )
        fact = SolverFit(
            ridges=tuple(step.ridge if math.isfinite(step.ridge) else None for step in fitted),
            errors=tuple(step.error for step in fitted),
            plain_errors=tuple(step.plain_error for step in fitted),
            trajectories=targets.trajectories,
        )
        served = replace(program, facts=program.facts.without(SolverTargets))
        return served.with_facts(with_updates(plan, [step.update for step in fitted]), fact)
