"""Open runners for passes that sample many times: on ONNX Runtime, which takes two thirds of PyTorch's time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from qcgraph.evaluation.ablation import is_quantized
from qcgraph.export.run.open import export_to
from qcgraph.export.run.runtimes import ONNXRUNTIME, RUNTIMES, Runtime
from qcgraph.export.targets import Target, target_named
from qcgraph.facts import precision_of
from qcgraph.files.atomic import scratch_folder
from qcgraph.ir.program import Program
from qcgraph.ir.structure import find_sites
from qcgraph.pipeline import Pipeline
from qcgraph.pipeline.running import Running, in_torch
from qcgraph.pipeline.together import NEAR_BYTES, rows_together
from qcgraph.progress import Progress
from qcgraph.sampling.runner import Array, Call, Runner

IN_FULL_PRECISION = "onnxruntime-cpu"  # the target whose form programs in full precision take
MOST_BYTES = 2**28  # weights of a larger model are not written to a temporary folder, and held twice


def running_for(target: Target) -> Running:
    """Return the function that opens runners for a compilation.

    In full precision, a program runs on ONNX Runtime, whatever the target. A quantized one runs there if this is the
    runtime of the target, so that it has the numbers of the bundle; else in PyTorch.

    Args:
        target: the target of the compilation.
    """
    runtime = RUNTIMES[ONNXRUNTIME]
    exports = target if target.runtime == ONNXRUNTIME else target_named(IN_FULL_PRECISION)

    @contextmanager
    def running(program: Program) -> Iterator[Runner]:
        is_known = target is exports or not is_quantized(program)
        is_small = program.constant_bytes <= MOST_BYTES and precision_of(program.facts) in runtime.types
        if not (is_known and is_small and runtime.is_here):
            with in_torch(program) as runner:
                yield runner
            return
        rows = rows_together(find_sites(program.variants[program.computing]), NEAR_BYTES)
        with exported(program, exports, runtime, Progress(), torch.get_num_threads()) as (opened, legal):
            yield _InParts(opened, legal, rows)

    return running


@contextmanager
def exported(
    program: Program, target: Target, runtime: Runtime, progress: Progress, threads: int | None = None
) -> Iterator[tuple[Runner, Program]]:
    """Open a runner of a program before legalization, with the legal program, for the time of the body.

    Args:
        program: the program.
        target: its legalization is applied, and the files that the runtime reads are exported to a temporary folder.
        runtime: the runtime.
        progress: reports the export.
        threads: the number of threads that it may use; by default all cores.
    """
    legal = Pipeline.parse(target.legalize).run(program)
    with scratch_folder() as folder:
        yield export_to(runtime, target, legal, folder, progress, threads), legal


class _InParts:
    """Runs a few rows of a batch at a time, so that their activations stay in the cache of the CPU.

    Args:
        runner: runs the parts.
        program: the program that it runs.
        rows: the number of rows of a part.
    """

    def __init__(self, runner: Runner, program: Program, rows: int) -> None:
        self._runner, self._program, self._rows = runner, program, rows

    def run(self, call: Call) -> Array:
        """Run one variant; all rows together if it reads or makes cached values."""
        interface = self._program.variants[call.variant].interface
        batched = {spec.name for spec in interface.inputs if spec.batch_axis == 0 and spec.name in call.inputs}
        count = max((len(call.inputs[name]) for name in batched), default=0)
        if interface.caches or len(batched) < sum(spec.batch_axis is not None for spec in interface.inputs):
            return self._runner.run(call)
        results = []
        for start in range(0, count, self._rows):
            part = slice(start, start + self._rows)
            inputs = {name: value[part] if name in batched else value for name, value in call.inputs.items()}
            results.append(self._runner.run(replace(call, inputs=inputs)))
        return np.concatenate(results)
