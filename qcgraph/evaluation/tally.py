"""What is kept of the samples of one setting: final latents, squared errors after every update, and spread."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcgraph.evaluation.settings import Setting
from qcgraph.sampling.calibration import LatentStatistics
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.loop import TakenStep
from qcgraph.sampling.runner import Array

Values = npt.NDArray[np.float64]
BROKEN = 1e30  # stands for the squared error of a latent that is not finite


@dataclass(frozen=True)
class Trajectory:
    """The latents of full precision from one seed, after every update: f32[N,C,H,W] each."""

    latents: tuple[Array, ...]

    @classmethod
    def draw(cls, setting: Setting, conditions: Conditions, seed: int) -> Trajectory:
        """Sample a setting and keep every latent."""
        latents: list[Array] = []

        assert setting.draw is not None
        setting.draw(conditions, seed, lambda taken: latents.append(taken.after))
        return cls(tuple(latents))


@dataclass(frozen=True)
class Tally:
    """What is kept of one setting.

    Attributes:
        setting: what was sampled.
        finals: the final latents, f32[S,N,C,H,W]; what is not finite is zero.
        errors: mean squared error of every latent against full precision, f64[S,steps,N]; of the final latents only
            where the steps are not those of the plan. Of full precision itself, the mean square: what errors are
            relative to.
        deviations: standard deviation of the latents after every update, f64[steps,C]; empty where the steps are not
            those of the plan.
        is_finite: whether every final latent is.
    """

    setting: Setting
    finals: Array
    errors: Values
    deviations: Values
    is_finite: bool


class Tallying:
    """Collects a `Tally`, seed after seed.

    Args:
        setting: what is sampled.
        steps: number of steps of the plan.
        channels: latent channels.
    """

    def __init__(self, setting: Setting, steps: int, channels: int) -> None:
        self._setting = setting
        self._finals: list[Array] = []
        self._errors: list[Values] = []
        self._spread = LatentStatistics(steps, channels)

    def take(self, trajectory: Trajectory) -> None:
        """Count in a seed of full precision."""
        for index, latent in enumerate(trajectory.latents):
            self._spread.add(index, latent)
        self._finals.append(trajectory.latents[-1])
        self._errors.append(np.stack([mean_squares(latent) for latent in trajectory.latents]))

    def add(self, conditions: Conditions, seed: int, exact: Trajectory) -> None:
        """Sample a seed and compare it with full precision."""
        assert self._setting.draw is not None
        errors: list[Values] = []

        def compare(taken: TakenStep) -> None:
            errors.append(mean_squares(taken.after, exact.latents[taken.index]))
            self._spread.add(taken.index, taken.after)

        final = self._setting.draw(conditions, seed, compare if self._setting.planned else None)
        self._finals.append(final)
        self._errors.append(np.stack(errors) if errors else mean_squares(final, exact.latents[-1])[None])

    def tally(self) -> Tally:
        """What was collected."""
        finals = np.stack(self._finals)
        return Tally(
            setting=self._setting,
            finals=np.nan_to_num(finals, nan=0.0, posinf=0.0, neginf=0.0),
            errors=np.stack(self._errors),
            deviations=self._spread.deviations if self._setting.planned else np.zeros((0, 0)),
            is_finite=bool(np.isfinite(finals).all()),
        )


def mean_squares(latents: Array, reference: Array | None = None) -> Values:
    """The mean square of each latent [N,C,H,W], or of its difference to a reference, f64[N]."""
    wide = latents.astype(np.float64)
    difference = wide if reference is None else wide - reference
    means = (difference.reshape(len(wide), -1) ** 2).mean(axis=1)
    return np.nan_to_num(means, nan=BROKEN, posinf=BROKEN).clip(max=BROKEN)
