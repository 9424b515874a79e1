"""fit-forecast: closed loop, every half apart, exact where the answer is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from qcgraph.facts import CachePlan, ForecastFit, Reference
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.passes.caching._forecast import log_signal_to_noise, table_name, taylor_gain
from qcgraph.passes.caching.forecasters import Moments, fit
from qcgraph.passes.caching.forecasters.affine import AFFINE
from qcgraph.plan.roles import VariantKind
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.calibration import FIRST_INDEX, calibration_conditions
from qcgraph.sampling.loop import sample
from qcgraph.sampling.runner import Call

Run = Callable[[str, Program], Program]
PREPARED = "plan-cache{interval=3 history=3},insert-cache,calibrate{trajectories=6},insert-forecast"


@pytest.fixture(scope="module")
def prepared(captured: Program, run: Run) -> Program:
    return run(PREPARED, captured)


def latents(program: Program, plan: StepPlan | None = None, seed: int = 0) -> np.ndarray:
    labels = [0, 1, 2, 3]
    return sample(TorchRunner(program), plan or program.facts[StepPlan], program.facts[ModelSpec], labels, seed)


def table(program: Program, name: str = "cache_0") -> torch.Tensor:
    return program.constants[table_name(name)]


def test_fit_forecast_golden(prepared: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    golden_diff("fit-forecast", prepared, run("fit-forecast", prepared))


def test_reuse_leaves_every_coefficient_neutral(prepared: Program, run: Run) -> None:
    program = run("fit-forecast{kind=reuse}", prepared)
    assert torch.equal(table(program), table(prepared))
    assert np.array_equal(latents(program), latents(prepared))
    assert all(step.reuse == step.forecast > 0 for step in program.facts[ForecastFit].steps)


def test_the_program_before_is_not_touched(prepared: Program, run: Run) -> None:
    before = prepared.compute_digest()
    assert not torch.equal(table(run("fit-forecast", prepared)), table(prepared))
    assert prepared.compute_digest() == before


def test_taylor_is_the_extrapolation_in_log_signal_to_noise(prepared: Program, run: Run) -> None:
    program = run("fit-forecast{kind=taylor}", prepared)
    plan, found = program.facts[StepPlan], table(program)
    times = log_signal_to_noise(program.facts[ModelSpec].noise_schedule, plan.timesteps)
    for index in (4, 5, 7, 8):
        gain = taylor_gain(times, index, [3, 0] if index < 6 else [6, 3])
        assert gain > 0
        expected = torch.tensor([1 + gain, -gain, 0, 0])[:, None, None].expand(4, 2, 32)
        torch.testing.assert_close(found[index], expected)
    for index in (0, 1, 2, 3, 6):  # computed, or nothing to extrapolate from yet
        assert torch.equal(found[index], table(prepared)[index])


def test_dec_has_one_gain_and_an_offset(prepared: Program, run: Run) -> None:
    found = table(run("fit-forecast{kind=dec}", prepared))
    assert not found[:, 1:3].any()
    assert (found[1, 3] != 0).any()


class _Watching(TorchRunner):
    """Keeps what steps that reuse were given, and what computing gives there."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self._computing = TorchRunner(program)
        self.seen: list[tuple[list[torch.Tensor], torch.Tensor]] = []

    def run(self, call: Call) -> np.ndarray:
        if call.kind is VariantKind.REUSES:
            target: dict[tuple[str, int], object] = {}
            self._computing.run(replace(call, variant="full", kind=VariantKind.COMPUTES, state=target))
            values = [call.state["cache_0", age] for age in range(3)]
            self.seen.append((values, target["cache_0", 0]))
        return super().run(call)


def test_the_fit_is_closed_loop_and_of_each_half(prepared: Program, run: Run) -> None:
    """On the trajectory of the *fitted* program, the coefficients are what fitting there gives once more."""
    program = run("fit-forecast", prepared)
    plan, spec, reference = (program.facts[kind] for kind in (StepPlan, ModelSpec, Reference))
    runner, conditions = _Watching(program), calibration_conditions(reference.trajectories, reference.seed, spec)
    sample(runner, plan, spec, conditions, reference.seed, first_index=FIRST_INDEX)
    times = log_signal_to_noise(spec.noise_schedule, plan.timesteps)
    reusing = [index for index, step in enumerate(plan.steps) if step.variant == "reuse"]
    for index, (values, target) in zip(reusing, runner.seen, strict=True):
        computed = [step for step in (6, 3, 0) if step < index]
        for half, rows in enumerate((slice(0, 6), slice(6, 12))):
            folds = []
            for part in range(2):
                folds.append(Moments(3, 32))
                folds[-1].add([value[rows][part::2] for value in values], target[rows][part::2])
            found = fit(AFFINE, folds, taylor_gain(times, index, computed), values=len(computed)).gains
            torch.testing.assert_close(table(program)[index, :, half], found.float(), rtol=1e-5, atol=1e-5)
    assert not torch.equal(table(program)[1, :, 0], table(program)[1, :, 1])


