"""Record the run that a fitted solver aims at, and model the trajectories near it."""

from __future__ import annotations

from typing import Literal

import numpy as np

from qcgraph.errors import UsageError
from qcgraph.ir.program import Program
from qcgraph.pipeline import PassContext
from qcgraph.plan.placement import Landscape, inner_products, response
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.fitting import judged_rows
from qcgraph.sampling.reference import (
    COARSE_STEPS,
    FINE_STEPS,
    RecordedRun,
    at_timesteps,
    extrapolated,
    first_order_plan,
)
from qcgraph.sampling.runner import Array, Runner

Target = Literal["converged", "run"]


def record_target(
    program: Program, runner: Runner, target: Target, count: int, seed: int, context: PassContext
) -> tuple[RecordedRun, RecordedRun]:
    """Return the target run at the timesteps of the plan, and another run from the same noise that is near it.

    Args:
        program: the captured program.
        runner: runs it.
        target: what is aimed at.
        count: the number of trajectories.
        seed: the seed of their noise and conditions.
        context: holds runs that were recorded before, and reports the steps.

    Raises:
        UsageError: the final latents are not finite.
    """
    plan, spec = program.facts[StepPlan], program.facts[ModelSpec]
    schedule = spec.noise_schedule

    def run_of(other: StepPlan) -> RecordedRun:
        return context.runs.walk(runner, other, spec, count, seed, context.progress)

    def first_order_run(steps: int) -> RecordedRun:
        other = first_order_plan(steps, plan, schedule)
        return at_timesteps(run_of(other), other, plan.timesteps, schedule)

    if target == "converged":
        coarse, fine = (first_order_run(steps) for steps in (COARSE_STEPS, FINE_STEPS))
        aim, near = extrapolated(coarse, fine), coarse
    else:
        aim, near = run_of(plan), first_order_run(max(1, len(plan) // 2))
    if not np.isfinite(aim.latents[-1]).all():
        raise UsageError(
            "the model draws latents that are not finite",
            hint="sample with it before compiling; its weights or its noise schedule may be wrong",
        )
    return aim, near


def landscape(aim: RecordedRun, near: RecordedRun, initial: Array, history: int, guidance: float | None) -> Landscape:
    """Return the model of the trajectories near a run.

    Args:
        aim: the target run.
        near: another run from the same noise.
        initial: the noise, f32[N,C,H,W].
        history: the number of earlier predictions that an update may use.
        guidance: the weight of guidance; None where no step is to compute one half of it.
    """
    differences = () if guidance is None else aim.differences
    judged = judged_rows(len(initial))
    learned, others = (
        inner_products([vector[rows] for vector in (*aim.latents, *aim.predictions, *differences, initial)])
        for rows in ((~judged, judged) if len(initial) > 1 else (judged, judged))
    )
    responses = response(aim.latents, aim.predictions, near.latents, near.predictions)
    return Landscape(learned, others, responses, history, 1.0 if guidance is None else guidance)
