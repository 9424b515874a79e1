"""The typed facts that passes leave for each other. Plain data, no torch.

A fact is a frozen dataclass of numbers, strings and tuples; a program holds at most one fact of a type. All of them
survive a JSON round trip exactly (see `encode` and `decode`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, TypeVar, cast

from qcgraph.errors import QcgraphError
from qcgraph.spec import ModelSpec
from qcgraph.steps import StepPlan

Fact = TypeVar("Fact")
NO_BLOCK = -1


@dataclass(frozen=True)
class CachedValue:
    """A value that computing steps store and others reuse.

    Attributes:
        name: what its tensor is called in interfaces, ``cache_0`` for example.
        first_block: the first block that is skipped when it is reused; `NO_BLOCK` for the difference of the noise
            predictions of both halves of guidance, with which one half is skipped in all blocks.
        last_block: the last one, inclusive.
        branch: which branch of the (one) block it is the output of, before its gate, counted from 0; -1 for the change
            of the residual stream over all of the blocks.
    """

    name: str
    first_block: int
    last_block: int
    branch: int = -1

    @property
    def is_guidance(self) -> bool:
        """Whether it is the difference of both halves of guidance."""
        return self.first_block == NO_BLOCK

    def __str__(self) -> str:
        if self.is_guidance:
            return "difference of the halves of guidance"
        blocks = f"{self.first_block}..{self.last_block}" if self.branch < 0 else str(self.first_block)
        return f"change over blocks {blocks}" if self.branch < 0 else f"branch {self.branch} of block {blocks}"


@dataclass(frozen=True)
class CachePlan:
    """What is cached, which variants reuse it, and how many computed values of each are kept.

    Attributes:
        values: what computing steps store.
        modes: by the name of a variant that reuses, the names of the values that it reuses; it computes the rest.
        history: how many of the last computed values a forecast may use; 1 is plain reuse.
        draft: the variant of each step to begin with, ``full`` or a mode. The step plan holds what became of it.
    """

    values: tuple[CachedValue, ...]
    modes: dict[str, tuple[str, ...]]
    history: int
    draft: tuple[str, ...]


@dataclass(frozen=True)
class SchedulePlan:
    """How the step plan came to its variants, and what they are expected to do.

    Attributes:
        strategy: ``joint`` or ``dps``.
        costs: what one run of each variant costs: milliseconds where measured, else multiply-accumulates.
        measured: whether costs are measured on the target.
        spent: cost of sampling relative to computing every step.
        expected_error: mean squared error of the final latent that the measured errors of skipped steps add up to.
        rehearsed_error: the same, of trajectories sampled under this schedule.
    """

    strategy: str
    costs: dict[str, float]
    measured: bool
    spent: float
    expected_error: float | None
    rehearsed_error: float | None


@dataclass(frozen=True)
class Rehearsed:
    """What reusing does to the final latents: their mean squared error against those of steps that all compute.

    Attributes:
        error: under the step plan.
        even_error: under a schedule of the same cost whose computing steps are evenly spaced.
        trajectories: how many were sampled; 0 where nothing reuses.
    """

    error: float
    even_error: float
    trajectories: int


@dataclass(frozen=True)
class SiteRange:
    """Range statistics of the activation that enters one site, one entry for every step that runs the site.

    Attributes:
        steps: the indices of those steps, rising.
        lows: smallest value per step.
        highs: largest value per step.
        mean_squares: mean of the squares per step.
    """

    steps: tuple[int, ...]
    lows: tuple[float, ...]
    highs: tuple[float, ...]
    mean_squares: tuple[float, ...]

    @property
    def widths(self) -> tuple[float, ...]:
        """Largest less smallest value, per step."""
        return tuple(high - low for low, high in zip(self.lows, self.highs, strict=True))

    def over(self, steps: Collection[int]) -> tuple[float, float]:
        """Smallest and largest value over some steps; over all where none of them runs the site."""
        places = [place for place, step in enumerate(self.steps) if step in steps] or range(len(self.steps))
        return min(self.lows[place] for place in places), max(self.highs[place] for place in places)

    @property
    def is_finite(self) -> bool:
        """Whether no step saw an infinity or a NaN."""
        return all(math.isfinite(value) for value in (*self.lows, *self.highs, *self.mean_squares))


@dataclass(frozen=True)
class Ranges:
    """Calibrated activation ranges.

    Attributes:
        planned: per site, ranges on the trajectory that the step plan takes (cached when it caches).
        full: per site, ranges on the full-precision trajectory that computes every step.
        trajectories: how many trajectories were observed.
    """

    planned: dict[str, SiteRange]
    full: dict[str, SiteRange]
    trajectories: int

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of the plan that run any site, rising."""
        return tuple(sorted({step for site in self.planned.values() for step in site.steps}))

    def change(self, site: str) -> float:
        """How much the range of a site differs between the two trajectories at most, relative to full precision."""
        full = dict(zip(self.full[site].steps, self.full[site].widths, strict=True))
        planned = zip(self.planned[site].steps, self.planned[site].widths, strict=True)
        return max(abs(width - full[step]) / full[step] if full[step] > 0 else 0.0 for step, width in planned)


