"""Quantization of the probabilities of an attention, in one region, or in two with a split (TQ-DiT's MRQ).

With k bits and levels = 2^(k-1) - 1, values x below a split d become round(x / s1) * s1 with s1 = d / levels, and
values from d on become round(x / s2) * s2 with s2 = 1 / levels. Splits are 2^-i, i = 0 .. 19, so s2 = 2^i * s1. With
d = 1 there is one region of k-1 bits.

Two regions run in one of two forms. In *one tensor*, all codes are in steps of s1, and the codes of the upper region,
multiples of 2^i, have to fit. In *two planes*, each region is a tensor of its own, no element is nonzero in both, and
each is multiplied on its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from qcgraph.facts import ActivationQuant, RegionQuant, codes
from qcgraph.passes.quantization._scale_search import SMALLEST

SPLITS = tuple(2.0**-i for i in range(20))
WORTH = 0.9  # share of a cheaper form's error that a costlier form has to stay below


def largest_held(*, symmetric: bool) -> int:
    """Return the largest code of an 8-bit integer tensor."""
    return 127 if symmetric else 255


def in_regions(values: torch.Tensor, split: float, levels: int) -> torch.Tensor:
    """Round values in [0, 1] to two regions."""
    return torch.where(values < split, _rounded(values, split / levels), _rounded(values, 1.0 / levels))


def region_codes(quant: RegionQuant) -> tuple[ActivationQuant, ActivationQuant]:
    """Return the codes of the fine step, with one scale for each split, and the codes of the coarse step.

    Their limits are those of the type, because no region has values that exceed its own codes.
    """
    high = largest_held(symmetric=quant.dtype == "int8")
    scales = tuple(float(np.float32(split / quant.levels)) for split in quant.splits)
    fine = ActivationQuant(scales, (0,) * len(scales), 0, high, quant.dtype)
    return fine, ActivationQuant((float(np.float32(1.0 / quant.levels)),), (0,), 0, high, quant.dtype)


def _rounded(values: torch.Tensor, step: float) -> torch.Tensor:
    return (values / step).round_().mul_(step)


@dataclass(frozen=True)
class Choice:
    """A quantization of probabilities.

    Attributes:
        quant: the codes.
        error: their score, summed over the timestep groups.
    """

    quant: ActivationQuant | RegionQuant
    error: float


class ProbabilityScores:
    """The error of the noise prediction for each quantization of the probabilities of an attention.

    Args:
        largest: the largest probability of each timestep group.
        bits: the number of bits of a code.
        symmetric: whether codes are int8 instead of uint8.
    """

    def __init__(self, largest: torch.Tensor, bits: int, *, symmetric: bool) -> None:
        self._largest = largest.clamp(min=SMALLEST)
        self._bits, self._symmetric = bits, symmetric
        self._high = codes(bits, symmetric=symmetric)[1]
        self._levels = 2 ** (bits - 1) - 1
        self._covering = torch.zeros(len(largest), dtype=torch.float64)
        self._split = torch.zeros(len(largest), len(SPLITS), dtype=torch.float64)

    def add(self, values: torch.Tensor, weights: torch.Tensor, groups: torch.Tensor) -> None:
        """Add probabilities [R,...], the weights of their squared errors, and the group of each row, i64[R]."""
        steps = (self._largest[groups] / self._high).reshape(-1, *[1] * (values.dim() - 1))
        self._covering.index_add_(0, groups, _score((values / steps).round_().mul_(steps), values, weights))
        above = weights * (_rounded(values, 1.0 / self._levels) - values).square_()
        for position, split in enumerate(SPLITS):
            below = weights * (_rounded(values, split / self._levels) - values).square_()
            errors = torch.where(values < split, below, above).flatten(1).sum(dim=1, dtype=torch.float64)
            self._split[:, position].index_add_(0, groups, errors)

    def one_region(self) -> Choice:
        """Return the form with one region, whose step covers the range of each timestep group."""
        scales = _merged(tuple(float(step) for step in self._largest / self._high))
        dtype = "int8" if self._symmetric else "uint8"
        quant = ActivationQuant(scales, (0,) * len(scales), 0, self._high, dtype)
        return Choice(quant, float(self._covering.sum()))

    def two_regions(self, planes: int) -> Choice | None:
        """Return two regions with the best split for each timestep group; None where they do not fit one tensor."""
        count = len(SPLITS) if planes > 1 else self._splits_of_one_tensor()
        if not count:
            return None
        errors, best = self._split[:, :count].min(dim=1)
        splits = _merged(tuple(SPLITS[int(position)] for position in best))
        dtype = "int8" if self._symmetric else "uint8"
        return Choice(RegionQuant(splits, self._levels, dtype, planes), float(errors.sum()))

    def _splits_of_one_tensor(self) -> int:
        """Return how many splits fit one tensor; 0 if only the split 1 does, which is one region."""
        held = largest_held(symmetric=self._symmetric)
        count = sum(self._levels / split <= held for split in SPLITS)
        return count if count > 1 else 0

    def options(self) -> Iterator[Choice]:
        """Yield every form, the cheaper ones first."""
        yield self.one_region()
        for planes in (1, 2):
            choice = self.two_regions(planes)
            if choice is not None:
                yield choice

    def best(self, *, regions: bool) -> tuple[ActivationQuant | RegionQuant, str]:
        """Return the cheapest form, or a costlier one of sufficiently less error; and the reason for one region."""
        one, *others = self.options() if regions else (self.one_region(),)
        best = one
        for other in others:
            if other.error < WORTH * best.error:
                best = other
        if best is not one or not others:
            return best.quant, ""
        least = min(other.error for other in others)
        return one.quant, f"one region: two would leave {least / one.error if one.error else 1.0:.0%} of its error"


def _merged(values: tuple[float, ...]) -> tuple[float, ...]:
    """Return the values, or a single one where all timestep groups have the same."""
    return values if len(set(values)) > 1 else values[:1]


def _score(rounded: torch.Tensor, values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return ((rounded - values).square_() * weights).flatten(1).sum(dim=1, dtype=torch.float64)
