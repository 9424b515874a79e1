"""Recorded runs: at their own timesteps and at others, and the converged run that two of them give."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.plan.levels import first_order, levels
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import ModelSpec, NoiseSchedule
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.calibration import calibration_conditions, calibration_noise, sample_calibration
from qcgraph.sampling.loop import TakenStep
from qcgraph.sampling.reference import (
    COARSE_STEPS,
    CONVERGED_STEPS,
    FINE_STEPS,
    RecordedRun,
    at_timesteps,
    extrapolated,
    first_order_plan,
    walk,
)
from qcgraph.sampling.runner import Array

PREDICTIONS = ("epsilon", "v_prediction", "flow_prediction")


def made_up(steps: int) -> RecordedRun:
    """A run of values that are not related."""
    draw = np.random.default_rng(0).standard_normal((2 * steps + 1, 2, 1, 4, 4)).astype(np.float32)
    return RecordedRun(tuple(draw[: steps + 1]), tuple(draw[steps + 1 :]))


def first_order_plan_of(prediction: str, steps: int) -> tuple[StepPlan, NoiseSchedule]:
    schedule = NoiseSchedule(prediction=prediction)
    return make_step_plan("auto", steps, 1.5, schedule, "model"), schedule


def same(ours: tuple[Array, ...], theirs: tuple[Array, ...]) -> bool:
    return len(ours) == len(theirs) and all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_walk_is_what_is_sampled(captured: Program) -> None:
    """To the bit, with the predictions on the way."""
    spec, plan = captured.facts[ModelSpec], captured.facts[StepPlan]
    taken: list[TakenStep] = []
    final = sample_calibration(TorchRunner(captured), plan, spec, 3, 5, observe=taken.append)
    conditions, initial = calibration_conditions(3, 5, spec), calibration_noise(3, 5, spec).initial()
    run = walk(TorchRunner(captured), plan, spec, conditions, initial, Progress())
    assert same(run.latents, (*(step.latent for step in taken), final))
    assert same(run.predictions, tuple(step.prediction for step in taken))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_at_its_own_timesteps_a_run_is_itself(prediction: str) -> None:
    (plan, schedule), run = first_order_plan_of(prediction, 10), made_up(10)
    found = at_timesteps(run, plan, plan.timesteps, schedule)
    assert same(found.latents, run.latents)
    assert same(found.predictions, run.predictions)


def test_at_some_of_its_timesteps_a_run_is_a_part_of_itself() -> None:
    (plan, schedule), run = first_order_plan_of("epsilon", 10), made_up(10)
    found = at_timesteps(run, plan, plan.timesteps[1::3], schedule)
    assert same(found.latents, (*run.latents[1:10:3], run.latents[10]))
    assert same(found.predictions, run.predictions[1::3])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_between_two_steps_a_latent_is_where_the_first_order_update_leads(prediction: str) -> None:
    """And a prediction lies on the line between its neighbours; after the last one it is the last."""
    (plan, schedule), run = first_order_plan_of(prediction, 10), made_up(10)
    third, fourth, last = plan.timesteps[2], plan.timesteps[3], plan.timesteps[9]
    between, after = third + 0.25 * (fourth - third), last / 2
    found = at_timesteps(run, plan, (between, after), schedule)
    for place, (step, start, end) in enumerate(((2, third, between), (9, last, after))):
        alphas, sigmas = levels(schedule, (start, end))
        update = first_order(schedule, (alphas[0], sigmas[0]), (alphas[1], sigmas[1]))
        expected = update.latent * run.latents[step] + update.noise_prediction * run.predictions[step]
        if start > end:  # the last step of a diffusion is at timestep 0
            np.testing.assert_allclose(found.latents[place], expected, rtol=1e-5, atol=1e-6)
    line = run.predictions[2] + 0.25 * (run.predictions[3] - run.predictions[2])
    np.testing.assert_allclose(found.predictions[0], line, rtol=1e-5, atol=1e-6)
    assert np.array_equal(found.predictions[1], run.predictions[9])
    assert np.array_equal(found.latents[-1], run.latents[-1])


def test_before_its_first_timestep_there_is_only_noise() -> None:
    (plan, schedule), run = first_order_plan_of("epsilon", 10), made_up(10)
    assert plan.timesteps[0] < 999
    found = at_timesteps(run, plan, (999, *plan.timesteps), schedule)
    assert same(found.latents, (run.latents[0], *run.latents))
    assert same(found.predictions, (run.predictions[0], *run.predictions))


def test_an_error_of_first_order_is_extrapolated_away() -> None:
    """Latents and predictions with an error of a / steps become those of as many steps as count as converged."""
    truth, error = made_up(4), made_up(4)

    def of(steps: int) -> RecordedRun:
        return RecordedRun(
            tuple(one + other[::-1] / steps for one, other in zip(truth.latents, error.latents, strict=True)),
            tuple(one + other[::-1] / steps for one, other in zip(truth.predictions, error.predictions, strict=True)),
        )

    found, expected = extrapolated(of(COARSE_STEPS), of(FINE_STEPS)), of(CONVERGED_STEPS)
    for ours, theirs in ((found.latents, expected.latents), (found.predictions, expected.predictions)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_two_equal_runs_are_extrapolated_to_themselves() -> None:
    found = extrapolated(made_up(4), made_up(4))
    assert same(found.latents, made_up(4).latents)
    assert same(found.predictions, made_up(4).predictions)


@pytest.mark.parametrize(("prediction", "scheduler"), [("epsilon", "ddim"), ("flow_prediction", "flow-euler")])
def test_a_first_order_plan_serves_the_same_model(prediction: str, scheduler: str) -> None:
    """With the guidance and the variant of another plan, and never more steps than there are timesteps."""
    schedule = NoiseSchedule(train_steps=40, prediction=prediction)
    plan = make_step_plan("dpmsolver++", 5, 2.5, schedule, "model")
    renamed = replace(
        plan,
        steps=tuple(replace(step, variant="full") for step in plan.steps),
        roles={"full": plan.roles[plan.computing]},
    )
    found = first_order_plan(20, renamed, schedule)
    assert found.fingerprint == replace(plan.fingerprint, scheduler=scheduler, steps=20)
    assert (found.variants, found.computing) == (("full",), "full")
    assert found.timesteps == make_step_plan(scheduler, 20, 2.5, schedule, "model").timesteps
    assert len(first_order_plan(100, plan, schedule)) == 40


@pytest.mark.slow
def test_the_extrapolated_run_is_close_to_the_converged_one(captured: Program) -> None:
    """Closer than the finer of the two runs that it is made of, by 12 dB."""
    spec, plan = captured.facts[ModelSpec], captured.facts[StepPlan]
    conditions, initial = calibration_conditions(2, 0, spec), calibration_noise(2, 0, spec).initial()
    runs = {}
    for steps in (COARSE_STEPS, FINE_STEPS, CONVERGED_STEPS):
        other = first_order_plan(steps, plan, spec.noise_schedule)
        run = walk(TorchRunner(captured), other, spec, conditions, initial, Progress())
        runs[steps] = at_timesteps(run, other, plan.timesteps, spec.noise_schedule).latents[-1]
    found = extrapolated(*(RecordedRun((runs[steps],), ()) for steps in (COARSE_STEPS, FINE_STEPS))).latents[-1]
    finer, error = (np.linalg.norm(latents - runs[CONVERGED_STEPS]) for latents in (runs[FINE_STEPS], found))
    assert error < finer / 4
