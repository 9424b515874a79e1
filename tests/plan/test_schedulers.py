"""Step plans reproduce diffusers' own samplers, and what is not linear is refused with the reason."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from qcgraph.errors import BundleError, UsageError
from qcgraph.facts import decode, encode
from qcgraph.plan.roles import COMPUTES, REUSES
from qcgraph.plan.schedulers import (
    SOLVERS,
    Solver,
    check_name,
    first_order,
    make_scheduler,
    make_step_plan,
    resolve,
)
from qcgraph.plan.spec import FolderSampler, NoiseSchedule
from qcgraph.plan.steps import Fingerprint, Step, StepPlan, Update


@pytest.fixture
def third_order(monkeypatch: pytest.MonkeyPatch) -> str:
    """A scheduler whose updates look back to two earlier steps."""
    solver = Solver("third-order", "DPMSolverMultistepScheduler", {"solver_order": 3})
    monkeypatch.setitem(SOLVERS, solver.name, solver)
    return "third-order"


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmsolver++", "third-order"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.usefixtures("third_order")
def test_the_plan_is_the_scheduler(name: str, prediction: str, steps: int) -> None:
    """Walk diffusers' scheduler and the plan side by side with a made-up denoiser; they agree at every step."""
    schedule = NoiseSchedule(prediction=prediction)
    plan = make_step_plan(name, steps, 1.5, schedule, "model")
    solver = SOLVERS[name]
    scheduler = getattr(diffusers, solver.scheduler)(
        beta_start=schedule.beta_start, beta_end=schedule.beta_end, prediction_type=prediction, **solver.settings
    )
    scheduler.set_timesteps(steps)
    theirs = ours = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs: list[tuple[torch.Tensor, torch.Tensor]] = []
    tolerance = 1e-6 if name in ("ddim", "ddpm") else 1e-5  # diffusers' multistep solvers round latents to float32
    for step, timestep in zip(plan.steps, scheduler.timesteps, strict=True):
        assert step.timestep == float(timestep)
        generator, same = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
        extra = {"generator": generator}
        theirs = scheduler.step(torch.tanh(theirs) + 0.1, timestep, theirs, **extra).prev_sample
        noise = torch.randn(ours.shape, generator=same, dtype=torch.float64)
        update = step.update
        inputs.insert(0, (ours, torch.tanh(ours) + 0.1))
        terms = (update, *update.history)
        ours = update.noise * noise
        for term, (latent, output) in zip(terms, inputs, strict=False):
            ours = ours + term.latent * latent + term.noise_prediction * output
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["flow-euler", "dpmsolver++"])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_the_plan_of_a_flow_is_the_scheduler(name: str, steps: int) -> None:
    schedule = NoiseSchedule(prediction="flow_prediction")
    plan, scheduler = make_step_plan(name, steps, 1.5, schedule, "model"), make_scheduler(name, schedule)
    scheduler.set_timesteps(steps)
    theirs = ours = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    inputs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for step, timestep in zip(plan.steps, scheduler.timesteps, strict=True):
        assert step.timestep == float(timestep)
        theirs = scheduler.step(torch.tanh(theirs) + 0.1, timestep, theirs).prev_sample
        inputs.insert(0, (ours, torch.tanh(ours) + 0.1))
        terms = (step.update, *step.update.history)
        ours = sum(
            term.latent * latent + term.noise_prediction * output
            for term, (latent, output) in zip(terms, inputs, strict=False)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # diffusers works in float32
    if name == "flow-euler":
        sigmas = [float(sigma) for sigma in scheduler.sigmas]
        for step, (sigma, after) in zip(plan.steps, pairwise(sigmas), strict=True):
            assert step.update.latent == pytest.approx(1)
            assert step.update.noise_prediction == pytest.approx(after - sigma, rel=1e-5)


def test_diffusions_and_flows_have_solvers_of_their_own() -> None:
    with pytest.raises(UsageError, match="ddim does not solve flows") as caught:
        make_step_plan("ddim", 10, 1.5, NoiseSchedule(prediction="flow_prediction"), "model")
    assert "flow-euler" in str(caught.value.hint)
    with pytest.raises(UsageError, match="this model predicts epsilon"):
        make_step_plan("flow-euler", 10, 1.5, NoiseSchedule(), "model")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("euler", "it scales the input"),
        ("pndm", "twice at one timestep"),
        ("heun", "twice at one timestep"),
    ],
)
def test_what_is_not_linear_is_refused(name: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        make_step_plan(name, 10, 1.5, NoiseSchedule(), "model")
    assert "ddim, ddpm and dpmsolver++" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("class_name", "settings", "reason"),
    [
        ("DDIMScheduler", {"clip_sample": True}, "it clips or thresholds"),
        ("DPMSolverMultistepScheduler", {"thresholding": True}, "it clips or thresholds"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "its noise is not one normal draw"),
        ("UniPCMultistepScheduler", {}, "more than 3 earlier steps"),
    ],
)
def test_what_does_not_fit_is_found_by_probing(
    monkeypatch: pytest.MonkeyPatch, class_name: str, settings: dict[str, Any], reason: str
) -> None:
    monkeypatch.setitem(SOLVERS, "other", Solver("other", class_name, settings))
    with pytest.raises(UsageError, match=reason):
        make_step_plan("other", 10, 1.5, NoiseSchedule(), "model")


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_every_solver_says_what_it_solves(solver: Solver) -> None:
    """What a row says is what diffusers' class takes, and what planning finds of its update."""
    assert solver.diffuses or solver.flow is not None
    assert (solver.flow is None) == (not solver.shift)
    for prediction, solves in (("epsilon", solver.diffuses), ("flow_prediction", solver.flow is not None)):
        schedule = NoiseSchedule(prediction=prediction, shift=1.0 if prediction == "epsilon" else 3.0)
        if solves and solver.is_linear:
            assert len(make_step_plan(solver.name, 4, 1.5, schedule, "model")) == 4
        else:
            with pytest.raises(UsageError, match=r"solves flows|does not solve flows|has no linear update"):
                make_step_plan(solver.name, 4, 1.5, schedule, "model")


