"""The calibration set in use: its latents as inputs of the denoiser, and the inputs of sites while it runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import fx

from qcgraph.facts import CalibrationSet
from qcgraph.ir.execute import walk
from qcgraph.ir.program import Program
from qcgraph.ir.structure import Site, find_sites
from qcgraph.pipeline.calibration_budget import FLOAT_BYTES
from qcgraph.plan.spec import TIMESTEP, ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.calibration import decode_latents
from qcgraph.sampling.conditions import Conditions

DIFFERENTIATED_BYTES = 256 * 2**20  # bytes that all values of rows that are differentiated together may take


def held(conditions: Conditions) -> dict[str, tuple[int | float, ...]]:
    """Return conditions of one number a sample in the form that a `CalibrationSet` holds."""
    return {name: tuple(values.tolist()) for name, values in conditions.values.items()}


@dataclass(frozen=True)
class CalibrationBatch:
    """Inputs of the denoiser, a row for each half of guidance of each item of the set.

    Attributes:
        latents: the latent of each row, f32[R,C,H,W].
        timesteps: the timestep of each row, f32[R].
        conditions: the conditions of the R rows, by name.
        steps: the index of the step of each row, i64[R].
        groups: the timestep group of each row, i64[R].
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    conditions: Mapping[str, torch.Tensor]
    steps: torch.Tensor
    groups: torch.Tensor

    @classmethod
    def of(cls, program: Program) -> CalibrationBatch:
        """Return the calibration set of a program; both halves of an item stand next to each other."""
        found, spec, plan = program.facts[CalibrationSet], program.facts[ModelSpec], program.facts[StepPlan]
        latents = torch.from_numpy(decode_latents(found.latents, spec.latent_shape))
        conditions = {}
        for condition in spec.conditions:
            values = torch.tensor(found.conditions[condition.name]).repeat_interleave(plan.halves, dim=0)
            if plan.halves > 1 and condition.null is not None:
                values[1::2] = condition.null
            conditions[condition.name] = values
        steps = torch.tensor(found.steps).repeat_interleave(plan.halves)
        timesteps = torch.tensor([plan.timesteps[step] for step in steps], dtype=torch.float32)
        groups = torch.tensor([plan.steps[step].group for step in steps])
        return cls(latents.repeat_interleave(plan.halves, dim=0), timesteps, conditions, steps, groups)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: slice | torch.Tensor) -> CalibrationBatch:
        conditions = {name: values[index] for name, values in self.conditions.items()}
        steps, groups = self.steps[index], self.groups[index]
        return CalibrationBatch(self.latents[index], self.timesteps[index], conditions, steps, groups)

    def spread(self, count: int) -> CalibrationBatch:
        """Return ``count`` rows, evenly spread over the steps."""
        order = torch.argsort(self.steps, stable=True)
        return self[order[torch.linspace(0, len(self) - 1, min(count, len(self))).round().long()]]

    def split(self, size: int) -> Iterator[CalibrationBatch]:
        """Yield batches of at most ``size`` rows."""
        for start in range(0, len(self), size):
            yield self[slice(start, start + size)]

    def inputs(self, program: Program, variant: str) -> list[torch.Tensor]:
        """Return the inputs of a variant that takes no cache, in order."""
        latent = program.facts[ModelSpec].latent.name
        named = {latent: self.latents, TIMESTEP.name: self.timesteps, **self.conditions}
        prepared = program.prepared(variant, named)
        return [prepared[name] for name in program.variants[variant].interface.input_names]


def entering(program: Program, rows: CalibrationBatch, sites: set[str]) -> Iterator[tuple[Site, torch.Tensor]]:
    """Yield the input of each of these sites of the computing variant, f32[R,...,C], in the order in which they run.

    A value is freed as soon as no later operation needs it.
    """
    variant = program.computing
    wanted = {site.node: site for site in find_sites(program.variants[variant]) if site.name in sites}
    for node, values in walk(program, variant, rows.inputs(program, variant)):
        site = wanted.get(node.name)
        if site is not None:
            yield site, values[node.all_input_nodes[0]]


@dataclass(frozen=True)
class ValueSensitivity:
    """A value of the graph, and how errors of it change the noise prediction.

    Attributes:
        rows: the rows that ran together.
        node: the name of the node that gives the value.
        value: the value, f32[R,...].
        weight: the sensitivity of each element of the value.
    """

    rows: CalibrationBatch
    node: str
    value: torch.Tensor
    weight: torch.Tensor


