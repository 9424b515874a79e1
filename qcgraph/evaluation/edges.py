"""Compare the quantization noise that a cached edge passes on with the change that reusing leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qcgraph.evaluation.ablation import is_quantized, without_quantization
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.pipeline.calibration_budget import affordable, trajectory_macs
from qcgraph.plan.roles import TensorRole
from qcgraph.plan.spec import Interface, ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.calibration import sample_calibration
from qcgraph.sampling.runner import Array, Call

TRAJECTORIES = 8  # the most trajectories that are measured; large models take fewer
MACS = 1e12  # multiply-accumulates for all trajectories, about half a minute on two cores
PROGRAMS = 2  # programs that run every step: float and quantized
LEAST_SNR = 0.0  # dB; below it, the noise in the cache exceeds the change that reusing leaves out


@dataclass(frozen=True)
class CachedEdge:
    """A value that is passed from computing steps to reusing steps.

    Attributes:
        name: the cache tensor.
        noise: relative L2 error of the tensor from quantization at a computing step.
        change: relative L2 change of the tensor from one step to the next, in full precision.
    """

    name: str
    noise: float
    change: float

    @property
    def snr(self) -> float:
        """The ratio of step-to-step change to quantization noise, dB: the loss by reuse over that by quantization."""
        return float(20 * np.log10(self.change / self.noise)) if self.noise else float("inf")

    @property
    def is_safe(self) -> bool:
        """Whether the change is at least as large as the noise."""
        return self.snr >= LEAST_SNR


def measure_edges(program: Program, origin: Program, seed: int, progress: Progress) -> tuple[CachedEdge, ...]:
    """Measure noise and change of every cached tensor of a quantized program, on trajectories of its float model.

    Args:
        program: the compiled program.
        origin: the captured model that it was compiled from.
        seed: the seed of the trajectories; they are calibration trajectories.
        progress: receives progress messages.

    Returns:
        One entry for each cached tensor; empty if the program is not quantized or caches nothing.
    """
    plan, spec = program.facts[StepPlan], program.facts[ModelSpec]
    if not is_quantized(program) or len(plan.variants) < 2:
        return ()
    exact = without_quantization(program, origin)
    count = affordable(PROGRAMS * trajectory_macs(origin), MACS, (1, TRAJECTORIES))
    progress.note(f"measuring the cached edges on {count} trajectories")
    runner = _Comparing(exact, program)
    sample_calibration(runner, plan, spec, count, seed, progress=progress)
    return runner.edges()


class _Comparing:
    """Runs the float program; at every step that writes a cache, the quantized one runs on the same input."""

    def __init__(self, exact: Program, quantized: Program) -> None:
        self._exact = TorchRunner(exact)
        self._quantized = quantized
        self._last: dict[str, tuple[int, torch.Tensor]] = {}
        self._noise: dict[str, list[float]] = {}
        self._change: dict[str, list[float]] = {}

    def run(self, call: Call) -> Array:
        prediction = self._exact.run(call)
        interface = self._quantized.variants[call.variant].interface
        if interface.caches:
            self._compare(call, interface)
        return prediction

    def _compare(self, call: Call, interface: Interface) -> None:
        values = {name: torch.from_numpy(value) for name, value in call.inputs.items()}
        for spec in interface.taken(TensorRole.CACHE):
            value = call.state[spec.value, spec.age]
            assert isinstance(value, torch.Tensor)
            values[spec.name] = value
        found = self._quantized.run(call.variant, values)
        for spec in interface.caches:
            exact = call.state[spec.value, 0]
            assert isinstance(exact, torch.Tensor)
            self._noise.setdefault(spec.value, []).append(_relative(found[spec.name], exact))
            if spec.value in self._last:
                before, value = self._last[spec.value]
                self._change.setdefault(spec.value, []).append(_relative(value, exact) / (call.index - before))
            self._last[spec.value] = (call.index, exact)

    def edges(self) -> tuple[CachedEdge, ...]:
        """Return the measured edges."""
        return tuple(
            CachedEdge(name, noise=_root_mean_square(noise), change=_root_mean_square(self._change[name]))
            for name, noise in self._noise.items()
            if name in self._change
        )


def _relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def _root_mean_square(values: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
