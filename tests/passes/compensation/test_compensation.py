"""fit-compensation and insert-compensation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from qcgraph.errors import UsageError
from qcgraph.facts import Compensation, Reference
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.passes.compensation._compensable import check_compensable
from qcgraph.pipeline import Pipeline
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import ModelSpec, NoiseSchedule
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.calibration import FIRST_INDEX, LatentStatistics, calibration_conditions
from qcgraph.sampling.conditions import of_labels
from qcgraph.sampling.loop import Request, TakenStep, guided, sample
from qcgraph.sampling.noise import Noise

Run = Callable[[str, Program], Program]


def latents(program: Program) -> np.ndarray:
    return sample(TorchRunner(program), program.facts[StepPlan], program.facts[ModelSpec], [0, 1, 2], seed=0)


def hand_made(program: Program) -> Compensation:
    count = len(program.facts[StepPlan])
    generator = np.random.default_rng(0)
    gains = generator.uniform(0.95, 1.05, (count, 2))
    means = generator.normal(0, 0.1, (count, 2))
    return Compensation(
        gains=tuple(map(tuple, gains.tolist())), means=tuple(map(tuple, means.tolist())), clamped=0, largest_drift=0.0
    )


def test_insert_compensation_golden(captured: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    program = captured.with_facts(hand_made(captured))
    golden_diff("insert-compensation", program, run("insert-compensation", program))


def test_fit_compensation_golden(captured: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    """Nothing is quantized or cached, so nothing has drifted and every gain is one."""
    program = run("calibrate{trajectories=2}", captured)
    golden_diff("fit-compensation", program, run("fit-compensation", program))


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "flow-euler"])
def test_the_node_equals_correcting_the_latent(captured: Program, run: Run, scheduler: str) -> None:
    """The folded form against x <- mu + K (x - mu) applied by hand to what the denoiser reaches, step by step."""
    spec = captured.facts[ModelSpec]
    schedule = NoiseSchedule(prediction="flow_prediction") if scheduler == "flow-euler" else spec.noise_schedule
    plan = make_step_plan(scheduler, 9, 1.5, schedule, captured.constants_digest)
    program = captured.with_facts(plan)
    fact = hand_made(program)
    folded = latents(run("insert-compensation", program.with_facts(fact)))

    noise: dict[int, np.ndarray] = {}
    reference_steps: list[np.ndarray] = []
    source = Noise(0, range(3), spec.latent_shape)
    latent = source.initial()
    request, conditions = Request(TorchRunner(program), plan, spec), of_labels([0, 1, 2], spec)
    for index, step in enumerate(plan.steps):
        prediction = guided(request, index, latent, conditions, plan, spec)
        reached = step.update.latent * latent + step.update.noise_prediction * prediction
        gain = np.array(fact.gains[index], dtype=np.float32)[:, None, None]
        mean = np.array(fact.means[index], dtype=np.float32)[:, None, None]
        latent = (mean + gain * (reached - mean)).astype(np.float32)
        if step.update.noise:
            noise[index] = source.next()
            latent = latent + np.float32(step.update.noise) * noise[index]
        reference_steps.append(latent)
    np.testing.assert_allclose(folded, reference_steps[-1], rtol=1e-4, atol=1e-4)


def test_gain_one_is_bit_identical(captured: Program, run: Run) -> None:
    program = run("calibrate{trajectories=2},fit-compensation{clamp=0},insert-compensation", captured)
    assert set(np.ravel(program.facts[Compensation].gains)) == {1.0}
    assert np.array_equal(latents(program), latents(captured))


def test_the_fit_restores_the_reference_deviation(cached: Program, run: Run) -> None:
    """On the fitting trajectories every unclamped step ends with the standard deviation of full precision."""
    program = run("calibrate{trajectories=8},fit-compensation{clamp=0.9},insert-compensation", cached)
    reference, plan, spec = (program.facts[kind] for kind in (Reference, StepPlan, ModelSpec))
    statistics = LatentStatistics(len(plan), 2)

    def observe(taken: TakenStep) -> None:
        statistics.add(taken.index, taken.after)

    conditions = calibration_conditions(8, 0, spec)
    sample(TorchRunner(program), plan, spec, conditions, 0, first_index=FIRST_INDEX, observe=observe)
    np.testing.assert_allclose(statistics.deviations, reference.deviations, rtol=1e-3)


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_the_masked_form_is_its_weighted_least_squares(captured: Program, scheduler: str) -> None:
    """Against numpy's solver, on the first step; later ones follow trajectories that were corrected before."""
    spec = captured.facts[ModelSpec]
    program = captured.with_facts(make_step_plan(scheduler, 9, 1.5, spec.noise_schedule, captured.constants_digest))
    text = "plan-cache{interval=3},insert-cache,calibrate{trajectories=8},fit-compensation{clamp=0.9 form=masked}"
    fitted = Pipeline.parse(text).run(program, origin=program)
    fact, plan = fitted.facts[Compensation], fitted.facts[StepPlan]
    conditions = calibration_conditions(8, 0, spec)
    noise = Noise(0, range(FIRST_INDEX, FIRST_INDEX + 8), spec.latent_shape)
    ours = exact = noise.initial()
    requests = Request(TorchRunner(fitted), plan, spec), Request(TorchRunner(program), program.facts[StepPlan], spec)
    for index, step in enumerate(plan.steps):
        update, mean, gain = step.update, np.array(fact.means[index]), np.array(fact.gains[index])
        ours, exact = (
            update.latent * latent + update.noise_prediction * guided(request, index, latent, conditions, plan, spec)
            for latent, request in zip((ours, exact), requests, strict=True)
        )
        for channel in range(2) if update.noise_prediction else ():
            target = exact[:, channel].astype(np.float64).ravel()
            far = np.abs(target) > np.abs(target).mean() / 2
            root = np.sqrt(np.where(far, 1 + 1 / np.where(far, target, 1) ** 2, 1))
            d, e = (values[:, channel].astype(np.float64).ravel() - mean[channel] for values in (ours, exact))
            expected = np.linalg.lstsq((root * d)[:, None], root * e, rcond=None)[0][0]
            assert gain[channel] == pytest.approx(np.clip(expected, 0.1, 1.9), rel=1e-5)
        ours = (mean[:, None, None] + gain[:, None, None] * (ours - mean[:, None, None])).astype(np.float32)
        fresh = np.float32(update.noise) * noise.next() if update.noise else np.float32(0)
        ours, exact = ours + fresh, exact + fresh
    assert np.ptp(fact.gains) > 1e-4


