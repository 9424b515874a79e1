"""What the variants of a step plan are for: roles are checked, and answer what names do not."""

from __future__ import annotations

import pytest

from qcgraph.errors import UsageError
from qcgraph.plan.roles import COMPUTES, HALF, REUSES, VariantRole, prepares
from qcgraph.plan.steps import CAPTURED, Fingerprint, Step, StepPlan, Update

# Names that say nothing, or the wrong thing.
ROLES = {
    "reuse": COMPUTES,
    "full": REUSES,
    "main": HALF,
    "a": prepares("reuse"),
    "b": prepares("full"),
}


def plan_of(variants: list[str], roles: dict[str, VariantRole]) -> StepPlan:
    timesteps = reversed(range(len(variants)))
    steps = (Step(float(timestep), Update(1, 1), name) for timestep, name in zip(timesteps, variants, strict=True))
    return StepPlan(Fingerprint("m", "ddim", len(variants), 1.5), tuple(steps), roles)


@pytest.fixture
def plan() -> StepPlan:
    return plan_of(["reuse", "full", "reuse", "main"], ROLES)


@pytest.mark.parametrize(
    ("variants", "roles", "message"),
    [
        (["full"], {"full": REUSES}, "not exactly one variant computes"),
        (["full"], {"full": HALF, "a": prepares("full")}, "not exactly one variant computes"),
        (["full"], {"full": COMPUTES, "other": COMPUTES}, "not exactly one variant computes"),
        (["full", "reuse"], {"full": COMPUTES}, "a step runs 'reuse', which is no variant of steps"),
        (["full", "a"], {"full": COMPUTES, "a": prepares("full")}, "a step runs 'a', which is no variant of steps"),
        (["full"], {}, "a step runs 'full', which is no variant of steps"),
    ],
)
def test_roles_are_checked(variants: list[str], roles: dict[str, VariantRole], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        plan_of(variants, roles)
    assert caught.value.hint


def test_a_plan_of_a_captured_program_has_one_variant() -> None:
    steps = (Step(9.0, Update(1, 1)), Step(1.0, Update(1, 1)))
    plan = StepPlan(Fingerprint("m", "ddim", 2, 1.0), steps)
    assert plan.roles == {CAPTURED: COMPUTES}
    assert (plan.computing, plan.reusing, dict(plan.preparing)) == (CAPTURED, (), {})
    assert plan.modes == (None, None)
    assert not plan.restores_half


def test_roles_say_what_variants_are_for(plan: StepPlan) -> None:
    assert plan.computing == "reuse"
    assert plan.reusing == ("full", "main")
    assert plan.preparing == {"reuse": "a", "full": "b"}
    assert [plan.computes(index) for index in range(4)] == [True, False, True, False]
    assert plan.restores_half
    assert not plan_of(["full"], {"full": COMPUTES, "reuse": REUSES}).restores_half


def test_a_variant_is_used_by_the_steps_that_it_serves(plan: StepPlan) -> None:
    assert [plan.serves(name) for name in ROLES] == ["reuse", "full", "main", "reuse", "full"]
    assert [plan.uses(name) for name in ROLES] == [2, 1, 1, 2, 1]


def test_the_work_is_that_of_all_steps(plan: StepPlan) -> None:
    macs = {"reuse": 10, "full": 4, "main": 1, "a": 2, "b": 3}
    assert plan.work(macs) == 2 * 10 + 4 + 1 + 2 * 2 + 3
    assert plan.work_ratio(macs, 10) == 32 / 40
    assert plan.work_ratio(dict.fromkeys(macs, 0), 0) == 1.0


def test_modes_are_the_variants_but_the_computing_one(plan: StepPlan) -> None:
    assert plan.modes == (None, "full", None, "main")
    assert plan.with_modes(plan.modes) == plan
    moved = plan.with_modes([None, None, "main", "full"])
    assert [step.variant for step in moved.steps] == ["reuse", "reuse", "main", "full"]
    assert moved.roles == plan.roles
    assert plan.all_computing.modes == (None,) * 4
    with pytest.raises(UsageError, match="a step runs 'skip'"):
        plan.with_modes([None, "skip", None, None])
