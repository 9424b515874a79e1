"""plan-cache and insert-cache."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from qcgraph.errors import ContractError, UsageError
from qcgraph.facts import CachePlan
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.graph import module_path
from qcgraph.ir.program import Program
from qcgraph.sampling import sample
from qcgraph.spec import ModelSpec
from qcgraph.steps import StepPlan

Run = Callable[[str, Program], Program]


def latents(program: Program, plan: StepPlan | None = None) -> np.ndarray:
    return sample(TorchRunner(program), plan or program.facts[StepPlan], program.facts[ModelSpec], [0, 1, 2], seed=0)


def test_plan_cache_golden(captured: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    golden_diff("plan-cache", captured, run("plan-cache{interval=4 blocks=1..1}", captured))


def test_insert_cache_golden(captured: Program, cached: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    golden_diff("insert-cache", run("plan-cache", captured), cached)


def test_every_interval_computes_step_zero(captured: Program, run: Run) -> None:
    for interval in range(1, 12):
        plan = run(f"plan-cache{{interval={interval}}}", captured).facts[CachePlan]
        assert plan.computes[0]
        assert sum(plan.computes) == -(-len(plan.computes) // interval)


def test_interval_one_is_the_captured_program(captured: Program, run: Run) -> None:
    program = run("plan-cache{interval=1},insert-cache", captured)
    assert not program.history[-1].changed
    assert "nothing to cache" in program.history[-1].refusals[0].reason
    assert np.array_equal(latents(program), latents(captured))


def test_an_all_full_schedule_is_bit_identical_to_no_cache(captured: Program, cached: Program) -> None:
    plan = cached.facts[StepPlan]
    assert np.array_equal(latents(cached, plan.with_variants(["full"] * len(plan))), latents(captured))


@pytest.mark.parametrize("blocks", ["all", "0..0", "1..1"])
def test_reuse_at_the_same_inputs_is_the_full_result(captured: Program, run: Run, blocks: str) -> None:
    """D + x_entering is x_leaving again when nothing has changed since D was computed, up to one rounding."""
    program = run(f"plan-cache{{interval=2 blocks={blocks}}},insert-cache", captured)
    generator = torch.Generator().manual_seed(3)
    inputs = {
        "latent": torch.randn(4, 2, 8, 8, generator=generator),
        "timestep": torch.full((4,), 500.0),
        "class_label": torch.arange(4),
    }
    full = program.run("full", inputs)
    reused = program.run("reuse", inputs | {"cache_0": full["cache_0"]})["noise_prediction"]
    torch.testing.assert_close(reused, full["noise_prediction"], rtol=0, atol=2e-5)


def test_the_reusing_variant_holds_no_block(cached: Program) -> None:
    calls = [node for node in cached.variants["reuse"].graph.nodes if node.op == "call_function"]
    assert calls
    assert not [node for node in calls if module_path(node).startswith("blocks")]


def test_caching_changes_the_result_a_little(captured: Program, cached: Program) -> None:
    exact, approximate = latents(captured), latents(cached)
    error = np.linalg.norm(approximate - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("interval=0", "interval 0"),
        ("blocks=1..2", "outside the model"),
        ("blocks=1..0", "outside the model"),
        ("blocks=some", "block range 'some'"),
    ],
)
def test_bad_options(captured: Program, run: Run, options: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        run(f"plan-cache{{{options}}}", captured)
    assert caught.value.hint


def test_a_program_is_split_once(cached: Program, run: Run) -> None:
    with pytest.raises(ContractError, match="split already"):
        run("insert-cache", cached)
