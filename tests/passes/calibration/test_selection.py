"""Selections of calibration samples: what holds for all of them, and the arithmetic of the clustering one."""

from __future__ import annotations

import tracemalloc

import joblib  # type: ignore[import-untyped]
import numpy as np
import pytest

from qcgraph.errors import UsageError
from qcgraph.passes.calibration import _selection as selection
from qcgraph.passes.calibration._selection import (
    METHODS,
    Array,
    Indices,
    Method,
    Pool,
    affinity,
    coverage,
    embedding,
    select,
)

STEPS, EACH, WIDTH = 10, 30, 8
CLUSTERS = 24

every_method = pytest.mark.parametrize("method", METHODS)


def random_pool(steps: int = STEPS, each: int = EACH, seed: int = 0) -> Pool:
    """As many normal latents of every step."""
    latents = np.random.default_rng(seed).standard_normal((steps * each, WIDTH), dtype=np.float32)
    return Pool(latents, np.repeat(np.arange(steps), each))


def clear_pool(seed: int) -> tuple[Pool, Indices]:
    """Four contents at six steps far apart, every other of these clusters small; and the cluster of each item."""
    contents, steps = np.divmod(np.arange(CLUSTERS), 6)
    clusters = np.repeat(np.arange(CLUSTERS), np.where((contents + steps) % 2, 5, 45))
    noise = np.random.default_rng(seed).standard_normal((len(clusters), 4), dtype=np.float32)
    latents = np.eye(4, dtype=np.float32)[contents[clusters]] + np.float32(0.05) * noise
    return Pool(latents, 5 * steps[clusters]), clusters


@every_method
@pytest.mark.parametrize("count", [1, 7, 59, 299])
def test_as_many_as_asked_for_each_once_in_order(method: Method, count: int) -> None:
    chosen = select(random_pool(), count, method, 0)
    assert chosen.dtype == np.int64
    assert len(chosen) == count
    assert (np.diff(chosen) > 0).all()
    assert 0 <= chosen[0] <= chosen[-1] < STEPS * EACH


@every_method
@pytest.mark.parametrize("count", [STEPS * EACH, STEPS * EACH + 1, 10**6])
def test_no_more_than_there_are(method: Method, count: int) -> None:
    np.testing.assert_array_equal(select(random_pool(), count, method, 0), np.arange(STEPS * EACH))


