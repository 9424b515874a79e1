"""allocate-bits: give bits to the layers and the steps where they improve the images most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
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
    SiteQuant,
    WeightQuant,
    codes,
)
from qcgraph.ir.program import Program
from qcgraph.ir.quantize import check_integers, quantize_weight
from qcgraph.ir.structure import find_sites, weight_names
from qcgraph.passes.calibration._calibration_set import CalibrationBatch, sensitivities
from qcgraph.passes.quantization._bit_allocation import Layer, allocate
from qcgraph.passes.quantization._scale_search import Found, Histogram, merged, search
from qcgraph.pipeline import Pass, PassContext
from qcgraph.pipeline.options import MOST_SEED, option
from qcgraph.pipeline.workload import Workload
from qcgraph.plan.steps import StepPlan

CHOICES = (4, 6, 8)
# Factor on the error of a weight: the error is the same at every step, and adds up; rounding with feedback makes it
# smaller. Measured on both reference models, at 4 and 6 bits, as the error of the images over the error expected of
# nearest codes whose rounding errors are new at every step.
REPEATED = {"nearest": 6.0, "search": 6.0, "feedback": 1.0}
FORWARDS_PER_ROW = 6.0  # cost of the pass in forwards of the model, for every row of the calibration set, about


@dataclass(frozen=True)
class AllocateBits(Pass):
    """Choose 4, 6 or 8 bits for every weight, and for every activation in every timestep group, within a budget.

    The error of each choice is measured on the calibration set: the squared error of the noise prediction that rounding
    makes, to first order, times the squared coefficient that the sampler gives to the prediction. Such errors add up.
    The budget counts bit operations: multiply-accumulates times the bits of both factors.

    Attributes:
        budget: average bits; 6 allows as many bit operations as w6a6 takes.
        rounding: how weights will be rounded: ``feedback``, ``search`` or ``nearest``.
        groups: whether the bits of an activation may differ between timestep groups.
        seed: the seed of the directions in which the prediction is differentiated.
    """

    name: ClassVar[str] = "allocate-bits"
    requires: ClassVar[tuple[type, ...]] = (CalibrationSet, QuantPlan, Ranges, StepPlan)
    precedes: ClassVar[tuple[type, ...]] = (RoundedWeights, Requantization, AttentionPlan, Precision)

    budget: float = option(
        6.0, least=CHOICES[0], most=CHOICES[-1], hint="6 allows as many bit operations as w6a6 takes"
    )
    rounding: Literal["feedback", "search", "nearest"] = "feedback"
    groups: bool = True
    seed: int = option(0, most=MOST_SEED)

    def forwards(self, work: Workload) -> float:
        return FORWARDS_PER_ROW * work.rows

    def run(self, program: Program, context: PassContext) -> Program:
        check_integers(program.facts[QuantPlan])
        sites = dict(program.facts[QuantPlan].sites)
        observed = _Observed(program, self.seed, context)
        layers = [observed.layer(name, REPEATED[self.rounding]) for name in observed.names]
        if not self.groups:
            layers = [layer.as_one_group() for layer in layers]
        for name, bits in zip(observed.names, allocate(layers, CHOICES, CHOICES, self.budget), strict=True):
            weight = _with_bits(sites[name].weight, bits.weight)
            activation = bits.activation if self.groups else bits.activation * program.facts[StepPlan].group_count
            sites[name] = SiteQuant(observed.activation(name, activation), weight)
        return program.with_facts(QuantPlan(sites))


class _Observed:
    """The error of rounding with each choice of bits, over the calibration set.

    Args:
        program: the program, with a plan of the sites to quantize, at the most bits.
        seed: the seed of the directions.
        context: reports progress.

    Attributes:
        names: the sites of the computing variant.
    """

    def __init__(self, program: Program, seed: int, context: PassContext) -> None:
        self._plan, steps = program.facts[QuantPlan].sites, program.facts[StepPlan]
        computing, ranges = program.computing, program.facts[Ranges].planned
        sites = {site.name: site for site in find_sites(program.variants[computing]) if site.name in self._plan}
        self.names = tuple(sites)
        self._macs = {name: float(site.macs) for name, site in sites.items()}
        members = steps.groups
        running = [[index for index in group if steps.steps[index].variant == computing] for group in members]
        coefficients = np.array([step.update.noise_prediction for step in steps.steps])
        rows = CalibrationBatch.of(program)
        counts = np.maximum(np.bincount(rows.groups.numpy(), minlength=len(members)), 1)
        self._sizes = np.array([float(len(group)) for group in running])
        # The weight of the error of one calibration row in the whole trajectory, for each group.
        self._shares = np.array([np.square(coefficients[group]).sum() for group in running]) / counts
        self._histograms = {name: Histogram([ranges[name].over(group) for group in members]) for name in self.names}
        self._weight_errors = {name: np.zeros((len(members), len(CHOICES))) for name in self.names}
        differences = _differences(program, self._plan, weight_names(program.variants[computing], sites.values()))
        context.progress.note(f"  allocate-bits: {len(rows)} latents, {len(self.names)} sites")
        for item in sensitivities(program, rows, self.names, seed, context.progress):
            self._histograms[item.site].add(item.value, item.weight, item.rows.groups)
            for choice, difference in enumerate(differences[item.site]):
                errors = ((item.value @ difference.t().float()) ** 2 * item.result_weight).flatten(1).sum(dim=1)
                np.add.at(self._weight_errors[item.site][:, choice], item.rows.groups.numpy(), errors.numpy())

    def layer(self, name: str, repeated: float) -> Layer:
        """Return the cost and the error of a site with each choice.

        Args:
            name: the name of the site.
            repeated: the factor on the error of its weight.
        """
        groups = range(len(self._shares))
        errors = [[self._search(name, group, bits).error for bits in CHOICES] for group in groups]
        return Layer(
            macs=self._macs[name] * self._sizes,
            weight_errors=repeated * (self._shares @ self._weight_errors[name]),
            activation_errors=np.array(errors) * self._shares[:, None],
        )

    def activation(self, name: str, bits: tuple[int, ...]) -> ActivationQuant:
        """Return codes whose scales cover the range of every timestep group with its bits."""
        widest = self._codes(name, max(bits))
        mixed = replace(widest, bits=bits if len(set(bits)) > 1 else ())
        found = [self._search(name, group, number) for group, number in enumerate(bits)]
        return merged(mixed, [(item.scale, item.zero_point) for item in found])

    def _search(self, name: str, group: int, bits: int) -> Found:
        return search(self._histograms[name], group, self._codes(name, bits), 1.0, covers=True)

    def _codes(self, name: str, bits: int) -> ActivationQuant:
        planned = self._plan[name].activation
        low, high = codes(bits, symmetric=planned.dtype == "int8")
        return replace(planned, low=low, high=high)


def _differences(
    program: Program, plan: Mapping[str, SiteQuant], weights: Mapping[str, str]
) -> dict[str, list[torch.Tensor]]:
    """Return the error f16[out,in] of each weight, by site, with the nearest codes of each choice of bits."""
    found: dict[str, list[torch.Tensor]] = {}
    for site, name in weights.items():
        weight = program.constants[name]
        quants = (_with_bits(plan[site].weight, bits) for bits in CHOICES)
        rounded = (quantize_weight(weight, quant) for quant in quants)
        found[site] = [(weight - values * scale[:, None]).half() for values, scale in rounded]
    return found


def _with_bits(quant: WeightQuant, bits: int) -> WeightQuant:
    """Return codes of fewer bits."""
    return replace(quant, high=min(2 ** (bits - 1) - 1, quant.high))
