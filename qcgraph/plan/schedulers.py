"""Conversion of a diffusers scheduler to a step plan: its update is probed once, at compile time.

A linear sampler update, ``x' = c1 * x + c2 * eps + c3 * z``, is three numbers a step. A multistep solver also takes
latents and predictions of a few earlier steps, ``sum_j (a_j * x_j + b_j * eps_j)``: two more numbers for each. For
example DPM-Solver++ (Lu et al., 2022, arXiv 2211.01095), whose order 2 in algorithm 2, "2M", is::

    x' = (s' / s) * x - a' * (exp(-h) - 1) * ((1 + 1 / 2r) * m - 1 / 2r * m_before),    m = (x - s * eps) / a

a and s are the square roots of the cumulative alpha and of one less it, h the step in log(a / s), and r the step before
over h. The clean latent m_before is linear in the x and eps of its step, and enters the plan in this form.

No formula is written down here. The coefficients are found by giving the scheduler's own ``step`` one input at a time,
and checked with random inputs. A scheduler whose update is not linear, or uses more earlier steps, is refused with its
reason.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qcgraph.errors import UsageError, closest
from qcgraph.plan.spec import NoiseSchedule
from qcgraph.plan.steps import Earlier, Fingerprint, Step, StepPlan, Update

AUTO = "auto"  # the scheduler of the model's folder, or the first-order solver of the model's process
LONGEST_HISTORY = 3  # most earlier steps that an update may use; each costs two tensors of the latent's size
TOLERANCE = 1e-6  # relative; probing runs in float64 on coefficients that diffusers keeps in float32
PROBE_SHAPE = (1, 1, 4, 4)
_SLOTS = LONGEST_HISTORY + 2  # impulses that are traced at once: one step more than the longest history


@dataclass(frozen=True)
class Solver:
    """A scheduler of diffusers, and the processes that it solves.

    Attributes:
        name: its name in qcgraph.
        scheduler: its class in diffusers.
        settings: the settings without which its update is not linear.
        diffuses: whether it solves diffusions.
        flow: the settings with which it solves flows; None where it solves none.
        shift: the name of the shift of a flow in diffusers.
        is_linear: whether its update is linear. A solver that is not linear is refused with its reason, and not
            offered.
        is_first: whether it is the first-order solver of its process, the default.
    """

    name: str
    scheduler: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    diffuses: bool = True
    flow: Mapping[str, Any] | None = None
    shift: str = ""
    is_linear: bool = True
    is_first: bool = False


SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver("ddim", "DDIMScheduler", {"clip_sample": False}, is_first=True),
        Solver("ddpm", "DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small"}),
        Solver("flow-euler", "FlowMatchEulerDiscreteScheduler", diffuses=False, flow={}, shift="shift", is_first=True),
        Solver("dpmsolver++", "DPMSolverMultistepScheduler", flow={"use_flow_sigmas": True}, shift="flow_shift"),
        Solver("euler", "EulerDiscreteScheduler", is_linear=False),
        Solver("pndm", "PNDMScheduler", is_linear=False),
        Solver("heun", "HeunDiscreteScheduler", is_linear=False),
    )
}


def make_step_plan(name: str, steps: int, guidance: float, schedule: NoiseSchedule, model_digest: str) -> StepPlan:
    """Plan a full sampling run: every step computes, in one timestep group.

    Args:
        name: a key of `SOLVERS`, or `AUTO`.
        steps: the number of sampling steps.
        guidance: the weight of classifier-free guidance; 1 means no guidance.
        schedule: the noise schedule that the model was trained on.
        model_digest: the digest of the model's weights.

    Raises:
        UsageError: the scheduler is unknown, does not fit the steps, or has no linear update; the message says why.
    """
    if not 1 <= steps <= schedule.train_steps:
        raise UsageError(
            f"{steps} steps", hint=f"the model knows {schedule.train_steps} timesteps: 1 to that many steps"
        )
    name = resolve(name, schedule)
    scheduler = make_scheduler(name, schedule)
    timesteps = _timesteps(name, scheduler, steps, schedule)
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


def resolve(name: str, schedule: NoiseSchedule) -> str:
    """Return the name of the scheduler that `AUTO` means for a model; any other name means itself."""
    if name != AUTO:
        return name
    if schedule.sampler is not None:
        return schedule.sampler.scheduler
    return first_order(schedule)


def first_order(schedule: NoiseSchedule) -> str:
    """Return the name of the first-order solver of the process that a model was trained on."""
    return next(solver.name for solver in SOLVERS.values() if solver.is_first and _solves(solver, schedule))


def check_name(name: str) -> None:
    """Refuse the name of a scheduler that is unknown for every model, before any model is loaded.

    Raises:
        UsageError: no scheduler has this name.
    """
    if name != AUTO and name not in SOLVERS:
        offered = [solver.name for solver in SOLVERS.values() if solver.is_linear]
        raise UsageError(f"unknown scheduler {name!r}", hint=closest(name, [AUTO, *offered]))


def make_scheduler(name: str, schedule: NoiseSchedule) -> Any:
    """Make the diffusers scheduler that a name means for a model, with the settings of the model's folder.

    Args:
        name: a key of `SOLVERS`, or `AUTO`.
        schedule: the noise schedule that the model was trained on; if the model's folder samples with the scheduler of
            this name, the folder's settings are used.

    Raises:
        UsageError: the name is unknown, the scheduler does not solve the process of the model, or diffusers refuses the
            settings.
    """
    name = resolve(name, schedule)
    if name not in SOLVERS:
        raise UsageError(f"unknown scheduler {name!r}", hint=closest(name, _solvers(schedule)))
    import diffusers

    solver = SOLVERS[name]
    settings = dict(solver.settings) | _process(solver, schedule)
    if schedule.sampler is not None and schedule.sampler.scheduler == name:
        settings |= dict(schedule.sampler.settings)
    try:
        return getattr(diffusers, solver.scheduler)(**settings)
    except (TypeError, ValueError, NotImplementedError, ImportError) as error:
        raise UsageError(
            f"diffusers cannot make the scheduler {name}: {error}",
            hint="its settings come from the folder of the model; another --scheduler does not take them",
        ) from error


def _solves(solver: Solver, schedule: NoiseSchedule) -> bool:
    return solver.flow is not None if schedule.is_flow else solver.diffuses


def _solvers(schedule: NoiseSchedule) -> Sequence[str]:
    """Return the names of the linear solvers of the process that a model was trained on."""
    return [solver.name for solver in SOLVERS.values() if solver.is_linear and _solves(solver, schedule)]


def _process(solver: Solver, schedule: NoiseSchedule) -> dict[str, Any]:
    """Return the settings of a diffusers scheduler that describe the process that a model was trained on."""
    process: dict[str, Any] = {"num_train_timesteps": schedule.train_steps}
    if solver.diffuses:
        process["prediction_type"] = schedule.prediction
    if schedule.is_flow:
        if solver.flow is None:
            known = " or ".join(_solvers(schedule))
            raise UsageError(f"{solver.name} does not solve flows, which this model is", hint=f"take {known}")
        return process | dict(solver.flow) | ({solver.shift: schedule.shift} if schedule.shift != 1 else {})
    if not solver.diffuses:
        hint = f"take {first_order(schedule)}"
        raise UsageError(f"{solver.name} solves flows; this model predicts {schedule.prediction}", hint=hint)
    process |= {key: getattr(schedule, key) for key in ("beta_start", "beta_end", "beta_schedule")}
    return process | ({"rescale_betas_zero_snr": True} if schedule.rescale_zero_snr else {})


def _timesteps(name: str, scheduler: Any, steps: int, schedule: NoiseSchedule) -> list[float]:
    """Set the timesteps of a scheduler and return them.

    Raises:
        UsageError: the scheduler makes another number of steps, or timesteps that the model was not trained on.
    """
    try:
        scheduler.set_timesteps(steps)
        timesteps = [float(value) for value in scheduler.timesteps]
    except (ValueError, IndexError, ArithmeticError) as error:
        raise UsageError(f"{name} cannot make {steps} steps: {error}", hint="choose another number of steps") from None
    if len(set(timesteps)) < len(timesteps):
        if len(timesteps) == steps:
            raise UsageError(
                f"{name} cannot make {steps} steps: two of them round to one timestep", hint="choose fewer steps"
            )
        raise _refused(name, "it calls the denoiser twice at one timestep")
    if len(timesteps) != steps:
        raise UsageError(
            f"{name} cannot make {steps} steps: diffusers makes {len(timesteps)} of them with the settings of the "
            "model's folder",
            hint="choose a number of steps that divides the training timesteps, or another scheduler",
        )
    last = schedule.train_steps - (0 if schedule.is_flow else 1)
    outside = [timestep for timestep in timesteps if not 0 <= timestep <= last]
    if outside:
        raise UsageError(
            f"{name} cannot make {steps} steps: one of them is at timestep {outside[0]:g}, and the model knows 0 to "
            f"{last}",
            hint="choose fewer steps: the folder of the model moves all of them (steps_offset)",
        )
    if schedule.rescale_zero_snr and schedule.prediction == "epsilon" and timesteps[0] == last:
        raise UsageError(
            f"{name} cannot start at timestep {last}: rescale_betas_zero_snr leaves no signal there, so that the noise "
            "which the model predicts says nothing of the image, and the update divides by zero",
            hint="a scheduler or number of steps that starts earlier, ddim with 50 steps for example",
        )
    return timesteps


def _refused(name: str, reason: str) -> UsageError:
    linear = [solver for solver in SOLVERS.values() if solver.is_linear]
    *others, last = (solver.name for solver in linear if solver.diffuses)
    flows = ", ".join(solver.name for solver in linear if not solver.diffuses)
    hint = f"{', '.join(others)} and {last} have linear updates, {flows} for flow matching"
    return UsageError(f"scheduler {name!r} has no linear update: {reason}", hint=hint)


def _probe(name: str, scheduler: Any) -> tuple[Update, ...]:
    """Find the coefficients of every step: the response of that step and later ones to a one at a single input.

    One walk over the steps finds all of them. Its batch has a row whose inputs are all zero, and two rows for each of
    the last few steps: one with a one in place of the latent of that step, one with a one in place of its prediction.
    Once a step is further back than an update may use, its rows serve a later step.
    """
    import torch

    one = torch.ones(PROBE_SHAPE, dtype=torch.float64)
    walker, count = copy.deepcopy(scheduler), len(scheduler.timesteps)
    scale = getattr(walker, "scale_model_input", None)
    step = _stepper(walker, rows=1 + 2 * _SLOTS)
    latents: list[list[float]] = []  # for each step, its response and that of each later step to a one in its latent
    predictions: list[list[float]] = []
    noises = []
    for index in range(count):
        if scale is not None and not torch.equal(scale(one, scheduler.timesteps[index]), one):
            raise _refused(name, "it scales the input of the denoiser")
        latent, prediction = (torch.zeros(1 + 2 * _SLOTS, *PROBE_SHAPE[1:], dtype=torch.float64) for _ in range(2))
        row = _row(index)
        latent[row], prediction[row + 1] = 1, 1
        result = step(index, latent, prediction)
        if not result.isfinite().all():
            raise _refused(name, f"at timestep {float(scheduler.timesteps[index]):g} it is not finite")
        noises.append(result[:1])
        latents.append([])
        predictions.append([])
        for source in range(max(0, index - _SLOTS + 1), index + 1):
            row = _row(source)
            latents[source].append((result[row] - result[0]).mean().item())
            predictions[source].append((result[row + 1] - result[0]).mean().item())
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


def _row(index: int) -> int:
    """Return the first of the two rows of the probe's batch that trace a step."""
    return 1 + 2 * (index % _SLOTS)


