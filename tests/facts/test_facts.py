"""Facts survive JSON exactly, and a program holds one of a type."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
from pydantic import ValidationError

from qcgraph.facts import (
    FACT_TYPES,
    ActivationQuant,
    AttentionNodes,
    AttentionPlan,
    AttentionQuant,
    CachedValue,
    CachePlan,
    CalibrationSet,
    Compensation,
    ComputeType,
    Equalization,
    EqualizationPlan,
    EqualizedActivation,
    Fact,
    Facts,
    ForecastFit,
    ForecastStep,
    LinearNodes,
    Precision,
    QuantizedAttention,
    QuantizedLinear,
    QuantizedSites,
    QuantPlan,
    Ranges,
    Reference,
    RegionQuant,
    Rehearsed,
    Requantization,
    RoundedWeight,
    RoundedWeights,
    SchedulePlan,
    SiteCorrection,
    SiteQuant,
    SiteRange,
    SolverFit,
    SolverPlan,
    SolverTargets,
    TimestepGroups,
    WeightQuant,
    decode,
)
from qcgraph.plan.roles import COMPUTES, REUSES, prepares
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import Earlier, Fingerprint, Step, StepPlan, Update

THIRD = 1 / 3
SITE = SiteRange((0, 2), (-THIRD, -1e-30), (0.1, 5e300), (THIRD, 0.0))
CODES = ActivationQuant((THIRD, 0.1), (3, 4), 0, 255, "uint8")
QUANT = SiteQuant(CODES, WeightQuant(64))
REGIONS, WEIGHT = "in two regions, above zero steps of 8, bits 8 6", "weight codes -64..64 per channel"
EXAMPLES = (
    ModelSpec.class_conditional("toy", (1, 8, 8), 10, 10, 1),
    StepPlan(
        Fingerprint("m", "ddpm", 2, THIRD),
        (Step(9.5, Update(THIRD, -0.1, 1e-17), "full"), Step(0.0, Update(1, 1), "reuse", 1)),
        {"full": COMPUTES, "reuse": REUSES, "prepare_full": prepares("full")},
    ),
    SolverPlan("converged", 5, (Update(THIRD, -0.1), Update(1, 1, 0.0, (Earlier(THIRD, 1e-30),))), 3, (THIRD, 0.5)),
    SolverTargets(2**62, 4, ("AAAA", "AAA=")),
    SolverFit((None, 1e-8), (THIRD, 1e-30), (0.5, 5e300), 4),
    CachePlan(
        (CachedValue("cache_0", 0, 5), CachedValue("cache_1", 3, 3, 1)), {"reuse": ("cache_0",)}, 3, (None, "reuse")
    ),
    Rehearsed(0.001, 0.002, 8),
    SchedulePlan("joint", "onnxruntime", 0.3, 1e-30, None),
    Ranges({"a": SITE}, {"a": SITE}, 3),
    Reference(((THIRD,),), ((0.1,),), 7, 3),
    EqualizationPlan((EqualizedActivation(("a", "b"), (THIRD, 0.0), (THIRD, 1.0)),)),
    Equalization({"a": (THIRD, 1.0)}, {"a": (1.0, 3.0)}),
    CalibrationSet("tap", 9, (0, 1), {"class_label": (3, 10), "strength": (THIRD, 1e-30)}, "AAAA"),
    TimestepGroups((THIRD, 0.0)),
    QuantPlan({"a": QUANT}),
    QuantizedSites(
        {
            "a": QuantizedLinear(
                "a.weight", "a.weight_codes", "a.weight_scale", False, {"full": LinearNodes("q", "p", "r")}
            )
        },
        {"b": QuantizedAttention({"full": AttentionNodes({"query": ("q",), "probabilities": ("x", "y")}, ("p", "m"))})},
    ),
    RoundedWeights({"a": RoundedWeight("a.weight_rounded", "a.weight_rounded_scale", "0f", WeightQuant(7)), "b": None}),
    Requantization({"a": SiteCorrection((THIRD, 1.0), (0.0, -1e-30))}),
    AttentionPlan(
        {
            "a": AttentionQuant(CODES, CODES, RegionQuant((0.25, 2.0**-19), 127, "uint8", 2), CODES),
            "b": AttentionQuant(CODES, CODES, CODES, CODES),
        }
    ),
    ForecastFit("affine", (ForecastStep("cache_0", 1, THIRD, 1e-30),)),
    Compensation(((1.0, THIRD),), ((0.0, 0.1),), 1, THIRD),
    Precision("f16", THIRD, {"full": ("sin", "cos"), "reuse": ()}),
    ComputeType("f16"),
)


def test_there_is_an_example_of_every_fact() -> None:
    assert {type(example) for example in EXAMPLES} == set(FACT_TYPES)


def test_all_facts_survive_json_exactly() -> None:
    facts = Facts(EXAMPLES)
    again = Facts.decode(json.loads(json.dumps(facts.encode(), allow_nan=False)))
    for example in EXAMPLES:
        assert again[type(example)] == example


def test_data_of_another_shape_is_refused() -> None:
    with pytest.raises(ValidationError):
        decode(CachePlan, {"values": [], "modes": {}, "history": "many", "draft": [None]})


def test_a_fact_replaces_the_one_of_its_type() -> None:
    facts = Facts([TimestepGroups((1.0,))]).with_(TimestepGroups((2.0,)))
    assert facts[TimestepGroups].lower_timesteps == (2.0,)
    assert facts.get(QuantPlan) is None


def test_every_fact_says_in_lines_what_it_holds() -> None:
    """Those that say nothing are told by the graphs."""
    silent = {ComputeType, QuantizedSites, RoundedWeights}
    for example in EXAMPLES:
        lines = example.lines()
        assert bool(lines) == (type(example) not in silent), type(example)
        assert all(line.strip() and "\n" not in line for line in lines)


def test_lines_stand_in_the_order_of_the_table_whatever_the_order_of_the_passes() -> None:
    assert [type(fact) for fact in Facts(reversed(EXAMPLES))] == list(FACT_TYPES)


@pytest.mark.parametrize(
    ("fact", "lines"),
    [
        (
            SolverPlan("converged", 50, (Update(1, 1),) * 13, 3, (0.0123, 0.5)),
            ["solver: 13 of 50 steps, fitted to the converged run, mean squared error 0.012"],
        ),
        (SolverPlan("run", 9, (Update(1, 1),), 0, ()), ["solver: 1 of 9 steps, fitted to the run itself"]),
        (SolverTargets(0, 4, ()), ["solver targets of 4 trajectories"]),
        (
            SolverFit((None, 1e-8), (0.5, 0.01234), (0.5, 0.2), 4),
            ["solver fit, last error 0.0123 rms, 1 plain, 4 trajectories"],
        ),
        (SolverFit((1e-8,), (0.5,), (0.5,), 4), ["solver fit, last error 0.5 rms, 4 trajectories"]),
        (EqualizationPlan(()), []),
        (Requantization({}), []),
        (ForecastFit("dec", ()), ["forecast dec at no step"]),
        (CachePlan((), {}, 3, (None,)), []),
        (Precision("bf16", 123.4, {}), ["computed in bf16, values up to 123"]),
        (
            Compensation(((1.0, 0.9),), ((0.0, 0.1),), 1, THIRD),
            ["compensation gains 0.9000 .. 1.0000 over 1 steps, 1 clamped"],
        ),
        (
            SchedulePlan("joint", "onnxruntime", 0.3, 1e-30, 0.01),
            ["schedule joint: 30.0% of computing every step (measured on onnxruntime), mean squared error 0.01"],
        ),
        (
            QuantPlan({"a": SiteQuant(replace(CODES, shift=3, bits=(8, 6)), WeightQuant(64))}),
            [
                f"quant a: activation uint8 codes 0..255 {REGIONS}, scales 0.1 .. 0.3333 over 2 groups; {WEIGHT}",
            ],
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_lines(fact: Fact, lines: list[str]) -> None:
    assert fact.lines() == lines


@dataclass(frozen=True)
class Foreign:
    """A fact as another distribution has it."""

    counts: dict[str, int]

    def lines(self) -> list[str]:
        return [f"counts {self.counts}"]


def test_a_fact_of_another_distribution_is_written_and_left_out_where_it_is_read() -> None:
    fact = Foreign({"full": 3})
    facts = Facts([TimestepGroups((1.0,)), fact])
    assert facts[Foreign] == fact
    assert list(facts)[-1] == fact
    encoded = json.loads(json.dumps(facts.encode()))
    assert encoded[f"{Foreign.__module__}:Foreign"] == {"counts": {"full": 3}}
    read = Facts.decode(encoded)
    assert list(read) == [TimestepGroups((1.0,))]
    assert read[TimestepGroups] == facts[TimestepGroups]
