"""The dynamic program of the planner: over the last two computing steps and the spent cost."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FINEST = 32  # most ticks of a computing step; time and memory of the search grow with it
SLACK = 1e-9  # ticks; tolerance for the rounding of sums of decimal fractions

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Prices:
    """Costs above the floor, in whole ticks.

    Every step costs at least as much as the cheapest mode, the floor. Costs above the floor are counted in ticks. Costs
    of modes are rounded up to ticks, so a schedule within a budget of ticks is within the budget. A computing step has
    the number of ticks, up to `FINEST`, for which this rounding is least. Where all modes cost the same, this is one
    tick, and the rounding is exact.

    Attributes:
        floor: the cost of the cheapest mode, relative to a computing step.
        full: the ticks of a computing step.
        skips: the ticks of every mode.
    """

    floor: float
    full: int
    skips: tuple[int, ...]

    @classmethod
    def of(cls, costs: Sequence[float]) -> Prices:
        """Return the prices of modes of these costs, each relative to a computing step and below 1."""
        floor = min(costs)
        shares = [(cost - floor) / (1 - floor) for cost in costs]

        def rounded(full: int) -> tuple[int, ...]:
            return tuple(math.ceil(share * full - SLACK) for share in shares)

        def loss(full: int) -> float:
            return round(max(ticks / full - share for ticks, share in zip(rounded(full), shares, strict=True)), 9)

        full = min(range(1, FINEST + 1), key=loss)
        return cls(floor, full, rounded(full))

    def affordable(self, budget: float, steps: int) -> int:
        """Return the ticks that a budget leaves above the floor; negative where the budget is below the floor."""
        spare = (min(budget, steps) - steps * self.floor) / (1 - self.floor)
        return math.floor(spare * self.full + SLACK)

    def share(self, ticks: int, steps: int) -> float:
        """Return the cost of ``ticks`` above the floor, as a fraction of computing every step."""
        return self.floor + ticks / self.full / steps * (1 - self.floor)


# Both recursions walk the steps with one state for each [gap, earlier]: the last computing step lies ``gap`` before the
# current step, and the computing step before it lies ``earlier`` steps further back. The current step computes
# (gap = 0) or reuses at one of the gaps 1 .. G that have errors. ``earlier`` goes to G + 1, from one computing step
# over G skipped ones to the next. No errors exist for G + 1, so the step after that must compute.


def least_ticks(errors: Array, prices: Prices, fixed: Collection[int]) -> int:
    """Return the fewest ticks above the floor of a schedule of finite error; for the arguments see `search`."""
    _, steps, gaps, _ = errors.shape
    skips = np.array(prices.skips, dtype=np.float64)[:, None, None, None]
    cheapest = np.where(np.isfinite(errors), skips, np.inf).min(axis=0)  # [T, G + 1, G + 1]
    spent = np.full((gaps, gaps + 1), np.inf)
    spent[0, 0] = prices.full  # step 0 computes
    for step in range(1, steps):
        next_states = np.full_like(spent, np.inf)
        next_states[0, 1:] = spent.min(axis=1) + prices.full
        if step not in fixed:
            next_states[1:, :-1] = spent[:-1, :-1] + cheapest[step, 1:]
        spent = next_states
    return int(spent.min())


def search(errors: Array, prices: Prices, fixed: Collection[int], ticks: int) -> list[int | None]:
    """Return the schedule of least summed error that costs at most ``ticks`` above the floor.

    ``error[gap, earlier, spent]`` [G + 1, G + 2, ticks + 1] is the least error of the steps so far that end in that
    state and cost exactly ``spent``. The decisions that led there are kept for every step, in one byte each. They take
    most of the memory, T * G * (G + 1) * ticks bytes.

    Args:
        errors: the errors of skipping steps, [modes, T, G + 1, G + 1]; see `ReuseErrors`.
        prices: the ticks of the modes.
        fixed: the steps that must compute, besides step 0.
        ticks: the most ticks above the floor; at least `least_ticks`.

    Returns:
        For each step, the index of the mode in which it reuses, or None where it computes.
    """
    _, steps, gaps, _ = errors.shape
    error = np.full((gaps, gaps + 1, ticks + 1), np.inf)
    error[0, 0, prices.full] = 0.0  # step 0 computes
    parents, choices = [], []
    for step in range(1, steps):
        next_states = np.full_like(error, np.inf)
        parents.append(compute(error, next_states, prices.full))
        skipped = errors[:, step, 1:]
        choices.append(None if step in fixed else skip(error[:-1, :-1], next_states[1:, :-1], skipped, prices.skips))
        error = next_states
    spent = int(error.min(axis=(0, 1)).argmin())  # the cheapest among equal errors
    gap, earlier = (int(index) for index in np.unravel_index(error[..., spent].argmin(), error.shape[:2]))
    found: list[int | None] = [None] * steps
    for step in range(steps - 1, 0, -1):
        choice = choices[step - 1]
        if gap == 0:
            spent -= prices.full
            gap = earlier - 1
            earlier = int(parents[step - 1][gap, spent])
        elif choice is not None:
            gap -= 1
            mode = int(choice[gap, earlier, spent])
            found[step] = mode
            spent -= prices.skips[mode]
    return found


def compute(error: Array, next_states: Array, price: int) -> npt.NDArray[np.uint16]:
    """Let a step compute: write the states at gap = 0 into ``next_states``.

    Args:
        error: the states before the step, [G + 1, G + 2, ticks + 1].
        next_states: the states after it, of the same shape.
        price: the ticks of a computing step.

    Returns:
        The best ``earlier`` by gap before the step and ticks spent before it, [G + 1, ticks + 1 - price].
    """
    affordable = error[..., : error.shape[-1] - price]
    next_states[0, 1:, price:] = affordable.min(axis=1)
    return affordable.argmin(axis=1).astype(np.uint16)


def skip(error: Array, next_states: Array, skipped: Array, prices: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Let a step reuse, in each state in the best mode: write the states at gap > 0 into ``next_states``.

    Args:
        error: the states before the step that can be reused from, [G, G + 1, ticks + 1].
        next_states: the states after it, of the same shape, one gap further.
        skipped: the errors of skipping the step, [modes, G, G + 1].
        prices: the ticks of every mode.

    Returns:
        The mode that leads to each state after the step, [G, G + 1, ticks + 1].
    """
    choice = np.zeros(next_states.shape, dtype=np.uint8)
    for mode, price in enumerate(prices):
        offered = error[..., : error.shape[-1] - price] + skipped[mode, :, :, None]
        held = next_states[..., price:]
        better = offered < held
        np.copyto(held, offered, where=better)
        np.copyto(choice[..., price:], mode, where=better)
    return choice
