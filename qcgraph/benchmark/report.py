"""Define the report of a comparison as data."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from qcgraph.benchmark.machine import Machine
from qcgraph.benchmark.timing import Timing
from qcgraph.benchmark.worker import Alone
from qcgraph.plan.roles import TensorRole
from qcgraph.plan.spec import BATCH, Interface

FORMAT = 1


@dataclass(frozen=True)
class Ratio:
    """A speed-up over PyTorch eager.

    Attributes:
        value: the ratio of the medians.
        low: the smallest ratio within one round.
        high: the largest ratio within one round.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, reference: Timing, own: Timing) -> Ratio:
        """Return the ratio of two timings whose values are in the order of the rounds."""
        ratios = [slow / fast for slow, fast in zip(reference.seconds, own.seconds, strict=True)]
        return cls(reference.median / own.median, min(ratios), max(ratios))

    def times(self, factor: float) -> Ratio:
        """Return the ratio to a reference that takes a multiple of the time."""
        return Ratio(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class BenchmarkResult:
    """The result of one candidate.

    Attributes:
        name: ``qcgraph``, or the name of a baseline.
        description: one line that describes it.
        bundle: the path of the bundle, None for a baseline.
        status: ``ok``; ``wrong`` if its predictions are wrong; ``missing`` if it is not installed; ``failed``.
        problem: the reason of a status other than ``ok``; empty if there is none.
        sampling: seconds of whole sampling; None if it was not timed.
        speedup: speed-up of whole sampling over PyTorch eager with the same steps; None if either was not timed.
        run_speedup: speed-up of whole sampling over PyTorch eager with all steps of the run, which baselines take, too;
            it differs from ``speedup`` for a fitted solver alone.
        forward: seconds of a computing step.
        forward_speedup: speed-up of a computing step, the ratio of the medians.
        variants: for a bundle, seconds of a step by variant; empty for a baseline.
        error: relative L2 error of one noise prediction at a computing step against PyTorch eager.
        mac_ratio: multiply-accumulates of whole sampling relative to those of the model over all steps of the run; None
            if they are not recorded.
        cache_bytes: bytes that a trajectory keeps between steps, including both halves of guidance.
        alone: the figures of its process of its own.
    """

    name: str
    description: str
    bundle: str | None
    status: str
    problem: str = ""
    sampling: Timing | None = None
    speedup: Ratio | None = None
    run_speedup: Ratio | None = None
    forward: Timing | None = None
    forward_speedup: float | None = None
    variants: Mapping[str, Timing] | None = None
    error: float | None = None
    mac_ratio: float | None = None
    cache_bytes: int | None = None
    alone: Alone | None = None

    @property
    def paired_to_alone(self) -> float | None:
        """The median among all candidates over the median alone: 1 if pairing costs nothing."""
        if self.alone is None:
            return None
        paired, alone = (self.sampling, self.alone.sampling) if self.sampling else (self.forward, self.alone.forward)
        return paired.median / statistics.median(alone) if paired and alone else None

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON data, in seconds and bytes."""
        alone = self.alone
        return {
            "name": self.name,
            "description": self.description,
            "bundle": self.bundle,
            "status": self.status,
            "problem": self.problem,
            "sampling": _spread(self.sampling),
            "rounds": list(self.sampling.seconds) if self.sampling else [],
            "speedup": asdict(self.speedup) if self.speedup else None,
            "run_speedup": asdict(self.run_speedup) if self.run_speedup else None,
            "forward": _spread(self.forward),
            "forward_speedup": self.forward_speedup,
            "variants": {name: _spread(timing) for name, timing in (self.variants or {}).items()},
            "error": self.error,
            "mac_ratio": self.mac_ratio,
            "cache_bytes": self.cache_bytes,
            "alone": {
                "sampling": _spread(Timing.of(alone.sampling)) if alone and alone.sampling else None,
                "forward": _spread(Timing.of(alone.forward)) if alone and alone.forward else None,
            },
            "paired_to_alone": self.paired_to_alone,
            "base_memory_bytes": alone.base_bytes if alone else None,
            "peak_memory_bytes": alone.peak_bytes if alone else None,
        }


@dataclass(frozen=True)
class Throughput:
    """The samples per second of one candidate, for a number of samples drawn at once."""

    name: str
    batch: int
    samples_per_second: float


@dataclass(frozen=True)
class BenchReport:
    """The report of a comparison; see `qcgraph.benchmark.bench`.

    Attributes:
        bundle: the path of the bundle, or of the first of several.
        model: the model's name as typed for the compilation, or else its own name.
        plan: scheduler, steps and guidance.
        target: the target that the bundle was compiled for.
        steps: the number of steps that every candidate was timed with.
        run_steps: the number of steps of the run that they stand for; more than ``steps`` for a fitted solver.
        guidance: the weight of guidance; unless it is 1, the denoiser sees two halves of each sample.
        threads: the number of threads of every candidate.
        samples: the number of samples drawn at once.
        rounds: the number of times that every candidate was timed.
        forward_only: whether sections of the trajectory were timed instead of the whole.
        machine: the machine of the measurement.
        versions: the versions of the packages that were measured.
        rows: the candidates.
        throughput: samples per second by candidate and batch.
    """

    bundle: str
    model: str
    plan: str
    target: str
    steps: int
    run_steps: int
    guidance: float
    threads: int
    samples: int
    rounds: int
    forward_only: bool
    machine: Machine
    versions: Mapping[str, str]
    rows: tuple[BenchmarkResult, ...]
    throughput: tuple[Throughput, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return (
            {"kind": "bench", "format": FORMAT}
            | data
            | {
                "machine": asdict(self.machine),
                "versions": dict(self.versions),
                "rows": [row.to_json() for row in self.rows],
                "throughput": [asdict(item) for item in self.throughput],
            }
        )


def cache_bytes(interfaces: Mapping[str, Interface], batch: int) -> int:
    """Return the bytes of the cache tensors that variants take as inputs, for a batch with both halves of guidance."""
    taken = {spec for interface in interfaces.values() for spec in interface.taken(TensorRole.CACHE)}
    return sum(
        _bytes_of(spec.dtype) * prod(batch if dim == BATCH else int(dim) for dim in spec.shape) for spec in taken
    )


def _bytes_of(dtype: str) -> int:
    """Return the bytes of one value of a dtype that is named after its bits, such as ``f32``."""
    return int(dtype[1:]) // 8


def _spread(timing: Timing | None) -> dict[str, float] | None:
    """Return minimum, median and maximum in seconds, and the number of runs."""
    if timing is None:
        return None
    return {"min": timing.minimum, "median": timing.median, "max": timing.maximum, "count": len(timing.seconds)}
