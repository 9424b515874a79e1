"""The model that places steps: inner products by band, its error, and the search for the best places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest

from qcgraph.plan import placement
from qcgraph.plan.placement import (
    BAND_EDGES,
    JUMP_RIDGE,
    RIDGE,
    Landscape,
    Placement,
    Steps,
    by_residuals,
    climbed_from,
    inner_products,
    place,
    response,
)

Table = npt.NDArray[np.float64]
COUNT, CHANNELS, SIZE = 3, 2, 8  # trajectories, channels, and positions along each of two axes
BANDS = len(BAND_EDGES) + 1


def smooth(places: int, seed: int = 0) -> tuple[list[Table], list[Table], Table]:
    """Latents and predictions of a made-up run, whose neighbours are alike, and its initial noise, in float32."""
    draw = np.random.default_rng(seed)
    basis = draw.standard_normal((6, COUNT, CHANNELS, SIZE, SIZE))
    times = np.linspace(0, 1, places + 1)
    waves = [np.cos((1 + order) * times * 1.7 + seed) for order in range(6)]
    latents = [combined(waves, basis, index) for index in range(places + 1)]
    turned = [combined(waves, basis[::-1], index) for index in range(places)]
    return latents, turned, latents[0]


def combined(waves: Sequence[Table], basis: Table, index: int) -> Table:
    total: Table = sum(wave[index] * part for wave, part in zip(waves, basis, strict=True))
    return total.astype(np.float32).astype(np.float64)


def landscape(places: int, history: int = 3, seed: int = 0) -> Landscape:
    """The landscape of a made-up run; its trajectories are fitted to and judged, both."""
    latents, predictions, noise = smooth(places, seed)
    products = inner_products([vector.astype(np.float32) for vector in (*latents, *predictions, noise)])
    rho = np.random.default_rng(seed + 1).uniform(-0.5, 0.5, (BANDS, places))
    return Landscape(products, products, rho, history)


@pytest.mark.parametrize("shape", [(16,), (8, 8), (5, 7), (3, 4, 5), (1, 1)], ids=str)
def test_inner_products_add_up_over_the_bands(shape: tuple[int, ...]) -> None:
    """To those of the values themselves (Parseval), per value."""
    vectors = np.random.default_rng(0).standard_normal((4, 3, 2, *shape)).astype(np.float32)
    flat = vectors.reshape(4, -1).astype(np.float64)
    found = inner_products(list(vectors))
    assert found.shape == (BANDS, 4, 4)
    np.testing.assert_allclose(found.sum(axis=0), flat @ flat.T / flat.shape[1], rtol=1e-12, atol=1e-12)


def test_a_wave_belongs_to_the_band_of_its_frequency() -> None:
    """1, 2, 4 and 8 periods over 16 positions, of which the last is the finest that there is."""
    positions = np.arange(16)
    for band, periods in enumerate((1, 2, 4, 8)):
        wave = np.cos(2 * np.pi * periods * positions / 16)[None, None].astype(np.float32)
        found = inner_products([wave])[:, 0, 0]
        assert found.argmax() == band
        np.testing.assert_allclose(found.sum(), found[band], rtol=1e-6)


def test_the_response_is_the_slope_of_each_band() -> None:
    """Where a prediction answers an error by a factor, that is found, for every timestep and band."""
    latents, predictions, _ = smooth(4)
    rho = np.random.default_rng(5).uniform(-1, 1, (BANDS, 4))
    errors = np.random.default_rng(6).standard_normal((4, *latents[0].shape))
    others = [latent + error for latent, error in zip(latents, errors, strict=False)]
    answers = [predictions[step] + banded(errors[step], rho[:, step]) for step in range(4)]
    found = response(*([part.astype(np.float32) for part in run] for run in (latents, predictions, others, answers)))
    np.testing.assert_allclose(found, rho, atol=1e-5)


def test_there_is_no_response_where_two_runs_agree() -> None:
    latents, predictions, _ = smooth(3)
    single = [part.astype(np.float32) for part in latents]
    found = response(single, [part.astype(np.float32) for part in predictions], single, single)
    assert not found.any()


def banded(values: Table, factors: Table) -> Table:
    """Values [N,C,H,W] with every band of spatial frequency multiplied by a factor."""
    frequency = np.sqrt(np.add.outer(np.fft.fftfreq(SIZE) ** 2, np.fft.fftfreq(SIZE) ** 2))
    gain = factors[np.searchsorted(BAND_EDGES, frequency, side="right")]
    return np.fft.ifftn(np.fft.fftn(values, axes=(-2, -1)) * gain, axes=(-2, -1)).real


@pytest.mark.parametrize("history", [0, 1, 3])
@pytest.mark.parametrize("steps", [(0,), (0, 3, 4), (0, 1, 2, 5, 7), tuple(range(8))], ids=str)
def test_the_error_is_that_of_a_fit_to_a_linear_network(history: int, steps: Steps) -> None:
    """Walked on the values themselves, with a denoiser that predicts ``e_k + rho_k * (y - x_k)``."""
    latents, predictions, noise = smooth(8)
    rho = landscape(8).response
    learned = np.array([True, True, False])
    products = [
        inner_products([vector[rows].astype(np.float32) for vector in (*latents, *predictions, noise)])
        for rows in (learned, ~learned)
    ]
    latent, earlier = noise, list[Table]()
    for step, after in zip(steps, (*steps[1:], 8), strict=True):
        made = predictions[step] + banded(latent - latents[step], rho[:, step])
        terms = [latent, made, *earlier[:history]]
        own = np.stack([term[learned].ravel() for term in terms]) / math.sqrt(latent[learned].size)
        aim = latents[after][learned].ravel() / math.sqrt(latent[learned].size)
        ridge = RIDGE * np.trace(own @ own.T) / len(own) * np.eye(len(own))
        latent = sum(c * term for c, term in zip(np.linalg.solve(own @ own.T + ridge, own @ aim), terms, strict=True))
        earlier.insert(0, made)
    expected = np.square(latent - latents[8])[~learned].mean()
    assert expected > 1e-9
    assert Landscape(*products, rho, history).error(Placement.of(steps)) == pytest.approx(expected, rel=1e-6)


def residual(found: Landscape, steps: Sequence[int]) -> float:
    """The sum of the residuals of the jumps between steps, each a least squares of its own."""
    products, offset = (found.learned + found.judged).sum(axis=0), found.places + 1
    total = 0.0
    for index, (step, after) in enumerate(zip(steps, (*steps[1:], found.places), strict=True)):
        known = [step, offset + step, *([offset + steps[index - 1]] if index else [])]
        own = products[np.ix_(known, known)]
        own = own + JUMP_RIDGE * np.trace(own) / len(own) * np.eye(len(own))
        cross = products[known, after]
        total += max(0.0, float(products[after, after] - cross @ np.linalg.solve(own, cross)))
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_the_sum_of_residuals_is_the_least_of_all_sets(count: int, seed: int) -> None:
    found = landscape(8, seed=seed)
    sets = [(0, *rest) for rest in combinations(range(1, 8), count - 1)]
    chosen = by_residuals(found, count, range(8))
    assert chosen in sets
    assert residual(found, chosen) == pytest.approx(min(residual(found, steps) for steps in sets), rel=1e-6)


def test_only_free_timesteps_compute() -> None:
    found, free = landscape(9), (0, 2, 3, 6, 8)
    sets = [(0, *rest) for rest in combinations(free[1:], 2)]
    assert by_residuals(found, 3, free) == min(sets, key=lambda steps: residual(found, steps))


def test_climbing_moves_only_to_less_error() -> None:
    """It finds the bottom of a bowl, and never leaves the best it knows."""
    seen: list[Steps] = []

    def error(tried: Placement) -> float:
        seen.append(tried.steps)
        return float(sum((step - goal) ** 2 for step, goal in zip(tried.steps, (0, 5, 13), strict=True)))

    assert climbed_from(Placement.of((0, 1, 2)), error, 20, 1000) == (Placement.of((0, 5, 13)), 0.0)
    for steps in seen:
        assert steps[0] == 0
        assert list(steps) == sorted(set(steps))
        assert steps[-1] < 20


def test_climbing_exchanges_the_kinds_of_neighbours() -> None:
    """The first step keeps its own."""
    seen: list[tuple[bool, ...]] = []

    def error(tried: Placement) -> float:
        seen.append(tried.whole)
        return float(sum(index for index, whole in enumerate(tried.whole) if whole))

    start = Placement((0, 1, 2, 3, 4), (True, False, False, True, True))
    best, least = climbed_from(start, error, 5, 1000)
    assert (best.whole, least) == ((True, True, True, False, False), 3.0)
    assert all(whole[0] and whole.count(True) == 3 for whole in seen)


@pytest.mark.parametrize("seed", range(4))
def test_climbing_is_never_worse_than_its_start(seed: int) -> None:
    draw = np.random.default_rng(seed)
    start = Placement.of((0, 4, 9))
    known = {start: 0.5}
    best, least = climbed_from(start, lambda tried: known.setdefault(tried, float(draw.uniform())), 12, 1000)
    assert known[best] == least == min(known.values())


def test_climbing_ends() -> None:
    """Where every set is better than all before it, too."""
    calls: list[Placement] = []

    def error(tried: Placement) -> float:
        calls.append(tried)
        return -float(len(calls))

    climbed_from(Placement.of((0, 100)), error, 1000, 40)
    assert len(calls) == 40


def test_the_candidates_are_the_two_searches_the_best_first() -> None:
    found = landscape(10)
    candidates = place(found, 4)
    start = Placement.of(by_residuals(found, 4, range(10)))
    assert start in candidates
    errors = [found.error(one) for one in candidates]
    assert errors == sorted(errors)
    assert errors[0] <= found.error(start)
    assert all(len(one.steps) == 4 and one.steps[0] == 0 and all(one.whole) for one in candidates)


@pytest.mark.parametrize("half", [0.4, 0.5, 0.55])
@pytest.mark.parametrize("count", [3, 4, 6])
def test_halves_of_guidance_make_more_steps_of_the_same_work(count: int, half: float) -> None:
    """After the candidates without them come at most two with them, the better one by the model first."""
    found = guided_landscape(14, 1.5)
    candidates = place(found, count, half)
    whole = [one for one in candidates if all(one.whole)]
    mixed = [one for one in candidates if not all(one.whole)]
    assert tuple(whole) == place(found, count)
    assert candidates == (*whole, *mixed)
    assert 1 <= len(mixed) <= 2
    for one in mixed:
        assert one.whole[0]
        assert len(one.steps) > count
        assert one.work(half) <= count + 1e-9
        assert one.work(half) > count - 1
    errors = [found.error(one) for one in mixed]
    assert errors == sorted(errors)


def test_a_step_that_costs_nearly_a_whole_one_is_not_tried() -> None:
    assert all(all(one.whole) for one in place(guided_landscape(10, 1.5), 4, 0.99))


def guided_landscape(places: int, guidance: float) -> Landscape:
    """The landscape of a made-up run with differences of guidance."""
    latents, predictions, noise = smooth(places)
    _, differences, _ = smooth(places, seed=3)
    vectors = [vector.astype(np.float32) for vector in (*latents, *predictions, *differences, noise)]
    products = inner_products(vectors)
    return Landscape(products, products, landscape(places).response, 3, guidance)


def test_the_error_of_a_half_is_that_of_an_older_difference() -> None:
    """It adds ``(w - 1) * (d_r - d_k)`` to the prediction, where r is the last step that computed both halves."""
    latents, predictions, noise = smooth(6)
    _, differences, _ = smooth(6, seed=3)
    steps, whole, guidance = (0, 1, 3, 4, 5), (True, False, True, False, False), 4.0
    aged = list(predictions)
    for step, last in ((1, 0), (4, 3), (5, 3)):
        aged[step] = predictions[step] + (guidance - 1) * (differences[last] - differences[step])
    rho = landscape(6).response
    tables = [
        inner_products([vector.astype(np.float32) for vector in vectors])
        for vectors in ((*latents, *predictions, *differences, noise), (*latents, *aged, noise))
    ]
    found = Landscape(tables[0], tables[0], rho, 3, guidance).error(Placement(steps, whole))
    expected = Landscape(tables[1], tables[1], rho, 3).error(Placement.of(steps))
    assert found == pytest.approx(expected, rel=1e-3)
    assert found != pytest.approx(Landscape(tables[0], tables[0], rho, 3).error(Placement.of(steps)), rel=0.1)


@pytest.mark.parametrize("count", [6, 7, 100])
def test_as_many_steps_as_there_are_are_all_of_them(count: int) -> None:
    assert place(landscape(6), count) == (Placement.of(range(6)),)


@pytest.mark.parametrize(("count", "kept"), [(2, [0, 4, 7, 11]), (5, [0, 3, 6, 8, 11])])
def test_of_many_timesteps_some_are_thinned_out_evenly(
    monkeypatch: pytest.MonkeyPatch, count: int, kept: list[int]
) -> None:
    """Never so many that too few are left; climbing may go to all of them."""
    given: list[Sequence[int]] = []
    search = placement.by_residuals

    def recorded(found: Landscape, steps: int, free: Sequence[int]) -> Steps:
        given.append(free)
        return search(found, steps, free)

    monkeypatch.setattr(placement, "MOST_PLACES", 4)
    monkeypatch.setattr(placement, "by_residuals", recorded)
    assert all(len(one.steps) == count for one in place(landscape(12), count))
    assert given == [kept]
