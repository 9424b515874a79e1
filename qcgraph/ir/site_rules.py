"""Rules of the fact `QuantizedSites`: it names every quantized product of a program, as it is in the graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import fx

from qcgraph.facts import AttentionNodes, LinearNodes, QuantizedLinear
from qcgraph.ir.program import Program
from qcgraph.ir.quantized_sites import sites_of

aten = torch.ops.aten
ops = torch.ops.qcgraph
QUANTIZES = (ops.quantize.default, ops.quantize_regions.default)
PRODUCTS = (aten.linear.default, aten.matmul.default)

Graph = Mapping[str, fx.Node]  # the nodes of a variant by name


def find_wrong_sites(program: Program) -> Iterator[str]:
    """Yield each difference between the quantized sites of a program and its graphs, with site and node."""
    sites = sites_of(program.facts)
    graphs = {name: {node.name: node for node in variant.graph.nodes} for name, variant in program.variants.items()}
    for site, linear in sites.linears.items():
        yield from (f"quantized site {site}{reason}" for reason in _wrong_site(linear, program, graphs))
    for site, attention in sites.attentions.items():
        for variant, placed in attention.nodes.items():
            for reason in _wrong_attention(placed, graphs.get(variant)):
                yield f"quantized site {site} in {variant}: {reason}"
    for variant, graph in graphs.items():
        unknown = {node.name for node in graph.values() if _is_quantized(node)} - sites.products_of(variant)
        yield from (f"product %{name} in {variant} is quantized, and no site names it" for name in sorted(unknown))


def _is_quantized(node: fx.Node) -> bool:
    """Tell whether a node multiplies two dequantized operands."""
    operands = [value for value in node.args[:2] if isinstance(value, fx.Node)] if node.target in PRODUCTS else []
    return len(operands) == 2 and all(value.target is ops.dequantize.default for value in operands)


def _wrong_site(linear: QuantizedLinear, program: Program, graphs: Mapping[str, Graph]) -> Iterator[str]:
    for name in (linear.codes, linear.scale):
        if name not in program.constants:
            yield f": its constant {name!r} is not there"
    if not linear.nodes:
        yield ": it is in no variant"
    for variant, nodes in linear.nodes.items():
        yield from (f" in {variant}: {reason}" for reason in _wrong_linear(linear, nodes, graphs.get(variant)))


def _wrong_linear(linear: QuantizedLinear, nodes: LinearNodes, graph: Graph | None) -> Iterator[str]:
    if graph is None:
        yield "there is no such variant"
        return
    roles = {
        "quantizer": nodes.quantizer,
        "product": nodes.product,
        "result": nodes.leaving,
        "division by a ratio": nodes.divides,
        "multiplication by a ratio": nodes.rescales,
    }
    gone = [f"its {role} %{name} is gone" for role, name in roles.items() if name and name not in graph]
    if gone:
        yield from gone
        return
    if graph[nodes.quantizer].target not in QUANTIZES:
        yield f"its quantizer %{nodes.quantizer} makes no codes"
    activation, weight = (*graph[nodes.product].args[:2], None, None)[:2]
    if not _dequantizes(activation, nodes.quantizer):
        yield f"its product %{nodes.product} does not take what %{nodes.quantizer} quantizes"
    yield from _wrong_weight(linear, nodes, graph[nodes.product], weight)
    yield from _wrong_ratio(nodes, graph)
    result = nodes.rescales or nodes.product
    if nodes.leaving != result and graph[result] not in graph[nodes.leaving].all_input_nodes:
        yield f"its result %{nodes.leaving} is not made of %{result}"


def _wrong_weight(linear: QuantizedLinear, nodes: LinearNodes, product: fx.Node, weight: object) -> Iterator[str]:
    """Yield the errors in the weight that a product takes."""
    if not isinstance(weight, fx.Node) or weight.target is not ops.dequantize.default:
        yield f"its product %{nodes.product} does not take dequantized codes"
        return
    for role, name, held in zip(("codes", "scale"), (linear.codes, linear.scale), weight.args, strict=False):
        if getattr(held, "op", None) != "get_attr" or getattr(held, "target", None) != name:
            yield f"its product %{nodes.product} does not take the {role} {name!r}"
    target, axis = (aten.matmul.default, 1) if linear.transposed else (aten.linear.default, 0)
    if product.target is not target or weight.args[3:] != (axis,):
        layout = "[in,out]" if linear.transposed else "[out,in]"
        yield f"its product %{nodes.product} does not take codes of the layout {layout}"


def _wrong_ratio(nodes: LinearNodes, graph: Graph) -> Iterator[str]:
    """Yield the errors in the two multiplications around a product with a constant scale."""
    if bool(nodes.divides) != bool(nodes.rescales):
        yield f"its product %{nodes.product} has a ratio of scales on one side alone"
    if nodes.divides and graph[nodes.quantizer].args[:1] != (graph[nodes.divides],):
        yield f"its quantizer %{nodes.quantizer} does not take what %{nodes.divides} divides"
    if nodes.rescales and graph[nodes.product] not in graph[nodes.rescales].all_input_nodes:
        yield f"its ratio %{nodes.rescales} does not multiply the product %{nodes.product}"


def _wrong_attention(nodes: AttentionNodes, graph: Graph | None) -> Iterator[str]:
    if graph is None:
        yield "there is no such variant"
        return
    quantizers = nodes.all_quantizers
    if gone := [name for name in (*quantizers, *nodes.products) if name not in graph]:
        yield f"its node %{gone[0]} is gone"
        return
    for name in quantizers:
        if graph[name].target not in QUANTIZES:
            yield f"its quantizer %{name} makes no codes"
    for name in nodes.products:
        if not all(any(_dequantizes(value, made) for made in quantizers) for value in graph[name].args):
            yield f"its product %{name} takes what none of its quantizers makes"


def _dequantizes(value: object, quantizer: str) -> bool:
    """Tell whether a node dequantizes the codes of a quantizer."""
    codes = value.args[:1] if isinstance(value, fx.Node) and value.target is ops.dequantize.default else ()
    return [getattr(node, "name", "") for node in codes] == [quantizer]
