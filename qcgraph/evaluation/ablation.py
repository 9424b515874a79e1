"""Take parts of a compilation out of its program again, so that the remaining program shows the cost of each part."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import fx

from qcgraph.errors import BundleError
from qcgraph.facts import Equalization, QuantizedSites, Requantization, SiteCorrection
from qcgraph.ir.edit import GraphEditor, with_edits
from qcgraph.ir.program import Program
from qcgraph.ir.quantized_sites import QuantizedSite, operand, quantized_sites, sites_of

ops = torch.ops.qcgraph
NEUTRAL = (1.0, 0.0, 0.0)  # gain, slope and offset that leave the noise prediction unchanged, to the last bit


def compensation_tables(program: Program) -> dict[str, float]:
    """Return the constants that hold the compensation, each with the value at which it has no effect."""
    tables: dict[str, float] = {}
    for variant in program.variants.values():
        for node in variant.graph.nodes:
            if node.target is ops.compensate.default:
                names = (str(operand(operand(node, index), 0).target) for index in (2, 3, 4))
                tables |= dict(zip(names, NEUTRAL, strict=True))
    return tables


def without_compensation(program: Program) -> Program:
    """Return the program with neutral variance compensation."""
    neutral = {
        name: torch.full_like(program.constants[name], value) for name, value in compensation_tables(program).items()
    }
    return replace(program, constants={**program.constants, **neutral})


def is_quantized(program: Program) -> bool:
    """Return whether any linear layer of a program is quantized."""
    return bool(sites_of(program.facts).linears)


def without_quantization(program: Program, model: Program, keep: Collection[str] = ()) -> Program:
    """Return the program with its quantized linear layers back in floating point, and its caches unchanged.

    Products of attention are then in floating point, too.

    Args:
        program: the compiled program.
        model: the captured model, with the original weights.
        keep: the sites that stay quantized.

    Raises:
        BundleError: the model lacks a weight, so it is not the model that was compiled.
    """
    known = sites_of(program.facts)
    edits: dict[str, GraphEditor] = {}
    for name, variant in program.variants.items():
        sites = [site for site in quantized_sites(program, name) if site.name not in keep]
        attentions = list(known.attentions_of(name))
        if not sites and not attentions:
            continue
        editor = edits[name] = GraphEditor(variant, program.constants, "ablation")
        for site in sites:
            product = editor.node(site.product)
            weight = float_weight(site, model, program).to(product.meta["val"].dtype)
            with editor.before(product):
                constant = editor.constant(f"{site.codes}_float", weight, product)
            product.args = (operand(editor.node(site.divides), 0), constant, *product.args[2:])
            if site.is_rescaled:
                editor.node(site.rescaled).replace_all_uses_with(product)
            _restore_bias(editor, site, product, program)
        for quantizer in [quantizer for _, nodes in attentions for quantizer in nodes.all_quantizers]:
            codes = editor.node(quantizer)
            for dequantize in list(codes.users):
                dequantize.replace_all_uses_with(operand(codes, 0))
    left = {name: linear for name, linear in known.linears.items() if name in keep}
    facts = program.facts.with_(QuantizedSites(left, {})) if edits else program.facts
    return with_edits(replace(program, facts=facts), edits)


def _restore_bias(editor: GraphEditor, site: QuantizedSite, product: fx.Node, program: Program) -> None:
    """Remove the correction of a site's result from its bias: (bias - b2) / a2."""
    correction = _correction(program, site)
    if correction is None:
        return
    adding = product if len(product.args) > 2 else editor.node(site.leaving)  # lowered, another node adds the bias
    bias = next(node for node in adding.all_input_nodes[-1:] if node.op == "get_attr")
    values = program.constants[str(bias.target)]
    gains, offsets = (torch.tensor(part, dtype=torch.float64) for part in (correction.gains, correction.offsets))
    plain = ((values.double() - offsets) / gains).to(values.dtype)
    with editor.before(adding):
        adding.replace_input_with(bias, editor.constant(f"{bias.target}_plain", plain, product))


def _correction(program: Program, site: QuantizedSite) -> SiteCorrection | None:
    corrections = program.facts.get(Requantization)
    return corrections.sites.get(site.name) if corrections else None