def value_sensitivities(
    program: Program,
    rows: CalibrationBatch,
    nodes: Collection[str],
    seed: int,
    progress: Progress,
    *,
    gradients: bool = True,
) -> Iterator[ValueSensitivity]:
    """Yield the values of nodes of the computing variant, and how their errors change the noise prediction.

    With L = <v, eps> and v ~ N(0, I), (dL/dx)^2 is an unbiased estimate of (d eps / dx)^2, summed over the prediction:
    the diagonal of the Gauss-Newton matrix of its squared error.

    Args:
        program: the program in full precision.
        rows: the calibration set.
        nodes: the names of the nodes.
        seed: the seed of v.
        progress: reports the batches.
        gradients: whether to compute sensitivities; if not, all are 1.
    """
    generator = torch.Generator().manual_seed(seed) if gradients else None
    size = max(1, DIFFERENTIATED_BYTES // _bytes_of_values(program.variants[program.computing].graph))
    for batch in progress.track(list(rows.split(size)), "sensitivities"):
        # A generator of its own, which frees its values before the next rows run.
        yield from _of_batch(program, batch, nodes, generator)


def _of_batch(
    program: Program, batch: CalibrationBatch, nodes: Collection[str], generator: torch.Generator | None
) -> Iterator[ValueSensitivity]:
    """Yield the values and sensitivities of rows that run together; without a generator of v, sensitivities are 1."""
    gradients = generator is not None
    with torch.set_grad_enabled(gradients):
        values, prediction = _run(program, batch, nodes, gradients=gradients)
        slopes: dict[str, torch.Tensor | None] = dict.fromkeys(values)
        if gradients and values:
            predicted = prediction[:, : program.facts[ModelSpec].latent_shape[0]]
            loss = (predicted * torch.randn(predicted.shape, generator=generator)).sum()
            found = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
            slopes = dict(zip(values, found, strict=True))
            del found
    for name in tuple(values):  # squared and freed one after the other
        value = values.pop(name).detach()
        yield ValueSensitivity(batch, name, value, _squared(slopes.pop(name), value, gradients))


def _squared(slope: torch.Tensor | None, value: torch.Tensor, wanted: bool) -> torch.Tensor:
    if slope is not None:
        return slope**2
    return torch.zeros_like(value) if wanted else torch.ones_like(value)


def _run(
    program: Program, batch: CalibrationBatch, nodes: Collection[str], *, gradients: bool
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the values of these nodes, in the order in which they run, and the noise prediction."""
    variant = program.computing
    latents = batch.latents.clone().requires_grad_(gradients)
    inputs = replace(batch, latents=latents).inputs(program, variant)
    found: dict[str, torch.Tensor] = {}
    for node, values in walk(program, variant, inputs, gradients=gradients):
        if node.name in nodes:
            found[node.name] = values[node]
    prediction, *_ = values[node]
    return found, prediction


def _bytes_of_values(graph: fx.Graph) -> int:
    """Return the bytes that all values of a graph take together, for one row."""
    values = [node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    moving = [value for value in values if any(not isinstance(dim, int) for dim in value.shape)]
    return FLOAT_BYTES * sum(prod(dim for dim in value.shape if isinstance(dim, int)) for value in moving)


@dataclass(frozen=True)
class Sensitivity:
    """The input of a site, and how errors of it change the noise prediction.

    Attributes:
        rows: the rows that ran together.
        site: the name of the site.
        value: the input of the site, f32[R,...,C].
        weight: the sensitivity of each value of the input.
        result_weight: the sensitivity of each value of the result, f32[R,...,O]; empty if not asked for.
    """

    rows: CalibrationBatch
    site: str
    value: torch.Tensor
    weight: torch.Tensor
    result_weight: torch.Tensor


def sensitivities(
    program: Program,
    rows: CalibrationBatch,
    sites: Collection[str],
    seed: int,
    progress: Progress,
    *,
    gradients: bool = True,
    results: bool = True,
) -> Iterator[Sensitivity]:
    """Yield the input of each of these sites, and how errors of it change the noise prediction.

    See `value_sensitivities`.

    Args:
        program: the program in full precision.
        rows: the calibration set.
        sites: the names of the sites.
        seed: the seed of v.
        progress: reports the batches.
        gradients: whether to compute sensitivities; if not, all are 1.
        results: whether to compute the sensitivities of results too, which take as much memory again.
    """
    nodes = {node.name: node for node in program.variants[program.computing].graph.nodes}
    entered: dict[str, list[str]] = {}
    made: dict[str, str] = {}
    for site in find_sites(program.variants[program.computing]):
        if site.name in sites:
            entered.setdefault(nodes[site.node].all_input_nodes[0].name, []).append(site.name)
            made |= {site.node: site.name} if results else {}
    waiting: dict[str, ValueSensitivity] = {}
    wanted = entered.keys() | made.keys()
    for item in value_sensitivities(program, rows, wanted, seed, progress, gradients=gradients):
        if item.node in made:
            of = waiting.pop(made[item.node])
            yield Sensitivity(of.rows, made[item.node], of.value, of.weight, item.weight)
        for name in entered.get(item.node, ()):
            if results:
                waiting[name] = item
            else:
                yield Sensitivity(item.rows, name, item.value, item.weight, torch.empty(0))
