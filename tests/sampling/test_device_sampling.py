"""Latents that stay on a device: what the denoiser passes on, and hosts that are judged a step late."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qcgraph.errors import BundleError, UsageError
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.denoiser import Denoiser
from qcgraph.sampling.loop import Updates
from qcgraph.sampling.runner import Call
from qcgraph.sampling.tensors import Fetched

NULL = 5  # the class of the unconditional half


class TensorRunner(TorchRunner):
    """The reference backend, as one that takes tensors of a device, the CPU."""

    device = torch.device("cpu")

    def run_tensors(self, call: Call) -> torch.Tensor:
        given = call.inputs.items()
        arrays = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in given}
        return torch.from_numpy(self.run(replace(call, inputs=arrays)))


@pytest.fixture
def denoiser(cached: Program) -> Denoiser:
    return Denoiser(TensorRunner(cached), cached.facts[StepPlan], cached.facts[ModelSpec])


def follow(denoiser: Denoiser, weight: float, steps: int) -> None:
    """The plan's sampler with a guidance weight, on torch tensors."""
    updates, latent = Updates(denoiser.plan), np.random.default_rng(0).standard_normal((1, 2, 8, 8), dtype=np.float32)
    labels = torch.tensor([1, NULL])
    for index, timestep in enumerate(denoiser.plan.timesteps[:steps]):
        both = torch.from_numpy(np.concatenate([latent, latent]))
        prediction = denoiser(both, timestep, labels).sample
        assert isinstance(prediction, torch.Tensor)
        both.zero_()  # the denoiser has what it needs
        conditional, null = prediction[:, :2].numpy()[:1], prediction[:, :2].numpy()[1:]
        latent = updates.update(index, latent, null + np.float32(weight) * (conditional - null))


def test_the_sampler_of_the_plan_passes(denoiser: Denoiser) -> None:
    for _ in range(2):
        follow(denoiser, 1.5, len(denoiser.plan))


def test_another_weight_is_refused_one_step_late(denoiser: Denoiser) -> None:
    follow(denoiser, 4.0, 2)
    with pytest.raises(BundleError, match="were sampled with guidance 4"):
        follow(denoiser, 4.0, 3)
    with pytest.raises(BundleError, match="the trajectory was interrupted in a step"):  # it does not go on
        denoiser(torch.zeros(2, 2, 8, 8), denoiser.plan.timesteps[3], torch.tensor([1, NULL]))
    follow(denoiser, 1.5, len(denoiser.plan))


def test_the_last_step_is_judged_at_once(denoiser: Denoiser) -> None:
    plan, count = denoiser.plan, len(denoiser.plan)
    follow(denoiser, 1.5, count - 1)
    wrong = torch.full((2, 2, 8, 8), 9.0)
    with pytest.raises(BundleError, match="from what this scheduler makes of the prediction"):
        denoiser(wrong, plan.timesteps[-1], torch.tensor([1, NULL]))


def test_a_trajectory_that_was_given_up_is_not_judged(denoiser: Denoiser) -> None:
    follow(denoiser, 4.0, 2)
    follow(denoiser, 1.5, len(denoiser.plan))


def test_a_host_of_its_own_is_not_judged(cached: Program) -> None:
    runner = TensorRunner(cached)
    follow(Denoiser(runner, cached.facts[StepPlan], cached.facts[ModelSpec], own_updates=True), 4.0, 9)


@pytest.mark.parametrize("own_updates", [False, True])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_refused_one_step_late(
    cached: Program, own_updates: bool, wrong: float
) -> None:
    denoiser = Denoiser(TensorRunner(cached), cached.facts[StepPlan], cached.facts[ModelSpec], own_updates=own_updates)
    labels, timesteps = torch.tensor([1, 2]), denoiser.plan.timesteps
    latent = torch.zeros(2, 2, 8, 8)
    broken = latent.index_fill(0, torch.tensor([1]), wrong)
    denoiser(broken, timesteps[0], labels)
    with pytest.raises(UsageError, match="the latent holds NaN or infinity"):
        denoiser(latent, timesteps[1], labels)
    denoiser.restart()
    for timestep in timesteps[:-1]:
        denoiser(latent, timestep, labels)
    with pytest.raises(UsageError, match="the latent holds NaN or infinity"):
        denoiser(broken, timesteps[-1], labels)


def test_it_is_where_its_engines_are(cached: Program) -> None:
    runner = TensorRunner(cached)
    runner.device = torch.device("cuda:0")
    denoiser = Denoiser(runner, cached.facts[StepPlan], cached.facts[ModelSpec])
    assert denoiser.device == torch.device("cuda:0")
    assert denoiser.to("cuda").to(torch.device("cuda", 0), torch.float16).dtype == torch.float16
    with pytest.raises(UsageError, match="runs on cuda:0, not on cpu"):
        denoiser.to("cpu")


def test_labels_are_fetched_where_they_are() -> None:
    fetched, labels = Fetched(), torch.tensor([1, 2])
    assert fetched.array(labels).tolist() == [1, 2]
    labels[0] = 3
    assert fetched.array(labels).tolist() == [3, 2]
    assert fetched.array([4]).tolist() == [4]
