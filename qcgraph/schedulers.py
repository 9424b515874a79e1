"""A scheduler of diffusers that runs the updates of a step plan, also those that no scheduler of diffusers makes.

It computes what `qcgraph.sampling.loop.Sampler` computes, on tensors of any device. Importing this module imports
diffusers and torch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from qcgraph.bundle import Bundle
from qcgraph.errors import BundleError, UsageError, shown
from qcgraph.facts import decode
from qcgraph.plan.fitted import fitted_settings
from qcgraph.plan.spec import NoiseSchedule
from qcgraph.plan.steps import Earlier, Step, StepPlan, Update

_FROM_BUNDLE = 'make it with FittedScheduler.from_pretrained(BUNDLE, subfolder="scheduler")'


class FittedScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # their annotations contradict each other
    """A diffusers scheduler with the timesteps and updates of a step plan.

    It takes the place of the scheduler of a pipeline: ``pipe.scheduler = FittedScheduler.of_bundle("out")``. Every
    bundle also holds it as diffusers saves it, in ``scheduler/``. It serves one trajectory at a time: the first
    timestep starts a trajectory, and the steps come in the order of the plan, each once.

    Args:
        steps: the steps of the plan as JSON, first (noisiest) to last. Each has a ``timestep`` and an ``update`` with
            the fields of `qcgraph.plan.steps.Update`.
        run_steps: the number of steps of the run that the plan stands for, which is more where the plan takes a choice
            of its timesteps; None for the number of steps of the plan.
        num_train_timesteps: the number of timesteps that the model was trained on.
        prediction_type: the output of the model, in diffusers' terms.

    Attributes:
        timesteps: the timesteps of the plan, falling, [S]; i64 where all are whole numbers, else f32.
        init_noise_sigma: the standard deviation of the noise that sampling starts from.
        order: how often the denoiser runs in a step.

    Raises:
        UsageError: the settings are not those of a step plan.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(
        self,
        steps: Sequence[Mapping[str, Any]] = (),
        run_steps: int | None = None,
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
    ) -> None:
        self._steps = _read_steps(steps)
        self._step_counts = (len(self._steps), len(self._steps) if run_steps is None else run_steps)
        self.register_to_config(  # type: ignore[no-untyped-call]  # diffusers annotates only a part of it
            steps=steps,
            run_steps=self._step_counts[1],
            num_train_timesteps=num_train_timesteps,
            prediction_type=prediction_type,
        )
        self._train_steps = num_train_timesteps
        self._depth = max(len(step.update.history) for step in self._steps)
        self._earlier: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=self._depth)  # the latest first
        self.set_timesteps()

    @classmethod
    def of_plan(cls, plan: StepPlan, schedule: NoiseSchedule) -> FittedScheduler:
        """Return the scheduler of a step plan.

        Args:
            plan: the step plan.
            schedule: the noise schedule that the model was trained on.
        """
        return cls(**fitted_settings(plan, schedule))

    @classmethod
    def of_bundle(cls, path: Path | str) -> FittedScheduler:
        """Return the scheduler of a bundle.

        Args:
            path: the folder of the bundle.

        Raises:
            BundleError: the folder is not a bundle, or a file of it is missing or changed.
        """
        bundle = Bundle.open(path)
        return cls.of_plan(bundle.plan, bundle.spec.noise_schedule)

    def __len__(self) -> int:
        return self._train_steps

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """Return the latent as it is: the updates of a plan do not scale the input of the denoiser.

        Args:
            sample: the latent [B,C,H,W].
            timestep: the timestep; it changes nothing.
        """
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | torch.Tensor | None = None,
    ) -> None:
        """Put the timesteps on a device, and give up the current trajectory.

        Args:
            num_inference_steps: the number of steps of the plan, or of the run that it stands for; None for either.
            device: the device of `timesteps`; the CPU when None.
            timesteps: the timesteps of the plan; None for the same.

        Raises:
            BundleError: the plan has another number of steps, or other timesteps.
        """
        planned = [step.timestep for step in self._steps]
        if num_inference_steps is not None and num_inference_steps not in self._step_counts:
            raise BundleError(
                f"{shown(num_inference_steps)} steps were asked for; this scheduler has {self._described()}",
                hint=f"num_inference_steps={self._step_counts[0]}, or compile for the number of steps that you use",
            )
        on_cpu = torch.tensor([int(value) for value in planned] if _are_whole(planned) else planned)
        if timesteps is not None and not _are_equal(torch.as_tensor(timesteps), on_cpu):
            raise BundleError(
                f"other timesteps were asked for; this scheduler has {self._described()}",
                hint="leave timesteps out: the updates of a plan belong to its own",
            )
        self.timesteps = on_cpu.to(device)
        self._begin(())

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """Return the latent after a step of the plan (see `qcgraph.plan.steps.Update`).

        Half precision is computed in float32.

        Args:
            model_output: the guided prediction [B,C,H,W] without a learned sigma.
            timestep: the next timestep of the plan, or its first one.
            sample: the latent [B,C,H,W] that the denoiser was given.
            eta: must be 0: the plan says how much noise a step adds.
            generator: the generator of this noise, or one for each sample.
            return_dict: whether to return an object with ``.prev_sample`` instead of a tuple.
            kwargs: must be None, because a plan has no other settings.

        Returns:
            The next latent, of the dtype and device of ``sample``.

        Raises:
            BundleError: the timestep is not the next one of the plan, or the latent has another shape than the one that
                the trajectory began with.
            UsageError: the prediction has another shape than the latent, or a setting is given that has no effect.
        """
        _check_settings({"eta": eta or None, **kwargs})
        index = self._index_of(timestep)
        self._check(index, model_output, sample)
        if index == 0:
            self._begin(tuple(sample.shape))
        # Copies where they are kept, since the host may change its own tensors.
        computed = torch.promote_types(sample.dtype, torch.float32)
        latent, prediction = (given.to(computed, copy=self._depth > 0) for given in (sample, model_output))
        update = self._steps[index].update
        result = self._updated(update, latent, prediction)
        if update.noise:
            noise = randn_tensor(sample.shape, generator, device=sample.device, dtype=model_output.dtype)
            result = result + update.noise * noise.to(computed)
        self._earlier.appendleft((latent, prediction))
        self._next = index + 1
        after = result.to(sample.dtype)
        return SchedulerOutput(prev_sample=after) if return_dict else (after,)

    def _updated(self, update: Update, latent: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        """Return the latent [B,C,H,W] after a step, before its noise, as `qcgraph.sampling.loop.Updates` does."""
        result = update.latent * latent + update.noise_prediction * prediction
        # In float64, because early in the trajectory the two are large and all but cancel; MPS has no float64.
        wide = torch.float32 if latent.device.type == "mps" else torch.float64
        for term, (past_latent, past_prediction) in zip(update.history, self._earlier, strict=False):
            past = term.latent * past_latent.to(wide) + term.noise_prediction * past_prediction.to(wide)
            result = result + past.to(result.dtype)
        return result

    def _begin(self, shape: tuple[int, ...]) -> None:
        self._earlier.clear()
        self._next, self._shape = 0, shape

    def _described(self) -> str:
        own, run = self._step_counts
        of_run = f" of a run of {run}" if run != own else ""
        first = ", ".join(f"{step.timestep:g}" for step in self._steps[:3])
        return f"{own} steps{of_run}, which visit {first}{' ..' * (own > 3)}"

    def _index_of(self, timestep: float | torch.Tensor) -> int:
        """Return the position of a timestep, which equals the one of the plan after rounding to its dtype.

        Raises:
            BundleError: the plan has no such timestep, or it is not the next one.
        """
        given = torch.as_tensor(timestep).cpu()
        rounded = torch.tensor(
            [step.timestep for step in self._steps],
            dtype=given.dtype if given.is_floating_point() else torch.float64,
        )
        found = (rounded == given).nonzero().flatten().tolist() if given.numel() == 1 else []
        if not found:
            raise BundleError(
                f"timestep {shown(given.tolist())} is not one of this scheduler, which has {self._described()}",
                hint="call set_timesteps, and step through the timesteps of the scheduler",
            )
        if self._next in found or 0 in found:
            return self._next if self._next in found else 0
        goes_on = self._next < len(self._steps)
        following = f"timestep {self._steps[self._next].timestep:g} comes next" if goes_on else "no step is left"
        raise BundleError(
            f"timestep {self._steps[found[0]].timestep:g} is out of order; {following}",
            hint="a scheduler serves one trajectory at a time: use a copy (copy.deepcopy) for each one, and start with "
            f"the first timestep, {self._steps[0].timestep:g}",
        )

    def _check(self, index: int, model_output: torch.Tensor, sample: torch.Tensor) -> None:
        """Refuse tensors of other shapes; see `step`."""
        if model_output.shape != sample.shape:
            raise UsageError(
                f"the prediction is {tuple(model_output.shape)}, the latent {tuple(sample.shape)}",
                hint="give the guided prediction alone, without a learned sigma",
            )
        if index > 0 and tuple(sample.shape) != self._shape:
            raise BundleError(
                f"the latent is {tuple(sample.shape)}, this trajectory began with {self._shape}",
                hint="start another batch with the first timestep, or use a copy of the scheduler for it",
            )


def _check_settings(given: Mapping[str, Any]) -> None:
    """Refuse settings of a step that would have no effect.

    Raises:
        UsageError: a setting is not None.
    """
    if names := [name for name, value in given.items() if value is not None]:
        raise UsageError(
            f"{', '.join(names)} has no effect on the updates of a step plan",
            hint="leave it out; for other updates, compile with another scheduler",
        )


def _read_steps(data: Sequence[Mapping[str, Any]]) -> tuple[Step, ...]:
    """Return the steps that a configuration holds.

    Raises:
        UsageError: there are none, or they are not those of a step plan.
    """
    try:
        steps = tuple(decode(Step, item) for item in data)
    except (ValueError, TypeError) as error:
        raise UsageError(f"the steps are not those of a plan: {error}", where="steps", hint=_FROM_BUNDLE) from None
    if not steps:
        raise UsageError("the scheduler has no steps", where="steps", hint=_FROM_BUNDLE)
    problem = ""
    if not all(math.isfinite(number) for step in steps for number in _numbers(step)):
        problem = "a number is NaN or infinite"
    elif any(later.timestep >= earlier.timestep for earlier, later in pairwise(steps)):
        problem = "the timesteps do not fall strictly"
    elif any(len(step.update.history) > index for index, step in enumerate(steps)):
        problem = "an update looks back farther than the first step"
    if problem:
        raise UsageError(problem, where="steps", hint=_FROM_BUNDLE)
    return steps


def _numbers(step: Step) -> list[float]:
    """Return the timestep and all coefficients of a step."""
    update = step.update
    terms = [Earlier(update.latent, update.noise_prediction), *update.history]
    return [step.timestep, update.noise, *(number for term in terms for number in (term.latent, term.noise_prediction))]


def _are_whole(values: Sequence[float]) -> bool:
    return all(value.is_integer() for value in values)


def _are_equal(given: torch.Tensor, planned: torch.Tensor) -> bool:
    """Return whether timesteps are those of a plan, after rounding to float32."""
    return torch.equal(given.cpu().to(torch.float32), planned.to(torch.float32))
