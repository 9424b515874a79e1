"""search-scales: find the scales of activations, and whether two of them pay, by what their errors do to images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from qcgraph.calibration_set import Rows, computing_variant, sensitivities
from qcgraph.errors import UsageError
from qcgraph.facts import ActivationQuant, CalibrationSet, QuantPlan, Ranges
from qcgraph.ir.program import Program
from qcgraph.ir.structure import find_sites
from qcgraph.pipeline import Pass, PassContext
from qcgraph.scale_search import Histogram, merged, score_of_planes, search
from qcgraph.steps import StepPlan

aten = torch.ops.aten
NONLINEAR = (aten.gelu.default, aten.silu.default)  # their negative values are small and many
WORTH = 0.9  # of the error of one step; less, since two regions take some more passes over the activation
HELD = 255  # codes that one integer tensor can hold


@dataclass(frozen=True)
class SearchScales(Pass):
    """Find activation scales on the calibration set, and the activations that should have two.

    ``fisher`` weighs the error of every value by what it does to the noise prediction (TQ-DiT's Hessian-guided search),
    and an error of clipping by the number of steps that repeat it; ``range`` keeps scales that cover the range. After
    a GELU, negative values are small and many: with few bits they get a step 2^m times finer than positive ones
    (TQ-DiT's multi-region quantization) where that leaves less error. Codes of both regions share one integer tensor;
    those of 8 bits do not fit into it, and would take a second product.

    Attributes:
        objective: ``fisher`` or ``range``.
        regions: whether activations may have two regions.
        clipping: how often an error of clipping weighs; by default once for each computing step.
        seed: seeds the directions in which the prediction is differentiated.
    """

    name: ClassVar[str] = "search-scales"
    requires: ClassVar[tuple[type, ...]] = (CalibrationSet, QuantPlan, Ranges, StepPlan)

    objective: Literal["fisher", "range"] = "fisher"
    regions: bool = True
    clipping: float | None = None
    seed: int = 0

    def run(self, program: Program, context: PassContext) -> Program:
        if self.clipping is not None and not 1 <= self.clipping < math.inf:
            raise UsageError(f"clipping {self.clipping:g}", hint="1 weighs it like rounding; more is finite")
        plan, nonlinear = program.facts[QuantPlan], _after_nonlinear(program)
        steps = program.facts[StepPlan]
        clipping = self.clipping or float(steps.uses(computing_variant(program)))
        found = {}
        for name, histogram in self._histograms(program, context).items():
            planned = plan.sites[name].activation
            groups = [group for group in range(steps.group_count) if bool(histogram.weights[group].any())]
            if len(groups) < steps.group_count:
                missing = ", ".join(str(group) for group in range(steps.group_count) if group not in groups)
                context.refuse(name, f"no sample tells in timestep groups {missing}: scales cover the range")
            best, error = self._best(histogram, planned, groups, clipping)
            if self.regions and name in nonlinear:
                best, reason = self._with_regions(histogram, planned, groups, clipping, best, error)
                if reason:
                    context.refuse(name, reason)
            found[name] = best
        sites = {name: replace(site, activation=found.get(name, site.activation)) for name, site in plan.sites.items()}
        return program.with_facts(QuantPlan(sites))

    def _histograms(self, program: Program, context: PassContext) -> dict[str, Histogram]:
        """What enters every planned site, weighed by what errors of it do."""
        steps, ranges = program.facts[StepPlan], program.facts[Ranges]
        names = set(program.facts[QuantPlan].sites)
        limits = {name: [ranges.planned[name].over(members) for members in steps.groups] for name in names}
        found = {name: Histogram(limits[name]) for name in sorted(names)}
        rows = Rows.of(program)
        context.progress.note(f"  search-scales: {len(rows)} rows, {len(names)} sites")
        gradients = self.objective == "fisher"
        for item in sensitivities(program, rows, names, self.seed, context.progress, gradients=gradients):
            found[item.site].add(item.value, item.weight, item.rows.groups)
        return found

    def _best(
        self, histogram: Histogram, quant: ActivationQuant, groups: list[int], clipping: float
    ) -> tuple[ActivationQuant, float]:
        """Parameters for every group, and their score over those groups that have samples."""
        covers = self.objective == "range"
        results = [search(histogram, group, quant, clipping, covers=covers) for group in range(len(histogram.weights))]
        error = sum(results[group].error for group in groups)
        return merged(quant, [(result.scale, result.zero_point) for result in results]), error

    def _with_regions(
        self,
        histogram: Histogram,
        planned: ActivationQuant,
        groups: list[int],
        clipping: float,
        best: ActivationQuant,
        error: float,
    ) -> tuple[ActivationQuant, str]:
        """Two regions where they leave enough less error, else one step and the reason."""
        options = [self._best(histogram, option, groups, clipping) for option in _two_regions(planned)]
        if not options:
            planes = sum(score_of_planes(histogram, group, planned) for group in groups)
            share = planes / error if error else 1.0
            second = f"a second product would leave {share:.0%} of the error"
            return best, f"one region: two do not fit a tensor, and {second}"
        regions, least = min(options, key=lambda option: option[1])
        if least < WORTH * error:
            return regions, ""
        return best, f"one region: two would leave {least / error if error else 1.0:.0%} of its error"


def _after_nonlinear(program: Program) -> set[str]:
    """The sites that an activation function feeds."""
    variant = program.variants[computing_variant(program)]
    nodes = {node.name: node for node in variant.graph.nodes}
    sites = find_sites(variant)
    return {site.name for site in sites if nodes[site.node].all_input_nodes[0].target in NONLINEAR}


def _two_regions(quant: ActivationQuant) -> Iterator[ActivationQuant]:
    """The codes of two regions for as many bits, for every shift at which one integer tensor holds them.

    One of the bits says which region it is, so each has 2^(bits - 1) - 1 codes besides zero.
    """
    if quant.bits:
        return  # groups of other bits would need other shifts
    levels = (quant.high - quant.low) // 2
    zero = levels if quant.dtype == "uint8" else 0
    held = HELD if quant.dtype == "uint8" else HELD // 2
    shift = 1
    while zero + levels * 2**shift <= held:
        yield replace(quant, low=zero - levels, high=zero + levels * 2**shift, zero_points=(zero,), shift=shift)
        shift += 1
