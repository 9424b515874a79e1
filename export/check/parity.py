"""Parity of an exported graph with its program, site by site and as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from qcgraph.errors import VerificationError
from qcgraph.export.check.check import NO_NUMBER, Check
from qcgraph.export.check.exported_sites import CutSites
from qcgraph.export.check.reference import Perturbed, Shadowed, SiteReference
from qcgraph.export.run.onnxruntime import OnnxRuntimeRunner
from qcgraph.facts import precision_of
from qcgraph.ir.ops import HALVES
from qcgraph.ir.program import Program
from qcgraph.ir.quantized_sites import QuantizedSite, record
from qcgraph.ir.structure import macs_by_variant
from qcgraph.plan.roles import TensorRole
from qcgraph.plan.spec import GROUP, ROW, ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.cache_state import cached, depths, remember
from qcgraph.sampling.conditions import in_turn
from qcgraph.sampling.runner import step_inputs

FLIPS = 1.5  # allowed distance, as a multiple of the distance that flipped codes cause in the program
# Allowed distance, as a multiple of the program's own rounding error. An evaluation with fewer roundings is at most as
# far from float64 as the program, one with more roundings perhaps twice as far; the distances add up.
ROUNDINGS = 3.0
# Relative error of a runtime's exponentials, tangents, error functions and scaled integer products: a few units in the
# last place of float32, the type of these computations whatever the type around them.
FUNCTIONS = 16 * 2.0**-24
NEAR = 0.5  # share of the limit from which a result is compared with further legal roundings
STANDARD_ERRORS = 3.0  # standard errors that are added to the expected effect of flips over the samples
MAGNIFIED = 64.0  # factor of noise that shows the effect of flips where few samples have one
STEPS = 4  # number of steps that a variant is compared at; two for large models
SAMPLES = 256  # samples per step, fewer for large models; in a small model few samples have a flip
MACS = 10e9  # multiply-accumulates that one run of a step's samples may cost
TOGETHER = 16  # number of sites whose values are held at once
SLOWNESS = {"f16": 8}  # approximate time of PyTorch on a CPU relative to float32; slow types compare fewer samples


@dataclass(frozen=True)
class _Margin:
    """A distance and its limit, both relative L2."""

    distance: float
    limit: float

    @property
    def used(self) -> float:
        """The distance as a share of the limit."""
        return self.distance / self.limit

    @property
    def exceeded(self) -> bool:
        return not self.distance <= self.limit


def check_sites(program: Program, variant: str, sites: Sequence[QuantizedSite], path: Path, *, exact: bool) -> Check:
    """Check that each site of a graph computes the same as in the program, given the same values.

    The graph's result is compared with the site in float64. Where 16-bit values may be rounded before they become
    codes, each choice is legal, and the nearest result counts (see `qcgraph.export.check.reference`). The limit is
    `ROUNDINGS` times the distance of the program from float64, plus the effect of codes on the edge between two and of
    sums in 16 bits.

    Args:
        program: the exported program.
        variant: the name of one of its variants.
        sites: the quantized sites of this variant.
        path: the exported graph of this variant.
        exact: see `qcgraph.export.run.onnxruntime.session_options`.
    """
    try:
        parts = [sites[start : start + TOGETHER] for start in range(0, len(sites), TOGETHER)]
        cuts = [CutSites(program, variant, path, part, exact=exact) for part in parts]
    except VerificationError as missing:
        return Check("site exactness", variant, passed=False, value=NO_NUMBER, limit=FUNCTIONS, detail=str(missing))
    references = {site.name: SiteReference(program, variant, site) for site in sites}
    worst = {site.name: _Margin(0.0, FUNCTIONS) for site in sites}
    for draw, step in enumerate(_steps(program, variant)):
        inputs = _inputs(program, variant, step, 1, np.random.default_rng(draw))
        selectors = {spec.name: inputs[spec.name].numpy() for spec in (GROUP, ROW)}
        for position, values in record(program, variant, inputs, [cut.nodes for cut in cuts]):
            found = cuts[position].run(values, selectors)
            for site in cuts[position].sites:
                reference = references[site.name]
                entering, leaving = (torch.from_numpy(values[name]) for name in (site.entering, site.leaving))
                margin = _site_margin(reference, inputs, entering, leaving, torch.from_numpy(found[site.name]))
                worst[site.name] = max(worst[site.name], margin, key=lambda item: item.used)
    closest = max(worst, key=lambda name: worst[name].used)
    value, limit = worst[closest].distance, worst[closest].limit
    over = [f"{name} {margin.distance:.1e}" for name, margin in worst.items() if margin.exceeded]
    detail = (
        f"relative L2 {value:.1e} at {closest}, of {len(sites)} sites the closest to its limit; expected up to "
        f"{limit:.1e}: {ROUNDINGS:g} times what the program rounds there (against float64), codes on an edge, and sums"
    )
    if over:
        detail += f"; too far: {', '.join(over)}"
    return Check("site exactness", variant, passed=not over, value=value, limit=limit, detail=detail)


def _site_margin(
    reference: SiteReference,
    inputs: Mapping[str, torch.Tensor],
    entering: torch.Tensor,
    leaving: torch.Tensor,
    found: torch.Tensor,
) -> _Margin:
    """Return the distance to the nearest legal result and its limit, in the sample that is closest to its limit."""
    rounding: torch.Tensor | None = None
    best = _Margin(NO_NUMBER, FUNCTIONS)
    for legal in reference.legal_results(entering, inputs):
        norm = _norm(legal.result).clamp(min=torch.finfo(torch.float32).tiny)
        if rounding is None:
            rounding = _norm(leaving.double() - legal.result)
        allowed = ROUNDINGS * rounding + FLIPS * _norm(legal.edges) + _norm(legal.sums)
        limits = allowed / norm + FUNCTIONS
        distances = (_norm(found.double() - legal.result) / norm).nan_to_num(NO_NUMBER, posinf=NO_NUMBER)
        sample = int((distances / limits).argmax())
        best = min(best, _Margin(float(distances[sample]), float(limits[sample])), key=lambda item: item.used)
        if best.used < NEAR:
            break
    return best


def _norm(values: torch.Tensor) -> torch.Tensor:
    """Return the L2 norm of each sample."""
    return values.reshape(len(values), -1).norm(dim=1)


def check_outputs(program: Program, variant: str, runner: OnnxRuntimeRunner, draw: int = 0) -> Iterator[Check]:
    """Check that a whole graph computes the same as the program, up to the roundings that quantization amplifies.

    Given the same codes, the two may be `ROUNDINGS` times as far apart as the program is from float64. But a difference
    of one part in a million flips codes, block after block, until the flips decide the distance. So the program runs
    once more with an error of the size of such roundings in the inputs of its quantizers, and flips may add the
    resulting distance (see `_Flips`).

    Args:
        program: the exported program.
        variant: the name of one of its variants.
        runner: runs the exported graphs.
        draw: the number of the random input.
    """
    found_at: dict[str, list[float]] = {}
    roundings: dict[str, list[float]] = {}
    flips: dict[str, _Flips] = {}
    slowness = SLOWNESS.get(precision_of(program.facts), 1)
    samples = int(np.clip(MACS // slowness // max(1, _macs(program)), 1, SAMPLES // slowness))
    for index, step in enumerate(_steps(program, variant)):
        inputs = _inputs(program, variant, step, samples, np.random.default_rng(1000 * (draw + 1) + index))
        shadowed = Shadowed(program, variant)
        expected, exact = shadowed.outputs(inputs)
        found = runner.run_outputs(variant, {name: value.numpy() for name, value in inputs.items()}, {})
        for name, tensor in expected.items():
            found_at.setdefault(name, []).extend(_distances(found[name].numpy(), tensor.numpy()))
            roundings.setdefault(name, []).extend(_distances(exact[name].numpy(), tensor.numpy()))
            flips.setdefault(name, _Flips())
        off = {name: ROUNDINGS * rounding for name, rounding in shadowed.rounding.items()}
        for magnified in (1.0, MAGNIFIED) if off else ():
            perturbed = Perturbed(program, variant, off, torch.Generator().manual_seed(index), magnified)
            nearby = perturbed.outputs(inputs)
            for name, tensor in expected.items():
                flips[name].add(_distances(nearby[name].numpy(), tensor.numpy()), magnified)
            if not any(item.is_rare for item in flips.values()):
                break
    for name, distances in found_at.items():
        value, limit = _root_mean_square(distances), _limit(roundings[name], flips[name])
        text = (
            f"relative L2 {value:.1e} over {len(distances)} samples, expected up to {limit:.1e}: {ROUNDINGS:g} times "
            f"what the program rounds, {_root_mean_square(roundings[name]):.1e} (against float64)"
        )
        if flips[name].mean_square:
            text += f", and flipped codes, {np.sqrt(flips[name].mean_square):.1e}"
        yield Check(f"parity of {name}", variant, passed=value <= limit, value=value, limit=limit, detail=text)


class _Flips:
    """The distances that flipped codes cause in an output, over samples.

    In a small model few samples have a flip, perhaps none in the program and one in the graph. Noise magnified by a
    factor gives that many times as many flips, so rare flips show their size too. Where flips are frequent, their
    effect grows by less than this factor.
    """

    def __init__(self) -> None:
        self._distances: dict[float, list[float]] = {}

    def add(self, distances: Sequence[float], magnified: float) -> None:
        """Add the relative L2 distances of samples whose quantizers saw a multiple of the noise."""
        self._distances.setdefault(magnified, []).extend(distances)

    @property
    def is_rare(self) -> bool:
        """Whether so few samples flipped that not even `MAGNIFIED` times the noise would flip all of them."""
        distances = self._distances[1.0]
        return bool(np.count_nonzero(distances) * MAGNIFIED < len(distances))

    @property
    def mean_square(self) -> float:
        """The mean square of the distances."""
        return self._moment(2)

    @property
    def variance(self) -> float:
        """The variance of the squared distance of one sample."""
        return max(self._moment(4) - self._moment(2) ** 2, 0.0)

    @property
    def largest(self) -> float:
        """The largest distance of a sample."""
        return max((max(distances) for distances in self._distances.values()), default=0.0)

    def _moment(self, power: int) -> float:
        """Return a moment of the distances, the larger one of both amounts of noise."""
        moments = (np.mean(np.power(values, power)) / times for times, values in self._distances.items())
        return float(max(moments, default=0.0))


def _limit(roundings: Sequence[float], flips: _Flips) -> float:
    """Return the limit of the root mean square of the distances.

    Roundings are alike in all samples. Flips are events: the expected number of them may come, plus some standard
    errors, plus one, because an expected number below one still means that one may come.
    """
    count, rounded = len(roundings), ROUNDINGS**2 * np.square(roundings)
    flipped = flips.mean_square + (STANDARD_ERRORS * np.sqrt(flips.variance * count) + flips.largest**2) / count
    return float(np.sqrt(rounded.mean() + FLIPS**2 * flipped)) + FUNCTIONS


def _steps(program: Program, variant: str) -> list[int]:
    """Return steps of the plan that run a variant or are prepared by it, spread over the plan."""
    plan = program.facts[StepPlan]
    steps = [index for index, step in enumerate(plan.steps) if step.variant == plan.serves(variant)]
    count = min(len(steps), STEPS if _macs(program) < MACS else STEPS // 2)
    return [steps[position] for position in np.linspace(0, len(steps) - 1, count).round().astype(int)]


def _macs(program: Program) -> int:
    """Return the multiply-accumulates of the largest variant for a batch of one; it also computes all cached values."""
    return max(macs_by_variant(program.variants).values())


def _inputs(
    program: Program, variant: str, step: int, samples: int, generator: np.random.Generator
) -> dict[str, torch.Tensor]:
    """Return inputs of one step: noise as the latent, conditions in turn, and cached values that belong to them.

    The number of samples is even where variants take both halves of guidance in one batch.
    """
    spec = program.facts[ModelSpec]
    if program.facts[StepPlan].restores_half:
        samples += samples % HALVES
    latent = torch.from_numpy(generator.standard_normal((samples, *spec.latent_shape), dtype=np.float32))
    return _without_caches(program, variant, step, latent) | _caches(program, variant, step, latent)


def _without_caches(program: Program, variant: str, step: int, latent: torch.Tensor) -> dict[str, torch.Tensor]:
    plan, spec = program.facts[StepPlan], program.facts[ModelSpec]
    conditions = in_turn(len(latent), spec, with_null=True)
    inputs = step_inputs(plan, spec, step, latent.numpy(), conditions)
    return program.prepared(variant, {name: torch.from_numpy(value) for name, value in inputs.items()})


def _caches(program: Program, variant: str, step: int, latent: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the cached values that a variant takes, as the last computing steps before a step leave them."""
    taken = program.interfaces[variant].taken(TensorRole.CACHE)
    if not taken:
        return {}
    plan, ages = program.facts[StepPlan], depths(program.interfaces.values())
    writing = [index for index in range(step) if program.interfaces[plan.steps[index].variant].caches]
    state: dict[tuple[str, int], object] = {}
    for other in writing[-1 - max(ages.values(), default=0) :]:
        name = plan.steps[other].variant
        outputs = program.run(name, _without_caches(program, name, other, latent))
        remember(state, {spec.value: outputs[spec.name] for spec in program.interfaces[name].caches}, ages)
    return {spec.name: cast(torch.Tensor, cached(spec, variant, state)) for spec in taken}


def _distances(found: npt.NDArray[np.floating[Any]], expected: npt.NDArray[np.floating[Any]]) -> list[float]:
    """Return the relative L2 distance of each sample."""
    wide = [values.astype(np.float64).reshape(len(values), -1) for values in (found, expected)]
    norms = np.maximum(np.linalg.norm(wide[1], axis=1), np.finfo(np.float32).tiny)
    distances = np.linalg.norm(wide[0] - wide[1], axis=1) / norms
    return [float(distance) for distance in np.nan_to_num(distances, nan=NO_NUMBER, posinf=NO_NUMBER)]


def _root_mean_square(distances: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(distances))))
