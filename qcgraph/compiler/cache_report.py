"""Report which values a compilation cached, by which schedule, and how close reusing steps come to computing ones."""

from __future__ import annotations

import math

from qcgraph.bundle.report import CacheReport, ForecastReport, PlannedSchedule
from qcgraph.facts import CachePlan, Facts, ForecastFit, SchedulePlan
from qcgraph.plan.steps import StepPlan


def cache_report(facts: Facts) -> CacheReport | None:
    """Return the cache of a compiled program, None when it caches nothing."""
    cache, plan = facts.get(CachePlan), facts[StepPlan]
    if cache is None or not set(cache.modes) & set(plan.variants):
        return None
    return CacheReport(
        schedule=plan.schedule(),
        values={value.name: str(value) for value in cache.values},
        modes=dict(cache.modes),
        history=cache.history,
        planned=_planned(facts.get(SchedulePlan)),
        forecast=_forecast(facts.get(ForecastFit)),
    )


def _planned(plan: SchedulePlan | None) -> PlannedSchedule | None:
    """Return how the schedule was found, or None for an even or a given schedule."""
    if plan is None:
        return None
    return PlannedSchedule(
        strategy=plan.strategy,
        spent=round(plan.spent, 4),
        measured_on=plan.measured_on,
        expected_error=plan.expected_error,
        rehearsed_error=plan.rehearsed_error,
    )


def _forecast(fit: ForecastFit | None) -> ForecastReport | None:
    """Return the errors of forecasts and of plain reuse."""
    if fit is None or not fit.steps:
        return None
    return ForecastReport(
        kind=fit.kind,
        error=round(_root_mean_square([step.forecast for step in fit.steps]), 5),
        reuse_error=round(_root_mean_square([step.reuse for step in fit.steps]), 5),
        largest_error=round(max(step.forecast for step in fit.steps), 5),
    )


def _root_mean_square(values: list[float]) -> float:
    return math.sqrt(math.fsum(value**2 for value in values) / len(values))
