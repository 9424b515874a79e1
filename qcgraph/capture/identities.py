"""Calls that return their argument, which capture drops, and calls with a plainer form, which capture replaces."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcgraph.ir.graph import dimension_text

aten = torch.ops.aten
SAME_VALUE = (aten.to.dtype, aten.alias.default, aten.detach.default, aten.detach_.default)  # if dtypes are equal
KEEPING_SHAPE = (aten.expand.default, aten.expand_as.default, aten.flatten.using_ints, aten.unflatten.int)
SQUEEZES = (aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
# Operators whose results are undefined -> operators that return zeros; the arguments are alike.
UNDEFINED: dict[Any, Any] = {
    aten.empty.memory_format: aten.zeros.default,
    aten.empty_like.default: aten.zeros_like.default,
    aten.new_empty.default: aten.new_zeros.default,
}
# Python's operators on tensors -> the same operators under their usual names; the arguments are alike.
SPELLED: dict[Any, Any] = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__and__.Scalar: aten.bitwise_and.Scalar,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__or__.Scalar: aten.bitwise_or.Scalar,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor,
    aten.__xor__.Scalar: aten.bitwise_xor.Scalar,
    aten.__lshift__.Tensor: aten.bitwise_left_shift.Tensor,
    aten.__lshift__.Scalar: aten.bitwise_left_shift.Tensor_Scalar,
    aten.__rshift__.Tensor: aten.bitwise_right_shift.Tensor,
    aten.__rshift__.Scalar: aten.bitwise_right_shift.Tensor_Scalar,
}


def is_identity(node: fx.Node) -> bool:
    """Tell whether a call returns its first argument.

    Examples are inactive dropout, conversions to the dtype that a value has already, and changes of shape without
    effect, such as squeezing an axis that is not 1.
    """
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return False
    if node.target is aten.dropout.default:
        return not node.args[2] or bool(node.args[1] == 0)
    if node.target in SAME_VALUE:
        return bool(node.meta["val"].dtype == source.meta["val"].dtype)
    if node.target in SQUEEZES or node.target in KEEPING_SHAPE:
        return _shape(node) == _shape(source)
    return False


def simplify(graph: fx.Graph) -> None:
    """Set undefined values to 0, use one name for each operator, and replace an overwritten value by the new one."""
    for node in list(graph.nodes):
        if node.target in UNDEFINED:
            kwargs = {key: value for key, value in node.kwargs.items() if key != "memory_format"}
            node.target, node.kwargs = UNDEFINED[node.target], kwargs
        elif node.target in SPELLED:
            node.target = SPELLED[node.target]
        elif node.target is aten.copy.default:
            written, source = node.args[:2]
            if _type(written) == _type(source):
                node.replace_all_uses_with(source)
                graph.erase_node(node)


def _shape(node: Any) -> tuple[int | str, ...]:
    return tuple(dimension_text(dim) for dim in node.meta["val"].shape)


def _type(node: Any) -> tuple[Any, ...]:
    return node.meta["val"].dtype, *_shape(node)
