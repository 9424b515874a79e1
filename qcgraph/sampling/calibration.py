"""Trajectories and streaming statistics that calibration passes share. NumPy only."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling import conditions
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.loop import TakenStep, sample
from qcgraph.sampling.noise import Noise
from qcgraph.sampling.runner import Array, Runner

FIRST_INDEX = 1_000_000_000  # index of the first calibration sample, so that no sample of a user shares its noise


def calibration_conditions(count: int, seed: int, spec: ModelSpec) -> Conditions:
    """Return the conditions of calibration trajectories: every class equally often if the count allows, shuffled.

    Raises:
        UsageError: the model has a condition without known values.
    """
    return conditions.drawn(count, np.random.default_rng([seed, FIRST_INDEX]), spec)


def sample_calibration(
    runner: Runner,
    plan: StepPlan,
    spec: ModelSpec,
    count: int,
    seed: int,
    *,
    batch: int | None = None,
    observe: Callable[[TakenStep], None] | None = None,
    progress: Progress | None = None,
) -> Array:
    """Return the final latents [N,C,H,W] of calibration trajectories; they depend on count and seed, not on the caller.

    Args:
        runner: the backend.
        plan: the step plan.
        spec: the specification of the denoiser.
        count: the number of trajectories.
        seed: the seed of conditions and noise.
        batch: the number of trajectories that run together; all of them when None.
        observe: see `qcgraph.sampling.loop.sample`.
        progress: reports the steps.
    """
    return sample(
        runner,
        plan,
        spec,
        calibration_conditions(count, seed, spec),
        seed,
        batch=batch or count,
        first_index=FIRST_INDEX,
        observe=observe,
        progress=progress,
    )


def calibration_noise(count: int, seed: int, spec: ModelSpec) -> Noise:
    """Return the noise of calibration trajectories, for passes that walk them without `sample_calibration`."""
    return Noise(seed, range(FIRST_INDEX, FIRST_INDEX + count), spec.latent_shape)


def encode_latents(latents: Array) -> str:
    """Return latents f32[N,C,H,W] as the text that facts hold: little-endian, as base64."""
    return base64.b64encode(np.ascontiguousarray(latents, dtype="<f4").tobytes()).decode()


def decode_latents(text: str, shape: tuple[int, ...]) -> Array:
    """Return the latents f32[N,*shape] of a text that `encode_latents` made."""
    flat = np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32)
    return flat.reshape(-1, *shape)


class LatentStatistics:
    """Streaming mean and standard deviation of latents per step and channel, in float64.

    Args:
        steps: the number of steps.
        channels: the number of latent channels.
    """

    def __init__(self, steps: int, channels: int) -> None:
        self._count = np.zeros(steps)
        self._sum = np.zeros((steps, channels))
        self._squares = np.zeros((steps, channels))

    def add(self, step: int, latent: Array) -> None:
        """Add latents [B,C,H,W] of a step."""
        values = latent.astype(np.float64)
        self._count[step] += values.shape[0] * values.shape[2] * values.shape[3]
        self._sum[step] += values.sum(axis=(0, 2, 3))
        self._squares[step] += (values**2).sum(axis=(0, 2, 3))

    @property
    def means(self) -> npt.NDArray[np.float64]:
        """The means, [steps, channels]."""
        result: Any = self._sum / self._count[:, None]
        return np.asarray(result)

    @property
    def deviations(self) -> npt.NDArray[np.float64]:
        """The standard deviations, [steps, channels]."""
        variance = self._squares / self._count[:, None] - self.means**2
        return np.sqrt(np.maximum(variance, 0.0))


def as_tuples(table: npt.NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    """Return a table as nested tuples, the form that facts hold."""
    return tuple(tuple(float(value) for value in row) for row in table)
