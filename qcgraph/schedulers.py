"""From a diffusers scheduler to a step plan: its update is probed once, at compile time.

A sampler update that is linear, ``x' = c1 * x + c2 * eps + c3 * z``, is three numbers a step. A multistep solver also
takes latents and predictions of a few earlier steps, ``sum_j (a_j * x_j + b_j * eps_j)``: two numbers more for each.
So DPM-Solver++ (Lu et al., 2022, arXiv 2211.01095), whose order 2 in algorithm 2, "2M", is::

    x' = (s' / s) * x - a' * (exp(-h) - 1) * ((1 + 1 / 2r) * m - 1 / 2r * m_before),    m = (x - s * eps) / a

a and s are the square roots of the cumulative alpha and of one less it, h the step in log(a / s), and r the step before
over h. The clean latent m_before is linear in the x and eps of its step, which is how it enters the plan.

None of this is written down here: the coefficients are found by giving the scheduler's own ``step`` one input at a
time, and checked with random ones. A scheduler whose update is not linear, or remembers more, is refused with that
reason.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from qcgraph.errors import UsageError, closest
from qcgraph.spec import NoiseSchedule
from qcgraph.steps import Earlier, Fingerprint, Step, StepPlan, Update

FLOW_SOLVER = "flow-euler"  # the first-order solver of flows, as DDIM is of diffusions
# How a scheduler is called here -> the diffusers class, and the settings without which its update is not linear.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    FLOW_SOLVER: ("FlowMatchEulerDiscreteScheduler", {}),
}
FLOWS: dict[str, dict[str, Any]] = {FLOW_SOLVER: {}, "dpmsolver++": {"use_flow_sigmas": True}}  # those that solve flows
LINEAR_HINT = "ddim, ddpm and dpmsolver++ have linear updates, flow-euler for flow matching"
LONGEST_HISTORY = 3  # earlier steps that an update may look back to; each costs two tensors of the latent's size
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
        UsageError: the scheduler is unknown, does not fit the steps, or has no linear update; says why.
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
        if len(timesteps) == steps:
            raise UsageError(
                f"{name} cannot make {steps} steps: two of them round to one timestep", hint="choose fewer steps"
            )
        raise _refused(name, "it calls the denoiser twice at one timestep")
    updates = _probe(name, scheduler)
    _check_linear(name, scheduler, updates)
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
        UsageError: the name is unknown, or the scheduler does not solve what the model predicts.
    """
    if name not in SCHEDULERS:
        raise UsageError(f"unknown scheduler {name!r}", hint=closest(name, SCHEDULERS))
    import diffusers

    class_name, settings = SCHEDULERS[name]
    process: dict[str, Any] = {"num_train_timesteps": schedule.train_steps}
    if schedule.is_flow:
        if name not in FLOWS:
            raise UsageError(f"{name} does not solve flows, which this model is", hint=f"take {' or '.join(FLOWS)}")
        settings = settings | FLOWS[name]
    else:
        if name == FLOW_SOLVER:
            raise UsageError(f"{name} solves flows; this model predicts {schedule.prediction}", hint="take ddim")
        process |= {key: getattr(schedule, key) for key in ("beta_start", "beta_end", "beta_schedule")}
    if name != FLOW_SOLVER:
        process["prediction_type"] = schedule.prediction
    return getattr(diffusers, class_name)(**process, **settings)


def check_compensable(plan: StepPlan) -> None:
    """Refuse variance compensation for updates that look back.

    Compensation corrects what an update gives, K * x' + (1 - K) * mu, by another noise prediction at the denoiser's
    output, which is an affine of the prediction and the latent of that step. With history, x' also holds latents and
    predictions of earlier steps: correcting them takes inputs that no graph of a single step has. And a prediction
    that was changed for its own step would enter the later updates changed, as a correction that nobody fitted.

    Raises:
        UsageError: an update of the plan has history.
    """
    looking_back = [index for index, step in enumerate(plan.steps) if step.update.history]
    if looking_back:
        raise UsageError(
            f"variance compensation does not fit {plan.fingerprint.scheduler}: the update of step {looking_back[0]} "
            "also takes earlier latents and predictions, which the graph of a single step does not have",
            hint="--compensate off, or a scheduler without memory, ddim for example",
        )


def _refused(name: str, reason: str) -> UsageError:
    return UsageError(f"scheduler {name!r} has no linear update: {reason}", hint=LINEAR_HINT)


