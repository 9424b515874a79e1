"""How cached values are forecast."""

from __future__ import annotations

from dataclasses import dataclass


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
        kind: the name of the forecaster.
        steps: per cached value and reusing step, in order.
    """

    kind: str
    steps: tuple[ForecastStep, ...]

    def lines(self) -> list[str]:
        """Return the lines that the text of a program has of it."""
        if not self.steps:
            return [f"forecast {self.kind} at no step"]
        reuse, errors = ([getattr(step, name) for step in self.steps] for name in ("reuse", "forecast"))
        worst = f"error up to {max(errors):.1%} where reuse has {max(reuse):.1%}"
        return [f"forecast {self.kind} at {len({step.step for step in self.steps})} steps, {worst}"]
