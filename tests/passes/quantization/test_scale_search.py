"""Scales from histograms: the counts, the score of a candidate, and the search over candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qcgraph.facts import ActivationQuant
from qcgraph.passes.quantization._scale_search import (
    BINS,
    FACTORS,
    Halves,
    Histogram,
    merged,
    score_of_planes,
    scores,
    search,
)
from qcgraph.passes.quantization.plan_quant import affine_parameters

ops = torch.ops.qcgraph
UINT8 = ActivationQuant(scales=(1.0,), zero_points=(0,), low=0, high=255, dtype="uint8")
UINT6 = ActivationQuant(scales=(1.0,), zero_points=(0,), low=0, high=63, dtype="uint8")
UINT4 = ActivationQuant(scales=(1.0,), zero_points=(0,), low=0, high=15, dtype="uint8")
INT8 = ActivationQuant(scales=(1.0,), zero_points=(0,), low=-128, high=127, dtype="int8")
REGIONS = ActivationQuant(scales=(1.0,), zero_points=(31,), low=0, high=155, dtype="uint8", shift=2)
SIGNED_REGIONS = ActivationQuant(scales=(1.0,), zero_points=(0,), low=-31, high=62, dtype="int8", shift=1)

every_kind = pytest.mark.parametrize(
    "quant", [UINT8, UINT4, INT8, REGIONS, SIGNED_REGIONS], ids=["8", "4", "signed", "regions", "signed-regions"]
)
Limits = tuple[float, float]


def normal(count: int = 20000, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def histogram_of(values: Tensor, weights: Tensor | None = None) -> Histogram:
    """All values in one group, with the limits that they have."""
    histogram = Histogram([(float(values.min()), float(values.max()))])
    flat = values.reshape(1, -1)
    histogram.add(flat, torch.ones_like(flat) if weights is None else weights.reshape(1, -1), torch.tensor([0]))
    return histogram


def rounded(values: Tensor, scale: float, zero: int, quant: ActivationQuant) -> Tensor:
    """Quantized and dequantized by the ops that programs run."""
    scales = torch.tensor(scale, dtype=torch.float32)
    zeros = torch.tensor(zero, dtype=torch.int8 if quant.dtype == "int8" else torch.uint8)
    if quant.shift:
        codes = ops.quantize_regions(values, scales, zeros, quant.low, quant.high, quant.shift, 0)
    else:
        codes = ops.quantize(values, scales, zeros, quant.low, quant.high, 0)
    found: Tensor = ops.dequantize(codes, scales, zeros, 0)
    return found


def test_counts_are_those_of_numpy() -> None:
    values = normal().clamp(-2.5, 3.0)
    histogram = Histogram([(-2.5, 3.0)])
    histogram.add(values.reshape(4, 50, 100), torch.ones(4, 50, 100), torch.zeros(4, dtype=torch.int64))
    expected, _ = np.histogram(values.double().numpy(), BINS, (-2.5, 3.0))
    moved = np.abs(histogram.weights[0].numpy() - expected).sum() / 2
    assert moved <= 0.001 * len(values)  # at the edges of bins, where float32 rounds
    assert histogram.weights.sum() == len(values)


def test_a_value_is_half_a_bin_from_the_middle_of_its_bin_at_most() -> None:
    for value in (-2.5, -0.7, 0.0, 1.3, 3.0):
        histogram = Histogram([(-2.5, 3.0)])
        histogram.add(torch.tensor([[value]]), torch.ones(1, 1), torch.tensor([0]))
        center = float(histogram.centers(0)[int(histogram.weights[0].argmax())])
        assert abs(center - value) <= 5.5 / BINS * 0.5001


def test_groups_are_apart_and_weights_add_up() -> None:
    histogram = Histogram([(0.0, 4.0), (-8.0, 8.0), (-1.0, 1.0)])
    values = torch.tensor([[0.0, 4.0], [-8.0, 8.0], [0.0, 4.0]])
    weights = torch.tensor([[1.0, 2.0], [0.5, 0.25], [10.0, 20.0]])
    histogram.add(values, weights, torch.tensor([0, 1, 0]))
    histogram.add(values[:1], weights[:1], torch.tensor([0]))
    assert [histogram.weights[0, place].item() for place in (0, -1)] == [12.0, 24.0]
    assert [histogram.weights[1, place].item() for place in (0, -1)] == [0.5, 0.25]
    assert histogram.weights.sum() == 36.75
    assert not histogram.weights[2].any()


def test_values_beyond_the_limits_count_at_the_ends() -> None:
    histogram = Histogram([(-1.0, 1.0)])
    histogram.add(torch.tensor([[-5.0, 7.0, -1e6, 1e6, 2e6]]), torch.ones(1, 5), torch.tensor([0]))
    assert [histogram.weights[0, place].item() for place in (0, -1)] == [2.0, 3.0]


def test_values_far_beyond_the_limits_count_at_the_ends() -> None:
    histogram = Histogram([(-1.0, 1.0)])
    histogram.add(torch.tensor([[1e20]]), torch.ones(1, 1), torch.tensor([0]))
    assert histogram.weights[0, -1] == 1


def test_centers_are_evenly_spaced_within_the_limits() -> None:
    histogram = Histogram([(-1.0, 3.0), (2.0, 2.5)])
    for group, (low, high) in enumerate([(-1.0, 3.0), (2.0, 2.5)]):
        centers, half = histogram.centers(group), (high - low) / BINS / 2
        expected = torch.linspace(low + half, high - half, BINS, dtype=torch.float64)
        torch.testing.assert_close(centers.double(), expected, rtol=1e-6, atol=1e-7)


def test_centers_are_as_exact_as_they_say() -> None:
    assert Histogram([(-1.0, 3.0)]).centers(0).dtype == torch.float64


def candidates(low: float, high: float, quant: ActivationQuant) -> tuple[Tensor, Tensor]:
    """Some scales, exact in float32, and zero points: covering, clipping at either end, hardly covering anything."""
    shares = torch.tensor([0.1, 0.5, 0.8, 1.0, 1.3])
    if quant.shift or quant.dtype == "int8":
        zero = float(quant.zero_points[0])
        steps = high / (quant.high - zero), -low / (zero - quant.low)
        return (shares * max(steps)).float().double(), torch.full((5,), zero).double()
    scales = (shares * (high - low) / (quant.high - quant.low)).float().double()
    return scales, (-low / scales).round().clamp(quant.low, quant.high)


@every_kind
def test_scores_are_those_of_the_ops(quant: ActivationQuant) -> None:
    """With clipping that weighs like rounding, on the middles of the bins, to float32."""
    histogram = histogram_of(normal(), normal(seed=1).square())
    centers, weights = histogram.centers(0).float().double(), histogram.weights[0]
    scales, zeros = candidates(-4.0, 4.0, quant)
    found = scores(centers, weights, scales, zeros, quant, 1.0)
    for error, scale, zero in zip(found, scales, zeros, strict=True):
        back = rounded(centers.float(), float(scale), int(zero), quant).double()
        torch.testing.assert_close(error, ((back - centers) ** 2) @ weights, rtol=1e-4, atol=0)


@every_kind
def test_clipping_weighs_as_often_as_it_is_told(quant: ActivationQuant) -> None:
    """The weight belongs to errors of more than half a step, all of which are clipped."""
    centers = torch.linspace(-3.0, 3.0, 601).double()
    weights = torch.ones(601).double()
    scales, zeros = candidates(-3.0, 3.0, quant)
    ones, tens = (scores(centers, weights, scales, zeros, quant, clipping) for clipping in (1.0, 10.0))
    for one, ten, scale, zero in zip(ones, tens, scales, zeros, strict=True):
        least, largest = (quant.low - zero) * scale, (quant.high - zero) * scale
        coarse = torch.where(centers > 0, 2**quant.shift, 1) * scale
        is_clipped = (centers - centers.clamp(least, largest)).abs() > coarse / 2
        clipped = ((centers - centers.clamp(least, largest)) ** 2 * is_clipped).sum()
        torch.testing.assert_close(ten - one, 9 * clipped, rtol=1e-6, atol=1e-9)
    assert tens[0] > 5 * ones[0]


LIMITS = [(-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (-0.17, 900.0), (0.0, 1e-6), (-0.17, 2.3)]


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("quant", [UINT8, UINT4, INT8], ids=["8", "4", "signed"])
def test_covering_scales_cover_what_was_counted(quant: ActivationQuant, limits: Limits) -> None:
    """To the width of a bin."""
    found = search(Histogram([limits]), 0, quant, 1.0, covers=True)
    scale, _ = affine_parameters(*limits, quant.low, quant.high, symmetric=quant.dtype == "int8")
    assert found.scale == pytest.approx(scale, rel=1.001 / BINS, abs=0)
    least, largest = ((code - found.zero_point) * found.scale for code in (quant.low, quant.high))
    width = limits[1] - limits[0]
    assert least <= min(limits[0], 0) + found.scale / 2 + width / BINS
    assert largest >= max(limits[1], 0) - found.scale / 2 - width / BINS


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("quant", [UINT8, UINT4, INT8], ids=["8", "4", "signed"])
def test_covering_scales_are_those_of_plan_quant(quant: ActivationQuant, limits: Limits) -> None:
    found = search(Histogram([limits]), 0, quant, 1.0, covers=True)
    scale, zero = affine_parameters(*limits, quant.low, quant.high, symmetric=quant.dtype == "int8")
    assert found.scale == pytest.approx(scale, rel=1e-6, abs=0)
    assert found.zero_point == zero


@every_kind
@pytest.mark.parametrize("clipping", [1.0, 9.0])
def test_the_search_is_no_worse_than_covering(quant: ActivationQuant, clipping: float) -> None:
    for values in (normal(), F.gelu(2 * normal()), normal().exp(), -normal().abs(), torch.ones(10)):
        histogram = histogram_of(values)
        found, plain = (search(histogram, 0, quant, clipping, covers=covers) for covers in (False, True))
        assert found.error <= plain.error


@every_kind
@pytest.mark.parametrize("clipping", [1.0, 9.0])
def test_the_error_is_the_score_of_what_was_found(quant: ActivationQuant, clipping: float) -> None:
    histogram = histogram_of(F.gelu(2 * normal()))
    found = search(histogram, 0, quant, clipping)
    parameters = torch.tensor([found.scale]).double(), torch.tensor([found.zero_point]).double()
    least = histogram.least_weights(0)
    score = scores(histogram.centers(0), histogram.weights[0], *parameters, quant, clipping, least)
    assert score.item() == pytest.approx(found.error, rel=1e-12)


@every_kind
def test_scales_are_positive_and_exact_in_float32(quant: ActivationQuant) -> None:
    for values in (normal(), 1e-30 * normal(), 1e30 * normal(), torch.zeros(10), torch.full((10,), 0.1)):
        for covers in (False, True):
            found = search(histogram_of(values), 0, quant, 1.0, covers=covers)
            assert found.scale > 0
            assert found.scale == float(np.float32(found.scale))
            assert quant.low <= found.zero_point <= quant.high


@every_kind
def test_clipping_that_weighs_much_is_avoided(quant: ActivationQuant) -> None:
    values = torch.cat([normal().clamp(-2, 2), torch.tensor([-6.0, 9.0])])
    found = search(histogram_of(values), 0, quant, 1e12)
    least, largest = ((code - found.zero_point) * found.scale for code in (quant.low, quant.high))
    assert least <= -6 + found.scale / 2 + 15 / BINS
    assert largest >= 9 - 2**quant.shift * found.scale / 2 - 15 / BINS


def test_clipping_that_weighs_little_pays_where_values_are_few() -> None:
    values = torch.cat([normal().clamp(-2, 2), torch.tensor([-6.0, 9.0])])
    histogram = histogram_of(values)
    found, plain = (search(histogram, 0, UINT4, clipping).scale for clipping in (1.0, 1e12))
    assert found < 0.6 * plain


def brute_force(values: Tensor, quant: ActivationQuant) -> float:
    """The least mean squared error over all pairs of ends, each value quantized and dequantized."""
    low, high = float(values.min()), float(values.max())
    errors = []
    for lower in FACTORS * low:
        for upper in FACTORS * high:
            scale = float(np.float32((upper - lower) / (quant.high - quant.low)))
            zero = int(np.clip(round(quant.low - float(lower) / scale), quant.low, quant.high))
            errors.append(float((rounded(values, scale, zero, quant) - values).square().mean()))
    return min(errors)


@pytest.mark.parametrize("quant", [UINT6, UINT4], ids=["6", "4"])
@pytest.mark.parametrize("shape", ["normal", "gelu"])
def test_without_weights_it_is_a_search_for_the_least_squared_error(quant: ActivationQuant, shape: str) -> None:
    values = normal(5000) if shape == "normal" else F.gelu(2 * normal(5000))
    found = search(histogram_of(values), 0, quant, 1.0)
    values = torch.cat([values, values.min()[None], values.max()[None]])  # the ends count once more
    error = float((rounded(values, found.scale, found.zero_point, quant) - values).square().mean())
    assert error == pytest.approx(brute_force(values, quant), rel=0.01)
    assert found.error / len(values) == pytest.approx(error, rel=0.01)


def test_values_that_weigh_nothing_are_not_clipped_for_that() -> None:
    """That few large values seem not to matter is luck: clipping weighs at least what an average value does."""
    values = torch.linspace(-10.0, 10.0, 4001)
    inside = (values.abs() < 5).float()
    found = search(histogram_of(values, inside), 0, UINT8, 50.0)
    assert 255 * found.scale == pytest.approx(20, rel=0.02)
    even = search(histogram_of(values), 0, UINT8, 50.0)
    assert found.scale == even.scale


def test_the_ends_of_the_range_count_although_no_sample_has_them() -> None:
    histogram = Histogram([(-10.0, 10.0)])
    values = normal(1000)[None] / 10
    histogram.add(values, torch.ones_like(values), torch.tensor([0]))
    assert 63 * search(histogram, 0, UINT6, 1e6).scale == pytest.approx(20, rel=0.05)


@every_kind
def test_a_group_without_values_is_covered(quant: ActivationQuant) -> None:
    histogram = Histogram([(-1.0, 2.0), (-1.0, 2.0)])
    histogram.add(torch.tensor([[0.1, 0.2]]), torch.ones(1, 2), torch.tensor([1]))
    empty, covering = search(histogram, 0, quant, 1.0), search(histogram, 0, quant, 1.0, covers=True)
    assert empty == covering
    assert empty.error == 0


@every_kind
def test_an_activation_that_is_always_zero(quant: ActivationQuant) -> None:
    found = search(histogram_of(torch.zeros(100)), 0, quant, 1.0)
    assert found.scale > 0
    back = rounded(torch.zeros(3), found.scale, found.zero_point, quant)
    assert torch.equal(back, torch.zeros(3))


def test_each_group_is_searched_on_its_own() -> None:
    values = torch.stack([normal(1000), 5 * normal(1000, seed=1)])
    both = Histogram([(float(row.min()), float(row.max())) for row in values])
    both.add(values, torch.ones_like(values), torch.tensor([0, 1]))
    for group, row in enumerate(values):
        assert search(both, group, UINT8, 3.0) == search(histogram_of(row), 0, UINT8, 3.0)


@pytest.mark.parametrize(
    ("found", "scales", "zeros"),
    [
        ([(0.5, 3)], (0.5,), (3,)),
        ([(0.5, 3), (0.5, 3)], (0.5,), (3,)),
        ([(0.5, 3), (0.5, 4)], (0.5, 0.5), (3, 4)),
        ([(0.5, 3), (0.25, 3), (0.5, 3)], (0.5, 0.25, 0.5), (3, 3, 3)),
    ],
)
def test_groups_that_agree_are_merged(
    found: Sequence[tuple[float, int]], scales: tuple[float, ...], zeros: tuple[int, ...]
) -> None:
    quant = merged(REGIONS, found)
    assert (quant.scales, quant.zero_points) == (scales, zeros)
    assert (quant.low, quant.high, quant.dtype, quant.shift) == (0, 155, "uint8", 2)


def test_two_planes_have_a_step_each() -> None:
    """By hand: of 127 steps each, one for what is below zero and one for what is above."""
    values = F.gelu(2 * normal())
    histogram = histogram_of(values)
    below, above = -float(values.min()) / 127, float(values.max()) / 127
    step = torch.where(values < 0, below, above)
    expected = ((values / step).round() * step - values).square().sum()
    assert score_of_planes(histogram, 0, UINT8) == pytest.approx(float(expected), rel=0.01)


def test_halves_add_up() -> None:
    limits = [(-1.0, 1.0), (0.0, 2.0)]
    halves, whole = Halves(limits), Histogram(limits)
    for part in halves.parts:
        values, groups = torch.rand(6, 50, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2
        part.add(values, values + 1, groups)
        whole.add(values, values + 1, groups)
    assert torch.equal(halves.whole().weights, whole.weights)
    assert torch.equal(halves.whole().least_weights(1), whole.least_weights(1))


@pytest.mark.parametrize("alike", [True, False])
def test_what_is_found_on_one_half_is_judged_on_the_other(alike: bool) -> None:
    """Clipping pays where few values are large on both halves, and not where those of the other half are."""
    quant = ActivationQuant((), (), 0, 15, "uint8")
    bulk = torch.rand(1, 5000, generator=torch.Generator().manual_seed(0)) * 0.4
    halves = Halves([(0.0, 1.0)])
    halves.parts[0].add(bulk, torch.ones_like(bulk), torch.zeros(1, dtype=torch.long))
    other = bulk if alike else torch.cat([bulk, torch.ones(1, 2500)], dim=1)
    halves.parts[1].add(other, torch.ones_like(other), torch.zeros(1, dtype=torch.long))
    left = halves.held_out(quant, 1.0)
    assert left < 0.5 if alike else left > 2


def test_nothing_can_be_judged_on_a_half_without_samples() -> None:
    halves = Halves([(0.0, 1.0)])
    halves.parts[0].add(torch.rand(1, 9), torch.ones(1, 9), torch.zeros(1, dtype=torch.long))
    assert halves.held_out(ActivationQuant((), (), 0, 15, "uint8"), 1.0) == math.inf
