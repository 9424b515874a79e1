"""Schedules of a given interval or number of computing steps: uniform, even, spread, and the one of CacheQuant."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qcgraph.errors import UsageError

Array = npt.NDArray[np.float64]


def uniform(steps: int, interval: int) -> list[bool]:
    """Every ``interval``-th step computes, the first step always (FORA; the baseline of CacheQuant).

    Args:
        steps: number of sampling steps T.
        interval: steps from one computing step to the next; 1 computes every step.

    Returns:
        Per step, whether it computes.

    Raises:
        UsageError: there are no steps, or the interval is below 1.
    """
    check_steps(steps)
    check_interval(interval)
    return [step % interval == 0 for step in range(steps)]


def even(steps: int, computing: int) -> list[bool]:
    """A given number of computing steps in runs whose lengths differ by one at most; where T / N is whole, `uniform`.

    Args:
        steps: number of sampling steps T.
        computing: number of computing steps, 1 to T.

    Returns:
        Per step, whether it computes.

    Raises:
        UsageError: there are no steps, or not as many as should compute.
    """
    check_steps(steps)
    check_computing(computing, steps)
    starts = {-(-run * steps // computing) for run in range(computing)}
    return [step in starts for step in range(steps)]


def spread(steps: int, computing: int) -> list[bool]:
    """A given number of computing steps, evenly spread.

    From three computing steps on, the first two steps compute: a forecast needs two features, and early on they are
    worth several dB. The others divide what follows into runs whose lengths differ by one at most.

    Args:
        steps: number of sampling steps T.
        computing: number of computing steps, 1 to T.

    Returns:
        Per step, whether it computes.

    Raises:
        UsageError: there are no steps, or not as many as should compute.
    """
    check_steps(steps)
    check_computing(computing, steps)
    first = 1 if computing >= 3 else 0  # where the even runs begin
    runs = computing - first
    starts = {0} | {first + run * (steps - first) // runs for run in range(runs)}
    return [step in starts for step in range(steps)]


def dps(differences: Array, interval: int, *, window: bool = True) -> list[bool]:
    """The dynamic-programming schedule of CacheQuant (CVPR 2025, arXiv 2503.01323).

    With N = ``interval`` it cuts the T steps into K = ceil(T / N) groups, of which the first step computes and the
    others reuse, and makes the summed feature differences least::

        D(i, j) = sum_{t=i+1}^{j-1} ||F_t - F_i||_1,  so that  D(i, j+1) = D(i, j) + ||F_j - F_i||_1
        M(n, 1) = D(0, n),   M(n, k) = min_s M(s, k-1) + D(s, n)

    Args:
        differences: [T, T]; at [i, t] with t > i stands ||F_t - F_i||_1, where F_t is the full-precision feature at
            step t. The rest is not read.
        interval: steps a group on average, N.
        window: whether group lengths keep to ceil(N / 2) .. 2 N, as in the paper.

    Returns:
        Per step, whether it computes.

    Raises:
        UsageError: the differences are not a square of finite numbers, the interval is below 1, or the steps are
            fewer than the window asks of a single group.
    """
    check_interval(interval)
    costs = group_costs(differences, interval if window else None)
    steps = len(differences)
    groups = -(-steps // interval)
    least = costs[0]
    cuts: list[npt.NDArray[np.intp]] = []  # per further group and end n, where the group begins
    for _ in range(groups - 1):
        totals = least[:-1, None] + costs  # [begin s, end n]
        cuts.append(totals.argmin(axis=0))
        least = totals.min(axis=0)
    starts, end = {0}, steps
    for cut in reversed(cuts):
        end = int(cut[end])
        starts.add(end)
    return [step in starts for step in range(steps)]


def group_costs(differences: Array, interval: int | None) -> Array:
    """D(i, j) [T, T + 1] of every group of steps i .. j - 1; infinite where there is no such group.

    Args:
        differences: [T, T], see `dps`.
        interval: N of the window that group lengths keep to; None for no window.

    Raises:
        UsageError: the differences are not a square of finite numbers, or of fewer steps than the shortest group.
    """
    steps = len(differences)
    if differences.shape != (steps, steps) or steps == 0:
        raise UsageError(
            f"feature differences of the shape {differences.shape}", hint="one row and one column for every step"
        )
    shortest, longest = (1, steps) if interval is None else (-(-interval // 2), 2 * interval)
    if steps < shortest:  # any more steps can be cut into groups that the window allows
        raise UsageError(
            f"{steps} steps are too few for groups of {shortest} to {longest}",
            hint="turn the window off, or choose a smaller interval",
        )
    later = np.triu(differences, k=1)
    if not np.isfinite(later).all():
        raise UsageError("a feature difference is not finite", hint="look for steps at which the model overflows")
    costs = np.full((steps, steps + 1), np.inf)
    costs[:, 1:] = np.cumsum(later, axis=1)  # the incremental form
    lengths = np.arange(steps + 1) - np.arange(steps)[:, None]
    costs[(lengths < shortest) | (lengths > longest)] = np.inf
    return costs


def check_steps(steps: int) -> None:
    """Refuse a trajectory without steps, with UsageError."""
    if steps < 1:
        raise UsageError(f"a schedule of {steps} steps", hint="a trajectory has at least one step")


def check_interval(interval: int) -> None:
    """Refuse an interval below 1, with UsageError."""
    if interval < 1:
        raise UsageError(f"interval {interval}", hint="1 computes every step, 3 every third")


def check_computing(computing: int, steps: int) -> None:
    """Refuse a number of computing steps that there are not, with UsageError."""
    if not 1 <= computing <= steps:
        raise UsageError(f"{computing} computing steps of {steps}", hint=f"choose 1 to {steps}")
