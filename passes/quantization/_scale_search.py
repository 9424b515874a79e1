"""Search of the scales of an activation on histograms of its values.

The score of a candidate is the expected squared error of the noise prediction (TQ-DiT's Hessian-guided search, HO):
the error of every value is weighted by its effect on the prediction, (dL/dx)^2 with L = <v, eps> and v ~ N(0, I).
Averaged over v this is the diagonal of the Gauss-Newton matrix; unlike the gradient of a loss between equal
predictions it does not vanish.

A single step does not show how errors accumulate. A sampler adds up the errors of its steps. Rounding errors differ
from step to step and add up by their squares; clipping errors are the same at every step and add up linearly. The
squared error of clipping is therefore weighted by the number of computing steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from qcgraph.facts import ActivationQuant

SMALLEST = torch.finfo(torch.float32).tiny
BINS = 4096  # 16 bins for each code at 8 bits
TOGETHER = 16  # candidates that are scored at once
FACTORS = torch.linspace(0.45, 1.0, 12, dtype=torch.float64)  # shares of the observed range, at either end


class Histogram:
    """Weights of the values of an activation, in equal bins between known limits, separately for timestep groups.

    Args:
        limits: the smallest and largest value of each group.
    """

    def __init__(self, limits: Sequence[tuple[float, float]]) -> None:
        self._limits = tuple(limits)
        self._lows, highs = torch.tensor(limits).unbind(1)
        self._widths = (highs - self._lows).clamp(min=SMALLEST)
        self.weights = torch.zeros(len(limits), BINS, dtype=torch.float64)
        self._counts = torch.zeros(len(limits), BINS, dtype=torch.float64)

    def add(self, values: torch.Tensor, weights: torch.Tensor, groups: torch.Tensor) -> None:
        """Add values [R,...], with weights of the same shape and the group of each row, i64[R]."""
        rows = values.reshape(len(values), -1)
        places = (rows - self._lows[groups, None]) / self._widths[groups, None] * BINS
        places = places.clamp_(0, BINS - 1).long()
        index = (places + groups[:, None] * BINS).reshape(-1)
        size, shape = self.weights.numel(), self.weights.shape
        self.weights += torch.bincount(index, weights.reshape(-1).double(), minlength=size).reshape(shape)
        self._counts += torch.bincount(index, minlength=size).reshape(shape)

    def centers(self, group: int) -> torch.Tensor:
        """Return the middle of every bin of a group, f64[BINS]."""
        places = torch.arange(BINS, dtype=torch.float64) + 0.5
        return self._lows[group].double() + places * (self._widths[group].double() / BINS)

    def least_weights(self, group: int) -> torch.Tensor:
        """Return the least weight of clipping the values of each bin, f64[BINS].

        All values weigh the same here, and either end holds at least one value. The measured sensitivity of few large
        values is noisy, and the ends of the range were observed, if not in these samples.
        """
        counts = self._counts[group].clone()
        total = counts.sum()
        counts[0] += 1
        counts[-1] += 1
        return counts * (self.weights[group].sum() / total.clamp(min=1))

    def limits(self, group: int) -> tuple[float, float]:
        """Return the smallest and largest value of a group; the range includes zero."""
        low, high = self._limits[group]
        return min(low, 0.0), max(high, 0.0)

    def __add__(self, other: Histogram) -> Histogram:
        """Return the histogram of the values of both; their limits have to be the same."""
        total = Histogram(self._limits)
        total.weights = self.weights + other.weights
        total._counts = self._counts + other._counts
        return total


class Halves:
    """Values of an activation on each half of the calibration set: scales found on one half are judged on the other.

    Args:
        limits: the smallest and largest value of each group.

    Attributes:
        parts: the histogram of each half.
    """

    def __init__(self, limits: Sequence[tuple[float, float]]) -> None:
        self.parts = (Histogram(limits), Histogram(limits))

    def whole(self) -> Histogram:
        """Return the histogram of both halves."""
        return self.parts[0] + self.parts[1]

    def held_out(self, quant: ActivationQuant, clipping: float) -> float:
        """Return the error of searched scales over the error of covering scales, on the half without the search.

        The ratio is infinite where a half has no samples.
        """
        searched = covering = 0.0
        groups = range(len(self.parts[0].weights))
        for seen, unseen in (self.parts, self.parts[::-1]):
            for group in groups:
                pair = (search(seen, group, quant, clipping, covers=covers) for covers in (False, True))
                errors = [score(unseen, group, quant, clipping, found) for found in pair]
                searched, covering = searched + errors[0], covering + errors[1]
        return searched / covering if all(part.weights.any() for part in self.parts) and covering else math.inf


@dataclass(frozen=True)
class Found:
    """The best parameters of one timestep group.

    Attributes:
        scale: the scale of the fine step where there are two steps; exact in float32.
        zero_point: the code of zero.
        error: the score.
    """

    scale: float
    zero_point: int
    error: float


def search(histogram: Histogram, group: int, quant: ActivationQuant, clipping: float, *, covers: bool = False) -> Found:
    """Return the parameters of the least score.

    Args:
        histogram: the values of the activation.
        group: the timestep group.
        quant: the codes: limits, type and, with two regions, their shift and the zero point where they meet.
        clipping: the factor of errors of clipping.
        covers: whether the whole range has to be covered, which leaves one candidate.
    """
    centers, weights = histogram.centers(group), histogram.weights[group]
    low, high = histogram.limits(group)
    quant = quant.at(group)
    scales, zeros = (_regions if quant.shift else _steps)(low, high, quant)
    if covers or not bool(weights.any()):
        scales, zeros = scales[-1:], zeros[-1:]
    errors = scores(centers, weights, scales, zeros, quant, clipping, histogram.least_weights(group))
    best = int(errors.argmin())
    return Found(float(scales[best]), int(zeros[best]), float(errors[best]))


def search_groups(
    histogram: Histogram, quant: ActivationQuant, clipping: float, *, covers: bool = False
) -> tuple[ActivationQuant, list[Found]]:
    """Return codes with the parameters of least score for each timestep group, and what `search` found there."""
    groups = range(len(histogram.weights))
    found = [search(histogram, group, quant, clipping, covers=covers) for group in groups]
    return merged(quant, [(item.scale, item.zero_point) for item in found]), found


def score(histogram: Histogram, group: int, quant: ActivationQuant, clipping: float, found: Found) -> float:
    """Return the score of given parameters; see `search`."""
    centers, weights = histogram.centers(group), histogram.weights[group]
    candidate = (torch.tensor([found.scale]).double(), torch.tensor([found.zero_point]).double())
    return float(scores(centers, weights, *candidate, quant.at(group), clipping, histogram.least_weights(group)))


def merged(quant: ActivationQuant, found: Sequence[tuple[float, int]]) -> ActivationQuant:
    """Return codes with the scale and zero point of every timestep group, or a single pair where all are equal."""
    scales, zeros = zip(*(found if quant.bits or len(set(found)) > 1 else found[:1]), strict=True)
    return replace(quant, scales=scales, zero_points=zeros)


def score_of_planes(histogram: Histogram, group: int, quant: ActivationQuant) -> float:
    """Return the score of two regions in tensors of their own, each with a step that covers it (MRQ at any bits)."""
    centers, weights = histogram.centers(group), histogram.weights[group]
    levels = (quant.high - quant.low) // 2
    low, high = histogram.limits(group)
    below, above = (max(end, SMALLEST) / levels for end in (-low, high))
    step = torch.full_like(centers, above)
    step[centers < 0] = below
    return float((((centers / step).round() * step - centers) ** 2) @ weights)


def scores(
    centers: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    quant: ActivationQuant,
    clipping: float,
    least: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the score f64[K] of K scales and zero points, for values [V] with weights [V].

    Args:
        centers, weights: the values and their weights.
        scales, zeros: the candidates.
        quant: the codes.
        clipping: the factor of errors of clipping.
        least: the least weight [V] of a clipped value; its own weight where None.
    """
    clipped = clipping * (weights if least is None else torch.maximum(weights, least))
    parts = zip(scales.split(TOGETHER), zeros.split(TOGETHER), strict=True)
    return torch.cat([_scores(centers, weights, clipped, *part, quant) for part in parts])


