"""lower-linear: rewrite quantized linears as a matmul and a bias addition, the form that int8 kernels match."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from qcgraph.facts import LinearNodes, QuantizedSites
from qcgraph.ir.edit import GraphEditor, with_edits
from qcgraph.ir.program import Program
from qcgraph.ir.quantized_sites import operand, sites_of
from qcgraph.pipeline import Pass, PassContext

aten = torch.ops.aten
ops = torch.ops.qcgraph


@dataclass(frozen=True)
class LowerLinear(Pass):
    """Rewrite quantized linears as matmul with weight codes [in, out] plus a bias of the activation's rank.

    Weight codes stored [in, out] need no transpose between dequantize and matmul, and a bias of full rank keeps
    ONNX Runtime from fusing the addition into a floating-point Gemm; either would cost the int8 kernel.
    """

    name: ClassVar[str] = "lower-linear"

    def run(self, program: Program, context: PassContext) -> Program:
        sites = sites_of(program.facts)
        lowered = {site: linear for site, linear in sites.linears.items() if not linear.transposed}
        if not lowered:
            return program
        edits: dict[str, GraphEditor] = {}
        for name, variant in program.variants.items():
            places = {linear.nodes[name].product: site for site, linear in lowered.items() if name in linear.nodes}
            if not places:
                continue
            editor = edits[name] = GraphEditor(variant, program.constants, self.name)
            for product in [node.name for node in variant.graph.nodes if node.name in places]:
                site = places[product]
                quantizer = lowered[site].nodes[name].quantizer
                result, added = _lower(editor, editor.node(product), program)
                nodes = LinearNodes(quantizer, product=result.name, leaving=added.name)
                codes = str(operand(operand(result, 1), 0).target)
                known = lowered[site].nodes
                lowered[site] = replace(lowered[site], codes=codes, transposed=True, nodes={**known, name: nodes})
        found = sites.with_sites(QuantizedSites(lowered, {}))
        return with_edits(program, edits).with_facts(found)


def _lower(editor: GraphEditor, linear: fx.Node, program: Program) -> tuple[fx.Node, fx.Node]:
    """Rewrite a linear layer; return the node that multiplies, and the node that gives the result with its bias."""
    activation, weight, *rest = linear.args
    assert isinstance(weight, fx.Node)
    codes, scale, zero_point, _ = weight.args
    assert isinstance(codes, fx.Node)
    name = str(codes.target)
    with editor.before(linear):
        transposed = editor.constant(f"{name}_t", program.constants[name].t().contiguous(), linear)
        dequantized = editor.call(ops.dequantize.default, transposed, scale, zero_point, 1, source=linear)
        product = result = editor.call(aten.matmul.default, activation, dequantized, source=linear)
        bias = rest[0] if rest else None
        if isinstance(bias, fx.Node):
            rank = linear.meta["val"].dim()
            values = program.constants[str(bias.target)].reshape(*[1] * (rank - 1), -1)
            result = editor.call(
                aten.add.Tensor, product, editor.constant(f"{bias.target}_row", values, linear), source=linear
            )
    linear.replace_all_uses_with(result)
    return product, result
