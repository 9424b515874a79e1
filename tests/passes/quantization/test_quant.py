"""plan-quant and insert-qdq."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from qcgraph.errors import UsageError
from qcgraph.facts import QuantPlan, Ranges, WeightQuant
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.graph import module_path
from qcgraph.ir.program import Program
from qcgraph.ir.quantize import ROWS, quantize_weight
from qcgraph.passes.quantization.plan_quant import affine_parameters
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.loop import sample

Run = Callable[[str, Program], Program]


def latents(program: Program) -> np.ndarray:
    return sample(TorchRunner(program), program.facts[StepPlan], program.facts[ModelSpec], [0, 1, 2], seed=0)


def test_plan_quant_golden(ranged: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    grouped = run("group-timesteps{groups=2}", ranged)
    golden_diff("plan-quant", grouped, run("plan-quant{pair-high=128}", grouped))


def test_insert_qdq_golden(planned: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    golden_diff("insert-qdq", planned, run("insert-qdq", planned))


def test_bits_that_come_to_nothing_are_said(ranged: Program, run: Run) -> None:
    nothing = ranged.with_facts(replace(ranged.facts[Ranges], planned={}))
    refusal = run("plan-quant", nothing).history[-1].refusals[-1]
    assert refusal.where == "model"
    assert refusal.reason.startswith("nothing is quantized, none of its ")
    assert "no computing step reached it during calibration" in refusal.reason


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (-0.17, 900.0)])
def test_min_max_parameters_cover_the_range_and_hold_zero(low: float, high: float) -> None:
    scale, zero = affine_parameters(low, high, 0, 255, symmetric=False)
    smallest, largest = (0 - zero) * scale, (255 - zero) * scale
    assert smallest <= min(low, 0) + scale / 2
    assert largest >= max(high, 0) - scale / 2
    assert 0 <= zero <= 255
    assert scale == float(np.float32(scale))


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_group_that_is_always_zero_has_a_scale(symmetric: bool) -> None:
    scale, zero = affine_parameters(0.0, 0.0, 0, 127, symmetric=symmetric)
    assert scale > 0
    assert zero == 0


def test_symmetric_parameters() -> None:
    assert affine_parameters(-2.0, 1.0, -128, 127, symmetric=True) == (float(np.float32(2 / 127)), 0)


def test_a_site_keeps_the_scale_of_its_group(ranged: Program, run: Run) -> None:
    program = run("group-timesteps{groups=3},plan-quant", ranged)
    activation = program.facts[QuantPlan].sites["blocks.0.attn.qkv"].activation
    assert activation.scales == tuple(float(np.float32((2 + index) / 255)) for index in range(3))


def test_one_group_is_static(ranged: Program, run: Run) -> None:
    """G = 1 holds one scale, needs no table and no group input, and equals static quantization by hand."""
    program = run("group-timesteps{groups=1},plan-quant,insert-qdq", ranged)
    assert "group" not in program.variants["full"].interface.input_names
    assert "qcgraph.select" not in program.text
    static = program.facts[QuantPlan].sites["blocks.0.attn.qkv"].activation
    assert static.scales == (float(np.float32(4 / 255)),)


def test_equal_groups_equal_static(ranged: Program, run: Run) -> None:
    """Tables that hold the same scale in every group give bit for bit what one static scale gives."""
    ranges = ranged.facts[Ranges]
    flat = {name: replace(site, highs=(3.0,) * len(site.highs)) for name, site in ranges.planned.items()}
    program = ranged.with_facts(replace(ranges, planned=flat))
    static = run("group-timesteps{groups=1},plan-quant,insert-qdq", program)
    grouped = run("group-timesteps{groups=3},plan-quant", program)
    plan = grouped.facts[QuantPlan]
    tables = {
        name: replace(
            site,
            activation=replace(
                site.activation, scales=site.activation.scales * 3, zero_points=site.activation.zero_points * 3
            ),
        )
        for name, site in plan.sites.items()
    }
    grouped = run("insert-qdq", grouped.with_facts(QuantPlan(tables)))
    assert "qcgraph.select" in grouped.text
    assert np.array_equal(latents(static), latents(grouped))


def test_every_site_left_alone_has_a_reason(ranged: Program, run: Run) -> None:
    record = run("plan-quant", ranged).history[-1]
    reasons = {refusal.where: refusal.reason for refusal in record.refusals}
    assert "embedder or final layer" in reasons["final_layer.linear"]
    assert all(reasons.values())


@pytest.mark.parametrize(
    ("low", "high", "reason"),
    [(0.0, 0.0, "is zero"), (float("-inf"), 1.0, "not finite"), (float("nan"), 1.0, "not finite")],
)
def test_unusable_ranges_leave_the_site_alone(ranged: Program, run: Run, low: float, high: float, reason: str) -> None:
    ranges = ranged.facts[Ranges]
    site = replace(ranges.planned["blocks.0.attn.qkv"], lows=(low,) * 3, highs=(high,) * 3)
    broken = ranged.with_facts(replace(ranges, planned={**ranges.planned, "blocks.0.attn.qkv": site}))
    program = run("plan-quant,insert-qdq", broken)
    assert "blocks.0.attn.qkv" not in program.facts[QuantPlan].sites
    assert any(reason in refusal.reason for refusal in program.history[-2].refusals)


def test_a_site_never_reached_is_left_alone(ranged: Program, run: Run) -> None:
    ranges = ranged.facts[Ranges]
    kept = {name: site for name, site in ranges.planned.items() if name != "blocks.1.mlp.fc2"}
    program = run("plan-quant", ranged.with_facts(replace(ranges, planned=kept)))
    assert "blocks.1.mlp.fc2" not in program.facts[QuantPlan].sites
    assert any("no computing step reached it" in refusal.reason for refusal in program.history[-1].refusals)


@pytest.mark.parametrize("options", ["weight-bits=1", "activation-bits=9", "bits=8"])
def test_bad_bits(ranged: Program, run: Run, options: str) -> None:
    with pytest.raises(UsageError) as caught:
        run(f"plan-quant{{{options}}}", ranged)
    assert caught.value.hint


def test_float8_covers_the_range_of_each_group(ranged: Program, run: Run) -> None:
    plan = run("group-timesteps{groups=3},plan-quant{format=fp8}", ranged).facts[QuantPlan]
    site = plan.sites["blocks.0.attn.qkv"]
    assert (site.weight.dtype, site.weight.high) == (site.activation.dtype, site.activation.high)
    assert site.activation.dtype == "float8_e4m3fn"
    assert site.activation.zero_points == (0, 0, 0)
    largest = [scale * 448 for scale in site.activation.scales]
    assert largest == pytest.approx([1.0, 2.0, 3.0])
    with pytest.raises(UsageError, match="format 'fp4' is not int, fp8"):
        run("plan-quant{format=fp4}", ranged)


def test_weight_codes_are_within_half_a_step() -> None:
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    codes, scale = quantize_weight(weight, WeightQuant(64))
    assert codes.abs().amax() == 64
    assert scale[2] == 1
    assert ((codes * scale[:, None] - weight).abs() <= scale[:, None] * (0.5 + 1e-6)).all()


def test_a_weight_of_many_rows_is_quantized_row_by_row() -> None:
    """In parts, of which the last is smaller, and bit for bit what the formula gives for all rows at once."""
    weight = torch.randn(2 * ROWS + 3, 5, generator=torch.Generator().manual_seed(0))
    codes, scale = quantize_weight(weight, WeightQuant(127))
    assert torch.equal(scale, weight.abs().amax(dim=1) / 127)
    assert torch.equal(codes, torch.round(weight / scale[:, None]).clamp(-127, 127).to(torch.int8))


def test_a_quantized_linear_computes_its_formula(planned: Program, run: Run) -> None:
    """The program against the textbook formula of one grouped site, written out."""
    program = run("insert-qdq", planned)
    weight = planned.constants["blocks.0.attn.qkv.weight"]
    bias = planned.constants["blocks.0.attn.qkv.bias"]
    codes, scale = quantize_weight(weight, WeightQuant(64))
    values: dict[str, torch.Tensor] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            result = super().run_node(n)
            if module_path(n) == "blocks.0.attn.qkv" and n.op == "call_function":
                values[str(n.target)] = result
                values.setdefault(f"input of {n.target}", self.env[n.args[0]])
            return result

    inputs = {
        "latent": torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.full((2,), 500.0),
        "class_label": torch.tensor([0, 1]),
        "group": torch.tensor(1),
    }
    names = program.variants["full"].interface.input_names
    Recorder(program.module("full")).run(*(inputs[name] for name in names))
    x = values["input of qcgraph.quantize.default"]
    q = (torch.round(x / 0.03) + 110).clamp(0, 255)
    expected = F.linear((q - 110) * 0.03, codes * scale[:, None], bias)
    torch.testing.assert_close(values["aten.linear.default"], expected, rtol=1e-4, atol=1e-5)


def test_linears_that_share_an_input_share_the_pair(planned: Program, run: Run) -> None:
    text = run("insert-qdq", planned).text
    assert text.count("qcgraph.quantize(") == 2
    assert text.count("qcgraph.dequantize(") == 4  # two activations, two weights
