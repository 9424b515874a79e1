"""apply-plan and rehearse-steps: a schedule from elsewhere, and what it does to the images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from qcgraph.errors import UsageError
from qcgraph.facts import CachePlan, Rehearsed
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.pipeline import Pipeline
from qcgraph.plan.schedule import TimedSchedule
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.loop import sample

Run = Callable[[str, Program], Program]
SPLIT = "plan-cache{interval=3 history=2},insert-cache"
OWN = "888-111:FRRFRRRFR"  # at the steps of the captured program


def variants(program: Program) -> str:
    return program.facts[StepPlan].schedule().partition(" ")[0]


def latents(program: Program) -> np.ndarray:
    return sample(TorchRunner(program), program.facts[StepPlan], program.facts[ModelSpec], [0, 1, 2], seed=0)


@pytest.fixture(scope="module")
def split(captured: Program, run: Run) -> Program:
    return run(SPLIT, captured)


def test_follow_plan_golden(split: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    golden_diff("apply-plan", split, run(f"apply-plan{{plan={OWN}}}", split))


def test_rehearse_steps_golden(split: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    golden_diff("rehearse-steps", split, run("rehearse-steps{trajectories=2}", split))


@pytest.mark.parametrize("plan", [OWN, "999-50:FRFRFRFRFR+500-50:FRFRFRFRFR", "0:F", "9.5-0.5:FR+3:1"])
def test_the_text_of_a_long_option_survives(plan: str) -> None:
    text = f"plan-cache,insert-cache,apply-plan{{plan={plan}}}"
    assert Pipeline.parse(text).text == text


def test_at_its_own_steps_a_plan_is_followed_exactly(split: Program, run: Run) -> None:
    """The plan that a compilation made for itself gives the same program, to the bit."""
    plan = split.facts[StepPlan]
    text = TimedSchedule(plan.timesteps, plan.modes).text
    followed = run(f"apply-plan{{plan={text}}}", split)
    assert not followed.history[-1].changed
    assert followed.facts[StepPlan] == plan


def test_all_steps_computing_is_no_cache_to_the_bit(captured: Program, split: Program, run: Run) -> None:
    followed = run("apply-plan{plan=888-111:FFFFFFFFF},rehearse-steps{trajectories=2}", split)
    assert np.array_equal(latents(followed), latents(captured))
    assert followed.facts[Rehearsed] == Rehearsed(0.0, 0.0, 2)


@pytest.mark.parametrize(
    ("scheduler", "steps", "expected"),
    [
        ("ddim", 9, "FRRFRRRFR"),
        ("ddpm", 9, "FRRFRRRFR"),
        ("ddim", 18, "FRRRFRRFRRRFRRRFRF"),
        ("dpmsolver++", 6, "FRRRFR"),
    ],
)
def test_other_steps_and_schedulers(captured: Program, run: Run, scheduler: str, steps: int, expected: str) -> None:
    spec = captured.facts[ModelSpec]
    plan = make_step_plan(scheduler, steps, 1.5, spec.noise_schedule, captured.constants_digest)
    followed = run(f"{SPLIT},apply-plan{{plan={OWN}}}", captured.with_facts(plan))
    assert len(variants(followed)) == steps
    assert variants(followed).count("F") == max(1, int(3 * steps / 9 + 0.5))
    assert variants(followed) == expected
    assert np.isfinite(latents(followed)).all()


def test_several_modes(captured: Program, run: Run) -> None:
    program = run("plan-cache{blocks=0..1+1..1},insert-cache,apply-plan{plan=888-111:F1RF1R1RR}", captured)
    assert [step.variant for step in program.facts[StepPlan].steps][:3] == ["full", "reuse_1", "reuse"]
    assert set(program.facts[CachePlan].modes) == {"reuse", "reuse_1"}
    rehearsed = run("rehearse-steps{forecast=reuse trajectories=2}", program).facts[Rehearsed]
    assert rehearsed.error > 0
    assert rehearsed.even_error > 0


def test_an_even_plan_has_the_error_of_even_steps(split: Program, run: Run) -> None:
    rehearsed = run("rehearse-steps{trajectories=2}", split).facts[Rehearsed]  # every third of nine
    assert rehearsed.error == rehearsed.even_error > 0


def test_nothing_to_follow_where_nothing_reuses(captured: Program, run: Run) -> None:
    program = run("plan-cache{interval=1},insert-cache,apply-plan{plan=900-450:FRF},rehearse-steps", captured)
    assert [len(record.refusals) for record in program.history[-2:]] == [1, 1]
    assert program.facts[Rehearsed] == Rehearsed(0.0, 0.0, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("apply-plan", "no plan to follow"),
        ("apply-plan{plan=888-111:F1}", "timestep 777 in the mode reuse_1, which this compilation has not"),
        ("apply-plan{plan=888-111:RF}", "timestep 888, the first one, is to reuse"),
        ("apply-plan{plan=888:}", "cannot read '888:'"),
        ("rehearse-steps{trajectories=0}", "trajectories 0"),
    ],
)
def test_refused(split: Program, run: Run, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        run(text, split)
    assert caught.value.hint
    assert (caught.value.where or "").startswith(f"pass {text.partition('{')[0]}")


def test_nothing_to_follow_is_refused_before_anything_runs(captured: Program) -> None:
    Pipeline.parse("apply-plan{plan=980-20:FRF}").check(captured)
    with pytest.raises(UsageError, match="no plan to follow"):
        Pipeline.parse("equalize,plan-cache,insert-cache,apply-plan").check(captured)
