"""Running a bundle: its backends. No torch, unless a backend is.

A runner is of the bundle that was opened, and stays what it is: everything is read when it is made (see
`qcgraph.bundle.watch`).
"""

from __future__ import annotations

from dataclasses import replace

from qcgraph.bundle import Bundle
from qcgraph.bundle.watch import reading
from qcgraph.errors import BundleError, UsageError, closest
from qcgraph.export.targets import target_named
from qcgraph.export.tensorrt.provider import PROVIDERS
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.runner import Runner

BACKENDS = ("onnxruntime", "torch", *PROVIDERS)
WEIGHTS = "weights.safetensors"  # of the graphs and of the program
SAMPLES_AT_ONCE = 64
MOST_THREADS = 1024  # more cores than that one computer has none, and a thread each is made at once


def open_runner(bundle: Bundle, backend: str | None = None, threads: int | None = None) -> Runner:
    """A runner for a bundle.

    Args:
        bundle: what to run.
        backend: one of `BACKENDS`; by default the one of the bundle's target.
        threads: how many threads it may use; by default all cores. Engines run on a GPU and take none.

    Raises:
        UsageError: the backend is unknown or not installed, there is no GPU where it needs one, or the number of
            threads is not positive or of no use.
        BundleError: the bundle was not exported for it, has no engines that run here, or was replaced meanwhile.
    """
    name = backend or target_named(bundle.manifest.target).backend_for(bundle.manifest.precision)
    if name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}", hint=closest(str(name), BACKENDS))
    _check_threads(threads)
    if name in PROVIDERS:
        return _engine_runner(bundle, name, threads)
    if name == "torch":
        return _torch_runner(bundle, threads)
    missing = [f"{variant}.onnx" for variant in bundle.interfaces if f"{variant}.onnx" not in bundle.manifest.files]
    if missing:
        raise BundleError(
            f"the bundle has no {missing[0]}: it was compiled for target {bundle.manifest.target!r}",
            where=str(bundle.path),
            hint="use --backend torch, or compile with --target onnxruntime-cpu",
        )
    return _onnxruntime_runner(bundle, threads)


def samples_at_once(runner: Runner, plan: StepPlan) -> int:
    """How many samples to draw together: `SAMPLES_AT_ONCE`, or as many as engines were built for."""
    largest: int | None = getattr(runner, "largest_batch", None)
    return SAMPLES_AT_ONCE if largest is None else max(1, min(SAMPLES_AT_ONCE, largest // plan.halves))


def _check_threads(threads: object) -> None:
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= MOST_THREADS:
        is_shown = isinstance(threads, float) or (isinstance(threads, int) and abs(threads) < 10**9)
        shown = f"{threads}" if is_shown else f"that number of ({type(threads).__name__})"
        raise UsageError(f"{shown} threads", hint=f"a whole number, 1 to {MOST_THREADS}")


def _onnxruntime_runner(bundle: Bundle, threads: int | None) -> Runner:
    from qcgraph.export.run.onnxruntime import OnnxRuntimeRunner

    exact = target_named(bundle.manifest.target).may_saturate
    graphs = [f"{variant}.onnx" for variant in bundle.interfaces]
    with reading(bundle, [*graphs, WEIGHTS]) as files:
        check = files[WEIGHTS].check if WEIGHTS in files else None
        runner = OnnxRuntimeRunner(bundle.path, bundle.interfaces, threads, exact=exact, check=check)
        runner.load()
    return runner


def _engine_runner(bundle: Bundle, provider: str, threads: int | None) -> Runner:
    from qcgraph.export.run.open_engines import open_engines

    if threads is not None:
        raise UsageError(f"{threads} threads have no effect on engines", hint="leave the number of threads out")
    with reading(bundle):
        return open_engines(bundle, provider)


def _torch_runner(bundle: Bundle, threads: int | None) -> Runner:
    import torch

    from qcgraph.ir.execute import TorchRunner
    from qcgraph.ir.serialize import PROGRAM, load_program

    for name in (PROGRAM, WEIGHTS):
        bundle.file(name)  # other files than those that the manifest vouches for are not run
    if threads is not None:
        torch.set_num_threads(threads)
    with reading(bundle, [PROGRAM, WEIGHTS]):
        stored = load_program(bundle.path)
        # Copies, because safetensors maps the file into memory.
        program = replace(stored, constants={name: value.clone() for name, value in stored.constants.items()})
        for variant in program.variants:
            program.module(variant)  # made once, before several threads ask for it
    return TorchRunner(program)
