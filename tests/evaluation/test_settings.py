"""The rivals of a compilation are other ways to spend its cost, each of them once, in full precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qcgraph.errors import UsageError
from qcgraph.evaluation.settings import RIVAL, RIVALS, Subject, rivals
from qcgraph.export.targets import TARGETS
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.models import LoadedModel
from qcgraph.pipeline import Pipeline
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.conditions import in_turn


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", RIVAL])
def test_no_rival_is_drawn_twice(captured: Program, tiny_model: LoadedModel, scheduler: str) -> None:
    plan = make_step_plan(scheduler, 12, 1.5, tiny_model.spec.noise_schedule, captured.constants_digest)
    program = Pipeline.parse("plan-cache{interval=3},insert-cache").run(captured.with_facts(plan))
    subject = subject_of(program, captured, tiny_model)
    fewer, solver, fitted = found = rivals(subject, Progress())
    assert tuple(setting.key for setting in found) == RIVALS
    if scheduler == "ddpm":
        assert "adds noise at every step" in fewer.absent
        assert fewer.absent == solver.absent == fitted.absent
        assert fitted.draw is None
    else:
        assert fewer.draw is not None
        assert (solver.draw is None) == (scheduler == RIVAL)
        assert solver.absent == ("it is the scheduler of the plan" if scheduler == RIVAL else "")
        assert fitted.title == "fitted solver, 4 steps"
        assert fitted.cost == fewer.cost == 4  # of 12 steps, every third computes


def subject_of(program: Program, captured: Program, model: LoadedModel) -> Subject:
    return Subject(
        model, captured, program, program.facts[StepPlan], TorchRunner(program), Path(), TARGETS["torch"], threads=1
    )


def test_the_fitted_rival_of_a_run_whose_steps_all_compute(captured: Program, tiny_model: LoadedModel) -> None:
    """As many plain steps are the run itself, but as many fitted ones are closer to the converged run."""
    fewer, solver, fitted = rivals(subject_of(captured, captured, tiny_model), Progress())
    assert fewer.draw is solver.draw is None
    assert fitted.title == "fitted solver, 9 steps"
    assert fitted.draw is not None
    told = in_turn(2, tiny_model.spec)
    assert np.isfinite(fitted.draw(told, 0, None)).all()


def test_a_rival_that_cannot_be_fitted_says_why(
    captured: Program, tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> StepPlan:
        raise UsageError("the model draws latents that are not finite", hint="sample with it")

    monkeypatch.setattr("qcgraph.evaluation.settings.fitted_rival", refuse)
    *_, fitted = rivals(subject_of(captured, captured, tiny_model), Progress())
    assert (fitted.draw, fitted.absent) == (None, "the model draws latents that are not finite")
