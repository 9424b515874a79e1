"""Passes in an order in which one would take what another decided for something else: refused, in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from torch import fx

from qcgraph.errors import ContractError
from qcgraph.facts import CachePlan
from qcgraph.ir.graph import Variant, copy_graph
from qcgraph.ir.program import Program
from qcgraph.plan.roles import COMPUTES, prepares
from qcgraph.plan.steps import StepPlan

Run = Callable[[str, Program], Program]
CALIBRATE = "calibrate{trajectories=2 selection=uniform latents=6}"


@pytest.fixture(scope="module")
def stages(captured: Program, run: Run) -> dict[str, Program]:
    """Programs by what was decided for them last."""
    cached = run("plan-cache,insert-cache", captured)
    calibrated = run(CALIBRATE, cached)
    grouped = run("group-timesteps{groups=2}", calibrated)
    planned = run("plan-quant", grouped)
    return {
        "captured": captured,
        "cached": cached,
        "calibrated": calibrated,
        "grouped": grouped,
        "planned": planned,
        "rounded": run("round-weights", planned),
        "fitted": run("fit-requantization", planned),
        "float8": run("plan-quant{format=fp8}", grouped),
        "unsplit": run(CALIBRATE, captured),
        "hoisted": run("hoist-adaln", cached),
        "forecast": run("insert-forecast", calibrated),
        "compensated": run("fit-compensation,insert-compensation", calibrated),
        "reduced": run("plan-precision{dtype=bfloat16},reduce-precision", cached),
        "quantized": run("insert-qdq", planned),
        "solved": run("plan-solver{steps=3 target=run trajectories=2}", captured),
    }


@pytest.mark.parametrize(
    ("stage", "text", "says", "hint"),
    [
        ("solved", "plan-solver", "SolverPlan is decided on", "before plan-solver"),
        ("solved", "fit-solver,fit-solver", "needs SolverTargets", "plan-solver before it"),
        ("cached", "plan-solver", "CachePlan is decided on", "before plan-cache"),
        ("calibrated", "plan-solver", "CachePlan, Ranges is decided on", "before calibrate and plan-cache"),
        ("quantized", "plan-solver", "CachePlan, Ranges, QuantPlan is decided on", "and plan-quant"),
        ("compensated", "plan-solver", "CachePlan, Ranges, Compensation is decided on", "fit-compensation"),
        ("reduced", "plan-solver", "CachePlan, Precision is decided on", "plan-precision"),
        ("captured", "fit-solver", "needs SolverPlan, SolverTargets", "run plan-solver before it"),
        ("unsplit", "plan-equalization", "Ranges, CalibrationSet is decided on", "before calibrate"),
        ("planned", "group-timesteps", "QuantPlan is decided on", "before plan-quant"),
        ("planned", CALIBRATE, "QuantPlan is decided on", "before plan-quant"),
        ("rounded", "plan-quant", "RoundedWeights is decided on", "before round-weights"),
        ("rounded", "search-scales", "RoundedWeights is decided on", "before round-weights"),
        ("rounded", "allocate-bits", "RoundedWeights is decided on", "before round-weights"),
        ("fitted", "round-weights", "Requantization is decided on", "before fit-requantization"),
        ("reduced", "insert-forecast", "Precision is decided on", "before plan-precision"),
        ("reduced", "plan-precision", "Precision is decided on", "before plan-precision"),
        ("reduced", "reduce-precision", "reduced already", "once"),
        ("float8", "round-weights", "planned to be fp8", "format=int"),
        ("float8", "search-scales", "planned to be fp8", "format=int"),
        ("float8", "allocate-bits", "planned to be fp8", "format=int"),
        ("quantized", "insert-qdq", "cannot be: its weight is computed", "insert-qdq once"),
        ("cached", "plan-cache", "split already", "before insert-cache"),
        ("cached", "insert-cache", "split already", "once"),
        ("forecast", "insert-forecast", "is forecast already", "once"),
        ("compensated", "insert-compensation", "compensated already", "once"),
        ("hoisted", "hoist-adaln", "hoisted already", "once"),
    ],
)
def test_refused(stages: dict[str, Program], run: Run, stage: str, text: str, says: str, hint: str) -> None:
    with pytest.raises(ContractError, match=says) as caught:
        run(text, stages[stage])
    assert hint in str(caught.value.hint)


def test_dropping_variants_keeps_those_that_prepare(stages: dict[str, Program], run: Run) -> None:
    """And drops those that prepare what is dropped."""
    hoisted = stages["hoisted"]
    assert run("drop-variants", hoisted).digest == hoisted.digest
    steps = hoisted.facts[StepPlan].all_computing
    program = run("drop-variants", hoisted.with_facts(steps))
    assert set(program.variants) == {"full", "prepare_full"}
    assert program.facts[StepPlan].roles == {"full": COMPUTES, "prepare_full": prepares("full")}
    assert not program.facts[CachePlan].modes


def test_forecasts_are_found_in_the_graph(stages: dict[str, Program], run: Run) -> None:
    """Whatever the constant with their coefficients is called."""
    program = stages["forecast"]
    fitted = run("fit-forecast", program)
    renamed = {
        f"{name}_x" if name.startswith("forecast.") else name: value for name, value in program.constants.items()
    }
    variants = {name: replace(item, graph=_renamed(item)) for name, item in program.variants.items()}
    other = run("fit-forecast", replace(program, constants=renamed, variants=variants))
    for name, value in fitted.constants.items():
        if name.startswith("forecast."):
            assert other.constants[f"{name}_x"].equal(value)
            assert not value.equal(program.constants[name])


def _renamed(variant: Variant) -> fx.Graph:
    graph = copy_graph(variant.graph)
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith("forecast."):
            node.target = f"{node.target}_x"
    return graph
