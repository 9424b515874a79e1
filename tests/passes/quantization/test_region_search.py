"""Probabilities in two regions: the figures of the papers' setting, the limits, and the choice of a form."""

from __future__ import annotations

import pytest
import torch

from qcgraph.facts import ActivationQuant, RegionQuant
from qcgraph.passes.quantization._region_search import SPLITS, Choice, ProbabilityScores, in_regions, region_codes

ROWS = 8
ONE_GROUP = torch.zeros(ROWS, dtype=torch.long)


def probabilities(deviation: float = 2.0, rows: int = ROWS) -> torch.Tensor:
    """CalibrationBatch of a softmax over 256 tokens, of logits N(0, deviation^2)."""
    logits = deviation * torch.randn(rows, 256, 256, generator=torch.Generator().manual_seed(0))
    return logits.softmax(dim=-1)


@pytest.fixture(scope="module")
def sharp() -> torch.Tensor:
    return probabilities()


def regions_of(choice: Choice | None) -> RegionQuant:
    assert choice is not None
    assert isinstance(choice.quant, RegionQuant)
    return choice.quant


def scored(values: torch.Tensor, bits: int, *, symmetric: bool = False) -> ProbabilityScores:
    scores = ProbabilityScores(values.amax().reshape(1), bits, symmetric=symmetric)
    scores.add(values, torch.ones_like(values), ONE_GROUP[: len(values)])
    return scores


def mean_squared(values: torch.Tensor, rounded: torch.Tensor) -> float:
    return float(((values - rounded) ** 2).mean())


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_a_split_at_one_is_one_region_of_a_bit_less(sharp: torch.Tensor, bits: int) -> None:
    levels = 2 ** (bits - 1) - 1
    below_one = sharp.clamp(max=0.999)
    assert torch.equal(in_regions(below_one, 1.0, levels), (below_one / (1 / levels)).round() * (1 / levels))


@pytest.mark.parametrize(("bits", "one", "two"), [(8, 7.2e-7, 6.4e-8), (6, 5.8e-6, 9.6e-7)])
def test_synthetic_errors(sharp: torch.Tensor, bits: int, one: float, two: float) -> None:
    """The errors that TQ-DiT's setting gives: a softmax over 256 tokens, of logits N(0, 2^2)."""
    high, levels = 2**bits - 1, 2 ** (bits - 1) - 1
    best = min(mean_squared(sharp, in_regions(sharp, split, levels)) for split in SPLITS)
    assert mean_squared(sharp, (sharp * high).round() / high) == pytest.approx(one, rel=0.05)
    assert best == pytest.approx(two, rel=0.05)


def test_scores_are_the_errors(sharp: torch.Tensor) -> None:
    scores = scored(sharp, 6)
    one, two = scores.one_region(), scores.two_regions(2)
    assert two is not None
    assert isinstance(one.quant, ActivationQuant)
    (scale,), (split,) = one.quant.scales, regions_of(two).splits
    assert one.error == pytest.approx(mean_squared(sharp, (sharp / scale).round() * scale) * sharp.numel(), rel=1e-4)
    assert two.error == pytest.approx(mean_squared(sharp, in_regions(sharp, split, 31)) * sharp.numel(), rel=1e-4)
    assert min(mean_squared(sharp, in_regions(sharp, other, 31)) for other in SPLITS) == pytest.approx(
        mean_squared(sharp, in_regions(sharp, split, 31))
    )


def test_each_timestep_group_has_the_split_that_is_best_for_it() -> None:
    values = torch.cat([probabilities(1.0, 4), probabilities(4.0, 4)])
    groups = torch.arange(2).repeat_interleave(4)
    scores = ProbabilityScores(torch.stack([part.amax() for part in values.split(4)]), 8, symmetric=False)
    scores.add(values, torch.ones_like(values), groups)
    both = regions_of(scores.two_regions(2))
    assert len(both.splits) == 2
    for part, split in zip(values.split(4), both.splits, strict=True):
        assert regions_of(scored(part, 8).two_regions(2)).splits == (split,)


def test_weights_count(sharp: torch.Tensor) -> None:
    only_large = (sharp > 0.25).float()
    scores = ProbabilityScores(sharp.amax().reshape(1), 8, symmetric=False)
    scores.add(sharp, only_large, ONE_GROUP)
    found = scores.two_regions(2)
    errors = [float((only_large * (sharp - in_regions(sharp, split, 127)) ** 2).sum()) for split in SPLITS]
    assert found is not None
    assert found.error == pytest.approx(min(errors), rel=1e-4)


@pytest.mark.parametrize(
    ("bits", "symmetric", "finest"), [(8, False, 2.0**-1), (6, False, 2.0**-3), (4, False, 2.0**-5), (6, True, 2.0**-2)]
)
def test_one_tensor_holds_the_codes_of_both_regions(
    sharp: torch.Tensor, bits: int, symmetric: bool, finest: float
) -> None:
    quant = regions_of(scored(sharp, bits, symmetric=symmetric).two_regions(1))
    assert quant.splits[0] >= finest
    fine, coarse = region_codes(quant)
    assert coarse.scales[0] / fine.scales[0] * quant.levels <= fine.high == (127 if symmetric else 255)
    assert float(coarse.scales[0] / fine.scales[0]).is_integer()


def test_seven_bits_of_a_signed_tensor_hold_one_region() -> None:
    assert scored(probabilities(rows=1), 8, symmetric=True).two_regions(1) is None


def test_a_form_that_costs_more_has_to_leave_less_error(sharp: torch.Tensor) -> None:
    eight, reason = scored(sharp, 8).best(regions=True)
    assert isinstance(eight, RegionQuant)
    assert (eight.planes, reason) == (2, "")
    four, _ = scored(sharp, 4).best(regions=True)
    assert isinstance(four, RegionQuant)
    assert four.planes == 1


def test_one_region_is_kept_with_its_reason() -> None:
    halves = torch.full((4, 2, 2), 0.5)  # which one region has exactly
    quant, reason = scored(halves, 8).best(regions=True)
    assert isinstance(quant, ActivationQuant)
    assert reason.startswith("one region: two would leave")


def test_regions_can_be_switched_off(sharp: torch.Tensor) -> None:
    quant, reason = scored(sharp, 8).best(regions=False)
    assert isinstance(quant, ActivationQuant)
    assert not reason