def test_each_process_has_one_solver_of_first_order() -> None:
    assert first_order(NoiseSchedule()) == "ddim"
    assert first_order(NoiseSchedule(prediction="flow_prediction")) == "flow-euler"
    assert [solver.name for solver in SOLVERS.values() if solver.is_first] == ["ddim", "flow-euler"]


def test_unknown_scheduler() -> None:
    with pytest.raises(UsageError, match="unknown scheduler 'dimm'") as caught:
        make_step_plan("dimm", 10, 1.5, NoiseSchedule(), "model")
    assert "did you mean 'ddim'" in str(caught.value.hint)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_step_counts(steps: int) -> None:
    with pytest.raises(UsageError, match=f"{steps} steps"):
        make_step_plan("ddim", steps, 1.5, NoiseSchedule(), "model")


def plan_of(timesteps: list[float]) -> StepPlan:
    return StepPlan(Fingerprint("m", "ddim", len(timesteps), 1.5), tuple(Step(t, Update(1, 1)) for t in timesteps))


def test_a_plan_is_keyed_on_the_timestep_value() -> None:
    plan = plan_of([900, 500, 100])
    assert plan.index_of(500) == 1
    with pytest.raises(BundleError, match=r"timestep 501 is not in the plan \(ddim, 3 steps, guidance 1.5\)"):
        plan.index_of(501)
    odd: Any
    for odd in (10**400, "abc", None, math.nan, math.inf, [1], 10**5000):
        with pytest.raises(BundleError, match="is not in the plan"):
            plan.index_of(odd)


def test_the_letters_of_a_schedule_differ() -> None:
    roles = {"full": COMPUTES} | dict.fromkeys(["forecast", "f", "reuse"], REUSES)
    steps = [replace(step, variant=name) for step, name in zip(plan_of([4, 3, 2, 1]).steps, roles, strict=True)]
    plan = replace(plan_of([4, 3, 2, 1]), steps=tuple(steps), roles=roles)
    assert plan.schedule() == "FOAR   (F = full, O = forecast, A = f, R = reuse)"


@pytest.mark.parametrize("timesteps", [[], [1.0, 2.0], [5.0, 5.0]])
def test_impossible_plans(timesteps: list[float]) -> None:
    with pytest.raises(UsageError):
        plan_of(timesteps)


