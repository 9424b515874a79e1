"""Whether a host samples as the plan does, judged by the latents that it comes back with. NumPy only.

A denoiser does not see the sampler that calls it. But the update of a step is known, so the next latent tells how the
last prediction was used: by the plan's sampler, by the same one under another guidance weight, or in another way. Where
an update adds noise, only how much of it there is can be known.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from qcgraph.errors import BundleError
from qcgraph.sampling import Array, Updates
from qcgraph.spec import ModelSpec
from qcgraph.steps import Earlier, Step, StepPlan

# What rounding in the host may leave of an update, relative to the terms it is made of: a hundred times the last digit
# of float32, ten times that of the others. By the dtype that the host computes in.
TOLERANCE = 1e-5
HALF_TOLERANCES = {"float16": 1e-2, "bfloat16": 5e-2}
# How far the length of n normal draws may be from sqrt(n), relative to it: its deviation is 1 / sqrt(2 n), and a little
# more where a host takes its variance from another formula.
NOISE_DEVIATIONS = 5
NOISE_SLACK = 0.05
OWN_UPDATES = "if it is meant, qcgraph.load(..., own_updates=True) takes any latents"


class Form(Enum):
    """What a batch holds."""

    PAIRED = "both halves of guidance, the conditional one first"
    CONDITIONAL = "no unconditional half"
    OTHER = "something else"


def form_of(latent: Array, labels: npt.NDArray[np.int64], spec: ModelSpec) -> Form:
    """What a batch of latents [B,C,H,W] with labels [B] holds."""
    null = labels == spec.null_class
    if not null.any():
        return Form.CONDITIONAL
    count = len(labels) // 2
    second_is_null = len(labels) % 2 == 0 and null[count:].all() and not null[:count].all()
    return Form.PAIRED if second_is_null and np.array_equal(latent[:count], latent[count:]) else Form.OTHER


@dataclass(frozen=True)
class _Expectation:
    """The latent that the plan's sampler comes back with, and what a larger guidance weight adds to it.

    Attributes:
        index: the step that was taken.
        form: what its batch held.
        batch: how many samples that had.
        before: its latent, [B,C,H,W] of one half.
        latent: the next latent, [B,C,H,W] of one half.
        per_weight: what each 1 of guidance weight adds, of the same shape; None without guidance.
        noise: the standard deviation of the noise that is added.
        terms: the length of what it is made of: where large terms cancel, rounding leaves more.
    """

    index: int
    form: Form
    batch: int
    before: Array
    latent: Array
    per_weight: Array | None
    noise: float
    terms: float

    def explains(self, difference: Array, allowed: float) -> bool:
        """Whether a difference from the latent is noise, or rounding no longer than ``allowed``."""
        noise = abs(self.noise) * difference.size**0.5
        slack = NOISE_SLACK + NOISE_DEVIATIONS / (2 * difference.size) ** 0.5
        return abs(_norm(difference) - noise) <= slack * noise + allowed


class Following:
    """Holds a host that samples in the form of the plan to the updates of the plan.

    With guidance that form is a batch of both halves, else a batch without an unconditional half. A host that calls
    for the halves apart combines them out of sight; one that leaves the latents alone does not sample. Both pass.

    Args:
        plan: the step plan.
        spec: what the denoiser is.
    """

    def __init__(self, plan: StepPlan, spec: ModelSpec) -> None:
        self._plan = plan
        self._spec = spec
        self._updates = Updates(plan)
        self._expected: _Expectation | None = None
        self._lengths: deque[tuple[float, float]] = deque(
            maxlen=1 + max(len(step.update.history) for step in plan.steps)
        )  # of latents and predictions, the latest first

    def check(self, index: int, latent: Array, labels: npt.NDArray[np.int64], tolerance: float) -> None:
        """Refuse a batch that another sampler made of the last prediction; nothing else changes.

        Args:
            index: the step that the batch is for.
            latent: [B,C,H,W].
            labels: [B].
            tolerance: of rounding in the host, relative to the terms of an update.

        Raises:
            BundleError: the host samples without guidance, with another weight, or with other updates.
        """
        form = form_of(latent, labels, self._spec)
        if form is Form.PAIRED and self._plan.halves == 1:
            raise BundleError(
                f"the bundle was compiled for {self._plan.describe()}, which is no guidance; this batch of "
                f"{len(latent)} holds {form.value}",
                hint="sample without guidance (guidance_scale=1), or compile with the guidance that you use",
            )
        expected = self._expected
        if expected is None or (index, form, len(latent)) != (expected.index + 1, expected.form, expected.batch):
            return
        latent = latent[: len(expected.latent)]
        if not np.array_equal(latent, expected.before):
            self._judge(expected, latent, tolerance * expected.terms)

    def _judge(self, expected: _Expectation, latent: Array, allowed: float) -> None:
        """Refuse a latent that differs from what was expected by more than rounding."""
        difference = latent - expected.latent
        if not np.isfinite(_norm(difference)):
            return  # half precision overflows where coefficients are large, with any denoiser
        if expected.form is Form.CONDITIONAL and self._plan.halves == 2:
            # A prediction of one half alone: with guidance, the host would have moved the latent elsewhere.
            moved = _norm(latent - expected.before)
            if not expected.noise and _norm(difference) <= allowed < moved / 10:
                raise self._refused("the latents that came were sampled without guidance", self._guidance_hint())
            return
        if expected.explains(difference, allowed):
            return
        if expected.per_weight is not None and np.any(expected.per_weight):
            more = float(np.vdot(difference, expected.per_weight) / np.vdot(expected.per_weight, expected.per_weight))
            rest = difference - np.float32(more) * expected.per_weight
            if expected.explains(rest, max(allowed, 0.01 * _norm(difference))):
                weight = self._plan.fingerprint.guidance + more
                came = f"the latents that came were sampled with guidance {round(weight, 2):g}"
                raise self._refused(came, self._guidance_hint())
        raise self._refused(
            f"the latent that came after timestep {self._plan.timesteps[expected.index]:g} is "
            f"{_norm(difference) / _norm(latent):.2g} off (relative) from what this scheduler makes of the prediction"
            + (" before noise" if expected.noise else ""),
            "the plan's scheduler is make_scheduler(denoiser.plan.fingerprint.scheduler, denoiser.spec.schedule) of "
            "qcgraph.schedulers; compare its settings, such as clip_sample and the betas, with those of yours; "
            + OWN_UPDATES,
        )

    def _guidance_hint(self) -> str:
        weight = self._plan.fingerprint.guidance
        return f"sample with guidance_scale={weight:g}, or compile with the guidance that you use; {OWN_UPDATES}"

    def _refused(self, came: str, hint: str) -> BundleError:
        return BundleError(f"the bundle was compiled for {self._plan.describe()}; {came}", hint=hint)

    def note(self, index: int, latent: Array, labels: npt.NDArray[np.int64], prediction: Array) -> None:
        """Remember a step that was taken.

        Args:
            index: the step.
            latent: what it was given, [B,C,H,W]; it is kept, and must not be written to any more.
            labels: [B].
            prediction: what it gave, [B,C_out,H,W].
        """
        form = form_of(latent, labels, self._spec)
        if index == 0:
            self._updates = Updates(self._plan)
        elif self._expected is None or form is not self._expected.form:
            self._expected = None  # what comes next cannot be told, up to the end of the trajectory
            return
        self._expected = self._expectation(index, latent, form, prediction)

    def _expectation(self, index: int, latent: Array, form: Form, prediction: Array) -> _Expectation | None:
        """What comes next; None where that cannot be told, because the halves come apart."""
        step = self._plan.steps[index]
        batch, per_weight = len(latent), None
        eps = prediction[:, : self._spec.latent_shape[0]].copy()  # the host may change its own
        if form is Form.PAIRED:
            latent = latent[: len(latent) // 2]
            conditional, null = np.split(eps, 2)
            eps = null + np.float32(self._plan.fingerprint.guidance) * (conditional - null)
            per_weight = np.float32(step.update.noise_prediction) * (conditional - null)
        if form is Form.OTHER:
            return None
        after = self._updates.update(latent, eps, step)
        return _Expectation(
            index, form, batch, latent, after, per_weight, step.update.noise, self._terms(step, latent, eps)
        )

    def _terms(self, step: Step, latent: Array, eps: Array) -> float:
        """The length of the terms of an update, as if none cancelled.

        A scheduler may take the prediction out of the latent first, so that counts as often as the latent does.
        """
        self._lengths.appendleft((_norm(latent), _norm(eps)))
        linear = step.update
        coefficients = (Earlier(linear.latent, linear.noise_prediction), *linear.history)
        return sum(
            abs(term.latent) * (x + e) + abs(term.noise_prediction) * e
            for term, (x, e) in zip(coefficients, self._lengths, strict=False)
        )


def _norm(values: Array) -> float:
    return float(np.linalg.norm(values))
