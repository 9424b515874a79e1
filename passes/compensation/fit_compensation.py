"""fit-compensation: measure the variance drift of the compiled trajectory and plan its correction."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from qcgraph.errors import UsageError
from qcgraph.facts import Compensation, Precision, Reference
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.passes.compensation._tables import Table, prediction_tables
from qcgraph.pipeline import Pass, PassContext
from qcgraph.pipeline.options import option
from qcgraph.pipeline.workload import Workload
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan, Update
from qcgraph.sampling.calibration import as_tuples, calibration_conditions, calibration_noise
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.loop import Request, Sampler, Updates, advanced, contributions, trajectory
from qcgraph.sampling.noise import Noise
from qcgraph.sampling.runner import Array

SMALLEST_WEIGHT = 1e-6  # an update that all but ignores the noise prediction cannot carry a correction
MASK = 0.5  # share of the mean magnitude above which elements are also weighted by their relative error


@dataclass(frozen=True)
class FitCompensation(Pass):
    """Fit the variance compensation of Q&C on the quantized, cached trajectory, in the order of the steps.

    From the noise of the reference, the latent x after each step is compared with the latent x' of full precision; mu
    is the reference mean. The ratio is variance compensation literally, K = sigma_ref / sigma. The masked form is the
    least squares K = sum w d e / sum w d^2 with d = x - mu, e = x' - mu and w = 1 + [|x'| > mean |x'| / 2] / x'^2,
    which is Q&C's objective of absolute and relative errors. A step is fitted with all earlier corrections applied.
    Where the update adds fresh noise c3 * z, K is solved on the part that the denoiser determines, of variance
    sigma_ref^2 - c3^2.

    The update of a multistep solver is u + h, where h comes from earlier latents and predictions, and only u can be
    corrected: to m + K (u - m) with m = mu - mean h. K is then the root nearest to 1 of the quadratic
    var(K u + h) = sigma_ref^2, or, where there is none, the K of least variance. In the masked form, d = u - m and
    e = x' - h - m. Later steps look back to the corrected predictions, as a host does.

    Attributes:
        clamp: K stays in [1 - clamp, 1 + clamp], and clamped values are counted. 0 gives K = 1 everywhere.
        form: ``ratio``, or ``masked``, which samples the captured program beside this one.
    """

    name: ClassVar[str] = "fit-compensation"
    requires: ClassVar[tuple[type, ...]] = (ModelSpec, StepPlan, Reference)
    precedes: ClassVar[tuple[type, ...]] = (Precision,)
    provides: ClassVar[tuple[type, ...]] = (Compensation,)
    samples: ClassVar[bool] = True

    clamp: float = option(0.1, below=1, hint="0.1 keeps the gains within 10 % of one")
    form: Literal["ratio", "masked"] = "ratio"

    def forwards(self, work: Workload) -> float:
        return work.trajectories * work.trajectory * work.share

    def run(self, program: Program, context: PassContext) -> Program:
        plan, spec, reference = program.facts[StepPlan], program.facts[ModelSpec], program.facts[Reference]
        if plan.is_fitted:
            raise UsageError(
                "the updates of a fitted solver correct the scale of the latents themselves, and are fitted to other "
                "latents than those of the reference",
                hint="leave fit-compensation out, or plan-solver",
            )
        conditions = calibration_conditions(reference.trajectories, reference.seed, spec)
        noise = calibration_noise(reference.trajectories, reference.seed, spec)
        initial = noise.initial()
        exact = _exact(context, conditions, reference.seed) if self.form == "masked" else None
        fitting = _Fitting(self, plan, reference, noise, exact)
        context.progress.note(f"  fit-compensation: {reference.trajectories} trajectories")
        ticks = iter(context.progress.track(range(len(plan)), "compensation"))
        request = Request(TorchRunner(program), plan, spec)
        for _ in trajectory(request, fitting, plan, spec, conditions, initial):
            next(ticks)
        return program.with_facts(fitting.fact)


class _Fitting:
    """An updater that fits the correction of every step to the latent after its update, and goes on from the result.

    Args:
        options: the pass, for its options.
        plan: the step plan.
        reference: the statistics of full precision.
        noise: the noise of the trajectories, past their initial draw.
        exact: for the masked form, the latents after each step of full precision, from the same noise, without fresh
            noise.
    """

    def __init__(
        self,
        options: FitCompensation,
        plan: StepPlan,
        reference: Reference,
        noise: Noise,
        exact: Iterator[Array] | None,
    ) -> None:
        self._options, self._plan, self._noise, self._exact = options, plan, noise, exact
        depth = max(len(step.update.history) for step in plan.steps)
        self._earlier: deque[tuple[Array, Array]] = deque(maxlen=depth)  # the latest first, predictions corrected
        self._references, self._deviations = np.array(reference.means), np.array(reference.deviations)
        self._gains, self._drifts = np.ones_like(self._references), np.ones_like(self._references)
        self._means = self._references.copy()
        self._clamped = 0

    def update(self, index: int, latent: Array, prediction: Array) -> Array:
        """Return the corrected latent [N,C,H,W] with its fresh noise."""
        update, deviation = self._plan.steps[index].update, self._deviations[index]
        own = advanced(update, latent, prediction, ())
        past = sum(contributions(update, self._earlier), np.zeros_like(own))
        mean = self._references[index] - past.mean(axis=(0, 2, 3), dtype=np.float64)
        ratio = _ratio(deviation, (own + past).std(axis=(0, 2, 3), dtype=np.float64), update)
        if self._exact:
            raw = _masked(own, past, next(self._exact), mean, update)
        else:
            raw = _root(deviation, own, past, update) if update.history else ratio
        gains = np.clip(raw, 1 - self._options.clamp, 1 + self._options.clamp)
        self._clamped += int((gains != raw).sum())
        self._gains[index], self._means[index], self._drifts[index] = gains, mean, 1 / ratio
        self._earlier.appendleft((latent, _compensated(prediction, latent, gains, mean, update)))
        gain, centre = (values.astype(np.float32)[:, None, None] for values in (gains, mean))
        corrected: Array = centre + gain * (own - centre) + past
        return corrected + np.float32(update.noise) * self._noise.next() if update.noise else corrected

    @property
    def fact(self) -> Compensation:
        """The corrections that were fitted."""
        return Compensation(
            as_tuples(self._gains), as_tuples(self._means), self._clamped, float(np.abs(self._drifts - 1).max())
        )


def _exact(context: PassContext, conditions: Conditions, seed: int) -> Iterator[Array]:
    """Yield the latents after each step of full precision, without fresh noise, on the trajectories of this noise.

    Raises:
        UsageError: the pipeline does not start from the captured program.
    """
    origin = context.origin
    if origin is None:
        raise UsageError(
            "the masked form samples the captured program, which is not given",
            hint="run it in a compilation, or take form=ratio",
        )
    plan, spec = origin.facts[StepPlan], origin.facts[ModelSpec]
    noise = calibration_noise(len(conditions), seed, spec)
    initial, request, updates = noise.initial(), Request(TorchRunner(origin), plan, spec), Updates(plan)
    for taken in trajectory(request, Sampler(plan, noise), plan, spec, conditions, initial):
        yield updates.update(taken.index, taken.latent, taken.prediction)


def _ratio(reference: Table, reached: Table, update: Update) -> Table:
    """Return K of each channel as the ratio of deviations; 1 where no variance can be corrected."""
    target = reference**2 - update.noise**2
    if abs(update.noise_prediction) < SMALLEST_WEIGHT:
        return np.ones_like(reference)
    usable = (target > 0) & (reached > 0)
    return np.where(usable, np.sqrt(np.maximum(target, 0)) / np.where(usable, reached, 1), 1.0)


def _root(reference: Table, own: Array, past: Array, update: Update) -> Table:
    """Return K of each channel, the root nearest to 1 of var(K u + h) = sigma_ref^2 - c3^2.

    With a = K this is a^2 var u + 2 a cov(u, h) + var h. Where no variance can be corrected, K is 1.

    Args:
        reference: sigma_ref, [C].
        own: u, f32[N,C,H,W].
        past: h, f32[N,C,H,W].
        update: the update.
    """
    target = reference**2 - update.noise**2
    if abs(update.noise_prediction) < SMALLEST_WEIGHT:
        return np.ones_like(reference)
    u, h = (values - values.mean(axis=1, keepdims=True) for values in (_by_channel(own), _by_channel(past)))
    square, cross, rest = (u**2).mean(axis=1), (u * h).mean(axis=1), (h**2).mean(axis=1)
    usable = (target > 0) & (square > 0)
    safe = np.where(usable, square, 1)
    least = -cross / safe  # the K of least variance; the roots lie on both sides of it
    distance = np.sqrt(np.maximum(cross**2 - square * (rest - target), 0)) / safe
    return np.where(usable, np.where(least <= 1, least + distance, least - distance), 1.0)


def _masked(own: Array, past: Array, exact: Array, mean: Table, update: Update) -> Table:
    """Return K of each channel by weighted least squares of values [N,C,H,W]; 1 where all values equal the mean."""
    if abs(update.noise_prediction) < SMALLEST_WEIGHT:
        return np.ones_like(mean)
    found, earlier, target = (_by_channel(values) for values in (own, past, exact))
    magnitude = np.abs(target)
    far = magnitude > MASK * magnitude.mean(axis=1, keepdims=True)
    weight = 1 + far / np.where(far, target, 1) ** 2
    d, e = found - mean[:, None], target - earlier - mean[:, None]
    cross, square = (weight * d * e).sum(axis=1), (weight * d**2).sum(axis=1)
    return np.where(square > 0, cross / np.where(square > 0, square, 1), 1.0)


def _by_channel(values: Array) -> Table:
    """Return values [N,C,H,W] as f64[C,N*H*W]."""
    return values.astype(np.float64).swapaxes(0, 1).reshape(values.shape[1], -1)


def _compensated(prediction: Array, latent: Array, gains: Table, means: Table, update: Update) -> Array:
    """Return the prediction [N,C,H,W] that the graph gives once the correction of its step is part of it."""
    tables = prediction_tables(gains[None], means[None], [update])
    gain, slope, offset = (tables[name][0][:, None, None] for name in ("gain", "slope", "offset"))
    return gain * prediction + slope * latent + offset
