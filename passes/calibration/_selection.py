"""Which latents of recorded trajectories a calibration sees: the clustering of Q&C, and what it is compared with."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from qcgraph.errors import UsageError, closest

Method = Literal["tap", "kmeans", "uniform", "random"]
METHODS: tuple[Method, ...] = get_args(Method)

Indices = npt.NDArray[np.int64]
Array = npt.NDArray[np.float32]

CONTENT_SHARE = 0.5  # a: content and time count alike, as in the paper
TIME_CONSTANT = 1.0  # tau, in sampling steps: two steps apart are e^-2 alike, and clusters stay a few steps long
SUBSAMPLES = 3  # m of the paper
POOL_PER_COLUMN = 20  # of N items N / 20 are the columns of a subsample, as in the paper
COLUMN_LIMITS = (100, 1000)  # fewer hold too few singular vectors; more would make time and memory quadratic in N
VECTORS = 100  # k of the paper, for 800 samples: about as many as there are clusters
COLUMNS_PER_VECTOR = 2  # where a subsample is small: the last singular vectors of so few columns are chance
RELATIVE_RANK = 1e-4  # singular values below this share of the largest are rounding in float32
SAMPLES_PER_CLUSTER = 6  # the paper draws 3 to 10 from each
ITERATIONS = 100  # of k-means; what still moves after that is single items
BLOCK_ROWS = 1024  # how much of a matrix is widened to float64 at once
NEAR = 1  # steps: a sample stands for what is as close in time as neighbouring steps


@dataclass(frozen=True)
class Pool:
    """What samples are selected from.

    Attributes:
        latents: flattened latents, f32[N,D].
        steps: the index of the sampling step that each was taken from, i64[N].

    Raises:
        UsageError: there are none, the two do not match, or a latent is not finite.
    """

    latents: Array
    steps: Indices

    def __post_init__(self) -> None:
        if self.latents.ndim != 2 or self.steps.shape != self.latents.shape[:1]:
            raise UsageError(
                f"latents of the shape {self.latents.shape} with steps of the shape {self.steps.shape}",
                hint="flatten each latent to a row, and give every row the index of its step",
            )
        if not self.latents.size:
            raise UsageError("an empty pool", hint="record at least one latent to select from")
        if not np.isfinite(self.latents).all():
            raise UsageError(
                "a latent of the pool is not finite",
                hint="sample with the model before compiling; its weights or its noise schedule may be wrong",
            )

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Coverage:
    """How well chosen samples stand for their pool.

    The distance of an item is the least ``1 - cos`` to a chosen item at most `NEAR` steps away, 0 for a chosen item,
    and 1, as of orthogonal latents, where none is closer.

    Attributes:
        steps: the share of the pool's steps of which a sample was chosen.
        evenness: the entropy of the chosen samples' steps over the largest that so many samples can have; 1 is even.
        mean_distance: the mean distance over the pool, the quantization error of the pool by the chosen samples.
        worst_distance: the largest distance.
    """

    steps: float
    evenness: float
    mean_distance: float
    worst_distance: float


def select(pool: Pool, count: int, method: Method, seed: int) -> Indices:
    """Select calibration samples.

    ``tap`` is the temporal-aware parallel clustering of Q&C (arXiv 2503.02508): spectral clustering of the pool by
    content and time (see `affinity`), from several subsamples of its columns; ``kmeans`` clusters the latents alone,
    which is that paper's ablation. Both then draw from every cluster at random, round after round. ``uniform`` takes
    equally many of every step, ``random`` any.

    Memory grows with N (D + n) for n columns a subsample, never with N^2.

    Args:
        pool: what to select from, N items.
        count: how many; the whole pool where it holds fewer.
        method: how.
        seed: of all that is drawn; the same seed selects the same samples, however many cores there are.

    Returns:
        Their indices in the pool, ascending, i64[min(count, N)].

    Raises:
        UsageError: the count, the method or the seed is out of range.
    """
    _check(count, method, seed)
    if count >= len(pool):
        return np.arange(len(pool), dtype=np.int64)
    generator = np.random.default_rng(seed)
    if method == "random":
        return np.sort(generator.choice(len(pool), count, replace=False))
    if method == "uniform":
        return _rounds(pool.steps, count, generator)
    clusters = max(1, round(count / SAMPLES_PER_CLUSTER))
    features = _embeddings(pool, clusters, generator) if method == "tap" else pool.latents
    return _rounds(_clusters(features, clusters, generator), count, generator)


def coverage(pool: Pool, chosen: Indices) -> Coverage:
    """How well chosen samples stand for their pool.

    Args:
        pool: N items.
        chosen: indices of at least one of them.

    Raises:
        UsageError: nothing was chosen.
    """
    if not len(chosen):
        raise UsageError("no samples were chosen", hint="select at least one")
    steps, taken = np.unique(pool.steps), pool.steps[chosen]
    shares = np.unique(taken, return_counts=True)[1] / len(taken)
    most = np.log(min(len(steps), len(taken)))
    distances = _distances(pool, chosen)
    return Coverage(
        steps=len(shares) / len(steps),
        evenness=float(-(shares * np.log(shares)).sum() / most) if most else 1.0,
        mean_distance=float(distances.mean()),
        worst_distance=float(distances.max()),
    )


def affinity(unit: Array, steps: Indices, columns: Indices) -> Array:
    """How alike the items of a pool are to some of them (Q&C, with the cosine shifted to be no less than 0).

    ``A[k, h] = a (1 + cos(x_k, x_h)) / 2 + (1 - a) exp(-|t_k - t_h| / tau)``

    Args:
        unit: latents of length one or zero, f32[N,D]; a zero latent is orthogonal to all.
        steps: the sampling step t of each, i64[N].
        columns: the indices h, i64[n].

    Returns:
        f32[N,n], 0 to 1.
    """
    content = unit @ unit[columns].T
    np.clip(content, -1, 1, out=content)  # rounding
    content += 1
    content *= CONTENT_SHARE / 2
    times = (steps / TIME_CONSTANT).astype(np.float32)
    closeness = np.subtract.outer(times, times[columns])
    np.abs(closeness, out=closeness)
    np.negative(closeness, out=closeness)
    np.exp(closeness, out=closeness)
    closeness *= 1 - CONTENT_SHARE
    content += closeness
    return content


def embedding(unit: Array, steps: Indices, columns: Indices, rank: int) -> Array:
    """The leading left singular vectors of ``L = D_r^-1/2 A D_c^-1/2`` (Q&C), D_r and D_c the sums of rows and columns.

    They come from the eigenvectors of the small L^T L, which takes a third of the time of decomposing L itself.

    Args:
        unit, steps, columns: see `affinity`.
        rank: how many vectors, k; fewer where L has no more.

    Returns:
        f32[N,<=k], in descending order of singular values; signs are arbitrary.
    """
    matrix = affinity(unit, steps, columns)
    smallest = np.finfo(np.float32).tiny  # a row may be unlike every column
    across, down = (np.maximum(matrix.sum(axis=axis), smallest) for axis in (1, 0))
    matrix /= np.sqrt(across)[:, None]
    matrix /= np.sqrt(down)
    squared = np.zeros((len(columns), len(columns)))  # float64: squaring halves the digits of small singular values
    for start in range(0, len(matrix), BLOCK_ROWS):
        block = matrix[start : start + BLOCK_ROWS].astype(np.float64)
        squared += block.T @ block
    values, right = np.linalg.eigh(squared)  # ascending; not SciPy's, which other threads wait for
    leading = slice(None, -rank - 1, -1)
    values, right = values[leading], right[:, leading]
    kept = values > RELATIVE_RANK**2 * values[0]
    left: Array = matrix @ (right[:, kept] / np.sqrt(values[kept])).astype(np.float32)
    return left


def _check(count: int, method: Method, seed: int) -> None:
    """Refuse what cannot be selected."""
    if count < 1:
        raise UsageError(f"{count} calibration samples", hint="select at least one")
    if method not in METHODS:
        raise UsageError(f"no selection is called {method!r}", hint=closest(method, METHODS))
    if seed < 0:
        raise UsageError(f"seed {seed} is negative", hint="a seed is 0 or larger")


def _embeddings(pool: Pool, clusters: int, generator: np.random.Generator) -> Array:
    """The embeddings of all subsamples side by side, rows of length one, f32[N,<=m*k].

    Spectral clustering takes as many vectors as there are clusters (Ng, Jordan and Weiss, 2001): more of them would
    part what belongs together.
    """
    import joblib  # type: ignore[import-untyped]
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    least, most = COLUMN_LIMITS
    width = min(len(pool), max(least, min(most, len(pool) // POOL_PER_COLUMN)))
    rank = min(VECTORS, clusters, max(1, width // COLUMNS_PER_VECTOR))
    subsamples = [generator.choice(len(pool), width, replace=False) for _ in range(SUBSAMPLES)]
    unit = _unit(pool.latents)
    # Threads share the pool, and NumPy lets them run side by side. Each has one thread of the linear algebra library,
    # whose own threads would fight over the same cores, and whose sums depend on how many there are.
    workers = joblib.Parallel(n_jobs=min(SUBSAMPLES, joblib.cpu_count()), backend="threading")
    with threadpool_limits(1):
        parts = workers(joblib.delayed(embedding)(unit, pool.steps, columns, rank) for columns in subsamples)
    return _unit(np.concatenate(parts, axis=1))


def _clusters(features: Array, number: int, generator: np.random.Generator) -> Indices:
    """A cluster for each row of features [N,F], numbered at random, i64[N].

    A single k-means, not its mini-batch form: at the sizes of pools it takes seconds, and its clusters are tighter. One
    start, because samples are drawn from many clusters and no single one of them matters.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    state = int(generator.integers(2**31))
    means = KMeans(number, n_init=1, max_iter=ITERATIONS, random_state=state)
    with threadpool_limits(1), warnings.catch_warnings():  # one thread, because sums depend on how many there are
        warnings.simplefilter("ignore", ConvergenceWarning)  # a pool may hold fewer distinct items than clusters
        labels = means.fit_predict(features)
    return np.asarray(generator.permutation(number)[labels])


