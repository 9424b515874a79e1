"""The fitted rival of a compilation: fitted once in full precision, and again where anything else is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qcgraph.evaluation import kept
from qcgraph.evaluation.fitted_rival import fitted_rival, keep_rival
from qcgraph.facts import SolverPlan
from qcgraph.ir.program import Program
from qcgraph.passes.solver import plan_solver
from qcgraph.pipeline import Pipeline
from qcgraph.plan.placement import place
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress

pytestmark = pytest.mark.slow  # many captures and exports, each short


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(kept, "kept_folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pipelines that were run."""
    texts: list[str] = []
    run = Pipeline.run

    def counted(self: Pipeline, *arguments: Any, **named: Any) -> Program:
        texts.append(self.text)
        return run(self, *arguments, **named)

    monkeypatch.setattr(Pipeline, "run", counted)
    return texts


@pytest.mark.usefixtures("folder")
def test_it_is_what_the_pass_chooses(captured: Program) -> None:
    plan = fitted_rival(captured, 3, Progress(), trajectories=4)
    expected = Pipeline.parse("plan-solver{steps=3 trajectories=4}").run(captured).facts[StepPlan]
    assert plan == expected
    assert fitted_rival(captured, 3, Progress(), trajectories=4) == expected  # as the file has it, to the last bit


def test_it_is_fitted_once(captured: Program, folder: Path, fits: list[str]) -> None:
    for _ in range(2):
        fitted_rival(captured, 3, Progress(), trajectories=4)
    assert fits == ["plan-solver{steps=3 trajectories=4}"]
    assert len(list(folder.iterdir())) == 1


@pytest.mark.usefixtures("folder")
def test_whatever_it_depends_on_is_another_fit(captured: Program, fits: list[str]) -> None:
    spec, mark = captured.facts[ModelSpec], captured.facts[StepPlan].fingerprint

    def with_run(steps: int, guidance: float, digest: str) -> Program:
        return captured.with_facts(make_step_plan("ddim", steps, guidance, spec.noise_schedule, digest))

    fitted_rival(captured, 3, Progress(), trajectories=4)
    fitted_rival(captured, 2, Progress(), trajectories=4)
    fitted_rival(captured, 3, Progress(), trajectories=5)
    fitted_rival(captured, 3, Progress(), trajectories=4, seed=1)
    fitted_rival(with_run(8, mark.guidance, mark.model), 3, Progress(), trajectories=4)
    fitted_rival(with_run(9, 2.0, mark.model), 3, Progress(), trajectories=4)
    fitted_rival(with_run(9, mark.guidance, "another"), 3, Progress(), trajectories=4)
    assert len(fits) == 7


@pytest.mark.usefixtures("folder")
def test_what_a_compilation_fitted_is_not_fitted_again(captured: Program, fits: list[str]) -> None:
    fitted = Pipeline.parse("plan-solver{steps=3 trajectories=4}").run(captured)
    keep_rival(captured, fitted)
    fits.clear()
    assert fitted_rival(captured, 3, Progress(), trajectories=4) == fitted.facts[StepPlan]
    assert fits == []


@pytest.mark.parametrize("text", ["plan-solver{steps=3 target=run trajectories=4}", "plan-cache,insert-cache"])
def test_what_is_no_rival_is_not_kept(captured: Program, folder: Path, text: str) -> None:
    keep_rival(captured, Pipeline.parse(text).run(captured))
    assert list(folder.iterdir()) == []


def test_a_solver_fitted_to_the_quantized_program_is_not_kept(captured: Program, folder: Path) -> None:
    planned = Pipeline.parse("plan-solver{steps=3 trajectories=4}").run(captured)
    keep_rival(planned, Pipeline.parse("fit-solver").run(planned))
    assert list(folder.iterdir()) == []


def test_a_solver_with_steps_of_one_half_of_guidance_is_not_kept(
    captured: Program, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its coefficients are not those of as many whole steps, which the key would stand for."""
    monkeypatch.setattr(plan_solver, "place", lambda *args: tuple(one for one in place(*args) if not all(one.whole)))
    planned = Pipeline.parse("plan-solver{steps=3 reuse=guidance trajectories=4}").run(captured)
    assert planned.facts[SolverPlan].half_steps > 0
    keep_rival(captured, planned)
    assert list(folder.iterdir()) == []
