"""A schedule by timestep values: its text, and its transfer to the steps of another scheduler or step count."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from qcgraph.errors import UsageError, closest, shown
from qcgraph.plan.schedule.planner import CONDITIONAL

COMPUTES_WORD = "full"  # what a plan file calls a computing step; in a schedule it is None
# The letters of a text and their modes, which are named as by plan-cache.
MODES: dict[str, str | None] = {"F": None, "R": "reuse", "C": CONDITIONAL} | {
    str(number): f"reuse_{number}" for number in range(1, 10)
}
_LETTERS = {mode: letter for letter, mode in MODES.items()}
_WORDS = [mode or COMPUTES_WORD for mode in MODES.values()]
_NUMBER = r"[0-9]{1,400}(?:\.[0-9]{1,400})?"
_RUN = re.compile(rf"(?P<first>{_NUMBER})(?:-(?P<spacing>{_NUMBER}))?:(?P<letters>[FRC1-9]+)")
MOST_CHARACTERS = 100_000  # the longest text of a schedule; a thousand uneven steps take 7000
TEXT_HINT = (
    "980-20:FRR+900-30:FR is timesteps 980, 960, 940, then 900, 870; F computes, R reuses, 1 .. 9 reuse a later range, "
    "C computes the conditional half"
)


@dataclass(frozen=True)
class TimedSchedule:
    """The mode of a trajectory at each timestep value.

    Attributes:
        timesteps: the timestep values of the steps, falling.
        modes: the mode of each step: None computes, ``reuse``, ``reuse_1`` .. ``reuse_9`` reuse, ``conditional``
            computes the conditional half.

    Raises:
        UsageError: there is no step, the timesteps do not fall, a mode is unknown, or the first step does not compute.
    """

    timesteps: tuple[float, ...]
    modes: tuple[str | None, ...]

    def __post_init__(self) -> None:
        if not self.timesteps or len(self.timesteps) != len(self.modes):
            raise UsageError(
                f"a schedule of {len(self.timesteps)} timesteps and {len(self.modes)} modes",
                hint="give every timestep a mode, one timestep at least",
            )
        for value, mode in zip(self.timesteps, self.modes, strict=True):
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"timestep {value:g}", hint="a timestep is a number, 0 or larger")
            if mode not in _LETTERS:
                raise UsageError(
                    f"timestep {value:g} has the unknown mode {shown(mode)}", hint=closest(str(mode), _WORDS)
                )
        for before, after in pairwise(self.timesteps):
            if after >= before:
                raise UsageError(
                    f"timestep {after:g} comes after {before:g}, but timesteps fall",
                    hint="write the noisiest step, of the largest timestep, first, and every timestep once",
                )
        if self.modes[0] is not None:
            raise UsageError(
                f"timestep {self.timesteps[0]:g}, the first one, is to reuse ({self.modes[0]}), "
                "and nothing is computed before it",
                hint="let the first step be full",
            )

    @property
    def computing(self) -> int:
        """The number of computing steps."""
        return self.modes.count(None)

    @property
    def text(self) -> str:
        """The schedule as one word: per run of evenly spaced timesteps the first, the spacing, and a letter a step."""
        runs, start = [], 0
        while start < len(self.timesteps):
            end = self._run_end(start)
            head = _number(self.timesteps[start])
            if end - start > 1:
                head += f"-{_number(self.timesteps[start] - self.timesteps[start + 1])}"
            runs.append(f"{head}:{''.join(_LETTERS[mode] for mode in self.modes[start:end])}")
            start = end
        return "+".join(runs)

    @classmethod
    def parse(cls, text: str) -> TimedSchedule:
        """Read a schedule from its `text`.

        Raises:
            UsageError: the text is malformed, or its schedule cannot run.
        """
        timesteps: list[float] = []
        modes: list[str | None] = []
        if len(text) > MOST_CHARACTERS:
            raise UsageError(
                f"a schedule of {len(text)} characters", hint=f"a schedule has {MOST_CHARACTERS} characters at most"
            )
        for part in text.split("+"):
            match = _RUN.fullmatch(part)
            if match is None or (len(match["letters"]) > 1 and match["spacing"] is None):
                raise UsageError(f"cannot read {shown(part)} of a schedule", hint=TEXT_HINT)
            first, spacing = float(match["first"]), float(match["spacing"] or 0)
            timesteps += [first - index * spacing for index in range(len(match["letters"]))]
            modes += [MODES[letter] for letter in match["letters"]]
        return cls(tuple(timesteps), tuple(modes))

    def at(self, timesteps: Sequence[float]) -> tuple[str | None, ...]:
        """Return modes for other steps: as large a share of them computes, as densely at each time.

        Every computing step opens a run that lasts until the next computing step; the last run ends one spacing after
        the last timestep. Time counts these runs from 0 to their number K, linear in the timestep within each. With T'
        steps in place of T, K' = K * T' / T of them compute (rounded, at least 1): those nearest to the times j * K /
        K', j = 0 .. K' - 1. The first step always computes; two times that fall on one step take neighbouring steps. A
        reusing step has the mode of the nearest reusing step of this schedule. At its own timesteps the result is the
        schedule itself.

        Args:
            timesteps: the timestep values of the other steps, falling.
        """
        times = np.asarray(timesteps, dtype=np.float64)
        own = np.asarray(self.timesteps, dtype=np.float64)
        computes = np.array([mode is None for mode in self.modes])
        runs, steps = self.computing, len(times)
        count = max(1, math.floor(runs * steps / len(own) + 0.5))
        end = own[-1] - (own[-2] - own[-1] if len(own) > 1 else 1.0)
        wanted = np.interp(np.arange(count) * runs / count, np.arange(runs + 1), [*own[computes], end])
        chosen = _distinct([int(np.abs(times - time).argmin()) for time in wanted], steps)
        skipped = own[~computes]
        names = [mode for mode in self.modes if mode is not None]
        return tuple(
            None if step in chosen else names[int(np.abs(skipped - time).argmin())] for step, time in enumerate(times)
        )

    def _run_end(self, start: int) -> int:
        """Return where the run of evenly spaced timesteps that begins at a step ends."""
        if start + 1 == len(self.timesteps):
            return start + 1
        first, spacing = self.timesteps[start], self.timesteps[start] - self.timesteps[start + 1]
        end = start + 2
        while end < len(self.timesteps) and self.timesteps[end] == first - (end - start) * spacing:
            end += 1
        return end


def _distinct(positions: list[int], steps: int) -> set[int]:
    """Return distinct positions: the first is moved to step 0, and each later one is moved as little as possible."""
    moved = [0, *positions[1:]]
    for place in range(1, len(moved)):
        moved[place] = max(moved[place], moved[place - 1] + 1)
    after = steps
    for place in reversed(range(len(moved))):
        after = moved[place] = min(moved[place], after - 1)
    return set(moved)


def _number(value: float) -> str:
    """Return the shortest decimal number that equals this value."""
    return np.format_float_positional(value, trim="-")
