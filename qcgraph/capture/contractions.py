"""Rewriting of contractions with a constant to the one form that passes quantize, `aten.linear`.

``x @ W``, ``torch.einsum("btc,co->bto", x, W)``, ``tensordot``, ``addmm``, ``bmm`` with an expanded matrix and a
convolution of kernel 1 are all ``linear(x, weight[out, in], bias)`` once the summed axes of x are last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from qcgraph.ir.edit import GraphEditor, with_edits
from qcgraph.ir.graph import dimension_text
from qcgraph.ir.legality import illegal_target
from qcgraph.ir.program import Program
from qcgraph.ir.structure import MATMULS, contractions, einsum_letters, factors, latent_dependent, outer_layers

aten = torch.ops.aten
MADE_BY = "capture"
EXPANDING = (aten.expand.default, aten.repeat.default)


@dataclass(frozen=True)
class _Product:
    """A sum of products of an activation and a constant, by the names of their axes.

    Attributes:
        activation: the node of the activation.
        weight: the value of the constant.
        axes: the names of the axes of activation, weight and result.
        name: the constant's name, which names of new constants begin with.
        bias: added to the result along the last axis of the linear layer, scaled by ``gain``.
        gain: the factor of the bias.
    """

    activation: fx.Node
    weight: torch.Tensor
    axes: tuple[Sequence[str], Sequence[str], Sequence[str]]
    name: str
    bias: fx.Node | None = None
    gain: float = 1.0


def contract_by_linears(program: Program) -> Program:
    """Return the program with every contraction of an activation with a constant as a linear layer.

    Only contractions on the way of the latent change. A linear layer whose weight and bias are constants stays as it
    is, and so does the whole program where there is nothing to rewrite.
    """
    edits = {}
    for name, variant in program.variants.items():
        dependent, outer = latent_dependent(variant), {node.name for node in outer_layers(variant)}
        editor = GraphEditor(variant, program.constants, MADE_BY)
        rewriter = _Rewriter(editor, program.constants)
        names = [node.name for node in contractions(variant) if node in dependent]
        rewritten = [rewriter.rewrite(editor.node(found), is_outer=found in outer) for found in names]
        if any(rewritten):
            edits[name] = editor
    return with_edits(program, edits) if edits else program


class _Rewriter:
    """Rewrites the contractions of one graph."""

    def __init__(self, editor: GraphEditor, constants: Any) -> None:
        self._editor = editor
        self._constants = constants
        self._known: dict[fx.Node, torch.Tensor | None] = {}

    def rewrite(self, node: fx.Node, *, is_outer: bool) -> bool:
        """Rewrite a contraction, and return whether it was rewritten.

        Args:
            node: the contraction.
            is_outer: whether it is an embedder or a final layer; convolutions there stay convolutions.
        """
        if node.target is aten.linear.default:
            return self._fold(node)
        if MATMULS[node.target].startswith("conv") and is_outer:
            return False
        product = self._product(node)
        if product is None or not _is_layer(product):
            return False
        self._emit(node, product)
        return True

    def _fold(self, linear: fx.Node) -> bool:
        """Make constants of the weight and bias of a linear layer that are computed from constants alone."""
        changed = False
        for index, source in enumerate(linear.args[1:], start=1):
            if not isinstance(source, fx.Node) or source.op == "get_attr":
                continue
            value = self._value(source)
            if value is not None:
                linear.update_arg(index, self._constant(_name_of(source), value, linear))
                changed = True
            elif index == 2:  # a computed bias is not part of a layer
                self._part_bias(linear, source)
                changed = True
        return changed

    def _part_bias(self, linear: fx.Node, bias: fx.Node) -> None:
        linear.args = linear.args[:2]
        users = list(linear.users)
        with self._editor.after(linear):
            total = self._editor.call(aten.add.Tensor, linear, bias, source=linear)
        for user in users:
            user.replace_input_with(linear, total)

    def _product(self, node: fx.Node) -> _Product | None:
        """Return the product of a contraction, or None where its factors are not one activation and one constant."""
        if MATMULS[node.target].startswith("conv"):
            return self._convolution(node)
        operands = factors(node)
        if len(operands) != 2:
            return None
        weights = [self._weight(operand, node) for operand in operands]
        axes = _axes(node, weights)
        if axes is None or (weights[0] is None) == (weights[1] is None):
            return None
        where = 0 if weights[0] is not None else 1
        weight = weights[where]
        assert weight is not None
        name = _name_of(operands[where])
        bias = node.args[0] if node.target in (aten.addmm.default, aten.baddbmm.default) else None
        gain = float(node.kwargs.get("beta", 1))  # type: ignore[arg-type]
        weight = weight * float(node.kwargs["alpha"]) if node.kwargs.get("alpha", 1) != 1 else weight  # type: ignore[arg-type]
        ordered = (axes[1 - where], axes[where], axes[2])
        return _Product(operands[1 - where], weight, ordered, name, bias if isinstance(bias, fx.Node) else None, gain)

    def _convolution(self, node: fx.Node) -> _Product | None:
        arguments: tuple[Any, ...] = (*node.args, *_DEFAULTS[len(node.args) :])
        activation, weight, bias, stride, padding, _, groups = arguments
        value = self._value(weight) if isinstance(weight, fx.Node) else None
        if value is None or MATMULS[node.target].startswith("conv_transpose") or groups != 1:
            return None
        if isinstance(bias, fx.Node) and self._value(bias) is None:
            return None
        is_padded = padding not in ("valid", "same") and any(_numbers(padding))
        if is_padded or any(step != 1 for step in _numbers(stride)) or any(size != 1 for size in value.shape[2:]):
            return None
        spatial = [f".{index}" for index in range(value.dim() - 2)]
        batch = ["b"] if activation.meta["val"].dim() == value.dim() else []
        axes = ([*batch, "i", *spatial], ["o", "i"], [*batch, "o", *spatial])
        return _Product(activation, value.flatten(1), axes, _name_of(weight), bias)

    def _weight(self, operand: fx.Node, node: fx.Node) -> torch.Tensor | None:
        """Return a constant operand's value, or the matrix that an operand repeats along the batch; else None."""
        value = self._value(operand)
        source = operand.args[0] if operand.target in EXPANDING else None
        if value is None and isinstance(source, fx.Node) and MATMULS[node.target] == "matmul":
            value = self._value(source)
            expanded = operand.meta["val"].shape[-2:]
            if value is None or value.dim() < 2 or tuple(value.shape[-2:]) != tuple(expanded):
                return None
        if value is None or MATMULS[node.target] != "matmul" or value.dim() < 3:
            return value
        if (
            value.numel() == prod(value.shape[-2:])
            and node.meta["val"].dim() == _other(node, operand).meta["val"].dim()
        ):
            return value.reshape(value.shape[-2:])
        return value

    def _value(self, node: fx.Node) -> torch.Tensor | None:
        """Return the value of a node that depends on constants alone, else None."""
        if node in self._known:
            return self._known[node]
        value = None
        if node.op == "get_attr":
            value = self._constants.get(str(node.target))
        elif node.op == "call_function" and node.all_input_nodes and illegal_target(node.target) is None:
            sources = {source: self._value(source) for source in node.all_input_nodes}
            if all(found is not None for found in sources.values()):
                with torch.no_grad():
                    arguments = fx.map_arg((node.args, node.kwargs), lambda source: sources[source])
                    value = node.target(*arguments[0], **arguments[1])  # type: ignore[operator]
        self._known[node] = value
        return value

    def _constant(self, source: str, value: torch.Tensor, near: fx.Node) -> fx.Node:
        """Return a new constant, named after the one that its value was computed from."""
        name = base = f"{source}_linear"
        count = 1
        while any(name in known for known in (self._constants, self._editor.new_constants)):
            known = self._editor.new_constants.get(name)
            if known is not None and known.shape == value.shape and torch.equal(known, value):
                break
            count += 1
            name = f"{base}_{count}"
        return self._editor.constant(name, value.detach().contiguous(), near)

    def _emit(self, node: fx.Node, product: _Product) -> None:
        activation, weight, result = product.axes
        summed = [axis for axis in activation if axis not in result]
        kept = [axis for axis in activation if axis in result]
        made = [axis for axis in result if axis not in activation]
        sizes = [product.weight.shape[weight.index(axis)] for axis in made]
        matrix = product.weight.permute([weight.index(axis) for axis in (*made, *summed)]).reshape(prod(sizes), -1)
        editor = self._editor

        with editor.before(node):
            value = product.activation
            if [*kept, *summed] != list(activation):
                order = [activation.index(axis) for axis in (*kept, *summed)]
                value = editor.call(aten.permute.default, value, order, source=node)
            if len(summed) > 1:
                value = editor.call(aten.flatten.using_ints, value, len(kept), -1, source=node)
            bias, added = self._bias(product, node)
            constant = self._constant(product.name, matrix, node)
            value = editor.call(aten.linear.default, value, constant, *bias, source=node)
            if not made:
                value = editor.call(aten.squeeze.dim, value, len(kept), source=node)
            if len(made) > 1:
                value = editor.call(aten.unflatten.int, value, len(kept), sizes, source=node)
            if [*kept, *made] != list(result):
                order = [[*kept, *made].index(axis) for axis in result]
                value = editor.call(aten.permute.default, value, order, source=node)
            if added is not None:
                value = editor.call(aten.add.Tensor, value, added, source=node)
        node.replace_all_uses_with(value)

    def _bias(self, product: _Product, node: fx.Node) -> tuple[tuple[fx.Node, ...], fx.Node | None]:
        """Return the layer's bias where it is a constant vector, else the node to add to the result."""
        if product.bias is None:
            return (), None
        value, width = self._value(product.bias), product.weight.shape[-1]
        _, weight, result = product.axes
        is_last = result[-1] in weight  # a bias along other axes of the result is not the layer's
        if MATMULS[node.target].startswith("conv"):
            is_last, width = True, len(product.weight)
        if value is not None and is_last and value.numel() == width and value.shape[-1] == width:
            if product.bias.op == "get_attr" and value.dim() == 1 and product.gain == 1:
                return (product.bias,), None
            return (self._constant(_name_of(product.bias), value.reshape(-1) * product.gain, node),), None
        if product.gain == 1:
            return (), product.bias
        return (), self._editor.call(aten.mul.Tensor, product.bias, product.gain, source=node)


