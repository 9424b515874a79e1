"""drop-variants: what no step runs is gone, and what stays computes what it did."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from qcgraph.facts import CachePlan
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.loop import sample

Run = Callable[[str, Program], Program]


@pytest.fixture(scope="module")
def split(captured: Program, run: Run) -> Program:
    """Two modes, of which the draft uses the first."""
    return run('plan-cache{interval=3 blocks="1..1+0..1"},insert-cache', captured)


def latents(program: Program) -> np.ndarray:
    return sample(TorchRunner(program), program.facts[StepPlan], program.facts[ModelSpec], [0, 1], seed=0)


def test_drop_variants_golden(split: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    golden_diff("drop-variants", split, run("drop-variants", split))


def test_what_runs_is_as_it_was(split: Program, run: Run) -> None:
    program = run("drop-variants", split)
    assert list(program.variants) == ["full", "reuse"]
    assert program.variants["full"].interface.output_names == ("noise_prediction", "cache_0")
    assert program.facts[CachePlan].modes == {"reuse": ("cache_0",)}
    assert [value.name for value in program.facts[CachePlan].values] == ["cache_0"]
    assert np.array_equal(latents(program), latents(split))


def test_branches_that_another_mode_takes_stay(captured: Program, run: Run) -> None:
    program = run('plan-cache{interval=3 what=branches blocks="1..1+0..1"},insert-cache,drop-variants', captured)
    assert list(program.variants) == ["full", "reuse"]
    assert program.facts[CachePlan].modes == {"reuse": ("cache_0", "cache_1")}
    assert program.variants["full"].interface.output_names == ("noise_prediction", "cache_0", "cache_1")


def test_where_every_step_computes_nothing_is_cached(captured: Program, split: Program, run: Run) -> None:
    every = split.with_facts(split.facts[StepPlan].with_variants(["full"] * 9))
    program = run("drop-variants", every)
    assert list(program.variants) == ["full"]
    assert program.variants["full"].interface.output_names == ("noise_prediction",)
    assert program.facts[CachePlan].values == ()
    assert np.array_equal(latents(program), latents(captured))
    assert not run("insert-forecast", program).history[-1].changed


@pytest.mark.parametrize("text", ["plan-cache{interval=3},insert-cache", "plan-cache{interval=1},insert-cache"])
def test_nothing_to_drop(captured: Program, run: Run, text: str) -> None:
    assert not run(f"{text},drop-variants", captured).history[-1].changed
