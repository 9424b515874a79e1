"""The joint planner: each step computes, or reuses in one of several modes, at the least error that a budget allows.

The schedule of CacheQuant (CVPR 2025, arXiv 2503.01323) has one mode of unit cost, errors of features and bounded
windows. This planner extends it by errors that are measured on the final latent for every place and history, and by
several modes, each at its own cost.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcgraph.errors import UsageError, closest
from qcgraph.plan.schedule.search import SLACK, Prices, least_ticks, search

CONDITIONAL = "conditional"  # the mode that computes one half of guidance

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Mode:
    """A way to skip a step: a reusing variant.

    Attributes:
        name: the name of the variant.
        cost: its cost relative to that of a computing step, at least 0 and below 1.

    Raises:
        UsageError: the cost is out of range.
    """

    name: str
    cost: float

    def __post_init__(self) -> None:
        if not 0 <= self.cost < 1:
            raise UsageError(
                f"mode {self.name!r} costs {self.cost:g} of a computing step",
                hint="a mode that saves nothing is none: leave it out",
            )


@dataclass(frozen=True, eq=False)
class ReuseErrors:
    """The error of the final latent from skipping one step.

    The errors of several skipped steps are assumed to add up, as squares of independent disturbances do.

    Attributes:
        values: float64 [modes, T, G + 1, G + 1], at [mode, k, gap, earlier] the expected squared error of the final
            latent from skipping step k in that mode, when the last computing step is r = k - gap and the computing step
            before it is r' = r - earlier. With earlier = 0 there is none before r, which is then step 0. Values that
            were not measured are infinite, and so are values that the array has no room for. Values at gap = 0 and at
            places before step 0 are not read.

    Raises:
        UsageError: the array has another shape, or holds NaN or a negative value.
    """

    values: Array

    def __post_init__(self) -> None:
        shape = self.values.shape
        if self.values.ndim != 4 or shape[2] != shape[3] or 0 in shape:
            raise UsageError(f"skip errors of the shape {shape}", hint="modes, steps, gap + 1, gap + 1")
        if not (self.values >= 0).all():  # false for NaN
            raise UsageError("a skip error is negative or not a number", hint="infinity stands for: not measured")

    @property
    def steps(self) -> int:
        """The number of sampling steps T."""
        return self.values.shape[1]

    @property
    def largest_gap(self) -> int:
        """The most steps from a computing step to one that reuses it, G."""
        return self.values.shape[2] - 1


@dataclass(frozen=True)
class CacheSchedule:
    """The mode of every sampling step.

    Attributes:
        modes: for each step, None where it computes, or the name of a mode.
        error: the expected squared error of the final latent, summed over the skipped steps.
        cost: the summed cost of the steps, in units of a computing step.
    """

    modes: tuple[str | None, ...]
    error: float
    cost: float


def plan(
    errors: ReuseErrors, modes: Sequence[Mode], steps: int, budget: float, *, fixed: Collection[int] = (0,)
) -> CacheSchedule:
    """Find the schedule of least expected error within a budget.

    The schedule is optimal if all modes cost the same. If costs differ, a mode may be counted at up to 1/32 of a
    computing step more than it costs (see `Prices`), so a schedule that needs the last of the budget may be missed.

    Args:
        errors: the error of every skip.
        modes: the ways to skip a step, in the order of the first axis of ``errors``.
        steps: the number of sampling steps T.
        budget: the most the schedule may cost, in computing steps: T computes everywhere, T / 4 costs a quarter of
            that.
        fixed: the steps that must compute. Step 0 always does.

    Returns:
        The schedule, whose error never rises with the budget. Among schedules of equal error it is the cheapest.

    Raises:
        UsageError: the arguments do not fit together, or no schedule meets the budget; the hint names the least budget
            that can be met.
    """
    check_arguments(errors, modes, steps, fixed)
    prices = Prices.of([mode.cost for mode in modes])
    ticks = prices.affordable(budget, steps)
    if ticks < least_ticks(errors.values, prices, fixed):
        raise UsageError(
            f"no schedule costs at most {budget / steps:.4g} of computing every step",
            hint=f"the least reachable budget is {least_share(errors, modes, steps, fixed=fixed):.4f}; "
            "cheaper modes or longer gaps lower it",
        )
    found = search(errors.values, prices, fixed, ticks)
    names = tuple(None if mode is None else modes[mode].name for mode in found)
    costs: dict[str | None, float] = {None: 1.0} | {mode.name: mode.cost for mode in modes}
    return CacheSchedule(names, expected_error(names, errors, modes), math.fsum(costs[name] for name in names))


def least_share(errors: ReuseErrors, modes: Sequence[Mode], steps: int, *, fixed: Collection[int] = (0,)) -> float:
    """Return the least budget that a schedule meets, relative to computing every step, rounded up to four digits.

    Args:
        errors: the error of every skip.
        modes: the ways to skip a step, in the order of the first axis of ``errors``.
        steps: the number of sampling steps T.
        fixed: the steps that must compute. Step 0 always does.

    Raises:
        UsageError: the arguments do not fit together.
    """
    check_arguments(errors, modes, steps, fixed)
    prices = Prices.of([mode.cost for mode in modes])
    return math.ceil(prices.share(least_ticks(errors.values, prices, fixed), steps) * 1e4 - SLACK) / 1e4


def expected_error(names: Sequence[str | None], errors: ReuseErrors, modes: Sequence[Mode]) -> float:
    """Return the expected error of a schedule of any origin: the sum of the errors of its skips.

    Args:
        names: for each of the T steps, None where it computes, or the name of a mode.
        errors: the error of every skip.
        modes: the ways to skip a step, in the order of the first axis of ``errors``.

    Returns:
        The expected squared error of the final latent; infinite where a skip was not measured.

    Raises:
        UsageError: the numbers of steps and errors differ, the first step skips, or a mode is unknown.
    """
    if len(names) != errors.steps or names[0] is not None:
        raise UsageError(
            f"a schedule of {len(names)} steps, the first {(names[0] or 'computes') if names else 'missing'}",
            hint=f"there are {errors.steps} steps, and the first has nothing to reuse",
        )
    indices = {mode.name: index for index, mode in enumerate(modes)}
    total, last, earlier = 0.0, 0, 0
    for step, name in enumerate(names[1:], start=1):
        if name is None:
            last, earlier = step, step - last
        elif name not in indices:
            raise UsageError(f"unknown mode {name!r}", hint=closest(name, indices))
        elif max(step - last, earlier) > errors.largest_gap:
            return math.inf
        else:
            total += float(errors.values[indices[name], step, step - last, earlier])
    return total


def check_arguments(errors: ReuseErrors, modes: Sequence[Mode], steps: int, fixed: Collection[int]) -> None:
    """Refuse arguments of `plan` that do not fit together, with UsageError."""
    if errors.values.shape[:2] != (len(modes), steps):
        raise UsageError(
            f"skip errors of {errors.values.shape[0]} modes and {errors.steps} steps",
            hint=f"there are {len(modes)} modes and {steps} steps",
        )
    if len({mode.name for mode in modes}) != len(modes):
        raise UsageError("two modes share a name", hint="schedules name modes; give each its own")
    unknown = sorted(step for step in fixed if not 0 <= step < steps)
    if unknown:
        raise UsageError(f"step {unknown[0]} is to compute", hint=f"the steps are 0 to {steps - 1}")
