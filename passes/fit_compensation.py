"""fit-compensation: measure the variance drift of the compiled trajectory and plan its correction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from qcgraph.calibration import FIRST_INDEX, calibration_labels, rows
from qcgraph.errors import UsageError
from qcgraph.facts import Compensation, Reference
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.noise import Noise
from qcgraph.pipeline import Pass, PassContext
from qcgraph.sampling import Request, guided
from qcgraph.schedulers import check_compensable
from qcgraph.spec import ModelSpec
from qcgraph.steps import StepPlan, Update

Table = npt.NDArray[np.float64]
SMALLEST_WEIGHT = 1e-6  # an update that all but ignores the noise prediction cannot carry a correction


@dataclass(frozen=True)
class FitCompensation(Pass):
    """Fit the variance compensation of Q&C on the quantized, cached trajectory, in the order of the steps.

    From the noise of the reference, each step's latent is compared with full precision: K = sigma_ref / sigma, mu the
    reference mean. A step is fitted with all earlier corrections applied. Where the update adds fresh noise c3 * z,
    K is solved on the part that the denoiser reaches: K^2 = (sigma_ref^2 - c3^2) / sigma_reached^2. Updates that look
    back to earlier steps are refused (see `qcgraph.schedulers.check_compensable`).

    Attributes:
        clamp: K stays in [1 - clamp, 1 + clamp]; what was clamped is counted. 0 gives K = 1 everywhere.
    """

    name: ClassVar[str] = "fit-compensation"
    requires: ClassVar[tuple[type, ...]] = (ModelSpec, StepPlan, Reference)
    provides: ClassVar[tuple[type, ...]] = (Compensation,)

    clamp: float = 0.1

    def run(self, program: Program, context: PassContext) -> Program:
        if not 0 <= self.clamp < 1:
            raise UsageError(f"clamp {self.clamp:g}", hint="0.1 keeps the gains within 10 % of one")
        check_compensable(program.facts[StepPlan])
        plan, spec, reference = program.facts[StepPlan], program.facts[ModelSpec], program.facts[Reference]
        means, deviations = np.array(reference.means), np.array(reference.deviations)
        count = reference.trajectories
        labels = np.asarray(calibration_labels(count, reference.seed, spec), dtype=np.int64)
        noise = Noise(reference.seed, range(FIRST_INDEX, FIRST_INDEX + count), spec.latent_shape)
        request = Request(TorchRunner(program), plan)
        latent = noise.initial()
        gains, drifts, clamped = np.ones_like(means), np.ones_like(means), 0
        context.progress.note(f"  fit-compensation: {count} trajectories")
        for index in context.progress.track(range(len(plan)), "compensation"):
            step = plan.steps[index]
            prediction = guided(request, latent, step, labels, plan, spec)
            reached = step.update.latent * latent + step.update.noise_prediction * prediction
            raw = _gain(deviations[index], reached.std(axis=(0, 2, 3), dtype=np.float64), step.update)
            gains[index] = np.clip(raw, 1 - self.clamp, 1 + self.clamp)
            clamped += int((gains[index] != raw).sum())
            drifts[index] = 1 / raw
            gain, mean = (table[index].astype(np.float32)[:, None, None] for table in (gains, means))
            latent = mean + gain * (reached - mean)
            if step.update.noise:
                latent = latent + np.float32(step.update.noise) * noise.next()
        return program.with_facts(Compensation(rows(gains), rows(means), clamped, rows(drifts)))


def _gain(reference: Table, reached: Table, update: Update) -> Table:
    """K per channel; 1 where the update cannot carry a correction or there is no variance to correct."""
    target = reference**2 - update.noise**2
    if abs(update.noise_prediction) < SMALLEST_WEIGHT:
        return np.ones_like(reference)
    usable = (target > 0) & (reached > 0)
    return np.where(usable, np.sqrt(np.maximum(target, 0)) / np.where(usable, reached, 1), 1.0)