def _rounds(groups: Indices, count: int, generator: np.random.Generator) -> Indices:
    """Indices of `count` items, one of each group in every round; in the last one, of groups spread over all.

    Args:
        groups: the group of each item, i64[N].
        count: how many, less than N.
        generator: draws within groups.
    """
    order = generator.permutation(len(groups))
    order = order[np.argsort(groups[order], kind="stable")]  # by group, at random within
    _, starts, sizes = np.unique(groups[order], return_index=True, return_counts=True)
    rounds = np.arange(len(order)) - np.repeat(starts, sizes)  # the round in which each would be drawn
    ends = np.cumsum(np.bincount(rounds))
    last = int(np.searchsorted(ends, count, side="right"))
    drawn, rest = order[rounds < last], order[rounds == last]
    left = count - len(drawn)
    places = (2 * np.arange(left) + 1) * len(rest) // (2 * max(left, 1))
    return np.sort(np.concatenate([drawn, rest[places]]))


def _distances(pool: Pool, chosen: Indices) -> Array:
    """The distance of every item to the chosen ones (see `Coverage`), f32[N]."""
    unit, taken = _unit(pool.latents), pool.steps[chosen]
    distances = np.ones(len(pool), dtype=np.float32)
    for step in np.unique(pool.steps):
        near = chosen[np.abs(taken - step) <= NEAR]
        if not len(near):
            continue
        here = pool.steps == step
        distances[here] = np.clip(1 - (unit[here] @ unit[near].T).max(axis=1), 0, 1)
    distances[chosen] = 0
    return distances


def _unit(rows: Array) -> Array:
    """CalibrationBatch [N,D] of length one; zero rows stay zero."""
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))  # squares of large values leave float32
    lengths[lengths == 0] = 1
    result = np.empty_like(rows)
    np.divide(rows, lengths[:, None], out=result, casting="same_kind")
    return result
