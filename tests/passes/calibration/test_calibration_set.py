"""The calibration set as inputs of the denoiser, and what enters its sites when they run."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx

from qcgraph.errors import QcgraphError
from qcgraph.facts import CalibrationSet
from qcgraph.ir.program import Program
from qcgraph.ir.structure import find_sites
from qcgraph.passes.calibration import _calibration_set as calibration_set
from qcgraph.passes.calibration._calibration_set import (
    CalibrationBatch,
    entering,
    sensitivities,
)
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.calibration import decode_latents, encode_latents

Run = Callable[[str, Program], Program]
STEPS, LABELS = (4, 0, 8, 4, 1), (1, 0, 4, 4, 2)
LABEL = "class_label"
DIRECTIONS = 300
SITES = {"blocks.0.attn.qkv", "blocks.0.mlp.fc2", "blocks.1.attn.proj"}


def some_latents(count: int = len(STEPS)) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 2, 8, 8), dtype=np.float32)


def with_set(program: Program, guidance: float = 1.5, groups: int = 3) -> Program:
    """The program with a calibration set of known items, and steps in three groups."""
    plan = program.facts[StepPlan]
    plan = replace(plan, fingerprint=replace(plan.fingerprint, guidance=guidance))
    plan = plan.with_groups([index * groups // len(plan) for index in range(len(plan))])
    found = CalibrationSet("tap", 45, STEPS, {LABEL: LABELS}, encode_latents(some_latents()))
    return program.with_facts(plan, found)


@pytest.fixture(scope="module")
def guided(captured: Program) -> Program:
    return with_set(captured)


def test_latents_survive_as_text() -> None:
    latents = some_latents()
    text = encode_latents(latents)
    assert text.isascii()
    assert base64.b64decode(text) == latents.astype("<f4").tobytes()
    assert encode_latents(latents.astype(">f4")) == text
    assert np.array_equal(decode_latents(text, (2, 8, 8)), latents)
    assert encode_latents(np.ascontiguousarray(latents.swapaxes(2, 3)).swapaxes(2, 3)) == text


def test_without_guidance_an_item_is_a_row(captured: Program) -> None:
    program = with_set(captured, guidance=1.0)
    rows = CalibrationBatch.of(program)
    assert len(rows) == len(STEPS)
    np.testing.assert_array_equal(rows.latents, some_latents())
    assert rows.conditions[LABEL].tolist() == list(LABELS)
    assert rows.steps.tolist() == list(STEPS)


def test_with_guidance_both_halves_of_an_item_stand_together(guided: Program) -> None:
    rows, null = CalibrationBatch.of(guided), guided.facts[ModelSpec].conditions[0].null
    assert len(rows) == 2 * len(STEPS)
    np.testing.assert_array_equal(rows.latents[::2], some_latents())
    np.testing.assert_array_equal(rows.latents[1::2], some_latents())
    assert rows.conditions[LABEL].tolist() == [label for item in LABELS for label in (item, null)]
    assert rows.steps.tolist() == [step for item in STEPS for step in (item, item)]


def test_rows_know_timestep_and_group_of_their_step(guided: Program) -> None:
    plan, rows = guided.facts[StepPlan], CalibrationBatch.of(guided)
    assert rows.timesteps.tolist() == [plan.timesteps[step] for step in rows.steps]
    assert rows.groups.tolist() == [plan.steps[step].group for step in rows.steps]
    assert sorted(set(rows.groups.tolist())) == [0, 1, 2]
    kinds = (rows.latents, rows.timesteps, rows.conditions[LABEL], rows.steps, rows.groups)
    assert [kind.dtype for kind in kinds] == [torch.float32] * 2 + [torch.int64] * 3


def test_a_program_without_a_set_says_so(captured: Program) -> None:
    with pytest.raises(QcgraphError, match="holds no CalibrationSet"):
        CalibrationBatch.of(captured)


def test_what_rows_hold_is_their_own(guided: Program) -> None:
    """Writing to them does not reach the fact, or other rows."""
    CalibrationBatch.of(guided).latents.zero_()
    np.testing.assert_array_equal(CalibrationBatch.of(guided).latents[::2], some_latents())


def same(rows: CalibrationBatch, index: list[int], all_rows: CalibrationBatch) -> bool:
    names = [name for name in vars(all_rows) if name != "conditions"]
    pairs = [(getattr(rows, name), getattr(all_rows, name)[index]) for name in names]
    pairs += [(rows.conditions[name], values[index]) for name, values in all_rows.conditions.items()]
    return rows.conditions.keys() == all_rows.conditions.keys() and all(torch.equal(one, other) for one, other in pairs)


def test_parts_of_rows(guided: Program) -> None:
    rows = CalibrationBatch.of(guided)
    assert same(rows[2:5], [2, 3, 4], rows)
    assert same(rows[torch.tensor([3, 0])], [3, 0], rows)
    assert same(rows[rows.groups == 0], [2, 3, 8, 9], rows)


@pytest.mark.parametrize("size", [1, 3, 10, 99])
def test_batches_are_all_rows_in_order(guided: Program, size: int) -> None:
    rows = CalibrationBatch.of(guided)
    batches = list(rows.split(size))
    assert all(len(batch) <= size for batch in batches)
    assert torch.equal(torch.cat([batch.latents for batch in batches]), rows.latents)


def test_few_rows_are_spread_over_the_steps(guided: Program) -> None:
    rows = CalibrationBatch.of(guided)
    assert rows.spread(3).steps.tolist() == [0, 4, 8]
    assert sorted(set(rows.spread(5).steps.tolist())) == [0, 1, 4, 8]
    assert rows.spread(1).steps.tolist() == [0]


@pytest.mark.parametrize("count", [10, 11, 1000])
def test_no_more_rows_than_there_are(guided: Program, count: int) -> None:
    rows = CalibrationBatch.of(guided).spread(count)
    assert rows.steps.tolist() == sorted(step for step in STEPS for _ in range(2))
    assert len(rows.latents.flatten(1).unique(dim=0)) == len(STEPS)


def test_inputs_are_in_the_order_of_the_interface(guided: Program) -> None:
    rows = CalibrationBatch.of(guided)
    latent, timestep, label = rows.inputs(guided, "main")
    assert guided.variants["main"].interface.input_names == ("latent", "timestep", "class_label")
    assert latent is rows.latents
    assert timestep is rows.timesteps
    assert label is rows.conditions[LABEL]


def test_the_first_step_computes_everything(captured: Program, cached: Program) -> None:
    assert captured.facts[StepPlan].computing == "main"
    assert cached.facts[StepPlan].computing == "full"


class Recording(fx.Interpreter):
    """Keeps what enters some nodes, from a plain run."""

    def __init__(self, module: fx.GraphModule, nodes: dict[str, str]) -> None:
        super().__init__(module)
        self.nodes = nodes
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.nodes:
            self.found[self.nodes[n.name]] = self.env[n.all_input_nodes[0]]
        return super().run_node(n)


@pytest.fixture(scope="module", params=["captured", "cached"])
def program(request: pytest.FixtureRequest) -> Program:
    """With a calibration set, before and after insert-cache."""
    return with_set(request.getfixturevalue(request.param))


def test_what_enters_is_what_a_plain_run_shows(program: Program) -> None:
    variant, rows = program.facts[StepPlan].computing, CalibrationBatch.of(program)
    names = {site.node: site.name for site in find_sites(program.variants[variant]) if site.name in SITES}
    recording = Recording(program.module(variant), names)
    with torch.no_grad():
        recording.run(rows.latents, rows.timesteps, rows.conditions[LABEL])
    found = [(site.name, value) for site, value in entering(program, rows, SITES)]
    assert [name for name, _ in found] == list(names.values())  # in the order in which they run
    for name, value in found:
        assert torch.equal(value, recording.found[name])
        assert not value.requires_grad


def test_nothing_enters_what_is_not_asked_for(guided: Program) -> None:
    assert list(entering(guided, CalibrationBatch.of(guided), set())) == []
    assert [
        site.name for site, _ in entering(guided, CalibrationBatch.of(guided), {"blocks.0.mlp.fc1", "nowhere"})
    ] == ["blocks.0.mlp.fc1"]


def test_values_enter_as_they_do_for_rows_alone(guided: Program) -> None:
    rows = CalibrationBatch.of(guided)
    ((_, together),) = entering(guided, rows, {"blocks.1.mlp.fc2"})
    for index in (0, 5):
        ((_, alone),) = entering(guided, rows[index : index + 1], {"blocks.1.mlp.fc2"})
        torch.testing.assert_close(alone[0], together[index], rtol=1e-4, atol=1e-5)


def sensitivities_of(
    program: Program, rows: CalibrationBatch, seed: int = 0, *, gradients: bool = True
) -> dict[str, Any]:
    found = sensitivities(program, rows, SITES, seed, Progress(), gradients=gradients)
    return {item.site: item for item in found}


def test_without_gradients_all_weigh_the_same(program: Program) -> None:
    rows = CalibrationBatch.of(program)
    found = sensitivities_of(program, rows, gradients=False)
    assert set(found) == SITES
    for site, value in entering(program, rows, SITES):
        item = found[site.name]
        torch.testing.assert_close(item.value, value, rtol=0, atol=0)
        assert torch.equal(item.weight, torch.ones_like(value))


def test_values_are_those_that_enter(program: Program) -> None:
    rows = CalibrationBatch.of(program)
    found = sensitivities_of(program, rows)
    for site, value in entering(program, rows, SITES):
        item = found[site.name]
        torch.testing.assert_close(item.value, value, rtol=1e-5, atol=1e-6)
        assert not item.value.requires_grad
        assert item.weight.shape == value.shape
        assert (item.weight >= 0).all()
        assert item.weight.any()


def exact_sensitivities(program: Program, rows: CalibrationBatch, site: str) -> Tensor:
    """The diagonal of J^T J, J the Jacobian of the noise prediction by what enters a site; the sigma does not count."""
    variant = program.facts[StepPlan].computing
    node = next(found.node for found in find_sites(program.variants[variant]) if found.name == site)
    recording = Recording(program.module(variant), {node: site})
    latents = rows.latents.clone().requires_grad_()
    prediction = recording.run(latents, rows.timesteps, rows.conditions[LABEL])[0][:, :2].flatten(1)
    value = recording.found[site]
    total = torch.zeros_like(value)
    for column in prediction.unbind(1):  # rows are independent of each other, so one pass does for all of them
        total += torch.autograd.grad(column.sum(), value, retain_graph=True)[0] ** 2
    return total


@pytest.mark.slow
def test_sensitivities_are_the_gauss_newton_diagonal_on_average(guided: Program) -> None:
    """(v^T J)^2 has the mean J^T J and twice its square as variance, over 300 directions 8 % of it as deviation."""
    rows = CalibrationBatch.of(guided)[torch.tensor([0, 5])]
    sums: dict[str, Tensor] = {}
    for seed in range(DIRECTIONS):
        for name, item in sensitivities_of(guided, rows, seed).items():
            sums[name] = sums.get(name, torch.zeros(())) + item.weight / DIRECTIONS
    for name in SITES:
        exact = exact_sensitivities(guided, rows, name)
        ratio = sums[name] / exact
        assert ratio.mean().item() == pytest.approx(1, abs=0.06)
        assert ratio.std().item() == pytest.approx((2 / DIRECTIONS) ** 0.5, rel=0.2)
        assert (ratio - 1).abs().max() < 0.6
        others = sums[name].flip(-1) / exact  # of other channels: what it would be without any relation
        assert others.std() > 2 * ratio.std()


def test_the_seed_is_the_direction(guided: Program) -> None:
    rows = CalibrationBatch.of(guided)
    first, again, other = (sensitivities_of(guided, rows, seed) for seed in (0, 0, 1))
    for name in SITES:
        assert torch.equal(first[name].weight, again[name].weight)
        assert not torch.allclose(first[name].weight, other[name].weight)


@pytest.mark.parametrize("gradients", [True, False])
def test_those_of_results_may_be_left_out(guided: Program, gradients: bool) -> None:
    rows = CalibrationBatch.of(guided)
    whole = sensitivities_of(guided, rows, gradients=gradients)
    for item in sensitivities(guided, rows, SITES, 0, Progress(), gradients=gradients, results=False):
        assert torch.equal(item.value, whole[item.site].value)
        assert torch.equal(item.weight, whole[item.site].weight)
        assert not item.result_weight.numel()
        assert whole[item.site].result_weight.numel()


@pytest.mark.parametrize("gradients", [True, False])
def test_many_rows_run_in_batches(guided: Program, monkeypatch: pytest.MonkeyPatch, gradients: bool) -> None:
    rows = CalibrationBatch.of(guided)
    together = sensitivities_of(guided, rows, gradients=gradients)
    size = calibration_set._bytes_of_values(guided.variants["main"].graph)
    monkeypatch.setattr(calibration_set, "DIFFERENTIATED_BYTES", 4 * size)
    found = list(sensitivities(guided, rows, SITES, 0, Progress(), gradients=gradients))
    assert [len(item.rows) for item in found] == [4] * 3 + [4] * 3 + [2] * 3
    for name in SITES:
        parts = [item for item in found if item.site == name]
        assert torch.equal(torch.cat([item.rows.steps for item in parts]), rows.steps)
        value = torch.cat([item.value for item in parts])
        torch.testing.assert_close(value, together[name].value, rtol=1e-4, atol=1e-5)


def test_the_program_stays_as_it_is(guided: Program) -> None:
    before = guided.compute_digest()
    sensitivities_of(guided, CalibrationBatch.of(guided))
    list(entering(guided, CalibrationBatch.of(guided), SITES))
    assert guided.compute_digest() == before
    assert not any(value.requires_grad for value in guided.constants.values())