_DEFAULTS = (None, None, None, 1, 0, 1, 1)  # defaults of a convolution's arguments


def _numbers(value: Any) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _other(node: fx.Node, operand: fx.Node) -> fx.Node:
    one, other = factors(node)
    return other if operand is one else one


def _name_of(node: fx.Node) -> str:
    """Return the name of a constant that a value is computed from, else the node's own name."""
    seen, pending = set(), [node]
    while pending:
        found = pending.pop(0)
        if found.op == "get_attr":
            return str(found.target)
        if found not in seen:
            seen.add(found)
            pending.extend(found.all_input_nodes)
    return node.name


def _axes(node: fx.Node, weights: Sequence[torch.Tensor | None]) -> tuple[list[str], list[str], list[str]] | None:
    """Return the axes of both operands of a product and of its result, or None for another kind of product."""
    shapes = [
        value.shape if value is not None else factor.meta["val"].shape
        for value, factor in zip(weights, factors(node), strict=True)
    ]
    one, other = (len(shape) for shape in shapes)
    kind = MATMULS[node.target]
    if kind == "einsum":
        (first, second), result = einsum_letters(str(node.args[0]), [one, other])
        return first, second, result
    if kind == "tensordot":
        return _tensordot_axes(node, one, other)
    if node.target is aten.inner.default:
        first = [*(f"l{index}" for index in range(one - 1)), "k"]
        second = [*(f"r{index}" for index in range(other - 1)), "k"]
        return first, second, [*first[:-1], *second[:-1]]
    if kind not in ("matmul", "linear") or node.target is aten.addbmm.default or min(one, other) < 2:
        return None
    if min(one, other) > 2:
        return None  # a constant matrix for every sample or head would be several layers
    batch = [f"b{index}" for index in range(max(one, other) - 2)]
    first, second = (["m", "k"], ["k", "n"])
    return (
        ([*batch, *first] if one > 2 else first),
        ([*batch, *second] if other > 2 else second),
        [*batch, "m", "n"],
    )


