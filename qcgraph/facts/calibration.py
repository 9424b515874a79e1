"""What calibration saw."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class SiteRange:
    """Range statistics of the activation that enters one site, one entry for every step that runs the site.

    Attributes:
        steps: the indices of those steps, rising.
        lows: smallest value per step.
        highs: largest value per step.
        mean_squares: mean of the squares per step.
    """

    steps: tuple[int, ...]
    lows: tuple[float, ...]
    highs: tuple[float, ...]
    mean_squares: tuple[float, ...]

    @property
    def widths(self) -> tuple[float, ...]:
        """Largest less smallest value, per step."""
        return tuple(high - low for low, high in zip(self.lows, self.highs, strict=True))

    def over(self, steps: Collection[int]) -> tuple[float, float]:
        """Smallest and largest value over some steps; over all where none of them runs the site."""
        places = [place for place, step in enumerate(self.steps) if step in steps] or range(len(self.steps))
        return min(self.lows[place] for place in places), max(self.highs[place] for place in places)

    @property
    def is_finite(self) -> bool:
        """Whether no step saw an infinity or a NaN."""
        return all(math.isfinite(value) for value in (*self.lows, *self.highs, *self.mean_squares))


@dataclass(frozen=True)
class Ranges:
    """Calibrated activation ranges.

    Attributes:
        planned: per site, ranges on the trajectory that the step plan takes (cached when it caches).
        full: per site, ranges on the full-precision trajectory that computes every step.
        trajectories: how many trajectories were observed.
    """

    planned: dict[str, SiteRange]
    full: dict[str, SiteRange]
    trajectories: int

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of the plan that run any site, rising."""
        return tuple(sorted({step for site in self.planned.values() for step in site.steps}))

    def change(self, site: str) -> float:
        """How much the range of a site differs between the two trajectories at most, relative to full precision."""
        full = dict(zip(self.full[site].steps, self.full[site].widths, strict=True))
        planned = zip(self.planned[site].steps, self.planned[site].widths, strict=True)
        return max(abs(width - full[step]) / full[step] if full[step] > 0 else 0.0 for step, width in planned)

    def lines(self) -> list[str]:
        """Return the lines that the text of a program has of it."""
        return [f"ranges of {len(self.planned)} sites at {len(self.steps)} steps, {self.trajectories} trajectories"]


@dataclass(frozen=True)
class Reference:
    """Statistics of the full-precision latent after every sampler update, over samples and positions.

    Attributes:
        means: per step and channel.
        deviations: standard deviation per step and channel.
        seed: the seed of the noise and of the conditions the trajectories started from.
        trajectories: how many trajectories there were.
    """

    means: tuple[tuple[float, ...], ...]
    deviations: tuple[tuple[float, ...], ...]
    seed: int
    trajectories: int

    def lines(self) -> list[str]:
        """Return the lines that the text of a program has of it."""
        return [f"reference latent statistics at {len(self.means)} steps, {self.trajectories} trajectories"]


@dataclass(frozen=True)
class CalibrationSet:
    """The inputs that quantization is decided on: latents that computing steps of the plan are given.

    Attributes:
        method: how they were selected from the pool.
        pool: how many there were to select from.
        steps: the index of the step of each.
        conditions: by name, the value of each condition for each.
        latents: f32[N,C,H,W], little-endian, as base64.
    """

    method: str
    pool: int
    steps: tuple[int, ...]
    conditions: dict[str, tuple[int | float, ...]]
    latents: str

    def lines(self) -> list[str]:
        """Return the lines that the text of a program has of it."""
        return [f"calibration set {len(self.steps)} of {self.pool} latents, selected by {self.method}"]
