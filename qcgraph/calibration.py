"""What calibration passes share: their labels, their noise, and streaming statistics. NumPy only."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qcgraph.spec import ModelSpec

FIRST_INDEX = 1_000_000_000  # calibration samples count from here, so that they never share noise with a user's samples

Array = npt.NDArray[np.float32]


def calibration_labels(count: int, seed: int, spec: ModelSpec) -> list[int]:
    """Class labels of calibration trajectories: every class equally often as far as the count goes, shuffled."""
    generator = np.random.default_rng([seed, FIRST_INDEX])
    rounds = -(-count // spec.class_count)
    labels = np.concatenate([generator.permutation(spec.class_count) for _ in range(rounds)])
    return [int(label) for label in labels[:count]]


class LatentStatistics:
    """Streaming mean and standard deviation of latents per step and channel, in float64.

    Args:
        steps: number of steps.
        channels: latent channels.
    """

    def __init__(self, steps: int, channels: int) -> None:
        self._count = np.zeros(steps)
        self._sum = np.zeros((steps, channels))
        self._squares = np.zeros((steps, channels))

    def add(self, step: int, latent: Array) -> None:
        """Count latents [B,C,H,W] in at a step."""
        values = latent.astype(np.float64)
        self._count[step] += values.shape[0] * values.shape[2] * values.shape[3]
        self._sum[step] += values.sum(axis=(0, 2, 3))
        self._squares[step] += (values**2).sum(axis=(0, 2, 3))

    @property
    def means(self) -> npt.NDArray[np.float64]:
        """[steps, channels]."""
        result: Any = self._sum / self._count[:, None]
        return np.asarray(result)

    @property
    def deviations(self) -> npt.NDArray[np.float64]:
        """Standard deviations, [steps, channels]."""
        variance = self._squares / self._count[:, None] - self.means**2
        return np.sqrt(np.maximum(variance, 0.0))


def rows(table: npt.NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    """A table as nested tuples, the form that facts hold."""
    return tuple(tuple(float(value) for value in row) for row in table)
