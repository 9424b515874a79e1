"""Bootstrap intervals hold another run, and say nothing where there is nothing to say."""

from __future__ import annotations

import numpy as np

from qcgraph.evaluation.bootstrap import Bootstrap, BootstrapEstimate, interval

LABELS = [index % 5 for index in range(64)]


def test_another_run_is_inside_the_interval() -> None:
    generator = np.random.default_rng(1)
    runs = [generator.exponential(size=(3, 64)) for _ in range(40)]
    estimates = [Bootstrap(3, LABELS[:64]).estimate(np.asarray, run) for run in runs]
    inside = [one.low <= other.value <= one.high for one in estimates for other in estimates if one is not other]
    assert np.mean(inside) > 0.95
    widths = [estimate.high - estimate.low for estimate in estimates]
    assert np.mean(widths) < 8 * np.std([estimate.value for estimate in estimates])  # and it is not just wide


def test_differences_are_paired() -> None:
    values = np.random.default_rng(2).normal(size=(2, 50))
    difference = Bootstrap(2, LABELS[:50]).estimate(lambda one, other: one - other, values + 0.25, values)
    np.testing.assert_allclose([difference.value, difference.low, difference.high], 0.25, atol=1e-12)
    assert difference.excludes_zero


def test_the_same_values_give_the_same_interval() -> None:
    values = np.random.default_rng(3).normal(size=(3, 20))
    assert Bootstrap(3, LABELS[:20]).estimate(np.exp, values) == Bootstrap(3, LABELS[:20]).estimate(np.exp, values)


def test_sets_are_left_out_of_not_repeated() -> None:
    features = np.random.default_rng(4).normal(size=(3, 64, 2))

    def distinct(part: np.ndarray) -> float:
        assert len(np.unique(part, axis=0)) == len(part)
        return float(part.mean())

    estimate = Bootstrap(3, LABELS[:64]).estimate_sets(distinct, features)
    assert estimate.low < estimate.value < estimate.high
    assert estimate.value == np.mean([part.mean() for part in features])


def test_what_is_not_finite_has_no_interval() -> None:
    assert interval(np.inf, np.full(10, np.inf)) == BootstrapEstimate(np.inf, np.inf, np.inf)
    assert not BootstrapEstimate(0.5, -0.1, 1.0).excludes_zero
    assert BootstrapEstimate(-0.5, -1.0, -0.1).excludes_zero


def test_classes_stay_as_frequent_as_they_are() -> None:
    by_class = np.asarray(LABELS, dtype=np.float64)[None].repeat(2, axis=0)
    estimate = Bootstrap(2, LABELS).estimate(np.asarray, by_class)
    assert estimate.low == estimate.value == estimate.high

    def share(part: np.ndarray) -> float:
        return float(np.ptp(np.bincount(part[:, 0].astype(int))))

    assert Bootstrap(2, LABELS).estimate_sets(share, by_class[..., None]).value <= 1
    alone = Bootstrap(2, list(range(64))).estimate(np.asarray, np.arange(128.0).reshape(2, 64))
    assert alone.low < alone.high  # classes with one sample each are drawn from together
