"""Searching the scales of an activation from histograms of its values.

The score of a candidate is the expected squared error of the noise prediction (TQ-DiT's Hessian-guided search, HO):
every value weighs what its error does to the prediction, (dL/dx)^2 with L = <v, eps> and v ~ N(0, I). Averaged over v
this is the diagonal of the Gauss-Newton matrix; unlike the gradient of a loss between equal predictions it does not
vanish.

One thing a single step does not show. A sampler adds up the errors of its steps. Those of rounding differ from step to
step and add up by their squares; what is clipped is the same at every step, and such errors add up themselves. So an
error of clipping weighs as often as there are steps that compute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from qcgraph.facts import ActivationQuant

SMALLEST = torch.finfo(torch.float32).tiny
BINS = 4096  # 16 for each code at 8 bits
TOGETHER = 16  # candidates
FACTORS = torch.linspace(0.45, 1.0, 12, dtype=torch.float64)  # of the observed range, at either end


class Histogram:
    """Weights of the values of an activation, in equal bins between known limits, apart for timestep groups.

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
        """Count values [R,...] in, with weights of the same shape and the group of each row, i64[R]."""
        rows = values.reshape(len(values), -1)
        places = (rows - self._lows[groups, None]) / self._widths[groups, None] * BINS
        places = places.clamp_(0, BINS - 1).long()
        index = (places + groups[:, None] * BINS).reshape(-1)
        size, shape = self.weights.numel(), self.weights.shape
        self.weights += torch.bincount(index, weights.reshape(-1).double(), minlength=size).reshape(shape)
        self._counts += torch.bincount(index, minlength=size).reshape(shape)

    def centers(self, group: int) -> torch.Tensor:
        """The middle of every bin of a group, f64[BINS]."""
        places = torch.arange(BINS, dtype=torch.float64) + 0.5
        return self._lows[group].double() + places * (self._widths[group].double() / BINS)

    def least_weights(self, group: int) -> torch.Tensor:
        """What clipping the values of each bin weighs at least, f64[BINS]: all values alike, and one at either end.

        The sensitivity of few large values is a matter of luck, and the ends were seen, if not in these samples.
        """
        counts = self._counts[group].clone()
        total = counts.sum()
        counts[0] += 1
        counts[-1] += 1
        return counts * (self.weights[group].sum() / total.clamp(min=1))

    def limits(self, group: int) -> tuple[float, float]:
        """Smallest and largest value of a group, and zero."""
        low, high = self._limits[group]
        return min(low, 0.0), max(high, 0.0)

    def __add__(self, other: Histogram) -> Histogram:
        """What both counted; their limits are the same."""
        total = Histogram(self._limits)
        total.weights = self.weights + other.weights
        total._counts = self._counts + other._counts
        return total


class Halves:
    """What an activation holds on either half of the calibration set: what is found on one is judged on the other.

    Args:
        limits: the smallest and largest value of each group.

    Attributes:
        parts: the histogram of each half.
    """

    def __init__(self, limits: Sequence[tuple[float, float]]) -> None:
        self.parts = (Histogram(limits), Histogram(limits))

    def whole(self) -> Histogram:
        """The histogram of both."""
        return self.parts[0] + self.parts[1]

    def held_out(self, quant: ActivationQuant, clipping: float) -> float:
        """What searched scales leave of the error of covering ones, on the half that they were not searched on.

        Infinite where a half has no samples.
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
        scale: of the fine step, where there are two; exact in float32.
        zero_point: the code of zero.
        error: the score.
    """

    scale: float
    zero_point: int
    error: float


