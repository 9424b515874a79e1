"""Time candidates in turn, round after round, and every call of a denoiser within their turns."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qcgraph.progress import Progress
from qcgraph.sampling.runner import Array, Call, Runner

# Waiting threads spin for a few milliseconds before they sleep; threads of one candidate must not take cores from the
# next one.
SETTLE_SECONDS = 0.05


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs.

    Attributes:
        seconds: one value for each run, in order; at least one.
    """

    seconds: tuple[float, ...]

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Return the timing of some runs."""
        return cls(tuple(seconds))

    @property
    def minimum(self) -> float:
        """The fastest run, in seconds."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The median run, in seconds."""
        return statistics.median(self.seconds)

    @property
    def maximum(self) -> float:
        """The slowest run, in seconds."""
        return max(self.seconds)

    def __str__(self) -> str:
        return f"{self.minimum:.3f} / {self.median:.3f} / {self.maximum:.3f}"


@dataclass(frozen=True)
class TimedCall:
    """One call of a denoiser: the variant that ran, and its duration."""

    variant: str
    seconds: float


class TimedRunner:
    """Wraps a runner (see `qcgraph.sampling.runner.Runner`), and records the seconds of every step.

    A call that prepares steps is not recorded; its time is part of whole sampling.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._calls: list[TimedCall] = []

    def run(self, call: Call) -> Array:
        """Run one variant, and record its time if it is a step."""
        start = time.perf_counter()
        result = self._runner.run(call)
        if call.is_step:
            self._calls.append(TimedCall(call.variant, time.perf_counter() - start))
        return result

    def take(self) -> tuple[TimedCall, ...]:
        """Return the recorded calls in order, and forget them."""
        taken = tuple(self._calls)
        self._calls.clear()
        return taken


def paired(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: Mapping[str, Callable[[], object]] | None = None,
    progress: Progress | None = None,
) -> dict[str, Timing]:
    """Time candidates in turn, round after round, every other round in reverse order.

    Drift of the machine then affects all candidates alike, and no candidate always follows the same one.

    Args:
        candidates: the functions to time, by name.
        rounds: the number of runs of each candidate.
        warm_up: functions to call untimed right before a candidate, because other candidates used the CPU caches.
        progress: receives progress messages.

    Returns:
        The timing of each candidate; its values are in the order of the rounds, so that values of one round compare.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for index in (progress or Progress()).track(range(rounds), "rounds"):
        for name in names if index % 2 == 0 else reversed(names):
            seconds[name].append(timed(candidates[name], (warm_up or {}).get(name)))
    return {name: Timing.of(values) for name, values in seconds.items()}


def timed(candidate: Callable[[], object], warm_up: Callable[[], object] | None = None) -> float:
    """Return the seconds of one run, after other threads went to sleep and garbage was collected.

    Args:
        candidate: the function to time.
        warm_up: a function to call before it, untimed.
    """
    gc.collect()
    time.sleep(SETTLE_SECONDS)
    if warm_up is not None:
        warm_up()
    start = time.perf_counter()
    candidate()
    return time.perf_counter() - start
