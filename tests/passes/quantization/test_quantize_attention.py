"""split-attention and quantize-attention: the products of attention as integers, the probabilities in two regions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from qcgraph.errors import ContractError, UsageError
from qcgraph.evaluation.ablation import without_quantization
from qcgraph.facts import ActivationQuant, AttentionPlan, RegionQuant
from qcgraph.ir.attention import find_attention
from qcgraph.ir.execute import walk
from qcgraph.ir.program import Program
from qcgraph.ir.structure import find_sites
from qcgraph.passes.quantization._region_search import in_regions

Run = Callable[[str, Program], Program]
ops = torch.ops.qcgraph
SET = "calibrate{trajectories=4 selection=uniform latents=24},group-timesteps{groups=2}"
NAMES = ("blocks.0.attn.attention", "blocks.1.attn.attention")
INPUTS = {
    "latent": torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0)),
    "timestep": torch.full((4,), 700.0),
    "class_label": torch.arange(4),
    "group": torch.tensor(1),
}


@pytest.fixture(scope="module")
def sharp(cached: Program, sharpened: Callable[[Program], Program]) -> Program:
    return sharpened(cached)


@pytest.fixture(scope="module")
def split(sharp: Program, run: Run) -> Program:
    return run(f"split-attention,{SET}", sharp)


def prediction(program: Program) -> torch.Tensor:
    names = program.variants["full"].interface.input_names
    return program.run("full", {name: INPUTS[name] for name in names})["noise_prediction"]


def distance(one: Program, other: Program) -> float:
    expected = prediction(other)
    return float((prediction(one) - expected).norm() / expected.norm())


def test_split_attention_is_the_same_function(sharp: Program, run: Run) -> None:
    program = run("split-attention", sharp)
    torch.testing.assert_close(prediction(program), prediction(sharp), rtol=1e-5, atol=1e-5)
    assert not [site for site in find_sites(program.variants["full"]) if site.kind == "attention"]
    assert tuple(found.name for found in find_attention(program.variants["full"])) == NAMES


def test_masked_attention_is_not_split(sharp: Program, run: Run) -> None:
    """Nor any other whose products are not plain; the reason is recorded."""
    graph = sharp.variants["full"].graph
    node = next(node for node in graph.nodes if node.target is torch.ops.aten.scaled_dot_product_attention.default)
    node.kwargs = {"is_causal": True}
    try:
        program = run("split-attention", sharp)
    finally:
        node.kwargs = {}
    assert [(found.where, found.reason) for found in program.history[-1].refusals] == [
        (NAMES[0], "its attention is causal")
    ]
    assert tuple(found.name for found in find_attention(program.variants["full"])) == NAMES[1:]


def test_golden(split: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    golden_diff("quantize-attention", split, run("quantize-attention", split))


@pytest.mark.parametrize("bits", [8, 6])
def test_all_products_multiply_dequantized_values(split: Program, run: Run, bits: int) -> None:
    program = run(f"quantize-attention{{bits={bits}}}", split)
    products = [site for site in find_sites(program.variants["full"]) if site.kind == "matmul"]
    nodes = {node.name: node for node in program.variants["full"].graph.nodes}
    for product in products:
        assert [source.target for source in nodes[product.node].all_input_nodes] == [ops.dequantize.default] * 2
    assert len(products) == {8: 6, 6: 4}[bits]  # two planes at 8 bits, one tensor at 6


@pytest.mark.parametrize("options", ["", "symmetric=true", "regions=false", "high=64", "objective=range"])
def test_fewer_bits_are_further_away(split: Program, run: Run, options: str) -> None:
    found = [distance(run(f"quantize-attention{{bits={bits} {options}}}", split), split) for bits in (8, 6, 4)]
    assert 0 < found[0] < found[1] < found[2] < 0.5
    assert found[0] < 0.02


@pytest.mark.parametrize(("bits", "planes"), [(8, 2), (6, 1)])
def test_two_regions_are_what_the_formula_says(split: Program, run: Run, bits: int, planes: int) -> None:
    """The product that the graph computes is that of probabilities which are rounded as TQ-DiT writes it."""
    program = run(f"quantize-attention{{bits={bits}}}", split)
    quant = program.facts[AttentionPlan].sites[NAMES[0]].probabilities
    assert isinstance(quant, RegionQuant)
    assert quant.planes == planes
    softmax, value, result = _values_of_first_product(program)
    split_point = quant.splits[int(INPUTS["group"]) if len(quant.splits) > 1 else 0]
    torch.testing.assert_close(result, in_regions(softmax, split_point, quant.levels) @ value, rtol=1e-5, atol=1e-6)


def _values_of_first_product(program: Program) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities, dequantized values and mixed values of the first attention."""
    variant = program.variants["full"]
    inputs = [INPUTS[name] for name in variant.interface.input_names]
    found: dict[str, torch.Tensor] = {}
    products: list[str] = []
    for node, values in walk(program, "full", inputs):
        if node.target is torch.ops.aten.softmax.int and "softmax" not in found:
            found["softmax"] = values[node]
        elif node.target is torch.ops.aten.matmul.default and "softmax" in found:
            products.append(node.name)
            found["value"] = values[node.all_input_nodes[1]]
            found["mixed"] = found.get("mixed", 0) + values[node]
        elif node.target is torch.ops.aten.linear.default and products:
            break
    return found["softmax"], found["value"], found["mixed"]


