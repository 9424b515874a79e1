"""What one run of every variant costs, in milliseconds, and on which runtime: what planning under a budget goes by."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import numpy as np

from qcgraph.export.run.open import export_to
from qcgraph.export.run.runtimes import runtime_for
from qcgraph.export.targets import Target
from qcgraph.facts import precision_of
from qcgraph.files.atomic import scratch_folder
from qcgraph.ir.program import Program
from qcgraph.pipeline import Pipeline
from qcgraph.pipeline.pipeline import Costs
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.conditions import in_turn
from qcgraph.sampling.runner import Runner, step_call, step_inputs

ROUNDS = 15
WARM_UP = 3


def measure_costs(program: Program, target: Target, progress: Progress) -> dict[str, float]:
    """The median time of one run of every variant for one image, both halves of guidance, variants taking turns.

    Args:
        program: a program before legalization.
        target: what it is compiled for; its legalization is applied, and what its runtime reads is exported to a
            temporary folder.
        progress: reports the export.
    """
    legal = Pipeline.parse(target.legalize).run(program) if target.legalize else program
    with scratch_folder() as folder:
        runtime = runtime_for(target, precision_of(legal.facts))
        return _turns(export_to(runtime, target, legal, folder, progress), legal)


def costs_for(target: Target, progress: Progress) -> Costs:
    """Return what measures the variants of programs before legalization, with the runtime that it measures on.

    It is the runtime that stands in for the target's own where the target has one: its milliseconds are then not those
    of the target.
    """
    return Costs(runtime_for(target, "f32").name, lambda program: measure_costs(program, target, progress))


def _turns(runner: Runner, program: Program) -> dict[str, float]:
    plan, spec = program.facts[StepPlan], program.facts[ModelSpec]
    latent = np.random.default_rng(0).standard_normal((plan.halves, *spec.latent_shape), dtype=np.float32)
    inputs = step_inputs(plan, spec, 0, latent, in_turn(plan.halves, spec, with_null=True))
    names, state = [plan.computing, *plan.reusing], dict[tuple[str, int], object]()  # the first makes the caches
    seconds: Mapping[str, list[float]] = {name: [] for name in names}
    for turn in range(WARM_UP + ROUNDS):
        for name in names:
            started = time.perf_counter()
            runner.run(step_call(plan, 0, inputs, state, name))
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}
