"""The joint refinement of updates: what it measures, what it gains, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import Earlier, Fingerprint, Step, StepPlan, Update
from qcgraph.progress import Progress
from qcgraph.sampling.calibration import calibration_conditions, calibration_noise
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.fitting import fit_updates, with_updates
from qcgraph.sampling.reference import RecordedRun, walk
from qcgraph.sampling.refining import _changed, _Effects, effects, refine
from qcgraph.sampling.runner import Array, Call

STEPS = 4
SPEC = ModelSpec("toy", (2, 4, 4), 2, ())
PLAIN = Update(0.9, -0.2)


class Network:
    """A denoiser whose prediction mixes neighbouring values, bends them, and depends on the timestep; it counts."""

    def __init__(self) -> None:
        self.samples = 0

    def run(self, call: Call) -> Array:
        latent, timestep = call.inputs["latent"], call.inputs["timestep"][0]
        self.samples += len(latent)
        return np.tanh(np.roll(latent, 1, axis=-1) + timestep / 9 * latent).astype(np.float32)


def plan_of(updates: list[Update], guidance: float = 1.0) -> StepPlan:
    steps = tuple(Step(float(9 - 2 * index), update) for index, update in enumerate(updates))
    return StepPlan(Fingerprint("model", "ddim", len(steps), guidance), steps)


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def greedy(network: Network) -> tuple[StepPlan, Conditions, Array, list[Array]]:
    """A plan that was fitted in the order of its steps, its trajectories, and its targets, which it cannot meet."""
    draw = np.random.default_rng(0)
    initial = draw.standard_normal((8, *SPEC.latent_shape)).astype(np.float32)
    conditions = Conditions(8, {})
    targets = [np.roll(initial, shift, axis=-1) * np.float32(0.5) + np.tanh(initial) for shift in range(STEPS)]
    plan = plan_of([PLAIN] * STEPS)
    fitted, _ = fit_updates(network, plan, SPEC, conditions, initial, targets, 1, Progress())
    return with_updates(plan, [step.update for step in fitted]), conditions, initial, targets


def final_error(run: RecordedRun, goal: Array) -> float:
    return float(np.square(run.latents[-1] - goal, dtype=np.float64).mean())


@pytest.mark.parametrize("measured", [2, 6])
def test_final_latents_come_closer(
    network: Network, greedy: tuple[StepPlan, Conditions, Array, list[Array]], measured: int
) -> None:
    """On other noise, too; the error and the run are those of the plan."""
    plan, conditions, initial, targets = greedy
    own = walk(network, plan, SPEC, conditions, initial, Progress())
    found = refine(network, plan, SPEC, conditions, own, targets[-1], 1, measured, Progress())
    run = walk(network, found.plan, SPEC, conditions, initial, Progress())
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(run.latents, found.run.latents, strict=True))
    assert found.error == pytest.approx(final_error(run, targets[-1]))
    assert found.error < 0.95 * found.before
    unseen = np.random.default_rng(7).standard_normal((8, *SPEC.latent_shape)).astype(np.float32)
    goal = np.roll(unseen, STEPS - 1, axis=-1) * np.float32(0.5) + np.tanh(unseen)
    before, after = (
        final_error(walk(network, one, SPEC, conditions, unseen, Progress()), goal) for one in (plan, found.plan)
    )
    assert after < 0.95 * before


def test_updates_that_lead_to_the_goal_stay(
    network: Network, greedy: tuple[StepPlan, Conditions, Array, list[Array]]
) -> None:
    plan, conditions, initial, _ = greedy
    run = walk(network, plan, SPEC, conditions, initial, Progress())
    found = refine(network, plan, SPEC, conditions, run, run.latents[-1], 1, 4, Progress())
    assert found.plan is plan
    assert found.error == found.before == 0.0


@pytest.mark.parametrize("history", [0, 1, 3])
def test_an_effect_is_what_a_changed_coefficient_does(network: Network, history: int) -> None:
    """The change of the final latents by a small change of the coefficients, at every step; the last is exact."""
    updates = [PLAIN, *[Update(0.8, -0.1, history=(Earlier(0.0, 0.05),))] * (STEPS - 1)]
    plan, conditions = plan_of(updates), Conditions(3, {})
    initial = np.random.default_rng(1).standard_normal((3, *SPEC.latent_shape)).astype(np.float32)
    run = walk(network, plan, SPEC, conditions, initial, Progress())
    measuring = _Effects(network, plan, SPEC, conditions, run, history)
    for index in range(STEPS):
        columns = list(measuring.columns(index))
        assert len(columns) == min(2 + index, 2 + history)
        for combination, effect in columns:
            amount = np.array([1e-3])
            changed = _changed(plan, [(index, combination)], amount, history)
            moved = walk(network, changed, SPEC, conditions, initial, Progress()).latents[-1]
            expected = amount[0] * effect
            assert np.linalg.norm(moved - run.latents[-1] - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize(("steps", "history"), [(1, 3), (4, 0), (4, 1), (6, 3)])
def test_the_forward_passes_of_effects_are_counted(network: Network, steps: int, history: int) -> None:
    plan, conditions = plan_of([PLAIN] * steps), Conditions(2, {})
    initial = np.random.default_rng(1).standard_normal((2, *SPEC.latent_shape)).astype(np.float32)
    run = walk(network, plan, SPEC, conditions, initial, Progress())
    network.samples = 0
    measuring = _Effects(network, plan, SPEC, conditions, run, history)
    assert sum(1 for index in range(steps) for _ in measuring.columns(index)) == sum(
        min(2 + index, 2 + history) for index in range(steps)
    )
    assert network.samples == 2 * effects(steps, history)


@pytest.mark.parametrize("count", [1, 2])
def test_few_trajectories(network: Network, count: int) -> None:
    conditions = Conditions(count, {})
    initial = np.random.default_rng(1).standard_normal((count, *SPEC.latent_shape)).astype(np.float32)
    plan = plan_of([PLAIN] * 3)
    run = walk(network, plan, SPEC, conditions, initial, Progress())
    found = refine(network, plan, SPEC, conditions, run, initial, 1, 1, Progress())
    assert found.error < found.before


def test_effects_of_steps_that_reuse(captured: Program, run: Callable[[str, Program], Program]) -> None:
    """Cached values come from the last computing step, moved or not, as they do in a run."""
    program = run("plan-cache{interval=2 blocks=guidance},insert-cache", captured)
    plan, spec = program.facts[StepPlan], program.facts[ModelSpec]
    plan = replace(plan, steps=plan.steps[-5:])
    plan = plan.with_modes([None, "conditional", "conditional", None, "conditional"])
    conditions, initial = calibration_conditions(2, 0, spec), calibration_noise(2, 0, spec).initial()
    runner = TorchRunner(program)
    run_ = walk(runner, plan, spec, conditions, initial, Progress())
    measuring = _Effects(runner, plan, spec, conditions, run_, 1)
    for index in range(len(plan)):
        for combination, effect in measuring.columns(index):
            amount = np.array([4e-3])
            changed = _changed(plan, [(index, combination)], amount, 1)
            moved = walk(runner, changed, spec, conditions, initial, Progress()).latents[-1]
            assert np.linalg.norm(moved - run_.latents[-1] - amount[0] * effect) < 0.02 * np.linalg.norm(
                amount[0] * effect
            )
