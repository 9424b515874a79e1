"""The quantized linears of a variant: where they are, and what enters and leaves them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import fx

from qcgraph.ir.execute import walk
from qcgraph.ir.graph import DTYPE_NAMES, Variant
from qcgraph.ir.program import Program
from qcgraph.ir.structure import find_sites
from qcgraph.sampling.runner import Array

aten = torch.ops.aten
ops = torch.ops.qcgraph


@dataclass(frozen=True)
class QuantizedSite:
    """A linear both of whose operands are dequantized.

    Attributes:
        name: the site.
        product: the node that multiplies.
        codes: the constant with its weight codes.
        entering: the node whose floating-point value is quantized; what divides it by a ratio of scales comes after.
        rescaled: the node that multiplies the product by that ratio, else the product.
        leaving: the node whose value is the result, bias included.
        dtype: the type of what enters and leaves, ``f32`` or one of 16 bits.
    """

    name: str
    product: str
    codes: str
    entering: str
    rescaled: str
    leaving: str
    dtype: str

    @property
    def is_rescaled(self) -> bool:
        """Whether it has a constant scale and a ratio for each timestep group (passes/lowering/reference_scales)."""
        return self.rescaled != self.product

    @property
    def has_bias(self) -> bool:
        """Whether a bias is added to the product."""
        return self.leaving != self.rescaled


def quantized_sites(variant: Variant) -> tuple[QuantizedSite, ...]:
    """The quantized linears of a variant, in order."""
    nodes = {node.name: node for node in variant.graph.nodes}
    found = []
    for site in find_sites(variant):
        product = nodes[site.node]
        operands = [argument for argument in product.args[:2] if isinstance(argument, fx.Node)]
        if len(operands) == 2 and _is_activation(operands[0]) and _is_weight(operands[1]):
            quantize, codes = operands[0].args[0], operands[1].args[0]
            assert isinstance(quantize, fx.Node) and isinstance(codes, fx.Node)
            entering = quantize.args[0]
            assert isinstance(entering, fx.Node)
            rescaled = _rescaled(product)
            if rescaled is not product and _is_by_ratio(entering):
                entering = entering.all_input_nodes[0]
            found.append(
                QuantizedSite(
                    site.name,
                    product=site.node,
                    codes=str(codes.target),
                    entering=entering.name,
                    rescaled=rescaled.name,
                    leaving=_with_bias(rescaled).name,
                    dtype=DTYPE_NAMES[product.meta["val"].dtype],
                )
            )
    return tuple(found)


def quantized_products(variant: Variant) -> tuple[str, ...]:
    """The products of two quantized activations, those of attention, in order."""
    return tuple(
        node.name
        for node in variant.graph.nodes
        if node.target is aten.matmul.default
        and all(_is_activation(operand) for operand in node.args if isinstance(operand, fx.Node))
    )


def operands_of_attention(variant: Variant) -> tuple[str, ...]:
    """The activations that were quantized for products of attention: what dequantizes them, in order."""
    products = {site.product for site in quantized_sites(variant)}
    return tuple(
        node.name
        for node in variant.graph.nodes
        if _is_activation(node) and not any(user.name in products for user in node.users)
    )


def _is_activation(node: fx.Node) -> bool:
    """Whether a node dequantizes what is not a constant."""
    codes = node.args[0] if node.target is ops.dequantize.default else None
    return isinstance(codes, fx.Node) and codes.op != "get_attr"


def _is_weight(node: fx.Node) -> bool:
    """Whether a node dequantizes a constant."""
    return node.target is ops.dequantize.default and not _is_activation(node)


def _is_by_ratio(node: fx.Node) -> bool:
    """Whether a node multiplies by a number that the timestep group selects."""
    return node.target is aten.mul.Tensor and node.all_input_nodes[-1].target is ops.select.default


def _rescaled(product: fx.Node) -> fx.Node:
    """The multiplication by a ratio that follows a product, else the product."""
    user = next(iter(product.users))
    return user if len(product.users) == 1 and _is_by_ratio(user) else product


def _with_bias(product: fx.Node) -> fx.Node:
    """The addition of a constant that follows a product, else the product."""
    user = next(iter(product.users))
    if len(product.users) > 1 or user.target is not aten.add.Tensor:
        return product
    return user if any(source.op == "get_attr" for source in user.all_input_nodes) else product


def record(
    program: Program, variant: str, inputs: Mapping[str, torch.Tensor], groups: Sequence[Set[str]]
) -> Iterator[tuple[int, dict[str, Array]]]:
    """The values of groups of nodes while PyTorch runs a variant.

    Args:
        program: what to run.
        variant: which of its variants.
        inputs: by name.
        groups: names of nodes.

    Yields:
        The position of a group and its values by node, as soon as the last of them is there. Those of all groups at
        once would take as much memory as the weights of a large model.
    """
    waiting: list[dict[str, Array]] = [{} for _ in groups]
    ordered = [inputs[name] for name in program.variants[variant].interface.input_names]
    for node, values in walk(program, variant, ordered):
        for index, names in enumerate(groups):
            if node.name in names:
                waiting[index][node.name] = values[node].numpy()
                if len(waiting[index]) == len(names):
                    yield index, waiting[index]
                    waiting[index] = {}
