"""A solver that diffusers drives draws what the step plan draws, where both can."""

from __future__ import annotations

import numpy as np
import pytest

from qcgraph.evaluation.solvers import sample_with
from qcgraph.models import LoadedModel
from qcgraph.models.eager import EagerRunner
from qcgraph.sampling import sample
from qcgraph.schedulers import make_step_plan

LABELS = [0, 1, 2]


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_ddim_is_the_affine_update(tiny_model: LoadedModel, guidance: float) -> None:
    runner, spec = EagerRunner(tiny_model), tiny_model.spec
    plan = make_step_plan("ddim", 7, guidance, spec.schedule, "")
    expected = sample(runner, plan, spec, LABELS, 3)
    np.testing.assert_allclose(sample_with("ddim", 7, guidance, runner, spec, LABELS, 3), expected, atol=1e-4)


def test_solvers_converge_to_the_same_samples(tiny_model: LoadedModel) -> None:
    runner, spec = EagerRunner(tiny_model), tiny_model.spec
    goal = sample_with("ddim", 250, 1.5, runner, spec, LABELS, 3)

    def distance(name: str, steps: int) -> float:
        return float(np.linalg.norm(sample_with(name, steps, 1.5, runner, spec, LABELS, 3) - goal))

    assert distance("dpmsolver++", 40) < distance("dpmsolver++", 5)
    assert distance("ddim", 125) < distance("ddim", 10)