def search(histogram: Histogram, group: int, quant: ActivationQuant, clipping: float, *, covers: bool = False) -> Found:
    """The parameters of the least score.

    Args:
        histogram: what the activation holds.
        group: of which timestep group.
        quant: its codes: limits, type and, with two regions, their shift and the zero point where they meet.
        clipping: how often an error of clipping weighs.
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
    """The codes with the parameters of the least score for each timestep group, and what was found; see `search`."""
    groups = range(len(histogram.weights))
    found = [search(histogram, group, quant, clipping, covers=covers) for group in groups]
    return merged(quant, [(item.scale, item.zero_point) for item in found]), found


def search_shared(histogram: Histogram, quant: ActivationQuant, clipping: float, *, covers: bool = False) -> Found:
    """The parameters of the least score for all timestep groups together; see `search`."""
    groups = range(len(histogram.weights))
    lows, highs = zip(*(histogram.limits(group) for group in groups), strict=True)
    scales, zeros = (_regions if quant.shift else _steps)(min(lows), max(highs), quant)
    if covers or not bool(histogram.weights.any()):
        scales, zeros = scales[-1:], zeros[-1:]
    errors = torch.zeros(len(scales), dtype=torch.float64)
    for group in groups:
        values = (histogram.centers(group), histogram.weights[group])
        errors += scores(*values, scales, zeros, quant, clipping, histogram.least_weights(group))
    best = int(errors.argmin())
    return Found(float(scales[best]), int(zeros[best]), float(errors[best]))


def score(histogram: Histogram, group: int, quant: ActivationQuant, clipping: float, found: Found) -> float:
    """The score of given parameters; see `search`."""
    centers, weights = histogram.centers(group), histogram.weights[group]
    candidate = (torch.tensor([found.scale]).double(), torch.tensor([found.zero_point]).double())
    return float(scores(centers, weights, *candidate, quant.at(group), clipping, histogram.least_weights(group)))


def merged(quant: ActivationQuant, found: Sequence[tuple[float, int]]) -> ActivationQuant:
    """Codes with the scale and zero point of every timestep group; one of each where all groups have the same."""
    scales, zeros = zip(*(found if quant.bits or len(set(found)) > 1 else found[:1]), strict=True)
    return replace(quant, scales=scales, zero_points=zeros)


def score_of_planes(histogram: Histogram, group: int, quant: ActivationQuant) -> float:
    """The score of two regions in tensors of their own, each with a step that covers it (MRQ at any bits)."""
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
    """The score f64[K] of K scales and zero points, for values [V] with weights [V].

    Args:
        centers, weights: the values.
        scales, zeros: the candidates.
        quant: the codes.
        clipping: how often an error of clipping weighs.
        least: the least weight [V] of a value that is clipped; its own where None.
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
    """The same for few candidates, whose errors stay in the cache of the processor."""
    scale, zero = scales[:, None], zeros[:, None]
    least, largest = (quant.low - zero) * scale, (quant.high - zero) * scale
    coarse = torch.where(centers > 0, 2.0**quant.shift, 1.0) * scale
    kept = centers.clamp(least, largest)
    rounded = ((kept / coarse).round() * coarse).clamp(least, largest)
    weighing = torch.where((centers - kept).abs() > coarse / 2, clipped, weights)
    return ((rounded - centers) ** 2 * weighing).sum(dim=1)


def _steps(low: float, high: float, quant: ActivationQuant) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates of one step, the one that covers the range last."""
    lower = (FACTORS * low).repeat_interleave(len(FACTORS))
    upper = (FACTORS * high).repeat(len(FACTORS))
    if quant.dtype == "int8":
        largest = torch.maximum(-FACTORS * low, FACTORS * high)
        scales = _float32(largest / quant.high)
        return scales, torch.zeros_like(scales)
    scales = _float32((upper - lower) / (quant.high - quant.low))
    return scales, (quant.low - lower / scales).round().clamp(quant.low, quant.high)


def _regions(low: float, high: float, quant: ActivationQuant) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates of two steps, the one that covers the range last."""
    zero = quant.zero_points[0]
    largest = max(high / (quant.high - zero), -low / (zero - quant.low))
    return _float32(FACTORS * largest), torch.full_like(FACTORS, zero)


def _float32(scales: torch.Tensor) -> torch.Tensor:
    """The scales as float32 has them; of an activation that is always zero, the smallest there is."""
    return scales.float().clamp(min=SMALLEST).double()
