"""Sampling with a step plan: the state of one trajectory, guidance, and the loop. NumPy only, for every backend."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qcgraph.errors import BundleError, UsageError
from qcgraph.plan.spec import MODULATION, ModelSpec
from qcgraph.plan.steps import Step, StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.cache_state import State
from qcgraph.sampling.modulation import Modulation
from qcgraph.sampling.noise import Noise

Array = npt.NDArray[np.float32]
AfterUpdate = Callable[[int, Array], Array]


class Runner(Protocol):
    """Runs the variants of one compiled denoiser on some backend."""

    def run(self, variant: str, inputs: Mapping[str, npt.NDArray[np.generic]], state: State) -> Array:
        """Run one variant.

        Args:
            variant: its name.
            inputs: ``latent`` f32[B,C,H,W], ``timestep`` f32[B], ``class_label`` i64[B], ``group`` i64[], ``row``
                i64[] and, for a variant that the plan says is prepared, ``modulation`` f32[B,M]; a variant takes those
                that it has, a preparing one timestep and class alone.
            state: cache tensors of the request by name, in the backend's own form; the variant reads those that it
                takes as inputs, and those that it gives as outputs are remembered there (see
                `qcgraph.sampling.cache_state`).

        Returns:
            Its first output: the noise prediction f32[B,C_out,H,W], of a preparing variant the modulation.
        """
        ...


class Request:
    """One trajectory through a step plan, with the cache and the modulation that belong to it and to nothing else.

    The first timestep of the plan starts the trajectory anew (an aborted one is forgotten); after it, the steps must
    come in the order of the plan, each once, with one batch shape and the same classes. A step that was refused, or
    that failed, was not taken: it is the one that comes next. After a step that was interrupted (KeyboardInterrupt),
    the trajectory has to be started anew.

    Args:
        runner: the backend.
        plan: the step plan the denoiser was compiled for.
    """

    def __init__(self, runner: Runner, plan: StepPlan) -> None:
        self._runner = runner
        self._plan = plan
        self._state: dict[str, object] = {}
        self._modulation = Modulation(plan, lambda variant, inputs: runner.run(variant, inputs, {}))
        self._next = 0
        self._shape: tuple[int, ...] = ()
        self._labels: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._interrupted = False

    @property
    def taken(self) -> int:
        """How many steps of a trajectory were taken that can go on; 0 where none is under way."""
        return self._next if self._next < len(self._plan) and not self._interrupted else 0

    def began_with(self, class_label: npt.NDArray[np.int64]) -> bool:
        """Whether the trajectory has these classes."""
        return np.array_equal(class_label, self._labels)

    def interrupt(self) -> None:
        """Say that the last step was taken in vain: what it gave did not reach the host."""
        self._interrupted = True

    def restart(self) -> None:
        """Give up the trajectory that is under way, and let go of its tensors."""
        self._begin((), np.empty(0, dtype=np.int64))

    def check(self, index: int, shape: tuple[int, ...], class_label: npt.NDArray[np.int64]) -> None:
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
        if not np.array_equal(class_label, self._labels):
            sample = int(np.flatnonzero(class_label != self._labels)[0])
            raise BundleError(
                f"sample {sample} has class {class_label[sample]}, this trajectory began with class "
                f"{self._labels[sample]} there",
                hint="classes, and the order of a batch, stay the same in a trajectory, because cached tensors belong "
                "to them; start with the first timestep of the plan, or use one request per trajectory",
            )

    def denoise(self, latent: Array, timestep: float, class_label: npt.NDArray[np.int64]) -> Array:
        """The noise prediction [B,C_out,H,W] for a latent [B,C,H,W] at the next timestep of the plan.

        Raises:
            BundleError: the timestep is not in the plan, is not the next one, the batch shape or a class changed
                midway, a step was interrupted before, or the plan restores one half of guidance from the other and
                this batch does not hold both.
        """
        index = self._plan.index_of(timestep)
        self.check(index, tuple(latent.shape), class_label)
        step = self._plan.steps[index]
        if self._plan.paired:
            _check_paired(latent)
        if index == 0:
            self._begin(tuple(latent.shape), class_label.copy())
        inputs = step_inputs(step, latent, class_label)
        try:
            if step.variant in self._plan.prepared:
                inputs[MODULATION] = self._modulation.at(index, class_label)
            prediction = self._runner.run(step.variant, inputs, self._state)
            self._next = index + 1
        except Exception:
            raise  # the backend left the state as it was
        except BaseException:
            self.interrupt()  # between any two instructions
            raise
        return prediction

    def _begin(self, shape: tuple[int, ...], labels: npt.NDArray[np.int64]) -> None:
        self._state.clear()
        self._modulation.clear()
        self._next, self._shape, self._labels, self._interrupted = 0, shape, labels, False

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


class Denoising(Protocol):
    """What predicts the noise of a batch; a `Request` does, with a state."""

    def denoise(self, latent: Array, timestep: float, class_label: npt.NDArray[np.int64]) -> Array:
        """The noise prediction [B,C_out,H,W]."""
        ...


def step_inputs(step: Step, latent: Array, class_label: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.generic]]:
    """The inputs of a variant at a step but its cache tensors and modulation, for a latent [B,C,H,W] and labels [B]."""
    return {
        "latent": latent,
        "timestep": np.full(len(latent), step.timestep, dtype=np.float32),
        "class_label": class_label,
        "group": np.asarray(step.group, dtype=np.int64),
        "row": np.asarray(step.row, dtype=np.int64),
    }


def guided(
    request: Denoising, latent: Array, step: Step, labels: npt.NDArray[np.int64], plan: StepPlan, spec: ModelSpec
) -> Array:
    """The noise prediction [B,C,H,W] under classifier-free guidance, both halves in one batch.

    ``eps = eps_null + w * (eps_class - eps_null)`` (Ho and Salimans, 2022); with w = 1 the null half is not computed.
    """
    weight = plan.fingerprint.guidance
    channels = spec.latent_shape[0]
    if weight == 1.0:
        return request.denoise(latent, step.timestep, labels)[:, :channels]
    both = np.concatenate([labels, np.full_like(labels, spec.null_class)])
    prediction = request.denoise(np.concatenate([latent, latent]), step.timestep, both)[:, :channels]
    conditional, unconditional = np.split(prediction, 2)
    return unconditional + np.float32(weight) * (conditional - unconditional)


def sample(
    runner: Runner,
    plan: StepPlan,
    spec: ModelSpec,
    labels: Sequence[int],
    seed: int,
    *,
    batch: int = 64,
    first_index: int = 0,
    after_update: AfterUpdate | None = None,
    progress: Progress | None = None,
) -> Array:
    """Sample one latent per label.

    Args:
        runner: the backend.
        plan: the step plan; its fingerprint holds the guidance weight.
        spec: what the denoiser is.
        labels: one class a sample.
        seed: seeds all noise. Sample i gets the same noise whatever the batch and the backend.
        batch: how many samples run together; with guidance the denoiser sees twice as many.
        first_index: the index of the first sample, so that a run can be split.
        after_update: called with (step index, latent [B,C,H,W]) after every sampler update; what it returns goes on.
        progress: reports the steps.

    Returns:
        f32[N,C,H,W], the final latents.

    Raises:
        UsageError: no labels, a label out of range, or a negative seed.
    """
    check_labels(labels, spec)
    parts = []
    total = range((len(labels) + batch - 1) // batch * len(plan))
    ticks = (progress or Progress()).track(total, "sampling")
    for start in range(0, len(labels), batch):
        chunk = np.asarray(labels[start : start + batch], dtype=np.int64)
        noise = Noise(seed, range(first_index + start, first_index + start + len(chunk)), spec.latent_shape)
        request, sampler = Request(runner, plan), Sampler(plan, noise)
        latent = noise.initial()
        for index, step in enumerate(plan.steps):
            next(ticks)
            prediction = guided(request, latent, step, chunk, plan, spec)
            latent = sampler.update(latent, prediction, step)
            if after_update is not None:
                latent = after_update(index, latent)
        parts.append(latent)
    return np.concatenate(parts)


class Updates:
    """The updates of one trajectory but their noise, with the latents and predictions that later ones look back to.

    It holds as many of them as the plan needs, two tensors of the latent's size for each earlier step; for a plan
    without history none.

    Args:
        plan: the step plan.
    """

    def __init__(self, plan: StepPlan) -> None:
        depth = max(len(step.update.history) for step in plan.steps)
        self._earlier: deque[tuple[Array, Array]] = deque(maxlen=depth)  # the latest first

    def update(self, latent: Array, prediction: Array, step: Step) -> Array:
        """The latent [B,C,H,W] after the next step of the plan, before its noise (see `qcgraph.plan.steps.Update`).

        Args:
            latent: what the denoiser was given, [B,C,H,W]; it may be kept, and must not be written to any more.
            prediction: its guided noise prediction, [B,C,H,W]; likewise.
            step: the step.

        Raises:
            BundleError: the update looks back to more steps than there were.
        """
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
    """The updates of one trajectory with their noise.

    Args:
        plan: the step plan.
        noise: the noise of the trajectory, past its initial draw.
    """

    def __init__(self, plan: StepPlan, noise: Noise) -> None:
        self._updates = Updates(plan)
        self._noise = noise

    def update(self, latent: Array, prediction: Array, step: Step) -> Array:
        """The latent [B,C,H,W] after the next step of the plan; see `Updates.update`."""
        result = self._updates.update(latent, prediction, step)
        return result + np.float32(step.update.noise) * self._noise.next() if step.update.noise else result


def check_labels(labels: Sequence[int], spec: ModelSpec) -> None:
    """Refuse an empty list of labels, or labels the model does not know.

    Raises:
        UsageError: says which.
    """
    if not len(labels):
        raise UsageError("nothing to sample", hint="ask for at least one sample")
    for label in labels:
        if not 0 <= label < spec.class_count:
            raise UsageError(
                f"class {label} is out of range", hint=f"{spec.name} knows the classes 0 to {spec.class_count - 1}"
            )
