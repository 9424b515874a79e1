"""reference-scales: replace scales that a timestep group selects by a constant scale between two multiplications."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from qcgraph.errors import ContractError
from qcgraph.facts import AttentionNodes, LinearNodes, QuantizedAttention, QuantizedSites
from qcgraph.ir.edit import GraphEditor, with_edits
from qcgraph.ir.graph import Variant, module_path
from qcgraph.ir.program import Program
from qcgraph.ir.quantized_sites import operand, sites_of
from qcgraph.pipeline import Pass, PassContext

aten = torch.ops.aten
ops = torch.ops.qcgraph
# The reasons why an activation cannot have a constant scale, each with its remedy.
ASYMMETRIC = ("its zero points are not 0", "plan-quant{symmetric=true}")
REGIONS = ("it has two regions", "search-scales{regions=false}")
GROUP_BITS = ("it has other bits in other timestep groups", "allocate-bits{groups=false}")
NOT_LOWERED = ("its linear layer is not lowered", "lower-linear before")
NO_PRODUCT = ("it enters what is not a product", "plan-attention{regions=false}")


@dataclass(frozen=True)
class ReferenceScales(Pass):
    """Give quantizers constant scales, and multiply by the ratio of a timestep group's scale to them.

    With the scale s_g of a group, one constant s0 of the activation and r_g = s_g / s0, a product is
    dequantize(quantize(x * (1 / r_g), s0), s0) W * r_g: the group selects 1 / r_g and r_g, and the operations between
    them are the same at every step, the form that TensorRT runs in int8. s0 is the geometric mean of the scales, so
    that r_g stays near 1. An activation with one scale for all groups is left as it is.

    An activation that has a zero point, two regions or other bits in other groups does not have this form; the error
    names all such activations.
    """

    name: ClassVar[str] = "reference-scales"

    def run(self, program: Program, context: PassContext) -> Program:
        sites = sites_of(program.facts)
        found = {
            name: list(_quantized_activations(variant, sites.quantizers_of(name)))
            for name, variant in program.variants.items()
        }
        _check([node for nodes in found.values() for node in nodes], program)
        edits: dict[str, GraphEditor] = {}
        for name, nodes in found.items():
            selected = [node.name for node in nodes if _scale(node).target is ops.select.default]
            if selected:
                editor = edits[name] = GraphEditor(program.variants[name], program.constants, self.name)
                made = [_with_reference(editor, editor.node(node), program) for node in selected]
                rescaled = _rescale_products(editor, {item.dequantize: item.ratio for item in made})
                sites = _moved(sites, name, {item.replaced: item for item in made}, rescaled)
        return with_edits(program, edits).with_facts(sites) if edits else program


@dataclass(frozen=True)
class _Referenced:
    """An activation with a constant scale.

    Attributes:
        replaced: the name of the node that quantized the activation with selected scales.
        quantize: the node that quantizes it now.
        dequantize: the node that dequantizes it.
        divided: the node that divides the activation by the ratio of the scales.
        ratio: the node that selects this ratio.
    """

    replaced: str
    quantize: fx.Node
    dequantize: fx.Node
    divided: fx.Node
    ratio: fx.Node


def reference_scale(scales: torch.Tensor) -> torch.Tensor:
    """Return the geometric mean f32[] of scales f32[G]; exactly that scale where all are equal."""
    wide = scales.double()
    return (wide[0] * (wide / wide[0]).log().mean().exp()).float()


def _quantized_activations(variant: Variant, quantizers: Collection[str]) -> Iterator[fx.Node]:
    """Yield the nodes that dequantize the codes of some quantizers, in order."""
    for node in variant.graph.nodes:
        if node.target is ops.dequantize.default and operand(node, 0).name in quantizers:
            yield node


def _check(dequantized: list[fx.Node], program: Program) -> None:
    """Refuse activations that cannot have a constant scale.

    Raises:
        ContractError: at least one cannot; the message names all of them, each with its reason.
    """
    reasons = {module_path(node) or node.name: reason for node in dequantized if (reason := _reason(node, program))}
    if not reasons:
        return
    remedies = dict.fromkeys(remedy for _, remedy in reasons.values())
    raise ContractError(
        "cannot have constant scales: " + ", ".join(f"{name} ({reason})" for name, (reason, _) in reasons.items()),
        hint=f"plan them with {', '.join(remedies)}",
    )


def _reason(dequantize: fx.Node, program: Program) -> tuple[str, str] | None:
    """Return why an activation cannot have a constant scale, and the remedy; None when it can."""
    quantize, zero_point = (operand(dequantize, index) for index in (0, 2))
    if quantize.target is ops.quantize_regions.default:
        return REGIONS
    if bool(program.constants[_table(zero_point)].float().any()):
        return ASYMMETRIC
    value = operand(quantize, 0)
    if value.target is aten.clamp.Tensor and any(node.target is ops.select.default for node in value.all_input_nodes):
        return GROUP_BITS
    users = {user.target for user in dequantize.users}
    if _scale(dequantize).target is not ops.select.default or users <= {aten.matmul.default}:
        return None
    return NOT_LOWERED if aten.linear.default in users else NO_PRODUCT


def _with_reference(editor: GraphEditor, dequantize: fx.Node, program: Program) -> _Referenced:
    """Quantize and dequantize an activation with the constant scale."""
    quantize, scale, zero_point = (operand(dequantize, index) for index in range(3))
    table, zeros, group = _table(scale), _table(zero_point), operand(scale, 1)
    scales = program.constants[table]
    reference = reference_scale(scales)
    with editor.before(quantize):
        constants = (
            editor.constant(f"{table}_reference", reference, quantize),
            editor.constant(f"{zeros}_reference", program.constants[zeros][0].clone(), quantize),
        )
        ratio, inverse = (
            editor.call(
                ops.select.default, editor.constant(f"{table}_{name}", values, quantize), group, source=quantize
            )
            for name, values in (("ratio", scales / reference), ("inverse", reference / scales))
        )
        divided = editor.call(aten.mul.Tensor, operand(quantize, 0), inverse, source=quantize)
        codes = editor.call(ops.quantize.default, divided, *constants, *quantize.args[3:], source=quantize)
        result = editor.call(ops.dequantize.default, codes, *constants, dequantize.args[3], source=dequantize)
    dequantize.replace_all_uses_with(result)
    return _Referenced(quantize.name, codes, result, divided, ratio)


def _rescale_products(editor: GraphEditor, ratios: Mapping[fx.Node, fx.Node]) -> dict[str, str]:
    """Multiply every product by the r_g of its factors; return the name of this multiplication by product."""
    made = {}
    products = dict.fromkeys(product for dequantized in ratios for product in dequantized.users)
    for product in products:
        factors = [ratios[node] for node in product.args if isinstance(node, fx.Node) and node in ratios]
        users = list(product.users)
        with editor.before(product.next):
            factor = factors[0]
            for other in factors[1:]:
                factor = editor.call(aten.mul.Tensor, factor, other, source=product)
            rescaled = editor.call(aten.mul.Tensor, product, factor, source=product)
        for user in users:
            user.replace_input_with(product, rescaled)
        made[product.name] = rescaled.name
    return made


def _moved(
    sites: QuantizedSites, variant: str, made: Mapping[str, _Referenced], rescaled: Mapping[str, str]
) -> QuantizedSites:
    """Return the sites of a variant after some activations got constant scales and some products were rescaled."""
    linears, attentions = dict(sites.linears), dict(sites.attentions)
    for name, linear, nodes in sites.linears_of(variant):
        if nodes.quantizer in made:
            moved = _moved_linear(nodes, made[nodes.quantizer], rescaled[nodes.product])
            linears[name] = replace(linear, nodes={**linear.nodes, variant: moved})
    for name, placed in sites.attentions_of(variant):
        quantizers = {
            key: tuple(made[node].quantize.name if node in made else node for node in held)
            for key, held in placed.quantizers.items()
        }
        found = AttentionNodes(quantizers, placed.products)
        attentions[name] = QuantizedAttention({**sites.attentions[name].nodes, variant: found})
    return QuantizedSites(linears, attentions)


def _moved_linear(nodes: LinearNodes, item: _Referenced, rescaled: str) -> LinearNodes:
    return LinearNodes(
        quantizer=item.quantize.name,
        product=nodes.product,
        leaving=rescaled if nodes.leaving == nodes.product else nodes.leaving,
        divides=item.divided.name,
        rescales=rescaled,
    )


def _scale(dequantize: fx.Node) -> fx.Node:
    return operand(dequantize, 1)


def _table(parameter: fx.Node) -> str:
    """Return the name of the constant that a parameter is, or is selected from."""
    return str((parameter if parameter.op == "get_attr" else operand(parameter, 0)).target)
