"""Sampling with a step plan: the state of one trajectory, guidance, and the loop. NumPy only, for every backend."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qcgraph.errors import BundleError
from qcgraph.plan.spec import MODULATION_NAME, ModelSpec
from qcgraph.plan.steps import Step, StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.conditions import Conditions, joined, of_labels
from qcgraph.sampling.modulation import Modulation
from qcgraph.sampling.noise import Noise
from qcgraph.sampling.runner import Array, Runner, step_call, step_inputs


class Denoising(Protocol):
    """What predicts the noise of a batch; a `Request` does, with a state."""

    def denoise(self, index: int, latent: Array, conditions: Conditions) -> Array:
        """Return the noise prediction [B,C_out,H,W] of a step of the plan."""
        ...


class Updater(Protocol):
    """What makes the next latent of a noise prediction; a `Sampler` does, as the plan says."""

    def update(self, index: int, latent: Array, prediction: Array) -> Array:
        """Return the latent [B,C,H,W] after a step, from what the denoiser was given and its guided prediction."""
        ...


class Request:
    """One trajectory through a step plan, with the cache and the modulation that belong to it and to nothing else.

    Step 0 starts the trajectory anew (an aborted one is forgotten); after it, the steps must come in the order of the
    plan, each once, with one batch shape and the same conditions. A step that was refused, or that failed, was not
    taken: it is the one that comes next. After a step that was interrupted (KeyboardInterrupt), the trajectory has to
    be started anew.

    Args:
        runner: the backend.
        plan: the step plan the denoiser was compiled for.
        spec: what the denoiser is.
    """

    def __init__(self, runner: Runner, plan: StepPlan, spec: ModelSpec) -> None:
        self._runner = runner
        self._plan = plan
        self._spec = spec
        self._preparing = plan.preparing
        self._restores_half = plan.restores_half
        self._state: dict[tuple[str, int], object] = {}
        self._modulation = Modulation(plan, runner.run)
        self._next = 0
        self._shape: tuple[int, ...] = ()
        self._conditions = Conditions(0, {})
        self._interrupted = False

    @property
    def taken(self) -> int:
        """How many steps of a trajectory were taken that can go on; 0 where none is under way."""
        return self._next if self._next < len(self._plan) and not self._interrupted else 0

    def began_with(self, conditions: Conditions) -> bool:
        """Tell whether the trajectory has these conditions."""
        return conditions == self._conditions

    def interrupt(self) -> None:
        """Record that the last step was taken in vain: what it gave did not reach the host."""
        self._interrupted = True

    def restart(self) -> None:
        """Give up the trajectory that is under way, and let go of its tensors."""
        self._begin((), Conditions(0, {}))

    def check(self, index: int, shape: tuple[int, ...], conditions: Conditions) -> None:
        """Refuse a step that is not the next one, or that is of another batch; the first one is always taken.

        Raises:
            BundleError: see `denoise`.
        """
        if index == 0:
            return
        if self._interrupted:
            raise BundleError(
                f"the trajectory was interrupted in a step, so that timestep {self._plan.steps[index].timestep:g} "
                "cannot go on from it",
                hint=f"start it anew with the first timestep of the plan, {self._plan.timesteps[0]:g}",
            )
        self._check_order(index)
        if shape != self._shape:
            raise BundleError(
                f"the latent is {shape}, this trajectory began with {self._shape}",
                hint="start a new request for another batch; cached tensors belong to one shape",
            )
        if difference := conditions.difference(self._conditions):
            raise BundleError(
                difference,
                hint="conditions, and the order of a batch, stay the same in a trajectory, because cached tensors "
                "belong to them; start with the first timestep of the plan, or use one request per trajectory",
            )

    def denoise(self, index: int, latent: Array, conditions: Conditions) -> Array:
        """Return the noise prediction [B,C_out,H,W] for a latent [B,C,H,W] at the next step of the plan.

        Raises:
            BundleError: the step is not the next one, the batch shape or a condition changed midway, a step was
                interrupted before, or the plan restores one half of guidance from the other and this batch does not
                hold both.
        """
        self.check(index, tuple(latent.shape), conditions)
        step = self._plan.steps[index]
        if self._restores_half:
            _check_paired(latent)
        if index == 0:
            self._begin(tuple(latent.shape), conditions.copy())
        inputs = step_inputs(self._plan, self._spec, index, latent, conditions)
        try:
            if step.variant in self._preparing:
                inputs[MODULATION_NAME] = self._modulation.at(index, conditions)
            prediction = self._runner.run(step_call(self._plan, index, inputs, self._state))
            self._next = index + 1
        except Exception:
            raise  # the backend left the state as it was
        except BaseException:
            self.interrupt()  # between any two instructions
            raise
        return prediction

    def _begin(self, shape: tuple[int, ...], conditions: Conditions) -> None:
        self._state.clear()
        self._modulation.clear()
        self._next, self._shape, self._conditions, self._interrupted = 0, shape, conditions, False

    def _check_order(self, index: int) -> None:
        if index == self._next:
            return
        expected = self._plan.steps[self._next].timestep if self._next < len(self._plan) else None
        after = f"timestep {expected:g} comes next" if expected is not None else "the trajectory is complete"
        same_plan = f"sample as the bundle was compiled for: {self._plan.describe()}"
        apart = "one request per trajectory and per guidance half; start each with the first timestep of the plan"
        raise BundleError(
            f"timestep {self._plan.steps[index].timestep:g} is out of order; {after}",
            hint=f"{same_plan}; {apart}" if index > self._next else apart,
        )


def _check_paired(latent: Array) -> None:
    """Refuse a batch that is not both halves of guidance, one after the other."""
    first, second = latent[: len(latent) // 2], latent[len(latent) // 2 :]
    if first.shape != second.shape or not bool((first == second).all()):  # on a device, too
        raise BundleError(
            "some steps compute one half of guidance and restore the other; this batch of "
            f"{len(latent)} does not hold the same latents in both halves",
            hint="give both halves of guidance in one batch, the conditional one first (guidance_scale > 1 in a "
            "diffusers pipeline); or compile without the guidance difference",
        )


def guided(
    denoising: Denoising, index: int, latent: Array, conditions: Conditions, plan: StepPlan, spec: ModelSpec
) -> Array:
    """Return the noise prediction [B,C,H,W] under classifier-free guidance, both halves in one batch.

    ``eps = eps_null + w * (eps_class - eps_null)`` (Ho and Salimans, 2022); with w = 1 the null half is not computed.
    """
    weight = plan.fingerprint.guidance
    channels = spec.latent_shape[0]
    if weight == 1.0:
        return denoising.denoise(index, latent, conditions)[:, :channels]
    both = joined([conditions, conditions.unconditional(spec)])
    prediction = denoising.denoise(index, np.concatenate([latent, latent]), both)[:, :channels]
    conditional, unconditional = np.split(prediction, 2)
    return unconditional + np.float32(weight) * (conditional - unconditional)


@dataclass(frozen=True)
class TakenStep:
    """A step of a trajectory.

    Attributes:
        index: its place in the plan.
        step: what the plan says of it.
        latent: what the denoiser was given, [B,C,H,W].
        prediction: its guided noise prediction, [B,C,H,W].
        after: the latent that the updater made of both, [B,C,H,W].
    """

    index: int
    step: Step
    latent: Array
    prediction: Array
    after: Array


def trajectory(
    denoising: Denoising,
    updater: Updater,
    plan: StepPlan,
    spec: ModelSpec,
    conditions: Conditions,
    latent: Array,
    *,
    start: int = 0,
) -> Iterator[TakenStep]:
    """Walk a trajectory step by step: predict the noise, let the updater make the next latent, go on from there.

    Sampling, calibration, fitting and evaluation all walk this way; they differ in the three parts that they give.

    Args:
        denoising: predicts the noise.
        updater: makes the next latent.
        plan: the step plan; its fingerprint holds the guidance weight.
        spec: what the denoiser is.
        conditions: of the B samples.
        latent: what the first step is given, [B,C,H,W].
        start: the index of that step.

    Yields:
        Every step, once it was taken.
    """
    for index in range(start, len(plan)):
        prediction = guided(denoising, index, latent, conditions, plan, spec)
        taken = TakenStep(index, plan.steps[index], latent, prediction, updater.update(index, latent, prediction))
        yield taken
        latent = taken.after


def sample(
    runner: Runner,
    plan: StepPlan,
    spec: ModelSpec,
    conditions: Conditions | Sequence[int],
    seed: int,
    *,
    batch: int = 64,
    first_index: int = 0,
    observe: Callable[[TakenStep], None] | None = None,
    progress: Progress | None = None,
) -> Array:
    """Sample one latent for each of some conditions.

    Args:
        runner: the backend.
        plan: the step plan; its fingerprint holds the guidance weight.
        spec: what the denoiser is.
        conditions: of the N samples; of a model that is conditioned on a class alone, also the class of each.
        seed: seeds all noise. Sample i gets the same noise whatever the batch and the backend.
        batch: how many samples run together; with guidance the denoiser sees twice as many.
        first_index: the index of the first sample, so that a run can be split.
        observe: called with every step that a batch takes.
        progress: reports the steps.

    Returns:
        f32[N,C,H,W], the final latents.

    Raises:
        UsageError: no samples, a class out of range, or a negative seed.
    """
    if not isinstance(conditions, Conditions):
        conditions = of_labels(conditions, spec)
    parts = []
    total = range((len(conditions) + batch - 1) // batch * len(plan))
    ticks = (progress or Progress()).track(total, "sampling")
    for start in range(0, len(conditions), batch):
        chunk = conditions[start : start + batch]
        noise = Noise(seed, range(first_index + start, first_index + start + len(chunk)), spec.latent_shape)
        request, sampler = Request(runner, plan, spec), Sampler(plan, noise)
        for taken in trajectory(request, sampler, plan, spec, chunk, noise.initial()):
            next(ticks)
            if observe is not None:
                observe(taken)
        parts.append(taken.after)
    return np.concatenate(parts)


class Updates:
    """The updates of one trajectory but their noise, with the latents and predictions that later ones look back to.

    It holds as many of them as the plan needs, two tensors of the latent's size for each earlier step; for a plan
    without history none.

    Args:
        plan: the step plan.
    """

    def __init__(self, plan: StepPlan) -> None:
        self._plan = plan
        depth = max(len(step.update.history) for step in plan.steps)
        self._earlier: deque[tuple[Array, Array]] = deque(maxlen=depth)  # the latest first

    def update(self, index: int, latent: Array, prediction: Array) -> Array:
        """Return the latent [B,C,H,W] after a step of the plan, before its noise (see `qcgraph.plan.steps.Update`).

        Args:
            index: the step; steps come in the order of the plan.
            latent: what the denoiser was given, [B,C,H,W]; it may be kept, and must not be written to any more.
            prediction: its guided noise prediction, [B,C,H,W]; likewise.

        Raises:
            BundleError: the update looks back to more steps than there were.
        """
        step = self._plan.steps[index]
        linear = step.update
        if len(linear.history) > len(self._earlier):
            raise BundleError(
                f"the update at timestep {step.timestep:g} looks back {len(linear.history)} steps, "
                f"{len(self._earlier)} are known",
                hint="start the trajectory with the first timestep of the plan",
            )
        result = np.float32(linear.latent) * latent + np.float32(linear.noise_prediction) * prediction
        for term, (past_latent, past_prediction) in zip(linear.history, self._earlier, strict=False):
            # In float64: early in the trajectory the two are large and all but cancel.
            past = np.float64(term.latent) * past_latent + np.float64(term.noise_prediction) * past_prediction
            result = result + past.astype(np.float32)
        self._earlier.appendleft((latent, prediction))
        return result


class Sampler:
    """The updates of one trajectory with their noise; an `Updater`.

    Args:
        plan: the step plan.
        noise: the noise of the trajectory, past its initial draw.
    """

    def __init__(self, plan: StepPlan, noise: Noise) -> None:
        self._plan = plan
        self._updates = Updates(plan)
        self._noise = noise

    def update(self, index: int, latent: Array, prediction: Array) -> Array:
        """Return the latent [B,C,H,W] after a step of the plan; see `Updates.update`."""
        result, noise = self._updates.update(index, latent, prediction), self._plan.steps[index].update.noise
        return result + np.float32(noise) * self._noise.next() if noise else result
