"""What recipes ask for and targets cannot hold, or asks of their own: refused, told, or added."""

from __future__ import annotations

import pytest

from qcgraph.compiler.default_pipeline import default_pipeline, target_notes
from qcgraph.errors import UsageError
from qcgraph.export.targets import TARGETS, Target
from qcgraph.recipe import Recipe

CONSTANT = [target for target in TARGETS.values() if target.constant_scales]
FREE = [target for target in TARGETS.values() if not target.constant_scales]


def recipe(keys: str) -> Recipe:
    return Recipe.from_toml(f"[quantization]\n{keys}\n")


@pytest.mark.parametrize("target", CONSTANT, ids=lambda target: target.name)
def test_two_regions_that_are_asked_for_are_refused(target: Target) -> None:
    with pytest.raises(UsageError, match=f"{target.name} takes constant scales") as raised:
        default_pipeline(recipe("regions = true"), target)
    assert raised.value.where == "quantization.regions"
    assert "regions=false" in default_pipeline(recipe('regions = false\nbits = "w6a6"'), target).text
    assert "search-scales" not in default_pipeline(recipe('regions = true\nbits = "off"'), target).text


@pytest.mark.parametrize("target", FREE, ids=lambda target: target.name)
def test_by_default_there_are_regions_where_they_fit(target: Target) -> None:
    few = 'bits = "w6a6"'
    assert default_pipeline(recipe(few), target) == default_pipeline(recipe(f"{few}\nregions = true"), target)
    assert target_notes(recipe('bits = "w6a6"\nattention = true'), target) == ()


@pytest.mark.parametrize("target", CONSTANT, ids=lambda target: target.name)
def test_a_default_that_does_not_fit_is_told(target: Target) -> None:
    assert target_notes(recipe(""), target) == ()  # 8 bits have no regions anywhere
    (note,) = target_notes(recipe('bits = "w6a6"'), target)
    assert note == f"{target.name} takes constant scales: no activation has two regions"
    assert target_notes(recipe('bits = "w6a6"\nregions = false'), target) == ()
    assert "the same bits in all timestep groups" in target_notes(recipe('bits = "auto=6"'), target)[1]


@pytest.mark.parametrize("name", ["tensorrt-rtx", "tensorrt"])
def test_quantized_attention_that_is_not_fused_is_told(name: str) -> None:
    asked = recipe("attention = true\nregions = false")
    (note,) = target_notes(asked, TARGETS[name])
    assert note.startswith("attention of quantized products is not fused")
    assert target_notes(asked, TARGETS["onnx"]) == ()


@pytest.mark.parametrize("name", TARGETS)
def test_a_budget_in_milliseconds_of_another_runtime_is_told(name: str) -> None:
    asked = Recipe().override(bits="off", cache="budget=0.4")
    notes = target_notes(asked, TARGETS[name])
    if name.startswith("tensorrt"):
        assert notes[0].startswith(
            f"the budget counts milliseconds of ONNX Runtime on the CPU, which are not those of {name}"
        )
    else:
        assert notes == ()
    arithmetic = asked.model_copy(update={"cache": asked.cache.model_copy(update={"cost": "macs"})})
    assert target_notes(arithmetic, TARGETS[name]) == ()


@pytest.mark.parametrize("name", ["onnxruntime-cpu", "onnx", "onnx-opset21"])
def test_fp8_is_refused_where_nothing_multiplies_it(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} does not multiply fp8") as raised:
        default_pipeline(recipe('bits = "fp8"'), TARGETS[name])
    assert "torch, tensorrt, tensorrt-rtx" in str(raised.value.hint)


def test_fp8_comes_with_16_bits_and_without_quantized_attention() -> None:
    text = default_pipeline(recipe('bits = "fp8"'), TARGETS["tensorrt-rtx"]).text
    assert "plan-quant{format=fp8}" in text
    assert text.endswith("reduce-precision")
    assert not any(name in text for name in ("search-scales", "round-weights", "equalize"))
    wide = Recipe().override(bits="fp8", precision="float32")
    with pytest.raises(UsageError, match="tensorrt does not multiply fp8"):
        default_pipeline(wide, TARGETS["tensorrt"])
    with pytest.raises(UsageError, match="attention are not quantized to fp8"):
        default_pipeline(recipe('bits = "fp8"\nattention = true'), TARGETS["torch"])