@dataclass(frozen=True)
class Reference:
    """Statistics of the full-precision latent after every sampler update, over samples and positions.

    Attributes:
        means: per step and channel.
        deviations: standard deviation per step and channel.
        seed: the seed of the noise and of the labels the trajectories started from.
        trajectories: how many trajectories there were.
    """

    means: tuple[tuple[float, ...], ...]
    deviations: tuple[tuple[float, ...], ...]
    seed: int
    trajectories: int


@dataclass(frozen=True)
class CalibrationSet:
    """The inputs that quantization is decided on: latents that computing steps of the plan are given.

    Attributes:
        method: how they were selected from the pool.
        pool: how many there were to select from.
        steps: the index of the step of each.
        labels: the class of each.
        latents: f32[N,C,H,W], little-endian, as base64.
    """

    method: str
    pool: int
    steps: tuple[int, ...]
    labels: tuple[int, ...]
    latents: str


@dataclass(frozen=True)
class Equalization:
    """What the channels of activations were divided by, so that they share a range.

    Attributes:
        inputs: per site (by name), the factors of what enters it, with which its weight was multiplied.
        outputs: the factors by which the rows of a site were divided, where its result makes such an activation.
    """

    inputs: dict[str, tuple[float, ...]]
    outputs: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class TimestepGroups:
    """Groups of neighbouring steps that share activation scales.

    Attributes:
        lower_timesteps: the smallest timestep value of each group, falling; group 0 is the noisiest.
    """

    lower_timesteps: tuple[float, ...]


FLOAT8 = "float8_e4m3fn"
LARGEST_FLOAT8 = 448


