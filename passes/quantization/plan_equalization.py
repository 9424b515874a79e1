"""plan-equalization: decide the factors that divide the channels of activations, so that they share a range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from qcgraph.facts import CalibrationSet, EqualizationPlan, EqualizedActivation, Ranges, WeightQuant
from qcgraph.ir.program import Program
from qcgraph.ir.quantize import covering_scale
from qcgraph.passes.quantization._channel_ranges import ChannelRanges, observe_channels
from qcgraph.passes.quantization._equalizable import equalizable_activations, only_graph
from qcgraph.pipeline import Pass, PassContext
from qcgraph.pipeline.calibration_budget import CALIBRATION_LIMITS
from qcgraph.pipeline.options import AUTO_HINT, MOST_SEED, MOST_TRAJECTORIES, option
from qcgraph.pipeline.workload import Workload
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class PlanEqualization(Pass):
    """Decide the offsets and factors that even out the ranges of the channels of activations.

    A tensor has one scale, so a channel of small range wastes its bits. With x' = (x - o) / s, W' = W * s and b' = b +
    W * o the result of a linear layer is unchanged; o is the middle of a channel's range, s = max|x - o|^a / max|W|^(1
    - a) (SmoothQuant, arXiv 2211.10438; the shift is that of Outlier Suppression+, arXiv 2304.09145). Planned are the
    activations that linear layers make, because their rows can make x' at no cost: the modulation of adaLN, or the
    values of an attention. Where no such layer makes it, as after GELU, an activation stays as it is. The pass runs in
    full precision, before variants are made; `equalize` obeys the plan.

    Attributes:
        strength: a, from 0, which evens out weights, to 1, which evens out activations; by default, for each activation
            the one of least expected noise.
        weight_bits: the bits of the weights, for the expected noise.
        activation_bits: the bits of the activations, for the expected noise.
        pair_high: the largest sum of the codes of two weights, for the expected noise (see plan-quant).
        trajectories: how many to observe; by default 24.
        seed: the seed of their conditions and noise.
    """

    name: ClassVar[str] = "plan-equalization"
    requires: ClassVar[tuple[type, ...]] = (ModelSpec, StepPlan)
    precedes: ClassVar[tuple[type, ...]] = (Ranges, CalibrationSet)
    provides: ClassVar[tuple[type, ...]] = (EqualizationPlan,)
    samples: ClassVar[bool] = True

    strength: float | None = option(None, most=1, hint="0 evens out the weights, 1 the activations")
    weight_bits: int = option(8, least=2, most=8)
    activation_bits: int = option(8, least=2, most=8)
    pair_high: int | None = option(None, least=1, most=254, hint="128 fits into 16 bits with activations of 8 bits")
    trajectories: int | None = option(None, least=1, most=MOST_TRAJECTORIES, hint=AUTO_HINT)
    seed: int = option(0, most=MOST_SEED)

    def forwards(self, work: Workload) -> float:
        return self._count(work.program) * work.trajectory

    def run(self, program: Program, context: PassContext) -> Program:
        graph = only_graph(program, self.name)
        activations = tuple(
            equalizable_activations(graph, lambda site, reason: context.refuse(site, f"not equalized: {reason}"))
        )
        count = self._count(program)
        context.progress.note(f"  {self.name}: {count} trajectories, {len(activations)} activations")
        channels = observe_channels(program, activations, count, self.seed, context.progress)
        planned: list[EqualizedActivation] = []
        for item in activations:
            observed = channels[item.name]
            if not observed.is_finite:
                context.refuse(item.sites[0], "not equalized: its activation is not finite")
                continue
            factors = self._factors(observed, torch.cat([program.constants[weight] for weight, _ in item.readers]))
            planned.append(EqualizedActivation(item.sites, tuple(observed.middle.tolist()), tuple(factors.tolist())))
        return program.with_facts(EqualizationPlan(tuple(planned)))

    def _count(self, program: Program) -> int:
        return self.trajectories or CALIBRATION_LIMITS[0]  # ranges of channels settle sooner than those of activations

    def _factors(self, observed: ChannelRanges, weight: torch.Tensor) -> torch.Tensor:
        """Return the factors [C] of an activation that weights [out, C] multiply."""
        strengths = STRENGTHS if self.strength is None else (self.strength,)
        largest, columns = observed.half_width, weight.abs().amax(dim=0)
        alive = (largest > 0) & (columns > 0)
        candidates = [torch.ones_like(largest)] if self.strength is None else []
        for strength in strengths:
            factors = torch.where(alive, largest**strength / columns ** (1 - strength), 1.0)
            candidates.append(torch.where(alive, factors / factors[alive].log().mean().exp(), 1.0))
        return min(candidates, key=lambda factors: self._noise(observed, weight, factors))

    def _noise(self, observed: ChannelRanges, weight: torch.Tensor, factors: torch.Tensor) -> float:
        """Return the expected squared error of the result, summed over its channels.

        A rounding error is uniform over a step D and has variance D^2 / 12. Errors of the activation are multiplied by
        the weight; errors of the weight, which has a step for each row, are multiplied by the activation.
        """
        scaled = weight * factors
        step = 2 * (observed.half_width / factors).max() / (2**self.activation_bits - 1)
        rows = covering_scale(scaled, WeightQuant.of_bits(self.weight_bits, self.pair_high))
        power = (observed.power / factors**2).sum()
        return float(step**2 * (scaled**2).sum() + (rows**2).sum() * power) / 12
