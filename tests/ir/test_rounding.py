"""Rounding by what it does to results: against the textbook form, and where it must be rounding to nearest."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qcgraph.facts import WeightQuant
from qcgraph.ir import rounding
from qcgraph.ir.quantize import nearest
from qcgraph.ir.rounding import COLUMNS, DAMPINGS, round_with_feedback, search_scales

BITS_4 = WeightQuant(7)
Moment = Callable[[int], Tensor]


def random_weight(outputs: int, inputs: int) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(inputs))


def correlated(inputs: int) -> Tensor:
    """E[x x^T] of inputs that are mixtures of a third as many sources, and a little of their own."""
    generator = torch.Generator().manual_seed(1)
    sources = torch.randn(4 * inputs, max(1, inputs // 3), generator=generator)
    mixed = sources @ torch.randn(sources.shape[1], inputs, generator=generator)
    mixed += 0.3 * torch.randn(mixed.shape, generator=generator)
    return mixed.t() @ mixed / len(mixed)


def independent(inputs: int) -> Tensor:
    """A diagonal with entries from 0.001 to 1000, in no order."""
    entries = torch.logspace(-3, 3, inputs)
    return torch.diag(entries[torch.randperm(inputs, generator=torch.Generator().manual_seed(2))])


def error(weight: Tensor, codes: Tensor, scale: Tensor, moment: Tensor) -> Tensor:
    """d H d^T of every row, in float64."""
    rounding_error = (codes.double() * scale.double()[:, None]) - weight.double()
    return ((rounding_error @ moment.double()) * rounding_error).sum(dim=1)


def covering(weight: Tensor, high: int) -> Tensor:
    return weight.abs().amax(dim=1) / high


@pytest.mark.parametrize("high", [1, 3, 7, 31, 127])
@pytest.mark.parametrize("moment", [correlated, independent])
def test_searched_scales_are_no_worse_than_covering_ones(high: int, moment: Moment) -> None:
    weight, second = random_weight(12, 40), moment(40)
    found, plain = search_scales(weight, second, WeightQuant(high)), covering(weight, high)
    errors = [error(weight, nearest(weight, scale, WeightQuant(high)), scale, second) for scale in (found, plain)]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
    assert (found > 0).all()
    assert (found <= plain * (1 + 1e-6)).all()


def test_few_codes_gain_most_from_the_search() -> None:
    weight, second = random_weight(12, 200), correlated(200)
    gains = []
    for high in (3, 7, 127):
        quant = WeightQuant(high)
        scales = search_scales(weight, second, quant), covering(weight, high)
        found, plain = (error(weight, nearest(weight, scale, quant), scale, second).sum() for scale in scales)
        gains.append(float(found / plain))
    assert gains[0] < 0.7
    assert gains[0] < gains[1] < gains[2] <= 1


def test_nearest_codes() -> None:
    weight, scale = torch.tensor([[0.24, 0.26, -0.75, 9.0], [-9.0, 0.5, 0.0, 1.5]]), torch.tensor([0.5, 1.0])
    assert nearest(weight, scale, WeightQuant(3)).tolist() == [[0, 1, -2, 3], [-3, 0, 0, 2]]  # halves to even


@pytest.mark.parametrize("high", [7, 127])
@pytest.mark.parametrize("inputs", [1, 20, COLUMNS, COLUMNS + 1, 300])
def test_inputs_that_have_nothing_in_common_are_rounded_to_nearest(high: int, inputs: int) -> None:
    weight, second = random_weight(9, inputs), independent(inputs)
    scale = covering(weight, high)
    codes = round_with_feedback(weight, second, scale, WeightQuant(high))
    assert codes.dtype == torch.int8
    assert torch.equal(codes.float(), nearest(weight, scale, WeightQuant(high)))


@pytest.mark.parametrize("high", [3, 7, 127])
@pytest.mark.parametrize("inputs", [60, 300])
def test_inputs_that_go_together_make_up_for_each_other(high: int, inputs: int) -> None:
    weight, second = random_weight(16, inputs), correlated(inputs)
    quant = WeightQuant(high)
    scale = search_scales(weight, second, quant)
    codes = round_with_feedback(weight, second, scale, quant)
    better, plain = (error(weight, found, scale, second) for found in (codes, nearest(weight, scale, quant)))
    assert better.sum() < 0.5 * plain.sum()
    assert (better < plain).all()


def test_two_equal_inputs_share_an_error() -> None:
    """By hand: with x1 = x2 only the sum of their weights counts, and the second takes what the first left."""
    weight, scale = torch.tensor([[0.4, 0.4]]), torch.tensor([1.0])
    codes = round_with_feedback(weight, torch.ones(2, 2), scale, BITS_4)
    assert nearest(weight, scale, BITS_4).tolist() == [[0, 0]]
    assert codes.tolist() == [[0, 1]]


def damped_of(moment: Tensor) -> Tensor:
    mean = moment.diagonal().mean()
    return moment + DAMPINGS[0] * mean * torch.eye(len(moment), dtype=moment.dtype)


def one_column_at_a_time(weight: Tensor, moment: Tensor, scale: Tensor, high: int) -> Tensor:
    """Algorithm 1 of the paper without its blocks, in the order of the falling diagonal, in float32."""
    order = torch.argsort(moment.diagonal(), descending=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped_of(moment[order][:, order])))
    factor = torch.linalg.cholesky(inverse, upper=True)
    left, codes = weight[:, order].clone(), torch.empty_like(weight)
    for column, target in enumerate(order):
        codes[:, target] = (left[:, column] / scale).round().clamp(-high, high)
        found = (left[:, column] - codes[:, target] * scale) / factor[column, column]
        left[:, column:] -= found[:, None] * factor[column, column:]
    return codes


def optimal_brain_quantization(weight: Tensor, moment: Tensor, scale: Tensor, high: int) -> Tensor:
    """What it is an algorithm for: after each column the best change of all that are left, in float64.

    It inverts the damped H of the columns that are left anew each time, O(n^4) in all.
    """
    order = torch.argsort(moment.diagonal(), descending=True)
    damped, left = damped_of(moment.double()), weight.double().clone()
    codes = torch.empty_like(weight)
    for place, column in enumerate(order):
        codes[:, column] = (left[:, column] / scale).round().clamp(-high, high).float()
        inverse = torch.linalg.inv(damped[order[place:]][:, order[place:]])
        found = (left[:, column] - codes[:, column].double() * scale) / inverse[0, 0]
        left[:, order[place:]] -= found[:, None] * inverse[0]
    return codes


@pytest.mark.parametrize("inputs", [COLUMNS - 1, COLUMNS, COLUMNS + 1, 300])
def test_blocks_of_columns_give_what_single_columns_give(inputs: int) -> None:
    weight, second = random_weight(16, inputs), correlated(inputs)
    scale = covering(weight, 7)
    codes = round_with_feedback(weight, second, scale, BITS_4).float()
    expected = one_column_at_a_time(weight, second, scale, 7)
    assert (codes != expected).float().mean() < 0.01  # sums in another order, and what follows from a tie
    found, single = (error(weight, item, scale, second).sum() for item in (codes, expected))
    torch.testing.assert_close(found, single, rtol=2e-3, atol=0)


def test_any_width_of_the_blocks_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, second = random_weight(8, 90), correlated(90)
    scale = covering(weight, 7)
    found = []
    for columns in (1, 7, 90, 1000):
        monkeypatch.setattr(rounding, "COLUMNS", columns)
        found.append(round_with_feedback(weight, second, scale, BITS_4))
    assert all((codes != found[0]).float().mean() < 0.01 for codes in found)


def test_it_is_the_best_change_of_the_columns_that_are_left() -> None:
    weight, second = random_weight(12, 60), correlated(60)
    scale = covering(weight, 7)
    codes = round_with_feedback(weight, second, scale, BITS_4).float()
    expected = optimal_brain_quantization(weight, second, scale, 7)
    assert (codes != expected).float().mean() < 0.01
    found, direct = (error(weight, item, scale, second).sum() for item in (codes, expected))
    torch.testing.assert_close(found, direct, rtol=2e-3, atol=0)


def dead_inputs(inputs: int) -> Tensor:
    moment = correlated(inputs)
    moment[::3], moment[:, ::3] = 0, 0
    return moment


SINGULAR: dict[str, Moment] = {
    "zero": lambda inputs: torch.zeros(inputs, inputs),
    "all the same": lambda inputs: torch.ones(inputs, inputs),
    "dead inputs": dead_inputs,
    "one source": lambda inputs: torch.outer(torch.linspace(-1, 2, inputs), torch.linspace(-1, 2, inputs)),
    "hardly any": lambda inputs: 1e-38 * torch.eye(inputs),
    "small": lambda inputs: 1e-30 * correlated(inputs),
    "large": lambda inputs: 1e25 * correlated(inputs),
}


@pytest.mark.parametrize("moment", SINGULAR.values(), ids=SINGULAR)
@pytest.mark.parametrize("inputs", [10, 200])
def test_moments_that_cannot_be_inverted(moment: Moment, inputs: int) -> None:
    weight, second = random_weight(6, inputs), moment(inputs)
    scale = search_scales(weight, second, BITS_4)
    assert bool(torch.isfinite(scale).all())
    assert (scale > 0).all()
    codes = round_with_feedback(weight, second, scale, BITS_4)
    assert codes.abs().max() <= 7
    found, nothing = (error(weight, item, scale, second) for item in (codes, torch.zeros_like(codes)))
    assert bool(torch.isfinite(found).all())
    assert (found <= nothing * (1 + 1e-6)).all()


def test_inputs_that_are_always_zero_change_nothing_for_the_others() -> None:
    weight, second = random_weight(6, 60), dead_inputs(60)
    scale = covering(weight, 7)
    codes = round_with_feedback(weight, second, scale, BITS_4)
    alive = second.diagonal() > 0
    assert torch.equal(codes[:, ~alive].float(), nearest(weight, scale, BITS_4)[:, ~alive])
    better, plain = (error(weight, item, scale, second).sum() for item in (codes, nearest(weight, scale, BITS_4)))
    assert better < 0.5 * plain


@pytest.mark.parametrize("high", [1, 7, 127])
def test_codes_are_within_their_limits(high: int) -> None:
    """Also where the scale covers a fraction of the weight, so that every error is large."""
    weight, second = random_weight(8, 150), correlated(150)
    codes = round_with_feedback(weight, second, 0.2 * covering(weight, high), WeightQuant(high))
    assert codes.abs().max() == high


def test_a_row_of_zeros() -> None:
    weight, second = random_weight(4, 30), correlated(30)
    weight[2] = 0
    scale = search_scales(weight, second, BITS_4)
    assert scale[2] > 0
    assert not round_with_feedback(weight, second, scale, BITS_4)[2].any()


def test_rows_do_not_depend_on_each_other() -> None:
    weight, second = random_weight(8, 150), correlated(150)
    scale = search_scales(weight, second, BITS_4)
    alone = torch.cat([search_scales(row[None], second, BITS_4) for row in weight])
    torch.testing.assert_close(alone, scale, rtol=1e-6, atol=0)
    codes = torch.cat([round_with_feedback(weight[row, None], second, scale[row, None], BITS_4) for row in range(8)])
    assert (codes != round_with_feedback(weight, second, scale, BITS_4)).float().mean() < 0.01


def test_nothing_that_was_given_is_written_to() -> None:
    weight, second = random_weight(4, 150), correlated(150)
    copies = weight.clone(), second.clone()
    round_with_feedback(weight, second, search_scales(weight, second, BITS_4), BITS_4)
    assert torch.equal(weight, copies[0])
    assert torch.equal(second, copies[1])


def test_without_any_error_scales_cover_the_weight() -> None:
    """Inputs that calibration never saw may come later, and clipping would be for nothing."""
    weight = random_weight(6, 10)
    torch.testing.assert_close(search_scales(weight, torch.zeros(10, 10), BITS_4), covering(weight, 7))


def test_a_moment_near_the_end_of_float32() -> None:
    weight = random_weight(6, 10)
    codes = round_with_feedback(weight, 1e38 * torch.eye(10), covering(weight, 7), BITS_4)
    assert torch.equal(codes.float(), nearest(weight, covering(weight, 7), BITS_4))


PAIRED = WeightQuant(127, pair_high=128)


def sums_of_pairs(codes: Tensor) -> Tensor:
    """The sums of the codes of the inputs 2k and 2k + 1."""
    return codes[:, : codes.shape[1] // 2 * 2].float().unflatten(1, (-1, 2)).sum(dim=2)


@pytest.mark.parametrize("inputs", [1, 2, 7, 64, COLUMNS + 1])
def test_two_neighbours_are_never_larger_together_than_allowed(inputs: int) -> None:
    """Even for scales that are far too small; and inputs of different pairs, or of unlike signs, are not bound."""
    weight, second = random_weight(20, inputs), correlated(inputs)
    for scale in (search_scales(weight, second, PAIRED), covering(weight, 127) / 3):
        for codes in (round_with_feedback(weight, second, scale, PAIRED), nearest(weight, scale, PAIRED)):
            assert codes.abs().max() <= 127
            assert sums_of_pairs(codes).abs().max(dim=1).values.max() <= 128 if inputs > 1 else True
    if inputs > 2:
        codes = nearest(weight, covering(weight, 127) / 3, PAIRED)
        assert (codes[:, 1:] + codes[:, :-1]).abs().max() > 128
        assert (codes[:, 1::2].abs() + codes[:, : inputs // 2 * 2 : 2].abs()).max() > 128


def test_pairs_that_are_too_large_lose_half_of_the_excess_each() -> None:
    weight = torch.tensor([[100.0, 35.0, -127.0, -4.0, 127.0, -127.0, 90.0]])
    assert nearest(weight, torch.ones(1), PAIRED).tolist() == [[97, 31, -126, -2, 127, -127, 90]]


def test_pairs_allow_finer_scales_than_codes_of_half_the_size() -> None:
    """What bounding pairs instead of single codes gains: more than 3 of the 6 dB that a bit of the weights costs."""
    weight, second = random_weight(64, 256), correlated(256)
    errors = []
    for quant in (WeightQuant(64), PAIRED, WeightQuant(127)):
        scale = search_scales(weight, second, quant)
        errors.append(float(error(weight, round_with_feedback(weight, second, scale, quant), scale, second).sum()))
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < errors[1]
