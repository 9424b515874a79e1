"""round-weights: choose the codes of weights by the error that rounding makes in results."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from qcgraph.facts import (
    CalibrationSet,
    Precision,
    QuantPlan,
    Requantization,
    RoundedWeight,
    RoundedWeights,
)
from qcgraph.ir.memory import release_memory
from qcgraph.ir.program import Program, tensor_digest, used_constants
from qcgraph.ir.quantize import check_integers, names_of_codes, nearest, rounded_activation
from qcgraph.ir.rounding import round_with_feedback, search_scales
from qcgraph.ir.structure import find_sites, weight_names
from qcgraph.passes.calibration._calibration_set import CalibrationBatch, entering
from qcgraph.pipeline import Pass, PassContext
from qcgraph.pipeline.together import rows_together, tokens
from qcgraph.pipeline.workload import Workload

TOKENS = 32768  # tokens of the calibration set that a second moment is averaged over
FORWARDS_PER_ROW = 3.0  # cost of the pass in forwards of the model, for every row of the calibration set, about


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Choose scales and codes of quantized weights by the error that they make in results, not in the weight.

    Over the calibration set, whose activations are quantized as planned, H = E[x x^T] of each layer's input is
    observed. ``search`` finds the scale of each output channel by d H d^T, d its rounding error (the weight half of
    TQ-DiT's Hessian-guided search), and rounds to nearest; ``feedback`` rounds column after column, so that later
    columns compensate the errors of earlier ones (GPTQ, arXiv 2210.17323). Codes and scales become constants that the
    fact RoundedWeights holds until insert-qdq uses them. Without this pass, insert-qdq uses nearest codes, with scales
    that cover the largest weight.

    Attributes:
        method: ``feedback`` or ``search``.
    """

    name: ClassVar[str] = "round-weights"
    requires: ClassVar[tuple[type, ...]] = (CalibrationSet, QuantPlan)
    precedes: ClassVar[tuple[type, ...]] = (Requantization, Precision)
    provides: ClassVar[tuple[type, ...]] = (RoundedWeights,)

    method: Literal["feedback", "search"] = "feedback"

    def forwards(self, work: Workload) -> float:
        return FORWARDS_PER_ROW * work.rows

    def run(self, program: Program, context: PassContext) -> Program:
        check_integers(program.facts[QuantPlan])
        plan = program.facts[QuantPlan].sites
        variant = program.variants[program.computing]
        sites = [site for site in find_sites(variant) if site.name in plan]
        weights = weight_names(variant, sites)
        names = names_of_codes(weights)
        rounded: dict[str, RoundedWeight | None] = {}
        rows = CalibrationBatch.of(program)
        rows = rows.spread(min(rows_together(sites), max(2, TOKENS // tokens(sites))))
        context.progress.note(f"  round-weights: {len(rows)} latents, {len(sites)} sites")
        # Start without the codes that an earlier run of this pass chose.
        earlier = program.facts.without(RoundedWeights)
        constants = used_constants(program.variants.values(), program.constants, earlier)
        for site, value in entering(program, rows, set(plan)):
            weight, quant = constants[weights[site.name]], plan[site.name].weight
            moment = _second_moment(rounded_activation(value, rows.groups, plan[site.name].activation))
            if not (_is_finite(value) and _is_finite(moment)):
                context.refuse(site.name, "rounded to nearest: its activation is not finite on the calibration set")
                rounded[site.name] = None
                continue
            scale = search_scales(weight, moment, quant)
            release_memory()  # frees scales and activations, before feedback allocates matrices as large as H
            if self.method == "feedback":
                codes = round_with_feedback(weight, moment, scale, quant)
            else:
                codes = nearest(weight, scale, quant).to(torch.int8)
            name = f"{names[site.name]}_rounded"
            chosen = RoundedWeight(name, f"{name}_scale", tensor_digest(weight), quant)
            constants[chosen.codes], constants[chosen.scale] = codes, scale
            rounded[site.name] = chosen
            release_memory()  # frees these matrices, before the next layer runs
        return replace(program, constants=constants).with_facts(RoundedWeights(rounded))


def _second_moment(value: torch.Tensor) -> torch.Tensor:
    """Return E[x x^T] of activations [..., C]."""
    flat = value.flatten(0, -2)
    return (flat.t() @ flat).div_(len(flat))


def _is_finite(values: torch.Tensor) -> bool:
    """Return whether all values are finite; `torch.isfinite` of all would take more memory than the values."""
    return bool(torch.isfinite(values.amin()) and torch.isfinite(values.amax()))
