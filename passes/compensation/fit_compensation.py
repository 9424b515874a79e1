"""fit-compensation: measure the variance drift of the compiled trajectory and plan its correction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from qcgraph.errors import UsageError
from qcgraph.facts import Compensation, Precision, Reference
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.passes.compensation._compensable import check_compensable
from qcgraph.pipeline import Pass, PassContext
from qcgraph.pipeline.options import option
from qcgraph.pipeline.workload import Workload
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan, Update
from qcgraph.sampling.calibration import calibration_labels, calibration_noise, rows
from qcgraph.sampling.loop import Array, Request, guided

Table = npt.NDArray[np.float64]
SMALLEST_WEIGHT = 1e-6  # an update that all but ignores the noise prediction cannot carry a correction
MASK = 0.5  # of the mean magnitude: elements beyond it also weigh by their relative error


@dataclass(frozen=True)
class FitCompensation(Pass):
    """Fit the variance compensation of Q&C on the quantized, cached trajectory, in the order of the steps.

    From the noise of the reference, what each step reaches, x, is compared with full precision, x'; mu is the reference
    mean. The ratio is variance compensation literally, K = sigma_ref / sigma. The masked form is the least squares
    K = sum w d e / sum w d^2 with d = x - mu, e = x' - mu and w = 1 + [|x'| > mean |x'| / 2] / x'^2, which is Q&C's
    objective of absolute and relative errors. A step is fitted with all earlier corrections applied. Where the update
    adds fresh noise c3 * z, K is solved on the part that the denoiser reaches: sigma_ref^2 - c3^2 is its variance.
    Updates that look back to earlier steps are refused (see `qcgraph.passes.compensation._compensable`).

    Attributes:
        clamp: K stays in [1 - clamp, 1 + clamp]; what was clamped is counted. 0 gives K = 1 everywhere.
        form: ``ratio`` or ``masked``, which samples the captured program beside this one.
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

    def check(self, captured: Program) -> None:
        """Refuse steps whose updates look back."""
        check_compensable(captured.facts[StepPlan])

    def run(self, program: Program, context: PassContext) -> Program:
        self.check(program)
        plan, spec, reference = program.facts[StepPlan], program.facts[ModelSpec], program.facts[Reference]
        means, deviations = np.array(reference.means), np.array(reference.deviations)
        count = reference.trajectories
        labels = np.asarray(calibration_labels(count, reference.seed, spec), dtype=np.int64)
        noise = calibration_noise(count, reference.seed, spec)
        ours = _Trajectory(program, plan, labels, noise.initial())
        exact = _exact(context, labels, ours.latent) if self.form == "masked" else None
        gains, drifts, clamped = np.ones_like(means), np.ones_like(means), 0
        context.progress.note(f"  fit-compensation: {count} trajectories")
        for index in context.progress.track(range(len(plan)), "compensation"):
            update = plan.steps[index].update
            reached = ours.reach(index)
            ratio = _ratio(deviations[index], reached.std(axis=(0, 2, 3), dtype=np.float64), update)
            raw = _masked(reached, exact.reach(index), means[index], update) if exact else ratio
            gains[index] = np.clip(raw, 1 - self.clamp, 1 + self.clamp)
            clamped += int((gains[index] != raw).sum())
            drifts[index] = 1 / ratio
            gain, mean = (table[index].astype(np.float32)[:, None, None] for table in (gains, means))
            ours.latent = mean + gain * (reached - mean)
            if update.noise:
                fresh = np.float32(update.noise) * noise.next()
                for trajectory in (ours, exact) if exact else (ours,):
                    trajectory.latent = trajectory.latent + fresh
        return program.with_facts(Compensation(rows(gains), rows(means), clamped, rows(drifts)))


class _Trajectory:
    """Latents on their way, [N,C,H,W], and what the next update makes of them."""

    def __init__(self, program: Program, plan: StepPlan, labels: npt.NDArray[np.int64], latent: Array) -> None:
        self.latent = latent
        self._plan, self._spec, self._labels = plan, program.facts[ModelSpec], labels
        self._request = Request(TorchRunner(program), plan)

    def reach(self, index: int) -> Array:
        """What the update of a step gives without fresh noise; it is the latent that goes on."""
        step = self._plan.steps[index]
        prediction = guided(self._request, self.latent, step, self._labels, self._plan, self._spec)
        self.latent = step.update.latent * self.latent + step.update.noise_prediction * prediction
        return self.latent


def _exact(context: PassContext, labels: npt.NDArray[np.int64], latent: Array) -> _Trajectory:
    """The trajectory of full precision from the same noise."""
    origin = context.origin
    if origin is None:
        raise UsageError(
            "the masked form samples the captured program, which is not given",
            hint="run it in a compilation, or take form=ratio",
        )
    return _Trajectory(origin, origin.facts[StepPlan], labels, latent)


def _ratio(reference: Table, reached: Table, update: Update) -> Table:
    """K of each channel by deviations; 1 where there is no variance to correct."""
    target = reference**2 - update.noise**2
    if abs(update.noise_prediction) < SMALLEST_WEIGHT:
        return np.ones_like(reference)
    usable = (target > 0) & (reached > 0)
    return np.where(usable, np.sqrt(np.maximum(target, 0)) / np.where(usable, reached, 1), 1.0)


def _masked(reached: Array, exact: Array, mean: Table, update: Update) -> Table:
    """K of each channel by weighted least squares, of values [N,C,H,W]; 1 where there is nothing to fit."""
    if abs(update.noise_prediction) < SMALLEST_WEIGHT:
        return np.ones_like(mean)
    found, target = (values.astype(np.float64).swapaxes(0, 1).reshape(len(mean), -1) for values in (reached, exact))
    magnitude = np.abs(target)
    far = magnitude > MASK * magnitude.mean(axis=1, keepdims=True)
    weight = 1 + far / np.where(far, target, 1) ** 2
    d, e = found - mean[:, None], target - mean[:, None]
    cross, square = (weight * d * e).sum(axis=1), (weight * d**2).sum(axis=1)
    return np.where(square > 0, cross / np.where(square > 0, square, 1), 1.0)
