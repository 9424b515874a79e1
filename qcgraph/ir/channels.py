"""Linear layers whose outputs are the channels of an activation, and can take over a change of its scale.

Replacing an activation x by (x - offset) / factor for each channel costs nothing where outputs of linear layers are its
channels: the rows of these layers are divided, and their biases moved. Two forms are known::

    x = norm * (1 + gain) + shift            adaLN: gain and shift are rows of modulation layers
    x = heads(attention(q, k, v))            the rows of v: the weights of attention sum to one
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcgraph.ir.graph import Variant

aten = torch.ops.aten
MOVES = (  # ops that move values and compute none
    aten.reshape.default,
    aten.view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.select.int,
    aten.slice.Tensor,
    aten.flatten.using_ints,
    aten.contiguous.default,
    aten.clone.default,
    aten.chunk.default,
    aten.split.Tensor,
    aten.unbind.int,
    operator.getitem,
)
PARTING = (aten.chunk.default, aten.split.Tensor, aten.unbind.int)  # their results have users of their own


@dataclass(frozen=True)
class OutputChannels:
    """Outputs of a linear layer that become the channels of an activation, one output for each channel.

    Attributes:
        weight: the constant [out, in].
        bias: the constant [out].
        rows: for each channel, the row of the weight that computes it.
        is_gain: whether the activation is multiplied by 1 plus these outputs; else they are added to it.
    """

    weight: str
    bias: str
    rows: tuple[int, ...]
    is_gain: bool


class NotLinearError(Exception):
    """Raised with the reason why the channels do not come from rows of linear layers."""


def makers(variant: Variant, name: str) -> tuple[OutputChannels, ...]:
    """Return the rows of linear layers that compute the channels of an activation.

    Args:
        variant: the graph, which is not changed.
        name: the node whose value is the activation.

    Raises:
        NotLinearError: there are no such rows, or another node uses their outputs.
    """
    node = next(node for node in variant.graph.nodes if node.name == name)
    modulated = _modulated(node)
    if modulated is None:
        return (_rows(*_trace(node, is_read=True), is_gain=False),)
    gain, shift = modulated
    return (_rows(*_trace(gain), is_gain=True), _rows(*_trace(shift), is_gain=False))


def _modulated(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return gain and shift of ``norm * (1 + gain) + shift``, or None for other forms."""
    if not _is_sum(node) or len(node.all_input_nodes) != 2:
        return None
    for product, shift in (node.all_input_nodes, node.all_input_nodes[::-1]):
        if product.target is not aten.mul.Tensor or len(product.users) > 1:
            continue
        for factor in product.all_input_nodes:
            if _is_sum(factor) and factor.args[1] == 1 and len(factor.users) == 1:
                return factor.all_input_nodes[0], shift
    return None


def _is_sum(node: fx.Node) -> bool:
    return node.target is aten.add.Tensor and not node.kwargs  # keywords may scale one of the two summands


def _rows(linear: fx.Node, index: torch.Tensor, *, is_gain: bool) -> OutputChannels:
    rows = index.reshape(-1, index.shape[-1])
    if not bool((rows == rows[0]).all()) or len(rows[0].unique()) < len(rows[0]):
        raise NotLinearError("its channels are not one output each of a linear layer")
    weight, bias = linear.args[1], linear.args[2] if len(linear.args) > 2 else None
    constants = [source for source in (weight, bias) if isinstance(source, fx.Node) and source.op == "get_attr"]
    if len(constants) < 2:
        raise NotLinearError("the layer that makes it has no bias to take an offset, or a computed weight")
    if any(len(constant.users) > 1 for constant in constants):
        raise NotLinearError("the layer that makes it shares its weight")
    return OutputChannels(str(constants[0].target), str(constants[1].target), tuple(rows[0].tolist()), is_gain)


def _trace(node: fx.Node, *, is_read: bool = False) -> tuple[fx.Node, torch.Tensor]:
    """Return the linear layer behind a value, and the index of its output at each position, for a batch of one.

    A value that layers read may have several users; the values that it is computed from must have one user each.
    """
    if not is_read and len(node.users) > 1 and node.target not in PARTING:
        raise NotLinearError(f"%{node.name}, which it is made of, is used elsewhere too")
    if node.target is aten.linear.default:
        shape = [_for_one(size) for size in node.meta["val"].shape]
        return node, torch.arange(shape[-1]).expand(shape)
    if node.target is aten.scaled_dot_product_attention.default:
        value = node.args[2]
        assert isinstance(value, fx.Node)
        if value in node.args[:2]:
            raise NotLinearError("the values of its attention are its keys or queries too")
        return _trace(value)
    if node.target in MOVES and isinstance(node.args[0], fx.Node):
        linear, index = _trace(node.args[0])
        arguments = [_plain(argument) for argument in node.args[1:]]
        try:
            return linear, node.target(index, *arguments)
        except RuntimeError:
            raise NotLinearError("its shape is not that of its linear layer for a batch of one") from None
    raise NotLinearError("it does not come from a linear layer, or from adaLN, by moving values alone")


def _plain(argument: Any) -> Any:
    """Return an argument of an op that moves values, for a batch of one; sizes may follow from the batch."""
    if isinstance(argument, list | tuple):
        return [_plain(item) for item in argument]
    if not isinstance(argument, fx.Node):
        return argument
    value = argument.meta.get("val")
    if not isinstance(value, int | torch.SymInt):
        raise NotLinearError("its shape is computed from values")
    return _for_one(value)


def _for_one(size: int | torch.SymInt) -> int:
    """Return a size for a batch of one, the only size that a program leaves open."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))
