"""Forecasts: coefficients by formula, and the regression against NumPy's least squares and known laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qcgraph.passes.caching._forecast import Products, log_signal_to_noise, taylor_gain
from qcgraph.passes.caching.forecasters import FORECASTERS, Forecaster, Moments, fit, gains_of
from qcgraph.passes.caching.forecasters.affine import AFFINE, RIDGES
from qcgraph.passes.caching.forecasters.dec import DEC
from qcgraph.passes.caching.forecasters.reuse import REUSE
from qcgraph.passes.caching.forecasters.taylor import TAYLOR
from qcgraph.plan.spec import NoiseSchedule

CHANNELS = 3


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, CHANNELS, generator=torch.Generator().manual_seed(seed))


def moments_of(values: list[Tensor], target: Tensor) -> Moments:
    moments = Moments(len(values), CHANNELS)
    moments.add(values, target)
    return moments


def predicted(gains: Tensor, values: list[Tensor]) -> Tensor:
    return sum((gain * value for gain, value in zip(gains, values, strict=False)), gains[-1].expand_as(values[0]))


def law(seed: int, noise: float = 0.0) -> tuple[list[Tensor], Tensor]:
    """Three slowly changing values, and one that is an affine of the first two of them."""
    last = normal(seed, 40, 5)
    values = [last, last + 0.1 * normal(seed + 1, 40, 5), last + 0.2 * normal(seed + 2, 40, 5)]
    target = 1.3 * values[0] - 0.3 * values[1] + noise * normal(seed + 3, 40, 5)
    return values, target


def test_log_signal_to_noise_is_that_of_the_schedule() -> None:
    """Of the linear schedule of DiT at its last timestep abar = prod(1 - beta) = 4.0358e-5."""
    betas = np.linspace(1e-4, 2e-2, 1000)
    cumulative = np.cumprod(1 - betas)
    found = log_signal_to_noise(NoiseSchedule(), [999.0, 500.0, 0.0, 0.5])
    halves = 0.5 * np.log(cumulative / (1 - cumulative))
    np.testing.assert_allclose(found[:3], halves[[999, 500, 0]], rtol=1e-4)
    assert halves[1] < found[3] < halves[0]


def test_log_signal_to_noise_of_a_flow() -> None:
    found = log_signal_to_noise(NoiseSchedule(prediction="flow_prediction"), [1000.0, 750.0, 500.0, 0.0])
    assert found == pytest.approx([-np.log(1999), -np.log(3), 0, np.log(1999)])


def test_taylor_gain_is_the_slope_in_log_signal_to_noise() -> None:
    times = [-4.0, -3.0, -1.0, 2.0]
    assert taylor_gain(times, 3, [2, 0]) == pytest.approx(3.0 / 3.0)
    assert taylor_gain(times, 3, [1, 0, 2]) == pytest.approx(5.0)
    assert taylor_gain(times, 3, [2]) == 0.0


def test_taylor_is_exact_where_values_are_linear_in_time() -> None:
    times, level, slope = [-4.0, -3.1, -1.0, 2.0], normal(0, 8, 2).double(), normal(1, 8, 2).double()
    values = [level + time * slope for time in times]
    gain = taylor_gain(times, 3, [1, 0])
    found = fit(TAYLOR, [moments_of([values[1], values[0], values[0]], values[3])], gain, values=2)
    torch.testing.assert_close(predicted(found.gains, [values[1], values[0]]), values[3], rtol=1e-12, atol=1e-12)
    assert found.error <= 1e-12 * found.reuse_error


def test_reuse_is_the_last_value() -> None:
    values, target = law(0)
    found = fit(REUSE, [moments_of(values, target)], 0.7, values=3)
    assert torch.equal(found.gains, torch.tensor([1.0, 0, 0, 0]).double()[:, None].expand(4, CHANNELS))
    assert found.error == found.reuse_error == pytest.approx(float((target - values[0]).double().square().sum()))


def test_dec_is_least_squares_of_gain_and_offset() -> None:
    values, target = law(0, noise=0.3)
    gains = fit(DEC, [moments_of(values, target + 0.5)], 0.7, values=3).gains
    for channel in range(CHANNELS):
        last, goal = (array[..., channel].flatten().double().numpy() for array in (values[0], target + 0.5))
        solution, *_ = np.linalg.lstsq(np.stack([last, np.ones_like(last)], axis=1), goal, rcond=None)
        np.testing.assert_allclose(gains[[0, 3], channel], solution, rtol=1e-10)
    assert not gains[1:3].any()


def test_dec_of_a_constant_channel_is_an_offset() -> None:
    constant = torch.full((6, CHANNELS), 0.3)
    gains = fit(DEC, [moments_of([constant], constant + 1)], 0.0, values=1).gains
    torch.testing.assert_close(gains[0], torch.ones(CHANNELS).double())
    torch.testing.assert_close(gains[1], torch.ones(CHANNELS).double(), rtol=1e-6, atol=0)


def test_ridge_is_that_of_its_formula() -> None:
    values, target = law(3, noise=0.2)
    prior, strength = [1.0, 0.4, 0.0], 0.05
    found = moments_of(values, target).ridge(prior, strength, offset=False)
    for channel in range(CHANNELS):
        last, before, oldest, goal = (array[..., channel].flatten().double().numpy() for array in (*values, target))
        columns = np.stack([last, last - before, last - oldest], axis=1)
        gram = columns.T @ columns
        step = np.linalg.solve(gram + strength * np.diag(np.diag(gram)), columns.T @ goal - gram @ prior)
        np.testing.assert_allclose(found[channel, :3], prior + step, rtol=1e-9)
    assert not found[:, 3].any()


def test_ridge_recovers_a_linear_law_and_an_infinite_one_keeps_the_prior() -> None:
    values, target = law(0)
    moments = moments_of(values, target)
    exact = gains_of(moments.ridge([1.0, 0.0, 0.0], 0.0, offset=True))
    expected = torch.tensor([1.3, -0.3, 0.0, 0.0]).double()[:, None].expand(4, CHANNELS)
    torch.testing.assert_close(exact, expected, rtol=1e-5, atol=1e-6)
    kept = moments.ridge([1.0, 0.4, 0.0], 1e15, offset=True)
    torch.testing.assert_close(kept[0], torch.tensor([1.0, 0.4, 0.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-12)


def test_affine_is_shrunk_towards_taylor_where_that_is_the_law() -> None:
    """1.3 and -0.3 are the extrapolation of k = 0.3, so that the ridge costs nothing from there."""
    halves = [law(0, noise=1e-3), law(10, noise=1e-3)]
    found = fit(AFFINE, [moments_of(*half) for half in halves], 0.3, values=3)
    torch.testing.assert_close(found.gains[0], torch.full((CHANNELS,), 1.3).double(), rtol=0, atol=2e-3)
    other = fit(AFFINE, [moments_of(*half) for half in halves], 0.0, values=3)
    assert found.error < other.error
    assert found.error < 2e-3 * found.reuse_error


def test_affine_error_is_that_of_what_was_left_out() -> None:
    folds = [moments_of(*law(0, noise=0.3)), moments_of(*law(10, noise=0.3))]
    found = fit(AFFINE, folds, 0.3, values=3)
    priors = [[1.0, 0.0, 0.0], [1.0, 0.3, 0.0]]
    errors = [
        sum(folds[one].error(folds[1 - one].ridge(prior, ridge, offset=False)) for one in range(2))
        for prior in priors
        for ridge in RIDGES
    ]
    assert found.error == min(errors)
    assert found.error > (folds[0] + folds[1]).error((folds[0] + folds[1]).ridge(priors[1], 1e-3, offset=False))


def test_affine_with_one_value_is_close_to_reuse() -> None:
    """At the second step nothing lies before the first: the other regressors are zero, and there still is a fit."""
    last = normal(0, 40)
    for folds in (1, 2):
        parts = [moments_of([last, last, last], 1.1 * last) for _ in range(folds)]
        gains = fit(AFFINE, parts, 0.0, values=1).gains
        assert torch.isfinite(gains).all()
        torch.testing.assert_close(gains.sum(dim=0), torch.full((CHANNELS,), 1.1).double(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", FORECASTERS.values(), ids=FORECASTERS)
def test_one_term_is_enough_for_every_kind(kind: Forecaster) -> None:
    """A history that memory has cut to one value."""
    last = normal(0, 40)
    gains = fit(kind, [moments_of([last], last)], 0.0, values=1).gains
    torch.testing.assert_close(gains[0], torch.ones(CHANNELS).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(gains[1], torch.zeros(CHANNELS).double(), rtol=0, atol=1e-6)


def test_moments_stream() -> None:
    values, target = law(0, noise=0.1)
    parts = [moments_of([value[rows] for value in values], target[rows]) for rows in (slice(0, 7), slice(7, None))]
    whole, streamed = moments_of(values, target), parts[0] + parts[1]
    for name in ("gram", "cross", "power"):
        torch.testing.assert_close(getattr(streamed, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    assert streamed.count == whole.count == 200


def test_error_is_the_sum_of_squares() -> None:
    values, target = law(0, noise=0.1)
    moments = moments_of(values, target)
    coefficients = torch.tensor([0.9, 0.2, -0.1, 0.05]).double().expand(CHANNELS, -1)
    difference = predicted(gains_of(coefficients), [value.double() for value in values]) - target.double()
    assert moments.error(coefficients) == pytest.approx(float(difference.square().sum()), rel=1e-10)


@pytest.mark.parametrize("together", [2, 128])
@pytest.mark.parametrize("computed", [[3], [3, 1], [3, 1, 0]])
def test_products_give_the_moments_of_any_steps(
    computed: list[int], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcgraph.passes.caching._forecast.TOGETHER", together)
    values = [normal(step, 12, 4) for step in range(6)]
    found = Products(values).moments(computed, 5)
    expected = moments_of([values[step] for step in computed], values[5])
    for name in ("gram", "cross", "power"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-10, atol=1e-10)
    assert found.count == expected.count
