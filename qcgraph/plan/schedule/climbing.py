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
    """Improve a schedule by its true error, which is not the sum that planners take it for.

    A move exchanges what two steps do, which keeps the cost as it is: a computing step shifts or goes to another place,
    or two modes change places. The first move that helps is taken, and the search goes on from there; no schedule is
    evaluated twice.

    Args:
        start: per step, None where it computes, or the name of a mode.
        evaluate: the true error of a schedule; infinite for one that cannot run.
        rounds: how often to evaluate at most, the start included.
        seed: of the order of moves that are equally likely to help.
        fixed: steps that stay as they are. Step 0 always does.

    Returns:
        The best schedule evaluated and its error: the start, or one that is better.

    Raises:
        UsageError: there is no round, or the start has no error to improve on.
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
    """All schedules one exchange away, the likely ones first and otherwise in random order.

    First a computing step shifts by one step, then by two; then come all other places for it and, among them, the
    exchanges of two modes.
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
