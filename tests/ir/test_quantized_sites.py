"""Values of a program while it runs, handed on in groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qcgraph.ir.program import Program
from qcgraph.ir.quantized_sites import quantized_sites, record
from qcgraph.pipeline import Pipeline
from qcgraph.pipeline.instruments import example_inputs


@pytest.fixture(scope="module")
def compiled(cached: Program) -> Program:
    return Pipeline.parse("calibrate{trajectories=2},group-timesteps{groups=3},plan-quant,insert-qdq").run(cached)


@pytest.fixture
def inputs(captured: Program) -> dict[str, torch.Tensor]:
    return example_inputs(captured) | {"group": torch.tensor(1), "row": torch.tensor(2)}


def test_every_group_is_handed_on_once(compiled: Program, inputs: dict[str, torch.Tensor]) -> None:
    """Also where groups share a node; with the values that one group of all nodes has."""
    sites = quantized_sites(compiled, "full")
    groups = [{site.entering, site.leaving} for site in sites]
    groups.append({site.entering for site in sites})
    everything = set().union(*groups)
    ((_, expected),) = record(compiled, "full", inputs, [everything])
    assert set(expected) == everything
    seen = []
    for index, values in record(compiled, "full", inputs, groups):
        seen.append(index)
        assert set(values) == groups[index]
        assert all(np.array_equal(value, expected[name]) for name, value in values.items())
    assert sorted(seen) == list(range(len(groups)))


def test_a_group_is_handed_on_before_the_rest_is_computed(compiled: Program, inputs: dict[str, torch.Tensor]) -> None:
    first, *_, last = quantized_sites(compiled, "full")
    values = record(compiled, "full", inputs, [{last.leaving}, {first.leaving}])
    assert next(values)[0] == 1
    assert next(values)[0] == 0
