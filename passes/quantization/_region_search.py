"""How the probabilities of an attention are quantized: in one region, or in two with a split (TQ-DiT's MRQ).

With k bits and levels = 2^(k-1) - 1, values x below a split d become round(x / s1) * s1 with s1 = d / levels, the
others round(x / s2) * s2 with s2 = 1 / levels. Splits are 2^-i, i = 0 .. 19, and so s2 = 2^i * s1. With d = 1 there is
one region of k-1 bits.

Two regions run in one of two forms. In *one tensor* of codes of s1, where those of the upper region, multiples of 2^i,
have to fit; or in *two planes*, tensors that have no element in common and are multiplied each on its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from qcgraph.facts import ActivationQuant, RegionQuant, codes
from qcgraph.passes.quantization._scale_search import SMALLEST

SPLITS = tuple(2.0**-i for i in range(20))
WORTH = 0.9  # of the error of a form that costs less: a costlier one has to leave less


def largest_held(*, symmetric: bool) -> int:
    """The largest code of an integer tensor of 8 bits."""
    return 127 if symmetric else 255


def in_regions(values: torch.Tensor, split: float, levels: int) -> torch.Tensor:
    """Values in [0, 1] as two regions have them."""
    return torch.where(values < split, _rounded(values, split / levels), _rounded(values, 1.0 / levels))


def region_codes(quant: RegionQuant) -> tuple[ActivationQuant, ActivationQuant]:
    """The codes of the fine step, one scale for each split, and those of the coarse one.

    Their limits are those of the type: neither region has values that exceed its own codes.
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
        error: its score, summed over the timestep groups.
    """

    quant: ActivationQuant | RegionQuant
    error: float


class ProbabilityScores:
    """What each quantization of the probabilities of an attention would do to the noise prediction.

    Args:
        largest: the largest probability of each timestep group.
        bits: of a code.
        symmetric: int8 codes instead of uint8.
    """

    def __init__(self, largest: torch.Tensor, bits: int, *, symmetric: bool) -> None:
        self._largest = largest.clamp(min=SMALLEST)
        self._bits, self._symmetric = bits, symmetric
        self._high = codes(bits, symmetric=symmetric)[1]
        self._levels = 2 ** (bits - 1) - 1
        self._covering = torch.zeros(len(largest), dtype=torch.float64)
        self._split = torch.zeros(len(largest), len(SPLITS), dtype=torch.float64)

    def add(self, values: torch.Tensor, weights: torch.Tensor, groups: torch.Tensor) -> None:
        """Count in probabilities [R,...], the weights of their squared errors, and the group of each row, i64[R]."""
        steps = (self._largest[groups] / self._high).reshape(-1, *[1] * (values.dim() - 1))
        self._covering.index_add_(0, groups, _score((values / steps).round_().mul_(steps), values, weights))
        above = weights * (_rounded(values, 1.0 / self._levels) - values).square_()
        for position, split in enumerate(SPLITS):
            below = weights * (_rounded(values, split / self._levels) - values).square_()
            errors = torch.where(values < split, below, above).flatten(1).sum(dim=1, dtype=torch.float64)
            self._split[:, position].index_add_(0, groups, errors)

    def one_region(self) -> Choice:
        """One step for each timestep group, which covers its range."""
        scales = _merged(tuple(float(step) for step in self._largest / self._high))
        dtype = "int8" if self._symmetric else "uint8"
        quant = ActivationQuant(scales, (0,) * len(scales), 0, self._high, dtype)
        return Choice(quant, float(self._covering.sum()))

    def two_regions(self, planes: int) -> Choice | None:
        """The best split for each timestep group; None where one tensor does not hold two regions."""
        count = len(SPLITS) if planes > 1 else self._splits_of_one_tensor()
        if not count:
            return None
        errors, best = self._split[:, :count].min(dim=1)
        splits = _merged(tuple(SPLITS[int(position)] for position in best))
        dtype = "int8" if self._symmetric else "uint8"
        return Choice(RegionQuant(splits, self._levels, dtype, planes), float(errors.sum()))

    def _splits_of_one_tensor(self) -> int:
        """How many splits one tensor holds, besides 1, which is no split."""
        held = largest_held(symmetric=self._symmetric)
        count = sum(self._levels / split <= held for split in SPLITS)
        return count if count > 1 else 0

    def options(self) -> Iterator[Choice]:
        """Every form, those that cost less first."""
        yield self.one_region()
        for planes in (1, 2):
            choice = self.two_regions(planes)
            if choice is not None:
                yield choice

    def best(self, *, regions: bool) -> tuple[ActivationQuant | RegionQuant, str]:
        """The form that costs least, unless a costlier one leaves enough less error; and why it is one region."""
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
    """A single one where all timestep groups have the same."""
    return values if len(set(values)) > 1 else values[:1]


def _score(rounded: torch.Tensor, values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return ((rounded - values).square_() * weights).flatten(1).sum(dim=1, dtype=torch.float64)
