"""What skipping costs: errors by definition, lines between what is measured, and rehearsals that are the real thing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from qcgraph.facts import CachePlan
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.passes.caching import _reuse_errors as skipping
from qcgraph.passes.caching._reuse_errors import OpenLoop, Rehearsal, reuse_errors
from qcgraph.passes.caching._trajectories import Trajectories, record
from qcgraph.passes.caching.forecasters import FORECASTERS
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.calibration import FIRST_INDEX
from qcgraph.sampling.loop import Resumed, guided, sample

Run = Callable[[str, Program], Program]
COUNT = 3


@pytest.fixture(scope="module")
def split(captured: Program, run: Run) -> Program:
    """Two modes: all blocks, and the second one alone."""
    return run('plan-cache{interval=3 blocks="0..1+1..1" history=3},insert-cache', captured)


@pytest.fixture(scope="module")
def trajectories(split: Program) -> Trajectories:
    return record(split, COUNT, 0, Progress())


def errors_of(program: Program, trajectories: Trajectories, kind: str, gap: int = 8) -> np.ndarray:
    """With all steps of the same weight."""
    modes, forecaster = list(program.facts[CachePlan].modes), OpenLoop(program, trajectories, FORECASTERS[kind])
    weight = np.ones(len(program.facts[StepPlan]))
    return reuse_errors(program, trajectories, forecaster, weight, modes, gap, Progress()).values


def test_the_error_of_reuse_is_that_of_running_the_variant(split: Program, trajectories: Trajectories) -> None:
    errors = errors_of(split, trajectories, "reuse")
    plan, spec = split.facts[StepPlan], split.facts[ModelSpec]
    for mode, (name, values) in enumerate(split.facts[CachePlan].modes.items()):
        for index, gap, earlier in [(1, 1, 0), (5, 2, 3), (8, 1, 1), (8, 8, 0)]:
            cached = {value: trajectories.values[value][index - gap] for value in values}
            reusing = plan.with_variants([name] * len(plan))
            resumed = Resumed(TorchRunner(split), reusing, spec, cached)
            found = guided(resumed, index, trajectories.latents[index], trajectories.conditions, plan, spec)
            expected = np.mean(np.square(found - trajectories.predictions[index]))
            assert errors[mode, index, gap, earlier] == pytest.approx(expected, rel=1e-4)


def test_errors_of_a_quantized_program_are_what_skipping_adds_to_full_precision(
    captured: Program, split: Program, run: Run
) -> None:
    quantized = run(
        "calibrate{trajectories=1 selection=uniform latents=8},group-timesteps,plan-quant{weight-bits=4},insert-qdq",
        split,
    )
    recorded = record(quantized, 2, 0, Progress(), captured)
    plan, spec, exact = quantized.facts[StepPlan], quantized.facts[ModelSpec], captured.facts[StepPlan]
    resumed = Resumed(TorchRunner(captured), exact, spec, {})
    for index in (0, 5):
        expected = guided(resumed, index, recorded.latents[index], recorded.conditions, exact, spec)
        np.testing.assert_allclose(recorded.exact[index], expected, atol=1e-5)
    errors = errors_of(quantized, recorded, "reuse")
    (name, values) = next(iter(quantized.facts[CachePlan].modes.items()))
    for index, gap in ((1, 1), (8, 8)):
        cached = {value: recorded.values[value][index - gap] for value in values}
        reusing = Resumed(TorchRunner(quantized), plan.with_variants([name] * len(plan)), spec, cached)
        found = guided(reusing, index, recorded.latents[index], recorded.conditions, plan, spec)
        skipped, computed = (
            np.mean(np.square(made - recorded.exact[index])) for made in (found, recorded.predictions[index])
        )
        assert computed > 0
        assert errors[0, index, gap, 0] == pytest.approx(max(0, skipped - computed), rel=1e-3, abs=1e-9)


def test_what_can_be_skipped_is_finite_and_nothing_else(split: Program, trajectories: Trajectories) -> None:
    for largest in (2, 8):
        errors = errors_of(split, trajectories, "affine", largest)
        for index in range(9):
            for gap in range(1, largest + 1):
                for earlier in range(largest + 1):
                    last = index - gap
                    known = last == 0 if earlier == 0 else last - earlier >= 0
                    assert np.isfinite(errors[:, index, gap, earlier]).all() == known, (index, gap, earlier)


def test_a_better_forecast_has_a_smaller_error(split: Program, trajectories: Trajectories) -> None:
    """Fitted where it is judged, least squares of D is better than reuse on nearly every skip of the whole range."""
    reuse, affine = (errors_of(split, trajectories, kind)[0, 2:] for kind in ("reuse", "affine"))
    known = np.isfinite(reuse)
    assert (affine[known] <= reuse[known]).mean() > 0.9
    assert affine[known].mean() < 0.7 * reuse[known].mean()


def test_between_measured_places_are_lines(
    split: Program, trajectories: Trajectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = errors_of(split, trajectories, "reuse")
    monkeypatch.setattr(skipping, "FEW_DISTANCES", (1, 4))
    monkeypatch.setattr(skipping, "SLOW_SHARE", 0.3)  # the second mode computes one of the two blocks
    sparse = errors_of(split, trajectories, "reuse")
    np.testing.assert_allclose(sparse[0], every[0], rtol=1e-4)
    index = 8
    for gap, earlier in [(1, 1), (1, 4), (4, 1), (4, 4), (7, 1), (1, 7), (8, 0)]:
        assert sparse[1, index, gap, earlier] == pytest.approx(every[1, index, gap, earlier], rel=1e-4)
    line = np.interp([2, 3], [1, 4], sparse[1, index, [1, 4], 1])
    np.testing.assert_allclose(sparse[1, index, [2, 3], 1], line)
    # Reuse does not look at the earlier computing step, so that a line along it is exact.
    np.testing.assert_allclose(sparse[1, index, 4, 2:4], every[1, index, 4, 2:4], rtol=1e-4)


def test_batches_change_nothing_but_roundings(
    split: Program, trajectories: Trajectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = errors_of(split, trajectories, "affine")
    monkeypatch.setattr(skipping, "BYTES", 1)
    np.testing.assert_allclose(errors_of(split, trajectories, "affine"), together, rtol=1e-3)


def test_weights_count_squared(split: Program, trajectories: Trajectories) -> None:
    forecaster, weight = OpenLoop(split, trajectories, FORECASTERS["reuse"]), np.arange(9.0)
    found = reuse_errors(split, trajectories, forecaster, weight, ["reuse"], 8, Progress()).values[0, :, 1, 1]
    plain = errors_of(split, trajectories, "reuse")[0, :, 1, 1]
    np.testing.assert_allclose(found[2:], plain[2:] * weight[2:] ** 2)


def test_the_rehearsal_of_computing_every_step_has_no_error(split: Program, trajectories: Trajectories) -> None:
    rehearsal = Rehearsal(split, trajectories, OpenLoop(split, trajectories, FORECASTERS["affine"]))
    assert rehearsal.final_error([None] * 9) == 0.0


def test_a_rehearsal_of_reuse_is_sampling_with_the_program(split: Program, trajectories: Trajectories) -> None:
    rehearsal = Rehearsal(split, trajectories, OpenLoop(split, trajectories, FORECASTERS["reuse"]))
    schedule = [None, "reuse_1", "reuse", None, None, "reuse", "reuse_1", "reuse_1", None]
    conditions, plan = trajectories.conditions, split.facts[StepPlan].with_modes(schedule)
    final = sample(TorchRunner(split), plan, split.facts[ModelSpec], conditions, 0, first_index=FIRST_INDEX)
    expected = np.mean(np.square(final - trajectories.latents[-1]))
    assert rehearsal.final_error(schedule) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", FORECASTERS)
def test_without_guidance_there_is_one_half(captured: Program, run: Run, kind: str) -> None:
    schedule = captured.facts[ModelSpec].noise_schedule
    plan = make_step_plan("ddim", 4, 1.0, schedule, captured.facts[StepPlan].fingerprint.model)
    program = run("plan-cache{interval=2 history=2},insert-cache", captured.with_facts(plan))
    trajectories = record(program, 2, 0, Progress())
    assert len(trajectories.values["cache_0"][0]) == 2
    errors = errors_of(program, trajectories, kind, 3)
    assert np.isfinite(errors[0, 3, 1, 2])
    rehearsal = Rehearsal(program, trajectories, OpenLoop(program, trajectories, FORECASTERS[kind]))
    assert 0 < rehearsal.final_error([None, None, "reuse", "reuse"]) < np.inf


def test_branches_are_forecast_like_ranges(captured: Program, run: Run) -> None:
    program = run("plan-cache{interval=3 what=branches history=2},insert-cache", captured)
    trajectories = record(program, 2, 0, Progress())
    assert list(trajectories.values) == [f"cache_{index}" for index in range(4)]
    errors = errors_of(program, trajectories, "reuse", 3)
    assert np.isfinite(errors[0, 8, 1, 1])
    assert errors[0, 8, 3, 3] > errors[0, 8, 1, 3] > 0
