"""calibrate: what it observes is what a plain run of the model shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from qcgraph.errors import UsageError
from qcgraph.facts import Ranges, Reference
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.models import LoadedModel
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.calibration import FIRST_INDEX, calibration_conditions
from qcgraph.sampling.loop import sample
from qcgraph.sampling.runner import Runner

Run = Callable[[str, Program], Program]


def expected_of(largest: torch.Tensor) -> float:
    """The largest value that is expected of 1024 rows, from the largest values of some (see test_extremes)."""
    beyond = math.sqrt(6) / math.pi * math.log(1024 / len(largest))
    return float(largest.max() + beyond * largest.std(correction=0))


def test_calibrate_golden(cached: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    golden_diff("calibrate", cached, run("calibrate{trajectories=3}", cached))


def test_ranges_are_those_of_the_module(
    captured: Program, run: Run, tiny_model: LoadedModel, eager_runner: Callable[[LoadedModel], Runner]
) -> None:
    """Hooks on the PyTorch module, on the same trajectory, see the same extremes of every row at every step."""
    ranges = run("calibrate{trajectories=3}", captured).facts[Ranges]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    site = "blocks.1.mlp.fc2"

    def record(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        rows = arguments[0].flatten(1)
        seen.append((-rows.amin(dim=1), rows.amax(dim=1)))

    handle = tiny_model.module.get_submodule(site).register_forward_pre_hook(record)
    conditions = calibration_conditions(3, 0, tiny_model.spec)
    sample(eager_runner(tiny_model), captured.facts[StepPlan], tiny_model.spec, conditions, 0, first_index=FIRST_INDEX)
    handle.remove()
    assert ranges.planned[site].steps == tuple(range(9))
    for index, ends in enumerate(seen):
        low, high = (expected_of(end) for end in ends)
        assert ranges.planned[site].lows[index] == pytest.approx(-low, rel=1e-4)
        assert ranges.planned[site].highs[index] == pytest.approx(high, rel=1e-4)


def test_without_a_cache_both_trajectories_are_one(captured: Program, run: Run) -> None:
    ranges = run("calibrate{trajectories=2}", captured).facts[Ranges]
    assert ranges.planned == ranges.full
    assert ranges.change("blocks.0.attn.qkv") == 0


def test_with_a_cache_only_computing_steps_have_ranges(cached: Program, run: Run) -> None:
    ranges = run("calibrate{trajectories=2}", cached).facts[Ranges]
    assert ranges.steps == (0, 3, 6)
    assert {site.steps for site in ranges.full.values()} == {tuple(range(9))}
    first = next(iter(ranges.planned))
    assert ranges.planned[first].highs[0] == ranges.full[first].highs[0]  # step 0 is the same on both
    assert ranges.planned[first].highs[2] != ranges.full[first].highs[6]
    widths = [ranges.planned[first].widths[index] / ranges.full[first].widths[3 * index] for index in range(3)]
    assert ranges.change(first) == pytest.approx(max(abs(width - 1) for width in widths))


def test_blocks_outside_the_cached_range_have_ranges_at_every_step(captured: Program, run: Run) -> None:
    ranges = run("plan-cache{interval=3 blocks=1..1},insert-cache,calibrate{trajectories=2}", captured).facts[Ranges]
    assert ranges.planned["blocks.0.attn.qkv"].steps == tuple(range(9))
    assert ranges.planned["blocks.1.attn.qkv"].steps == (0, 3, 6)


def test_the_reference_is_full_precision_also_under_a_cache(captured: Program, cached: Program, run: Run) -> None:
    text = "calibrate{trajectories=4 seed=7}"
    assert run(text, cached).facts[Reference] == run(text, captured).facts[Reference]


def test_reference_statistics(captured: Program, run: Run) -> None:
    reference = run("calibrate{trajectories=4}", captured).facts[Reference]
    spec = captured.facts[ModelSpec]
    final = sample(
        TorchRunner(captured),
        captured.facts[StepPlan],
        spec,
        calibration_conditions(4, 0, spec),
        0,
        first_index=FIRST_INDEX,
    )
    np.testing.assert_allclose(reference.means[-1], final.mean(axis=(0, 2, 3)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(reference.deviations[-1], final.std(axis=(0, 2, 3)), rtol=1e-4)


def test_labels_are_balanced_and_seeded(tiny_model: LoadedModel) -> None:
    conditions = calibration_conditions(10, 0, tiny_model.spec)
    assert sorted(conditions.labels(tiny_model.spec)) == sorted(list(range(5)) * 2)
    assert conditions == calibration_conditions(10, 0, tiny_model.spec)
    assert conditions != calibration_conditions(10, 1, tiny_model.spec)


def test_calibration_needs_a_trajectory(captured: Program, run: Run) -> None:
    with pytest.raises(UsageError, match="trajectories -1"):
        run("calibrate{trajectories=-1}", captured)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy warns of the infinities that this is about
def test_a_model_that_draws_no_numbers_is_refused(captured: Program, run: Run) -> None:
    weight = captured.constants["final_layer.linear.weight"]
    constants = {**captured.constants, "final_layer.linear.weight": torch.full_like(weight, 3e38)}
    with pytest.raises(UsageError, match="latents that are not finite"):
        run("calibrate{trajectories=2}", replace(captured, constants=constants))
