"""insert-attention-qdq: quantize and dequantize around both products of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qcgraph.errors import ContractError
from qcgraph.facts import (
    ActivationQuant,
    AttentionNodes,
    AttentionPlan,
    AttentionQuant,
    Precision,
    QuantizedAttention,
    QuantizedSites,
    RegionQuant,
)
from qcgraph.ir.attention import PROBABILITIES, AttentionProducts, find_attention
from qcgraph.ir.edit import GraphEditor, with_edits
from qcgraph.ir.program import Program
from qcgraph.ir.quantized_sites import operand, sites_of
from qcgraph.passes.quantization._quantizers import parameter, quantize_pair
from qcgraph.passes.quantization._region_search import region_codes
from qcgraph.pipeline import Pass, PassContext

aten = torch.ops.aten
ops = torch.ops.qcgraph


@dataclass(frozen=True)
class InsertAttentionQDQ(Pass):
    """Insert quantize/dequantize pairs around the products of attention that the attention plan names.

    Probabilities in two regions become one integer tensor, or two planes that are each multiplied on their own, as
    planned.
    """

    name: ClassVar[str] = "insert-attention-qdq"
    requires: ClassVar[tuple[type, ...]] = (AttentionPlan,)
    precedes: ClassVar[tuple[type, ...]] = (Precision,)
    provides: ClassVar[tuple[type, ...]] = (QuantizedSites,)

    def run(self, program: Program, context: PassContext) -> Program:
        plan = program.facts[AttentionPlan].sites
        attentions = {name: QuantizedAttention({}) for name in plan}
        edits: dict[str, GraphEditor] = {}
        for name, variant in program.variants.items():
            found = [attention for attention in find_attention(variant) if attention.name in plan]
            if found:
                edits[name] = GraphEditor(variant, program.constants, self.name)
            for attention in found:
                attentions[attention.name].nodes[name] = _insert(edits[name], attention, plan[attention.name])
        if missing := [name for name, attention in attentions.items() if not attention.nodes]:
            raise ContractError(
                "is planned to be quantized, and is not there in products of floating-point values",
                where=missing[0],
                hint="run split-attention before plan-attention, and insert-attention-qdq once",
            )
        sites = sites_of(program.facts).with_sites(QuantizedSites({}, attentions))
        return with_edits(program, edits).with_facts(sites)


def _insert(editor: GraphEditor, attention: AttentionProducts, quant: AttentionQuant) -> AttentionNodes:
    """Quantize the operands of both products, in the graph that the editor holds."""
    logits, softmax, mixed = (
        editor.node(node.name) for node in (attention.logits, attention.probabilities, attention.mixed)
    )
    query, key, value = logits.args[0], logits.args[1], mixed.args[1]
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
    name = f"{attention.name}.{PROBABILITIES}"
    with editor.before(logits):
        logits.args = (
            quantize_pair(editor, query, quant.query, f"{attention.name}.query", logits),
            quantize_pair(editor, key, quant.key, f"{attention.name}.key", logits),
        )
    with editor.before(mixed):
        values = quantize_pair(editor, value, quant.value, f"{attention.name}.value", mixed)
        if isinstance(quant.probabilities, ActivationQuant):
            planes = [quantize_pair(editor, softmax, quant.probabilities, name, mixed)]
            mixed.args, products = (planes[0], values), [mixed]
        else:
            planes, products = _regions(editor, softmax, values, quant.probabilities, name, mixed)
    made = {"query": [operand(logits, 0)], "key": [operand(logits, 1)], PROBABILITIES: planes, "value": [values]}
    quantizers = {key: tuple(operand(pair, 0).name for pair in pairs) for key, pairs in made.items()}
    return AttentionNodes(quantizers, (logits.name, *(product.name for product in products)))


def _regions(
    editor: GraphEditor, softmax: fx.Node, values: fx.Node, quant: RegionQuant, name: str, mixed: fx.Node
) -> tuple[list[fx.Node], list[fx.Node]]:
    """Replace the product of probabilities and values by a product of probabilities in two regions.

    Returns:
        The nodes that dequantize the probabilities, and the nodes that multiply them.
    """
    fine, coarse = region_codes(quant)
    split = parameter(editor, f"{name}_split", torch.tensor(quant.splits), mixed)
    below, above = (editor.call(ops.region.default, softmax, split, upper, source=mixed) for upper in (False, True))
    above = quantize_pair(editor, above, coarse, f"{name}_above", mixed)
    if quant.planes == 1:
        # Values above the split are multiples of the coarse step by now, so of the fine step too.
        both = editor.call(aten.add.Tensor, below, above, source=mixed)
        both = quantize_pair(editor, both, fine, f"{name}_both", mixed)
        product = editor.call(aten.matmul.default, both, values, source=mixed)
        mixed.replace_all_uses_with(product)
        return [above, both], [product]
    below = quantize_pair(editor, below, fine, f"{name}_below", mixed)
    products = [editor.call(aten.matmul.default, plane, values, source=mixed) for plane in (below, above)]
    mixed.replace_all_uses_with(editor.call(aten.add.Tensor, *products, source=mixed))
    return [below, above], products
