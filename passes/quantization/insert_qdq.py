"""insert-qdq: quantize and dequantize around the linear layers of the plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from qcgraph.errors import ContractError
from qcgraph.facts import (
    ActivationQuant,
    CalibrationSet,
    LinearNodes,
    Precision,
    QuantizedLinear,
    QuantizedSites,
    QuantPlan,
    Requantization,
    RoundedWeights,
    SiteCorrection,
)
from qcgraph.ir.edit import GraphEditor, with_edits
from qcgraph.ir.graph import Variant
from qcgraph.ir.program import Program
from qcgraph.ir.quantize import names_of_codes, weight_codes
from qcgraph.ir.quantized_sites import operand, sites_of
from qcgraph.ir.structure import Site, find_sites, weight_names
from qcgraph.passes.quantization._quantizers import quantize_pair
from qcgraph.pipeline import Pass, PassContext

ops = torch.ops.qcgraph


@dataclass(frozen=True)
class InsertQDQ(Pass):
    """Insert quantize/dequantize pairs where the quantization plan says so.

    Activations get the scale and zero point of the step's timestep group, selected from a table by the ``group`` input;
    linears that share an activation share the pair. Weights become int8 codes with one scale for each output channel
    (scale = max|w| / largest code, unless round-weights chose other scales). Fitted corrections of the results are
    folded
    in: the scales of the weight become a2 * s, the bias a2 * beta + b2.
    """

    name: ClassVar[str] = "insert-qdq"
    requires: ClassVar[tuple[type, ...]] = (QuantPlan,)
    precedes: ClassVar[tuple[type, ...]] = (Precision,)
    provides: ClassVar[tuple[type, ...]] = (QuantizedSites,)

    def run(self, program: Program, context: PassContext) -> Program:
        plan = program.facts[QuantPlan]
        edits: dict[str, GraphEditor] = {}
        planned = {name: _planned(variant, plan) for name, variant in program.variants.items()}
        weights: dict[str, str] = {}
        for name, sites in planned.items():
            weights |= weight_names(program.variants[name], sites)
        called = names_of_codes(weights)
        quantized: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # made once for each site, shared by the variants
        linears: dict[str, QuantizedLinear] = {}
        for name, sites in planned.items():
            if not sites:
                continue
            editor = edits[name] = GraphEditor(program.variants[name], program.constants, self.name)
            pairs: dict[tuple[fx.Node, ActivationQuant], fx.Node] = {}
            for site in sites:
                linear = self._quantize_site(editor, site, called[site.name], pairs, quantized, program)
                codes, scale = (str(operand(operand(linear, 1), index).target) for index in range(2))
                made = linears.setdefault(
                    site.name, QuantizedLinear(weights[site.name], codes, scale, transposed=False, nodes={})
                )
                quantizer = operand(operand(linear, 0), 0)
                made.nodes[name] = LinearNodes(quantizer.name, product=linear.name, leaving=linear.name)
        served = program.facts.without(CalibrationSet).without(RoundedWeights)
        found = sites_of(program.facts).with_sites(QuantizedSites(linears, {}))
        return with_edits(replace(program, facts=served.with_(found)), edits)

    def _quantize_site(
        self,
        editor: GraphEditor,
        site: Site,
        called: str,
        pairs: dict[tuple[fx.Node, ActivationQuant], fx.Node],
        quantized: dict[str, tuple[torch.Tensor, torch.Tensor]],
        program: Program,
    ) -> fx.Node:
        """Quantize both operands of a linear layer, and return the layer."""
        linear = editor.node(site.node)
        activation, weight = linear.args[0], linear.args[1]
        assert isinstance(activation, fx.Node) and isinstance(weight, fx.Node)
        quant = program.facts[QuantPlan].sites[site.name]
        corrections = program.facts.get(Requantization)
        correction = corrections.sites.get(site.name) if corrections else None
        with editor.before(linear):
            key = (activation, quant.activation)
            if key not in pairs:
                pairs[key] = quantize_pair(editor, activation, quant.activation, f"{site.name}.input", linear)
            if site.name not in quantized:
                codes, scale = weight_codes(program, site.name, str(weight.target))
                quantized[site.name] = codes, scale * torch.tensor(correction.gains) if correction else scale
            dequantized = _weight(editor, called, quantized[site.name], linear)
            bias = _corrected_bias(editor, linear, site.name, correction, program) if correction else linear.args[2:]
        linear.args = (pairs[key], dequantized, *bias)
        return linear


def _planned(variant: Variant, plan: QuantPlan) -> list[Site]:
    """Return the sites of a variant that the plan quantizes.

    Raises:
        ContractError: a planned site cannot be quantized.
    """
    sites = [site for site in find_sites(variant) if site.name in plan.sites]
    for site in sites:
        if site.refusal:
            raise ContractError(
                f"is planned to be quantized and cannot be: {site.refusal}",
                where=site.name,
                hint="run plan-quant on the program as it is, and insert-qdq once",
            )
    return sites


def _weight(editor: GraphEditor, name: str, quantized: tuple[torch.Tensor, torch.Tensor], linear: fx.Node) -> fx.Node:
    codes, scale = quantized
    zeros = torch.zeros(len(scale), dtype=codes.dtype)
    return editor.call(
        ops.dequantize.default,
        editor.constant(f"{name}_codes", codes, linear),
        editor.constant(f"{name}_scale", scale, linear),
        editor.constant(f"{name}_zero_point", zeros, linear),
        0,
        source=linear,
    )


def _corrected_bias(
    editor: GraphEditor, linear: fx.Node, site: str, correction: SiteCorrection, program: Program
) -> tuple[fx.Node]:
    """Return the bias a2 * beta + b2; beta is 0 where the linear has no bias."""
    gains, offsets = torch.tensor(correction.gains), torch.tensor(correction.offsets)
    bias = linear.args[2] if len(linear.args) > 2 else None
    beta = program.constants[str(bias.target)] if isinstance(bias, fx.Node) else torch.zeros_like(gains)
    return (editor.constant(f"{site}.corrected_bias", gains * beta + offsets, linear),)