@pytest.mark.parametrize("asked", [{"steps": 4}, {"scheduler": "ddpm"}, {"guidance": 2.0}])
def test_another_use_than_planned_is_refused(asked: dict[str, object]) -> None:
    plan = plan_of([3, 2, 1])
    plan.require(steps=3, scheduler="ddim", guidance=1.5)
    with pytest.raises(BundleError, match="the plan was made for") as caught:
        plan.require(**asked)  # type: ignore[arg-type]
    assert caught.value.hint


def test_probed_coefficients_match_the_closed_form_of_ddim() -> None:
    """x' = sqrt(a'/a) x + (sqrt(1-a') - sqrt(a'/a) sqrt(1-a)) eps, a the cumulative alpha (Song et al., 2021)."""
    alphas = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    plan = make_step_plan("ddim", 10, 1.0, NoiseSchedule(), "model")
    for step in plan.steps[:-1]:
        now, then = alphas[int(step.timestep)], alphas[int(step.timestep) - 100]
        ratio = np.sqrt(then / now)
        assert step.update.latent == pytest.approx(ratio, rel=1e-4)
        expected = np.sqrt(1 - then) - ratio * np.sqrt(1 - now)
        assert step.update.noise_prediction == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("steps", [10, 20])
def test_probed_coefficients_match_the_closed_form_of_dpmsolver(steps: int) -> None:
    """Algorithm 2 of Lu et al. (2022, arXiv 2211.01095), its first and last step of order one.

    ``x' = s'/s x - a' (exp(-h) - 1) ((1 + 1/2r) m - 1/2r m_before)``, ``m = (x - s eps) / a``; at the end s' is 0.
    """
    plan = make_step_plan("dpmsolver++", steps, 1.0, NoiseSchedule(), "model")
    cumulative = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    timesteps = [int(timestep) for timestep in plan.timesteps]
    a = np.sqrt([*cumulative[timesteps], 1.0])
    s = np.sqrt(1 - np.square(a))
    with np.errstate(divide="ignore"):
        h = np.diff(np.log(a) - np.log(s))
    for index, step in enumerate(plan.steps):
        first_order = index in (0, steps - 1)
        lean = 0.0 if first_order else h[index] / (2 * h[index - 1])  # 1 / 2r
        weight = -a[index + 1] * np.expm1(-h[index])
        now, before = weight * (1 + lean), -weight * lean
        update = step.update
        assert update.latent == pytest.approx(s[index + 1] / s[index] + now / a[index], rel=1e-3)
        assert update.noise_prediction == pytest.approx(-now * s[index] / a[index], rel=1e-3)
        assert update.noise == 0
        assert len(update.history) == (0 if first_order else 1)
        for term in update.history:
            assert term.latent == pytest.approx(before / a[index - 1], rel=1e-3)
            assert term.noise_prediction == pytest.approx(-before * s[index - 1] / a[index - 1], rel=1e-3)


def test_the_history_is_as_long_as_it_must_be(third_order: str) -> None:
    plan = make_step_plan(third_order, 20, 1.0, NoiseSchedule(), "model")
    assert [len(step.update.history) for step in plan.steps] == [0, 1, *[2] * 17, 0]
    assert all(earlier > later for earlier, later in pairwise(plan.timesteps))
    for name in ("ddim", "ddpm"):
        assert not any(step.update.history for step in make_step_plan(name, 20, 1.0, NoiseSchedule(), "model").steps)


def test_more_steps_than_timesteps_to_round_to() -> None:
    with pytest.raises(UsageError, match="two of them round to one timestep") as caught:
        make_step_plan("dpmsolver++", 1000, 1.5, NoiseSchedule(), "model")
    assert caught.value.hint == "choose fewer steps"


def test_a_plan_with_history_survives_json(third_order: str) -> None:
    plan = make_step_plan(third_order, 20, 1.5, NoiseSchedule(), "model")
    assert decode(StepPlan, json.loads(json.dumps(encode(plan)))) == plan


def test_a_plan_that_was_written_without_history_is_read() -> None:
    assert decode(Update, {"latent": 1.5, "noise_prediction": -0.5, "noise": 0.25}) == Update(1.5, -0.5, 0.25, ())


