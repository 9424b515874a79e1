"""Schedules of a given interval or number of computing steps: uniform, even, spread, and the schedule of CacheQuant."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qcgraph.errors import UsageError

Array = npt.NDArray[np.float64]


def uniform(steps: int, interval: int) -> list[bool]:
    """Return a schedule in which every ``interval``-th step computes, from the first on (FORA; CacheQuant's baseline).

    Args:
        steps: the number of sampling steps T.
        interval: the steps from one computing step to the next; 1 computes every step.

    Returns:
        For each step, whether it computes.

    Raises:
        UsageError: there are no steps, or the interval is below 1.
    """
    check_steps(steps)
    check_interval(interval)
    return [step % interval == 0 for step in range(steps)]


def even(steps: int, computing: int) -> list[bool]:
    """Return a schedule of a given number of computing steps, evenly spread; `uniform` where T / N is whole.

    The gaps between computing steps differ by one step at most.

    Args:
        steps: the number of sampling steps T.
        computing: the number N of computing steps, 1 to T.

    Returns:
        For each step, whether it computes.

    Raises:
        UsageError: there are no steps, or the number of computing steps is out of range.
    """
    check_steps(steps)
    check_computing(computing, steps)
    starts = {-(-run * steps // computing) for run in range(computing)}
    return [step in starts for step in range(steps)]


def spread(steps: int, computing: int) -> list[bool]:
    """Return a schedule of a given number of computing steps, evenly spread, in which the first two steps compute.

    From three computing steps on, the first two steps compute: a forecast needs two computed values, and early in the
    trajectory they are worth several dB. The gaps between the other computing steps differ by one step at most.

    Args:
        steps: the number of sampling steps T.
        computing: the number of computing steps, 1 to T.

    Returns:
        For each step, whether it computes.

    Raises:
        UsageError: there are no steps, or the number of computing steps is out of range.
    """
    check_steps(steps)
    check_computing(computing, steps)
    first = 1 if computing >= 3 else 0  # where the even runs begin
    runs = computing - first
    starts = {0} | {first + run * (steps - first) // runs for run in range(runs)}
    return [step in starts for step in range(steps)]


def dps(differences: Array, interval: int, *, window: bool = True) -> list[bool]:
    """Return the dynamic-programming schedule of CacheQuant (CVPR 2025, arXiv 2503.01323).

    With N = ``interval`` it cuts the T steps into K = ceil(T / N) groups, in which the first step computes and the rest
    reuse, and makes the summed feature differences least::

        D(i, j) = sum_{t=i+1}^{j-1} ||F_t - F_i||_1,  so that  D(i, j+1) = D(i, j) + ||F_j - F_i||_1
        M(n, 1) = D(0, n),   M(n, k) = min_s M(s, k-1) + D(s, n)

    Args:
        differences: [T, T], at [i, t] with t > i the value ||F_t - F_i||_1, where F_t is the full-precision feature at
            step t. Other values are not read.
        interval: the average number of steps of a group, N.
        window: whether group lengths are limited to ceil(N / 2) .. 2 N, as in the paper.

    Returns:
        For each step, whether it computes.

    Raises:
        UsageError: the differences are not a square of finite numbers, the interval is below 1, or the steps are
            fewer than the window requires of a single group.
    """
    check_interval(interval)
    costs = group_costs(differences, interval if window else None)
    steps = len(differences)
    groups = -(-steps // interval)
    least = costs[0]
    cuts: list[npt.NDArray[np.intp]] = []  # for each further group and each end n, where the group begins
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
    """Return D(i, j) [T, T + 1] of every group of steps i .. j - 1; infinite where no such group is allowed.

    Args:
        differences: [T, T], see `dps`.
        interval: N of the window that limits group lengths; None for no window.

    Raises:
        UsageError: the differences are not a square of finite numbers, or of fewer steps than the shortest group.
    """
    steps = len(differences)
    if differences.shape != (steps, steps) or steps == 0:
        raise UsageError(
            f"feature differences of the shape {differences.shape}", hint="one row and one column for every step"
        )
    shortest, longest = (1, steps) if interval is None else (-(-interval // 2), 2 * interval)
    if steps < shortest:  # any larger number of steps can be cut into groups that the window allows
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
    """Refuse a number of computing steps that is out of range, with UsageError."""
    if not 1 <= computing <= steps:
        raise UsageError(f"{computing} computing steps of {steps}", hint=f"choose 1 to {steps}")
