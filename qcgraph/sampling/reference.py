"""Trajectories that solvers are fitted to: the run of a plan, and an estimate of the converged run. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qcgraph.plan.levels import first_order, levels
from qcgraph.plan.schedulers import first_order as first_order_solver
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import ModelSpec, NoiseSchedule
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.calibration import calibration_conditions, calibration_noise
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.loop import Denoising, Request, Updater, Updates, trajectory
from qcgraph.sampling.runner import Array, Runner

CONVERGED_STEPS = 250  # steps of the first-order solver that count as converged; evaluations compare with them, too
# Steps of the two runs that the converged one is extrapolated from, at 60 % of its cost. On cifar10 the extrapolated
# final latents are 60 dB from those of 250 steps, and solvers fitted to them at most 0.3 dB worse than with 250 steps.
COARSE_STEPS, FINE_STEPS = 50, 100


@dataclass(frozen=True)
class RecordedRun:
    """A deterministic trajectory, at the timesteps of a plan of T steps.

    Attributes:
        latents: the latent that each step is given, then the final one, each f32[N,C,H,W].
        predictions: the guided prediction of each step, f32[N,C,H,W].
        differences: the conditional prediction less the unconditional one, for each step; empty without guidance.
    """

    latents: tuple[Array, ...]
    predictions: tuple[Array, ...]
    differences: tuple[Array, ...] = ()

    @property
    def ends(self) -> RecordedRun:
        """The final latents alone."""
        return RecordedRun(self.latents[-1:], ())


def walk(
    runner: Runner, plan: StepPlan, spec: ModelSpec, conditions: Conditions, initial: Array, progress: Progress
) -> RecordedRun:
    """Sample the trajectories of a plan whose updates add no noise, and record them.

    Args:
        runner: the backend.
        plan: the step plan.
        spec: the specification of the denoiser.
        conditions: the conditions of the N trajectories.
        initial: their initial noise, f32[N,C,H,W].
        progress: reports the steps.
    """
    halves = _Differences(Request(runner, plan, spec), len(initial), spec)
    run = record(halves, Updates(plan), plan, spec, conditions, initial, progress, "trajectories")
    return replace(run, differences=tuple(halves.differences))


def record(
    denoising: Denoising,
    updater: Updater,
    plan: StepPlan,
    spec: ModelSpec,
    conditions: Conditions,
    initial: Array,
    progress: Progress,
    title: str,
) -> RecordedRun:
    """Walk trajectories, and record their latents and predictions.

    Args:
        denoising: predicts the noise.
        updater: makes the next latent.
        plan: the step plan.
        spec: the specification of the denoiser.
        conditions: the conditions of the N trajectories.
        initial: their initial noise, f32[N,C,H,W].
        progress: reports the steps.
        title: names them in the report.
    """
    latents, predictions = [initial], []
    ticks = iter(progress.track(plan.steps, title))
    for taken in trajectory(denoising, updater, plan, spec, conditions, initial):
        next(ticks)
        predictions.append(taken.prediction)
        latents.append(taken.after)
    return RecordedRun(tuple(latents), tuple(predictions))


class _Differences:
    """Denoises, and keeps the differences of the halves of guided batches.

    Args:
        denoising: predicts the noise.
        count: the number of trajectories N; a guided batch has twice as many samples.
        spec: the specification of the denoiser.
    """

    def __init__(self, denoising: Denoising, count: int, spec: ModelSpec) -> None:
        self._denoising, self._count, self._channels = denoising, count, spec.latent_shape[0]
        self.differences: list[Array] = []

    def denoise(self, index: int, latent: Array, conditions: Conditions) -> Array:
        """Return the noise prediction [B,C_out,H,W] of a step."""
        prediction = self._denoising.denoise(index, latent, conditions)
        if len(latent) > self._count:
            conditional, unconditional = np.split(prediction[:, : self._channels], 2)
            self.differences.append(conditional - unconditional)
        return prediction


class RunStore:
    """Runs of the captured model that the passes of one compilation share, so that none is sampled twice.

    A run is known by its plan, the number of trajectories and their seed.
    """

    def __init__(self) -> None:
        self._runs: dict[tuple[object, ...], RecordedRun] = {}

    def walk(
        self, runner: Runner, plan: StepPlan, spec: ModelSpec, trajectories: int, seed: int, progress: Progress
    ) -> RecordedRun:
        """Return the run of a plan on calibration trajectories, sampled by the runner if it is not known yet.

        Args:
            runner: runs the captured model.
            plan: the step plan, whose updates add no noise.
            spec: the specification of the denoiser.
            trajectories: the number of trajectories.
            seed: the seed of conditions and noise.
            progress: reports the steps.
        """
        key = (plan.fingerprint, plan.steps, trajectories, seed)
        if key not in self._runs:
            conditions = calibration_conditions(trajectories, seed, spec)
            initial = calibration_noise(trajectories, seed, spec).initial()
            self._runs[key] = walk(runner, plan, spec, conditions, initial, progress)
        return self._runs[key]


def first_order_plan(steps: int, like: StepPlan, schedule: NoiseSchedule) -> StepPlan:
    """Return the plan of the first-order solver with this many steps, for the model, guidance and variant of another.

    Args:
        steps: the number of steps; at most as many as there are training timesteps.
        like: the other plan.
        schedule: the noise schedule of the model.
    """
    mark = like.fingerprint
    count = min(steps, schedule.train_steps)
    plan = make_step_plan(first_order_solver(schedule), count, mark.guidance, schedule, mark.model)
    return StepPlan(plan.fingerprint, tuple(replace(step, variant=like.computing) for step in plan.steps), like.roles)


def at_timesteps(run: RecordedRun, plan: StepPlan, timesteps: Sequence[float], schedule: NoiseSchedule) -> RecordedRun:
    """Return a run at other timesteps.

    A latent between two steps is where the first-order update of the step before leads; a prediction there is
    interpolated. At timesteps of the run the values are those of the run; before its first one there is only noise.

    Args:
        run: the run.
        plan: the plan of the run.
        timesteps: the other timesteps, falling.
        schedule: the noise schedule of the model.
    """
    own = np.asarray(plan.timesteps)
    latents: list[Array] = []
    predictions: list[Array] = []
    differences: list[Array] = []
    for timestep in timesteps:
        last = int((own >= timestep).sum()) - 1  # the step before, or the one at this timestep
        after, share = max(last, 0), 0.0
        if last < 0 or own[last] == timestep:
            latents.append(run.latents[after])
        else:
            here, there = (
                tuple(float(level[0]) for level in levels(schedule, [time])) for time in (own[last], timestep)
            )
            update = first_order(schedule, (here[0], here[1]), (there[0], there[1]))
            latents.append(
                np.float32(update.latent) * run.latents[last]
                + np.float32(update.noise_prediction) * run.predictions[last]
            )
            after = min(last + 1, len(own) - 1)
            share = float((own[last] - timestep) / (own[last] - own[after])) if after > last else 0.0
        for made, known in ((predictions, run.predictions), (differences, run.differences)):
            if known:
                made.append(known[max(last, 0)] + np.float32(share) * (known[after] - known[max(last, 0)]))
    return RecordedRun((*latents, run.latents[-1]), tuple(predictions), tuple(differences))


def extrapolated(coarse: RecordedRun, fine: RecordedRun) -> RecordedRun:
    """Return an estimate of the run of `CONVERGED_STEPS` steps from those of `COARSE_STEPS` and `FINE_STEPS`.

    The error of a first-order solver is proportional to 1 / steps but for terms of second order, so that two runs give
    a third one (Richardson's extrapolation).

    Args:
        coarse: the run of `COARSE_STEPS` steps.
        fine: the run of `FINE_STEPS` steps, at the same timesteps.
    """
    share = (1 / FINE_STEPS - 1 / CONVERGED_STEPS) / (1 / COARSE_STEPS - 1 / FINE_STEPS)

    def beyond(near: Sequence[Array], far: Sequence[Array]) -> tuple[Array, ...]:
        return tuple(one + np.float32(share) * (one - other) for one, other in zip(near, far, strict=True))

    return RecordedRun(
        beyond(fine.latents, coarse.latents),
        beyond(fine.predictions, coarse.predictions),
        beyond(fine.differences, coarse.differences),
    )