@every_method
def test_the_seed_decides(method: Method) -> None:
    chosen = [select(random_pool(), 60, method, seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(chosen[0], chosen[1])
    assert not np.array_equal(chosen[0], chosen[2])


@pytest.mark.parametrize("method", ["tap", "kmeans"])
def test_the_number_of_cores_does_not_matter(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    for cores in (1, 2, 3):
        monkeypatch.setattr(joblib, "cpu_count", lambda cores=cores: cores)
        chosen.append(select(random_pool(each=100), 60, method, 0))
    np.testing.assert_array_equal(chosen[0], chosen[1])
    np.testing.assert_array_equal(chosen[0], chosen[2])


@pytest.mark.parametrize("count", [STEPS, 4 * STEPS, 4 * STEPS + 3, 10 * STEPS - 1])
def test_uniform_is_even(count: int) -> None:
    pool = random_pool()
    taken = np.bincount(pool.steps[select(pool, count, "uniform", 0)], minlength=STEPS)
    assert np.ptp(taken) == (1 if count % STEPS else 0)


def test_uniform_spreads_what_is_left_over_the_steps() -> None:
    pool = random_pool()
    for seed in range(3):
        taken = np.bincount(pool.steps[select(pool, STEPS + 2, "uniform", seed)], minlength=STEPS)
        assert np.flatnonzero(taken == 2).tolist() == [2, 7]


def test_uniform_takes_elsewhere_what_a_step_does_not_have() -> None:
    steps = np.array([0] * 2 + [1] * 50 + [7] * 50)
    pool = Pool(np.ones((len(steps), 1), dtype=np.float32), steps)
    assert np.bincount(steps[select(pool, 22, "uniform", 0)]).tolist() == [2, 10, 0, 0, 0, 0, 0, 10]


def test_tap_misses_fewer_clusters_than_the_others() -> None:
    missed: dict[Method, list[int]] = {method: [] for method in METHODS}
    for seed in range(8):
        pool, clusters = clear_pool(seed)
        for method, counts in missed.items():
            chosen = select(pool, selection.SAMPLES_PER_CLUSTER * CLUSTERS, method, seed)
            counts.append(CLUSTERS - len(np.unique(clusters[chosen])))
    assert sum(missed["tap"]) == 0
    assert min(sum(missed[method]) for method in ("kmeans", "uniform", "random")) > 8  # one a selection, and more


def test_affinity_is_the_formula() -> None:
    pool, columns = random_pool(steps=4, each=3), np.array([0, 5, 11])
    found = affinity(unit(pool.latents), pool.steps, columns)
    for row, (latent, step) in enumerate(zip(pool.latents.astype(np.float64), pool.steps, strict=True)):
        for column, other in enumerate(columns):
            against = pool.latents[other].astype(np.float64)
            cosine = latent @ against / np.linalg.norm(latent) / np.linalg.norm(against)
            expected = 0.5 * (1 + cosine) / 2 + 0.5 * np.exp(-abs(step - pool.steps[other]) / 1.0)
            np.testing.assert_allclose(found[row, column], expected, atol=1e-6)


@pytest.mark.parametrize("block", [7, 1024])
def test_embedding_is_the_singular_vectors_of_the_normalized_matrix(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "BLOCK_ROWS", block)
    pool = random_pool(steps=6, each=5)
    columns = np.random.default_rng(1).permutation(len(pool))
    found = embedding(unit(pool.latents), pool.steps, columns, 12)
    matrix = affinity(unit(pool.latents), pool.steps, columns).astype(np.float64)
    normalized = matrix / np.sqrt(np.outer(matrix.sum(axis=1), matrix.sum(axis=0)))
    left, values, _ = np.linalg.svd(normalized)
    assert np.diff(values[:13]).max() < -1e-4  # else vectors would be arbitrary
    np.testing.assert_allclose(np.abs((left[:, :12] * found).sum(axis=0)), 1, atol=1e-5)
    np.testing.assert_allclose(found.T @ found, np.eye(12), atol=1e-4)
    np.testing.assert_allclose(np.abs(found[:, 0]), np.sqrt(matrix.sum(axis=1) / matrix.sum()), atol=1e-5)


def test_embedding_has_no_more_vectors_than_the_matrix() -> None:
    steps = np.repeat(np.arange(4), 10)
    found = embedding(np.ones((40, 1), dtype=np.float32), steps, np.arange(40), 20)
    assert found.shape == (40, 4)  # of equal latents only time is left


@every_method
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_equal_latents(method: Method, value: float) -> None:
    pool = Pool(np.full((300, WIDTH), value, dtype=np.float32), np.repeat(np.arange(STEPS), 30))
    chosen = select(pool, 60, method, 0)
    assert len(np.unique(chosen)) == 60
    assert np.isfinite(coverage(pool, chosen).mean_distance)


def test_a_row_unlike_every_column_is_no_nan() -> None:
    latents = np.array([[1.0]] * 5 + [[-1.0]], dtype=np.float32)
    found = embedding(latents, np.array([0, 0, 1, 1, 2, 5000]), np.arange(5), 5)
    assert np.isfinite(found).all()
    assert not found[-1].any()


def test_one_zero_latent_and_huge_ones() -> None:
    pool = random_pool()
    latents = pool.latents * np.float32(1e30)
    latents[17] = 0
    np.testing.assert_allclose(selection._unit(latents)[18], unit(pool.latents)[18], rtol=1e-6)
    assert len(select(Pool(latents, pool.steps), 60, "tap", 0)) == 60


def test_memory_grows_with_the_pool_and_not_with_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "COLUMN_LIMITS", (100, 100))
    peaks = []
    for each in (30, 150, 600):  # the first one imports
        pool = random_pool(each=each)
        tracemalloc.start()
        select(pool, 60, "tap", 0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 5 * peaks[1]
    assert peaks[2] < len(pool) ** 2 * 4 / 5  # bytes; the whole matrix in float32 would be five times this


def test_coverage_of_known_choices() -> None:
    latents = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [1, 0], [-1, 0]], dtype=np.float32)
    pool = Pool(latents, np.array([0, 0, 1, 1, 9, 9]))
    found = coverage(pool, np.array([0, 2]))
    assert found.steps == pytest.approx(2 / 3)
    assert found.evenness == 1
    assert found.mean_distance == pytest.approx(2 / 6)  # nothing near was chosen for the last two
    assert found.worst_distance == 1
    assert coverage(pool, np.array([4])).mean_distance == pytest.approx(5 / 6)
    everything = coverage(pool, np.arange(6))
    assert (everything.steps, everything.mean_distance, everything.worst_distance) == (1, 0, 0)
    uneven = -(2 * np.log(2 / 3) + np.log(1 / 3)) / 3
    assert coverage(pool, np.array([0, 1, 2])).evenness == pytest.approx(uneven / np.log(3))


def test_more_samples_never_cover_less() -> None:
    pool = random_pool()
    order = np.random.default_rng(0).permutation(len(pool))
    distances = [coverage(pool, order[:count]).mean_distance for count in range(1, 300, 20)]
    assert (np.diff(distances) < 0).all()


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(broken: float) -> None:
    with pytest.raises(UsageError, match="not finite"):
        Pool(np.array([[0.0], [broken]], dtype=np.float32), np.arange(2))


def test_bad_pools_are_refused() -> None:
    with pytest.raises(UsageError, match="empty pool"):
        Pool(np.zeros((0, 4), dtype=np.float32), np.zeros(0, dtype=np.int64))
    with pytest.raises(UsageError, match=r"shape \(3, 4\) with steps of the shape \(2,\)"):
        Pool(np.zeros((3, 4), dtype=np.float32), np.arange(2))
    with pytest.raises(UsageError, match="flatten each latent"):
        Pool(np.zeros((3, 1, 8, 8), dtype=np.float32), np.arange(3))


def test_bad_options_are_refused() -> None:
    pool = random_pool()
    with pytest.raises(UsageError, match="0 calibration samples"):
        select(pool, 0, "random", 0)
    with pytest.raises(UsageError, match="did you mean 'kmeans'"):
        select(pool, 5, "kmean", 0)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="seed -1"):
        select(pool, 5, "random", -1)
    with pytest.raises(UsageError, match="no samples were chosen"):
        coverage(pool, np.zeros(0, dtype=np.int64))


def unit(rows: Array) -> Array:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / lengths, dtype=np.float32)