def _tensordot_axes(node: fx.Node, one: int, other: int) -> tuple[list[str], list[str], list[str]]:
    first, second = [f"l{index}" for index in range(one)], [f"r{index}" for index in range(other)]
    left, right = ([int(axis) for axis in dims] for dims in node.args[2:4])  # type: ignore[union-attr, arg-type]
    for index, (mine, theirs) in enumerate(zip(left, right, strict=True)):
        first[mine] = second[theirs] = f"k{index}"
    return first, second, [axis for axis in (*first, *second) if not axis.startswith("k")]


def _is_layer(product: _Product) -> bool:
    """Tell whether a product is one linear layer: each axis of the weight is an output or summed, and occurs once."""
    activation, weight, result = (list(axes) for axes in product.axes)
    if any(len(set(axes)) < len(axes) for axes in (activation, weight, result)) or product.weight.dim() != len(weight):
        return False
    if product.activation.meta["val"].dtype != product.weight.dtype:
        return False
    summed = [axis for axis in activation if axis not in result]
    made = [axis for axis in weight if axis not in activation]
    sizes = dict(zip(activation, product.activation.meta["val"].shape, strict=True))
    return (
        len(summed) > 0
        and all(axis in weight for axis in summed)
        and all(axis in result for axis in made)
        and sorted([*summed, *made]) == sorted(weight)
        and all(dimension_text(sizes[axis]) == product.weight.shape[weight.index(axis)] for axis in summed)
    )
