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
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import Earlier, Step, StepPlan
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.loop import Updates
from qcgraph.sampling.runner import Array

# What rounding in the host may leave of an update, relative to the terms it is made of: a hundred times the last digit
# of float32, ten times that of the others. By the dtype that the host computes in.
TOLERANCE = 1e-5
HALF_TOLERANCES = {"float16": 1e-2, "bfloat16": 5e-2}
# How far the length of n normal draws may be from sqrt(n), relative to it: its deviation is 1 / sqrt(2 n), and a little
# more where a host takes its variance from another formula.
NOISE_DEVIATIONS = 5
NOISE_SLACK = 0.05
OWN_UPDATES = "if it is meant, qcgraph.load(..., own_updates=True) takes any latents"
MOST_GIVEN_UP = 64  # trajectories that were begun and not ended, of which the last latent is kept
# Where the next latent is not known, it has to be clearly nearer to the last one of its trajectory than to another's:
# independent latents are about as far from both.
CLEARLY_NEARER = 0.8


class Form(Enum):
    """What a batch holds."""

    PAIRED = "both halves of guidance"
    CONDITIONAL = "no unconditional half"
    OTHER = "something else"


@dataclass(frozen=True)
class GuidedBatch:
    """The form of a batch, and where its halves are.

    Attributes:
        form: what it holds.
        conditional: places of the samples, i64[N]; all of the batch unless it is paired.
        unconditional: places of their unconditional halves in the same order, i64[N]; empty unless it is paired.
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
    """Return what a batch of latents [B,C,H,W] with these conditions holds."""
    return GuidedBatch.of(latent, conditions, spec).form


@dataclass(frozen=True)
class _Expectation:
    """The latent that the plan's sampler comes back with, and what a larger guidance weight adds to it.

    Attributes:
        index: the step that was taken.
        form: what its batch held.
        conditions: of the whole batch.
        before: its latent, [N,C,H,W] of one half.
        latent: the next latent, [N,C,H,W] of one half; without guidance where its other half is not there.
        per_weight: what each 1 of guidance weight adds, of the same shape; None without guidance.
        noise: the standard deviation of the noise that is added.
        terms: the length of what it is made of: where large terms cancel, rounding leaves more.
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
        """Whether a difference from the latent is noise, or rounding no longer than ``allowed``."""
        noise = abs(self.noise) * difference.size**0.5
        slack = NOISE_SLACK + NOISE_DEVIATIONS / (2 * difference.size) ** 0.5
        return abs(_norm(difference) - noise) <= slack * noise + allowed

    def is_at(self, other: _Expectation) -> bool:
        """Whether the next batch of another trajectory may look like the one of this one."""
        return (
            self.index == other.index
            and self.conditions == other.conditions
            and self.before.shape == other.before.shape
        )


class HostCheck:
    """Holds a host that samples in the form of the plan to the updates of the plan.

    With guidance that form is a batch of both halves, in whatever order, else a batch of samples. A host that calls for
    the halves apart combines them out of sight, so that only a host without guidance is told; `unchecked` says so. One
    that leaves the latents alone does not sample, and passes.

    A trajectory that is begun before the last one ended may be the end of that, or run beside it. Therefore the last
    ones are remembered, and a latent that goes on from one of them is refused.

    Args:
        plan: the step plan.
        spec: what the denoiser is.
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
        self.unchecked = ""  # why the latents of a batch could not be checked; empty as long as all could

    def restart(self) -> None:
        """Forget the trajectory that is under way: its host gives it up."""
        self._expected = None

    def check(self, index: int, latent: Array, conditions: Conditions, tolerance: float) -> None:
        """Refuse a batch that another sampler made of the last prediction; nothing else changes.

        Args:
            index: the step that the batch is for.
            latent: [B,C,H,W].
            conditions: of the batch.
            tolerance: of rounding in the host, relative to the terms of an update.

        Raises:
            BundleError: the host samples without guidance, with another weight, or with other updates; or the batch
                goes on from another trajectory.
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
        """Whether the next latent is known but for its noise."""
        return expected.form is Form.PAIRED or self._plan.halves == 1

    def _check_trajectory(self, expected: _Expectation, latent: Array) -> None:
        """Refuse a latent that goes on from a trajectory which was begun before this one, and is not ended."""
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
        """Refuse a latent that differs from what was expected by more than rounding."""
        difference = latent - expected.latent
        if not np.isfinite(_norm(difference)):
            return  # half precision overflows where coefficients are large, with any denoiser
        if not self._is_known(expected):
            # A prediction of one half alone: with guidance, the host would have moved the latent elsewhere; unless all
            # of it is unconditional, where guidance changes nothing.
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
            "the plan's scheduler is make_scheduler(denoiser.plan.fingerprint.scheduler, "
            "denoiser.spec.noise_schedule) of qcgraph.plan.schedulers; compare its settings, such as clip_sample and "
            "the betas, with those of yours; " + OWN_UPDATES,
        )

    def _guidance_hint(self) -> str:
        weight = self._plan.fingerprint.guidance
        return f"sample with guidance_scale={weight:g}, or compile with the guidance that you use; {OWN_UPDATES}"

    def _refused(self, came: str, hint: str) -> BundleError:
        return BundleError(f"the bundle was compiled for {self._plan.describe()}; {came}", hint=hint)

    def note(self, index: int, latent: Array, conditions: Conditions, prediction: Array) -> None:
        """Remember a step that was taken.

        Args:
            index: the step.
            latent: what it was given, [B,C,H,W]; it is kept, and must not be written to any more.
            conditions: of the batch.
            prediction: what it gave, [B,C_out,H,W].
        """
        expected = self._expected
        if index == 0:
            if expected is not None and expected.index + 1 < len(self._plan):
                self._given_up.append(expected)
            self._updates = Updates(self._plan)
        batch = GuidedBatch.of(latent, conditions, self._spec)
        if index > 0 and (expected is None or (index, batch.form) != (expected.index + 1, expected.form)):
            self._expected = None  # what comes next cannot be told, up to the end of the trajectory
            self.unchecked = "the form of the batches changed within a trajectory: its latents are not checked any more"
            return
        self._expected = self._expectation(index, latent, conditions, batch, prediction)

    def _expectation(
        self, index: int, latent: Array, conditions: Conditions, batch: GuidedBatch, prediction: Array
    ) -> _Expectation:
        """What comes next."""
        step, per_weight = self._plan.steps[index], None
        eps = prediction[:, : self._spec.latent_shape[0]].copy()  # the host may change its own
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
