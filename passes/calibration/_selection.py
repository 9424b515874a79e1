"""Selection of latents from recorded trajectories for calibration: the clustering of Q&C, and its alternatives."""

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

CONTENT_SHARE = 0.5  # a of the paper: content and time count alike
TIME_CONSTANT = 1.0  # tau, in sampling steps: two steps apart are e^-2 alike, and clusters stay a few steps long
SUBSAMPLES = 3  # m of the paper
POOL_PER_COLUMN = 20  # the columns of a subsample are N / 20 of the N items, as in the paper
COLUMN_LIMITS = (100, 1000)  # fewer give too few singular vectors; more would make time and memory quadratic in N
VECTORS = 100  # k of the paper, for 800 samples: about the number of clusters
COLUMNS_PER_VECTOR = 2  # where a subsample is small, because the last singular vectors of few columns are noise
RELATIVE_RANK = 1e-4  # singular values below this share of the largest are rounding in float32
SAMPLES_PER_CLUSTER = 6  # the paper draws 3 to 10 from each cluster
ITERATIONS = 100  # of k-means; after that, only single items still move
BLOCK_ROWS = 1024  # rows of a matrix that are widened to float64 at once
NEAR = 1  # steps; a sample stands for items that are at most this far in time


@dataclass(frozen=True)
class Pool:
    """The samples to select from.

    Attributes:
        latents: flattened latents, f32[N,D].
        steps: the index of the sampling step of each latent, i64[N].

    Raises:
        UsageError: the pool is empty, the shapes do not match, or a latent is not finite.
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
    """How well chosen samples represent their pool.

    The distance of an item is the least ``1 - cos`` to a chosen item at most `NEAR` steps away, 0 for a chosen item,
    and 1, the distance of orthogonal latents, where no chosen item is so near.

    Attributes:
        steps: the share of the pool's steps from which a sample was chosen.
        evenness: the entropy of the steps of the chosen samples over its largest possible value; 1 is even.
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
        pool: the N items to select from.
        count: the number of samples; the whole pool is selected where it holds fewer.
        method: the selection method.
        seed: the seed of all random draws; the result does not depend on the number of cores.

    Returns:
        The indices of the samples in the pool, ascending, i64[min(count, N)].

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
    """Measure how well chosen samples represent their pool.

    Args:
        pool: the N items.
        chosen: the indices of at least one item.

    Raises:
        UsageError: no samples were chosen.
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
    """Return the similarity of all items of a pool to some of them (Q&C, with the cosine shifted to be at least 0).

    ``A[k, h] = a (1 + cos(x_k, x_h)) / 2 + (1 - a) exp(-|t_k - t_h| / tau)``

    Args:
        unit: the latents, of length one or zero, f32[N,D]; a zero latent is orthogonal to all.
        steps: the sampling step t of each latent, i64[N].
        columns: the indices h, i64[n].

    Returns:
        The similarities A, f32[N,n], 0 to 1.
    """
    content = unit @ unit[columns].T
    np.clip(content, -1, 1, out=content)  # rounding may exceed 1
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
    """Return the leading left singular vectors of ``L = D_r^-1/2 A D_c^-1/2`` (Q&C).

    D_r and D_c are the sums of rows and columns. The vectors come from the eigenvectors of the small L^T L, which takes
    a third of the time of decomposing L itself.

    Args:
        unit, steps, columns: see `affinity`.
        rank: the number of vectors, k; fewer are returned where L has no more.

    Returns:
        The vectors, f32[N,<=k], in descending order of singular values; signs are arbitrary.
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
    values, right = np.linalg.eigh(squared)  # ascending; SciPy's eigh would make other threads wait
    leading = slice(None, -rank - 1, -1)
    values, right = values[leading], right[:, leading]
    kept = values > RELATIVE_RANK**2 * values[0]
    left: Array = matrix @ (right[:, kept] / np.sqrt(values[kept])).astype(np.float32)
    return left


