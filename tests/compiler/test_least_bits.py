"""The fewest bits that meet a gate."""

from __future__ import annotations

import pytest

from qcgraph.compiler.least_bits import BUDGETS, compile_with_least, is_asked_for
from qcgraph.errors import RefusedError, UsageError, VerificationError
from qcgraph.progress import Progress
from qcgraph.recipe import Recipe

RECIPE = Recipe().override(bits="auto", gate="psnr>=40")


class Compiler:
    """Meets the gate from so many bits on."""

    def __init__(self, least: float) -> None:
        self.least = least
        self.attempts: list[tuple[float, bool]] = []
        self.written: float | None = None

    def __call__(self, recipe: Recipe, again: bool) -> float:
        budget = recipe.bit_budget
        assert budget is not None
        self.attempts.append((budget, again))
        if budget < self.least:
            raise RefusedError("the gate is not met: psnr>=40 (it is 39)")
        assert again is (self.written is not None)
        self.written = budget
        return budget


@pytest.mark.parametrize("least", BUDGETS)
def test_the_fewest_are_found_and_left(least: float) -> None:
    compiler = Compiler(least)
    assert compile_with_least(RECIPE, compiler, Progress()) == least
    assert compiler.written == least
    assert len(compiler.attempts) <= 4


def test_a_gate_that_nothing_meets() -> None:
    compiler = Compiler(9.0)
    with pytest.raises(RefusedError, match="not met"):
        compile_with_least(RECIPE, compiler, Progress())
    assert compiler.written is None


def test_what_is_broken_is_not_tried_with_more_bits() -> None:
    attempts = []

    def broken(recipe: Recipe, again: bool) -> None:
        attempts.append(recipe)
        raise VerificationError("parity of noise_prediction")

    with pytest.raises(VerificationError, match="parity"):
        compile_with_least(RECIPE, broken, Progress())
    assert len(attempts) == 1


def test_without_a_gate_there_is_nothing_to_meet() -> None:
    with pytest.raises(UsageError, match="no gate") as caught:
        is_asked_for(Recipe().override(bits="auto"))
    assert "--bits auto=6" in str(caught.value.hint)
    assert not is_asked_for(Recipe().override(bits="auto=6"))
    assert is_asked_for(RECIPE)
