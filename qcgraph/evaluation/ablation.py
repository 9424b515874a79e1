"""Taking parts of a compilation out of its program again: what is left shows what each part costs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import fx

from qcgraph.errors import BundleError
from qcgraph.facts import Equalization, Requantization, SiteCorrection, WeightSources
from qcgraph.ir.edit import GraphEditor, with_edits
from qcgraph.ir.program import Program
from qcgraph.ir.quantized_sites import QuantizedSite, operands_of_attention, quantized_sites

ops = torch.ops.qcgraph
NEUTRAL = (1.0, 0.0, 0.0)  # gain, slope and offset that leave the noise prediction as it is, to the last bit


def compensation_tables(program: Program) -> dict[str, float]:
    """The constants that hold the compensation, each with the value at which it does nothing."""
    tables: dict[str, float] = {}
    for variant in program.variants.values():
        for node in variant.graph.nodes:
            if node.target is ops.compensate.default:
                names = (str(_operand(_operand(node, index), 0).target) for index in (2, 3, 4))
                tables |= dict(zip(names, NEUTRAL, strict=True))
    return tables


def without_compensation(program: Program) -> Program:
    """The program with its variance compensation at neutral."""
    neutral = {
        name: torch.full_like(program.constants[name], value) for name, value in compensation_tables(program).items()
    }
    return replace(program, constants={**program.constants, **neutral})


def is_quantized(program: Program) -> bool:
    """Whether any linear of a program is quantized."""
    return any(quantized_sites(variant) for variant in program.variants.values())


def without_quantization(program: Program, model: Program, keep: Collection[str] = ()) -> Program:
    """The program with its quantized linears back in floating point, caches and all else as they are.

    Products of attention are in floating point then, too.

    Args:
        program: a compiled program.
        model: the captured model, which has the weights.
        keep: the sites that stay quantized.

    Raises:
        BundleError: the model lacks a weight; it is not the model that was compiled.
    """
    edits: dict[str, GraphEditor] = {}
    for name, variant in program.variants.items():
        sites = [site for site in quantized_sites(variant) if site.name not in keep]
        attention = operands_of_attention(variant)
        if not sites and not attention:
            continue
        editor = edits[name] = GraphEditor(variant, program.constants, "ablation")
        for site in sites:
            product = editor.node(site.product)
            weight = float_weight(site, model, program).to(product.meta["val"].dtype)
            with editor.before(product):
                constant = editor.constant(f"{site.codes}_float", weight, product)
            product.args = (editor.node(site.entering), constant, *product.args[2:])
            if site.is_rescaled:
                editor.node(site.rescaled).replace_all_uses_with(product)
            _restore_bias(editor, site, product, program)
        for operand in attention:
            dequantize = editor.node(operand)
            dequantize.replace_all_uses_with(_operand(_operand(dequantize, 0), 0))
    return with_edits(program, edits)


def _restore_bias(editor: GraphEditor, site: QuantizedSite, product: fx.Node, program: Program) -> None:
    """Take the correction of a site's result out of its bias: (bias - b2) / a2."""
    correction = _correction(program, site)
    if correction is None:
        return
    adding = product if len(product.args) > 2 else editor.node(site.leaving)  # lowered, the bias is added apart
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
    """The weight that a site's codes were made from, in the layout of the codes: [out,in], or [in,out] when lowered.

    Args:
        site: the site.
        model: the captured model.
        program: the compiled program; where it divided the channels of an activation, its weight is multiplied.

    Raises:
        BundleError: the model has no such weight.
    """
    transposed, shape = site.codes.endswith("_t"), tuple(program.constants[site.codes].shape)
    sources = program.facts.get(WeightSources)
    if sources is not None and site.name not in sources.sites:
        raise BundleError("the program does not say which weight its codes were made from", where=site.name)
    # Bundles of earlier versions do not say it, and name codes after their weight.
    named = site.codes.removesuffix("_t").removesuffix("_codes")
    name = named if sources is None else sources.sites[site.name]
    weight = model.constants.get(name)
    if weight is None or tuple(reversed(weight.shape) if transposed else weight.shape) != shape:
        raise BundleError(f"the model has no weight {name} of this shape", hint="load the model that was compiled")
    equalized = program.facts.get(Equalization)
    if equalized is not None and site.name in equalized.outputs:
        weight = weight / torch.tensor(equalized.outputs[site.name])[:, None]
    if equalized is not None and site.name in equalized.inputs:
        weight = weight * torch.tensor(equalized.inputs[site.name])
    return weight.t() if transposed else weight  # a view: a large model should not be in memory twice


@dataclass(frozen=True)
class Quantizer:
    """The quantization of one activation, as it stands in a program.

    Attributes:
        variant: the graph it is in.
        node: its quantize node, or the one before that divides by a ratio of scales: the activation enters there.
        sites: the sites that it feeds; q, k and v may share one.
        scale: f32[G], or f32[1] for all timestep groups.
        zero_point: as many.
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
        """Scale and zero point of a timestep group."""
        position = group if len(self.scale) > 1 else 0
        return float(self.scale[position]), int(self.zero_point[position])


def activation_quantizers(program: Program) -> tuple[Quantizer, ...]:
    """The quantizers of all activations that enter quantized sites."""
    found = []
    for name, variant in program.variants.items():
        nodes = {node.name: node for node in variant.graph.nodes}
        fed: dict[fx.Node, list[QuantizedSite]] = {}
        for site in quantized_sites(variant):
            fed.setdefault(_operand(_operand(nodes[site.product], 0), 0), []).append(site)
        for quantize, sites in fed.items():
            low, high, *rest = quantize.args[3:]
            shift = rest[0] if quantize.target is ops.quantize_regions.default else 0
            assert isinstance(low, int) and isinstance(high, int) and isinstance(shift, int)
            scale, zero_point = (_selected(_operand(quantize, index), program) for index in (1, 2))
            names, first = tuple(site.name for site in sites), quantize
            if sites[0].is_rescaled:
                first = _operand(quantize, 0)
                scale = scale / _selected(_operand(first, 1), program)
            zero_point = zero_point.expand(len(scale))
            found.append(Quantizer(name, first.name, names, scale, zero_point, low, high, shift))
    return tuple(found)


def dequantized_weight(program: Program, variant: str, site: QuantizedSite) -> torch.Tensor:
    """What a site multiplies with, in the layout of its codes; the gain that corrects its result is taken out."""
    node = next(node for node in program.variants[variant].graph.nodes if node.name == site.product)
    dequantize = _operand(node, 1)
    values = [program.constants[str(_operand(dequantize, index).target)] for index in range(3)]
    result, correction = ops.dequantize(*values, dequantize.args[3]), _correction(program, site)
    assert isinstance(result, torch.Tensor)
    if correction is None:
        return result
    gains = torch.tensor(correction.gains)
    return result / (gains if site.codes.endswith("_t") else gains[:, None])


def _operand(node: fx.Node, index: int) -> fx.Node:
    operand = node.args[index]
    assert isinstance(operand, fx.Node)
    return operand


def _selected(operand: fx.Node, program: Program) -> torch.Tensor:
    """All values of a parameter, whether it is a constant or selected from a table."""
    source = operand if operand.op == "get_attr" else _operand(operand, 0)
    return program.constants[str(source.target)].reshape(-1)
