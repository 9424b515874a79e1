"""fit-requantization: fit what a quantized linear's result is to be scaled and shifted by, per output channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from qcgraph.calibration import sample_calibration
from qcgraph.facts import CachePlan, QuantPlan, Reference, Requantization, SiteCorrection, SiteQuant
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.ir.quantize import quantize_weight
from qcgraph.ir.structure import find_blocks, find_sites
from qcgraph.pipeline import Pass, PassContext
from qcgraph.sampling import Array
from qcgraph.spec import ModelSpec
from qcgraph.steps import StepPlan

ops = torch.ops.qcgraph
LEAST_GAIN, MOST_GAIN = 0.5, 2.0  # a regression beyond these has no signal; its channel is left alone


@dataclass(frozen=True)
class FitRequantization(Pass):
    """Fit the quantization part of CacheQuant's decoupled error correction: Y ~ a2 * Y_q + b2 per output channel.

    Y_q is what a linear gives with quantized activation and weight, Y what it gives without, from the same input on
    the trajectory that the plan takes: a2 = Cov(Y, Y_q) / Var(Y_q), b2 = mean(Y) - a2 * mean(Y_q). insert-qdq folds it
    into the weight's scales, a2 * s, and into the bias, a2 * beta + b2, so that it costs nothing when it runs.

    Attributes:
        sites: ``all`` quantized linears, or the ``consumers``: those of the block after a cached range.
    """

    name: ClassVar[str] = "fit-requantization"
    requires: ClassVar[tuple[type, ...]] = (ModelSpec, QuantPlan, Reference, StepPlan)
    provides: ClassVar[tuple[type, ...]] = (Requantization,)

    sites: Literal["all", "consumers"] = "all"

    def run(self, program: Program, context: PassContext) -> Program:
        plan, spec, reference = program.facts[StepPlan], program.facts[ModelSpec], program.facts[Reference]
        chosen = self._chosen(program, context)
        count = reference.trajectories
        observer = _Observer(program, chosen)
        context.progress.note(f"  fit-requantization: {count} trajectories, {len(chosen)} sites")
        if chosen:
            sample_calibration(
                TorchRunner(program, observer),
                plan,
                spec,
                count,
                reference.seed,
                after_update=observer.next_step,
                progress=context.progress,
            )
        return program.with_facts(Requantization(observer.corrections()))

    def _chosen(self, program: Program, context: PassContext) -> dict[str, SiteQuant]:
        planned = program.facts[QuantPlan].sites
        if self.sites == "all":
            return dict(planned)
        cache = program.facts.get(CachePlan)
        after = {value.last_block + 1 for value in cache.values if not value.is_guidance} if cache else set()
        blocks = find_blocks(program.variants[next(iter(program.variants))])
        paths = tuple(f"{blocks[index].path}." for index in after if index < len(blocks))
        found = {name: quant for name, quant in planned.items() if paths and name.startswith(paths)}
        if not found:
            context.refuse("program", "no quantized linear reads a cached value: nothing follows the cached blocks")
        return found


class Regression:
    """Streaming sums of a linear's exact and quantized results, per output channel."""

    def __init__(self, channels: int) -> None:
        self.sums = torch.zeros(4, channels, dtype=torch.float64)  # of Y, Y_q, Y_q^2 and Y * Y_q
        self.count = 0

    def add(self, exact: torch.Tensor, quantized: torch.Tensor) -> None:
        """Count results [..., C] in; single batches are summed in float32, which is a hundred times faster."""
        one, other = exact.flatten(0, -2), quantized.flatten(0, -2)
        self.sums += torch.stack([values.sum(dim=0) for values in (one, other, other * other, one * other)]).double()
        self.count += len(one)

    def correction(self) -> SiteCorrection:
        """Gain and offset of every channel; 1 and the mean error where the result does not vary."""
        mean, mean_quantized, square, cross = self.sums / self.count
        variance, covariance = square - mean_quantized**2, cross - mean * mean_quantized
        gain = covariance / variance
        gain = torch.where((gain > LEAST_GAIN) & (gain < MOST_GAIN), gain, torch.ones_like(gain))
        offset = mean - gain * mean_quantized
        return SiteCorrection(tuple(gain.tolist()), tuple(offset.tolist()))


class _Observer:
    """Computes chosen linears twice from the value that enters them, with and without quantization, bias left out."""

    def __init__(self, program: Program, chosen: Mapping[str, SiteQuant]) -> None:
        self._sites: dict[tuple[str, str], tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._quants, self._plan = chosen, program.facts[StepPlan]
        self._step = 0
        self._found: dict[str, Regression] = {}
        for variant, graph in program.variants.items():
            nodes = {node.name: node for node in graph.graph.nodes}
            for site in find_sites(graph):
                if site.name in chosen:
                    source = nodes[site.node].args[1]
                    assert isinstance(source, fx.Node)
                    weight = program.constants[str(source.target)]
                    codes, scale = quantize_weight(weight, chosen[site.name].weight)
                    self._sites[variant, site.node] = (site.name, weight, codes, scale[:, None])
                    self._found.setdefault(site.name, Regression(len(weight)))

    def next_step(self, index: int, latent: Array) -> Array:
        """Called after every update; the latent goes on as it is."""
        self._step = (index + 1) % len(self._plan)
        return latent

    def __call__(self, variant: str, node: fx.Node, value: torch.Tensor) -> None:
        entry = self._sites.get((variant, node.name))
        if entry is None:
            return
        site, weight, codes, weight_scale = entry
        activation = self._quants[site].activation
        group = self._plan.steps[self._step].group if len(activation.scales) > 1 else 0
        scale = torch.tensor(activation.scales[group])
        zero = torch.tensor(activation.zero_points[group], dtype=getattr(torch, activation.dtype))
        rounded = ops.dequantize(ops.quantize(value, scale, zero, activation.low, activation.high, 0), scale, zero, 0)
        self._found[site].add(value @ weight.t(), rounded @ (codes * weight_scale).t())

    def corrections(self) -> dict[str, SiteCorrection]:
        """What was found, by site; sites that no step ran are left out."""
        return {name: found.correction() for name, found in self._found.items() if found.count}
