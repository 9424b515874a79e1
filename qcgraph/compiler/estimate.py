"""What compiling will take, estimated before anything is sampled: time, memory, and the size of the bundle."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qcgraph.benchmark.machine import resident_bytes
from qcgraph.export.targets import Target
from qcgraph.facts import ComputeType
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.ir.structure import Site, macs_by_variant, weight_names
from qcgraph.pipeline import Pipeline
from qcgraph.pipeline.workload import Workload
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.conditions import in_turn
from qcgraph.sampling.runner import step_call, step_inputs

TIMED_MACS = 2e9  # multiply-accumulates of the batch that one run is timed with; small models need a batch
TIMED_ROWS = 64  # the largest such batch
# The rest was read off compilations of digits and of DiT-S/2 to DiT-XL/2 (docs/benchmarks.md, "What compiling costs").
EXPORT_SECONDS = 0.015  # to export and check a variant, for every node of its graph
JUDGED_FORWARDS = 300  # runs of a small model that checking the exported graphs takes as long as ..
JUDGED_MACS = 100e9  # .. or as many multiply-accumulates, where that is less
NODE_BYTES = 4000  # of program.json, the texts and the graphs in a bundle, for every node of the captured graph
WORKING_SHARE = 0.3  # of the weights, held besides them while passes and the export run
WORKING_BYTES = 400e6  # held besides the weights, whatever the model
FLOAT_BYTES = 4
CODE_BYTES = 1


@dataclass(frozen=True)
class CompileEstimate:
    """What a compilation will take, about: within a factor of two where it was compared.

    Attributes:
        seconds: wall time, on this machine with as many threads as now.
        memory_bytes: the largest resident size of the process.
        bundle_bytes: the size of the bundle.
    """

    seconds: float
    memory_bytes: int
    bundle_bytes: int


def estimate(
    captured: Program, program: Program, pipeline: Pipeline, planned: Sequence[Site], target: Target, elapsed: float
) -> CompileEstimate:
    """CompileEstimate what compiling takes, from one run of the model and from what the passes say of their work.

    Args:
        captured: the captured program.
        program: the program after the passes that need no samples.
        pipeline: all passes.
        planned: the sites that are to be quantized.
        target: what it is compiled for.
        elapsed: seconds that loading and capturing took.
    """
    work = workload(program, pipeline)
    (macs,) = macs_by_variant(captured.variants).values()
    forwards = sum(pass_.forwards(work) for pass_ in pipeline)
    if target.emits_onnx:
        forwards += len(program.variants) * min(JUDGED_FORWARDS, JUDGED_MACS / max(macs, 1))
    nodes = [len(variant.graph.nodes) for variant in program.variants.values()] if target.emits_onnx else []
    weights = captured.constant_bytes
    chosen = set(weight_names(captured.variants[captured.computing], planned).values())
    codes = sum(constant.numel() for name, constant in captured.constants.items() if name in chosen)
    is_reduced = any(ComputeType in pass_.provides for pass_ in pipeline)
    numbers = (weights - codes * FLOAT_BYTES) // (2 if is_reduced else 1)
    return CompileEstimate(
        seconds=elapsed + forwards * seconds_per_forward(captured) + EXPORT_SECONDS * sum(nodes),
        memory_bytes=int((resident_bytes() or weights) + WORKING_SHARE * weights + WORKING_BYTES),
        bundle_bytes=codes * CODE_BYTES + numbers + len(captured.variants[captured.computing].graph.nodes) * NODE_BYTES,
    )


def workload(program: Program, pipeline: Pipeline) -> Workload:
    """Return the sizes that the work of passes depends on."""
    plan, macs = program.facts[StepPlan], macs_by_variant(program.variants)
    spent = sum(macs[name] * plan.uses(name) for name in macs)
    sizes = [pass_.sizes(program) for pass_ in pipeline]
    trajectories, rows = max(sizes, default=(0, 0))
    whole = macs[program.computing] * len(plan)
    return Workload(program, trajectories, rows, spent / whole if whole else 1.0)


def seconds_per_forward(program: Program) -> float:
    """Return the seconds that the captured model takes for one latent, from one run after another that warms up."""
    spec, plan = program.facts[ModelSpec], program.facts[StepPlan]
    (macs,) = macs_by_variant(program.variants).values()
    count = int(np.clip(TIMED_MACS // max(macs, 1), 1, TIMED_ROWS))
    latent = np.random.default_rng(0).standard_normal((count, *spec.latent_shape), dtype=np.float32)
    inputs = step_inputs(plan, spec, 0, latent, in_turn(count, spec))
    runner, seconds = TorchRunner(program), 0.0
    for _ in range(2):
        started = time.perf_counter()
        runner.run(step_call(plan, 0, inputs, {}))
        seconds = time.perf_counter() - started
    return seconds / count
