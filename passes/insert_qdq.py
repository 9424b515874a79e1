"""insert-qdq: quantize and dequantize around the linear layers of the plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from qcgraph.facts import ActivationQuant, CalibrationSet, QuantPlan, Requantization, SiteCorrection
from qcgraph.ir.edit import GraphEditor, with_edits
from qcgraph.ir.program import Program
from qcgraph.ir.quantize import weight_codes
from qcgraph.ir.quantizers import quantize_pair
from qcgraph.ir.structure import Site, find_sites
from qcgraph.pipeline import Pass, PassContext

ops = torch.ops.qcgraph


@dataclass(frozen=True)
class InsertQDQ(Pass):
    """Insert quantize/dequantize pairs where the quantization plan says so.

    Activations get the scale and zero point of the step's timestep group, selected from a table by the ``group``
    input; linears that share an activation share the pair. Weights become int8 codes with one scale an output channel
    (scale = max|w| / largest code, unless round-weights chose others). Where corrections of the results were fitted,
    they are folded in: the scales of the weight become a2 * s, the bias a2 * beta + b2.
    """

    name: ClassVar[str] = "insert-qdq"
    requires: ClassVar[tuple[type, ...]] = (QuantPlan,)

    def run(self, program: Program, context: PassContext) -> Program:
        plan = program.facts[QuantPlan]
        edits: dict[str, GraphEditor] = {}
        weights: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # quantized once, shared by the variants
        for name, variant in program.variants.items():
            sites = [site for site in find_sites(variant) if site.name in plan.sites]
            if not sites:
                continue
            editor = edits[name] = GraphEditor(variant, program.constants, self.name)
            pairs: dict[tuple[fx.Node, ActivationQuant], fx.Node] = {}
            for site in sites:
                self._quantize_site(editor, site, plan, pairs, weights, program)
        quantized = with_edits(program, edits)
        return replace(quantized, facts=quantized.facts.without(CalibrationSet))  # has served

    def _quantize_site(
        self,
        editor: GraphEditor,
        site: Site,
        plan: QuantPlan,
        pairs: dict[tuple[fx.Node, ActivationQuant], fx.Node],
        weights: dict[str, tuple[torch.Tensor, torch.Tensor]],
        program: Program,
    ) -> None:
        linear = editor.node(site.node)
        activation, weight = linear.args[0], linear.args[1]
        assert isinstance(activation, fx.Node) and isinstance(weight, fx.Node)
        quant = plan.sites[site.name]
        corrections = program.facts.get(Requantization)
        correction = corrections.sites.get(site.name) if corrections else None
        with editor.before(linear):
            key = (activation, quant.activation)
            if key not in pairs:
                pairs[key] = quantize_pair(editor, activation, quant.activation, f"{site.name}.input", linear)
            name = str(weight.target)
            if name not in weights:
                codes, scale = weight_codes(program.constants, name, quant.weight)
                weights[name] = codes, scale * torch.tensor(correction.gains) if correction else scale
            dequantized = _weight(editor, name, weights[name], linear)
            bias = _corrected_bias(editor, linear, site.name, correction, program) if correction else linear.args[2:]
        linear.args = (pairs[key], dequantized, *bias)


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
    """a2 * beta + b2; beta is 0 where the linear has no bias."""
    gains, offsets = torch.tensor(correction.gains), torch.tensor(correction.offsets)
    bias = linear.args[2] if len(linear.args) > 2 else None
    beta = program.constants[str(bias.target)] if isinstance(bias, fx.Node) else torch.zeros_like(gains)
    return (editor.constant(f"{site}.corrected_bias", gains * beta + offsets, linear),)
