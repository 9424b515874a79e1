"""Estimate, before any sampling, the time and memory that a compilation needs and the size of its bundle."""

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

TIMED_MACS = 2e9  # multiply-accumulates of the batch that one run is timed with; small models need a larger batch
TIMED_ROWS = 64  # the largest batch that one run is timed with
# The constants below were fitted to compilations of digits and of DiT-S/2 to DiT-XL/2
# (docs/benchmarks.md, "What compiling costs").
EXPORT_SECONDS = 0.015  # seconds to export and check a variant, for every node of its graph
JUDGED_FORWARDS = 300  # checking the exported graphs takes as long as this many runs of a small model ..
JUDGED_MACS = 100e9  # .. or as a run of this many multiply-accumulates, whichever is less
NODE_BYTES = 4000  # bytes of program.json, texts and graphs in a bundle, for every node of the captured graph
WORKING_SHARE = 0.3  # memory that passes and export need besides the weights, as a share of the weights
WORKING_BYTES = 400e6  # bytes of memory that any compilation needs besides the weights
FLOAT_BYTES = 4
CODE_BYTES = 1


@dataclass(frozen=True)
class CompileEstimate:
    """An estimate of time, memory and size, within a factor of two of all compilations it was compared with.

    Attributes:
        seconds: wall time on this machine with the current number of threads.
        memory_bytes: the largest resident size of the process.
        bundle_bytes: the size of the bundle.
    """

    seconds: float
    memory_bytes: int
    bundle_bytes: int


def estimate(
    captured: Program, program: Program, pipeline: Pipeline, planned: Sequence[Site], target: Target, elapsed: float
) -> CompileEstimate:
    """Estimate a compilation from one run of the model and from the work that its passes report.

    Args:
        captured: the captured program.
        program: the program after the passes that need no samples.
        pipeline: all passes.
        planned: the sites that will be quantized.
        target: the target of the compilation.
        elapsed: seconds that loading and capturing took.
    """
    (macs,) = macs_by_variant(captured.variants).values()
    forwards = passes_forwards(captured, program, pipeline)
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


def passes_forwards(captured: Program, program: Program, pipeline: Pipeline) -> float:
    """Return about how many runs of the model on one latent the passes take.

    A pass that leaves fewer steps, and those before it, work on all steps of the run.

    Args:
        captured: the captured program, with all steps.
        program: the program after the passes that need no samples, with the steps that will run.
        pipeline: all passes.
    """
    count = len(captured.facts[StepPlan])
    shortening = [len(pass_.foreseen(captured).facts[StepPlan]) < count for pass_ in pipeline]
    whole = shortening.index(True) + 1 if any(shortening) else 0
    before, after = workload(captured, pipeline), workload(program, pipeline)
    works = [before] * whole + [after] * (len(shortening) - whole)
    return sum(pass_.forwards(work) for pass_, work in zip(pipeline, works, strict=True))


def workload(program: Program, pipeline: Pipeline) -> Workload:
    """Return the sizes that determine the work of the passes."""
    plan, macs = program.facts[StepPlan], macs_by_variant(program.variants)
    sizes = [pass_.sizes(program) for pass_ in pipeline]
    trajectories, rows = max(sizes, default=(0, 0))
    whole = macs[program.computing] * len(plan)
    return Workload(program, trajectories, rows, plan.work(macs) / whole if whole else 1.0)


def seconds_per_forward(program: Program) -> float:
    """Return the seconds that the captured model takes for one latent, from one run after a warm-up run."""
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