def _probe(name: str, scheduler: Any) -> tuple[Update, ...]:
    """The coefficients of every step: what a one at a single input of one step adds to that step and to later ones."""
    import torch

    zero, one = torch.zeros(PROBE_SHAPE, dtype=torch.float64), torch.ones(PROBE_SHAPE, dtype=torch.float64)
    for timestep in scheduler.timesteps:
        scale = getattr(copy.deepcopy(scheduler), "scale_model_input", None)
        if scale is not None and not torch.equal(scale(one, timestep), one):
            raise _refused(name, "it scales the input of the denoiser")
    count = len(scheduler.timesteps)
    walker = copy.deepcopy(scheduler)
    noises = [_step(walker, index, zero, zero) for index in range(count)]
    walker = copy.deepcopy(scheduler)
    latents, predictions = [], []  # per step, what its input adds to that step and to each of the later ones
    for index in range(count):
        latents.append(_impulse(walker, index, one, zero, noises))
        predictions.append(_impulse(walker, index, zero, one, noises))
        _step(walker, index, zero, zero)
    updates = []
    for index in range(count):
        looks_back = range(min(index, LONGEST_HISTORY + 1) + 1)
        terms = [Earlier(latents[index - back][back], predictions[index - back][back]) for back in looks_back]
        now, history = terms[0], terms[1:]
        while history and history[-1] == Earlier(0.0, 0.0):
            history.pop()
        if len(history) > LONGEST_HISTORY:
            raise _refused(name, f"a step depends on the predictions of more than {LONGEST_HISTORY} earlier steps")
        updates.append(Update(now.latent, now.noise_prediction, _noise_weight(name, noises[index]), tuple(history)))
    return tuple(updates)


def _impulse(scheduler: Any, start: int, latent: Any, prediction: Any, noises: Sequence[Any]) -> list[float]:
    """What the inputs of step ``start`` add to it and to the steps after it, all other inputs being zero.

    Args:
        scheduler: one that was given zeros at all steps before; it stays as it is.
        start: the index of the step.
        latent: its latent, and ..
        prediction: .. its prediction, ones or zeros.
        noises: what every step gives when all inputs are zero.

    Returns:
        The weight in the step, in the next one, and so on to one step beyond the longest history.
    """
    import torch

    walker, found = copy.deepcopy(scheduler), []
    for index in range(start, min(start + LONGEST_HISTORY + 2, len(noises))):
        found.append((_step(walker, index, latent, prediction) - noises[index]).mean().item())
        latent = prediction = torch.zeros(PROBE_SHAPE, dtype=torch.float64)
    return found


def _noise_weight(name: str, noise: Any) -> float:
    """How much of a step's fresh noise its result is when all inputs are zero."""
    import torch

    drawn = torch.randn(PROBE_SHAPE, generator=_noise_generator(), dtype=torch.float64)
    weight: float = (noise / drawn).mean().item()
    if not torch.allclose(noise, weight * drawn, rtol=TOLERANCE, atol=TOLERANCE):
        raise _refused(name, "its noise is not one normal draw a step")
    return weight


def _check_linear(name: str, scheduler: Any, updates: Sequence[Update]) -> None:
    """Walk the whole trajectory with random inputs: every step must be the sum of its terms."""
    import torch

    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(PROBE_SHAPE, generator=_noise_generator(), dtype=torch.float64)
    walker = copy.deepcopy(scheduler)
    inputs: list[tuple[Any, Any]] = []  # the latest first
    for index, update in enumerate(updates):
        x, eps = (100 * torch.randn(PROBE_SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
        inputs = [(x, eps), *inputs[:LONGEST_HISTORY]]
        terms = (Earlier(update.latent, update.noise_prediction), *update.history)
        expected = update.noise * drawn
        for term, (latent, prediction) in zip(terms, inputs, strict=False):
            expected = expected + term.latent * latent + term.noise_prediction * prediction
        if not torch.allclose(_step(walker, index, x, eps), expected, rtol=TOLERANCE, atol=TOLERANCE * 100):
            raise _refused(name, "it clips or thresholds")


def _noise_generator() -> Any:
    import torch

    return torch.Generator().manual_seed(0)


def _step(scheduler: Any, index: int, latent: Any, prediction: Any) -> Any:
    """One call of diffusers' ``step``, its noise drawn from a fixed seed."""
    import inspect

    parameters = inspect.signature(scheduler.step).parameters
    extra = {"generator": _noise_generator()} if "generator" in parameters else {}
    return scheduler.step(prediction, scheduler.timesteps[index], latent, **extra).prev_sample
