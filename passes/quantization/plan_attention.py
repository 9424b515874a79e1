"""plan-attention: decide how the products of attention are quantized."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from qcgraph.facts import (
    ActivationQuant,
    AttentionPlan,
    AttentionQuant,
    CalibrationSet,
    Precision,
    TimestepGroups,
    codes,
)
from qcgraph.ir.attention import PROBABILITIES, find_attention
from qcgraph.ir.execute import walk
from qcgraph.ir.program import Program
from qcgraph.ir.structure import find_sites
from qcgraph.passes.calibration._calibration_set import (
    CalibrationBatch,
    ValueSensitivity,
    value_sensitivities,
)
from qcgraph.passes.quantization._region_search import ProbabilityScores
from qcgraph.passes.quantization._scale_search import Histogram, search_groups
from qcgraph.pipeline import Pass, PassContext
from qcgraph.pipeline.options import MOST_SEED, option
from qcgraph.pipeline.together import rows_together
from qcgraph.pipeline.workload import Workload
from qcgraph.plan.steps import StepPlan

FORWARDS_PER_ROW = 6.0  # cost of the pass in forwards of the model, for every row of the calibration set, about


@dataclass(frozen=True)
class PlanAttention(Pass):
    """Decide the codes of both products of attention, which has to be split before.

    Queries, keys and values get searched scales, keys and values int8 codes with zero point 0. The probabilities get
    one region, or two with a split for each timestep group (TQ-DiT's MRQ and TGQ): in one integer tensor where the
    codes fit, else in two planes that are each multiplied on their own. A form that costs more is chosen only where it
    leaves less error. Errors are weighted by their effect on the noise prediction.

    On CPUs this gains no time: in ONNX Runtime integer products take 1.0 to 1.4 times as long as attention in floating
    point, in one region, and twice as long in two (tools/attention_products.py).

    Attributes:
        bits: 3 to 8; with two regions, one of the bits selects the region.
        symmetric: int8 queries and probabilities with zero point 0 instead of uint8.
        high: the largest code of keys and values; by default 2^(bits-1) - 1.
        objective: ``fisher`` or ``range``, see search-scales.
        regions: whether probabilities may have two regions.
        seed: the seed of the directions in which the prediction is differentiated.
    """

    name: ClassVar[str] = "plan-attention"
    requires: ClassVar[tuple[type, ...]] = (CalibrationSet, StepPlan, TimestepGroups)
    precedes: ClassVar[tuple[type, ...]] = (AttentionPlan, Precision)
    provides: ClassVar[tuple[type, ...]] = (AttentionPlan,)

    bits: int = option(8, least=3, most=8)
    symmetric: bool = False
    high: int | None = option(None, least=1, most=127)
    objective: Literal["fisher", "range"] = "fisher"
    regions: bool = True
    seed: int = option(0, most=MOST_SEED)

    def forwards(self, work: Workload) -> float:
        return FORWARDS_PER_ROW * work.rows

    def run(self, program: Program, context: PassContext) -> Program:
        return program.with_facts(AttentionPlan(self._decide(program, context)))

    def _decide(self, program: Program, context: PassContext) -> dict[str, AttentionQuant]:
        """Return the codes of every attention that can be quantized."""
        rows, steps = CalibrationBatch.of(program), program.facts[StepPlan]
        ranges = _ranges(program, rows)
        if not ranges:
            context.refuse("attention", "no attention in its products: split-attention goes before")
        usable = {}
        for name, operands in ranges.items():
            if reason := _unusable(operands):
                context.refuse(name, reason)
            else:
                usable[name] = _Statistics(operands, self.bits, symmetric=self.symmetric)
        missing = sorted(set(range(steps.group_count)) - set(rows.groups.tolist()))
        if usable and missing:
            groups = ", ".join(map(str, missing))
            context.refuse("attention", f"no sample tells in timestep groups {groups}: they get the scales of all")
        context.progress.note(f"  plan-attention: {len(rows)} latents, {len(usable)} attentions")
        places = _places(program, usable)
        gradients = self.objective == "fisher"
        for item in value_sensitivities(program, rows, places, self.seed, context.progress, gradients=gradients):
            name, operand = places[item.node]
            usable[name].add(operand, item)
        clipping = float(steps.uses(steps.computing))
        return {name: self._quant(name, statistics, clipping, context) for name, statistics in usable.items()}

    def _quant(self, name: str, statistics: _Statistics, clipping: float, context: PassContext) -> AttentionQuant:
        covers = self.objective == "range"
        found = {}
        for operand, histogram in statistics.histograms.items():
            found[operand], _ = search_groups(histogram, self._codes(operand), clipping, covers=covers)
        probabilities, reason = statistics.probabilities.best(regions=self.regions)
        if reason:
            context.refuse(f"{name}.{PROBABILITIES}", reason)
        return AttentionQuant(**found, probabilities=probabilities)

    def _codes(self, operand: str) -> ActivationQuant:
        """Return the codes of queries, keys or values, without scales."""
        symmetric = self.symmetric or operand != "query"
        low, high = codes(self.bits, symmetric=symmetric)
        if operand != "query":
            high = min(high, self.high or high)
            low = -high
        return ActivationQuant((), (), low, high, "int8" if symmetric else "uint8")


class _Statistics:
    """The values of the operands of one attention, weighted by the effect of their errors.

    Args:
        ranges: the smallest and largest value of each timestep group, f32[G,2], by operand.
        bits: the number of bits of a code of the probabilities.
        symmetric: whether the probabilities are int8.
    """

    def __init__(self, ranges: Mapping[str, torch.Tensor], bits: int, *, symmetric: bool) -> None:
        limits = dict(ranges)
        self.probabilities = ProbabilityScores(limits.pop(PROBABILITIES)[:, 1], bits, symmetric=symmetric)
        self.histograms = {
            operand: Histogram([(low, high) for low, high in ends.tolist()]) for operand, ends in limits.items()
        }

    def add(self, operand: str, item: ValueSensitivity) -> None:
        """Add the values of an operand."""
        target = self.probabilities if operand == PROBABILITIES else self.histograms[operand]
        target.add(item.value, item.weight, item.rows.groups)


def _places(program: Program, names: Collection[str]) -> dict[str, tuple[str, str]]:
    """Return the nodes of the operands of these attentions, each with the attention and the operand."""
    attentions = find_attention(program.variants[program.computing])
    return {
        node.name: (attention.name, operand)
        for attention in attentions
        if attention.name in names
        for operand, node in attention.operands.items()
    }


def _ranges(program: Program, rows: CalibrationBatch) -> dict[str, dict[str, torch.Tensor]]:
    """Return the smallest and largest value of each timestep group, f32[G,2], by attention and operand.

    A group without rows gets the range over all groups.
    """
    variant, groups = program.computing, program.facts[StepPlan].group_count
    places = _places(program, {attention.name for attention in find_attention(program.variants[variant])})
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, operand in places.values():
        found.setdefault(name, {})[operand] = torch.tensor([math.inf, -math.inf]).repeat(groups, 1)
    for batch in rows.split(rows_together(find_sites(program.variants[variant]))):
        for node, values in walk(program, variant, batch.inputs(program, variant)):
            if node.name in places:
                name, operand = places[node.name]
                ends = values[node].flatten(1).aminmax(dim=1)
                found[name][operand][:, 0].scatter_reduce_(0, batch.groups, ends.min, "amin")
                found[name][operand][:, 1].scatter_reduce_(0, batch.groups, ends.max, "amax")
    for limits in (limits for operands in found.values() for limits in operands.values()):
        unseen = limits[:, 0] > limits[:, 1]
        limits[unseen] = torch.stack([limits[:, 0].amin(), limits[:, 1].amax()])
    return found


def _unusable(ranges: Mapping[str, torch.Tensor]) -> str:
    """Return why an attention cannot be quantized, or an empty string."""
    for operand, limits in ranges.items():
        if not bool(limits.isfinite().all()):
            return f"its {operand} is not finite during calibration"
        if not bool(limits.any()):
            return f"its {operand} is zero during calibration"
    return ""
