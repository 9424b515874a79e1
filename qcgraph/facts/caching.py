"""Facts about cached values: the values, the modes that reuse them, and the schedule."""

from __future__ import annotations

from dataclasses import dataclass

NO_BLOCK = -1


@dataclass(frozen=True)
class CachedValue:
    """A value that computing steps store and reusing steps take.

    Attributes:
        name: the name of its tensor in interfaces, ``cache_0`` for example.
        first_block: the first block that is skipped when the value is reused; `NO_BLOCK` for the difference of the
            noise predictions of both halves of guidance, with which one half is skipped in all blocks.
        last_block: the last skipped block, inclusive.
        branch: the branch of the (single) block whose output before its gate the value is, counted from 0; -1 for the
            change of the residual stream over all of the blocks.
    """

    name: str
    first_block: int
    last_block: int
    branch: int = -1

    @property
    def is_guidance(self) -> bool:
        """Whether the value is the difference of both halves of guidance."""
        return self.first_block == NO_BLOCK

    def __str__(self) -> str:
        if self.is_guidance:
            return "difference of the halves of guidance"
        blocks = f"{self.first_block}..{self.last_block}" if self.branch < 0 else str(self.first_block)
        return f"change over blocks {blocks}" if self.branch < 0 else f"branch {self.branch} of block {blocks}"


@dataclass(frozen=True)
class CachePlan:
    """The cached values, the variants that reuse them, and the number of computed values that are kept of each.

    Attributes:
        values: the values that computing steps store.
        modes: for each reusing variant, the names of the values that it reuses; it computes the rest.
        history: how many of the last computed values a forecast may use; 1 is plain reuse.
        draft: the first schedule: for each step, None to compute, else a mode. The step plan holds the final schedule.
    """

    values: tuple[CachedValue, ...]
    modes: dict[str, tuple[str, ...]]
    history: int
    draft: tuple[str | None, ...]

    def lines(self) -> list[str]:
        """Return the lines about this fact in the text of a program."""
        lines = [f"cache {value.name}: {value}" for value in self.values]
        lines += [f"mode {name}: reuses {', '.join(values)}" for name, values in self.modes.items()]
        if self.values and self.history > 1:
            lines.append(f"  of each the last {self.history} computed are kept")
        return lines


@dataclass(frozen=True)
class SchedulePlan:
    """The origin of the schedule in the step plan, and its expected error.

    Attributes:
        strategy: ``joint`` or ``dps``.
        measured_on: the name of the runtime that the costs were measured on; empty where they are arithmetic.
        spent: the cost of sampling relative to computing every step.
        expected_error: the mean squared error of the final latent as the sum of the measured errors of skipped steps.
        rehearsed_error: the mean squared error of the final latent of trajectories sampled under this schedule.
    """

    strategy: str
    measured_on: str
    spent: float
    expected_error: float | None
    rehearsed_error: float | None

    def lines(self) -> list[str]:
        """Return the lines about this fact in the text of a program."""
        unit = f"measured on {self.measured_on}" if self.measured_on else "multiply-accumulates"
        line = f"schedule {self.strategy}: {self.spent:.1%} of computing every step ({unit})"
        return [line if self.rehearsed_error is None else f"{line}, mean squared error {self.rehearsed_error:.2g}"]


@dataclass(frozen=True)
class Rehearsed:
    """The mean squared error of the final latents under a schedule, against trajectories on which every step computes.

    Attributes:
        error: the error under the step plan.
        even_error: the error under a schedule of the same cost whose computing steps are evenly spaced.
        trajectories: how many were sampled; 0 where no step reuses.
    """

    error: float
    even_error: float
    trajectories: int

    def lines(self) -> list[str]:
        """Return the lines about this fact in the text of a program."""
        errors = f"mean squared error {self.error:.3g}, of even steps {self.even_error:.3g}"
        return [f"rehearsal {errors}, {self.trajectories} trajectories"]
