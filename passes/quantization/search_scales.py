"""search-scales: find scales of activations, and activations with two of them, by the effect of errors on images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from qcgraph.facts import (
    ActivationQuant,
    AttentionPlan,
    CalibrationSet,
    Precision,
    QuantPlan,
    Ranges,
    Requantization,
    RoundedWeights,
)
from qcgraph.ir.program import Program
from qcgraph.ir.quantize import check_integers
from qcgraph.ir.structure import find_sites
from qcgraph.passes.calibration._calibration_set import CalibrationBatch, sensitivities
from qcgraph.passes.quantization._scale_search import (
    Halves,
    Histogram,
    score_of_planes,
    search_groups,
)
from qcgraph.pipeline import Pass, PassContext
from qcgraph.pipeline.options import MOST_SEED, option
from qcgraph.pipeline.workload import Workload
from qcgraph.plan.steps import StepPlan

aten = torch.ops.aten
NONLINEAR = (aten.gelu.default, aten.silu.default)  # their negative values are small and many
WORTH = 0.9  # share of the error of a safer or cheaper form that another one has to stay below
HELD = 255  # largest code of a uint8 tensor; an int8 tensor holds half as much
FORWARDS_PER_ROW = 4.5  # cost of the pass in forwards of the model, for every row of the calibration set, about


@dataclass(frozen=True)
class SearchScales(Pass):
    """Find activation scales on the calibration set, and the activations that should have two.

    ``fisher`` weights the error of every value by its effect on the noise prediction (TQ-DiT's Hessian-guided search),
    and an error of clipping by the number of steps that repeat it; ``range`` keeps scales that cover the range. After a
    GELU, negative values are small and many: with few bits they get a step 2^m times finer than positive ones (TQ-DiT's
    multi-region quantization) where this leaves less error. Codes of both regions share one integer tensor; codes of 8
    bits do not fit into it, and would need a second product.

    Searched scales are judged on the half of the samples that the search did not use. Scales that cover the range are
    kept unless searched ones leave much less error there: at 8 bits they rarely do, and single images that need more
    of the range than any sample pay for it.

    Attributes:
        objective: ``fisher`` or ``range``.
        regions: whether activations may have two regions.
        clipping: the factor of errors of clipping; by default the number of computing steps.
        seed: the seed of the directions in which the prediction is differentiated.
    """

    name: ClassVar[str] = "search-scales"
    requires: ClassVar[tuple[type, ...]] = (CalibrationSet, QuantPlan, Ranges, StepPlan)
    precedes: ClassVar[tuple[type, ...]] = (RoundedWeights, Requantization, AttentionPlan, Precision)

    objective: Literal["fisher", "range"] = "fisher"
    regions: bool = True
    clipping: float | None = option(
        None, least=1, most=1e15, hint="1 weighs it like rounding; null once for each computing step"
    )
    seed: int = option(0, most=MOST_SEED)

    def forwards(self, work: Workload) -> float:
        return FORWARDS_PER_ROW * work.rows

    def run(self, program: Program, context: PassContext) -> Program:
        plan, nonlinear = program.facts[QuantPlan], _after_nonlinear(program)
        check_integers(plan)
        steps = program.facts[StepPlan]
        clipping = self.clipping or float(steps.uses(steps.computing))
        found = {}
        for name, halves in self._observed(program, context).items():
            planned, histogram = plan.sites[name].activation, halves.whole()
            groups = [group for group in range(steps.group_count) if bool(histogram.weights[group].any())]
            if len(groups) < steps.group_count:
                missing = ", ".join(str(group) for group in range(steps.group_count) if group not in groups)
                context.refuse(name, f"no sample tells in timestep groups {missing}: scales cover the range")
            covers = self.objective == "range"
            if not covers and (left := halves.held_out(planned, clipping)) > WORTH:
                covers = True
                context.refuse(name, f"scales cover the range: {_left(left)}")
            site = _Activation(histogram, groups, clipping, covers)
            best, reasons = site.best(planned), list[str]()
            if self.regions and name in nonlinear:
                best, *reasons = site.in_regions(planned, best)
            for reason in filter(None, reasons):
                context.refuse(name, reason)
            found[name] = best.quant
        sites = {name: replace(site, activation=found.get(name, site.activation)) for name, site in plan.sites.items()}
        return program.with_facts(QuantPlan(sites))

    def _observed(self, program: Program, context: PassContext) -> dict[str, Halves]:
        """Return the values of every planned site's input, weighted by the effect of their errors, as histograms."""
        steps, ranges = program.facts[StepPlan], program.facts[Ranges]
        names = set(program.facts[QuantPlan].sites)
        limits = {name: [ranges.planned[name].over(members) for members in steps.groups] for name in names}
        found = {name: Halves(limits[name]) for name in sorted(names)}
        rows = CalibrationBatch.of(program)
        context.progress.note(f"  search-scales: {len(rows)} latents, {len(names)} sites")
        gradients = self.objective == "fisher"
        places = torch.arange(len(rows)) // steps.halves  # both halves of guidance of a latent stay together
        for half in range(2):
            part, seed = rows[places % 2 == half], 2 * self.seed + half
            for item in sensitivities(program, part, names, seed, context.progress, gradients=gradients, results=False):
                found[item.site].parts[half].add(item.value, item.weight, item.rows.groups)
        return found


def _left(share: float) -> str:
    """Say how much error searched scales leave on samples that the search did not use."""
    if share == math.inf:
        return "there are too few samples to search on some and to judge on others"
    return f"searched ones leave {share:.0%} of its error on samples that they were not searched on"


@dataclass(frozen=True)
class _ScaleChoice:
    """Codes and their score."""

    quant: ActivationQuant
    error: float

    def share_of(self, other: _ScaleChoice) -> float:
        """Return the error of this choice over the error of another one."""
        return self.error / other.error if other.error else 1.0


@dataclass(frozen=True)
class _Activation:
    """The values of an activation, for the search of its scales.

    Attributes:
        histogram: the histogram of the values.
        groups: the timestep groups that have samples.
        clipping: the factor of errors of clipping.
        covers: whether scales have to cover the range.
    """

    histogram: Histogram
    groups: list[int]
    clipping: float
    covers: bool

    def best(self, quant: ActivationQuant) -> _ScaleChoice:
        """Return the best scale for each timestep group."""
        best, found = search_groups(self.histogram, quant, self.clipping, covers=self.covers)
        return _ScaleChoice(best, sum(found[group].error for group in self.groups))

    def in_regions(self, planned: ActivationQuant, one: _ScaleChoice) -> tuple[_ScaleChoice, str]:
        """Return two regions if they leave sufficiently less error, else one and the reason (TQ-DiT's MRQ)."""
        options = [self.best(option) for option in _two_regions(planned)]
        if not options:
            planes = _ScaleChoice(
                planned, sum(score_of_planes(self.histogram, group, planned) for group in self.groups)
            )
            left = f"a second product would leave {planes.share_of(one):.0%} of the error"
            return one, f"one region: two do not fit a tensor, and {left}"
        two = min(options, key=lambda option: option.error)
        if two.error < WORTH * one.error:
            return two, ""
        return one, f"one region: two would leave {two.share_of(one):.0%} of its error"


def _after_nonlinear(program: Program) -> set[str]:
    """Return the sites whose input an activation function makes."""
    variant = program.variants[program.computing]
    nodes = {node.name: node for node in variant.graph.nodes}
    sites = find_sites(variant)
    return {site.name for site in sites if nodes[site.node].all_input_nodes[0].target in NONLINEAR}


def _two_regions(quant: ActivationQuant) -> Iterator[ActivationQuant]:
    """Yield the codes of two regions of the same bits, for every shift at which they fit one integer tensor.

    One of the bits selects the region, so each region has 2^(bits - 1) - 1 codes besides zero.
    """
    if quant.bits:
        return  # groups of different bits would need different shifts
    levels = (quant.high - quant.low) // 2
    zero = levels if quant.dtype == "uint8" else 0
    held = HELD if quant.dtype == "uint8" else HELD // 2
    shift = 1
    while zero + levels * 2**shift <= held:
        yield replace(quant, low=zero - levels, high=zero + levels * 2**shift, zero_points=(zero,), shift=shift)
        shift += 1
