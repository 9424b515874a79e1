"""Facts about the forecasts of cached values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ForecastStep:
    """The error of the forecast of a cached value at a reusing step, closed loop.

    Attributes:
        name: the name of the cached value.
        step: the index of the step.
        reuse: the relative L2 error of plain reuse of the last computed value.
        forecast: the relative L2 error of the forecast, on samples that it was not fitted on where these are enough.
    """

    name: str
    step: int
    reuse: float
    forecast: float


@dataclass(frozen=True)
class ForecastFit:
    """The fitted forecasts and their errors; the coefficients are constants of the program.

    Attributes:
        kind: the name of the forecaster.
        steps: the errors by cached value and reusing step, in order.
    """

    kind: str
    steps: tuple[ForecastStep, ...]

    def lines(self) -> list[str]:
        """Return the lines about this fact in the text of a program."""
        if not self.steps:
            return [f"forecast {self.kind} at no step"]
        reuse, errors = ([getattr(step, name) for step in self.steps] for name in ("reuse", "forecast"))
        worst = f"error up to {max(errors):.1%} where reuse has {max(reuse):.1%}"
        return [f"forecast {self.kind} at {len({step.step for step in self.steps})} steps, {worst}"]
