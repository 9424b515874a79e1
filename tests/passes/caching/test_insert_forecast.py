"""insert-forecast: neutral coefficients are plain reuse to the bit; every sample uses those of its half and step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from qcgraph.facts import CachePlan
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.passes.caching._forecast import table_name
from qcgraph.plan.roles import TensorRole
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.conditions import joined, of_labels
from qcgraph.sampling.loop import Request, sample

Run = Callable[[str, Program], Program]
SPLIT = "plan-cache{{interval=3 what={what} blocks={blocks} history={history}}},insert-cache"


def latents(program: Program, plan: StepPlan | None = None) -> np.ndarray:
    return sample(TorchRunner(program), plan or program.facts[StepPlan], program.facts[ModelSpec], [0, 1, 2], seed=0)


def random_tables(program: Program) -> Program:
    """The program with other coefficients at every step, in both halves and every channel."""
    generator = torch.Generator().manual_seed(0)
    names = [table_name(value.name) for value in program.facts[CachePlan].values]
    tables = {name: torch.randn(program.constants[name].shape, generator=generator) for name in names}
    return replace(program, constants=dict(program.constants) | tables)


def inputs_of(program: Program, labels: list[int], row: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    batch = len(labels)
    inputs = {
        "latent": torch.randn(batch, 2, 8, 8, generator=generator),
        "timestep": torch.full((batch,), 500.0),
        "class_label": torch.tensor(labels),
        "row": torch.tensor(row),
    }
    caches = program.variants["reuse"].interface.taken(TensorRole.CACHE)
    return inputs | {spec.name: torch.randn(batch, *spec.shape[1:], generator=generator) for spec in caches}


def test_insert_forecast_golden(captured: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    program = run(SPLIT.format(what="range", blocks="all", history=2), captured)
    golden_diff("insert-forecast", program, run("insert-forecast", program))


@pytest.mark.parametrize("history", [1, 2, 3])
@pytest.mark.parametrize(("what", "blocks"), [("range", "all"), ("branches", '"0..1+1..1"')])
def test_neutral_coefficients_are_plain_reuse_to_the_bit(
    captured: Program, run: Run, what: str, blocks: str, history: int
) -> None:
    plain = run(SPLIT.format(what=what, blocks=blocks, history=history), captured)
    forecasting = run("insert-forecast", plain)
    modes = plain.facts[StepPlan].reusing
    schedule = ["full", *(["full", modes[0], modes[-1], modes[0]] * 2)]
    plan = plain.facts[StepPlan].with_variants(schedule)
    assert np.array_equal(latents(forecasting, plan), latents(plain, plan))
    assert not np.array_equal(latents(random_tables(forecasting), plan), latents(plain, plan))


def test_computing_every_step_is_the_captured_program(captured: Program, run: Run) -> None:
    program = random_tables(run("plan-cache{interval=3 history=3},insert-cache,insert-forecast", captured))
    plan = program.facts[StepPlan].all_computing
    assert np.array_equal(latents(program, plan), latents(captured))


def test_the_forecast_is_that_of_the_formula(captured: Program, run: Run) -> None:
    """D^ = A D_r + B D_r' + E D_r'' + C; the change of the stream goes on from what entered the range."""
    program = random_tables(run("plan-cache{interval=3 history=3},insert-cache,insert-forecast", captured))
    plain = run("plan-cache{interval=3},insert-cache", captured)
    null = program.facts[ModelSpec].conditions[0].null
    inputs = inputs_of(program, [0, null, 2], row=5)
    table = program.constants[table_name("cache_0")][5]
    halves = [0, 1, 0]
    change = sum(
        torch.stack([table[term, half] for half in halves])[:, None]
        * (inputs[name] if name else torch.ones_like(inputs["cache_0"]))
        for term, name in enumerate(["cache_0", "cache_0_age1", "cache_0_age2", ""])
    )
    found = program.run("reuse", inputs)["noise_prediction"]
    expected = plain.run("reuse", inputs | {"cache_0": change})["noise_prediction"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_samples_of_both_halves_may_come_in_any_order(captured: Program, run: Run) -> None:
    program = random_tables(run("plan-cache{interval=3 history=2},insert-cache,insert-forecast", captured))
    null = program.facts[ModelSpec].conditions[0].null
    inputs = inputs_of(program, [0, null, null, 3])
    order = torch.tensor([2, 0, 3, 1])
    shuffled = {name: value[order] if value.dim() else value for name, value in inputs.items()}
    found = program.run("reuse", shuffled)["noise_prediction"]
    torch.testing.assert_close(found, program.run("reuse", inputs)["noise_prediction"][order], rtol=1e-6, atol=1e-6)
    alone = {name: value[1:2] if value.dim() else value for name, value in inputs.items()}
    one = program.run("reuse", alone)["noise_prediction"]
    torch.testing.assert_close(one, program.run("reuse", inputs)["noise_prediction"][1:2], rtol=1e-5, atol=1e-5)


def test_one_request_for_each_half_is_both_in_a_batch(captured: Program, run: Run) -> None:
    program = random_tables(run("plan-cache{interval=2 history=2},insert-cache,insert-forecast", captured))
    plan, spec = program.facts[StepPlan], program.facts[ModelSpec]
    runner = TorchRunner(program)
    latent = np.random.default_rng(0).standard_normal((2, *spec.latent_shape), dtype=np.float32)
    alone = of_labels([1], spec)
    conditions = joined([alone, alone.unconditional(spec)])
    both, *halves = (Request(runner, plan, spec) for _ in range(3))
    for index in range(4):
        together = both.denoise(index, latent, conditions)
        apart = [half.denoise(index, latent[i : i + 1], conditions[i : i + 1]) for i, half in enumerate(halves)]
        np.testing.assert_allclose(np.concatenate(apart), together, rtol=1e-4, atol=1e-4)


def test_modulation_can_be_hoisted(captured: Program, run: Run) -> None:
    """What tells the halves apart depends on the class alone, and stays all the same."""
    program = random_tables(run("plan-cache{interval=3 history=2},insert-cache,insert-forecast", captured))
    hoisted = run("hoist-adaln", program)
    assert {"class_label", "row", "modulation"} <= set(hoisted.variants["reuse"].interface.input_names)
    exact = latents(program)
    np.testing.assert_allclose(latents(hoisted), exact, rtol=0, atol=1e-5 * np.abs(exact).max())


def test_without_guidance(captured: Program, run: Run) -> None:
    schedule, model = captured.facts[ModelSpec].noise_schedule, captured.facts[StepPlan].fingerprint.model
    program = captured.with_facts(make_step_plan("ddim", 5, 1.0, schedule, model))
    plain = run("plan-cache{interval=2 history=2},insert-cache", program)
    assert np.array_equal(latents(run("insert-forecast", plain)), latents(plain))


def test_a_program_that_computes_every_step_is_left_alone(captured: Program, run: Run) -> None:
    program = run("plan-cache{interval=1},insert-cache,insert-forecast", captured)
    assert not program.history[-1].changed
    assert program.history[-1].refusals[0].where == "reuse"
