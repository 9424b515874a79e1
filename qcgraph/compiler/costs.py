"""Measure the milliseconds of one run of every variant, and name the runtime; planning under a budget needs both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import numpy as np

from qcgraph.compiler.running import exported
from qcgraph.export.run.runtimes import runtime_for
from qcgraph.export.targets import Target
from qcgraph.facts import precision_of
from qcgraph.ir.program import Program
from qcgraph.pipeline.pipeline import Costs
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.conditions import in_turn
from qcgraph.sampling.runner import Runner, step_call, step_inputs

ROUNDS = 15
WARM_UP = 3


def measure_costs(program: Program, target: Target, progress: Progress) -> dict[str, float]:
    """Return the median milliseconds of one run of every variant on one image with guidance; variants take turns.

    Args:
        program: a program before legalization.
        target: the target of the compilation; its legalization is applied, and the files that its runtime reads are
            exported to a temporary folder.
        progress: reports the export.
    """
    runtime = runtime_for(target, precision_of(program.facts))
    with exported(program, target, runtime, progress) as (runner, legal):
        return run_milliseconds(runner, legal)


def costs_for(target: Target, progress: Progress) -> Costs:
    """Return the function that measures variants before legalization, and the name of the runtime that it measures on.

    A target may have a stand-in for its runtime. The milliseconds are then those of the stand-in.
    """
    return Costs(runtime_for(target, "f32").name, lambda program: measure_costs(program, target, progress))


def run_milliseconds(runner: Runner, program: Program) -> dict[str, float]:
    """Return the median milliseconds of one run of every variant on one image with guidance; variants take turns.

    Args:
        runner: runs the variants.
        program: the program that it runs.
    """
    plan, spec = program.facts[StepPlan], program.facts[ModelSpec]
    latent = np.random.default_rng(0).standard_normal((plan.halves, *spec.latent_shape), dtype=np.float32)
    inputs = step_inputs(plan, spec, 0, latent, in_turn(plan.halves, spec, with_null=True))
    names, state = [plan.computing, *plan.reusing], dict[tuple[str, int], object]()  # computing fills the caches
    seconds: Mapping[str, list[float]] = {name: [] for name in names}
    for turn in range(WARM_UP + ROUNDS):
        for name in names:
            started = time.perf_counter()
            runner.run(step_call(plan, 0, inputs, state, name))
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}
