"""The quantized linears of a variant, found by the fact `QuantizedSites`, with the values that enter and leave them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import fx

from qcgraph.facts import Facts, QuantizedSites
from qcgraph.ir.execute import walk
from qcgraph.ir.graph import DTYPE_NAMES, Variant
from qcgraph.ir.program import Program
from qcgraph.sampling.runner import Array


@dataclass(frozen=True)
class QuantizedSite:
    """A linear in one variant, both of whose operands are dequantized.

    Attributes:
        name: the site.
        product: the node that multiplies.
        codes: the constant with its weight codes.
        transposed: whether the codes are [in,out] instead of [out,in].
        weight: the constant of the captured model that the codes were made from.
        quantizer: the node that makes codes of its activation.
        entering: the node whose floating-point value is quantized, before any division by a ratio of scales.
        divides: the node that divides by this ratio, else the quantizer.
        rescaled: the node that multiplies the product by this ratio, else the product.
        leaving: the node whose value is the result, bias included.
        dtype: the type of the entering and leaving values, ``f32`` or a type of 16 bits.
    """

    name: str
    product: str
    codes: str
    transposed: bool
    weight: str
    quantizer: str
    entering: str
    divides: str
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


def quantized_sites(program: Program, variant: str) -> tuple[QuantizedSite, ...]:
    """Return the quantized linears of a variant, in order."""
    graph = {node.name: node for node in program.variants[variant].graph.nodes}
    return tuple(
        QuantizedSite(
            name=name,
            product=nodes.product,
            codes=linear.codes,
            transposed=linear.transposed,
            weight=linear.weight,
            quantizer=nodes.quantizer,
            entering=operand(graph[nodes.divides or nodes.quantizer], 0).name,
            divides=nodes.divides or nodes.quantizer,
            rescaled=nodes.rescales or nodes.product,
            leaving=nodes.leaving,
            dtype=DTYPE_NAMES[graph[nodes.product].meta["val"].dtype],
        )
        for name, linear, nodes in sites_of(program.facts).linears_of(variant)
    )


def quantized_products(program: Program, variant: str) -> tuple[str, ...]:
    """Return the products of two quantized activations, those of attention, in order."""
    return tuple(name for _, nodes in sites_of(program.facts).attentions_of(variant) for name in nodes.products)


def sites_of(facts: Facts) -> QuantizedSites:
    """Return the quantized sites of a program's facts; there are none without the fact."""
    return facts.get(QuantizedSites) or QuantizedSites({}, {})


def facts_in(facts: Facts, made_of: Mapping[str, str], variants: Mapping[str, Variant]) -> Facts:
    """Return facts whose quantized sites are in these variants, which were made of the present variants.

    Args:
        facts: the facts about the present variants.
        made_of: for each variant, the present one that it was made of; nodes kept their names.
        variants: the new variants.
    """
    sites = facts.get(QuantizedSites)
    if sites is None:
        return facts
    kept = {name: {node.name for node in variants[name].graph.nodes} for name in made_of}
    return facts.with_(sites.in_variants(made_of, kept))


def operand(node: fx.Node, index: int) -> fx.Node:
    """Return the node that is an argument of another node.

    Args:
        node: the node that takes the argument.
        index: the position of the argument.
    """
    found = node.args[index]
    assert isinstance(found, fx.Node)
    return found


def record(
    program: Program, variant: str, inputs: Mapping[str, torch.Tensor], groups: Sequence[Set[str]]
) -> Iterator[tuple[int, dict[str, Array]]]:
    """Yield the values of groups of nodes while PyTorch runs a variant.

    Args:
        program: the program to run.
        variant: the name of one of its variants.
        inputs: the inputs by name.
        groups: sets of node names.

    Yields:
        The position of a group and its values by node, as soon as the group is complete. The values of all groups at
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
