"""The rivals of a compilation are other ways to spend its cost, each of them once."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcgraph.evaluation.settings import RIVAL, Subject, rivals
from qcgraph.export.targets import TARGETS
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.models import LoadedModel
from qcgraph.pipeline import Pipeline
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.steps import StepPlan


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", RIVAL])
def test_no_rival_is_drawn_twice(captured: Program, tiny_model: LoadedModel, scheduler: str) -> None:
    plan = make_step_plan(scheduler, 12, 1.5, tiny_model.spec.noise_schedule, captured.constants_digest)
    program = Pipeline.parse("plan-cache{interval=3},insert-cache").run(captured.with_facts(plan))
    steps = program.facts[StepPlan]
    subject = Subject(tiny_model, captured, program, steps, TorchRunner(program), Path(), TARGETS["torch"])
    fewer, solver = rivals(subject)
    assert (fewer.key, solver.key) == ("fewer_steps", "solver")
    if scheduler == "ddpm":
        assert "adds noise at every step" in fewer.absent
        assert fewer.absent == solver.absent
    else:
        assert fewer.draw is not None
        assert (solver.draw is None) == (scheduler == RIVAL)
        assert solver.absent == ("it is the scheduler of the plan" if scheduler == RIVAL else "")
