"""Check that a host samples as the plan does, by the latents that it gives next. NumPy only.

A denoiser does not see the sampler that calls it. But the update of a step is known, so the next latent shows how the
last prediction was used: by the plan's sampler, by the same sampler with another guidance weight, or in another way.
Where an update adds noise, only the amount of noise is known.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from qcgraph.errors import BundleError
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import Earlier, Step, StepPlan
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.loop import Updates
from qcgraph.sampling.runner import Array

# The error that rounding in the host may leave of an update, relative to its terms: a hundred times the last digit of
# float32, ten times the last digit of other types. By the dtype that the host computes in.
TOLERANCE = 1e-5
HALF_TOLERANCES = {"float16": 1e-2, "bfloat16": 5e-2}
# The length of n normal draws differs from sqrt(n) by about 1 / sqrt(2 n), relative to it. This many deviations are
# allowed, and a little slack for hosts that take the variance from another formula.
NOISE_DEVIATIONS = 5
NOISE_SLACK = 0.05
OWN_UPDATES = "if it is meant, qcgraph.load(..., own_updates=True) takes any latents"
MOST_GIVEN_UP = 64  # trajectories that have begun and not ended, of which the last latent is kept
# Where the next latent is not known, it has to be clearly nearer to the last latent of its own trajectory than to that
# of another one: independent latents are about as far from both.
CLEARLY_NEARER = 0.8


class Form(Enum):
    """The content of a batch."""

    PAIRED = "both halves of guidance"
    CONDITIONAL = "no unconditional half"
    OTHER = "something else"


@dataclass(frozen=True)
class GuidedBatch:
    """The form of a batch, and the places of its halves.

    Attributes:
        form: the content of the batch.
        conditional: the places of the samples, i64[N]; all of the batch unless it is paired.
        unconditional: the places of their unconditional halves in the same order, i64[N]; empty unless it is paired.
    """

    form: Form
    conditional: npt.NDArray[np.int64]
    unconditional: npt.NDArray[np.int64]

    @classmethod
    def of(cls, latent: Array, conditions: Conditions, spec: ModelSpec) -> GuidedBatch:
        """Read latents [B,C,H,W] and their conditions: the halves may come in either order, or sample by sample."""
        null, everything, count = conditions.is_null(spec), np.arange(len(conditions)), len(conditions) // 2
        if not null.any():
            return cls(Form.CONDITIONAL, everything, everything[:0])
        first, second = everything[:count], everything[count:]
        halves = first, second
        if null[:count].all() and not null[count:].all():
            halves = second, first
        elif not null[count:].all():
            halves = everything[~null], everything[null]
        conditional, unconditional = halves
        if (
            len(conditional) == len(unconditional)
            and not null[conditional].all()
            and np.array_equal(latent[conditional], latent[unconditional])
        ):
            return cls(Form.PAIRED, conditional, unconditional)
        return cls(Form.OTHER, everything, everything[:0])


def form_of(latent: Array, conditions: Conditions, spec: ModelSpec) -> Form:
    """Return the content of a batch of latents [B,C,H,W] with these conditions."""
    return GuidedBatch.of(latent, conditions, spec).form


@dataclass(frozen=True)
class _Expectation:
    """The next latent by the plan's sampler, and its change for a larger guidance weight.

    Attributes:
        index: the index of the step that ran.
        form: the form of its batch.
        conditions: the conditions of the whole batch.
        before: the latent of the step, [N,C,H,W] of one half.
        latent: the next latent, [N,C,H,W] of one half; without guidance where the batch lacks the other half.
        per_weight: the change of the next latent for each 1 of guidance weight, of the same shape; None without
            guidance.
        noise: the standard deviation of the noise that the update adds.
        terms: the length of the terms of the update: where large terms cancel, rounding leaves a larger error.
    """

    index: int
    form: Form
    conditions: Conditions
    before: Array
    latent: Array
    per_weight: Array | None
    noise: float
    terms: float

    def explains(self, difference: Array, allowed: float) -> bool:
        """Return whether a difference from the latent is noise, or rounding no longer than ``allowed``."""
        noise = abs(self.noise) * difference.size**0.5
        slack = NOISE_SLACK + NOISE_DEVIATIONS / (2 * difference.size) ** 0.5
        return abs(_norm(difference) - noise) <= slack * noise + allowed

    def is_at(self, other: _Expectation) -> bool:
        """Return whether the next batch of the other trajectory may look like the next batch of this one."""
        return (
            self.index == other.index
            and self.conditions == other.conditions
            and self.before.shape == other.before.shape
        )


class HostCheck:
    """The check that a host applies the updates of the plan.

    The host has to call with batches of both halves of guidance, in any order, or without guidance with batches of
    samples. A host that calls for each half separately combines them out of sight, so that only sampling without
    guidance is detected; `unchecked` says so. A host that does not change the latents does not sample, and passes.

    A trajectory that begins before the last one has ended may replace it, or run beside it. The last such trajectories
    are therefore remembered, and a latent that continues one of them is refused.

    Args:
        plan: the step plan.
        spec: the specification of the denoiser.
    """

    def __init__(self, plan: StepPlan, spec: ModelSpec) -> None:
        self._plan = plan
        self._spec = spec
        self._updates = Updates(plan)
        self._expected: _Expectation | None = None
        self._given_up: deque[_Expectation] = deque(maxlen=MOST_GIVEN_UP)
        self._lengths: deque[tuple[float, float]] = deque(
            maxlen=1 + max(len(step.update.history) for step in plan.steps)
        )  # of latents and predictions, the latest first
        self.unchecked = ""  # why the latents of a batch could not be checked; empty while all could

    def restart(self) -> None:
        """Forget the current trajectory, because its host gives it up."""
        self._expected = None

    def check(self, index: int, latent: Array, conditions: Conditions, tolerance: float) -> None:
        """Refuse a batch that another sampler made of the last prediction; the state does not change.

        Args:
            index: the index of the step that the batch is for.
            latent: the latent [B,C,H,W].
            conditions: the conditions of the batch.
            tolerance: the tolerance for rounding in the host, relative to the terms of an update.

        Raises:
            BundleError: the host samples without guidance, with another weight, or with other updates; or the batch
                continues another trajectory.
        """
        batch = GuidedBatch.of(latent, conditions, self._spec)
        if batch.form is Form.PAIRED and self._plan.halves == 1:
            raise BundleError(
                f"the bundle was compiled for {self._plan.describe()}, which is no guidance; this batch of "
                f"{len(latent)} holds {batch.form.value}",
                hint="sample without guidance (guidance_scale=1), or compile with the guidance that you use",
            )
        expected = self._expected
        if expected is None or index != expected.index + 1 or len(conditions) != len(expected.conditions):
            return
        if expected.form is Form.PAIRED:
            if batch.form is not Form.PAIRED:
                raise self._refused(
                    f"the latents of the two halves of guidance differ after timestep "
                    f"{self._plan.timesteps[expected.index]:g}, and were the same before",
                    f"update both halves alike; {OWN_UPDATES}",
                )
            latent = latent[batch.conditional]
        if not np.array_equal(latent, expected.before):
            self._check_trajectory(expected, latent)
            self._judge(expected, latent, tolerance * expected.terms)

    def _is_known(self, expected: _Expectation) -> bool:
        """Return whether the next latent is known except for its noise."""
        return expected.form is Form.PAIRED or self._plan.halves == 1

    def _check_trajectory(self, expected: _Expectation, latent: Array) -> None:
        """Refuse a latent that continues a trajectory which began before this one and has not ended."""
        others = [other for other in self._given_up if other.is_at(expected)]
        if not others:
            return
        if self._is_known(expected):
            own = _norm(latent - expected.latent)
            is_others = any(_norm(latent - other.latent) < own for other in others)
        else:
            own = _norm(latent - expected.before)
            is_others = any(CLEARLY_NEARER * _norm(latent - other.before) < own for other in others)
        if is_others:
            raise BundleError(
                f"the latent that came after timestep {self._plan.timesteps[expected.index]:g} does not go on from the "
                "trajectory that was begun last",
                hint="one denoiser holds the state of one trajectory: use denoiser.request() for each one that runs at "
                "the same time, in threads or in turns; or begin anew with the first timestep of the plan",
            )

    def _judge(self, expected: _Expectation, latent: Array, allowed: float) -> None:
        """Refuse a latent that differs from the expected one by more than rounding."""
        difference = latent - expected.latent
        if not np.isfinite(_norm(difference)):
            return  # half precision overflows where coefficients are large, with any denoiser
        if not self._is_known(expected):
            # The prediction is of one half alone. With guidance, the host would have moved the latent elsewhere, unless
            # all of the batch is unconditional, where guidance changes nothing.
            moved = _norm(latent - expected.before)
            if (
                not (expected.noise or np.all(expected.conditions.is_null(self._spec)))
                and _norm(difference) <= allowed < moved / 10
            ):
                raise self._refused("the latents that came were sampled without guidance", self._guidance_hint())
            self.unchecked = (
                f"the bundle was compiled for {self._plan.describe()}, and batches come without both halves of "
                "guidance: whether their latents are updated as planned is not checked"
            )
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
            "FittedScheduler.of_plan(denoiser.plan, denoiser.spec.noise_schedule) of qcgraph.schedulers updates as "
            "planned; or compare the settings of your scheduler, such as clip_sample and the betas, with those that "
            f"make_scheduler of qcgraph.plan.schedulers gives {self._plan.fingerprint.scheduler}; " + OWN_UPDATES,
        )

    def _guidance_hint(self) -> str:
        weight = self._plan.fingerprint.guidance
        return f"sample with guidance_scale={weight:g}, or compile with the guidance that you use; {OWN_UPDATES}"

    def _refused(self, came: str, hint: str) -> BundleError:
        return BundleError(f"the bundle was compiled for {self._plan.describe()}; {came}", hint=hint)

    def note(self, index: int, latent: Array, conditions: Conditions, prediction: Array) -> None:
        """Record a step that ran.

        Args:
            index: the index of the step.
            latent: the latent that the step was given, [B,C,H,W]; it is kept, and must not be written to any more.
            conditions: the conditions of the batch.
            prediction: the prediction of the step, [B,C_out,H,W].
        """
        expected = self._expected
        if index == 0:
            if expected is not None and expected.index + 1 < len(self._plan):
                self._given_up.append(expected)
            self._updates = Updates(self._plan)
        batch = GuidedBatch.of(latent, conditions, self._spec)
        if index > 0 and (expected is None or (index, batch.form) != (expected.index + 1, expected.form)):
            self._expected = None  # the next latent is not known, up to the end of the trajectory
            self.unchecked = "the form of the batches changed within a trajectory: its latents are not checked any more"
            return
        self._expected = self._expectation(index, latent, conditions, batch, prediction)

    def _expectation(
        self, index: int, latent: Array, conditions: Conditions, batch: GuidedBatch, prediction: Array
    ) -> _Expectation:
        """Return the expected next latent after a step."""
        step, per_weight = self._plan.steps[index], None
        eps = prediction[:, : self._spec.latent_shape[0]].copy()  # the host may change its own array
        if batch.form is Form.PAIRED:
            latent = latent[batch.conditional]
            conditional, null = eps[batch.conditional], eps[batch.unconditional]
            eps = null + np.float32(self._plan.fingerprint.guidance) * (conditional - null)
            per_weight = np.float32(step.update.noise_prediction) * (conditional - null)
        after = self._updates.update(index, latent, eps)
        return _Expectation(
            index, batch.form, conditions, latent, after, per_weight, step.update.noise, self._terms(step, latent, eps)
        )

    def _terms(self, step: Step, latent: Array, eps: Array) -> float:
        """Return the length of the terms of an update, as if none cancelled.

        A scheduler may take the prediction out of the latent first, so its length is added to that of the latent.
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
