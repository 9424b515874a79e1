"""plan-steps: within the budget, the same for a seed, and by the costs that can be had."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest

from qcgraph.errors import UsageError
from qcgraph.facts import CachePlan, SchedulePlan
from qcgraph.ir.program import Program
from qcgraph.ir.structure import macs_by_variant
from qcgraph.passes.caching._reuse_errors import OpenLoop, Rehearsal
from qcgraph.passes.caching._trajectories import record
from qcgraph.passes.caching.forecasters.taylor import TAYLOR
from qcgraph.passes.caching.plan_steps import differences, rounded
from qcgraph.pipeline import Pipeline
from qcgraph.pipeline.calibration_budget import affordable_trajectories
from qcgraph.pipeline.pipeline import Costs
from qcgraph.plan.schedule import dps
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress

Run = Callable[[str, Program], Program]
MEASURED = "plan-steps{measured=true budget=0.7 trajectories=2}"


def names(program: Program) -> list[str]:
    return [step.variant for step in program.facts[StepPlan].steps]


@pytest.fixture(scope="module")
def split(captured: Program, run: Run) -> Program:
    return run("plan-cache{budget=0.5 history=3},insert-cache", captured)


@pytest.fixture(scope="module")
def two_modes(captured: Program, run: Run) -> Program:
    return run('plan-cache{budget=0.5 blocks="0..1+1..1" history=2},insert-cache', captured)


def test_plan_steps_golden(split: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    golden_diff("plan-steps", split, run("plan-steps{budget=0.5 trajectories=2}", split))


@pytest.mark.parametrize("budget", [0.3, 0.45, 0.7, 1.0])
def test_the_budget_is_kept_and_used(two_modes: Program, run: Run, budget: float) -> None:
    program = run(f"plan-steps{{budget={budget} trajectories=2}}", two_modes)
    macs, schedule, fact = macs_by_variant(two_modes.variants), names(program), program.facts[SchedulePlan]
    spent = sum(macs[name] for name in schedule) / macs["full"] / len(schedule)
    assert schedule[0] == "full"
    assert spent <= fact.spent <= budget
    assert fact.spent == pytest.approx(spent, abs=0.005)
    assert budget - fact.spent < 1 / len(schedule)
    assert not fact.measured_on


def test_a_larger_budget_is_expected_to_do_better(two_modes: Program, run: Run) -> None:
    programs = [run(f"plan-steps{{budget={budget} trajectories=2}}", two_modes) for budget in (0.3, 0.7)]
    facts = [program.facts[SchedulePlan] for program in programs]
    assert facts[1].expected_error < facts[0].expected_error
    assert facts[1].rehearsed_error < facts[0].rehearsed_error


def test_the_whole_budget_is_no_error(split: Program, run: Run) -> None:
    program = run("plan-steps{budget=1 trajectories=2}", split)
    assert names(program) == ["full"] * 9
    assert program.facts[SchedulePlan].rehearsed_error == 0.0


@pytest.mark.parametrize("options", ["", " rounds=4", " weighting=measured", " forecast=dec"])
def test_a_seed_gives_one_schedule(split: Program, run: Run, options: str) -> None:
    text = f"plan-steps{{budget=0.4 trajectories=2 seed=3{options}}}"
    one, other = (run(text, split) for _ in range(2))
    assert one.facts[SchedulePlan] == other.facts[SchedulePlan]
    assert names(one) == names(other)


def test_the_rehearsed_error_is_that_of_the_schedule(split: Program, run: Run) -> None:
    program = run("plan-steps{budget=0.4 trajectories=2 forecast=taylor}", split)
    trajectories = record(split, 2, 0, Progress())
    rehearsal = Rehearsal(split, trajectories, OpenLoop(split, trajectories, TAYLOR))
    assert rehearsal.final_error(program.facts[StepPlan].modes) == program.facts[SchedulePlan].rehearsed_error


def test_climbing_never_makes_it_worse_and_keeps_the_cost(split: Program, run: Run) -> None:
    plain, climbed = (
        run(f"plan-steps{{budget=0.4 trajectories=2 gap=4 rounds={rounds}}}", split) for rounds in (0, 12)
    )
    facts = [program.facts[SchedulePlan] for program in (plain, climbed)]
    assert facts[1].rehearsed_error <= facts[0].rehearsed_error
    assert facts[1].spent == facts[0].spent
    assert facts[1].expected_error >= facts[0].expected_error  # the planner's is the least there is
    assert np.isfinite(facts[1].expected_error)
    skipped = "".join("x" if name == "full" else "." for name in names(climbed))
    assert "." * 5 not in skipped


@pytest.mark.parametrize("gap", [1, 2])
def test_no_gap_is_longer_than_asked_for(split: Program, run: Run, gap: int) -> None:
    schedule = names(run(f"plan-steps{{budget=0.7 gap={gap} trajectories=2}}", split))
    last = 0
    for index, name in enumerate(schedule):
        last = index if name == "full" else last
        assert index - last <= gap


def test_costs_are_measured_where_they_can_be(split: Program) -> None:
    """A reusing step of half the cost: 0.7 * 9 is 3 computing steps and 6 others, 6.0 in all; a fourth would be 6.5."""
    asked: list[Program] = []

    def costs(program: Program) -> Mapping[str, float]:
        asked.append(program)
        return {"full": 8.0, "reuse": 4.0}

    program = Pipeline.parse(MEASURED).run(split, costs=Costs("toy", costs))
    fact = program.facts[SchedulePlan]
    assert asked == [split]
    assert names(program).count("full") == 3
    assert fact.measured_on == "toy"
    assert fact.spent == pytest.approx(6 / 9)


def test_a_budget_below_what_was_measured_is_raised_to_the_least_one(split: Program, run: Run) -> None:
    text = "plan-steps{measured=true budget=0.3 trajectories=2}"
    program = Pipeline.parse(text).run(split, costs=Costs("toy", lambda _: {"full": 1.0, "reuse": 0.9}))
    (refusal,) = program.history[-1].refusals
    least = float(refusal.reason.split()[-1])
    assert program.facts[SchedulePlan].spent == pytest.approx(least, abs=1e-3)
    assert least == pytest.approx((1 + 8 * 0.9) / 9, abs=1e-3)
    with pytest.raises(UsageError, match=r"no schedule costs at most 0\.0001"):
        run("plan-steps{measured=true budget=0.0001 trajectories=2}", split)


def test_without_a_way_to_measure_arithmetic_counts(split: Program, run: Run) -> None:
    fact = run(MEASURED, split).facts[SchedulePlan]
    assert not fact.measured_on
    assert fact == run(MEASURED.replace("measured=true ", ""), split).facts[SchedulePlan]


def test_a_mode_that_is_not_faster_is_left_out(two_modes: Program) -> None:
    program = Pipeline.parse(MEASURED).run(
        two_modes, costs=Costs("toy", lambda _: {"full": 2.0, "reuse": 0.2, "reuse_1": 2.1})
    )
    assert set(names(program)) == {"full", "reuse"}
    with pytest.raises(UsageError, match="no variant that reuses is faster"):
        Pipeline.parse(MEASURED).run(
            two_modes, costs=Costs("toy", lambda _: {"full": 2.0, "reuse": 2.0, "reuse_1": 2.1})
        )


def test_a_ratio_is_rounded_up() -> None:
    assert rounded(1.0) == 1.0
    assert rounded(0.1001) == pytest.approx(0.105)


def test_dps_is_that_of_the_distances(split: Program, run: Run) -> None:
    program = run("plan-steps{strategy=dps interval=3 trajectories=2}", split)
    (values,) = record(split, 2, 0, Progress()).values.values()
    distances = np.zeros((9, 9))
    for one in range(9):
        for other in range(one + 1, 9):
            distances[one, other] = np.abs(values[other].numpy() - values[one].numpy()).sum()
    np.testing.assert_allclose(differences(record(split, 2, 0, Progress())), distances, rtol=1e-5)
    assert names(program) == ["full" if computes else "reuse" for computes in dps(distances, 3)]
    assert names(program).count("full") == 3
    fact = program.facts[SchedulePlan]
    assert (fact.strategy, fact.expected_error, fact.rehearsed_error) == ("dps", None, None)


def test_nothing_to_plan_where_every_step_computes(captured: Program, run: Run) -> None:
    program = run("plan-cache{budget=1},insert-cache,plan-steps", captured)
    assert names(program) == ["main"] * 9
    assert "every step computes" in program.history[-1].refusals[0].reason
    assert program.facts[SchedulePlan].spent == 1.0


@pytest.mark.parametrize(
    ("options", "tensors"),
    [("", 1), ('blocks="0..1+1..1"', 2), ("what=branches", 4), ('what=branches blocks="0..0"', 2)],
)
def test_memory_bounds_the_trajectories(
    captured: Program, run: Run, monkeypatch: pytest.MonkeyPatch, options: str, tensors: int
) -> None:
    """Cached tensors of 16 x 32 numbers of 4 bytes, 9 steps, two halves."""
    split, size = run(f"plan-cache{{{options}}},insert-cache", captured), tensors * 16 * 32 * 4 * 9 * 2
    assert affordable_trajectories(split) == 16
    for room, expected in [(5 * size, 5), (size, 1), (0, 1)]:
        monkeypatch.setattr("qcgraph.pipeline.calibration_budget.RECORD_BYTES", room)
        assert affordable_trajectories(split) == expected
    trajectories = record(split, 5, 0, Progress())
    held = sum(value.untyped_storage().nbytes() for values in trajectories.values.values() for value in values)
    assert held == 5 * size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("budget=0", "budget 0"),
        ("budget=1.5", "budget 1.5"),
        ("gap=0", "gap 0"),
        ("rounds=-1", "rounds -1"),
        ("interval=0", "interval 0"),
        ("trajectories=0", "trajectories 0"),
        ("budget=0.11 trajectories=2", "no schedule costs at most 0.11 of computing every step"),
        ("strategy=best", "option strategy"),
    ],
)
def test_bad_options(split: Program, run: Run, options: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        run(f"plan-steps{{{options}}}", split)
    assert caught.value.hint


def test_modes_of_a_plan_that_was_dropped(split: Program, run: Run) -> None:
    """A program whose cache plan has no mode left, as drop-variants leaves it."""
    plan = replace(split.facts[CachePlan], values=(), modes={})
    program = run("plan-steps", split.with_facts(plan))
    assert "every step computes" in program.history[-1].refusals[0].reason