def float_weight(site: QuantizedSite, model: Program, program: Program) -> torch.Tensor:
    """Return the float weight behind a site's codes, in their layout: [out,in], or [in,out] when lowered.

    Args:
        site: the site.
        model: the captured model.
        program: the compiled program; where it divides the channels of an activation, the weight is multiplied.

    Raises:
        BundleError: the model has no weight of this name and shape.
    """
    shape = tuple(program.constants[site.codes].shape)
    weight = model.constants.get(site.weight)
    if weight is None or tuple(reversed(weight.shape) if site.transposed else weight.shape) != shape:
        raise BundleError(
            f"the model has no weight {site.weight} of this shape", hint="load the model that was compiled"
        )
    equalized = program.facts.get(Equalization)
    if equalized is not None and site.name in equalized.outputs:
        weight = weight / torch.tensor(equalized.outputs[site.name])[:, None]
    if equalized is not None and site.name in equalized.inputs:
        weight = weight * torch.tensor(equalized.inputs[site.name])
    return weight.t() if site.transposed else weight  # a view, so that a large weight is not in memory twice


@dataclass(frozen=True)
class Quantizer:
    """The quantization of one activation in a program.

    Attributes:
        variant: the variant that contains it.
        node: the node at which the activation enters: the quantize node, or a division by a ratio of scales before it.
        sites: the sites that take the quantized activation; q, k and v may share one.
        scale: f32[G], or f32[1] for all timestep groups.
        zero_point: one for every scale.
        low: smallest code.
        high: largest code.
        shift: see `qcgraph.facts.ActivationQuant`.
    """

    variant: str
    node: str
    sites: tuple[str, ...]
    scale: torch.Tensor
    zero_point: torch.Tensor
    low: int
    high: int
    shift: int = 0

    def parameters(self, group: int) -> tuple[float, int]:
        """Return scale and zero point of a timestep group."""
        position = group if len(self.scale) > 1 else 0
        return float(self.scale[position]), int(self.zero_point[position])


def activation_quantizers(program: Program) -> tuple[Quantizer, ...]:
    """Return the quantizers of all activations that enter quantized sites."""
    found = []
    for name, variant in program.variants.items():
        nodes = {node.name: node for node in variant.graph.nodes}
        fed: dict[str, list[QuantizedSite]] = {}
        for site in quantized_sites(program, name):
            fed.setdefault(site.quantizer, []).append(site)
        for quantizer, sites in fed.items():
            quantize, first = nodes[quantizer], nodes[sites[0].divides]
            low, high, *rest = quantize.args[3:]
            shift = rest[0] if quantize.target is ops.quantize_regions.default else 0
            assert isinstance(low, int) and isinstance(high, int) and isinstance(shift, int)
            scale, zero_point = (_selected(operand(quantize, index), program) for index in (1, 2))
            if sites[0].is_rescaled:
                scale = scale / _selected(operand(first, 1), program)
            names = tuple(site.name for site in sites)
            zero_point = zero_point.expand(len(scale))
            found.append(Quantizer(name, first.name, names, scale, zero_point, low, high, shift))
    return tuple(found)


def dequantized_weight(program: Program, variant: str, site: QuantizedSite) -> torch.Tensor:
    """Return the weight that a site multiplies by, in the layout of its codes, without the gain of its correction."""
    node = next(node for node in program.variants[variant].graph.nodes if node.name == site.product)
    dequantize = operand(node, 1)
    values = [program.constants[str(operand(dequantize, index).target)] for index in range(3)]
    result, correction = ops.dequantize(*values, dequantize.args[3]), _correction(program, site)
    assert isinstance(result, torch.Tensor)
    if correction is None:
        return result
    gains = torch.tensor(correction.gains)
    return result / (gains if site.transposed else gains[:, None])


def _selected(parameter: fx.Node, program: Program) -> torch.Tensor:
    """Return all values of a parameter, whether it is a constant or selected from a table."""
    source = parameter if parameter.op == "get_attr" else operand(parameter, 0)
    return program.constants[str(source.target)].reshape(-1)