def test_a_thousand_steps_are_probed_in_one_walk() -> None:
    """Each step of diffusers is called twice: once by the probe for all impulses, and once by the check."""
    calls = 0

    class Counting(diffusers.DDIMScheduler):  # type: ignore[misc]
        def step(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return super().step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers, "DDIMScheduler", Counting)
        plan = make_step_plan("ddim", 1000, 1.5, NoiseSchedule(), "model")
    assert len(plan) == 1000
    assert calls == 2000


@pytest.mark.parametrize("prediction", ["epsilon", "flow_prediction"])
def test_only_what_works_is_offered(prediction: str) -> None:
    schedule = NoiseSchedule(prediction=prediction)
    with pytest.raises(UsageError) as caught:
        make_step_plan("eular", 10, 1.5, schedule, "model")
    offered = str(caught.value.hint).partition("known: ")[2].split(", ")
    assert offered
    for name in offered:
        make_step_plan(name, 10, 1.5, schedule, "model")
    with pytest.raises(UsageError, match="unknown scheduler 'eular'"):
        check_name("eular")
    for name in ("auto", "ddim", "euler"):
        check_name(name)


def test_what_auto_means() -> None:
    assert resolve("auto", NoiseSchedule()) == "ddim"
    assert resolve("auto", NoiseSchedule(prediction="flow_prediction")) == "flow-euler"
    own = NoiseSchedule(sampler=FolderSampler("dpmsolver++"))
    assert (resolve("auto", own), resolve("ddpm", own)) == ("dpmsolver++", "ddpm")
    assert make_step_plan("auto", 5, 1.5, own, "model").fingerprint.scheduler == "dpmsolver++"


@pytest.mark.parametrize(
    ("scheduler", "settings", "steps", "reason"),
    [
        ("ddim", {"steps_offset": 1}, 1000, "one of them is at timestep 1000, and the model knows 0 to 999"),
        ("ddim", {"no_such_setting": 1}, 10, "diffusers cannot make the scheduler ddim"),
        (
            "dpmsolver++",
            {"use_karras_sigmas": True, "use_lu_lambdas": True, "use_beta_sigmas": True},
            10,
            "Only one of",
        ),
        ("dpmsolver++", {"algorithm_type": "dpmsolver"}, 10, "final_sigmas_type` zero is not supported"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_settings_of_a_folder_that_do_not_work(
    scheduler: str, settings: dict[str, Any], steps: int, reason: str
) -> None:
    schedule = NoiseSchedule(sampler=FolderSampler(scheduler, tuple(settings.items())))
    with pytest.raises(UsageError) as caught:
        make_step_plan("auto", steps, 1.5, schedule, "model")
    assert reason in caught.value.message
    assert caught.value.hint


def test_no_signal_is_left_for_a_prediction_of_noise() -> None:
    """The update divides by the signal, which the rescaled betas leave none of at the last timestep."""
    sampler = FolderSampler("ddim", (("timestep_spacing", "trailing"),))
    schedule = NoiseSchedule(rescale_zero_snr=True, sampler=sampler)
    with pytest.raises(UsageError, match="rescale_betas_zero_snr leaves no signal there"):
        make_step_plan("ddim", 10, 1.5, schedule, "model")
    make_step_plan("ddim", 10, 1.5, replace(schedule, prediction="v_prediction"), "model")
    make_step_plan("ddim", 10, 1.5, replace(schedule, sampler=None), "model")  # which starts at timestep 900


def test_an_update_that_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    betas = np.linspace(1e-4, 1.0, 1000)
    settings = {"trained_betas": betas, "timestep_spacing": "trailing"}
    monkeypatch.setitem(SOLVERS, "blind", Solver("blind", "DDIMScheduler", settings))
    with pytest.raises(UsageError, match="at timestep 999 it is not finite"):
        make_step_plan("blind", 10, 1.5, NoiseSchedule(), "model")


def test_a_schedule_that_was_written_without_a_sampler_is_read() -> None:
    data = {"train_steps": 10, "beta_start": 0.1, "beta_end": 0.2, "beta_schedule": "linear", "prediction": "epsilon"}
    assert decode(NoiseSchedule, data) == NoiseSchedule(10, 0.1, 0.2)
