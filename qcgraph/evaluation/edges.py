"""Cached edges: the quantization noise that a cache carries on, against the change that it leaves out."""

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

TRAJECTORIES = 8  # fewer for large models
MACS = 1e12  # multiply-accumulates that they may cost, about half a minute on two cores
PROGRAMS = 2  # run on every step: float and quantized
LEAST_SNR = 0.0  # dB; below, the cache carries more noise than it leaves out change


@dataclass(frozen=True)
class CachedEdge:
    """A value that is carried from computing steps to reusing ones.

    Attributes:
        name: the cache tensor.
        noise: relative L2 error that quantization makes in it at a computing step.
        change: relative L2 change of it from one step to the next, in full precision.
    """

    name: str
    noise: float
    change: float

    @property
    def snr(self) -> float:
        """The step-to-step change over the quantization noise, dB: what is worth computing anew over what spoils it."""
        return float(20 * np.log10(self.change / self.noise)) if self.noise else float("inf")

    @property
    def is_safe(self) -> bool:
        """Whether the change is above the noise."""
        return self.snr >= LEAST_SNR


def measure_edges(program: Program, origin: Program, seed: int, progress: Progress) -> tuple[CachedEdge, ...]:
    """Noise and change of every cache tensor of a quantized program, on a few trajectories of the cached float model.

    Args:
        program: the compiled program.
        origin: the model it was compiled from, captured.
        seed: the seed of the trajectories; they are calibration trajectories.
        progress: reports the steps.

    Returns:
        One entry a cache tensor; none when nothing is quantized, or nothing is cached.
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
    """Runs the float program; wherever it writes a cache, the quantized one computes it from the same input."""

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
        """What was found."""
        return tuple(
            CachedEdge(name, noise=_root_mean_square(noise), change=_root_mean_square(self._change[name]))
            for name, noise in self._noise.items()
            if name in self._change
        )


def _relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def _root_mean_square(values: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
