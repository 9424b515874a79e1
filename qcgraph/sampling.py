"""Sampling with a step plan: the state of one trajectory, guidance, and the loop. NumPy only, for every backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qcgraph.errors import BundleError, UsageError
from qcgraph.noise import Noise
from qcgraph.progress import Progress
from qcgraph.spec import ModelSpec
from qcgraph.steps import Step, StepPlan

Array = npt.NDArray[np.float32]
State = MutableMapping[str, object]
AfterUpdate = Callable[[int, Array], Array]


class Runner(Protocol):
    """Runs the variants of one compiled denoiser on some backend."""

    def run(self, variant: str, inputs: Mapping[str, npt.NDArray[np.generic]], state: State) -> Array:
        """Run one variant.

        Args:
            variant: its name.
            inputs: ``latent`` f32[B,C,H,W], ``timestep`` f32[B], ``class_label`` i64[B], ``group`` i64[] and ``row``
                i64[]; a variant takes those that it has.
            state: cache tensors of the request by name, in the backend's own form; the variant reads those that it
                takes as inputs, and the ones that it gives as outputs are written there.

        Returns:
            The noise prediction f32[B,C_out,H,W].
        """
        ...


def cached(name: str, variant: str, state: Mapping[str, object]) -> object:
    """A cache tensor of the request, in the backend's own form.

    Raises:
        BundleError: no computing step has written it.
    """
    if name not in state:
        raise BundleError(
            f"variant {variant!r} reuses {name!r} before any step computed it",
            hint="start the trajectory with the first timestep of the plan",
        )
    return state[name]


class Request:
    """One trajectory through a step plan, with the cache state that belongs to it and to nothing else.

    The first timestep of the plan starts the trajectory anew (an aborted one is forgotten); after it, the steps must
    come in the order of the plan, each once, with one batch shape.

    Args:
        runner: the backend.
        plan: the step plan the denoiser was compiled for.
    """

    def __init__(self, runner: Runner, plan: StepPlan) -> None:
        self._runner = runner
        self._plan = plan
        self._state: dict[str, object] = {}
        self._next = 0
        self._shape: tuple[int, ...] = ()

    def denoise(self, latent: Array, timestep: float, class_label: npt.NDArray[np.int64]) -> Array:
        """The noise prediction [B,C_out,H,W] for a latent [B,C,H,W] at the next timestep of the plan.

        Raises:
            BundleError: the timestep is not in the plan, is not the next one, or the batch shape changed midway.
        """
        index = self._plan.index_of(timestep)
        self._advance_to(index, latent.shape)
        step = self._plan.steps[index]
        inputs: dict[str, npt.NDArray[np.generic]] = {
            "latent": latent,
            "timestep": np.full(len(latent), step.timestep, dtype=np.float32),
            "class_label": class_label,
            "group": np.asarray(step.group, dtype=np.int64),
            "row": np.asarray(step.row, dtype=np.int64),
        }
        return self._runner.run(step.variant, inputs, self._state)

    def _advance_to(self, index: int, shape: tuple[int, ...]) -> None:
        if index == 0:
            self._state.clear()
            self._shape = shape
        elif index != self._next:
            expected = self._plan.steps[self._next].timestep if self._next < len(self._plan) else None
            after = f"timestep {expected:g} comes next" if expected is not None else "the trajectory is complete"
            raise BundleError(
                f"timestep {self._plan.steps[index].timestep:g} is out of order; {after}",
                hint="one request per trajectory and per guidance half; start each with the first timestep of the plan",
            )
        elif shape != self._shape:
            raise BundleError(
                f"the latent is {shape}, this trajectory began with {self._shape}",
                hint="start a new request for another batch; cached tensors belong to one shape",
            )
        self._next = index + 1


def guided(
    request: Request, latent: Array, step: Step, labels: npt.NDArray[np.int64], plan: StepPlan, spec: ModelSpec
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
        request = Request(runner, plan)
        latent = noise.initial()
        for index, step in enumerate(plan.steps):
            next(ticks)
            prediction = guided(request, latent, step, chunk, plan, spec)
            latent = update(latent, prediction, step, noise)
            if after_update is not None:
                latent = after_update(index, latent)
        parts.append(latent)
    return np.concatenate(parts)


def update(latent: Array, prediction: Array, step: Step, noise: Noise) -> Array:
    """The affine sampler update of a step (see `qcgraph.steps.Update`)."""
    affine = step.update
    result = np.float32(affine.latent) * latent + np.float32(affine.noise_prediction) * prediction
    return result + np.float32(affine.noise) * noise.next() if affine.noise else result


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
