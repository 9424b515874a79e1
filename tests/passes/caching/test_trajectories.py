"""Recorded trajectories, and the weights of steps on a denoiser whose weights are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcgraph.capture.capture import capture
from qcgraph.errors import UsageError
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.passes.caching._trajectories import record, weights
from qcgraph.pipeline import Pipeline
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.calibration import FIRST_INDEX, calibration_conditions
from qcgraph.sampling.loop import TakenStep, sample

GAIN = 0.1  # of each block
SCALE = 0.5  # of the output


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(GAIN))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * x


class Linear(nn.Module):
    """A denoiser that predicts a multiple of the latent."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Growing(), Growing()])
        self.classes = nn.Embedding(4, 2)
        nn.init.zeros_(self.classes.weight)

    def forward(self, latent: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        x = latent.flatten(2).transpose(1, 2) + self.classes(label)[:, None] * timestep[:, None, None]
        for block in self.blocks:
            x = block(x)
        return SCALE * x.transpose(1, 2).unflatten(2, (4, 4))


@pytest.fixture(scope="module", params=["ddim", "ddpm", "dpmsolver++"])
def linear(request: pytest.FixtureRequest) -> Program:
    spec = ModelSpec.class_conditional("linear", (2, 4, 4), 3, 3, output_channels=2)
    program = capture(Linear().eval().requires_grad_(False), spec, ("latent", "timestep", "label"))
    plan = make_step_plan(request.param, 6, 1.5, spec.noise_schedule, program.constants_digest)
    return Pipeline.parse("plan-cache{interval=2},insert-cache").run(program.with_facts(plan))


def test_trajectories_are_those_of_the_sampler(linear: Program) -> None:
    spec, plan = linear.facts[ModelSpec], linear.facts[StepPlan]
    found = record(linear, 3, 7, Progress())
    conditions = calibration_conditions(3, 7, spec)
    latents: list[np.ndarray] = []

    def keep(taken: TakenStep) -> None:
        latents.append(taken.after)

    sample(TorchRunner(linear), plan.all_computing, spec, conditions, 7, first_index=FIRST_INDEX, observe=keep)
    assert found.conditions == conditions
    assert len(found.predictions) == len(plan) == len(found.latents) - 1
    for one, other in zip(found.latents[1:], latents, strict=True):
        assert np.array_equal(one, other)
    for latent, prediction in zip(found.latents, found.predictions, strict=False):
        np.testing.assert_allclose(prediction, SCALE * (1 + GAIN) ** 2 * latent, rtol=1e-5)
    (values,) = found.values.values()
    for latent, value in zip(found.latents, values, strict=False):
        change = ((1 + GAIN) ** 2 - 1) * np.concatenate([latent, latent]).reshape(6, 2, 16).transpose(0, 2, 1)
        np.testing.assert_allclose(value.numpy(), change, rtol=1e-4, atol=1e-5)


def grown(plan: StepPlan, slope: float, disturbed: int) -> float:
    """What an error of one in the prediction at a step makes of a scalar latent that is predicted as slope * x."""
    x, seen = 0.0, list[tuple[float, float]]()
    for index, step in enumerate(plan.steps):
        prediction = slope * x + (index == disturbed)
        terms = zip(step.update.history, seen, strict=False)
        past = sum(term.latent * old + term.noise_prediction * error for term, (old, error) in terms)
        seen.insert(0, (x, prediction))
        x = step.update.latent * x + step.update.noise_prediction * prediction + past
    return abs(x)


def test_weights_are_those_of_the_linear_recursion(linear: Program) -> None:
    """Also of a solver that looks back, to which an error comes back in later updates."""
    plan, slope = linear.facts[StepPlan], SCALE * (1 + GAIN) ** 2
    exact = [grown(plan, slope, index) for index in range(len(plan))]
    found = weights(linear, record(linear, 4, 0, Progress()), len(plan), 4, Progress())
    np.testing.assert_allclose(found, exact, rtol=2e-3)


def test_weights_of_the_solver(linear: Program) -> None:
    plan = linear.facts[StepPlan]
    found = weights(linear, record(linear, 1, 0, Progress()), 0, 1, Progress())
    expected = [max(abs(step.update.noise_prediction), 1e-12) for step in plan.steps]
    np.testing.assert_array_equal(found, expected)


def test_between_measured_steps_the_ratio_to_the_solver_is_interpolated(linear: Program) -> None:
    trajectories = record(linear, 2, 0, Progress())
    solver = weights(linear, trajectories, 0, 2, Progress())
    every, some = (weights(linear, trajectories, count, 2, Progress()) / solver for count in (6, 3))
    np.testing.assert_allclose(some[[0, 5]], every[[0, 5]], rtol=1e-3)
    chosen = np.unique(np.linspace(0, 5, 3).round().astype(int))
    np.testing.assert_allclose(some, np.interp(range(6), chosen, some[chosen]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy warns of the infinities that this is about
def test_a_model_that_draws_no_numbers_is_refused(cached: Program) -> None:
    weight = cached.constants["final_layer.linear.weight"]
    broken = replace(cached, constants={**cached.constants, "final_layer.linear.weight": weight * 1e38})
    with pytest.raises(UsageError, match="not finite"):
        record(broken, 2, 0, Progress())
