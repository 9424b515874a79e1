"""group-timesteps: the optimum is the optimum, and groups are intervals of the timestep."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from qcgraph.errors import UsageError
from qcgraph.facts import Ranges, TimestepGroups
from qcgraph.ir.program import Program
from qcgraph.passes.quantization.group_timesteps import optimal_starts, segment_costs, uniform_starts
from qcgraph.plan.steps import StepPlan

Run = Callable[[str, Program], Program]


def test_golden(ranged: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    golden_diff("group-timesteps", ranged, run("group-timesteps{groups=2}", ranged))


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_the_dynamic_program_finds_the_optimum(groups: int) -> None:
    """Against every partition of eight steps."""
    generator = np.random.default_rng(groups)
    costs = np.triu(generator.uniform(size=(8, 9)), 1)
    costs[costs == 0] = np.inf

    def total(cuts: tuple[int, ...]) -> float:
        return float(sum(costs[start, end] for start, end in itertools.pairwise((0, *cuts, 8))))

    best = min(itertools.combinations(range(1, 8), groups - 1), key=total)
    assert optimal_starts(costs, groups) == [0, *best]


def test_costs_follow_their_formula(ranged: Program) -> None:
    """Ranges [-1, 1 + i] of mean square 1 at every site: a group [i, j) costs sites * (j - i) * (1 + j)^2."""
    ranges = ranged.facts[Ranges]
    costs = segment_costs(ranges)
    sites = len(ranges.planned)
    for start, end in itertools.combinations(range(4), 2):
        assert costs[start, end] == pytest.approx(sites * (end - start) * (end + 1) ** 2)


def test_a_site_that_is_not_finite_does_not_spoil_the_groups(ranged: Program, run: Run) -> None:
    ranges = ranged.facts[Ranges]
    site = replace(ranges.planned["blocks.0.attn.qkv"], highs=(1.0, float("inf"), float("nan")))
    broken = ranged.with_facts(replace(ranges, planned={**ranges.planned, "blocks.0.attn.qkv": site}))
    groups = [run("group-timesteps{groups=2}", program).facts[TimestepGroups] for program in (ranged, broken)]
    assert groups[0] == groups[1]


def test_one_group_a_step_is_the_finest(ranged: Program, run: Run) -> None:
    program = run("group-timesteps{groups=3}", ranged)
    assert [step.group for step in program.facts[StepPlan].steps] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert program.facts[TimestepGroups].lower_timesteps == tuple(
        program.facts[StepPlan].timesteps[index] for index in (2, 5, 8)
    )


def test_more_groups_than_computing_steps_are_reported(ranged: Program, run: Run) -> None:
    program = run("group-timesteps{groups=8}", ranged)
    assert program.facts[StepPlan].group_count == 3
    assert "3 groups instead of 8" in program.history[-1].refusals[0].reason


def test_uniform_groups_have_equal_width() -> None:
    assert uniform_starts(tuple(range(12)), 12, 4) == [0, 3, 6, 9]
    assert uniform_starts((0, 3, 6, 9), 12, 2) == [0, 2]
    assert uniform_starts((0, 9), 12, 4) == [0, 1]  # the two groups in which nothing computes are left out


def test_bad_count(ranged: Program, run: Run) -> None:
    with pytest.raises(UsageError, match="groups 0"):
        run("group-timesteps{groups=0}", ranged)
    with pytest.raises(UsageError, match="strategy"):
        run("group-timesteps{strategy=best}", ranged)
