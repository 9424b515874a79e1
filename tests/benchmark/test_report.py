"""The arithmetic of the report: ratios, cache bytes, and sampling from sections."""

from __future__ import annotations

import json

import pytest

from qcgraph.benchmark.bench import Measured, sampling_seconds
from qcgraph.benchmark.report import BenchmarkResult, Ratio, cache_bytes
from qcgraph.benchmark.timing import TimedCall, Timing
from qcgraph.benchmark.worker import Alone
from qcgraph.plan.roles import COMPUTES, REUSES, TensorRole
from qcgraph.plan.spec import Interface, TensorSpec
from qcgraph.plan.steps import Fingerprint, Step, StepPlan, Update


def test_a_speedup_is_of_medians_and_its_range_of_rounds() -> None:
    ratio = Ratio.of(Timing.of([4.0, 5.0, 9.0]), Timing.of([2.0, 1.0, 3.0]))
    assert (ratio.value, ratio.low, ratio.high) == (2.5, 2.0, 5.0)


def test_cache_bytes_count_each_cached_tensor_once() -> None:
    latent = TensorSpec("latent", "f32", ("B", 2, 8, 8), TensorRole.STATE)
    prediction = TensorSpec("noise_prediction", "f32", ("B", 4, 8, 8), TensorRole.PREDICTION)
    trunk = TensorSpec("trunk", "f32", ("B", 16, 32), TensorRole.CACHE, "trunk")
    gate = TensorSpec("gate", "f16", ("B", 32), TensorRole.CACHE, "gate")
    interfaces = {
        "full": Interface((latent,), (prediction, trunk, gate)),
        "reuse": Interface((latent, trunk, gate), (prediction,)),
        "half": Interface((latent, trunk), (prediction, gate)),
    }
    assert cache_bytes(interfaces, 2) == 2 * 16 * 32 * 4 + 2 * 32 * 2
    assert cache_bytes({"main": Interface((latent,), (prediction,))}, 2) == 0


def test_sampling_follows_from_a_section() -> None:
    """Medians: full 10, reuse 1; around a step 0.5. The first call of each turn does not count."""
    names = ["full", "reuse", "reuse", "full", "reuse", "reuse"]
    steps = tuple(Step(float(9 - index), Update(1.0, -0.1), name) for index, name in enumerate(names))
    plan = StepPlan(Fingerprint("", "ddim", 6, 1.5), steps, {"full": COMPUTES, "reuse": REUSES})
    turn = (TimedCall("full", 99.0), TimedCall("reuse", 1.0), TimedCall("reuse", 1.0), TimedCall("full", 10.0))
    measured = Measured(Timing.of([111.0 + 2.0]), (turn,))
    assert sampling_seconds(plan, measured) == pytest.approx(2 * 10 + 4 * 1 + 6 * 0.5)


def test_what_pairing_costs_is_relative_to_running_alone() -> None:
    alone = Alone(sampling=(1.0, 2.0, 4.0), forward=(0.5,), base_bytes=1, peak_bytes=2)
    whole = BenchmarkResult("a", "", None, "ok", sampling=Timing.of([3.0]), forward=Timing.of([0.5]), alone=alone)
    assert whole.paired_to_alone == 1.5
    forwards = BenchmarkResult("a", "", None, "ok", forward=Timing.of([0.25]), alone=alone)
    assert forwards.paired_to_alone == 0.5
    assert BenchmarkResult("a", "", None, "failed").paired_to_alone is None
    data = json.loads(json.dumps(whole.to_json()))
    assert data["sampling"] == {"min": 3.0, "median": 3.0, "max": 3.0, "count": 1}
    assert data["alone"]["sampling"]["median"] == 2.0
    assert (data["base_memory_bytes"], data["peak_memory_bytes"]) == (1, 2)
