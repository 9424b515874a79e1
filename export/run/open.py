"""The one door to runtimes: all code that runs, measures, judges or verifies a compilation gets its runner here.

A runner of a bundle belongs to the bundle that was opened, and later changes have no effect on it: everything is read
when it is made (see `qcgraph.bundle.watch`). No torch, unless a runtime that needs it is opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qcgraph.bundle import Bundle
from qcgraph.errors import UsageError
from qcgraph.export.run.runtimes import Exported, Runtime, Source, runtime_for, runtime_named
from qcgraph.export.targets import Target, target_of
from qcgraph.facts import precision_of
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.runner import Runner

if TYPE_CHECKING:
    from qcgraph.ir.program import Program

SAMPLES_AT_ONCE = 64
MOST_THREADS = 1024  # no computer has more cores, and all threads are made at once


def open_runner(target: Target, source: Source, runtime: str | None = None, threads: int | None = None) -> Runner:
    """Return a runner for a compilation.

    Args:
        target: the target of the compilation.
        source: a bundle, or a legal program in a folder.
        runtime: a name in `qcgraph.export.run.runtimes.RUNTIMES`; `runtime_for` gives the default.
        threads: the number of threads that it may use; by default all cores. Engines run on a GPU and take none.

    Raises:
        UsageError: the runtime is unknown or not installed, its GPU is missing, or the number of threads is not
            positive or has no effect.
        BundleError: the bundle was not exported for it, has no engines that run here, or was replaced meanwhile.
    """
    chosen = runtime_for(target, _precision(source)) if runtime is None else runtime_named(runtime)
    _check_threads(threads)
    return chosen.open(target, source, threads)


def runner_of(bundle: Bundle, runtime: str | None = None, threads: int | None = None) -> Runner:
    """Return a runner for a bundle (see `open_runner`)."""
    return open_runner(target_of(bundle), bundle, runtime, threads)


def export_to(
    runtime: Runtime, target: Target, program: Program, folder: Path, progress: Progress, threads: int | None = None
) -> Runner:
    """Return a runner for a legal program that was not exported yet; exported files go to an empty folder.

    Args:
        runtime: the runtime that runs it.
        target: the target of the compilation.
        program: the program after legalization.
        folder: an empty folder, which must outlive the runner.
        progress: reports the export.
        threads: the number of threads that it may use; by default all cores.
    """
    if runtime.reads_graphs:
        from qcgraph.export.onnx.emit import emit_onnx

        emit_onnx(program, folder, target.opset, progress, **target.forms)
    return open_runner(target, Exported(program, folder, program.interfaces), runtime.name, threads)


def samples_at_once(runner: Runner, plan: StepPlan) -> int:
    """Return the number of samples to draw together: `SAMPLES_AT_ONCE`, or fewer if engines take fewer."""
    largest: int | None = getattr(runner, "largest_batch", None)
    return SAMPLES_AT_ONCE if largest is None else max(1, min(SAMPLES_AT_ONCE, largest // plan.halves))


def _precision(source: Source) -> str:
    return source.manifest.precision if isinstance(source, Bundle) else precision_of(source.program.facts)


def _check_threads(threads: object) -> None:
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= MOST_THREADS:
        is_shown = isinstance(threads, float) or (isinstance(threads, int) and abs(threads) < 10**9)
        shown = f"{threads}" if is_shown else f"that number of ({type(threads).__name__})"
        raise UsageError(f"{shown} threads", hint=f"a whole number, 1 to {MOST_THREADS}")
