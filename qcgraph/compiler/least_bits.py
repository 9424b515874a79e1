"""The fewest bits that meet a gate: compilations with more and fewer of them, until the step between is small."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from qcgraph.errors import RefusedError, UsageError
from qcgraph.progress import Progress
from qcgraph.recipe import AUTO_BITS, Recipe

BUDGETS = (4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5, 8.0)  # bits on average
Result = TypeVar("Result")


def is_asked_for(recipe: Recipe) -> bool:
    """Whether a recipe leaves the bits to its gate.

    Raises:
        UsageError: it does, and has none.
    """
    if recipe.quantization.bits != AUTO_BITS:
        return False
    if recipe.conditions is None:
        raise UsageError(
            "there is no gate that says how good it has to be",
            where="--bits auto",
            hint='give one, such as --gate "psnr>=40", or a budget, such as --bits auto=6',
        )
    return True


def most_bits() -> str:
    """Return the bits that the search may need at most, as the recipe spells them: what a dry run assumes."""
    return f"{AUTO_BITS}={BUDGETS[-1]:g}"


def compile_with_least(recipe: Recipe, compile_: Callable[[Recipe, bool], Result], progress: Progress) -> Result:
    """Compile with the fewest bits that meet the gate, by bisection over `BUDGETS`.

    A compilation that meets it is written, and replaced by the next one that does with fewer bits: whenever this is
    stopped, what is there is good enough.

    Args:
        recipe: asks for ``auto`` bits under a gate.
        compile_: compiles a recipe and writes the bundle; the flag says whether it replaces one of these attempts.
        progress: told of the attempts.

    Raises:
        RefusedError: the most bits do not meet the gate; nothing was written.
    """
    low, high = 0, len(BUDGETS)  # all below low are refused, high is met
    best: Result | None = None
    refusal: RefusedError | None = None
    while low < high:
        middle = (low + high) // 2
        budget = BUDGETS[middle]
        try:
            best = compile_(recipe.override(bits=f"{AUTO_BITS}={budget:g}"), best is not None)
            high = middle
            progress.note(f"{budget:g} bits on average meet the gate")
        except RefusedError as error:
            refusal, low = error, middle + 1
            progress.note(f"{budget:g} bits on average do not: {error.message}")
    if best is None:
        assert refusal is not None
        raise refusal
    return best