def codes(bits: int, *, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest code: ``-2^(b-1) .. 2^(b-1)-1`` when symmetric, else ``0 .. 2^b-1``."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


@dataclass(frozen=True)
class ActivationQuant:
    """Affine quantization of an activation: ``q = clamp(round(x / scale) + zero_point, low, high)``.

    Attributes:
        scales: one scale a timestep group, or a single one for all groups.
        zero_points: as many as there are scales.
        low: smallest code.
        high: largest code.
        dtype: ``uint8``, ``int8`` or ``float8_e4m3fn``; codes of the last are floating point and have no zero point.
        shift: with two regions (TQ-DiT's MRQ), codes above the zero point are multiples of 2 to this power, so that
            positive values have a coarser step than negative ones; 0 for one step.
        bits: the bits of each timestep group, where they differ; ``low`` and ``high`` are those of the most.
    """

    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    low: int
    high: int
    dtype: str
    shift: int = 0
    bits: tuple[int, ...] = ()

    def at(self, group: int) -> ActivationQuant:
        """The codes that one timestep group uses."""
        if not self.bits:
            return self
        low, high = codes(self.bits[group], symmetric=self.dtype == "int8")
        return replace(self, low=low, high=high, bits=())


@dataclass(frozen=True)
class WeightQuant:
    """Symmetric quantization of a weight, one scale an output channel.

    Attributes:
        high: codes are in ``[-high, high]``.
        dtype: what holds them, ``int8`` or ``float8_e4m3fn``.
    """

    high: int
    dtype: str = "int8"


@dataclass(frozen=True)
class SiteQuant:
    """How one site is quantized."""

    activation: ActivationQuant
    weight: WeightQuant


@dataclass(frozen=True)
class QuantPlan:
    """Per site (by name), how it is quantized; a site that is not here stays in floating point."""

    sites: dict[str, SiteQuant]

    @property
    def floating(self) -> tuple[str, ...]:
        """The sites that are planned to be 8-bit floating point."""
        return tuple(name for name, site in self.sites.items() if FLOAT8 in (site.weight.dtype, site.activation.dtype))


@dataclass(frozen=True)
class RoundedWeight:
    """The codes that were chosen for the weight of one site, and what they were chosen for.

    Attributes:
        codes: the constant that holds the codes, i8[out,in].
        scale: the constant that holds their scales, f32[out].
        weight: the digest of the weight (see `qcgraph.ir.program.tensor_digest`).
        quant: the codes that were allowed.
    """

    codes: str
    scale: str
    weight: str
    quant: WeightQuant


@dataclass(frozen=True)
class RoundedWeights:
    """The codes of weights that were chosen, which the program holds until they are inserted.

    Attributes:
        method: how they were chosen, ``feedback`` or ``search``.
        sites: per site (by name), its codes; None where none could be chosen, and the nearest ones are to be taken.
    """

    method: str
    sites: dict[str, RoundedWeight | None]

    @property
    def held_constants(self) -> tuple[str, ...]:
        """The constants that a program must hold for this fact."""
        return tuple(name for found in self.sites.values() if found for name in (found.codes, found.scale))


@dataclass(frozen=True)
class WeightSources:
    """Per quantized site (by name), the constant of the captured model that its weight codes were made from."""

    sites: dict[str, str]


@dataclass(frozen=True)
class RegionQuant:
    """Probabilities in two regions, each with a step and ``levels`` codes besides zero (TQ-DiT's MRQ, after a softmax).

    Attributes:
        splits: one a timestep group, or a single one: values below it have the step ``split / levels``, the others
            ``1 / levels``.
        levels: ``2^(bits-1) - 1``, since one of the bits says which region it is.
        dtype: ``uint8`` or ``int8``.
        planes: 2 where each region is a tensor that is multiplied on its own, 1 where one tensor holds both.
    """

    splits: tuple[float, ...]
    levels: int
    dtype: str
    planes: int


@dataclass(frozen=True)
class AttentionQuant:
    """How both products of an attention are quantized.

    Attributes:
        query: queries, scaled by one over the root of their length.
        key: keys.
        probabilities: what the softmax gives.
        value: values.
    """

    query: ActivationQuant
    key: ActivationQuant
    probabilities: ActivationQuant | RegionQuant
    value: ActivationQuant

    @property
    def operands(self) -> dict[str, ActivationQuant | RegionQuant]:
        """The codes of each operand, by name."""
        return {"query": self.query, "key": self.key, "probabilities": self.probabilities, "value": self.value}


@dataclass(frozen=True)
class AttentionPlan:
    """Per attention (by name), how its products are quantized; one that is not here stays in floating point."""

    sites: dict[str, AttentionQuant]


@dataclass(frozen=True)
class Compensation:
    """Variance compensation: after each update the latent becomes ``mean + gain * (latent - mean)``.

    Attributes:
        gains: K per step and channel.
        means: mu per step and channel.
        clamped: how many gains were clamped.
        drifts: per step and channel, the standard deviation that the compiled denoiser reached over the one that would
            need no correction, all earlier steps corrected.
    """

    gains: tuple[tuple[float, ...], ...]
    means: tuple[tuple[float, ...], ...]
    clamped: int
    drifts: tuple[tuple[float, ...], ...]

    @property
    def largest_drift(self) -> float:
        """How far a drift is from 1 at most."""
        return max(abs(drift - 1) for row in self.drifts for drift in row)


@dataclass(frozen=True)
class SiteCorrection:
    """Correction of a quantized linear's result without bias, per output channel: ``gain * result + offset``."""

    gains: tuple[float, ...]
    offsets: tuple[float, ...]


@dataclass(frozen=True)
class Requantization:
    """Per site (by name), the correction that is folded into its weight's scales and its bias."""

    sites: dict[str, SiteCorrection]


@dataclass(frozen=True)
class ForecastStep:
    """How well a cached value is forecast at a step that reuses it, closed loop.

    Attributes:
        name: the cached value.
        step: the index of the step.
        reuse: relative L2 error of taking the last computed value as it is.
        forecast: relative L2 error of the forecast, on samples that it was not fitted on where there are enough.
    """

    name: str
    step: int
    reuse: float
    forecast: float


@dataclass(frozen=True)
class ForecastFit:
    """That the forecasts were fitted, and how well they do; the coefficients are constants of the program.

    Attributes:
        kind: ``affine``, ``taylor``, ``dec`` or ``reuse``.
        steps: per cached value and reusing step, in order.
    """

    kind: str
    steps: tuple[ForecastStep, ...]


@dataclass(frozen=True)
class Precision:
    """The floating-point type of what is not quantized, where it is not float32.

    Attributes:
        dtype: ``f16`` or ``bf16``.
        largest: the largest magnitude that was seen on calibration trajectories.
    """

    dtype: str
    largest: float


FACT_TYPES: tuple[type, ...] = (
    ModelSpec,
    StepPlan,
    CachePlan,
    SchedulePlan,
    Rehearsed,
    Equalization,
    Ranges,
    Reference,
    CalibrationSet,
    TimestepGroups,
    QuantPlan,
    RoundedWeights,
    WeightSources,
    Requantization,
    AttentionPlan,
    ForecastFit,
    Compensation,
    Precision,
)


class Facts:
    """An immutable set of facts, at most one of each type, keyed by the type."""

    def __init__(self, facts: Iterable[object] = ()) -> None:
        self._facts: dict[type, object] = {type(fact): fact for fact in facts}

    def __contains__(self, kind: type) -> bool:
        return kind in self._facts

    def get(self, kind: type[Fact]) -> Fact | None:
        """The fact of this type, or None."""
        return cast("Fact | None", self._facts.get(kind))

    def __getitem__(self, kind: type[Fact]) -> Fact:
        fact = self.get(kind)
        if fact is None:
            raise QcgraphError(f"the program holds no {kind.__name__}", hint="run the pass that provides it before")
        return fact

    def with_(self, *facts: object) -> Facts:
        """These facts and the given ones, which replace those of the same type."""
        return Facts([*self._facts.values(), *facts])

    def without(self, kind: type) -> Facts:
        """These facts but the one of this type."""
        return Facts(fact for fact in self._facts.values() if type(fact) is not kind)

    @property
    def held_constants(self) -> frozenset[str]:
        """The constants that a program must hold for its facts, whether or not a graph refers to them."""
        rounded = self.get(RoundedWeights)
        return frozenset(rounded.held_constants if rounded else ())

    def encode(self) -> dict[str, Any]:
        """Plain JSON data, by type name."""
        return {
            kind.__name__: encode(self._facts[kind]) for kind in sorted(self._facts, key=lambda kind: kind.__name__)
        }

    @classmethod
    def decode(cls, data: dict[str, Any]) -> Facts:
        """The inverse of `encode`; raises pydantic's ValidationError on data of another shape."""
        kinds = {kind.__name__: kind for kind in FACT_TYPES}
        return cls(decode(kinds[name], value) for name, value in data.items())


def precision_of(facts: Facts) -> str:
    """The floating-point type of what is not quantized, ``f32`` unless it was reduced."""
    precision = facts.get(Precision)
    return precision.dtype if precision else "f32"


def encode(fact: Any) -> Any:
    """A fact (or any plain dataclass) as JSON data."""
    return asdict(fact)


def decode(kind: type[Fact], data: Any) -> Fact:
    """A dataclass from JSON data; raises pydantic's ValidationError on data of another shape."""
    return cast(Fact, _adapter(cast(Any, kind)).validate_python(data))


@cache
def _adapter(kind: type) -> Any:
    """What validates a dataclass; made once, which takes longer than most data of it."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
