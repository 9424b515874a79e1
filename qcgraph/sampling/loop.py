"""Sampling with a step plan: the state of one trajectory, guidance, and the loop. NumPy only, for every backend."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qcgraph.errors import BundleError, UsageError
from qcgraph.plan.spec import MODULATION_NAME, ModelSpec
from qcgraph.plan.steps import Step, StepPlan, Update
from qcgraph.progress import Progress
from qcgraph.sampling.conditions import Conditions, joined, of_labels
from qcgraph.sampling.modulation import Modulation
from qcgraph.sampling.noise import Noise
from qcgraph.sampling.runner import Array, Runner, step_call, step_inputs


class Denoising(Protocol):
    """A predictor of the noise of a batch; a `Request` is one, with a state."""

    def denoise(self, index: int, latent: Array, conditions: Conditions) -> Array:
        """Return the noise prediction [B,C_out,H,W] of a step of the plan."""
        ...


class Updater(Protocol):
    """A maker of the next latent from a noise prediction; a `Sampler` is one, as the plan says."""

    def update(self, index: int, latent: Array, prediction: Array) -> Array:
        """Return the latent [B,C,H,W] after a step, from the denoiser's latent and its guided prediction."""
        ...


class Request:
    """One trajectory through a step plan, with the cache and the modulation that belong to it alone.

    Step 0 starts the trajectory anew, and drops an unfinished one. After it, the steps must come in the order of the
    plan, each once, with one batch shape and the same conditions. A step that is refused or fails does not count: it
    remains the next one. After an interrupted step (KeyboardInterrupt), the trajectory has to be started anew.

    Args:
        runner: the backend.
        plan: the step plan the denoiser was compiled for.
        spec: the specification of the denoiser.
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
        """The number of steps that ran in the current trajectory; 0 where none can continue."""
        return self._next if self._next < len(self._plan) and not self._interrupted else 0

    def began_with(self, conditions: Conditions) -> bool:
        """Return whether the trajectory has these conditions."""
        return conditions == self._conditions

    def interrupt(self) -> None:
        """Record that the prediction of the last step did not reach the host."""
        self._interrupted = True

    def restart(self) -> None:
        """Give up the current trajectory, and free its tensors."""
        self._begin((), Conditions(0, {}))

    def check(self, index: int, shape: tuple[int, ...], conditions: Conditions) -> None:
        """Refuse a step that is not the next one, or has another batch; the first step is always accepted.

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
                interrupted before, or the plan restores one half of guidance from the other and the batch does not hold
                both.
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
            raise  # the backend left the state unchanged
        except BaseException:
            self.interrupt()  # may come between any two instructions
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


class Resumed:
    """A trajectory that goes on from any step, unchecked; a `Request` begins with the first one.

    Args:
        runner: the backend.
        plan: the step plan, whose modulation no step prepares.
        spec: the specification of the denoiser.
        cached: the cached values by name, which the first step reads; a computing step needs none.
    """

    def __init__(
        self, runner: Runner, plan: StepPlan, spec: ModelSpec, cached: Mapping[str, object] | None = None
    ) -> None:
        self._runner, self._plan, self._spec = runner, plan, spec
        self._state = {(name, 0): value for name, value in (cached or {}).items()}

    def denoise(self, index: int, latent: Array, conditions: Conditions) -> Array:
        """Return the noise prediction [B,C_out,H,W] of a step, which later steps may reuse."""
        inputs = step_inputs(self._plan, self._spec, index, latent, conditions)
        return self._runner.run(step_call(self._plan, index, inputs, self._state))


def _check_paired(latent: Array) -> None:
    """Refuse a batch that does not hold both halves of guidance, one after the other."""
    first, second = latent[: len(latent) // 2], latent[len(latent) // 2 :]
    if first.shape != second.shape or not bool((first == second).all()):  # works on a device, too
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
        index: its index in the plan.
        step: the step of the plan.
        latent: the latent that the denoiser was given, [B,C,H,W].
        prediction: the guided noise prediction, [B,C,H,W].
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
    """Walk a trajectory step by step: predict the noise, let the updater make the next latent, and repeat.

    Sampling, calibration, fitting and evaluation all walk this way; they differ in denoising, updater and start.

    Args:
        denoising: predicts the noise.
        updater: makes the next latent.
        plan: the step plan; its fingerprint holds the guidance weight.
        spec: the specification of the denoiser.
        conditions: the conditions of the B samples.
        latent: the latent that the first step is given, [B,C,H,W].
        start: the index of the first step.

    Yields:
        Every step, after it ran.
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
    """Sample one latent for each of the given conditions.

    Args:
        runner: the backend.
        plan: the step plan; its fingerprint holds the guidance weight.
        spec: the specification of the denoiser.
        conditions: the conditions of the N samples; for a model conditioned on a class alone, also the class of each.
        seed: the seed of all noise. Sample i gets the same noise whatever the batch and the backend.
        batch: the number of samples that run together; with guidance the denoiser sees twice as many.
        first_index: the index of the first sample, so that a run can be split.
        observe: called with every step that a batch runs.
        progress: reports the steps.

    Returns:
        The final latents, f32[N,C,H,W].

    Raises:
        UsageError: there are no samples, a class is out of range, or the seed is not a 64-bit integer of at least 0.
    """
    if not isinstance(conditions, Conditions):
        conditions = of_labels(conditions, spec)
    if not len(conditions):
        raise UsageError("nothing to sample", hint="ask for at least one sample")
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
    """The updates of one trajectory without their noise, and the earlier latents and predictions that they use.

    It holds as many earlier steps as the plan needs, with two tensors of the latent's size each; none for a plan
    without history.

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
            index: the index of the step; steps come in the order of the plan.
            latent: the latent that the denoiser was given, [B,C,H,W]; it may be kept, and must not be written to any
                more.
            prediction: the guided noise prediction, [B,C,H,W]; likewise.

        Raises:
            BundleError: the update uses more earlier steps than there were.
        """
        step = self._plan.steps[index]
        linear = step.update
        if len(linear.history) > len(self._earlier):
            raise BundleError(
                f"the update at timestep {step.timestep:g} looks back {len(linear.history)} steps, "
                f"{len(self._earlier)} are known",
                hint="start the trajectory with the first timestep of the plan",
            )
        result = advanced(linear, latent, prediction, self._earlier)
        self._earlier.appendleft((latent, prediction))
        return result


def advanced(update: Update, latent: Array, prediction: Array, earlier: Iterable[tuple[Array, Array]]) -> Array:
    """Return the latent [B,C,H,W] that an update makes, before its noise.

    Args:
        update: the update.
        latent: the latent that the denoiser was given, [B,C,H,W].
        prediction: the guided noise prediction, [B,C,H,W].
        earlier: latents and predictions of earlier steps, the latest first; at least as many as the update uses.
    """
    result = np.float32(update.latent) * latent + np.float32(update.noise_prediction) * prediction
    for contribution in contributions(update, earlier):
        result = result + contribution
    return result


def contributions(update: Update, earlier: Iterable[tuple[Array, Array]]) -> Iterator[Array]:
    """Yield what each earlier step contributes to the latent that an update makes, f32[B,C,H,W].

    Args:
        update: the update.
        earlier: latents and predictions of earlier steps, the latest first.
    """
    for term, (latent, prediction) in zip(update.history, earlier, strict=False):
        # In float64, because early in the trajectory the two are large and all but cancel.
        contribution = np.float64(term.latent) * latent + np.float64(term.noise_prediction) * prediction
        yield contribution.astype(np.float32)


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
