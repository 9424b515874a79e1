"""Facts survive JSON exactly, and a program holds one of a type."""

from __future__ import annotations

import json

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
    Equalization,
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
    TimestepGroups,
    WeightQuant,
    decode,
)
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import Fingerprint, Step, StepPlan, Update

THIRD = 1 / 3
SITE = SiteRange((0, 2), (-THIRD, -1e-30), (0.1, 5e300), (THIRD, 0.0))
CODES = ActivationQuant((THIRD, 0.1), (3, 4), 0, 255, "uint8")
QUANT = SiteQuant(CODES, WeightQuant(64))
EXAMPLES = (
    ModelSpec("toy", (1, 8, 8), 10, 10, 1),
    StepPlan(
        Fingerprint("m", "ddpm", 2, THIRD), (Step(9.5, Update(THIRD, -0.1, 1e-17)), Step(0.0, Update(1, 1), "reuse", 1))
    ),
    CachePlan((CachedValue("cache_0", 0, 5), CachedValue("cache_1", 3, 3, 1)), {"reuse": ("cache_0",)}, 3, ("full",)),
    Rehearsed(0.001, 0.002, 8),
    SchedulePlan("joint", {"full": THIRD, "reuse": 0.1}, True, 0.3, 1e-30, None),
    Ranges({"a": SITE}, {"a": SITE}, 3),
    Reference(((THIRD,),), ((0.1,),), 7, 3),
    Equalization({"a": (THIRD, 1.0)}, {"a": (1.0, 3.0)}),
    CalibrationSet("tap", 9, (0, 1), (3, 10), "AAAA"),
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
    RoundedWeights(
        "feedback", {"a": RoundedWeight("a.weight_rounded", "a.weight_rounded_scale", "0f", WeightQuant(7)), "b": None}
    ),
    Requantization({"a": SiteCorrection((THIRD, 1.0), (0.0, -1e-30))}),
    AttentionPlan(
        {
            "a": AttentionQuant(CODES, CODES, RegionQuant((0.25, 2.0**-19), 127, "uint8", 2), CODES),
            "b": AttentionQuant(CODES, CODES, CODES, CODES),
        }
    ),
    ForecastFit("affine", (ForecastStep("cache_0", 1, THIRD, 1e-30),)),
    Compensation(((1.0, THIRD),), ((0.0, 0.1),), 1, ((1.0, 3.0),)),
    Precision("f16", THIRD),
)


def test_there_is_an_example_of_every_fact() -> None:
    assert {type(example) for example in EXAMPLES} == set(FACT_TYPES)


def test_all_facts_survive_json_exactly() -> None:
    facts = Facts(EXAMPLES)
    again = Facts.decode(json.loads(json.dumps(facts.encode())))
    for example in EXAMPLES:
        assert again[type(example)] == example


def test_data_of_another_shape_is_refused() -> None:
    with pytest.raises(ValidationError):
        decode(CachePlan, {"values": [], "modes": {}, "history": "many", "draft": ["full"]})


def test_a_fact_replaces_the_one_of_its_type() -> None:
    facts = Facts([TimestepGroups((1.0,))]).with_(TimestepGroups((2.0,)))
    assert facts[TimestepGroups].lower_timesteps == (2.0,)
    assert facts.get(QuantPlan) is None
