"""plan-quant: decide which layers are quantized, and with which scales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from qcgraph.facts import (
    FLOAT8,
    LARGEST_FLOAT8,
    ActivationQuant,
    Precision,
    QuantPlan,
    Ranges,
    Requantization,
    RoundedWeights,
    SiteQuant,
    SiteRange,
    WeightQuant,
    codes,
)
from qcgraph.ir.program import Program
from qcgraph.ir.structure import Site, find_sites
from qcgraph.pipeline import Pass, PassContext
from qcgraph.pipeline.options import option
from qcgraph.plan.steps import StepPlan

FLOAT = "fp8"


@dataclass(frozen=True)
class PlanQuant(Pass):
    """Decide which linear layers are quantized, and the activation scales of every timestep group.

    Scales are min-max over the calibrated range of the group. Embedders, adaLN modulation, attention products and the
    final layer stay in floating point. Each site that is not quantized is recorded with its reason, and so is a program
    in which no site is quantized.

    Attributes:
        weight_bits: 2 to 8.
        activation_bits: 2 to 8.
        symmetric: int8 activations with zero point 0 instead of uint8 with a zero point.
        format: ``int``, or ``fp8`` for 8-bit floating point (E4M3) of weights and activations, whatever their bits.
        pair_high: the largest magnitude of the sum of the weight codes of two neighbouring inputs, 2k and 2k + 1;
            targets that add two products in 16 bits need 128.
    """

    name: ClassVar[str] = "plan-quant"
    requires: ClassVar[tuple[type, ...]] = (Ranges, StepPlan)
    precedes: ClassVar[tuple[type, ...]] = (RoundedWeights, Requantization, Precision)
    provides: ClassVar[tuple[type, ...]] = (QuantPlan,)

    weight_bits: int = option(8, least=2, most=8)
    activation_bits: int = option(8, least=2, most=8)
    symmetric: bool = False
    pair_high: int | None = option(None, least=1, most=254, hint="128 fits into 16 bits with activations of 8 bits")
    format: Literal["int", "fp8"] = "int"

    def run(self, program: Program, context: PassContext) -> Program:
        ranges, plan = program.facts[Ranges], program.facts[StepPlan]
        weight = WeightQuant.of_bits(self.weight_bits, self.pair_high)
        if self.format == FLOAT:
            weight = WeightQuant(LARGEST_FLOAT8, FLOAT8)
        sites: dict[str, SiteQuant] = {}
        for variant in program.variants.values():
            for site in find_sites(variant):
                observed = ranges.planned.get(site.name)
                reason = site.refusal or _unusable(observed)
                if reason or observed is None:
                    context.refuse(site.name, reason)
                elif site.name not in sites:
                    sites[site.name] = SiteQuant(self._activation(observed, plan), weight)
        if not sites:
            context.refuse("model", nothing_quantized(refusal.reason for refusal in context.refusals))
        return program.with_facts(QuantPlan(sites))

    def _activation(self, observed: SiteRange, plan: StepPlan) -> ActivationQuant:
        low, high = codes(self.activation_bits, symmetric=self.symmetric)
        dtype, symmetric = "int8" if self.symmetric else "uint8", self.symmetric
        if self.format == FLOAT:
            low, high, dtype, symmetric = -LARGEST_FLOAT8, LARGEST_FLOAT8, FLOAT8, True
        limits = [observed.over(members) for members in plan.groups]
        parameters = [affine_parameters(*ends, low, high, symmetric=symmetric) for ends in limits]
        if len(set(parameters)) == 1:
            parameters = parameters[:1]
        return ActivationQuant(
            scales=tuple(scale for scale, _ in parameters),
            zero_points=tuple(zero for _, zero in parameters),
            low=low,
            high=high,
            dtype=dtype,
        )


def nothing_quantized(reasons: Iterable[str]) -> str:
    """Say that no site is quantized although bits were asked for, and why, with the number of sites for each reason."""
    counts = Counter(reasons)
    if not counts:
        return "nothing is quantized: the model has no layer that multiplies by a constant"
    shares = "; ".join(f"{count}: {reason}" for reason, count in counts.most_common(3))
    return f"nothing is quantized, none of its {sum(counts.values())} sites can be ({shares})"


def why_nothing(program: Program, sites: Iterable[Site]) -> str:
    """Say why nothing in a program is quantized: the reason of plan-quant where it ran, else the reasons of the sites.

    Args:
        program: the program after its passes.
        sites: the sites of the model.
    """
    planned = [record for record in program.history if record.text.startswith(PlanQuant.name) and record.refusals]
    if planned:
        return planned[-1].refusals[-1].reason
    return nothing_quantized(site.refusal for site in sites)


def affine_parameters(minimum: float, maximum: float, low: int, high: int, *, symmetric: bool) -> tuple[float, int]:
    """Return the min-max scale and zero point for which the codes cover the range and zero is a code.

    The scale is positive and exact in float32.
    """
    minimum, maximum = min(float(minimum), 0.0), max(float(maximum), 0.0)
    if symmetric:
        return _positive(max(-minimum, maximum) / high), 0
    scale = _positive((maximum - minimum) / (high - low))
    return scale, int(np.clip(round(low - minimum / scale), low, high))


def _positive(scale: float) -> float:
    """Round a scale to float32; the scale of an activation that is always zero becomes the smallest normal number."""
    return float(max(np.float32(scale), np.finfo(np.float32).tiny))


def _unusable(observed: SiteRange | None) -> str:
    """Return why calibrated ranges cannot give scales, or an empty string."""
    if observed is None:
        return "no computing step reached it during calibration"
    if not observed.is_finite:
        return "its activation is not finite during calibration"
    if not any((*observed.lows, *observed.highs)):
        return "its activation is zero during calibration"
    return ""
