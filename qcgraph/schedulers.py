"""From a diffusers scheduler to a step plan: its update is probed once, at compile time.

A sampler update that is affine, ``x' = c1 * x + c2 * eps + c3 * z``, is three numbers a step. They are found by calling
the scheduler's own ``step`` with basis inputs, and checked with random ones; a scheduler whose update is not affine,
or depends on earlier steps, is refused with that reason.
"""

from __future__ import annotations

import copy
from typing import Any

from qcgraph.errors import UsageError, closest
from qcgraph.spec import NoiseSchedule
from qcgraph.steps import Fingerprint, Step, StepPlan, Update

# How a scheduler is called here -> the diffusers class, and the settings without which its update is not affine.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}
AFFINE_HINT = "ddim and ddpm have affine updates"
TOLERANCE = 1e-6  # relative; probing runs in float64 on coefficients that diffusers keeps in float32
PROBE_SHAPE = (1, 1, 4, 4)


def make_step_plan(name: str, steps: int, guidance: float, schedule: NoiseSchedule, model_digest: str) -> StepPlan:
    """The plan of a full sampling run: every step computes, in one timestep group.

    Args:
        name: a key of `SCHEDULERS`.
        steps: number of sampling steps.
        guidance: weight of classifier-free guidance; 1 means none.
        schedule: the noise schedule the model was trained on.
        model_digest: the digest of the model's weights.

    Raises:
        UsageError: the scheduler is unknown, does not fit the steps, or has no affine update; says why.
    """
    if not 1 <= steps <= schedule.train_steps:
        raise UsageError(
            f"{steps} steps", hint=f"the model knows {schedule.train_steps} timesteps: 1 to that many steps"
        )
    scheduler = make_scheduler(name, schedule)
    try:
        scheduler.set_timesteps(steps)
        timesteps = [float(value) for value in scheduler.timesteps]
    except ValueError as error:
        raise UsageError(f"{name} cannot make {steps} steps: {error}", hint="choose another number of steps") from None
    if len(set(timesteps)) < len(timesteps):
        raise _refused(name, "it calls the denoiser twice at one timestep")
    updates = [_probe(name, scheduler, index) for index in range(len(timesteps))]
    _check_memoryless(name, scheduler, updates)
    fingerprint = Fingerprint(model_digest, name, steps, guidance)
    return StepPlan(
        fingerprint,
        tuple(
            Step(timestep, update, row=row)
            for row, (timestep, update) in enumerate(zip(timesteps, updates, strict=True))
        ),
    )


def make_scheduler(name: str, schedule: NoiseSchedule) -> Any:
    """The diffusers scheduler of a name in `SCHEDULERS`, made for a noise schedule.

    Raises:
        UsageError: the name is unknown.
    """
    if name not in SCHEDULERS:
        raise UsageError(f"unknown scheduler {name!r}", hint=closest(name, SCHEDULERS))
    import diffusers

    class_name, settings = SCHEDULERS[name]
    return getattr(diffusers, class_name)(
        num_train_timesteps=schedule.train_steps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule=schedule.beta_schedule,
        prediction_type=schedule.prediction,
        **settings,
    )


def _refused(name: str, reason: str) -> UsageError:
    return UsageError(f"scheduler {name!r} has no affine update: {reason}", hint=AFFINE_HINT)


def _probe(name: str, scheduler: Any, index: int) -> Update:
    """The coefficients of one step, each call on a fresh copy of the scheduler."""
    import torch

    zero, one = torch.zeros(PROBE_SHAPE, dtype=torch.float64), torch.ones(PROBE_SHAPE, dtype=torch.float64)
    if not torch.equal(scheduler.scale_model_input(one, scheduler.timesteps[index]), one):
        raise _refused(name, "it scales the input of the denoiser")

    def call(latent: Any, prediction: Any) -> Any:
        return _step(copy.deepcopy(scheduler), index, latent, prediction)

    noise = call(zero, zero)
    latent = (call(one, zero) - noise).mean().item()
    prediction = (call(zero, one) - noise).mean().item()
    generator = torch.Generator().manual_seed(1)
    x, eps = (100 * torch.randn(PROBE_SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = latent * x + prediction * eps + noise
    if not torch.allclose(call(x, eps), expected, rtol=TOLERANCE, atol=TOLERANCE * 100):
        raise _refused(name, "it clips or thresholds")
    drawn = torch.randn(PROBE_SHAPE, generator=_noise_generator(), dtype=torch.float64)
    ratio = (noise / drawn).mean().item()
    if not torch.allclose(noise, ratio * drawn, rtol=TOLERANCE, atol=TOLERANCE):
        raise _refused(name, "its noise is not one normal draw a step")
    return Update(latent, prediction, ratio)


def _check_memoryless(name: str, scheduler: Any, updates: list[Update]) -> None:
    """Walk two steps with one scheduler: the second must not depend on what the first was given."""
    import torch

    if len(updates) < 2:
        return
    generator = torch.Generator().manual_seed(2)
    results: list[torch.Tensor] = []
    for _ in range(2):
        walker = copy.deepcopy(scheduler)
        _step(walker, 0, *(torch.randn(PROBE_SHAPE, generator=generator, dtype=torch.float64) for _ in range(2)))
        results.append(_step(walker, 1, torch.ones(PROBE_SHAPE).double(), torch.ones(PROBE_SHAPE).double()))
    if not torch.allclose(results[0], results[1], rtol=TOLERANCE, atol=TOLERANCE):
        raise _refused(name, "a step depends on the predictions of earlier steps")


def _noise_generator() -> Any:
    import torch

    return torch.Generator().manual_seed(0)


def _step(scheduler: Any, index: int, latent: Any, prediction: Any) -> Any:
    """One call of diffusers' ``step``, its noise drawn from a fixed seed."""
    import inspect

    parameters = inspect.signature(scheduler.step).parameters
    extra = {"generator": _noise_generator()} if "generator" in parameters else {}
    return scheduler.step(prediction, scheduler.timesteps[index], latent, **extra).prev_sample
