"""Facts that calibration observes."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class SiteRange:
    """Range statistics of the activation that enters one site, with an entry for every step that runs the site.

    Attributes:
        steps: the indices of these steps, rising.
        lows: the smallest value of each step that is expected of many samples (see `calibrate`).
        highs: the largest value of each step that is expected of many samples.
        mean_squares: the mean of the squared values of each step.
    """

    steps: tuple[int, ...]
    lows: tuple[float, ...]
    highs: tuple[float, ...]
    mean_squares: tuple[float, ...]

    @property
    def widths(self) -> tuple[float, ...]:
        """The largest less the smallest value of each step."""
        return tuple(high - low for low, high in zip(self.lows, self.highs, strict=True))

    def over(self, steps: Collection[int]) -> tuple[float, float]:
        """Return the smallest and largest value over the given steps, or over all if none of them runs the site."""
        places = [place for place, step in enumerate(self.steps) if step in steps] or range(len(self.steps))
        return min(self.lows[place] for place in places), max(self.highs[place] for place in places)

    @property
    def is_finite(self) -> bool:
        """Whether all values were finite at all steps."""
        return all(math.isfinite(value) for value in (*self.lows, *self.highs, *self.mean_squares))


@dataclass(frozen=True)
class Ranges:
    """Calibrated activation ranges.

    Attributes:
        planned: the ranges of each site on the trajectory that the step plan takes (cached when it caches).
        full: the ranges of each site on the full-precision trajectory that computes every step.
        trajectories: the number of observed trajectories.
    """

    planned: dict[str, SiteRange]
    full: dict[str, SiteRange]
    trajectories: int

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of the plan that run any site, rising."""
        return tuple(sorted({step for site in self.planned.values() for step in site.steps}))

    def change(self, site: str) -> float:
        """Return the largest difference of a site's range between the two trajectories, relative to full precision."""
        full = dict(zip(self.full[site].steps, self.full[site].widths, strict=True))
        planned = zip(self.planned[site].steps, self.planned[site].widths, strict=True)
        return max(abs(width - full[step]) / full[step] if full[step] > 0 else 0.0 for step, width in planned)

    def lines(self) -> list[str]:
        """Return the lines about this fact in the text of a program."""
        return [f"ranges of {len(self.planned)} sites at {len(self.steps)} steps, {self.trajectories} trajectories"]


@dataclass(frozen=True)
class Reference:
    """Statistics of the full-precision latent after every sampler update, over samples and positions.

    Attributes:
        means: the mean by step and channel.
        deviations: the standard deviation by step and channel.
        seed: the seed of the noise and of the conditions that the trajectories started from.
        trajectories: the number of trajectories.
    """

    means: tuple[tuple[float, ...], ...]
    deviations: tuple[tuple[float, ...], ...]
    seed: int
    trajectories: int

    def lines(self) -> list[str]:
        """Return the lines about this fact in the text of a program."""
        return [f"reference latent statistics at {len(self.means)} steps, {self.trajectories} trajectories"]


@dataclass(frozen=True)
class CalibrationSet:
    """The inputs that quantization is decided on: latents that computing steps of the plan are given.

    Attributes:
        method: the method that selected them from the pool.
        pool: the number of latents in the pool.
        steps: the index of the step of each latent.
        conditions: for each condition by name, its value for each latent.
        latents: f32[N,C,H,W], little-endian, as base64.
    """

    method: str
    pool: int
    steps: tuple[int, ...]
    conditions: dict[str, tuple[int | float, ...]]
    latents: str

    def lines(self) -> list[str]:
        """Return the lines about this fact in the text of a program."""
        return [f"calibration set {len(self.steps)} of {self.pool} latents, selected by {self.method}"]
