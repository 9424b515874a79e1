"""What reports say of a cache."""

from __future__ import annotations

import math

import pytest

from qcgraph.bundle.report import CacheReport, EdgeReport
from qcgraph.cli.cache_view import cache_fields
from qcgraph.compiler.cache_report import cache_report
from qcgraph.facts import CachedValue, CachePlan, Facts, ForecastFit, ForecastStep, SchedulePlan
from qcgraph.plan.roles import COMPUTES, REUSES
from qcgraph.plan.steps import Fingerprint, Step, StepPlan, Update

VALUES = tuple(CachedValue(f"cache_{index}", index, index, 1) for index in range(3))


def plan(*variants: str) -> StepPlan:
    steps = tuple(Step(float(len(variants) - index), Update(1, 1), name) for index, name in enumerate(variants))
    roles = {name: COMPUTES if name in ("main", "full") else REUSES for name in variants}
    return StepPlan(Fingerprint("m", "ddim", len(variants), 1.5), steps, roles)


def cache(*values: CachedValue, history: int = 1) -> CachePlan:
    return CachePlan(values, {"reuse": tuple(value.name for value in values)}, history, ())


def test_nothing_cached() -> None:
    assert cache_report(Facts([plan("main")])) is None
    assert cache_report(Facts([plan("main", "main"), cache(VALUES[0])])) is None
    assert list(cache_fields(None)) == []


def test_an_even_schedule() -> None:
    report = cache_report(Facts([plan("full", "reuse"), cache(VALUES[0])]))
    assert report is not None
    assert report.planned is report.forecast is None
    assert report.values == {"cache_0": "branch 1 of block 0"}
    assert list(cache_fields(report)) == [("cache", "branch 1 of block 0")]


def test_a_planned_schedule_with_forecasts() -> None:
    fit = ForecastFit("dec", (ForecastStep("cache_0", 1, 0.4, 0.03), ForecastStep("cache_1", 1, 0.3, 0.04)))
    schedule = SchedulePlan("joint", "", 0.55, 1e-4, 2e-4)
    report = cache_report(Facts([plan("full", "reuse"), cache(*VALUES, history=2), schedule, fit]))
    assert report is not None
    assert CacheReport.model_validate_json(report.model_dump_json()) == report
    assert report.forecast is not None
    assert report.forecast.error == pytest.approx(0.03536, abs=1e-5)
    assert report.forecast.reuse_error == pytest.approx(0.35355, abs=1e-5)
    edges = [
        EdgeReport(name=name, noise=0.1, change=0.4, snr=snr)
        for name, snr in (("cache_0", 20.0), ("cache_1", 12.34), ("cache_2", math.inf))
    ]
    assert edges[2].snr is None
    assert dict(cache_fields(report, edges)) == {
        "cache": "3 values, the last 2 computed",
        "budget": "55.0% of computing every step, in multiply-accumulates (joint schedule)",
        "forecast": "dec, off by 3.5% (at most 4.0%) where reuse is off by 35.4%",
        "noise": "12.3 dB from the change of cache_1 a step down to its quantization noise",
    }
