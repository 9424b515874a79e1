"""Levels of signal and noise, and first-order updates between them: those of diffusers' own first-order solvers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from qcgraph.plan.levels import CLEAN, first_order, levels
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import FolderSampler, NoiseSchedule

TRAILING = FolderSampler("ddim", (("timestep_spacing", "trailing"),))


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule(),
        NoiseSchedule(prediction="v_prediction"),
        NoiseSchedule(beta_schedule="squaredcos_cap_v2"),
        NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction="v_prediction"),
        NoiseSchedule(rescale_zero_snr=True, prediction="v_prediction", sampler=TRAILING),
        NoiseSchedule(prediction="flow_prediction"),
        NoiseSchedule(prediction="flow_prediction", shift=3.0),
    ],
    ids=lambda schedule: f"{schedule.prediction}-{schedule.beta_schedule}-{schedule.shift:g}",
)
@pytest.mark.parametrize("steps", [1, 8, 50])
def test_the_first_order_update_is_that_of_the_first_order_solver(schedule: NoiseSchedule, steps: int) -> None:
    """The last step leads to a clean image."""
    name = "flow-euler" if schedule.is_flow else "ddim"
    plan = make_step_plan(name, steps, 1.5, schedule, "model")
    places = [*zip(*levels(schedule, plan.timesteps), strict=True), CLEAN]
    for step, (here, there) in zip(plan.steps, pairwise(places), strict=True):
        update = first_order(schedule, here, there)
        assert (update.history, update.noise) == ((), 0.0)
        assert update.latent == pytest.approx(step.update.latent, rel=1e-4, abs=1e-5)  # diffusers' tables are float32
        assert update.noise_prediction == pytest.approx(step.update.noise_prediction, rel=1e-4, abs=1e-5)


def test_levels_of_a_diffusion_keep_the_variance() -> None:
    """At training timesteps the signal is the cumulative product; halfway between two, its mean."""
    cumulative = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    alpha, sigma = levels(NoiseSchedule(), [999, 500, 250.5, 0])
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-12)
    between = (cumulative[250] + cumulative[251]) / 2
    np.testing.assert_allclose(alpha**2, [cumulative[999], cumulative[500], between, cumulative[0]], rtol=1e-5)


def test_levels_of_a_flow_add_up_to_one() -> None:
    alpha, sigma = levels(NoiseSchedule(train_steps=10, prediction="flow_prediction"), [10, 2.5, 0])
    assert alpha.tolist() == [0, 0.75, 1]
    assert sigma.tolist() == [1, 0.25, 0]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow_prediction"])
def test_a_step_along_a_straight_line_is_exact(prediction: str) -> None:
    """Where the prediction is that of one image and one noise, any step leads to where they belong."""
    schedule = NoiseSchedule(prediction=prediction)
    image, noise = np.random.default_rng(0).standard_normal((2, 5))
    (alpha, after), (sigma, left) = levels(schedule, [900, 130])
    predicted = {"epsilon": noise, "v_prediction": alpha * noise - sigma * image, "flow_prediction": noise - image}
    update = first_order(schedule, (alpha, sigma), (after, left))
    result = update.latent * (alpha * image + sigma * noise) + update.noise_prediction * predicted[prediction]
    np.testing.assert_allclose(result, after * image + left * noise, rtol=1e-10, atol=1e-10)


def test_without_signal_a_prediction_of_noise_says_nothing_of_the_image() -> None:
    update = first_order(NoiseSchedule(), (0.0, 1.0), (0.6, 0.8))
    assert (update.latent, update.noise_prediction) == (0.0, 0.8)
