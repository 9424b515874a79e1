"""Compute bootstrap intervals over seeds and samples, with NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

REPLICATES = 1000
FEW_REPLICATES = 100  # replicates of functions that take milliseconds each
LEFT_OUT = 12  # one in twelve samples is left out at a time
LEAST_IN_CLASS = 4  # the fewest samples of a class that are resampled within the class
LEVEL = 0.99
TWO_RUNS = 2**0.5  # two runs differ by this factor more than each of them differs from the truth


@dataclass(frozen=True)
class BootstrapEstimate:
    """A measured value, and the interval in which another run with other seeds is expected.

    The samples of every seed are resampled, and the scatter shows how far one run is from the truth. Two runs differ by
    the root of two more, because both scatter, so the interval is wider by this factor than one for the truth.

    Attributes:
        value: the measured value.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} .. {self.high:.4g})"

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


class Bootstrap:
    """Resamples the samples of seeds; every estimate uses the same resampling, so that differences are paired.

    Classes keep their frequencies, because every run has the same classes.

    Args:
        seeds: number of seeds.
        labels: the classes of the samples of each seed.
    """

    def __init__(self, seeds: int, labels: Sequence[int]) -> None:
        generator = np.random.default_rng(0)
        self._strata = _strata(labels)
        self._rows = np.arange(seeds)[None, :, None]
        drawn = [
            members[generator.integers(len(members), size=(REPLICATES, seeds, len(members)))]
            for members in self._strata
        ]
        self._samples = np.concatenate(drawn, axis=-1)

    def estimate(self, function: Callable[..., Values], *values: Values) -> BootstrapEstimate:
        """Estimate a function of the means of values.

        Args:
            function: takes one mean (or an array of means) for each of the values, elementwise.
            values: f64[seeds, samples] each.
        """
        point = float(function(*(value.mean() for value in values)))
        picked = (value[self._rows, self._samples].mean(axis=(1, 2)) for value in values)
        return interval(point, np.asarray(function(*picked), dtype=np.float64))

    def estimate_sets(self, function: Callable[[Values], float], features: Values) -> BootstrapEstimate:
        """Estimate the mean over seeds of a function of a set of samples, such as a distance of distributions.

        Repeated samples would distort such a distance. Samples are therefore left out instead of resampled, a twelfth
        of each class at a time, with deviations scaled to those of resampling (delete-d jackknife; Shao and Wu, 1989).

        Args:
            function: takes the features [samples, F] of one seed.
            features: f64[seeds, samples, F].
        """
        values = np.array([function(part) for part in features])
        left_out = sum(_left_out(members) for members in self._strata)
        scale = np.sqrt((features.shape[1] - left_out) / left_out)
        generator = np.random.default_rng(0)
        replicates = []
        for _ in range(FEW_REPLICATES):
            parts = np.array([function(part[self._kept(generator)]) for part in features])
            replicates.append(np.mean(values + scale * (parts - values)))
        return interval(float(values.mean()), np.asarray(replicates))

    def _kept(self, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        """Return the samples that remain when a part of each class is left out."""
        return np.concatenate([generator.permutation(members)[_left_out(members) :] for members in self._strata])


def _strata(labels: Sequence[int]) -> list[npt.NDArray[np.int64]]:
    """Return the samples of each class, or all samples as one set if a class has too few to resample."""
    classes = np.asarray(labels)
    strata = [np.flatnonzero(classes == label) for label in np.unique(classes)]
    return strata if min(map(len, strata)) >= LEAST_IN_CLASS else [np.arange(len(classes))]


def _left_out(members: npt.NDArray[np.int64]) -> int:
    return max(1, len(members) // LEFT_OUT)


def interval(point: float, replicates: Values) -> BootstrapEstimate:
    """Return the interval of replicates around their median, moved to the point, which removes a common bias."""
    finite = replicates[np.isfinite(replicates)]
    if not np.isfinite(point) or not len(finite):
        return BootstrapEstimate(point, point, point)
    ends = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) - np.median(finite)
    return BootstrapEstimate(point, float(point + TWO_RUNS * ends[0]), float(point + TWO_RUNS * ends[1]))
