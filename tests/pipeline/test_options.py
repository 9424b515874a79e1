"""Options of passes: whatever is given is of the right type and in range, or refused before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import pytest

from qcgraph.compiler.default_pipeline import default_pipeline
from qcgraph.errors import UsageError
from qcgraph.export.targets import TARGETS
from qcgraph.pipeline import Pass, Pipeline, make_pass, registry
from qcgraph.pipeline.options import Bounds, option
from qcgraph.recipe import Recipe

WRONG = (
    float("nan"),
    float("inf"),
    float("-inf"),
    -1,
    -1e300,
    10**5000,
    1e300,
    "",
    "x" * 10**6,
    "\x00",
    b"8",
    [],
    {},
    object(),
    2**63,
)
OPTIONS = [(name, item.name) for name, kind in registry().items() for item in fields(kind)]


@pytest.mark.parametrize(("name", "key"), OPTIONS)
def test_no_wrong_value_is_taken(name: str, key: str) -> None:
    """Of these, one may be right for a single option: none of the numbers, and no text but an empty or a short one."""
    kind, default = registry()[name], getattr(registry()[name](), key)
    for value in WRONG:
        if isinstance(default, str) and isinstance(value, str) and not value:
            continue  # no plan to follow, which the pass says when it runs
        with pytest.raises(UsageError) as caught:
            kind(**{key: value})
        assert caught.value.hint
        assert len(str(caught.value)) < 600
        with pytest.raises(UsageError):
            make_pass(name, {key: value})


@pytest.mark.parametrize(("name", "key"), OPTIONS)
def test_a_truth_value_is_no_number_and_a_number_no_truth_value(name: str, key: str) -> None:
    default = getattr(registry()[name](), key)
    with pytest.raises(UsageError):
        make_pass(name, {key: 1 if isinstance(default, (bool, str)) else True})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("calibrate{trajectories=0}", "trajectories 0 is not a whole number from 1 to 100000 or null"),
        ("plan-steps{budget=0}", "budget 0.0 is not a number above 0 and at most 1"),
        ("fit-compensation{clamp=1}", "clamp 1.0 is not a number from 0 and below 1"),
        ("plan-quant{weight-bits=8.0}", "weight-bits 8.0 is not a whole number from 2 to 8"),
        ("plan-quant{symmetric=yes}", "symmetric 'yes' is not true or false"),
        ("round-weights{method=feedbck}", "method 'feedbck' is not feedback, search"),
        ("plan-cache{blocks=3}", "blocks 3 is not text"),
        ("plan-cache{interval=" + "9" * 5000 + "}", "is not a whole number"),
        ("plan-cache{interval=" + "[" * 5000 + "}", "is not a whole number"),
        ("plan-cache{interval=3 interval=5}", "says 'interval' twice"),
        ("apply-plan{plan=nothing}", "option plan"),
    ],
)
def test_text(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        Pipeline.parse(text)
    assert says in str(caught.value)
    assert caught.value.hint


def test_what_is_meant_is_guessed() -> None:
    with pytest.raises(UsageError) as caught:
        make_pass("round-weights", {"method": "feedbck"})
    assert "did you mean 'feedback'" in str(caught.value.hint)


def test_a_whole_number_is_a_float_where_one_is_wanted() -> None:
    made = make_pass("plan-steps", {"budget": 1})
    assert isinstance(getattr(made, "budget"), float)  # noqa: B009 - of a pass that is known by name only
    assert made.text == "plan-steps{budget=1.0}"


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        (Bounds(), "from 0 to 1e+09"),
        (Bounds(above=0, most=1), "above 0 and at most 1"),
        (Bounds(below=1), "from 0 and below 1"),
        (Bounds(above=0, below=1), "above 0 and below 1"),
    ],
)
def test_a_range_in_words(bounds: Bounds, words: str) -> None:
    assert bounds.words == words


def test_a_pass_of_ones_own_is_checked_too() -> None:
    @dataclass(frozen=True)
    class Own(Pass):
        name: ClassVar[str] = "own"
        kind: Literal["a", "b"] | None = None
        share: float | None = option(None, most=1, hint="half of it is 0.5")

        def run(self, program: Any, context: Any) -> Any:
            return program

    assert Own().share is None
    assert Own(kind="a", share=1).share == 1
    with pytest.raises(UsageError, match="half of it"):
        Own(share=2)
    with pytest.raises(UsageError, match="kind 'c' is not a, b or null"):
        Own(kind="c")  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", ["w8a8", "fp8", "auto=6", "off"])
@pytest.mark.parametrize("cache", ["off", "dps=2", "budget=0.5", "plan=800-200:FRFRF"])
def test_every_pass_that_samples_takes_as_many_trajectories_as_are_asked_for(bits: str, cache: str) -> None:
    recipe = Recipe.model_validate(
        {
            "calibration": {"trajectories": 3, "samples": 7, "seed": 5},
            "quantization": {"bits": bits},
            "cache": {"schedule": cache},
            "compensation": {"mode": "vc"},
            "target": {"name": "tensorrt"},
        }
    )
    passes = default_pipeline(recipe, TARGETS["tensorrt"])
    for made in passes:
        options = {item.name: getattr(made, item.name) for item in fields(made)}
        assert options.get("trajectories", 3) == 3, made.text
        if made.name == "calibrate":
            assert options["latents"] == 7
        assert options.get("seed", 5) == 5, made.text


def test_by_default_every_pass_takes_what_it_took() -> None:
    text = default_pipeline(Recipe(), TARGETS["onnxruntime-cpu"]).text
    assert "trajectories" not in text
    assert "latents" not in text
