"""A solver that diffusers drives draws what the step plan draws, where both can."""

from __future__ import annotations

import numpy as np
import pytest

from qcgraph.evaluation.solvers import sample_with
from qcgraph.models import LoadedModel, load_model
from qcgraph.models.eager import EagerRunner
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.sampling.conditions import of_labels
from qcgraph.sampling.loop import sample

LABELS = [0, 1, 2]


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++"])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_the_plan_draws_the_same(tiny_model: LoadedModel, name: str, guidance: float) -> None:
    runner, spec = EagerRunner(tiny_model), tiny_model.spec
    plan = make_step_plan(name, 7, guidance, spec.noise_schedule, "")
    expected = sample(runner, plan, spec, LABELS, 3)
    np.testing.assert_allclose(
        sample_with(name, 7, guidance, runner, spec, of_labels(LABELS, spec), 3), expected, rtol=1e-5, atol=1e-4
    )


def test_the_plan_of_a_multistep_solver_draws_the_same_digits() -> None:
    model = load_model("digits")
    runner, spec = EagerRunner(model), model.spec
    plan = make_step_plan("dpmsolver++", 20, 1.5, spec.noise_schedule, "")
    ours = sample(runner, plan, spec, LABELS, 3, batch=2)
    theirs = sample_with("dpmsolver++", 20, 1.5, runner, spec, of_labels(LABELS, spec), 3)
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)  # 2e-7 was measured


def test_solvers_converge_to_the_same_samples(tiny_model: LoadedModel) -> None:
    runner, spec = EagerRunner(tiny_model), tiny_model.spec
    goal = sample_with("ddim", 250, 1.5, runner, spec, of_labels(LABELS, spec), 3)

    def distance(name: str, steps: int) -> float:
        return float(np.linalg.norm(sample_with(name, steps, 1.5, runner, spec, of_labels(LABELS, spec), 3) - goal))

    assert distance("dpmsolver++", 40) < distance("dpmsolver++", 5)
    assert distance("ddim", 125) < distance("ddim", 10)
