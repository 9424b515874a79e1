"""insert-attention-qdq: the products of attention as integers, the probabilities in two regions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from qcgraph.errors import ContractError
from qcgraph.evaluation.ablation import without_quantization
from qcgraph.facts import AttentionPlan, QuantizedSites, RegionQuant
from qcgraph.ir.execute import walk
from qcgraph.ir.program import Program
from qcgraph.ir.structure import find_sites
from qcgraph.passes.quantization._region_search import in_regions

Run = Callable[[str, Program], Program]
Distance = Callable[[Program, Program], float]
Inputs = Mapping[str, torch.Tensor]
ops = torch.ops.qcgraph
SET = "calibrate{trajectories=4 selection=uniform latents=24},group-timesteps{groups=2}"
INSERT = "insert-attention-qdq"
NAMES = ("blocks.0.attn.attention", "blocks.1.attn.attention")


@pytest.fixture
def distance(prediction: Callable[[Program], torch.Tensor]) -> Distance:
    """The relative L2 distance of what two programs predict."""

    def between(one: Program, other: Program) -> float:
        expected = prediction(other)
        return float((prediction(one) - expected).norm() / expected.norm())

    return between


def test_golden(split: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    planned = run("plan-attention", split)
    golden_diff("insert-attention-qdq", planned, run(INSERT, planned))


@pytest.mark.parametrize("bits", [8, 6])
def test_all_products_multiply_dequantized_values(split: Program, run: Run, bits: int) -> None:
    program = run(f"plan-attention{{bits={bits}}},{INSERT}", split)
    products = [site for site in find_sites(program.variants["full"]) if site.kind == "matmul"]
    nodes = {node.name: node for node in program.variants["full"].graph.nodes}
    for product in products:
        assert [source.target for source in nodes[product.node].all_input_nodes] == [ops.dequantize.default] * 2
    assert len(products) == {8: 6, 6: 4}[bits]  # two planes at 8 bits, one tensor at 6


@pytest.mark.parametrize("options", ["", "symmetric=true", "regions=false", "high=64", "objective=range"])
def test_fewer_bits_are_further_away(split: Program, run: Run, options: str, distance: Distance) -> None:
    found = [distance(run(f"plan-attention{{bits={bits} {options}}},{INSERT}", split), split) for bits in (8, 6, 4)]
    assert 0 < found[0] < found[1] < found[2] < 0.5
    assert found[0] < 0.02


@pytest.mark.parametrize(("bits", "planes"), [(8, 2), (6, 1)])
def test_two_regions_are_what_the_formula_says(
    split: Program, run: Run, inputs: Inputs, bits: int, planes: int
) -> None:
    """The product that the graph computes is that of probabilities which are rounded as TQ-DiT writes it."""
    program = run(f"plan-attention{{bits={bits}}},{INSERT}", split)
    quant = program.facts[AttentionPlan].sites[NAMES[0]].probabilities
    assert isinstance(quant, RegionQuant)
    assert quant.planes == planes
    softmax, value, result = _values_of_first_product(program, inputs)
    split_point = quant.splits[int(inputs["group"]) if len(quant.splits) > 1 else 0]
    torch.testing.assert_close(result, in_regions(softmax, split_point, quant.levels) @ value, rtol=1e-5, atol=1e-6)


def _values_of_first_product(program: Program, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities, dequantized values and mixed values of the first attention."""
    variant = program.variants["full"]
    ordered = [inputs[name] for name in variant.interface.input_names]
    found: dict[str, torch.Tensor] = {}
    products: list[str] = []
    for node, values in walk(program, "full", ordered):
        if node.target is torch.ops.aten.softmax.int and "softmax" not in found:
            found["softmax"] = values[node]
        elif node.target is torch.ops.aten.matmul.default and "softmax" in found:
            products.append(node.name)
            found["value"] = values[node.all_input_nodes[1]]
            found["mixed"] = found.get("mixed", 0) + values[node]
        elif node.target is torch.ops.aten.linear.default and products:
            break
    return found["softmax"], found["value"], found["mixed"]


def test_regions_leave_less_error(split: Program, run: Run, inputs: Inputs) -> None:
    one, two = (run(f"plan-attention{{bits=4 regions={text}}},{INSERT}", split) for text in ("false", "true"))
    parts = [_only_probabilities(program, split, run, inputs) for program in (one, two)]
    assert parts[1] < 0.9 * parts[0]


def _only_probabilities(program: Program, split: Program, run: Run, inputs: Inputs) -> float:
    """How far the first attention's mixed values are off where only its probabilities are rounded."""
    softmax, value, _ = _values_of_first_product(run(f"plan-attention,{INSERT}", split), inputs)
    quant = program.facts[AttentionPlan].sites[NAMES[0]].probabilities
    if isinstance(quant, RegionQuant):
        rounded = in_regions(softmax, quant.splits[-1], quant.levels)
    else:
        rounded = (softmax / quant.scales[-1]).round().clamp(quant.low, quant.high) * quant.scales[-1]
    return float(((rounded - softmax) @ value).norm())


def test_linears_and_attention_go_together_and_come_apart(sharp: Program, run: Run, distance: Distance) -> None:
    both = run(f"{SET},plan-quant,split-attention,plan-attention,{INSERT},insert-qdq,lower-linear", sharp)
    assert 1e-3 < distance(both, sharp) < 0.05
    assert distance(without_quantization(both, sharp), sharp) < 1e-5


@pytest.mark.parametrize(("options", "planes"), [("", 2), ("bits=6", 2), ("regions=false", 1)])
def test_the_fact_names_quantizers_and_products(split: Program, run: Run, options: str, planes: int) -> None:
    program = run(f"plan-attention{{{options}}},{INSERT}", split)
    nodes = {node.name: node for node in program.variants["full"].graph.nodes}
    assert tuple(program.facts[QuantizedSites].attentions) == NAMES
    for attention in program.facts[QuantizedSites].attentions.values():
        placed = attention.nodes["full"]
        assert {key: len(names) for key, names in placed.quantizers.items()} == {
            "query": 1,
            "key": 1,
            "probabilities": planes,
            "value": 1,
        }
        for product in placed.products:
            made = {operand.all_input_nodes[0].name for operand in nodes[product].all_input_nodes}
            assert made <= set(placed.all_quantizers)


def test_it_is_run_once(split: Program, run: Run) -> None:
    with pytest.raises(ContractError, match="not there in products of floating-point values") as caught:
        run(f"plan-attention,{INSERT},{INSERT}", split)
    assert NAMES[0] in str(caught.value.where)
    assert "insert-attention-qdq once" in str(caught.value.hint)


def test_nothing_planned_nothing_inserted(split: Program, run: Run) -> None:
    program = run(INSERT, split.with_facts(AttentionPlan({})))
    assert program.variants == split.variants
