"""What one run of every variant costs, in milliseconds, and on which runtime: what planning under a budget goes by."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from qcgraph.export.run.open import export_to
from qcgraph.export.run.runtimes import runtime_for
from qcgraph.export.targets import Target
from qcgraph.facts import precision_of
from qcgraph.files.atomic import scratch_folder
from qcgraph.ir.program import Program
from qcgraph.pipeline import Pipeline
from qcgraph.pipeline.pipeline import Costs
from qcgraph.plan.schedule import FULL
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.loop import Runner, step_inputs

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
    inputs, state = _inputs(program), dict[str, object]()
    names = [FULL, *(name for name in program.variants if name != FULL)]  # the first makes the caches of the others
    seconds: Mapping[str, list[float]] = {name: [] for name in names}
    for turn in range(WARM_UP + ROUNDS):
        for name in names:
            started = time.perf_counter()
            runner.run(name, inputs, state)
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def _inputs(program: Program) -> dict[str, npt.NDArray[np.generic]]:
    spec, plan = program.facts[ModelSpec], program.facts[StepPlan]
    rows = plan.halves
    latent = np.random.default_rng(0).standard_normal((rows, *spec.latent_shape), dtype=np.float32)
    return step_inputs(plan.steps[0], latent, np.arange(rows, dtype=np.int64) % (spec.class_count + 1))