def _noise_weight(name: str, noise: Any) -> float:
    """Return the coefficient of a step's fresh noise in its result when all inputs are zero."""
    import torch

    drawn = torch.randn(PROBE_SHAPE, generator=_noise_generator(), dtype=torch.float64)
    weight: float = (noise / drawn).mean().item()
    if not torch.allclose(noise, weight * drawn, rtol=TOLERANCE, atol=TOLERANCE):
        raise _refused(name, "its noise is not one normal draw a step")
    return weight


def _check_linear(name: str, scheduler: Any, updates: Sequence[Update]) -> None:
    """Check along the whole trajectory, with random inputs, that every step is the sum of its terms."""
    import torch

    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(PROBE_SHAPE, generator=_noise_generator(), dtype=torch.float64)
    step = _stepper(copy.deepcopy(scheduler), rows=1)
    inputs: list[tuple[Any, Any]] = []  # the latest first
    for index, update in enumerate(updates):
        x, eps = (100 * torch.randn(PROBE_SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
        inputs = [(x, eps), *inputs[:LONGEST_HISTORY]]
        terms = (Earlier(update.latent, update.noise_prediction), *update.history)
        expected = update.noise * drawn
        for term, (latent, prediction) in zip(terms, inputs, strict=False):
            expected = expected + term.latent * latent + term.noise_prediction * prediction
        if not torch.allclose(step(index, x, eps), expected, rtol=TOLERANCE, atol=TOLERANCE * 100):
            raise _refused(name, "it clips or thresholds")


def _noise_generator() -> Any:
    import torch

    return torch.Generator().manual_seed(0)


def _stepper(scheduler: Any, rows: int) -> Callable[[int, Any, Any], Any]:
    """Return a function (index, latent, prediction) of diffusers' ``step``, with the same noise in every row."""
    draws = "generator" in inspect.signature(scheduler.step).parameters

    def step(index: int, latent: Any, prediction: Any) -> Any:
        extra = {"generator": [_noise_generator() for _ in range(rows)]} if draws else {}
        return scheduler.step(prediction, scheduler.timesteps[index], latent, **extra).prev_sample

    return step
