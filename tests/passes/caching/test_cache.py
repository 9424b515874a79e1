"""plan-cache and insert-cache."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from qcgraph.capture.capture import capture
from qcgraph.errors import ContractError, UsageError
from qcgraph.facts import CachePlan
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.graph import module_path
from qcgraph.ir.program import Program
from qcgraph.pipeline import Pipeline
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.loop import sample

Run = Callable[[str, Program], Program]


class Scaling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.linear(x))


class Product(nn.Module):
    """A denoiser of blocks that multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(4, 2)
        self.blocks = nn.ModuleList([Scaling(), Scaling()])

    def forward(self, latent: torch.Tensor, timestep: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        x = latent.flatten(2).transpose(1, 2) + self.classes(label)[:, None] + timestep[:, None, None]
        for block in self.blocks:
            x = block(x)
        return x.transpose(1, 2).unflatten(2, (4, 4))


@pytest.fixture(scope="module")
def products() -> Program:
    spec = ModelSpec.class_conditional("product", (2, 4, 4), 3, 3, output_channels=2)
    program = capture(Product().eval().requires_grad_(False), spec, ("latent", "timestep", "label"))
    return program.with_facts(make_step_plan("ddim", 4, 1.5, spec.noise_schedule, program.constants_digest))


def latents(program: Program, plan: StepPlan | None = None) -> np.ndarray:
    return sample(TorchRunner(program), plan or program.facts[StepPlan], program.facts[ModelSpec], [0, 1, 2], seed=0)


def test_plan_cache_golden(captured: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    golden_diff("plan-cache", captured, run("plan-cache{interval=4 blocks=1..1}", captured))


def test_insert_cache_golden(captured: Program, cached: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    golden_diff("insert-cache", run("plan-cache", captured), cached)


def test_every_interval_computes_step_zero(captured: Program, run: Run) -> None:
    for interval in range(1, 12):
        plan = run(f"plan-cache{{interval={interval}}}", captured).facts[CachePlan]
        assert plan.draft[0] is None
        assert plan.draft.count(None) == -(-len(plan.draft) // interval)


def test_interval_one_is_the_captured_program(captured: Program, run: Run) -> None:
    program = run("plan-cache{interval=1},insert-cache", captured)
    assert not program.history[-1].changed
    assert "nothing to cache" in program.history[-1].refusals[0].reason
    assert np.array_equal(latents(program), latents(captured))


def test_an_all_full_schedule_is_bit_identical_to_no_cache(captured: Program, cached: Program) -> None:
    assert np.array_equal(latents(cached, cached.facts[StepPlan].all_computing), latents(captured))


def inputs_of(batch: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "latent": torch.randn(batch, 2, 8, 8, generator=generator),
        "timestep": torch.full((batch,), 500.0),
        "class_label": torch.arange(batch),
    }


@pytest.mark.parametrize("what", ["range", "branches"])
@pytest.mark.parametrize("blocks", ["all", "0..0", "1..1", "0..1+0..0+1..1"])
def test_reuse_at_the_same_inputs_is_the_full_result(captured: Program, run: Run, blocks: str, what: str) -> None:
    """In every mode: what was cached gives the same stream again when nothing has changed, up to one rounding."""
    program = run(f'plan-cache{{interval=2 blocks="{blocks}" what={what}}},insert-cache', captured)
    full = program.run("full", inputs_of())
    assert torch.equal(full["noise_prediction"], captured.run("main", inputs_of())["noise_prediction"])
    for mode in program.facts[CachePlan].modes:
        reused = program.run(mode, inputs_of() | full)["noise_prediction"]
        torch.testing.assert_close(reused, full["noise_prediction"], rtol=0, atol=2e-5)


def test_all_blocks_by_number_are_all_blocks(captured: Program, cached: Program, run: Run) -> None:
    program = run("plan-cache{interval=3 blocks=0..1},insert-cache", captured)
    assert program.digest == cached.digest


def test_a_mode_of_part_of_the_blocks_computes_the_others(captured: Program, run: Run) -> None:
    program = run('plan-cache{interval=2 blocks="0..1+1..1"},insert-cache', captured)
    assert program.facts[CachePlan].modes == {"reuse": ("cache_0",), "reuse_1": ("cache_1",)}
    paths = {module_path(node) for node in program.variants["reuse_1"].graph.nodes if node.op == "call_function"}
    assert any(path.startswith("blocks.0") for path in paths)
    assert not any(path.startswith("blocks.1") for path in paths)
    assert program.variants["reuse_1"].interface.input_names[-1] == "cache_1"


def test_branches_are_gated_anew(captured: Program, run: Run) -> None:
    """The attention and MLP of a block are gone from the variant that reuses, its modulation is not."""
    program = run("plan-cache{interval=2 what=branches},insert-cache", captured)
    values = program.facts[CachePlan].values
    assert [(value.first_block, value.last_block, value.branch) for value in values] == [
        (block, block, branch) for block in (0, 1) for branch in (0, 1)
    ]
    paths = {module_path(node) for node in program.variants["reuse"].graph.nodes if node.op == "call_function"}
    assert "blocks.1.adaLN_modulation.1" in paths
    assert not [path for path in paths if "attn" in path or "mlp" in path.removeprefix("t_embedder.mlp")]


def test_branches_at_another_timestep_are_those_values_under_its_gates(captured: Program, run: Run) -> None:
    """Only the gates differ from range caching: with all branches at zero, both are the stream that entered."""
    branches = run("plan-cache{interval=2 what=branches},insert-cache", captured)
    ranges = run("plan-cache{interval=2},insert-cache", captured)
    zero = {f"cache_{index}": torch.zeros(4, 16, 32) for index in range(4)}
    found, expected = (program.run("reuse", inputs_of() | zero)["noise_prediction"] for program in (branches, ranges))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_overlapping_ranges_share_their_branches(captured: Program, run: Run) -> None:
    plan = run('plan-cache{what=branches blocks="1..1+0..1"}', captured).facts[CachePlan]
    assert plan.modes == {"reuse": ("cache_0", "cache_1"), "reuse_1": ("cache_2", "cache_3", "cache_0", "cache_1")}
    assert len(plan.values) == 4


@pytest.mark.parametrize("history", [1, 3])
def test_a_longer_history_changes_no_graph(captured: Program, cached: Program, run: Run, history: int) -> None:
    program = run(f"plan-cache{{interval=3 history={history}}},insert-cache", captured)
    assert program.facts[CachePlan].history == history
    assert np.array_equal(latents(program), latents(cached))


@pytest.mark.parametrize(("budget", "computing"), [(1.0, 9), (0.5, 4), (0.34, 3), (0.01, 1)])
def test_a_budget_is_a_number_of_computing_steps(captured: Program, run: Run, budget: float, computing: int) -> None:
    draft = run(f"plan-cache{{budget={budget}}}", captured).facts[CachePlan].draft
    assert draft[0] is None
    assert draft.count(None) == computing


def test_memory_cuts_the_history(captured: Program, run: Run) -> None:
    """One tensor of 16 x 32 numbers of 4 bytes and both halves of guidance: 4096 bytes for each computed value."""
    for memory, history in [(0, 3), (3 * 4096, 3), (3 * 4096 - 1, 2), (4096, 1)]:
        program = run(f"plan-cache{{history=3 memory={memory}}}", captured)
        assert program.facts[CachePlan].history == history
        assert len(program.history[-1].refusals) == (history < 3)
    with pytest.raises(UsageError, match="takes 4096 bytes an image, 4095 are allowed") as caught:
        run("plan-cache{memory=4095}", captured)
    assert "at least 4096" in str(caught.value.hint)
    with pytest.raises(UsageError, match="takes 16384 bytes"):
        run("plan-cache{memory=4096 what=branches}", captured)
    inputs = inputs_of(2)
    kept = run("plan-cache,insert-cache", captured).run("full", inputs)["cache_0"]
    assert kept.nbytes == 4096


def test_without_guidance_one_half_is_kept(captured: Program, run: Run) -> None:
    schedule, model = captured.facts[ModelSpec].noise_schedule, captured.facts[StepPlan].fingerprint.model
    plan = make_step_plan("ddim", 5, 1.0, schedule, model)
    program = run("plan-cache{history=2 memory=4096}", captured.with_facts(plan))
    assert program.facts[CachePlan].history == 2


def test_a_model_without_branches(products: Program, run: Run) -> None:
    """Its blocks are products, not sums."""
    assert run("plan-cache{interval=2},insert-cache", products).variants.keys() == {"full", "reuse"}
    with pytest.raises(UsageError, match="block 0 is not a residual stream that branches are added to") as caught:
        run("plan-cache{what=branches}", products)
    assert "what=range" in str(caught.value.hint)


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
        ("blocks=0..0+5..5", "block range 5..5 is outside the model"),
        ("blocks=0..0+1..1+0..0", "block range 0..0 is there twice"),
        ("budget=1.5", "budget 1.5"),
        ("budget=-0.1", "budget -0.1"),
        ("history=0", "history 0"),
        ("history=4", "history 4"),
        ("memory=-1", "memory -1"),
    ],
)
def test_bad_options(captured: Program, run: Run, options: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        run(f"plan-cache{{{options}}}", captured)
    assert caught.value.hint


def test_a_program_is_split_once(cached: Program, run: Run) -> None:
    with pytest.raises(ContractError, match="split already"):
        run("insert-cache", cached)


def test_what_the_model_does_not_have_is_refused_before_anything_runs(captured: Program) -> None:
    Pipeline.parse("plan-cache{interval=3}").check(captured)
    for option, what in (("blocks=0..7", "outside the model"), ("memory=1", "1 are allowed")):
        with pytest.raises(UsageError, match=what) as caught:
            Pipeline.parse(f"equalize,plan-cache{{{option}}}").check(captured)
        assert caught.value.where == f"pass plan-cache{{{option}}}"
        assert caught.value.hint
