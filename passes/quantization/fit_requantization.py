"""fit-requantization: fit a scale and an offset for the result of each quantized linear, per output channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from qcgraph.facts import CachePlan, CalibrationSet, Precision, QuantPlan, Requantization, SiteCorrection, SiteQuant
from qcgraph.ir.memory import release_memory
from qcgraph.ir.program import Program
from qcgraph.ir.quantize import rounded_activation, weight_codes
from qcgraph.ir.structure import find_blocks, find_sites, weight_names
from qcgraph.passes.calibration._calibration_set import CalibrationBatch, entering
from qcgraph.pipeline import Pass, PassContext
from qcgraph.pipeline.together import rows_together, tokens
from qcgraph.pipeline.workload import Workload

TOKENS = 32768  # tokens of the calibration set that a correction, two numbers a channel, is fitted to
HELD_BYTES = 24 * 2**20  # bytes that the widest activation of rows that run together may take; their results take more
LEAST_GAIN, MOST_GAIN = 0.5, 2.0  # a regression beyond these has no signal; its channel keeps the gain 1
FORWARDS_PER_ROW = 3.0  # cost of the pass in forwards of the model, for every row of the calibration set, about


@dataclass(frozen=True)
class FitRequantization(Pass):
    """Fit the quantization part of CacheQuant's decoupled error correction: Y ~ a2 * Y_q + b2 per output channel.

    Y_q is the result of a linear layer with quantized activation and weight, Y its result without quantization, from
    the same inputs of the calibration set: a2 = Cov(Y, Y_q) / Var(Y_q), b2 = mean(Y) - a2 * mean(Y_q). insert-qdq folds
    a2 into the weight's scales, a2 * s, and both into the bias, a2 * beta + b2, so that the correction costs nothing at
    run time.

    Attributes:
        sites: ``all`` quantized linears, or the ``consumers``: the linears of the block after a cached range.
    """

    name: ClassVar[str] = "fit-requantization"
    requires: ClassVar[tuple[type, ...]] = (CalibrationSet, QuantPlan)
    precedes: ClassVar[tuple[type, ...]] = (Precision,)
    provides: ClassVar[tuple[type, ...]] = (Requantization,)

    sites: Literal["all", "consumers"] = "all"

    def forwards(self, work: Workload) -> float:
        return FORWARDS_PER_ROW * work.rows

    def run(self, program: Program, context: PassContext) -> Program:
        chosen = self._chosen(program, context)
        variant = program.variants[program.computing]
        sites = [site for site in find_sites(variant) if site.name in chosen]
        weights = weight_names(variant, sites)
        found = {name: Regression(len(program.constants[weight])) for name, weight in weights.items()}
        rows = CalibrationBatch.of(program).spread(max(2, TOKENS // tokens(sites)))
        context.progress.note(f"  fit-requantization: {len(rows)} latents, {len(chosen)} sites")
        batches = list(rows.split(rows_together(sites, HELD_BYTES))) if chosen else []
        for batch in context.progress.track(batches, "requantization"):
            for site, value in entering(program, batch, set(chosen)):
                quant, weight = chosen[site.name], weights[site.name]
                codes, scale = weight_codes(program, site.name, weight)
                rounded = rounded_activation(value, batch.groups, quant.activation)
                exact = value @ program.constants[weight].t()
                found[site.name].add(exact, rounded @ (codes.float() * scale[:, None]).t())
            release_memory()  # the memory of these rows, before the next ones run
        return program.with_facts(Requantization({name: fit.correction() for name, fit in found.items()}))

    def _chosen(self, program: Program, context: PassContext) -> dict[str, SiteQuant]:
        planned = program.facts[QuantPlan].sites
        if self.sites == "all":
            return dict(planned)
        cache = program.facts.get(CachePlan)
        after = {value.last_block + 1 for value in cache.values if not value.is_guidance} if cache else set()
        blocks = find_blocks(program.variants[program.computing])
        paths = tuple(f"{blocks[index].path}." for index in after if index < len(blocks))
        found = {name: quant for name, quant in planned.items() if paths and name.startswith(paths)}
        if not found:
            context.refuse("program", "no quantized linear reads a cached value: nothing follows the cached blocks")
        return found


class Regression:
    """Streaming sums of a linear's exact and quantized results, per output channel."""

    def __init__(self, channels: int) -> None:
        self.sums = torch.zeros(4, channels, dtype=torch.float64)  # sums of Y, Y_q, Y_q^2 and Y * Y_q
        self.count = 0

    def add(self, exact: torch.Tensor, quantized: torch.Tensor) -> None:
        """Add results [..., C]; single batches are summed in float32, which is a hundred times faster."""
        one, other = exact.flatten(0, -2), quantized.flatten(0, -2)
        sums = [one.sum(dim=0), other.sum(dim=0), (other * other).sum(dim=0), (one * other).sum(dim=0)]
        self.sums += torch.stack(sums).double()
        self.count += len(one)

    def correction(self) -> SiteCorrection:
        """Return the gain and offset of every channel; 1 and the mean error where the result does not vary."""
        mean, mean_quantized, square, cross = self.sums / self.count
        variance, covariance = square - mean_quantized**2, cross - mean * mean_quantized
        gain = covariance / variance
        gain = torch.where((gain > LEAST_GAIN) & (gain < MOST_GAIN), gain, torch.ones_like(gain))
        offset = mean - gain * mean_quantized
        return SiteCorrection(tuple(gain.tolist()), tuple(offset.tolist()))
