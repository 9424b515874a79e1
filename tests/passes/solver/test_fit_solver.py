"""fit-solver: closed loop on the program as it is; exact where nothing changed, and closer where something did."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from qcgraph.errors import ContractError
from qcgraph.facts import SolverFit, SolverPlan, SolverTargets
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.pipeline import Pipeline
from qcgraph.pipeline.workload import Workload
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.calibration import calibration_conditions, calibration_noise, decode_latents
from qcgraph.sampling.fitting import with_updates
from qcgraph.sampling.loop import sample
from qcgraph.sampling.reference import walk

Run = Callable[[str, Program], Program]
PLAN = "plan-solver{target=run steps=5 trajectories=4}"
CALIBRATE = "calibrate{trajectories=2 selection=uniform latents=6},group-timesteps{groups=2}"


@pytest.fixture(scope="module")
def planned(captured: Program, run: Run) -> Program:
    return run(PLAN, captured)


@pytest.fixture(scope="module")
def quantized(planned: Program, run: Run) -> Program:
    return run(f"{CALIBRATE},plan-quant{{weight-bits=4}},insert-qdq", planned)


def test_what_it_changes(planned: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    golden_diff("fit-solver", planned, run("fit-solver", planned))


@pytest.mark.parametrize(("scheduler", "steps"), [("ddim", 9), ("dpmsolver++", 5), ("dpmsolver++", 2)])
@pytest.mark.parametrize("trajectories", [1, 4])
def test_all_steps_of_the_run_stay_the_run(
    captured: Program, run: Run, scheduler: str, steps: int, trajectories: int
) -> None:
    """Updates and samples are those of the scheduler, to the bit."""
    spec = captured.facts[ModelSpec]
    program = captured.with_facts(make_step_plan(scheduler, steps, 1.5, spec.noise_schedule, captured.constants_digest))
    found = run(f"plan-solver{{steps={steps} target=run trajectories={trajectories}}},fit-solver", program)
    assert found.facts[StepPlan].steps == program.facts[StepPlan].steps
    fit = found.facts[SolverFit]
    assert (set(fit.errors), set(fit.ridges), fit.trajectories) == ({0.0}, {None}, trajectories)
    ours, theirs = (
        sample(TorchRunner(item), item.facts[StepPlan], spec, [0, 3, 1], seed=2) for item in (found, program)
    )
    assert np.array_equal(ours, theirs)


def test_on_the_program_of_the_plan_the_fit_is_that_of_the_plan(planned: Program, run: Run) -> None:
    assert run("fit-solver", planned).facts[StepPlan] == planned.facts[StepPlan]


def test_the_targets_have_served(planned: Program, run: Run) -> None:
    found = run("fit-solver", planned)
    assert SolverTargets not in found.facts
    assert found.facts[SolverPlan] == planned.facts[SolverPlan]
    assert found.constants_digest == planned.constants_digest


def test_what_quantization_did_is_made_up_for(quantized: Program, run: Run) -> None:
    """The errors in the fact are those on the trajectory that was left out; its last latent comes closer."""
    found = run("fit-solver", quantized)
    fit, targets, spec = found.facts[SolverFit], quantized.facts[SolverTargets], found.facts[ModelSpec]
    conditions = calibration_conditions(4, 0, spec)
    initial = calibration_noise(4, 0, spec).initial()
    last = decode_latents(targets.latents[-1], spec.latent_shape)
    errors = [
        float(
            np.square(walk(TorchRunner(found), plan, spec, conditions, initial, Progress()).latents[-1] - last).mean()
        )
        for plan in (found.facts[StepPlan], quantized.facts[StepPlan])
    ]
    assert errors[0] < errors[1]
    assert all(error <= plain for error, plain in zip(fit.errors, fit.plain_errors, strict=True))
    assert len(fit.errors) == len(fit.ridges) == 5


def test_the_fit_starts_from_the_plain_updates(quantized: Program, run: Run) -> None:
    """Whatever the plan holds by then."""
    plan = quantized.facts[StepPlan]
    plain = quantized.with_facts(with_updates(plan, quantized.facts[SolverPlan].plain))
    assert run("fit-solver", plain).facts[StepPlan] == run("fit-solver", quantized).facts[StepPlan]


def test_groups_and_variants_of_the_steps_stay(captured: Program, run: Run) -> None:
    cached = run(f"{PLAN},plan-cache{{interval=2}},insert-cache", captured)
    found = run("fit-solver", cached)
    before, after = cached.facts[StepPlan], found.facts[StepPlan]
    assert [(step.variant, step.row, step.timestep) for step in after.steps] == [
        (step.variant, step.row, step.timestep) for step in before.steps
    ]
    assert after.variants == ("full", "reuse")
    assert after != before


def test_its_forwards_are_counted(planned: Program, captured: Program) -> None:
    """By the trajectories of the targets; before there are any, by those of calibration."""
    (pass_,) = Pipeline.parse("fit-solver")
    assert pass_.forwards(Workload(planned, trajectories=9, rows=0, share=0.5)) == 0.5 * 4 * 5 * 2
    assert pass_.forwards(Workload(captured, trajectories=9, rows=0, share=1.0)) == 9 * 9 * 2


def test_without_a_plan_it_is_refused(captured: Program, run: Run) -> None:
    with pytest.raises(ContractError, match="needs SolverPlan, SolverTargets") as caught:
        run("fit-solver", captured)
    assert "run plan-solver before it" in str(caught.value.hint)


def test_it_runs_once(planned: Program, run: Run) -> None:
    with pytest.raises(ContractError, match="needs SolverTargets"):
        run("fit-solver,fit-solver", planned)