def test_without_regions_the_probabilities_have_one(split: Program, run: Run) -> None:
    sites = run("quantize-attention{regions=false}", split).facts[AttentionPlan].sites
    assert all(isinstance(site.probabilities, ActivationQuant) for site in sites.values())


def test_regions_leave_less_error(split: Program, run: Run) -> None:
    one, two = (run(f"quantize-attention{{bits=4 regions={text}}}", split) for text in ("false", "true"))
    parts = [_only_probabilities(program, split, run) for program in (one, two)]
    assert parts[1] < 0.9 * parts[0]


def _only_probabilities(program: Program, split: Program, run: Run) -> float:
    """How far the first attention's mixed values are off where only its probabilities are rounded."""
    softmax, value, _ = _values_of_first_product(run("quantize-attention", split))
    quant = program.facts[AttentionPlan].sites[NAMES[0]].probabilities
    if isinstance(quant, RegionQuant):
        rounded = in_regions(softmax, quant.splits[-1], quant.levels)
    else:
        rounded = (softmax / quant.scales[-1]).round().clamp(quant.low, quant.high) * quant.scales[-1]
    return float(((rounded - softmax) @ value).norm())


def test_one_timestep_group_has_one_of_each(sharp: Program, run: Run) -> None:
    text = SET.replace("groups=2", "groups=1")
    for site in run(f"split-attention,{text},quantize-attention", sharp).facts[AttentionPlan].sites.values():
        assert len(site.query.scales) == len(site.key.scales) == len(site.value.scales) == 1
        assert isinstance(site.probabilities, RegionQuant)
        assert len(site.probabilities.splits) == 1


def test_symmetric_codes_have_no_zero_point(split: Program, run: Run) -> None:
    for site in run("quantize-attention{symmetric=true}", split).facts[AttentionPlan].sites.values():
        for quant in (site.query, site.key, site.value):
            assert quant.dtype == "int8"
            assert not any(quant.zero_points)
        assert site.probabilities.dtype == "int8"


def test_linears_and_attention_go_together_and_come_apart(sharp: Program, run: Run) -> None:
    both = run(f"{SET},plan-quant,split-attention,quantize-attention,insert-qdq,lower-linear", sharp)
    assert 1e-3 < distance(both, sharp) < 0.05
    assert distance(without_quantization(both, sharp), sharp) < 1e-5


def test_attention_that_overflows_is_left_alone(sharp: Program, run: Run) -> None:
    name = "blocks.0.attn.qkv.weight"
    weight = sharp.constants[name].clone()
    weight[: len(weight) // 3] = 1e38
    broken = replace(run(f"split-attention,{SET}", sharp), constants={**sharp.constants, name: weight})
    program = run("quantize-attention", broken)
    reasons = {found.where: found.reason for found in program.history[-1].refusals}
    assert reasons[NAMES[0]].endswith("is not finite during calibration")
    assert NAMES[0] not in program.facts[AttentionPlan].sites


def test_attention_of_zeros_is_left_alone(sharp: Program, run: Run) -> None:
    name, bias = "blocks.1.attn.qkv.weight", "blocks.1.attn.qkv.bias"
    constants = {**sharp.constants, **{key: torch.zeros_like(sharp.constants[key]) for key in (name, bias)}}
    program = run("quantize-attention", replace(run(f"split-attention,{SET}", sharp), constants=constants))
    reasons = {found.where: found.reason for found in program.history[-1].refusals}
    assert reasons[NAMES[1]] == "its query is zero during calibration"
    assert tuple(program.facts[AttentionPlan].sites) == NAMES[:1]


def test_attention_that_was_not_split_is_none(sharp: Program, run: Run) -> None:
    program = run(f"{SET},quantize-attention", sharp)
    assert program.facts[AttentionPlan] == AttentionPlan({})
    assert [found.reason for found in program.history[-1].refusals] == [
        "no attention in its products: split-attention goes before"
    ]


@pytest.mark.parametrize("bits", [2, 9])
def test_other_bits_are_refused(split: Program, run: Run, bits: int) -> None:
    with pytest.raises(UsageError, match=f"bits {bits}"):
        run(f"quantize-attention{{bits={bits}}}", split)


def test_it_needs_a_calibration_set(sharp: Program, run: Run) -> None:
    with pytest.raises(ContractError, match="CalibrationSet"):
        run("split-attention,quantize-attention", sharp)


def test_groups_without_samples_get_the_scales_of_all(sharp: Program, run: Run) -> None:
    text = "calibrate{trajectories=4 selection=uniform latents=1},group-timesteps{groups=3}"
    program = run(f"split-attention,{text},quantize-attention", sharp)
    reasons = [found.reason for found in program.history[-1].refusals]
    assert any(reason.startswith("no sample tells in timestep groups") for reason in reasons)
    for site in program.facts[AttentionPlan].sites.values():
        assert all(scale > 1e-6 for scale in site.query.scales)
