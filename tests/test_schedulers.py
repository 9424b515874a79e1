"""Step plans reproduce diffusers' own samplers, and what is not affine is refused with the reason."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from qcgraph.errors import BundleError, UsageError
from qcgraph.schedulers import SCHEDULERS, make_step_plan
from qcgraph.spec import NoiseSchedule
from qcgraph.steps import Fingerprint, Step, StepPlan, Update


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_the_plan_is_the_scheduler(name: str, prediction: str, steps: int) -> None:
    """Walk diffusers' scheduler and the plan side by side with a made-up denoiser; they agree at every step."""
    schedule = NoiseSchedule(prediction=prediction)
    plan = make_step_plan(name, steps, 1.5, schedule, "model")
    class_name, settings = SCHEDULERS[name]
    scheduler = getattr(diffusers, class_name)(
        beta_start=schedule.beta_start, beta_end=schedule.beta_end, prediction_type=prediction, **settings
    )
    scheduler.set_timesteps(steps)
    theirs = ours = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for step, timestep in zip(plan.steps, scheduler.timesteps, strict=True):
        assert step.timestep == float(timestep)
        generator, same = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
        extra = {"generator": generator}
        theirs = scheduler.step(torch.tanh(theirs) + 0.1, timestep, theirs, **extra).prev_sample
        noise = torch.randn(ours.shape, generator=same, dtype=torch.float64)
        update = step.update
        ours = update.latent * ours + update.noise_prediction * (torch.tanh(ours) + 0.1) + update.noise * noise
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("euler", "it scales the input"),
        ("pndm", "twice at one timestep"),
        ("heun", "twice at one timestep"),
        ("dpmsolver++", "depends on the predictions of earlier steps"),
    ],
)
def test_what_is_not_affine_is_refused(name: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        make_step_plan(name, 10, 1.5, NoiseSchedule(), "model")
    assert "ddim and ddpm" in str(caught.value.hint)


def test_clipping_is_found_by_probing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEDULERS, "clipped", ("DDIMScheduler", {"clip_sample": True}))
    with pytest.raises(UsageError, match="it clips or thresholds"):
        make_step_plan("clipped", 10, 1.5, NoiseSchedule(), "model")


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


def test_the_letters_of_a_schedule_differ() -> None:
    plan = plan_of([4, 3, 2, 1]).with_variants(["full", "forecast", "f", "reuse"])
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
