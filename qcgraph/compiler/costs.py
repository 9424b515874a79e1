"""What one run of every variant costs on a target, in milliseconds: what planning under a budget goes by."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import numpy as np

from qcgraph.export.onnx.emit import emit_onnx
from qcgraph.export.run.onnxruntime import OnnxRuntimeRunner
from qcgraph.export.targets import Target
from qcgraph.files.atomic import scratch_folder
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.pipeline import Pipeline
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
        target: what it is compiled for; its legalization is applied, and its graphs are exported to a temporary folder.
        progress: reports the export.
    """
    if not target.emits_onnx:
        return _turns(TorchRunner(program), program)
    legal = Pipeline.parse(target.legalize).run(program) if target.legalize else program
    with scratch_folder() as folder:
        emit_onnx(legal, folder, target.opset, progress, **target.forms)
        return _turns(OnnxRuntimeRunner(folder, legal.interfaces, exact=target.may_saturate), legal)


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
