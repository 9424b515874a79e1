"""Recorded trajectories on which every step computes, and how an error at one step changes the final latents.

The functions take a program whose variants exist (after insert-cache), quantized or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from qcgraph.errors import UsageError
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.calibration import calibration_conditions, calibration_noise
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.loop import Request, Resumed, Sampler, guided, trajectory
from qcgraph.sampling.runner import Array, Call

DISTURBANCE = 0.02  # size of the added error relative to the prediction, about as large as the error of a skipped step


@dataclass(frozen=True)
class Trajectories:
    """Trajectories on which every step computes.

    Attributes:
        conditions: the conditions of the N trajectories.
        seed: the seed of their noise.
        latents: the latents that each step is given, then the final ones, each f32[N,C,H,W].
        predictions: the guided noise prediction of each step, f32[N,C,H,W].
        exact: the same in full precision, for the same latents; empty where the program is in full precision.
        values: the cached values by name and step, both halves of guidance in a batch.
    """

    conditions: Conditions
    seed: int
    latents: tuple[Array, ...]
    predictions: tuple[Array, ...]
    exact: tuple[Array, ...]
    values: Mapping[str, tuple[Tensor, ...]]

    def first(self, count: int) -> Trajectories:
        """Return the first ``count`` trajectories, without their cached values."""
        latents, predictions = (tuple(array[:count] for array in arrays) for arrays in (self.latents, self.predictions))
        return Trajectories(self.conditions[:count], self.seed, latents, predictions, (), {})


class _Recorder:
    """A runner that keeps the cached values of every call."""

    def __init__(self, program: Program) -> None:
        self._runner = TorchRunner(program)
        self.values: dict[str, list[Tensor]] = {}

    def run(self, call: Call) -> Array:
        made: dict[tuple[str, int], object] = {}
        prediction = self._runner.run(replace(call, state=made))
        for (name, age), value in made.items():
            assert isinstance(value, Tensor)
            if not age:
                self.values.setdefault(name, []).append(value)
        return prediction


def record(program: Program, count: int, seed: int, progress: Progress, origin: Program | None = None) -> Trajectories:
    """Sample calibration trajectories on which every step computes, and record them.

    Args:
        program: the program.
        count: the number of trajectories.
        seed: the seed of conditions and noise.
        progress: reports the steps.
        origin: the captured model in full precision, whose predictions for the same latents are recorded too.

    Raises:
        UsageError: the final latents are not finite.
    """
    plan, spec = program.facts[StepPlan], program.facts[ModelSpec]
    every = plan.all_computing
    conditions = calibration_conditions(count, seed, spec)
    recorder = _Recorder(program)
    noise = calibration_noise(count, seed, spec)
    request, sampler = Request(recorder, every, spec), Sampler(every, noise)
    latents, predictions, exact = [noise.initial()], [], []
    judge = None if origin is None else _exact_denoising(origin, every, spec)
    ticks = iter(progress.track(every.steps, "trajectories"))
    for taken in trajectory(request, sampler, every, spec, conditions, latents[0]):
        next(ticks)
        predictions.append(taken.prediction)
        latents.append(taken.after)
        if judge is not None:
            exact.append(guided(judge, taken.index, taken.latent, conditions, every, spec))
    if not np.isfinite(latents[-1]).all():
        raise UsageError(
            "the model draws latents that are not finite",
            hint="sample with it before compiling; its weights or its noise schedule may be wrong",
        )
    values = {name: tuple(found) for name, found in recorder.values.items()}
    return Trajectories(conditions, seed, tuple(latents), tuple(predictions), tuple(exact), values)


def _exact_denoising(origin: Program, plan: StepPlan, spec: ModelSpec) -> Request:
    """Return the denoising of the captured model at the steps of a plan."""
    like = origin.facts[StepPlan]
    steps = tuple(replace(step, variant=like.computing) for step in plan.steps)
    return Request(TorchRunner(origin), replace(plan, steps=steps, roles=like.roles), spec)


def weights(
    program: Program, trajectories: Trajectories, measured: int, samples: int, progress: Progress
) -> npt.NDArray[np.float64]:
    """Return the weight in the final latent of an error of the noise prediction at each step, f64[T].

    A small random error is added at a step and sampling goes on. The weight is the size of the error in the final
    latent over the size of the added error. Between measured steps, it is the solver's coefficient of the prediction
    times the interpolated ratio of weight and coefficient.

    Args:
        program: the program.
        trajectories: the recorded trajectories.
        measured: the number of measured steps; 0 returns the solver's coefficients alone.
        samples: the number of trajectories to measure on.
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
        ratios.append(np.sqrt(np.median(grown)) / solver[index])  # a mean would follow single trajectories
    return solver * np.interp(np.arange(len(plan)), chosen, ratios)


def _continued(program: Program, trajectories: Trajectories, index: int, prediction: Array) -> Array:
    """Return the final latents [N,C,H,W] of trajectories after ``prediction`` at step ``index``."""
    plan, spec, conditions = program.facts[StepPlan], program.facts[ModelSpec], trajectories.conditions
    every = plan.all_computing
    noise = calibration_noise(len(conditions), trajectories.seed, spec)
    noise.initial()
    sampler, resumed = Sampler(every, noise), Resumed(TorchRunner(program), every, spec)
    for before in range(index):  # so that the noise and the history of multistep solvers are as recorded
        sampler.update(before, trajectories.latents[before], trajectories.predictions[before])
    latent = sampler.update(index, trajectories.latents[index], prediction)
    for taken in trajectory(resumed, sampler, every, spec, conditions, latent, start=index + 1):
        latent = taken.after
    return latent