def test_the_masked_form_of_what_has_not_drifted_is_neutral(captured: Program) -> None:
    pipeline = Pipeline.parse("calibrate{trajectories=2},fit-compensation{form=masked}")
    program = pipeline.run(captured, origin=captured)
    np.testing.assert_allclose(program.facts[Compensation].gains, 1.0, rtol=0, atol=1e-6)


def test_the_masked_form_needs_the_captured_program(cached: Program, run: Run) -> None:
    calibrated = run("calibrate{trajectories=2}", cached)
    with pytest.raises(UsageError, match="samples the captured program, which is not given") as caught:
        run("fit-compensation{form=masked}", calibrated)
    assert "form=ratio" in str(caught.value.hint)


def test_clamped_gains_are_counted(cached: Program, run: Run) -> None:
    tight = run("calibrate{trajectories=4},fit-compensation{clamp=0.00001}", cached).facts[Compensation]
    assert tight.clamped > 0
    assert np.abs(np.array(tight.gains) - 1).max() <= 1.00001e-5


def test_bad_clamp(captured: Program, run: Run) -> None:
    with pytest.raises(UsageError, match="clamp 1"):
        run("calibrate{trajectories=2},fit-compensation{clamp=1}", captured)


@pytest.mark.parametrize("name", ["fit-compensation", "insert-compensation"])
def test_updates_with_history_are_refused(captured: Program, run: Run, name: str) -> None:
    """What is corrected would hold latents and predictions that are not inputs of the graph."""
    program = run("calibrate{trajectories=2}", captured).with_facts(hand_made(captured))
    plan = make_step_plan("dpmsolver++", 9, 1.5, captured.facts[ModelSpec].noise_schedule, captured.constants_digest)
    with pytest.raises(UsageError, match=r"does not fit dpmsolver\+\+"):
        run(name, program.with_facts(plan))


def test_only_updates_without_history_can_be_compensated() -> None:
    check_compensable(make_step_plan("ddpm", 10, 1.5, NoiseSchedule(), "model"))
    check_compensable(make_step_plan("dpmsolver++", 1, 1.5, NoiseSchedule(), "model"))
    with pytest.raises(UsageError, match=r"does not fit dpmsolver\+\+: the update of step 1 also takes") as caught:
        check_compensable(make_step_plan("dpmsolver++", 10, 1.5, NoiseSchedule(), "model"))
    assert "--compensate off" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["fit-compensation", "insert-compensation"])
def test_updates_that_look_back_are_refused_before_anything_runs(captured: Program, name: str) -> None:
    Pipeline.parse(name).check(captured)
    schedule = captured.facts[ModelSpec].noise_schedule
    looking_back = captured.with_facts(make_step_plan("dpmsolver++", 9, 1.5, schedule, captured.constants_digest))
    with pytest.raises(UsageError, match=r"does not fit dpmsolver\+\+") as caught:
        Pipeline.parse(f"calibrate,{name}").check(looking_back)
    assert caught.value.where == f"pass {name}"
