"""Facts survive JSON exactly, and a program holds one of a type."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from qcgraph.facts import (
    FACT_TYPES,
    ActivationQuant,
    CachePlan,
    Compensation,
    Facts,
    QuantPlan,
    Ranges,
    Reference,
    SiteQuant,
    SiteRange,
    TimestepGroups,
    WeightQuant,
    decode,
)
from qcgraph.spec import ModelSpec
from qcgraph.steps import Fingerprint, Step, StepPlan, Update

THIRD = 1 / 3
SITE = SiteRange((0, 2), (-THIRD, -1e-30), (0.1, 5e300), (THIRD, 0.0))
QUANT = SiteQuant(ActivationQuant((THIRD, 0.1), (3, 4), 0, 255, "uint8"), WeightQuant(64))
EXAMPLES = (
    ModelSpec("toy", (1, 8, 8), 10, 10, 1),
    StepPlan(
        Fingerprint("m", "ddpm", 2, THIRD), (Step(9.5, Update(THIRD, -0.1, 1e-17)), Step(0.0, Update(1, 1), "reuse", 1))
    ),
    CachePlan(0, 5, (True, False)),
    Ranges({"a": SITE}, {"a": SITE}, 3),
    Reference(((THIRD,),), ((0.1,),), 7, 3),
    TimestepGroups((THIRD, 0.0)),
    QuantPlan({"a": QUANT}),
    Compensation(((1.0, THIRD),), ((0.0, 0.1),), 1, ((1.0, 3.0),)),
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
        decode(CachePlan, {"first_block": 0, "last_block": "many", "computes": [True]})


def test_a_fact_replaces_the_one_of_its_type() -> None:
    facts = Facts([CachePlan(0, 1, (True,))]).with_(CachePlan(0, 2, (True,)))
    assert facts[CachePlan].last_block == 2
    assert facts.get(QuantPlan) is None
