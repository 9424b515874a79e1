"""Cached edges: the quantization noise that a cache carries on, against the change that it leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from qcgraph.evaluation.ablation import is_quantized, without_quantization
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.pipeline.effort import affordable, trajectory_macs
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.cache_state import State
from qcgraph.sampling.calibration import sample_calibration
from qcgraph.sampling.loop import Array

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
    count = affordable(PROGRAMS * trajectory_macs(origin, "main"), MACS, (1, TRAJECTORIES))
    progress.note(f"measuring the cached edges on {count} trajectories")
    runner = _Comparing(exact, program, plan)
    sample_calibration(runner, plan, spec, count, seed, progress=progress)
    return runner.edges()


class _Comparing:
    """Runs the float program; wherever it writes a cache, the quantized one computes it from the same input."""

    def __init__(self, exact: Program, quantized: Program, plan: StepPlan) -> None:
        self._exact = TorchRunner(exact)
        self._quantized = quantized
        self._plan = plan
        self._last: dict[str, tuple[int, torch.Tensor]] = {}
        self._noise: dict[str, list[float]] = {}
        self._change: dict[str, list[float]] = {}

    def run(self, variant: str, inputs: Mapping[str, npt.NDArray[np.generic]], state: State) -> Array:
        prediction = self._exact.run(variant, inputs, state)
        written = self._quantized.variants[variant].interface.output_names[1:]
        if written:
            self._compare(variant, inputs, state, written)
        return prediction

    def _compare(
        self, variant: str, inputs: Mapping[str, npt.NDArray[np.generic]], state: State, written: Sequence[str]
    ) -> None:
        index = self._plan.index_of(float(inputs["timestep"].flat[0]))
        values = {name: torch.from_numpy(value) for name, value in inputs.items()}
        values |= {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        found = self._quantized.run(variant, values)
        for name in written:
            exact = state[name]
            assert isinstance(exact, torch.Tensor)
            self._noise.setdefault(name, []).append(_relative(found[name], exact))
            if name in self._last:
                before, value = self._last[name]
                self._change.setdefault(name, []).append(_relative(value, exact) / (index - before))
            self._last[name] = (index, exact)

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
