"""Quantizers in a graph: pairs of quantize and dequantize, with the parameters of the step's timestep group."""

from __future__ import annotations

import torch
from torch import fx

from qcgraph.facts import ActivationQuant
from qcgraph.ir.edit import GraphEditor
from qcgraph.ir.quantize import clip_limits, parameters
from qcgraph.plan.spec import GROUP

aten = torch.ops.aten
ops = torch.ops.qcgraph


def quantize_pair(editor: GraphEditor, value: fx.Node, quant: ActivationQuant, name: str, source: fx.Node) -> fx.Node:
    """Insert quantize and dequantize of an activation at the insertion point, and return the dequantize node.

    Args:
        editor: the editor of the graph.
        value: the activation.
        quant: the codes of the activation.
        name: the prefix of the names of the parameters.
        source: the node that the new nodes are recorded as made from.
    """
    scales, zeros = parameters(quant)
    scale = parameter(editor, f"{name}_scale", scales, source)
    zero_point = parameter(editor, f"{name}_zero_point", zeros, source)
    if quant.bits:
        limits = zip(("least", "largest"), clip_limits(quant), strict=True)
        ends = [parameter(editor, f"{name}_{end}", table, source) for end, table in limits]
        value = editor.call(aten.clamp.Tensor, value, *ends, source=source)
    codes = (quant.low, quant.high)
    if quant.shift:
        regions = ops.quantize_regions.default
        q = editor.call(regions, value, scale, zero_point, *codes, quant.shift, 0, source=source)
    else:
        q = editor.call(ops.quantize.default, value, scale, zero_point, *codes, 0, source=source)
    return editor.call(ops.dequantize.default, q, scale, zero_point, 0, source=source)


def parameter(editor: GraphEditor, name: str, values: torch.Tensor, source: fx.Node) -> fx.Node:
    """Insert a static parameter for a single value, else a table with a row that the ``group`` input selects."""
    if len(values) == 1:
        return editor.constant(name, values.reshape(()), source)
    table = editor.constant(name, values, source)
    return editor.call(ops.select.default, table, editor.scalar_input(GROUP, source), source=source)
