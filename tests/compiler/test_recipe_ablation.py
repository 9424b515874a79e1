"""Recipes without some of their components: what each one is, and what is left of the pipeline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qcgraph.cli import run
from qcgraph.compiler.default_pipeline import default_pipeline
from qcgraph.errors import UsageError
from qcgraph.export.targets import TARGETS
from qcgraph.recipe import Recipe

FULL = Recipe().override(bits="w6a6", compensate="vc")  # by default the others are all on, with few bits
CHANGES: dict[str, dict[str, object]] = {
    "tgq": {"quantization.groups": 1},
    "mrq": {"quantization.regions": False},
    "ho": {"quantization.scales": "range"},
    "tap": {"calibration.selection": "random"},
    "vc": {"compensation.mode": "off"},
    "dec": {"quantization.correction": "off"},
    "equalize": {"quantization.equalize": False},
    "feedback": {"quantization.rounding": "search"},
}


def changes(recipe: Recipe, original: Recipe = FULL) -> dict[str, Any]:
    """What differs from another recipe, by section and key."""
    before = original.model_dump()
    return {
        f"{section}.{key}": value
        for section, keys in recipe.model_dump().items()
        for key, value in keys.items()
        if before[section][key] != value
    }


def passes(*ablated: str) -> dict[str, str]:
    """The texts of the default passes by their names."""
    pipeline = default_pipeline(FULL.ablated(ablated), TARGETS["onnxruntime-cpu"])
    return {pass_.name: pass_.text for pass_ in pipeline}


def test_these_are_all() -> None:
    assert set(Recipe.COMPONENTS) == set(CHANGES)


@pytest.mark.parametrize("name", CHANGES)
def test_each_changes_its_own_keys(name: str) -> None:
    assert changes(FULL.ablated([name])) == CHANGES[name]


@pytest.mark.parametrize("name", CHANGES)
def test_without_it_there_is_nothing_to_switch_off(name: str) -> None:
    once = FULL.ablated([name])
    assert once.ablated([name]) == once


def test_nothing_is_switched_off_unless_it_is_named() -> None:
    assert FULL.ablated([]) == FULL


@pytest.mark.parametrize("names", [["tgq", "tap"], ["tap", "tgq"], ["vc", "dec", "mrq", "equalize"]])
def test_several_change_the_keys_of_all(names: list[str]) -> None:
    expected = {key: value for name in names for key, value in CHANGES[name].items()}
    assert changes(FULL.ablated(names)) == expected


@pytest.mark.parametrize("names", [["ho", "feedback"], ["feedback", "ho"]])
def test_without_both_forms_of_the_search_weights_are_rounded_to_nearest(names: list[str]) -> None:
    """What is left of rounding with feedback is the search of weight scales, which is a part of HO."""
    recipe = FULL.ablated(names)
    assert recipe.quantization.rounding == "nearest"
    assert changes(recipe) == {"quantization.scales": "range", "quantization.rounding": "nearest"}


def test_without_ho_a_recipe_that_searches_weight_scales_rounds_to_nearest() -> None:
    searching = FULL.ablated(["feedback"])
    assert searching.ablated(["ho"]).quantization.rounding == "nearest"
    assert FULL.ablated(["ho"]).quantization.rounding == "feedback"


def test_a_recipe_that_rounds_to_nearest_has_no_feedback_to_lose() -> None:
    recipe = Recipe.from_toml('[quantization]\nrounding = "nearest"\n')
    assert recipe.ablated(["feedback"]).quantization.rounding == "nearest"


def test_what_is_ablated_is_written_and_read_like_any_recipe() -> None:
    recipe = FULL.ablated(list(CHANGES))
    assert Recipe.from_toml(recipe.to_toml()) == recipe


def test_other_choices_stay() -> None:
    recipe = Recipe.load("fast").override(steps=7, seed=3, bits="w4a6")
    kept = recipe.ablated(list(CHANGES))
    assert (kept.sampling, kept.cache, kept.target) == (recipe.sampling, recipe.cache, recipe.target)
    assert (kept.quantization.bits, kept.calibration.seed) == ("w4a6", 3)


@pytest.mark.parametrize(
    ("name", "hint"), [("equalise", "did you mean 'equalize'?"), ("nonsense", "tgq"), ("", "tgq"), ("HO", "ho")]
)
def test_an_unknown_component(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"unknown component {name!r}") as caught:
        FULL.ablated(["tgq", name])
    assert caught.value.where == "--ablate"
    assert hint in str(caught.value.hint)
    assert caught.value.hint


def test_all_components_are_in_the_whole_pipeline() -> None:
    found = passes()
    assert list(found)[:3] == ["plan-equalization", "equalize", "calibrate"]
    assert "selection=tap" in found["calibrate"]
    assert found["group-timesteps"] == "group-timesteps"  # 8 groups, where they are best
    assert found["search-scales"] == "search-scales"
    assert found["round-weights"] == "round-weights"
    assert found["fit-requantization"] == "fit-requantization"
    assert {"fit-compensation", "insert-compensation"} <= set(found)


@pytest.mark.parametrize(
    ("ablated", "gone", "left"),
    [
        (["tgq"], [], {"group-timesteps": "group-timesteps{groups=1}"}),
        (["mrq"], [], {"search-scales": "search-scales{regions=false}"}),
        (["ho"], [], {"search-scales": "search-scales{objective=range}", "round-weights": "round-weights"}),
        (["ho", "mrq"], ["search-scales"], {"round-weights": "round-weights"}),
        (["tap"], [], {"calibrate": "calibrate{selection=random}"}),
        (["vc"], ["fit-compensation", "insert-compensation"], {}),
        (["dec"], ["fit-requantization"], {}),
        (["equalize"], ["plan-equalization", "equalize"], {}),
        (["feedback"], [], {"round-weights": "round-weights{method=search}"}),
        (["feedback", "ho"], ["round-weights"], {"search-scales": "search-scales{objective=range}"}),
    ],
    ids=",".join,
)
def test_each_changes_its_own_passes(ablated: Sequence[str], gone: Sequence[str], left: dict[str, str]) -> None:
    whole = passes()
    assert passes(*ablated) == {name: text for name, text in whole.items() if name not in gone} | left


def test_without_all_of_them_quantization_is_the_plain_one() -> None:
    found = passes(*CHANGES)
    new = {"plan-equalization", "equalize", "search-scales", "round-weights", "fit-requantization", "fit-compensation"}
    assert not new & set(found)
    quantizing = [name for name in found if name != "lower-linear"]
    assert quantizing == ["calibrate", "group-timesteps", "plan-quant", "insert-qdq"]
    whole = passes()
    assert {name: found[name] for name in ("plan-quant", "insert-qdq")} == {
        name: whole[name] for name in ("plan-quant", "insert-qdq")
    }


def compiled(*arguments: str, model: Path | str = "digits") -> int:
    return run(["compile", str(model), *arguments])


@pytest.mark.parametrize("names", ["nonsense", "tgq,nonsense", "tgq, nonsense", ""])
def test_the_command_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str], names: str) -> None:
    assert compiled("--ablate", names) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: --ablate: unknown component ")
    assert "\n\nhint: " in shown.err


def test_the_help_names_all_components(capsys: pytest.CaptureFixture[str]) -> None:
    assert compiled("--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"Switch components off: {', '.join(Recipe.COMPONENTS)}." in text


@pytest.mark.slow
def test_the_command_switches_them_off(capsys: pytest.CaptureFixture[str], small_digits: Path) -> None:
    options = ("--ablate", "equalize, ho,feedback", "--bits", "w6a6", "--compensate", "vc", "--dry-run", "--json")
    assert compiled(*options, model=small_digits) == 0
    report = json.loads(capsys.readouterr().out)
    expected = FULL.ablated(["equalize", "ho", "feedback"])
    assert report["recipe"] == expected.model_dump()
    assert report["pipeline"] == default_pipeline(expected, TARGETS["onnxruntime-cpu"]).text


def test_a_pipeline_of_ones_own_has_no_components() -> None:
    recipe = Recipe.from_toml('[pipeline]\npasses = "plan-cache{interval=2},insert-cache"')
    assert recipe.ablated([]) == recipe
    with pytest.raises(UsageError, match="a pipeline of its own"):
        recipe.ablated(["tgq"])


@pytest.mark.parametrize(
    ("bits", "scales", "regions", "expected"),
    [
        ("w8a8", "auto", "auto", None),
        ("w4a8", "auto", "auto", None),
        ("w6a6", "auto", "auto", "search-scales"),
        ("auto=6", "auto", "auto", "search-scales"),
        ("w8a8", "fisher", "auto", "search-scales"),
        ("w8a8", "auto", True, "search-scales{objective=range}"),
        ("w6a6", "range", "auto", "search-scales{objective=range}"),
        ("w6a6", "range", False, None),
    ],
)
def test_scales_are_searched_where_it_pays(bits: str, scales: str, regions: object, expected: str | None) -> None:
    recipe = Recipe.model_validate({"quantization": {"bits": bits, "scales": scales, "regions": regions}})
    texts = {pass_.name: pass_.text for pass_ in default_pipeline(recipe, TARGETS["onnxruntime-cpu"])}
    assert texts.get("search-scales") == expected