def _check(count: int, method: Method, seed: int) -> None:
    """Refuse a count, a method or a seed that is out of range."""
    if count < 1:
        raise UsageError(f"{count} calibration samples", hint="select at least one")
    if method not in METHODS:
        raise UsageError(f"no selection is called {method!r}", hint=closest(method, METHODS))
    if seed < 0:
        raise UsageError(f"seed {seed} is negative", hint="a seed is 0 or larger")


def _embeddings(pool: Pool, clusters: int, generator: np.random.Generator) -> Array:
    """Return the embeddings of all subsamples side by side, rows of length one, f32[N,<=m*k].

    Spectral clustering takes as many vectors as there are clusters (Ng, Jordan and Weiss, 2001): more of them would
    separate items that belong together.
    """
    import joblib  # type: ignore[import-untyped]
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    least, most = COLUMN_LIMITS
    width = min(len(pool), max(least, min(most, len(pool) // POOL_PER_COLUMN)))
    rank = min(VECTORS, clusters, max(1, width // COLUMNS_PER_VECTOR))
    subsamples = [generator.choice(len(pool), width, replace=False) for _ in range(SUBSAMPLES)]
    unit = _unit(pool.latents)
    # Threads share the pool, and NumPy lets them run side by side. Each uses one thread of the linear algebra library,
    # whose own threads would compete for the same cores, and whose sums depend on the number of threads.
    workers = joblib.Parallel(n_jobs=min(SUBSAMPLES, joblib.cpu_count()), backend="threading")
    with threadpool_limits(1):
        parts = workers(joblib.delayed(embedding)(unit, pool.steps, columns, rank) for columns in subsamples)
    return _unit(np.concatenate(parts, axis=1))


def _clusters(features: Array, number: int, generator: np.random.Generator) -> Indices:
    """Return a cluster for each row of features [N,F], numbered at random, i64[N].

    Full k-means instead of its mini-batch form: it takes seconds for pools of usual size, and its clusters are tighter.
    One start is enough, because samples are drawn from many clusters and no single cluster matters.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    state = int(generator.integers(2**31))
    means = KMeans(number, n_init=1, max_iter=ITERATIONS, random_state=state)
    with threadpool_limits(1), warnings.catch_warnings():  # one thread, because sums depend on the number
        warnings.simplefilter("ignore", ConvergenceWarning)  # a pool may hold fewer distinct items than clusters
        labels = means.fit_predict(features)
    return np.asarray(generator.permutation(number)[labels])


def _rounds(groups: Indices, count: int, generator: np.random.Generator) -> Indices:
    """Return the indices of ``count`` items: one of each group a round, and in the last round of evenly spread groups.

    Args:
        groups: the group of each item, i64[N].
        count: the number of items, less than N.
        generator: draws within groups.
    """
    order = generator.permutation(len(groups))
    order = order[np.argsort(groups[order], kind="stable")]  # by group, at random within
    _, starts, sizes = np.unique(groups[order], return_index=True, return_counts=True)
    rounds = np.arange(len(order)) - np.repeat(starts, sizes)  # the round in which each item would be drawn
    ends = np.cumsum(np.bincount(rounds))
    last = int(np.searchsorted(ends, count, side="right"))
    drawn, rest = order[rounds < last], order[rounds == last]
    left = count - len(drawn)
    places = (2 * np.arange(left) + 1) * len(rest) // (2 * max(left, 1))
    return np.sort(np.concatenate([drawn, rest[places]]))


def _distances(pool: Pool, chosen: Indices) -> Array:
    """Return the distance of every item to the chosen items (see `Coverage`), f32[N]."""
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
    """Return rows [N,D] scaled to length one; zero rows stay zero."""
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))  # squares of large values overflow float32
    lengths[lengths == 0] = 1
    result = np.empty_like(rows)
    np.divide(rows, lengths[:, None], out=result, casting="same_kind")
    return result
