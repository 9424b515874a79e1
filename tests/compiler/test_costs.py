"""What variants cost on a target: the runner that the target has, variants in turn, one image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from qcgraph.compiler import costs, running
from qcgraph.compiler.costs import ROUNDS, WARM_UP, measure_costs
from qcgraph.export.targets import TARGETS
from qcgraph.ir.program import Program
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.runner import Call

MARKS = {name: pytest.mark.slow for name in TARGETS if name not in ("torch", "onnxruntime-cpu")}
Run = Callable[[str, Program], Program]


class Clock:
    """Counts as much time as the variants that run are said to take."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self.now = 0.0
        self.calls: list[Call] = []
        self._seconds = seconds

    def run(self, call: Call) -> None:
        self.calls.append(call)
        self.now += self._seconds[call.variant]

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock({"full": 0.008, "reuse": 0.001})
    monkeypatch.setattr(running, "export_to", lambda *_: found)
    monkeypatch.setattr(costs.time, "perf_counter", found.perf_counter)
    return found


@pytest.mark.parametrize(("guidance", "rows"), [(1.5, 2), (1.0, 1)])
def test_variants_take_turns_on_one_image(cached: Program, clock: Clock, guidance: float, rows: int) -> None:
    spec = cached.facts[ModelSpec]
    captured = make_step_plan("ddim", 5, guidance, spec.noise_schedule, "model")
    steps = tuple(replace(step, variant="full") for step in captured.steps)
    plan = replace(captured, steps=steps, roles=cached.facts[StepPlan].roles)
    found = measure_costs(cached.with_facts(plan), TARGETS["torch"], Progress())
    assert found == pytest.approx({"full": 8.0, "reuse": 1.0})
    assert [call.variant for call in clock.calls] == ["full", "reuse"] * (ROUNDS + WARM_UP)
    assert {len(call.inputs["latent"]) for call in clock.calls} == {rows}


@pytest.fixture(scope="module")
def program(captured: Program, run: Run) -> Program:
    """With a variant that takes the caches of several computing steps."""
    return run("plan-cache{interval=3 history=2},insert-cache,insert-forecast", captured)


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", [pytest.param(TARGETS[name], id=name, marks=MARKS.get(name, ())) for name in TARGETS]
)
def test_every_target_can_be_measured(program: Program, target: object) -> None:
    found = measure_costs(program, target, Progress())  # type: ignore[arg-type]
    assert list(found) == ["full", "reuse"]
    assert 0 < found["reuse"] < found["full"]
    assert len(program.facts[StepPlan]) == 9
