"""fit-compensation and insert-compensation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from qcgraph.errors import UsageError
from qcgraph.facts import Compensation, Reference
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.passes.compensation import fit_compensation
from qcgraph.pipeline import Pipeline
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import ModelSpec, NoiseSchedule
from qcgraph.plan.steps import Earlier, StepPlan, Update
from qcgraph.sampling.calibration import FIRST_INDEX, LatentStatistics, calibration_conditions
from qcgraph.sampling.conditions import of_labels
from qcgraph.sampling.loop import Request, TakenStep, guided, sample
from qcgraph.sampling.noise import Noise

Run = Callable[[str, Program], Program]
Known = list[tuple[np.ndarray, np.ndarray]]  # latents and predictions of earlier steps, the latest first


CACHED = "plan-cache{interval=3},insert-cache"


def with_scheduler(captured: Program, name: str) -> Program:
    schedule = captured.facts[ModelSpec].noise_schedule
    return captured.with_facts(make_step_plan(name, 9, 1.5, schedule, captured.constants_digest))


def recalled(update: Update, earlier: Known) -> np.ndarray | float:
    """What earlier steps contribute to the latent after an update."""
    terms = zip(update.history, earlier, strict=False)
    return sum((np.float64(term.latent) * x + np.float64(term.noise_prediction) * eps for term, (x, eps) in terms), 0.0)


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


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "flow-euler", "dpmsolver++"])
def test_the_node_equals_correcting_the_latent(captured: Program, run: Run, scheduler: str) -> None:
    """The folded form against x <- mu + K (x - mu) applied by hand to what the denoiser reaches, step by step.

    A multistep solver looks back to the predictions that lead to these latents.
    """
    spec = captured.facts[ModelSpec]
    schedule = NoiseSchedule(prediction="flow_prediction") if scheduler == "flow-euler" else spec.noise_schedule
    plan = make_step_plan(scheduler, 9, 1.5, schedule, captured.constants_digest)
    program = captured.with_facts(plan)
    fact = hand_made(program)
    folded = latents(run("insert-compensation", program.with_facts(fact)))

    noise: dict[int, np.ndarray] = {}
    reference_steps: list[np.ndarray] = []
    earlier: Known = []
    source = Noise(0, range(3), spec.latent_shape)
    latent = source.initial()
    request, conditions = Request(TorchRunner(program), plan, spec), of_labels([0, 1, 2], spec)
    for index, step in enumerate(plan.steps):
        prediction = guided(request, index, latent, conditions, plan, spec)
        reached = step.update.latent * latent + step.update.noise_prediction * prediction
        gain = np.array(fact.gains[index], dtype=np.float32)[:, None, None]
        mean = np.array(fact.means[index], dtype=np.float32)[:, None, None]
        own = mean + gain * (reached - mean)
        past, coefficient = recalled(step.update, earlier), step.update.noise_prediction
        earlier.insert(0, (latent, (own.astype(np.float64) - step.update.latent * latent) / coefficient))
        latent = (own + past).astype(np.float32)
        if step.update.noise:
            noise[index] = source.next()
            latent = latent + np.float32(step.update.noise) * noise[index]
        reference_steps.append(latent)
    np.testing.assert_allclose(folded, reference_steps[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++"])
def test_gain_one_is_bit_identical(captured: Program, run: Run, scheduler: str) -> None:
    plain = with_scheduler(captured, scheduler)
    program = run("calibrate{trajectories=2},fit-compensation{clamp=0},insert-compensation", plain)
    assert set(np.ravel(program.facts[Compensation].gains)) == {1.0}
    assert np.array_equal(latents(program), latents(plain))


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++"])
def test_the_fit_restores_the_reference_deviation(captured: Program, run: Run, scheduler: str) -> None:
    """On the fitting trajectories every unclamped step ends with the standard deviation of full precision."""
    text = f"{CACHED},calibrate{{trajectories=8}},fit-compensation{{clamp=0.9}},insert-compensation"
    program = run(text, with_scheduler(captured, scheduler))
    assert program.facts[Compensation].largest_drift > 1e-3
    reference, plan, spec = (program.facts[kind] for kind in (Reference, StepPlan, ModelSpec))
    statistics = LatentStatistics(len(plan), 2)

    def observe(taken: TakenStep) -> None:
        statistics.add(taken.index, taken.after)

    conditions = calibration_conditions(8, 0, spec)
    sample(TorchRunner(program), plan, spec, conditions, 0, first_index=FIRST_INDEX, observe=observe)
    np.testing.assert_allclose(statistics.deviations, reference.deviations, rtol=1e-3)


@pytest.mark.parametrize("form", ["ratio", "masked"])
@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpmsolver++"])
def test_the_fitted_program_samples_the_latents_of_the_fit(
    captured: Program, monkeypatch: pytest.MonkeyPatch, scheduler: str, form: str
) -> None:
    """So that whatever is corrected in one step reaches the fit of later ones as it reaches the latents of a host."""
    fitted: list[np.ndarray] = []
    update = fit_compensation._Fitting.update

    def recorded(*arguments: object) -> np.ndarray:
        fitted.append(update(*arguments))  # type: ignore[arg-type]
        return fitted[-1]

    monkeypatch.setattr(fit_compensation._Fitting, "update", recorded)
    program = with_scheduler(captured, scheduler)
    text = f"{CACHED},calibrate{{trajectories=4}},fit-compensation{{form={form}}},insert-compensation"
    compensated = Pipeline.parse(text).run(program, origin=program)
    assert np.ptp(compensated.facts[Compensation].gains) > 1e-4
    drawn: list[np.ndarray] = []

    def observe(taken: TakenStep) -> None:
        drawn.append(taken.after)

    plan, spec = compensated.facts[StepPlan], compensated.facts[ModelSpec]
    conditions = calibration_conditions(4, 0, spec)
    sample(TorchRunner(compensated), plan, spec, conditions, 0, first_index=FIRST_INDEX, observe=observe)
    for own, theirs in zip(fitted, drawn, strict=True):
        assert np.linalg.norm(own - theirs) < 1e-5 * np.linalg.norm(own)


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_without_history_the_gain_is_the_ratio_to_the_bit(captured: Program, run: Run, scheduler: str) -> None:
    program = run(f"{CACHED},calibrate{{trajectories=4}}", with_scheduler(captured, scheduler))
    fact = run("fit-compensation", program).facts[Compensation]
    plan, spec, reference = (program.facts[kind] for kind in (StepPlan, ModelSpec, Reference))
    assert fact.means == reference.means
    source = Noise(0, range(FIRST_INDEX, FIRST_INDEX + 4), spec.latent_shape)
    latent, request = source.initial(), Request(TorchRunner(program), plan, spec)
    for index, step in enumerate(plan.steps):
        prediction = guided(request, index, latent, calibration_conditions(4, 0, spec), plan, spec)
        update, mean = step.update, np.float32(reference.means[index])[:, None, None]
        own = np.float32(update.latent) * latent + np.float32(update.noise_prediction) * prediction
        variance = np.array(reference.deviations[index]) ** 2 - update.noise**2
        found = np.sqrt(np.maximum(variance, 0)) / own.std(axis=(0, 2, 3), dtype=np.float64)
        gains = np.where(variance > 0, found, 1) if update.noise_prediction else np.ones(2)
        assert fact.gains[index] == tuple(np.clip(gains, 0.9, 1.1))
        latent = mean + np.float32(fact.gains[index])[:, None, None] * (own - mean)
        latent = latent + np.float32(update.noise) * source.next() if update.noise else latent


def test_the_gain_is_the_root_nearest_to_one_or_else_that_of_least_variance() -> None:
    """Of five channels: roots around one, both roots below one, both above it, none, and nothing to correct."""
    generator = np.random.default_rng(0)
    own, other = generator.normal(size=(2, 64, 5, 4, 4)).astype(np.float32)
    share = np.array([0.3, -0.8, -1.2, -0.7, 0.3])[:, None, None]
    past = (share * own + np.array([0.2, 0.1, 0.1, 2.0, 0.2])[:, None, None] * other).astype(np.float32)
    own[:, 4], past[:, 4] = 0, 0
    deviations = np.array([1.25, 0.15, 0.15, 1.0, 1.0])
    update = Update(1.0, -0.5, 0.05, (Earlier(0.0, 1.0),))
    gains = fit_compensation._root(deviations, own, past, update)
    for channel in range(5):
        u, h = own[:, channel].ravel(), past[:, channel].ravel()
        (square, cross), (_, rest) = np.cov(u, h, bias=True).astype(np.float64)
        roots = np.roots([square, 2 * cross, rest - (deviations[channel] ** 2 - 0.05**2)]) if channel < 4 else [1.0]
        if channel == 3:
            assert np.iscomplex(roots).all()
        nearest = min(np.real(roots), key=lambda root: abs(root - 1))
        assert gains[channel] == pytest.approx(nearest, rel=1e-4)
    assert np.array_equal(fit_compensation._root(deviations, own, past, Update(1.0, 0.0)), np.ones(5))


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpmsolver++"])
def test_the_masked_form_is_its_weighted_least_squares(captured: Program, scheduler: str) -> None:
    """Against numpy's solver, on the first step; later ones follow trajectories that were corrected before."""
    spec = captured.facts[ModelSpec]
    program = with_scheduler(captured, scheduler)
    text = f"{CACHED},calibrate{{trajectories=8}},fit-compensation{{clamp=0.9 form=masked}}"
    fitted = Pipeline.parse(text).run(program, origin=program)
    fact, plan = fitted.facts[Compensation], fitted.facts[StepPlan]
    conditions = calibration_conditions(8, 0, spec)
    noise = Noise(0, range(FIRST_INDEX, FIRST_INDEX + 8), spec.latent_shape)
    ours = exact = noise.initial()
    requests = Request(TorchRunner(fitted), plan, spec), Request(TorchRunner(program), program.facts[StepPlan], spec)
    our_earlier: Known = []
    exact_earlier: Known = []
    for index, step in enumerate(plan.steps):
        update, mean, gain = step.update, np.array(fact.means[index]), np.array(fact.gains[index])
        eps, exact_eps = (
            guided(request, index, latent, conditions, plan, spec)
            for latent, request in zip((ours, exact), requests, strict=True)
        )
        past, own = recalled(update, our_earlier), update.latent * ours + update.noise_prediction * eps
        aim = update.latent * exact + update.noise_prediction * exact_eps + recalled(update, exact_earlier)
        for channel in range(2) if update.noise_prediction else ():
            target = aim[:, channel].astype(np.float64).ravel()
            far = np.abs(target) > np.abs(target).mean() / 2
            root = np.sqrt(np.where(far, 1 + 1 / np.where(far, target, 1) ** 2, 1))
            d, e = (values[:, channel].astype(np.float64).ravel() - mean[channel] for values in (own, aim - past))
            expected = np.linalg.lstsq((root * d)[:, None], root * e, rcond=None)[0][0]
            assert gain[channel] == pytest.approx(np.clip(expected, 0.1, 1.9), rel=1e-5)
        own = mean[:, None, None] + gain[:, None, None] * (own - mean[:, None, None])
        if update.noise_prediction:
            eps = (own - update.latent * ours) / update.noise_prediction
        our_earlier.insert(0, (ours, eps))
        exact_earlier.insert(0, (exact, exact_eps))
        fresh = np.float32(update.noise) * noise.next() if update.noise else np.float32(0)
        ours, exact = (own + past).astype(np.float32) + fresh, aim.astype(np.float32) + fresh
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


@pytest.mark.parametrize("form", ["ratio", "masked"])
def test_the_updates_of_a_fitted_solver_are_refused(captured: Program, form: str) -> None:
    pipeline = Pipeline.parse(
        "plan-solver{steps=3 target=run trajectories=2},calibrate{trajectories=2},"
        f"fit-compensation{{form={form}}},insert-compensation,fit-solver"
    )
    with pytest.raises(UsageError, match="a fitted solver correct the scale of the latents themselves") as caught:
        pipeline.run(captured, origin=captured)
    assert caught.value.hint == "leave fit-compensation out, or plan-solver"