@pytest.mark.parametrize("kind", ["affine", "dec"])
def test_a_fit_draws_nearer_to_full_precision_than_reuse(
    captured: Program, prepared: Program, run: Run, kind: str
) -> None:
    """On noise that it was not fitted on."""
    exact, reuse = latents(captured, seed=9), latents(prepared, seed=9)
    fitted = latents(run(f"fit-forecast{{kind={kind}}}", prepared), seed=9)
    assert np.linalg.norm(fitted - exact) < 0.9 * np.linalg.norm(reuse - exact)


def test_reported_errors(prepared: Program, run: Run) -> None:
    fact = run("fit-forecast", prepared).facts[ForecastFit]
    assert fact.kind == "affine"
    assert [step.step for step in fact.steps] == [1, 2, 4, 5, 7, 8]
    assert {step.name for step in fact.steps} == {"cache_0"}
    assert all(step.forecast > 0 for step in fact.steps)
    assert sum(step.forecast for step in fact.steps) < 0.8 * sum(step.reuse for step in fact.steps)


def test_other_modes_have_other_values(captured: Program, run: Run) -> None:
    text = 'plan-cache{interval=3 blocks="0..1+1..1" history=2},insert-cache,calibrate{trajectories=4}'
    program = run(text, captured)
    schedule = ["full", "full", "reuse", "reuse_1", "full", "reuse_1", "reuse_1", "full", "reuse"]
    program = program.with_facts(program.facts[StepPlan].with_variants(schedule))
    program = run("insert-forecast,fit-forecast", program)
    steps = program.facts[ForecastFit].steps
    assert [(step.name, step.step) for step in steps] == [
        ("cache_0", 2),
        ("cache_1", 3),
        ("cache_1", 5),
        ("cache_1", 6),
        ("cache_0", 8),
    ]
    neutral = table(program)[0]
    for name, indices in [("cache_0", {2, 8}), ("cache_1", {3, 5, 6})]:
        changed = {index for index in range(9) if not torch.equal(table(program, name)[index], neutral)}
        assert changed == indices


def test_branches_are_fitted_each(captured: Program, run: Run) -> None:
    text = "plan-cache{interval=3 what=branches history=2},insert-cache,calibrate{trajectories=4}"
    program = run(f"{text},insert-forecast,fit-forecast", captured)
    assert {step.name for step in program.facts[ForecastFit].steps} == {f"cache_{index}" for index in range(4)}


def test_without_guidance_the_other_half_stays_neutral(captured: Program, run: Run) -> None:
    schedule, model = captured.facts[ModelSpec].noise_schedule, captured.facts[StepPlan].fingerprint.model
    plan = make_step_plan("ddim", 5, 1.0, schedule, model)
    program = run(PREPARED + ",fit-forecast", captured.with_facts(plan))
    found = table(program)
    assert not torch.equal(found[1, :, 0], found[0, :, 0])
    assert torch.equal(found[1, :, 1], found[0, :, 1])
    assert len(program.facts[ForecastFit].steps) == 3


def test_one_trajectory_is_enough(captured: Program, run: Run) -> None:
    program = run(PREPARED.replace("trajectories=6", "trajectories=1") + ",fit-forecast", captured)
    assert torch.isfinite(table(program)).all()
    assert np.isfinite(latents(program)).all()


@pytest.mark.parametrize("kind", ["affine", "taylor", "dec"])
def test_a_history_that_memory_has_cut(captured: Program, run: Run, kind: str) -> None:
    """Every kind still fits with one value; taylor then is reuse."""
    text = "plan-cache{interval=3},insert-cache,calibrate{trajectories=4},insert-forecast"
    program = run(text, captured)
    fitted = run(f"fit-forecast{{kind={kind}}}", program)
    assert torch.equal(table(fitted), table(program)) == (kind == "taylor")
    assert program.facts[CachePlan].history == 1


def test_nothing_to_fit_where_every_step_computes(captured: Program, run: Run) -> None:
    text = "plan-cache{budget=1 history=3},insert-cache,calibrate{trajectories=2},insert-forecast,fit-forecast"
    program = run(text, captured)
    assert program.facts[ForecastFit].steps == ()
    assert program.history[-1].refusals[0].reason == "it holds no forecasts"
    assert np.array_equal(latents(program), latents(captured))


def test_an_unknown_kind(prepared: Program, run: Run) -> None:
    with pytest.raises(Exception, match="option kind"):
        run("fit-forecast{kind=best}", prepared)
