"""Timing: the order of turns, what is timed, and what the figures are. Nothing here looks at how long anything took."""

from __future__ import annotations

import numpy as np
import pytest

from qcgraph.benchmark.timing import TimedRunner, Timing, paired
from qcgraph.benchmark.turns import by_variant, counted, denoiser_batch, first_step, section, single_variant
from qcgraph.plan.roles import COMPUTES, REUSES, VariantKind
from qcgraph.plan.steps import Fingerprint, Step, StepPlan, Update
from qcgraph.sampling.runner import Call, step_call


def plan_of(letters: str, guidance: float = 1.5) -> StepPlan:
    names = {"F": "full", "R": "reuse"}
    steps = tuple(Step(float(len(letters) - i), Update(1.0, -0.1), names[name]) for i, name in enumerate(letters))
    return StepPlan(Fingerprint("", "ddim", len(letters), guidance), steps, {"full": COMPUTES, "reuse": REUSES})


def test_a_timing_is_least_median_and_largest() -> None:
    timing = Timing.of([0.3, 0.1, 0.25, 0.2])
    assert (timing.minimum, timing.median, timing.maximum) == (0.1, 0.225, 0.3)
    assert str(timing) == "0.100 / 0.225 / 0.300"
    assert timing.seconds == (0.3, 0.1, 0.25, 0.2)


@pytest.mark.slow
def test_turns_alternate_and_every_other_round_is_reversed() -> None:
    order: list[str] = []
    candidates = {name: (lambda name=name: order.append(name)) for name in "abc"}
    warm_up = {"b": lambda: order.append("warm b")}
    timings = paired(candidates, 3, warm_up)
    assert order == ["a", "warm b", "b", "c", "c", "warm b", "b", "a", "a", "warm b", "b", "c"]
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3, "c": 3}


def test_every_call_is_timed_and_passed_on() -> None:
    class Doubling:
        def run(self, call: Call) -> np.ndarray:
            call.state["seen", 0] = call.variant
            return 2 * call.inputs["latent"]

    runner, state, inputs = TimedRunner(Doubling()), {}, {"latent": np.ones(2, np.float32)}
    kinds = {"prepare_full": VariantKind.PREPARES, "full": VariantKind.COMPUTES, "reuse": VariantKind.REUSES}
    results = [runner.run(Call(name, kind, 0, inputs, state)) for name, kind in kinds.items()]
    assert all(result.tolist() == [2.0, 2.0] for result in results)
    assert state == {("seen", 0): "reuse"}
    calls = runner.take()
    assert [call.variant for call in calls] == ["full", "reuse"]
    assert all(call.seconds > 0 for call in calls)
    assert runner.take() == ()


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ("FRRFRRF", "FRRF"),  # every variant after the first step
        ("FFFF", "FF"),
        ("FRFRFR", "FRF"),
        ("FRRR", "FRRR"),  # full never comes again: all of it
        ("F", "F"),
    ],
)
def test_a_section_holds_every_variant_after_its_first_step(plan: str, expected: str) -> None:
    assert section(plan_of(plan)).steps == plan_of(plan).steps[: len(expected)]
    assert first_step(plan_of(plan)).steps == plan_of(plan).steps[:1]


@pytest.mark.parametrize(("plan", "expected"), [("FRRF", "RRF"), ("FF", "F"), ("FRRR", "FRRR"), ("F", "F")])
def test_the_first_call_of_a_section_counts_only_where_it_is_alone(plan: str, expected: str) -> None:
    class Silent:
        def run(self, call: Call) -> np.ndarray:
            return np.zeros(1, np.float32)

    runner = TimedRunner(Silent())
    for index in range(len(plan)):
        runner.run(step_call(plan_of(plan), index, {}, {}))
    calls = counted(runner.take())
    assert [call.variant for call in calls] == [step.variant for step in plan_of(expected).steps]
    assert sum(len(seconds) for seconds in by_variant(calls).values()) == len(expected)


def test_a_baseline_takes_the_same_steps_with_its_one_variant() -> None:
    plan = plan_of("FRRF")
    baseline = single_variant(plan)
    assert baseline.timesteps == plan.timesteps
    assert [step.update for step in baseline.steps] == [step.update for step in plan.steps]
    assert baseline.variants == ("forward",)
    assert section(baseline).steps == baseline.steps[:2]


@pytest.mark.parametrize(("guidance", "latents"), [(1.5, 6), (1.0, 3), (0.0, 6)])
def test_guidance_doubles_what_the_denoiser_sees(guidance: float, latents: int) -> None:
    assert denoiser_batch(plan_of("FR", guidance), 3) == latents
