"""What a comparison found, as data."""

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
    """How many times faster than PyTorch eager.

    Attributes:
        value: the ratio of the medians.
        low: the least ratio within one round.
        high: the largest ratio within one round.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, reference: Timing, own: Timing) -> Ratio:
        """The ratio of two timings whose values are in the order of the rounds."""
        ratios = [slow / fast for slow, fast in zip(reference.seconds, own.seconds, strict=True)]
        return cls(reference.median / own.median, min(ratios), max(ratios))


@dataclass(frozen=True)
class BenchmarkResult:
    """One candidate.

    Attributes:
        name: ``qcgraph``, or the name of a baseline.
        description: one line on what it is.
        bundle: the path of the bundle, None for a baseline.
        status: ``ok``; ``wrong`` when it does not compute the model; ``missing`` when it is not installed; ``failed``.
        problem: what is wrong, missing or failed; empty when nothing is.
        sampling: seconds of whole sampling; None when it was not timed.
        speedup: of whole sampling against PyTorch eager, same steps; None when either was not timed.
        forward: seconds of a computing step.
        forward_speedup: of a computing step, the ratio of the medians.
        variants: for a bundle, seconds of a step by variant; empty for a baseline.
        error: relative L2 error of one noise prediction at a computing step against PyTorch eager.
        mac_ratio: multiply-accumulates of whole sampling relative to the model's; None where it is not recorded.
        cache_bytes: bytes that a trajectory keeps between steps, both halves of guidance included.
        alone: how it ran in a process of its own.
    """

    name: str
    description: str
    bundle: str | None
    status: str
    problem: str = ""
    sampling: Timing | None = None
    speedup: Ratio | None = None
    forward: Timing | None = None
    forward_speedup: float | None = None
    variants: Mapping[str, Timing] | None = None
    error: float | None = None
    mac_ratio: float | None = None
    cache_bytes: int | None = None
    alone: Alone | None = None

    @property
    def paired_to_alone(self) -> float | None:
        """The median with the others beside it over the median alone: 1 when pairing costs nothing."""
        if self.alone is None:
            return None
        paired, alone = (self.sampling, self.alone.sampling) if self.sampling else (self.forward, self.alone.forward)
        return paired.median / statistics.median(alone) if paired and alone else None

    def to_json(self) -> dict[str, Any]:
        """The row as JSON data; seconds and bytes."""
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
    """Samples a second of one candidate with a number of samples at once."""

    name: str
    batch: int
    samples_per_second: float


@dataclass(frozen=True)
class BenchReport:
    """A comparison; see `qcgraph.benchmark.bench`.

    Attributes:
        bundle: the path of the bundle, of the first where there are more.
        model: what was typed when it was compiled, else the model's own name.
        plan: scheduler, steps and guidance.
        target: what the bundle was compiled for.
        steps: how many steps everybody takes.
        guidance: the weight of guidance; but for 1, the denoiser sees two halves a sample.
        threads: how many threads everybody uses.
        samples: how many samples are drawn at once.
        rounds: how often everybody was timed.
        forward_only: whether sections of the trajectory were timed instead of all of it.
        machine: where.
        versions: of what.
        rows: the candidates.
        throughput: samples a second by candidate and batch.
    """

    bundle: str
    model: str
    plan: str
    target: str
    steps: int
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
        """The document."""
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
    """Bytes of the cache tensors that variants take as inputs, for a batch of the denoiser (both halves counted)."""
    taken = {spec for interface in interfaces.values() for spec in interface.taken(TensorRole.CACHE)}
    return sum(
        _bytes_of(spec.dtype) * prod(batch if dim == BATCH else int(dim) for dim in spec.shape) for spec in taken
    )


def _bytes_of(dtype: str) -> int:
    """Bytes of one value of a dtype that is named after its bits, such as ``f32``."""
    return int(dtype[1:]) // 8


def _spread(timing: Timing | None) -> dict[str, float] | None:
    """Least, median and largest, in seconds."""
    if timing is None:
        return None
    return {"min": timing.minimum, "median": timing.median, "max": timing.maximum, "count": len(timing.seconds)}
