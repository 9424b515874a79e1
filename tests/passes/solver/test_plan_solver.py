"""plan-solver: the steps that it chooses, what it leaves, the setting at which nothing changes, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from qcgraph.errors import ContractError, UsageError
from qcgraph.facts import SolverPlan, SolverTargets
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.passes.solver import plan_solver
from qcgraph.passes.solver.plan_solver import PlanSolver
from qcgraph.pipeline import PassContext, Pipeline
from qcgraph.pipeline.pipeline import Costs
from qcgraph.pipeline.workload import Workload
from qcgraph.plan.levels import CLEAN, first_order, levels
from qcgraph.plan.placement import Placement, place
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import ModelSpec, NoiseSchedule
from qcgraph.plan.steps import StepPlan, Update
from qcgraph.progress import Progress
from qcgraph.sampling.calibration import calibration_conditions, calibration_noise, decode_latents
from qcgraph.sampling.fitting import with_updates
from qcgraph.sampling.reference import walk
from qcgraph.sampling.refining import effects

Run = Callable[[str, Program], Program]
TRAJECTORIES = 4
RUN = f"plan-solver{{target=run steps=4 trajectories={TRAJECTORIES}}}"


def with_plan(program: Program, scheduler: str, steps: int, guidance: float = 1.5) -> Program:
    """The program for another plan."""
    schedule = program.facts[ModelSpec].noise_schedule
    return program.with_facts(make_step_plan(scheduler, steps, guidance, schedule, program.constants_digest))


def of_kind(program: Program, schedule: NoiseSchedule, scheduler: str = "auto", steps: int = 9) -> Program:
    """The program as if its network predicted something else."""
    spec = replace(program.facts[ModelSpec], noise_schedule=schedule)
    return with_plan(program.with_facts(spec), scheduler, steps)


@pytest.fixture(scope="module")
def planned(captured: Program, run: Run) -> Program:
    return run(RUN, captured)


def test_what_it_changes(captured: Program, planned: Program, golden_diff: Callable[..., None]) -> None:
    golden_diff("plan-solver", captured, planned)


def test_graphs_and_weights_stay(captured: Program, planned: Program) -> None:
    assert {name: variant.graph for name, variant in planned.variants.items()} == {
        name: variant.graph for name, variant in captured.variants.items()
    }
    assert planned.constants_digest == captured.constants_digest


def test_the_chosen_steps_are_some_of_the_run(captured: Program, planned: Program) -> None:
    """The first one among them, each with its timestep, and the plan says what it stands for."""
    whole, plan = captured.facts[StepPlan], planned.facts[StepPlan]
    assert len(plan) == 4
    assert set(plan.timesteps) <= set(whole.timesteps)
    assert plan.timesteps[0] == whole.timesteps[0]
    assert plan.fingerprint == replace(whole.fingerprint, solver="fitted")
    assert plan.is_fitted
    assert not whole.is_fitted
    assert plan.describe() == "ddim, 4 fitted of 9 steps, guidance 1.5"
    assert [(step.row, step.group, step.variant) for step in plan.steps] == [
        (row, 0, whole.computing) for row in range(4)
    ]


def test_the_plain_updates_are_of_first_order(captured: Program, planned: Program) -> None:
    """From each chosen timestep to the next; between neighbours of the run they are those of the run, to the bit."""
    whole, plan, solver = captured.facts[StepPlan], planned.facts[StepPlan], planned.facts[SolverPlan]
    schedule = captured.facts[ModelSpec].noise_schedule
    places = [*zip(*levels(schedule, plan.timesteps), strict=True), CLEAN]
    steps = [whole.timesteps.index(timestep) for timestep in plan.timesteps]
    jumps = 0
    for update, (here, there), (step, after) in zip(
        solver.plain, pairwise(places), pairwise([*steps, len(whole)]), strict=True
    ):
        if after == step + 1:
            assert update == whole.steps[step].update
            continue
        jumps += 1
        assert update == first_order(schedule, here, there)
    assert jumps
    assert (solver.target, solver.run_steps, solver.history) == ("run", 9, 3)


def test_the_targets_are_latents_of_the_run(captured: Program, planned: Program) -> None:
    """At the timestep after each chosen step, from the noise of the calibration trajectories."""
    spec, whole = captured.facts[ModelSpec], captured.facts[StepPlan]
    targets = planned.facts[SolverTargets]
    assert (targets.seed, targets.trajectories) == (0, TRAJECTORIES)
    conditions = calibration_conditions(TRAJECTORIES, 0, spec)
    initial = calibration_noise(TRAJECTORIES, 0, spec).initial()
    latents = walk(TorchRunner(captured), whole, spec, conditions, initial, Progress()).latents
    steps = [whole.timesteps.index(timestep) for timestep in planned.facts[StepPlan].timesteps]
    for text, index in zip(targets.latents, (*steps[1:], len(whole)), strict=True):
        assert np.array_equal(decode_latents(text, spec.latent_shape), latents[index])


def test_the_best_of_the_candidates_is_taken(planned: Program) -> None:
    errors = planned.facts[SolverPlan].errors
    assert errors[0] == min(errors)
    assert list(errors) == sorted(errors)


@pytest.mark.usefixtures("refinement")
def test_all_coefficients_are_refined_together(captured: Program, run: Run) -> None:
    """Where the trajectories suffice: the targets are then the latents of the refined plan, but for the last one."""
    found = run("plan-solver{target=run steps=4 trajectories=16}", captured)
    solver, targets, spec = found.facts[SolverPlan], found.facts[SolverTargets], found.facts[ModelSpec]
    assert solver.refined is not None
    before, after = solver.refined
    assert after < before
    conditions, initial = calibration_conditions(16, 0, spec), calibration_noise(16, 0, spec).initial()
    ours, whole = (
        walk(TorchRunner(captured), plan, spec, conditions, initial, Progress()).latents
        for plan in (found.facts[StepPlan], captured.facts[StepPlan])
    )
    decoded = [decode_latents(text, spec.latent_shape) for text in targets.latents]
    assert all(np.array_equal(*pair) for pair in zip(decoded, (*ours[1:-1], whole[-1]), strict=True))
    assert after == pytest.approx(np.square(ours[-1] - whole[-1], dtype=np.float64).mean(), rel=1e-6)


@pytest.mark.usefixtures("refinement")
def test_few_trajectories_are_not_refined_on(captured: Program, run: Run) -> None:
    assert run(RUN, captured).facts[SolverPlan].refined is None


def only_mixed(*args: Any) -> tuple[Placement, ...]:
    return tuple(one for one in place(*args) if not all(one.whole))


@pytest.mark.usefixtures("refinement")
@pytest.mark.parametrize("trajectories", [4, 16])
def test_steps_of_one_half_of_guidance(
    captured: Program, run: Run, monkeypatch: pytest.MonkeyPatch, trajectories: int
) -> None:
    """More steps for the work of 4; plan-cache creates what they run, and fit-solver fits the cached program."""
    monkeypatch.setattr(plan_solver, "place", only_mixed)
    text = f"plan-solver{{target=run steps=4 reuse=guidance trajectories={trajectories}}}"
    found = run(text, captured)
    modes = found.facts[SolverPlan].modes
    assert modes[0] is None
    assert len(modes) == len(found.facts[StepPlan]) > 4
    assert modes.count(None) + 0.6 * modes.count("conditional") <= 4.5
    assert set(found.facts[StepPlan].roles) == {"main"}
    split = run("plan-cache{solver=true blocks=guidance},insert-cache", found)
    assert split.facts[StepPlan].modes == modes
    assert "of one half of guidance" in split.facts[SolverPlan].lines()[0]
    fitted, spec = run("fit-solver", split), found.facts[ModelSpec]
    conditions, initial = (
        calibration_conditions(trajectories, 0, spec),
        calibration_noise(trajectories, 0, spec).initial(),
    )
    last = decode_latents(found.facts[SolverTargets].latents[-1], spec.latent_shape)
    ours, plain = (
        walk(TorchRunner(split), plan, spec, conditions, initial, Progress()).latents[-1]
        for plan in (fitted.facts[StepPlan], with_updates(split.facts[StepPlan], found.facts[SolverPlan].plain))
    )
    assert np.linalg.norm(ours - last) < np.linalg.norm(plain - last)


def test_a_half_that_saves_little_is_not_taken(captured: Program) -> None:
    """By measured milliseconds: at 0.95 of a whole step no more steps fit in."""
    costs = Costs("toy", lambda _: {"full": 1.0, "conditional": 0.95})
    text = "plan-solver{target=run steps=4 reuse=guidance measured=true trajectories=4}"
    found = Pipeline.parse(text).run(captured, costs=costs).facts[SolverPlan]
    assert found.modes == (None,) * 4
    assert len(found.errors) <= 2


def test_without_guidance_every_step_is_whole(captured: Program, run: Run) -> None:
    program = with_plan(captured, "ddim", 9, guidance=1.0)
    assert run(RUN.replace("}", " reuse=guidance}"), program).facts[SolverPlan].modes == (None,) * 4


def test_the_same_seed_gives_the_same_plan(captured: Program, planned: Program, run: Run) -> None:
    again, other = run(RUN, captured), run(RUN.replace("}", " seed=1}"), captured)
    assert again.facts.encode() == planned.facts.encode()
    assert other.facts[SolverTargets] != planned.facts[SolverTargets]


@pytest.mark.parametrize(("scheduler", "steps"), [("ddim", 9), ("dpmsolver++", 5), ("dpmsolver++", 1)])
@pytest.mark.parametrize(("trajectories", "extra"), [(1, 0), (3, 0), (1, 4)])
def test_all_steps_of_the_run_are_the_run(
    captured: Program, run: Run, scheduler: str, steps: int, trajectories: int, extra: int
) -> None:
    """Every update to the bit, those that look back to earlier steps included; more of them are not there."""
    program = with_plan(captured, scheduler, steps)
    plan = run(f"plan-solver{{steps={steps + extra} target=run trajectories={trajectories}}}", program).facts[StepPlan]
    whole = program.facts[StepPlan]
    assert plan.steps == whole.steps
    assert replace(plan, fingerprint=whole.fingerprint) == whole


@pytest.mark.parametrize("history", [0, 1])
def test_no_update_looks_back_further_than_asked(captured: Program, run: Run, history: int) -> None:
    program = run(RUN.replace("}", f" history={history}}}"), captured)
    assert max(len(step.update.history) for step in program.facts[StepPlan].steps) <= history
    assert program.facts[SolverPlan].history == history


@pytest.mark.parametrize(
    "schedule",
    [NoiseSchedule(prediction="flow_prediction", shift=3.0), NoiseSchedule(prediction="v_prediction")],
    ids=lambda schedule: schedule.prediction,
)
def test_other_predictions(captured: Program, run: Run, schedule: NoiseSchedule) -> None:
    """All steps are the run there, too; fewer ones are better than the plain updates would be."""
    program = of_kind(captured, schedule)
    whole = program.facts[StepPlan]
    assert run("plan-solver{steps=9 target=run trajectories=2}", program).facts[StepPlan].steps == whole.steps
    found = run(RUN, program)
    assert found.facts[StepPlan].fingerprint.scheduler == whole.fingerprint.scheduler
    assert better_than_plain(program, found)


def test_a_model_without_guidance(captured: Program, run: Run) -> None:
    program = with_plan(captured, "ddim", 9, guidance=1.0)
    found = run(RUN, program)
    assert found.facts[StepPlan].fingerprint.guidance == 1.0
    assert better_than_plain(program, found)


def better_than_plain(program: Program, found: Program) -> bool:
    """Whether final latents from other noise come closer to those of the run than with the plain updates."""
    spec, plan = program.facts[ModelSpec], found.facts[StepPlan]
    plain = replace(
        plan,
        steps=tuple(
            replace(step, update=update) for step, update in zip(plan.steps, found.facts[SolverPlan].plain, strict=True)
        ),
    )
    conditions, initial = calibration_conditions(2, 7, spec), calibration_noise(2, 7, spec).initial()
    run, fitted, unfitted = (
        walk(TorchRunner(program), item, spec, conditions, initial, Progress()).latents[-1]
        for item in (program.facts[StepPlan], plan, plain)
    )
    return bool(np.linalg.norm(fitted - run) < np.linalg.norm(unfitted - run))


def test_the_converged_run_is_the_target_by_default(
    captured: Program, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Extrapolated from two runs, which fewer steps do for here; without a number, 26 % of the steps compute."""
    monkeypatch.setattr(plan_solver, "COARSE_STEPS", 10)
    monkeypatch.setattr(plan_solver, "FINE_STEPS", 20)
    found = run("plan-solver{trajectories=2}", captured)
    assert len(found.facts[StepPlan]) == 2
    assert found.facts[SolverPlan].target == "converged"
    whole = run("plan-solver{trajectories=2 target=run}", captured)
    assert found.facts[SolverTargets].latents[-1] != whole.facts[SolverTargets].latents[-1]


