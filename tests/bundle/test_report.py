"""The report of a compilation: read under its schema, refused in words, and documented field by field."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from qcgraph.bundle import Bundle, report, write_plan, writing
from qcgraph.bundle.report import (
    REPORT,
    REPORT_VERSION,
    CheckReport,
    CompileReport,
    EdgeReport,
    PassReport,
    RefusalReport,
    VariantReport,
)
from qcgraph.errors import BundleError
from qcgraph.plan.roles import TensorRole
from qcgraph.plan.spec import Interface, ModelSpec, TensorSpec
from qcgraph.plan.steps import Fingerprint, Step, StepPlan, Update
from qcgraph.recipe import Recipe
from qcgraph.recipe.gate import Verdict

ELSEWHERE = ("Recipe", "Verdict")  # the objects that other documents describe
DOCUMENT = (Path(__file__).parents[2] / "docs/report.md").read_text("utf-8")
SPEC = ModelSpec.class_conditional("toy", (1, 8, 8), 10, 10, 1)
PLAN = StepPlan(Fingerprint("m", "ddim", 1, 1.0), (Step(0.0, Update(1, 1)),))
MADE = CompileReport(
    model="toy",
    source="toy.pt",
    target="torch",
    recipe=Recipe(),
    plan="ddim, 1 steps, guidance 1",
    pipeline="insert-qdq",
    variants={"main": VariantReport(steps=1, macs=7)},
    mac_ratio=1 / 3,
    cache=None,
    timestep_groups=1,
    planned_sites=2,
    quantized_sites=1,
    quantized_attentions=0,
    linear_sites=3,
    cached_range_change=None,
    largest_variance_drift=None,
    passes=(
        PassReport(
            text="insert-qdq", changed=True, refusals=(RefusalReport(where="head", reason="outside"),), seconds=0.5
        ),
    ),
    gate=(Verdict("psnr>=20", 30.0, passed=True),),
    stages={"load": 0.1},
)


def bundle_with(folder: Path, data: Any) -> Bundle:
    """A bundle that holds this report."""
    with writing(folder, model="toy", target="torch") as place:
        write_plan(
            place,
            SPEC,
            PLAN,
            {"main": Interface((), (TensorSpec("noise_prediction", "f32", ("B",), TensorRole.PREDICTION),))},
        )
        (place / "recipe.lock.toml").write_text(Recipe().to_toml())
        if data is not None:
            (place / REPORT).write_text(json.dumps(data))
    return Bundle.open(folder)


def test_a_report_survives_json_exactly(tmp_path: Path) -> None:
    assert bundle_with(tmp_path / "toy", json.loads(MADE.model_dump_json())).report == MADE


def test_a_bundle_without_a_report_has_none(tmp_path: Path) -> None:
    assert bundle_with(tmp_path / "toy", None).report is None


@pytest.mark.parametrize(
    ("change", "says", "hint"),
    [
        ({"schema_version": 2}, "has schema version 2; this qcgraph reads version 1", "upgrade"),
        ({"schema_version": 0}, "has schema version 0", "compile again"),
        ({"schema_version": "1"}, "has schema version '1'", "compile again"),
        ({"schema_version": None}, "has no schema version", "compile again"),
        ({"mac_ratio": "half"}, "mac_ratio: Input should be a valid number", "again"),
        ({"variants": {"main": {"steps": 1}}}, "variants.main.macs: Field required", "again"),
        ({"costs": {}}, "costs: Extra inputs are not permitted", "again"),
    ],
    ids=["newer", "older", "text", "none", "number", "missing", "extra"],
)
def test_another_version_or_shape_is_refused(tmp_path: Path, change: dict[str, Any], says: str, hint: str) -> None:
    opened = bundle_with(tmp_path / "toy", json.loads(MADE.model_dump_json()) | change)
    with pytest.raises(BundleError, match=says) as caught:
        _ = opened.report
    assert REPORT in str(caught.value.where)
    assert hint in str(caught.value.hint)


def test_fields_are_validated_when_they_are_replaced() -> None:
    assert MADE.with_fields(seconds=3.5).seconds == 3.5
    assert MADE.with_fields(seconds=3.5).passes == MADE.passes
    with pytest.raises(ValidationError, match="linear_sites"):
        MADE.with_fields(linear_sites="many")


def test_what_json_cannot_hold_is_null() -> None:
    assert EdgeReport(name="cache_0", noise=0.0, change=0.1, snr=math.inf).snr is None
    check = CheckReport(name="parity", variant="main", passed=None, value=math.nan, limit=math.inf, detail="")
    assert (check.value, check.limit) == (None, None)
    assert json.loads(check.model_dump_json())["value"] is None


def section(name: str, schema: dict[str, Any]) -> str:
    """The table of an object."""
    rows = [f"| `{key}` | {kind(field)} | {field['description']} |" for key, field in schema["properties"].items()]
    return "\n".join([f"## {name}", "", "| field | type | what it holds |", "|---|---|---|", *rows])


def kind(field: dict[str, Any]) -> str:
    """The type of a field in words."""
    if "$ref" in field:
        return field["$ref"].rpartition("/")[2]
    if "anyOf" in field:
        return " or ".join(kind(one) for one in field["anyOf"])
    if "const" in field:
        return json.dumps(field["const"])
    if field["type"] == "array":
        return f"array of {kind(field['items'])}"
    if field["type"] == "object":
        return f"object of {kind(field['additionalProperties'])}"
    return str(field["type"])


def test_the_documented_tables_are_the_schema() -> None:
    """All objects but those that are described elsewhere: the recipe, and what a gate found."""
    whole = CompileReport.model_json_schema()
    own = [(name, part) for name, part in whole["$defs"].items() if hasattr(report, name) and name not in ELSEWHERE]
    tables = "\n\n".join(section(name, part) for name, part in [("CompileReport", whole), *own])
    assert tables in DOCUMENT, f"the tables should be:\n{tables}"
    assert f"version {REPORT_VERSION}" in DOCUMENT
