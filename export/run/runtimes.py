"""The runtimes in one table, a row each. No torch, unless a runtime that needs it is opened.

A new runtime needs a module that makes its runners, and a row here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qcgraph.bundle import Bundle
from qcgraph.errors import UsageError, closest
from qcgraph.export.targets import Target
from qcgraph.plan.spec import Interface
from qcgraph.sampling.runner import Runner

if TYPE_CHECKING:
    from qcgraph.ir.program import Program

ONNXRUNTIME = "onnxruntime"
TORCH = "torch"  # the reference, which runs every program


@dataclass(frozen=True)
class Exported:
    """A legal program and the folder that it was exported to.

    Attributes:
        program: the program after legalization.
        folder: the folder of its graphs and weights; a runtime that runs programs reads nothing there.
        interfaces: inputs and outputs by variant.
        constants: the constants of the program that differ from those in the folder, by name.
    """

    program: Program
    folder: Path
    interfaces: Mapping[str, Interface]
    constants: Mapping[str, npt.NDArray[np.generic]] = field(default_factory=dict)


Source: TypeAlias = Bundle | Exported
Opener: TypeAlias = Callable[[Target, Source, int | None], Runner]


@dataclass(frozen=True)
class Runtime:
    """The software that runs a compilation.

    Attributes:
        name: its name in targets and on the command line.
        title: its name in reports.
        module: its Python module.
        types: the floating-point types that it runs.
        reads_graphs: whether it runs exported graphs; any other runtime runs the program.
        open: returns a runner for a target and a bundle or exported program, with a number of threads, or all cores.
    """

    name: str
    title: str
    module: str
    types: tuple[str, ...]
    reads_graphs: bool
    open: Opener

    @property
    def is_here(self) -> bool:
        """Whether its module is installed; a GPU that it needs is looked for when it is opened."""
        return importlib.util.find_spec(self.module) is not None


def _open_onnxruntime(target: Target, source: Source, threads: int | None) -> Runner:
    from qcgraph.export.run.onnxruntime import open_bundle, open_exported

    return (
        open_bundle(target, source, threads) if isinstance(source, Bundle) else open_exported(target, source, threads)
    )


def _open_torch(target: Target, source: Source, threads: int | None) -> Runner:
    from qcgraph.export.run.torch import open_bundle, open_exported

    return open_bundle(source, threads) if isinstance(source, Bundle) else open_exported(source, threads)


def _open_tensorrt(provider: str) -> Opener:
    """Return a function that opens the engines of a provider."""

    def opened(target: Target, source: Source, threads: int | None) -> Runner:
        from qcgraph.export.run.open_engines import open_bundle

        if not isinstance(source, Bundle):
            raise UsageError("engines run from a bundle alone", hint="write the bundle, then run qcgraph build on it")
        return open_bundle(source, provider, threads)

    return opened


RUNTIMES: Mapping[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        # ONNX Runtime has no kernels for bfloat16 on the CPU.
        Runtime(
            ONNXRUNTIME,
            "ONNX Runtime on the CPU",
            "onnxruntime",
            ("f32", "f16"),
            reads_graphs=True,
            open=_open_onnxruntime,
        ),
        Runtime(TORCH, "PyTorch on the CPU", "torch", ("f32", "f16", "bf16"), reads_graphs=False, open=_open_torch),
        Runtime(
            "tensorrt",
            "TensorRT",
            "tensorrt",
            ("f32", "f16", "bf16"),
            reads_graphs=True,
            open=_open_tensorrt("tensorrt"),
        ),
        Runtime(
            "tensorrt-rtx",
            "TensorRT-RTX",
            "tensorrt_rtx",
            ("f32", "f16", "bf16"),
            reads_graphs=True,
            open=_open_tensorrt("tensorrt-rtx"),
        ),
    )
}


def runtime_named(name: Any) -> Runtime:
    """Return a runtime by its name.

    Raises:
        UsageError: there is no such runtime.
    """
    if name not in RUNTIMES:
        raise UsageError(f"unknown backend {name!r}", hint=closest(str(name), RUNTIMES))
    return RUNTIMES[name]


def runtime_for(target: Target, precision: str) -> Runtime:
    """Return the default runtime of a target's programs.

    This is the target's stand-in, or else its own runtime; and PyTorch where this runtime lacks the floating-point
    type.

    Args:
        target: the target.
        precision: the floating-point type of values that are not quantized.
    """
    runtime = runtime_named(target.stand_in or target.runtime)
    return runtime if precision in runtime.types else RUNTIMES[TORCH]