@pytest.mark.usefixtures("refinement")
@pytest.mark.parametrize(
    ("options", "steps", "count"),
    [("", 50, 13), ("", 9, 2), ("", 1, 1), ("{steps=7}", 9, 7), ("{steps=9}", 9, 9), ("{steps=13}", 9, 9)],
)
def test_the_number_of_steps(captured: Program, options: str, steps: int, count: int) -> None:
    """And the forwards beforehand, both halves of guidance: those of two runs, of fits, and of a refinement."""
    (pass_,) = Pipeline.parse(f"plan-solver{options}")
    program = with_plan(captured, "ddim", steps)
    assert isinstance(pass_, PlanSolver)
    work = Workload(program, trajectories=9, rows=0, share=1.0)
    ours = replace(pass_, trajectories=6)
    for target, recorded in (("converged", 50 + 100), ("run", steps + max(1, steps // 2))):
        rows = min(int(0.5 * 6 * recorded / max(1, effects(count, 3))), 6)
        refined = rows * effects(count, 3) + 6 * 3 * count if rows >= 5 else 0
        expected = 2 * (6 * (recorded + 3 * count) + refined)
        assert replace(ours, target=target).forwards(work) == expected


@pytest.mark.usefixtures("refinement")
def test_the_number_of_trajectories(captured: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as a fixed number of values needs, here the most that there may be; half of them for twice the values."""
    monkeypatch.setattr("qcgraph.pipeline.calibration_budget.TARGET_LIMITS", (2, 64))  # tests have fewer
    work = Workload(captured, trajectories=9, rows=0, share=1.0)
    plan, spec = captured.facts[StepPlan], captured.facts[ModelSpec]
    each = plan.halves * (50 + 100 + 3 * 2 + 3 * 2 + effects(2, 3))
    assert PlanSolver().forwards(work) == 64 * each
    wide = captured.with_facts(replace(spec, latent_shape=(2, 16, 48)))
    assert PlanSolver().forwards(replace(work, program=wide)) == 32 * each
    huge = captured.with_facts(replace(spec, latent_shape=(2, 512, 512)))
    assert PlanSolver().forwards(replace(work, program=huge)) == 16 * each


@pytest.mark.parametrize(("steps", "count"), [(1, 1), (2, 2), (4, 4), (9, 9), (12, 9)])
def test_what_is_known_before_anything_is_sampled(captured: Program, steps: int, count: int) -> None:
    (pass_,) = Pipeline.parse(f"plan-solver{{steps={steps}}}")
    run, plan = (program.facts[StepPlan] for program in (captured, pass_.foreseen(captured)))
    assert len(plan) == count
    assert plan.timesteps[0] == run.timesteps[0]
    assert set(plan.timesteps) <= set(run.timesteps)
    assert plan.fingerprint == replace(run.fingerprint, solver="fitted")


def test_a_scheduler_that_adds_noise_is_refused_before_anything_is_sampled(captured: Program) -> None:
    program = with_plan(captured, "ddpm", 9)
    pipeline = Pipeline.parse("plan-solver")
    with pytest.raises(UsageError, match="ddpm adds fresh noise at every step") as caught:
        pipeline.check(program)
    assert "--solver as-is" in str(caught.value.hint)
    with pytest.raises(UsageError, match="ddpm adds fresh noise"):
        pipeline.run(program)


def test_latents_that_are_not_finite_are_refused(captured: Program) -> None:
    plan = captured.facts[StepPlan]
    steps = tuple(replace(step, update=Update(1e30, 1e30)) for step in plan.steps)
    with (
        pytest.raises(UsageError, match="not finite") as caught,
        np.errstate(all="ignore"),
    ):
        PlanSolver(target="run", trajectories=1).run(captured.with_facts(replace(plan, steps=steps)), PassContext())
    assert caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "plan-solver{steps=0}",
        "plan-solver{history=4}",
        "plan-solver{target=walk}",
        "plan-solver{reuse=blocks}",
        "plan-solver{trajectories=0}",
        "plan-solver{seed=-1}",
    ],
)
def test_bad_options(text: str) -> None:
    option = re.findall(r"\{(\w+)=", text)[0]
    with pytest.raises(UsageError, match=f"{option} .* is not") as caught:
        Pipeline.parse(text)
    assert caught.value.hint


def test_a_plan_is_chosen_once(planned: Program, run: Run) -> None:
    with pytest.raises(ContractError, match="SolverPlan is decided on") as caught:
        run("plan-solver", planned)
    assert "before plan-solver" in str(caught.value.hint)