def _scores(
    centers: torch.Tensor,
    weights: torch.Tensor,
    clipped: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    quant: ActivationQuant,
) -> torch.Tensor:
    """Return the score of few candidates, whose errors stay in the cache of the processor; see `scores`."""
    scale, zero = scales[:, None], zeros[:, None]
    least, largest = (quant.low - zero) * scale, (quant.high - zero) * scale
    coarse = torch.where(centers > 0, 2.0**quant.shift, 1.0) * scale
    kept = centers.clamp(least, largest)
    rounded = ((kept / coarse).round() * coarse).clamp(least, largest)
    weighing = torch.where((centers - kept).abs() > coarse / 2, clipped, weights)
    return ((rounded - centers) ** 2 * weighing).sum(dim=1)


def _steps(low: float, high: float, quant: ActivationQuant) -> tuple[torch.Tensor, torch.Tensor]:
    """Return candidates of one step; the last one covers the range."""
    lower = (FACTORS * low).repeat_interleave(len(FACTORS))
    upper = (FACTORS * high).repeat(len(FACTORS))
    if quant.dtype == "int8":
        largest = torch.maximum(-FACTORS * low, FACTORS * high)
        scales = _float32(largest / quant.high)
        return scales, torch.zeros_like(scales)
    scales = _float32((upper - lower) / (quant.high - quant.low))
    return scales, (quant.low - lower / scales).round().clamp(quant.low, quant.high)


def _regions(low: float, high: float, quant: ActivationQuant) -> tuple[torch.Tensor, torch.Tensor]:
    """Return candidates of two steps; the last one covers the range."""
    zero = quant.zero_points[0]
    largest = max(high / (quant.high - zero), -low / (zero - quant.low))
    return _float32(FACTORS * largest), torch.full_like(FACTORS, zero)


def _float32(scales: torch.Tensor) -> torch.Tensor:
    """Round scales to float32; the scale of an activation that is always zero becomes the smallest normal number."""
    return scales.float().clamp(min=SMALLEST).double()
