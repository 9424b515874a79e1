"""Faults: a plan that is not its scheduler's, wherever it differs; and what compensation is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qcgraph.evaluation.bootstrap import Bootstrap
from qcgraph.evaluation.faults import Fault, find_faults, uncompensated
from qcgraph.evaluation.settings import Subject
from qcgraph.export.targets import TARGETS
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.models import LoadedModel
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.steps import Earlier, StepPlan, Update


@pytest.mark.parametrize(
    ("keys", "bare"),
    [
        (["quantization", "cache", "both"], "both"),
        (["cache"], "cache"),
        (["quantization"], "quantization"),
        (["quantization", "cache"], None),  # both together were not drawn, and neither alone is what was compensated
        ([], None),
    ],
)
def test_what_compensation_is_compared_with(keys: list[str], bare: str | None) -> None:
    assert uncompensated(["full_precision", *keys, "compiled"]) == bare


def plan_faults(captured: Program, model: LoadedModel, plan: StepPlan) -> tuple[Fault, ...]:
    program = captured.with_facts(plan)
    subject = Subject(model, captured, program, plan, TorchRunner(program), Path(), TARGETS["torch"])
    return find_faults(subject, {}, {}, Bootstrap(1, [0]), (), ())


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpmsolver++"])
def test_the_schedulers_own_plan_is_sound(captured: Program, tiny_model: LoadedModel, scheduler: str) -> None:
    plan = make_step_plan(scheduler, 6, 1.5, tiny_model.spec.noise_schedule, captured.constants_digest)
    assert plan_faults(captured, tiny_model, plan) == ()


@pytest.mark.parametrize(
    "change",
    [
        lambda update: replace(update, latent=update.latent * 1.001),
        lambda update: replace(update, history=()),
        lambda update: replace(update, history=(*update.history, Earlier(0.0, 0.0))),
        lambda update: replace(update, history=(replace(update.history[0], noise_prediction=0.5),)),
    ],
)
def test_another_update_is_a_fault(
    captured: Program, tiny_model: LoadedModel, change: Callable[[Update], Update]
) -> None:
    plan = make_step_plan("dpmsolver++", 6, 1.5, tiny_model.spec.noise_schedule, captured.constants_digest)
    third = replace(plan.steps[2], update=change(plan.steps[2].update))
    (fault,) = plan_faults(captured, tiny_model, replace(plan, steps=(*plan.steps[:2], third, *plan.steps[3:])))
    assert (fault.kind, fault.where) == ("plan", "step 2")
    assert "those of dpmsolver++ are" in fault.message
