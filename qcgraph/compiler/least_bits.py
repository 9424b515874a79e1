"""Find the fewest bits that meet a gate, by bisection over compilations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from qcgraph.errors import RefusedError, UsageError
from qcgraph.progress import Progress
from qcgraph.recipe import AUTO_BITS, Recipe

BUDGETS = (4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5, 8.0)  # average bits that the search tries
Result = TypeVar("Result")


def is_asked_for(recipe: Recipe) -> bool:
    """Return whether a recipe leaves the choice of bits to its gate.

    Raises:
        UsageError: the recipe leaves it to the gate, but has no gate, or a pipeline of its own, which decides the bits.
    """
    if recipe.quantization.bits != AUTO_BITS:
        return False
    if recipe.pipeline.passes:
        raise UsageError(
            "the recipe has a pipeline of its own, which decides the bits",
            where="--bits auto",
            hint="take the passes out of pipeline.passes",
        )
    if recipe.conditions is None:
        raise UsageError(
            "there is no gate that says how good it has to be",
            where="--bits auto",
            hint='give one, such as --gate "psnr>=40", or a budget, such as --bits auto=6',
        )
    return True


def most_bits() -> str:
    """Return the largest bits of the search, as a recipe spells them; a dry run assumes them."""
    return f"{AUTO_BITS}={BUDGETS[-1]:g}"


def compile_with_least(recipe: Recipe, compile_: Callable[[Recipe, bool], Result], progress: Progress) -> Result:
    """Compile with the fewest bits that meet the gate, by bisection over `BUDGETS`.

    A bundle that meets the gate is written, and replaced by the next one that meets the gate with fewer bits. If the
    search is interrupted, the last bundle still meets the gate.

    Args:
        recipe: asks for ``auto`` bits, and has a gate.
        compile_: compiles a recipe and writes the bundle; the flag says whether it replaces an earlier one.
        progress: receives progress messages.

    Raises:
        RefusedError: the gate is not met with the most bits; nothing was written.
    """
    low, high = 0, len(BUDGETS)  # budgets below low miss the gate; those from high on meet it
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
