"""Fit the free rival of a compilation: a solver that takes as few steps of the model in full precision."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

from qcgraph.evaluation.kept import kept_plan
from qcgraph.facts import SolverPlan, SolverTargets, encode
from qcgraph.ir.program import Program
from qcgraph.pipeline import Pipeline
from qcgraph.pipeline.calibration_budget import target_trajectories
from qcgraph.pipeline.running import Running, in_torch
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.reference import RunStore

HISTORY = 3  # earlier predictions in an update


def fitted_rival(
    origin: Program,
    steps: int,
    progress: Progress,
    *,
    seed: int = 0,
    trajectories: int | None = None,
    runs: RunStore | None = None,
    running: Running = in_torch,
) -> StepPlan:
    """Return the step plan of a solver that is fitted to the converged run in full precision.

    It is taken from the folder of the user if it was fitted before, and kept there otherwise.

    Args:
        origin: the captured model, with the plan of the scheduler's run.
        steps: the number of steps; all of the run if it has no more.
        progress: reports the fit.
        seed: the seed of the trajectories that it is fitted to.
        trajectories: their number; None for as many as a fixed amount of arithmetic allows.
        runs: the runs of the model that were recorded before.
        running: opens the runner of the model; PyTorch by default.

    Raises:
        UsageError: the scheduler adds noise, or the model draws latents that are not finite.
    """
    count = trajectories or target_trajectories(origin)
    options = {"steps": steps, "target": "converged", "history": HISTORY, "trajectories": count, "seed": seed}
    pipeline = Pipeline.parse(f"plan-solver{{{' '.join(f'{name}={value}' for name, value in options.items())}}}")

    def fit() -> StepPlan:
        return pipeline.run(origin, progress=progress, runs=runs, running=running).facts[StepPlan]

    return kept_plan(_key(origin, options), fit)


def keep_rival(before: Program, after: Program) -> None:
    """Keep the solver that a pass fitted to the converged run in full precision, if it did: it is a rival later.

    One with steps of one half of guidance is none: its coefficients are not those of as many whole steps.

    Args:
        before: the captured model, with the plan of the scheduler's run.
        after: the program after the pass.
    """
    solver, targets = after.facts.get(SolverPlan), after.facts.get(SolverTargets)
    if solver is None or targets is None or SolverPlan in before.facts or solver.target != "converged":
        return
    if solver.half_steps:
        return
    options = {
        "steps": len(solver.plain),
        "target": solver.target,
        "history": solver.history,
        "trajectories": targets.trajectories,
        "seed": targets.seed,
    }
    kept_plan(_key(before, options), lambda: after.facts[StepPlan])


def _key(origin: Program, options: Mapping[str, object]) -> list[object]:
    """Return everything that a fit depends on; another version of qcgraph may fit other coefficients."""
    run, spec = origin.facts[StepPlan], origin.facts[ModelSpec]
    return [encode(run), encode(spec), dict(options), metadata.version("qcgraph")]
