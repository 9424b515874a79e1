"""equalize: let the channels of activations share a range, by moving their differences into the weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from qcgraph.errors import UsageError
from qcgraph.facts import CalibrationSet, Equalization, Ranges
from qcgraph.ir.channels import NotLinearError, Rows, makers
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.graph import copy_graph
from qcgraph.ir.program import Program
from qcgraph.ir.structure import find_sites
from qcgraph.pipeline import Pass, PassContext
from qcgraph.pipeline.effort import affordable, trajectory_macs
from qcgraph.pipeline.options import AUTO_HINT, MOST_SEED, MOST_TRAJECTORIES, option
from qcgraph.pipeline.workload import Workload
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.calibration import sample_calibration

MACS, LIMITS = 0.6e12, (1, 16)  # ranges of channels settle sooner than what scales are searched with
BATCH = 64  # trajectories that run together
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Equalize(Pass):
    """Divide the channels of activations by factors that even out their ranges, and multiply the weights by them.

    A tensor has one scale, so a channel of small range wastes its bits. With x' = (x - o) / s, W' = W * s and b' = b +
    W * o a linear layer gives what it gave; o is the middle of a channel's range, s = max|x - o|^a / max|W|^(1 - a)
    (SmoothQuant, arXiv 2211.10438; the shift is that of Outlier Suppression+, arXiv 2304.09145). Dividing costs
    nothing, because the layers that make the activation do it: the modulation of adaLN, or the values of an attention.
    Where no such layer makes it, as after GELU, it stays as it is. For full precision, before variants are made.

    Attributes:
        strength: a, from 0, which evens out weights, to 1, which evens out activations; by default, for each activation
            the one of least expected noise.
        weight_bits: bits of the weights, for that expectation.
        activation_bits: bits of the activations.
        trajectories: how many are observed; by default as many as a fixed amount of arithmetic allows.
        seed: seeds their labels and noise.
    """

    name: ClassVar[str] = "equalize"
    requires: ClassVar[tuple[type, ...]] = (ModelSpec, StepPlan)
    precedes: ClassVar[tuple[type, ...]] = (Ranges, CalibrationSet)
    provides: ClassVar[tuple[type, ...]] = (Equalization,)
    samples: ClassVar[bool] = True
    restarts: ClassVar[bool] = True

    strength: float | None = option(None, most=1, hint="0 evens out the weights, 1 the activations")
    weight_bits: int = option(8, least=2, most=8)
    activation_bits: int = option(8, least=2, most=8)
    trajectories: int | None = option(None, least=1, most=MOST_TRAJECTORIES, hint=AUTO_HINT)
    seed: int = option(0, most=MOST_SEED)

    def forwards(self, work: Workload) -> float:
        return self._count(work.program, work.computing) * work.trajectory

    def run(self, program: Program, context: PassContext) -> Program:
        if len(program.variants) > 1:
            raise UsageError("equalize takes the one graph of the model", hint="run it before insert-cache")
        inputs = tuple(_inputs(program, context))
        channels = _observe(program, inputs, self._count(program, *program.variants), self.seed, context)
        constants = dict(program.constants)
        found: dict[str, tuple[float, ...]] = {}
        divided: dict[str, torch.Tensor] = {}
        weights = {weight: site for item in inputs for site, (weight, _) in zip(item.sites, item.readers, strict=True)}
        for item in inputs:
            observed = channels[item.name]
            if not observed.is_finite:
                context.refuse(item.sites[0], "not equalized: its activation is not finite")
                continue
            chosen = self._factors(observed, torch.cat([constants[weight] for weight, _ in item.readers]))
            _move(constants, item, observed.middle, chosen)
            found |= dict.fromkeys(item.sites, tuple(chosen.tolist()))
            for rows in item.makers:
                if rows.weight in weights:
                    factors = divided.setdefault(weights[rows.weight], torch.ones(len(constants[rows.weight])))
                    factors[list(rows.rows)] = chosen
        outputs = {site: tuple(factors.tolist()) for site, factors in divided.items()}
        # Copies, because a graph refers to the module that ran it, which holds the weights that are replaced here.
        variants = {name: replace(item, graph=copy_graph(item.graph)) for name, item in program.variants.items()}
        earlier = program.facts.get(Equalization) or Equalization({}, {})
        made = Equalization(_multiplied(earlier.inputs, found), _multiplied(earlier.outputs, outputs))
        return replace(program, variants=variants, constants=constants).with_facts(made)

    def _count(self, program: Program, name: str) -> int:
        return self.trajectories or affordable(trajectory_macs(program, name), MACS, LIMITS)

    def _factors(self, observed: _Channels, weight: torch.Tensor) -> torch.Tensor:
        """The factors [C] of an activation that weights [out, C] multiply."""
        strengths = STRENGTHS if self.strength is None else (self.strength,)
        largest, columns = observed.half_width, weight.abs().amax(dim=0)
        alive = (largest > 0) & (columns > 0)
        candidates = [torch.ones_like(largest)] if self.strength is None else []
        for strength in strengths:
            factors = torch.where(alive, largest**strength / columns ** (1 - strength), 1.0)
            candidates.append(torch.where(alive, factors / factors[alive].log().mean().exp(), 1.0))
        return min(candidates, key=lambda factors: self._noise(observed, weight, factors))

    def _noise(self, observed: _Channels, weight: torch.Tensor, factors: torch.Tensor) -> float:
        """Expected squared error of the result, summed over its channels.

        A rounding error is uniform over a step D and has variance D^2 / 12; those of the activation meet the weight,
        those of the weight, with a step a row, meet the activation.
        """
        scaled = weight * factors
        step = 2 * (observed.half_width / factors).max() / (2**self.activation_bits - 1)
        rows = scaled.abs().amax(dim=1) / (2 ** (self.weight_bits - 1) - 1)
        power = (observed.power / factors**2).sum()
        return float(step**2 * (scaled**2).sum() + (rows**2).sum() * power) / 12


def _multiplied(
    earlier: Mapping[str, tuple[float, ...]], later: Mapping[str, tuple[float, ...]]
) -> dict[str, tuple[float, ...]]:
    """The factors of sites by now, of an earlier run of this pass and of this one."""
    found = {**earlier, **later}
    for site in earlier.keys() & later.keys():
        found[site] = tuple(one * other for one, other in zip(earlier[site], later[site], strict=True))
    return found


@dataclass(frozen=True)
class _Input:
    """An activation that can be divided at no cost.

    Attributes:
        name: its node.
        sites: the linear layers that read it.
        nodes: their nodes.
        readers: weight and bias of each.
        makers: the rows that make it.
    """

    name: str
    sites: tuple[str, ...]
    nodes: tuple[str, ...]
    readers: tuple[tuple[str, str], ...]
    makers: tuple[Rows, ...]


def _inputs(program: Program, context: PassContext) -> Iterator[_Input]:
    """Every activation that quantizable layers read and that can be divided; refuses the others."""
    (variant,) = program.variants.values()
    nodes = {node.name: node for node in variant.graph.nodes}
    reading: dict[str, list[tuple[str, fx.Node]]] = defaultdict(list)
    for site in find_sites(variant):
        if not site.refusal:
            reading[nodes[site.node].all_input_nodes[0].name].append((site.name, nodes[site.node]))
    for name, readers in reading.items():
        layers = [layer for _, layer in readers]
        try:
            if set(nodes[name].users) - set(layers):
                raise NotLinearError("something else reads its activation")
            yield _Input(
                name,
                sites=tuple(site for site, _ in readers),
                nodes=tuple(layer.name for layer in layers),
                readers=tuple(_own_constants(layer) for layer in layers),
                makers=makers(variant, name),
            )
        except NotLinearError as reason:
            context.refuse(readers[0][0], f"not equalized: {reason}")


def _own_constants(layer: fx.Node) -> tuple[str, str]:
    """Weight and bias of a linear layer.

    Raises:
        NotLinearError: it has no bias, or shares one of them.
    """
    constants = layer.all_input_nodes[1:]
    if len(constants) < 2 or any(len(constant.users) > 1 for constant in constants):
        raise NotLinearError("it has no bias to take an offset, or shares its weight")
    return str(constants[0].target), str(constants[1].target)


class _Channels:
    """Streaming ranges and power of the channels of an activation."""

    def __init__(self) -> None:
        self._low = self._high = self._squares = torch.empty(0)
        self._count = 0

    def add(self, value: torch.Tensor) -> None:
        """Count an activation [..., C] in."""
        flat = value.flatten(0, -2)
        low, high, sums = flat.amin(dim=0), flat.amax(dim=0), torch.stack([flat.sum(dim=0), (flat**2).sum(dim=0)])
        first = self._count == 0
        self._low = low if first else torch.minimum(self._low, low)
        self._high = high if first else torch.maximum(self._high, high)
        self._squares = sums.double() if first else self._squares + sums
        self._count += len(flat)

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self._squares).all())

    @property
    def middle(self) -> torch.Tensor:
        """The middle of the range of every channel."""
        return (self._low + self._high) / 2

    @property
    def half_width(self) -> torch.Tensor:
        """Half of the width of every range."""
        return (self._high - self._low) / 2

    @property
    def power(self) -> torch.Tensor:
        """Mean square of every channel about the middle of its range."""
        mean, square = (self._squares / self._count).float()
        return square - 2 * mean * self.middle + self.middle**2


def _observe(
    program: Program, inputs: Sequence[_Input], count: int, seed: int, context: PassContext
) -> Mapping[str, _Channels]:
    """The channels of activations on trajectories on which every step computes."""
    watched = {item.nodes[0]: item.name for item in inputs}
    found = {item.name: _Channels() for item in inputs}

    def observe(_: str, node: fx.Node, value: torch.Tensor) -> None:
        if node.name in watched:
            found[watched[node.name]].add(value)

    context.progress.note(f"  equalize: {count} trajectories, {len(inputs)} activations")
    if inputs:
        runner = TorchRunner(program, observe)
        plan, spec = program.facts[StepPlan], program.facts[ModelSpec]
        sample_calibration(runner, plan, spec, count, seed, batch=BATCH, progress=context.progress)
    return found


def _move(constants: dict[str, torch.Tensor], item: _Input, offset: torch.Tensor, factors: torch.Tensor) -> None:
    """Replace the constants of what makes an activation x, which makes (x - offset) / factors, and of what reads it."""
    for rows in item.makers:
        index = torch.tensor(rows.rows)
        weight, bias = constants[rows.weight].clone(), constants[rows.bias].clone()
        weight[index] /= factors[:, None]
        # Of 1 + gain, what is left after dividing is again 1 + something.
        bias[index] = (bias[index] - (factors - 1 if rows.is_gain else offset)) / factors
        constants[rows.weight], constants[rows.bias] = weight, bias
    for weight_name, bias_name in item.readers:
        constants[bias_name] = constants[bias_name] + constants[weight_name] @ offset
        constants[weight_name] = constants[weight_name] * factors
