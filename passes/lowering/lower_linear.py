"""lower-linear: quantized linears as a matmul and a bias addition, the form that int8 kernels are matched in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qcgraph.ir.edit import GraphEditor, with_edits
from qcgraph.ir.graph import Variant
from qcgraph.ir.program import Program
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
        edits: dict[str, GraphEditor] = {}
        for name, variant in program.variants.items():
            linears = [node.name for node in quantized_linears(variant)]
            if not linears:
                continue
            editor = edits[name] = GraphEditor(variant, program.constants, self.name)
            for linear in linears:
                self._lower(editor, editor.node(linear), program)
        return with_edits(program, edits)

    def _lower(self, editor: GraphEditor, linear: fx.Node, program: Program) -> None:
        activation, weight, *rest = linear.args
        assert isinstance(weight, fx.Node)
        codes, scale, zero_point, _ = weight.args
        assert isinstance(codes, fx.Node)
        name = str(codes.target)
        with editor.before(linear):
            transposed = editor.constant(f"{name}_t", program.constants[name].t().contiguous(), linear)
            dequantized = editor.call(ops.dequantize.default, transposed, scale, zero_point, 1, source=linear)
            result = editor.call(aten.matmul.default, activation, dequantized, source=linear)
            bias = rest[0] if rest else None
            if isinstance(bias, fx.Node):
                rank = linear.meta["val"].dim()
                values = program.constants[str(bias.target)].reshape(*[1] * (rank - 1), -1)
                result = editor.call(
                    aten.add.Tensor, result, editor.constant(f"{bias.target}_row", values, linear), source=linear
                )
        linear.replace_all_uses_with(result)


def quantized_linears(variant: Variant) -> list[fx.Node]:
    """The linears both of whose operands are dequantized."""
    return [
        node
        for node in variant.graph.nodes
        if node.target is aten.linear.default
        and all(getattr(operand, "target", None) is ops.dequantize.default for operand in node.args[:2])
    ]
