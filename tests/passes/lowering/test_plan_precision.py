"""plan-precision: the 16-bit type that holds what was seen, and the nodes whose digits count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from qcgraph.errors import UsageError
from qcgraph.facts import Precision
from qcgraph.ir.program import Program

Run = Callable[[str, Program], Program]


def with_large_values(program: Program, factor: float) -> Program:
    """The program, its first embedding this much larger; nothing else of it overflows in float32."""
    constants = dict(program.constants)
    constants["pos_embed"] = constants["pos_embed"] + factor
    return replace(program, constants=constants)


def test_golden(cached: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    golden_diff("plan-precision", cached, run("plan-precision", cached))


def test_graphs_and_constants_stay_as_they_are(cached: Program, run: Run) -> None:
    program = run("plan-precision", cached)
    assert program.variants == cached.variants
    assert program.constants == cached.constants


def test_the_sines_and_the_compensation_stay_in_float32(cached: Program, run: Run) -> None:
    calibrated = run("calibrate{trajectories=2},fit-compensation,insert-compensation", cached)
    wide = run("plan-precision", calibrated).facts[Precision].wide
    assert set(wide) == {"full", "reuse"}
    for names in wide.values():
        assert {"sin", "cos", "compensate", "select", "select_1", "select_2"} <= set(names)
        assert not any(name.startswith(("linear", "conv2d", "layer_norm")) for name in names)


def test_float32_is_planned_whatever_was_seen(cached: Program, run: Run) -> None:
    program = run("plan-precision{dtype=float32}", with_large_values(cached, 2e4))
    assert program.facts[Precision].dtype == "f32"
    assert program.history[-1].refusals == ()


@pytest.mark.slow
def test_auto_takes_the_type_that_can_hold_what_was_seen(cached: Program, run: Run) -> None:
    assert run("plan-precision", cached).facts[Precision].dtype == "f16"
    large = run("plan-precision", with_large_values(cached, 2e4))
    fact = large.facts[Precision]
    assert fact.dtype == "bf16"
    assert fact.largest >= 2e4
    (refusal,) = large.history[-1].refusals
    assert refusal.where == "float16"
    assert "2.01e+04" in refusal.reason


def test_float16_that_would_overflow_is_refused(cached: Program, run: Run) -> None:
    with pytest.raises(UsageError, match="values reach 2") as caught:
        run("plan-precision{dtype=float16}", with_large_values(cached, 2e4))
    assert caught.value.hint == "give bfloat16, or auto"


@pytest.mark.parametrize(("options", "message"), [("dtype=float8", "float8"), ("trajectories=0", "trajectories 0")])
def test_wrong_options(cached: Program, run: Run, options: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(f"plan-precision{{{options}}}", cached)
