"""Recorded trajectories on which every step computed, and what an error at one of their steps does to the end.

Both take a program whose variants exist (after insert-cache), quantized or not, as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from qcgraph.errors import UsageError
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.plan.schedule import FULL
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import Step, StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.cache_state import State
from qcgraph.sampling.calibration import calibration_labels, calibration_noise
from qcgraph.sampling.loop import Array, Request, Runner, Sampler, guided, step_inputs

DISTURBANCE = 0.02  # of the prediction's own size, about what a skipped step leaves


@dataclass(frozen=True)
class Trajectories:
    """Trajectories on which every step computed.

    Attributes:
        labels: i64[N].
        seed: of their noise.
        latents: per step, what the denoiser was given, f32[N,C,H,W]; one more, the final ones.
        predictions: per step, the guided noise prediction f32[N,C,H,W].
        values: by cached value and step, both halves of guidance in a batch.
    """

    labels: npt.NDArray[np.int64]
    seed: int
    latents: tuple[Array, ...]
    predictions: tuple[Array, ...]
    values: Mapping[str, tuple[Tensor, ...]]

    def first(self, count: int) -> Trajectories:
        """The first so many of them, without the cached values."""
        latents, predictions = (tuple(array[:count] for array in arrays) for arrays in (self.latents, self.predictions))
        return Trajectories(self.labels[:count], self.seed, latents, predictions, {})


class _Recorder:
    """A runner that keeps the cached values of every call."""

    def __init__(self, program: Program) -> None:
        self._runner = TorchRunner(program)
        self.values: dict[str, list[Tensor]] = {}

    def run(self, variant: str, inputs: Mapping[str, npt.NDArray[np.generic]], state: State) -> Array:
        made: dict[str, object] = {}
        prediction = self._runner.run(variant, inputs, made)
        for name, value in made.items():
            assert isinstance(value, Tensor)
            self.values.setdefault(name, []).append(value)
        return prediction


def record(program: Program, count: int, seed: int, progress: Progress) -> Trajectories:
    """Sample calibration trajectories on which every step computes, and keep all of it.

    Args:
        program: the program.
        count: how many.
        seed: of labels and noise.
        progress: reports the steps.

    Raises:
        UsageError: their latents are not finite.
    """
    plan, spec = program.facts[StepPlan], program.facts[ModelSpec]
    every = plan.throughout(FULL)
    labels = np.asarray(calibration_labels(count, seed, spec), dtype=np.int64)
    recorder = _Recorder(program)
    noise = calibration_noise(count, seed, spec)
    request, sampler = Request(recorder, every), Sampler(every, noise)
    latents, predictions = [noise.initial()], []
    for step in progress.track(every.steps, "trajectories"):
        predictions.append(guided(request, latents[-1], step, labels, every, spec))
        latents.append(sampler.update(latents[-1], predictions[-1], step))
    if not np.isfinite(latents[-1]).all():
        raise UsageError(
            "the model draws latents that are not finite",
            hint="sample with it before compiling; its weights or its noise schedule may be wrong",
        )
    values = {name: tuple(found) for name, found in recorder.values.items()}
    return Trajectories(labels, seed, tuple(latents), tuple(predictions), values)


def weights(
    program: Program, trajectories: Trajectories, measured: int, samples: int, progress: Progress
) -> npt.NDArray[np.float64]:
    """How much an error of the noise prediction at each step weighs in the final latent, f64[T].

    A small random error is added at a step and sampling goes on: the size of what comes out over that of what went
    in. Steps between measured ones take the solver's coefficient of the prediction, times the measured ratio to it.

    Args:
        program: the program.
        trajectories: recorded ones.
        measured: at how many steps it is measured; 0 for the solver's coefficients alone.
        samples: on how many of the trajectories.
        progress: reports the steps.
    """
    plan = program.facts[StepPlan]
    solver = np.array([max(abs(step.update.noise_prediction), 1e-12) for step in plan.steps])
    if not measured:
        return solver
    chosen = np.unique(np.linspace(0, len(plan) - 1, measured).round().astype(int))
    generator, few = np.random.default_rng(trajectories.seed), trajectories.first(samples)
    ratios = []
    for index in progress.track([int(step) for step in chosen], "weights"):
        prediction = few.predictions[index]
        size = DISTURBANCE * np.sqrt(np.mean(np.square(prediction)))
        error = size * generator.standard_normal(prediction.shape, dtype=np.float32)
        final = _continued(program, few, index, prediction + error)
        grown = np.square(final - few.latents[-1]).mean(axis=(1, 2, 3)) / np.square(error).mean(axis=(1, 2, 3))
        ratios.append(np.sqrt(np.median(grown)) / solver[index])  # single trajectories tip over and would outweigh all
    return solver * np.interp(np.arange(len(plan)), chosen, ratios)


def _continued(program: Program, trajectories: Trajectories, index: int, prediction: Array) -> Array:
    """The final latents [N,C,H,W] of trajectories, had step ``index`` predicted this."""
    plan, spec, labels = program.facts[StepPlan], program.facts[ModelSpec], trajectories.labels
    every = plan.throughout(FULL)
    noise = calibration_noise(len(labels), trajectories.seed, spec)
    noise.initial()
    sampler, runner = Sampler(every, noise), TorchRunner(program)
    for step, latent, known in zip(every.steps[:index], trajectories.latents, trajectories.predictions, strict=False):
        sampler.update(latent, known, step)  # for the noise that it draws, and for solvers that look back
    latent = sampler.update(trajectories.latents[index], prediction, every.steps[index])
    for step in every.steps[index + 1 :]:
        prediction = guided(OneStep(runner, step, {}), latent, step, labels, every, spec)
        latent = sampler.update(latent, prediction, step)
    return latent


class OneStep:
    """Runs one step in a given state."""

    def __init__(self, runner: Runner, step: Step, state: State) -> None:
        self._runner, self._step, self._state = runner, step, state

    def denoise(self, latent: Array, timestep: float, class_label: npt.NDArray[np.int64]) -> Array:
        return self._runner.run(self._step.variant, step_inputs(self._step, latent, class_label), self._state)
