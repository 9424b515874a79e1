"""Hill climbing: small moves of a schedule, judged by its true error."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import combinations

import numpy as np

from qcgraph.errors import UsageError


def climb(
    start: Sequence[str | None],
    evaluate: Callable[[tuple[str | None, ...]], float],
    *,
    rounds: int,
    seed: int,
    fixed: Collection[int] = (0,),
) -> tuple[tuple[str | None, ...], float]:
    """Improve a schedule by its true error, which planners only approximate by a sum.

    A move exchanges two steps, which keeps the cost unchanged: a computing step shifts or moves elsewhere, or two modes
    change places. The first move that lowers the error is taken, and the search goes on from there. No schedule is
    evaluated twice.

    Args:
        start: for each step, None where it computes, or the name of a mode.
        evaluate: returns the true error of a schedule; infinite for a schedule that cannot run.
        rounds: the most schedules to evaluate, the start included.
        seed: the seed of the order of moves that are equally likely to help.
        fixed: the steps that do not change. Step 0 never does.

    Returns:
        The best evaluated schedule and its error; it is never worse than the start.

    Raises:
        UsageError: there are no rounds, or the error of the start is not a number.
    """
    if rounds < 1:
        raise UsageError(f"{rounds} rounds of hill climbing", hint="the first one evaluates the start")
    best = tuple(start)
    least = evaluate(best)
    if math.isnan(least):
        raise UsageError("the error of the start is not a number", hint="start from a schedule that can run")
    generator = np.random.default_rng(seed)
    seen = {best}
    moves = neighbours(best, fixed, generator)
    while len(seen) < rounds:
        candidate = next((schedule for schedule in moves if schedule not in seen), None)
        if candidate is None:
            break
        seen.add(candidate)
        error = evaluate(candidate)
        if error < least:
            best, least = candidate, error
            moves = neighbours(best, fixed, generator)
    return best, least


def neighbours(
    schedule: tuple[str | None, ...], fixed: Collection[int], generator: np.random.Generator
) -> Iterator[tuple[str | None, ...]]:
    """Yield all schedules one exchange away, the likely improvements first and otherwise in random order.

    First come shifts of a computing step by one step, then by two steps. Then come its moves to all other places and,
    among them, the exchanges of two modes.
    """
    free = [step for step in range(1, len(schedule)) if step not in fixed]
    pairs = [(first, second) for first, second in combinations(free, 2) if schedule[first] != schedule[second]]
    shuffled = [pairs[index] for index in generator.permutation(len(pairs))]

    def rank(pair: tuple[int, int]) -> int:
        first, second = pair
        return min(second - first, 3) if None in (schedule[first], schedule[second]) else 3

    for first, second in sorted(shuffled, key=rank):
        changed = list(schedule)
        changed[first], changed[second] = schedule[second], schedule[first]
        yield tuple(changed)
