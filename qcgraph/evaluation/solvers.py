"""Sample a model with any diffusers scheduler, including those whose steps remember earlier ones."""

from __future__ import annotations

from typing import Any, cast

import torch

from qcgraph.plan.schedulers import make_scheduler
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import Fingerprint, Step, StepPlan, Update
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.loop import Request, trajectory
from qcgraph.sampling.noise import Noise
from qcgraph.sampling.runner import Array, Runner

UNUSED = Update(0.0, 0.0)  # the scheduler itself makes the updates


def sample_with(
    scheduler: str,
    steps: int,
    guidance: float,
    runner: Runner,
    spec: ModelSpec,
    conditions: Conditions,
    seed: int,
) -> Array:
    """Sample one latent for each condition with a diffusers scheduler that makes its own updates.

    Args:
        scheduler: a key of `qcgraph.plan.schedulers.SOLVERS`; one that neither draws noise nor scales its input.
        steps: number of sampling steps.
        guidance: weight of classifier-free guidance; 1 means none.
        runner: the denoiser; every step runs its captured variant.
        spec: the spec of the denoiser.
        conditions: the conditions of the samples.
        seed: seeds the initial noise, which is that of `qcgraph.sampling.loop.sample`.

    Returns:
        f32[N,C,H,W], the final latents.
    """
    solver = make_scheduler(scheduler, spec.noise_schedule)
    solver.set_timesteps(steps)
    calls = tuple(Step(float(timestep), UNUSED) for timestep in solver.timesteps)
    plan = StepPlan(Fingerprint("", scheduler, steps, guidance), calls)
    latent = Noise(seed, range(len(conditions)), spec.latent_shape).initial()
    for taken in trajectory(Request(runner, plan, spec), _Diffusers(solver), plan, spec, conditions, latent):
        latent = taken.after
    return latent


class _Diffusers:
    """A diffusers scheduler as the solver of a trajectory."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def update(self, index: int, latent: Array, prediction: Array) -> Array:
        """Return the latent [B,C,H,W] after a step."""
        tensors = torch.from_numpy(prediction), torch.from_numpy(latent)
        after = self._scheduler.step(tensors[0], self._scheduler.timesteps[index], tensors[1])
        return cast(Array, after.prev_sample.numpy())
