"""Collect the samples of one setting: final latents, squared errors after every update, and standard deviations."""

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
BROKEN = 1e30  # the squared error of a latent that is not finite


@dataclass(frozen=True)
class Trajectory:
    """The latents of full precision from one seed, after every moment of the setting: f32[N,C,H,W] each."""

    latents: tuple[Array, ...]

    @classmethod
    def draw(cls, setting: Setting, conditions: Conditions, seed: int) -> Trajectory:
        """Sample a setting, and keep the latents of its moments."""
        latents: list[Array] = []

        def keep(taken: TakenStep) -> None:
            if taken.index in setting.moments:
                latents.append(taken.after)

        assert setting.draw is not None
        setting.draw(conditions, seed, keep)
        return cls(tuple(latents))


@dataclass(frozen=True)
class Tally:
    """The collected samples of one setting.

    Attributes:
        setting: the setting of the samples.
        finals: the final latents, f32[S,N,C,H,W]; values that are not finite are zero.
        errors: mean squared error of the latents of every moment against full precision, f64[S,moments,N]; of the final
            latents only, if there are no moments. For full precision itself, the mean square that errors refer to.
        deviations: standard deviation of the latents of every moment, f64[moments,C]; empty if there are none.
        is_finite: whether all values of the final latents are finite.
    """

    setting: Setting
    finals: Array
    errors: Values
    deviations: Values
    is_finite: bool


class Tallying:
    """Collects a `Tally`, seed after seed.

    Args:
        setting: the setting that is sampled.
        steps: number of steps of the plan.
        channels: latent channels.
    """

    def __init__(self, setting: Setting, steps: int, channels: int) -> None:
        self._setting = setting
        self._finals: list[Array] = []
        self._errors: list[Values] = []
        self._spread = LatentStatistics(steps, channels)

    def take(self, trajectory: Trajectory) -> None:
        """Add a trajectory of full precision."""
        for index, latent in enumerate(trajectory.latents):
            self._spread.add(index, latent)
        self._finals.append(trajectory.latents[-1])
        self._errors.append(np.stack([mean_squares(latent) for latent in trajectory.latents]))

    def add(self, conditions: Conditions, seed: int, exact: Trajectory) -> None:
        """Sample with a seed, and compare the samples with full precision."""
        assert self._setting.draw is not None
        errors: list[Values] = []
        places = {step: place for place, step in enumerate(self._setting.moments)}

        def compare(taken: TakenStep) -> None:
            place = places.get(taken.index)
            if place is not None:
                errors.append(mean_squares(taken.after, exact.latents[place]))
                self._spread.add(place, taken.after)

        final = self._setting.draw(conditions, seed, compare)
        self._finals.append(final)
        self._errors.append(np.stack(errors) if errors else mean_squares(final, exact.latents[-1])[None])

    def tally(self) -> Tally:
        """Return the collected samples."""
        finals = np.stack(self._finals)
        return Tally(
            setting=self._setting,
            finals=np.nan_to_num(finals, nan=0.0, posinf=0.0, neginf=0.0),
            errors=np.stack(self._errors),
            deviations=self._spread.deviations if self._setting.moments else np.zeros((0, 0)),
            is_finite=bool(np.isfinite(finals).all()),
        )


def mean_squares(latents: Array, reference: Array | None = None) -> Values:
    """Return the mean square of each latent [N,C,H,W], or of its difference from a reference, f64[N]."""
    wide = latents.astype(np.float64)
    difference = wide if reference is None else wide - reference
    means = (difference.reshape(len(wide), -1) ** 2).mean(axis=1)
    return np.nan_to_num(means, nan=BROKEN, posinf=BROKEN).clip(max=BROKEN)
