"""Sampling a model with any diffusers scheduler, also those whose steps remember earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch

from qcgraph.plan.schedulers import make_scheduler
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import Fingerprint, Step, StepPlan, Update
from qcgraph.sampling.loop import Array, Request, Runner, guided
from qcgraph.sampling.noise import Noise

UNUSED = Update(0.0, 0.0)  # the scheduler itself makes the updates


def sample_with(
    scheduler: str, steps: int, guidance: float, runner: Runner, spec: ModelSpec, labels: Sequence[int], seed: int
) -> Array:
    """Sample one latent per label with a diffusers scheduler that makes its own updates.

    Args:
        scheduler: a key of `qcgraph.plan.schedulers.SOLVERS`; one that neither draws noise nor scales its input.
        steps: number of sampling steps.
        guidance: weight of classifier-free guidance; 1 means none.
        runner: the denoiser; every step runs its variant ``main``.
        spec: what the denoiser is.
        labels: one class a sample.
        seed: seeds the initial noise, which is that of `qcgraph.sampling.loop.sample`.

    Returns:
        f32[N,C,H,W], the final latents.
    """
    solver = make_scheduler(scheduler, spec.schedule)
    solver.set_timesteps(steps)
    calls = tuple(Step(float(timestep), UNUSED) for timestep in solver.timesteps)
    plan = StepPlan(Fingerprint("", scheduler, steps, guidance), calls)
    request = Request(runner, plan)
    classes = np.asarray(labels, dtype=np.int64)
    latent = Noise(seed, range(len(classes)), spec.latent_shape).initial()
    for step, timestep in zip(plan.steps, solver.timesteps, strict=True):
        prediction = torch.from_numpy(guided(request, latent, step, classes, plan, spec))
        latent = cast(Array, solver.step(prediction, timestep, torch.from_numpy(latent)).prev_sample.numpy())
    return latent