def test_sixteen_bits_are_refused_where_integers_are_fused() -> None:
    with pytest.raises(UsageError, match="float32, not in float16"):
        default_pipeline(Recipe().override(precision="float16"), TARGETS["onnxruntime-cpu"])
    assert (
        "plan-precision{dtype=bfloat16},reduce-precision"
        in default_pipeline(Recipe().override(precision="bfloat16"), TARGETS["onnx"]).text
    )
    assert "reduce-precision" not in default_pipeline(Recipe().override(precision="float32"), TARGETS["tensorrt"]).text


def test_a_resolved_recipe_compiles_again() -> None:
    again = Recipe.from_toml(Recipe().to_toml())
    assert again == Recipe()
    for target in TARGETS.values():
        default_pipeline(again, target)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_an_own_pipeline_ends_with_what_the_target_asks_for(target: Target) -> None:
    asked = [pass_.name for pass_ in default_pipeline(recipe('bits = "off"'), target)]
    own = Recipe.from_toml('[pipeline]\npasses = "plan-cache{interval=2},insert-cache"\n')
    found = default_pipeline(own, target)
    assert [pass_.name for pass_ in found] == ["plan-cache", "insert-cache", *asked]
    assert default_pipeline(Recipe.from_toml(f"[pipeline]\npasses = '{found.text}'\n"), target) == found
    notes = target_notes(own, target)
    assert notes == (
        (f"after the passes of the recipe come those that {target.name} asks for: {', '.join(asked)}",) if asked else ()
    )


def test_settings_that_an_own_pipeline_overrules_are_told() -> None:
    own = Recipe.from_toml('[pipeline]\npasses = "plan-cache{interval=2},insert-cache"\n').override(target="torch")
    assert target_notes(own, TARGETS["torch"]) == ()
    changed = own.override(solver="fitted", cache="interval=4", compensate="vc", seed=3)
    (note,) = target_notes(changed, TARGETS["torch"])
    assert "solver.mode, cache.schedule, compensation.mode: without effect" in note


def test_a_fitted_solver_comes_first_and_is_fitted_last() -> None:
    """But for what changes no value; with the settings of the recipe, and without what compensates besides."""
    text = '[solver]\nmode = "fitted=4"\ntarget = "run"\nhistory = 1\n[calibration]\nseed = 5\ntrajectories = 6\n'
    asked = Recipe.from_toml(text).override(cache="interval=2", compensate="vc", hoist_adaln=True, precision="float16")
    first, *between, last = default_pipeline(asked, TARGETS["tensorrt-rtx"])
    assert first.text == "plan-solver{steps=4 target=run history=1 trajectories=6 seed=5}"
    names = [pass_.name for pass_ in (*between, last)]
    assert names[names.index("fit-solver") :][:2] == ["fit-solver", "hoist-adaln"]
    assert not [name for name in names[: names.index("fit-solver")] if name.startswith(("hoist", "plan-precision"))]
    assert "fit-compensation" not in names
    (note,) = (note for note in target_notes(asked, TARGETS["tensorrt-rtx"]) if "variance" in note)
    assert "the fitted updates correct" in note
    assert not [note for note in target_notes(asked.override(compensate="off"), TARGETS["torch"]) if "variance" in note]


def test_without_a_fitted_solver_nothing_is_fitted() -> None:
    for target in TARGETS.values():
        names = {pass_.name for pass_ in default_pipeline(Recipe(), target)}
        assert not names & {"plan-solver", "fit-solver"}


def test_an_error_in_an_own_pipeline_names_the_key_of_the_recipe() -> None:
    with pytest.raises(UsageError, match="has no option 'intervall'") as caught:
        default_pipeline(Recipe.from_toml('[pipeline]\npasses = "plan-cache{intervall=2}"\n'), TARGETS["torch"])
    assert caught.value.where == "pipeline.passes"


@pytest.mark.parametrize(("trajectories", "count"), [("1", 1), ("23", 1), ("24", 0), ('"auto"', 0)])
def test_few_calibration_trajectories_are_told(trajectories: str, count: int) -> None:
    asked = Recipe.from_toml(f"[calibration]\ntrajectories = {trajectories}")
    notes = target_notes(asked, TARGETS["onnxruntime-cpu"])
    assert len(notes) == count
    assert all(
        note.startswith(f"{trajectories} calibration traject") and "with fewer than 24" in note for note in notes
    )
    assert target_notes(asked.override(bits="off"), TARGETS["onnxruntime-cpu"]) == ()
