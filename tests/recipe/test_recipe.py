"""Recipes: presets, files, options; every wrong one is refused with the place and what would be right."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from qcgraph.errors import UsageError
from qcgraph.pipeline import Pipeline
from qcgraph.recipe import PRESETS, Recipe, preset_names


def test_presets() -> None:
    assert preset_names() == ("balanced", "careful", "fast")
    steps = [Recipe.load(name).fitted_steps for name in ("careful", "balanced", "fast")]
    assert steps == [17, 13, 8]


@pytest.mark.parametrize("name", preset_names())
def test_presets_do_not_depend_on_the_machine(name: str) -> None:
    recipe = Recipe.load(name)
    assert not recipe.is_cached or recipe.cache.cost == "macs"


@pytest.mark.parametrize("name", preset_names())
def test_every_choice_of_a_preset_is_explained(name: str) -> None:
    lines = (PRESETS / f"{name}.toml").read_text().splitlines()
    assert lines[0].startswith(f"# {name}: ")
    assert [line for line in lines if "=" in line and "  # " not in line and not line.startswith("#")] == []


@pytest.mark.parametrize("name", preset_names())
def test_round_trip(name: str) -> None:
    recipe = Recipe.load(name).override(guidance=0.1 + 0.2, seed=7, bits="w4a8")
    assert Recipe.from_toml(recipe.to_toml()) == recipe


def test_round_trip_of_pipeline_text() -> None:
    text = (
        "[pipeline]\npasses = 'plan-cache{interval=3 blocks=\"0..2\"},insert-cache'\n[calibration]\ntrajectories = 8\n"
    )
    recipe = Recipe.from_toml(text)
    assert recipe.pipeline.passes == 'plan-cache{interval=3 blocks="0..2"},insert-cache'
    assert Recipe.from_toml(recipe.to_toml()) == recipe


def test_written_recipe_says_everything() -> None:
    data = tomllib.loads(Recipe().to_toml())
    assert data == Recipe().model_dump()


def test_what_is_not_said_keeps_its_default() -> None:
    recipe = Recipe.from_toml("[sampling]\nsteps = 20\nguidance = 2\n")
    assert recipe == Recipe().override(steps=20, guidance=2.0)


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[target]\nname = 'torch'\n")
    assert Recipe.load(str(path)).target.name == "torch"


def test_derived_values() -> None:
    recipe = Recipe().override(bits="w4a6", cache="interval=12")
    assert (recipe.weight_bits, recipe.activation_bits, recipe.cache_interval) == (4, 6, 12)
    off = Recipe().override(bits="off", cache="off")
    assert not off.is_quantized
    assert not off.is_cached
    assert off.cache_interval is None
    mixed = Recipe().override(bits="auto=5.5")
    assert (mixed.weight_bits, mixed.activation_bits, mixed.bit_budget) == (8, 8, 5.5)


@pytest.mark.parametrize(
    ("schedule", "interval", "budget", "is_searched", "forecast"),
    [
        ("off", None, None, False, "reuse"),
        ("interval=3", 3, None, False, "reuse"),
        ("dps=3", 3, None, True, "reuse"),
        ("budget=0.3", None, 0.3, True, "affine"),
        ("budget=.05", None, 0.05, True, "affine"),
        ("budget=1", None, 1.0, True, "affine"),
        ("budget=1.0", None, 1.0, True, "affine"),
    ],
)
def test_schedules(schedule: str, interval: int | None, budget: float | None, is_searched: bool, forecast: str) -> None:
    recipe = Recipe().override(cache=schedule)
    assert (recipe.cache_interval, recipe.cache_budget) == (interval, budget)
    assert recipe.is_cached == (schedule != "off")
    assert recipe.is_searched == is_searched
    assert recipe.forecast == forecast
    assert recipe.override(forecast="taylor").forecast == "taylor"


def test_options_that_are_none_say_nothing() -> None:
    assert Recipe().override(steps=None, bits=None) == Recipe()


@pytest.mark.parametrize(
    ("text", "where", "what", "hint"),
    [
        ("[sampling]\nstepz = 3", "f.toml, [sampling]", "unknown key 'stepz'", "did you mean 'steps'?"),
        ("[samplng]\nsteps = 3", "f.toml", "unknown section 'samplng'", "did you mean 'sampling'?"),
        ("steps = 3", "f.toml", "unknown section 'steps'", "steps belongs in the section [sampling]"),
        ("sampling = 3", "f.toml, sampling", "is a section, not a value", "write [sampling]"),
        ("[sampling", "f.toml", "is not valid TOML", "quotes"),
        ("[sampling]\nsteps = '3'", "f.toml, sampling.steps", "'3' does not fit", "1 or more"),
        ("[sampling]\nsteps = 0", "f.toml, sampling.steps", "0 does not fit", "1 or more"),
        ("[sampling]\nsteps = true", "f.toml, sampling.steps", "True does not fit", "1 or more"),
        ("[sampling]\nsteps = 2.5", "f.toml, sampling.steps", "2.5 does not fit", "1 or more"),
        ("[sampling]\nguidance = nan", "f.toml, sampling.guidance", "nan does not fit", "0 or more"),
        ("[sampling]\nguidance = inf", "f.toml, sampling.guidance", "inf does not fit", "0 or more"),
        ("[sampling]\nguidance = -1", "f.toml, sampling.guidance", "-1 does not fit", "0 or more"),
        ("[sampling]\nscheduler = ''", "f.toml, sampling.scheduler", "'' does not fit", "ddim or dpmsolver++"),
        ("[sampling]\nsteps = 100001", "f.toml, sampling.steps", "100001 does not fit", "100000 at most"),
        ("[sampling]\nguidance = 1e5", "f.toml, sampling.guidance", "100000.0 does not fit", "10000 at most"),
        ("[calibration]\nseed = 9223372036854775808", "f.toml, calibration.seed", "does not fit", "below 2**63"),
        ("[sampling]\nsteps = " + "1" * 4301, "f.toml", "more than 64 bits", "quotes"),
        ("[sampling]\nsteps = " + "[" * 500, "f.toml", "is nested more than", "quotes"),
        ("[cache]\nschedule = 'interval=" + "9" * 5000 + "'", "f.toml, cache.schedule", "does not fit", "interval=N"),
        ("[cache]\nschedule = 'budget=." + "1" * 10**5 + "x'", "f.toml, cache.schedule", "does not fit", "budget=F"),
        ("[cache]\nblocks = '" + "9" * 5000 + "..1'", "f.toml, cache.blocks", "does not fit", "FIRST..LAST"),
        ("[quantization]\nbits = 'w9a8'", "f.toml, quantization.bits", "'w9a8' does not fit", "for example w8a8"),
        ("[quantization]\nbits = 8", "f.toml, quantization.bits", "8 does not fit", "for example w8a8"),
        ("[quantization]\ngroups = 0", "f.toml, quantization.groups", "0 does not fit", "timestep groups"),
        ("[quantization]\ngrouping = 'best'", "f.toml, quantization.grouping", "'best' does not fit", "or uniform"),
        ("[cache]\nschedule = 'interval=0'", "f.toml, cache.schedule", "'interval=0' does not fit", "interval=N"),
        ("[cache]\nschedule = 'budget=0'", "f.toml, cache.schedule", "'budget=0' does not fit", "budget=F"),
        ("[cache]\nschedule = 'budget=0.0'", "f.toml, cache.schedule", "'budget=0.0' does not fit", "0.3 for example"),
        ("[cache]\nschedule = 'budget=1.5'", "f.toml, cache.schedule", "'budget=1.5' does not fit", "the fraction F"),
        ("[cache]\nschedule = 'dps=0'", "f.toml, cache.schedule", "'dps=0' does not fit", "CacheQuant"),
        ("[cache]\ncost = 'best'", "f.toml, cache.cost", "'best' does not fit", "latency (measured on"),
        ("[cache]\ncost = 'latensy'", "f.toml, cache.cost", "'latensy' does not fit", "did you mean 'latency'? "),
        ("[cache]\nwhat = 'all'", "f.toml, cache.what", "'all' does not fit", "range (the change"),
        ("[cache]\nmemory = -1", "f.toml, cache.memory", "-1 does not fit", "for one image"),
        ("[cache]\ncost = 'time'", "f.toml, cache.cost", "'time' does not fit", "latency (measured"),
        ("[cache]\nrounds = -1", "f.toml, cache.rounds", "-1 does not fit", "hill climbing"),
        ("[cache]\nblocks = '0..2+3'", "f.toml, cache.blocks", "'0..2+3' does not fit", "several with +"),
        ("[cache]\nblocks = '0..2+4..3'", "f.toml, cache.blocks", "'0..2+4..3' does not fit", "several with +"),
        ("[cache]\nblocks = '3..2'", "f.toml, cache.blocks", "'3..2' does not fit", "FIRST..LAST"),
        ("[cache]\nblocks = '3'", "f.toml, cache.blocks", "'3' does not fit", "FIRST..LAST"),
        ("[calibration]\ntrajectories = 0", "f.toml, calibration.trajectories", "0 does not fit", "or auto"),
        ("[calibration]\ntrajectories = 'x'", "f.toml, calibration.trajectories", "'x' does not fit", "or auto"),
        ("[calibration]\nseed = -1", "f.toml, calibration.seed", "-1 does not fit", "0 or larger"),
        ("[compensation]\nmode = 'dec'", "f.toml, compensation.mode", "'dec' does not fit", "off, vc"),
        ("[compensation]\nclamp = 1.0", "f.toml, compensation.clamp", "1.0 does not fit", "below 1"),
    ],
)
def test_wrong_recipes(text: str, where: str, what: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.from_toml(text, where="f.toml")
    assert caught.value.where == where
    assert what in caught.value.message
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("mode", "is_fitted", "steps"), [("as-is", False, None), ("fitted", True, None), ("fitted=13", True, 13)]
)
def test_the_modes_of_a_solver(mode: str, is_fitted: bool, steps: int | None) -> None:
    recipe = Recipe().override(solver=mode, solver_target="run")
    assert (recipe.is_fitted, recipe.fitted_steps, recipe.solver.target) == (is_fitted, steps, "run")
    assert Recipe.from_toml(recipe.to_toml()) == recipe


def test_a_cache_that_the_solver_plans() -> None:
    """It reuses the difference of the halves of guidance, so that there is none without guidance."""
    recipe = Recipe().override(cache="auto", solver="fitted")
    assert (recipe.is_cached, recipe.is_cached_by_solver, recipe.forecast) == (True, True, "reuse")
    assert (recipe.cache_interval, recipe.cache_budget, recipe.given_plan) == (None, None, None)
    assert not recipe.override(guidance=1.0).is_cached


@pytest.mark.parametrize("history", [-1, 4, "two", True])
def test_a_history_of_a_solver_that_is_none(history: object) -> None:
    with pytest.raises(UsageError, match="does not fit") as caught:
        Recipe.of({"solver": {"history": history}})
    assert "solver.history" in str(caught.value.where) + str(caught.value.message)


@pytest.mark.parametrize(
    ("options", "where", "what"),
    [
        ({"bits": "w8"}, "--bits", "'w8' does not fit"),
        ({"cache": "budget=3"}, "--cache", "'budget=3' does not fit"),
        ({"forecast": ""}, "--forecast", "'' does not fit"),
        ({"cache_budget": -1}, "--cache-budget", "-1 does not fit"),
        ({"compensate": "dec"}, "--compensate", "'dec' does not fit"),
        ({"solver": "fitted=0"}, "--solver", "'fitted=0' does not fit"),
        ({"solver": "fit"}, "--solver", "'fit' does not fit"),
        ({"solver": "fitted="}, "--solver", "'fitted=' does not fit"),
        ({"solver_target": "walk"}, "--solver-target", "'walk' does not fit"),
        ({"steps": 0}, "--steps", "0 does not fit"),
        ({"stepz": 3}, None, "unknown option 'stepz'"),
        ({"bits": "\udcff"}, "recipe", r"'\udcff' is no text"),
        ({"target": "a\0"}, "recipe", r"'a\x00' is no text"),
        ({"steps": 10**5000}, "--steps", "a value of type int does not fit"),
    ],
)
def test_wrong_options(options: dict[str, object], where: str | None, what: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe().override(**options)
    assert caught.value.where == where
    assert what in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "what", "hint"),
    [
        ("loop", "cannot be read: Too many levels", "TOML file"),
        ("x" * 300, "unknown recipe 'xxx", "balanced, careful, fast"),
        ("fasst", "unknown recipe 'fasst'", "did you mean 'fast'?"),
        ("absent.toml", "there is no such file", "balanced, careful, fast"),
        ("folder", "is a folder, not a file", "TOML file"),
        ("latin.toml", "is not UTF-8 text", "TOML"),
    ],
)
def test_wrong_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, what: str, hint: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "latin.toml").write_bytes(b"# \xe9t\xe9")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        Recipe.load(name)
    assert what in caught.value.message
    assert hint in (caught.value.hint or "")


def test_a_recipe_is_given_in_many_ways(tmp_path: Path) -> None:
    expected = Recipe().override(steps=7)
    path = tmp_path / "mine.toml"
    path.write_text("[sampling]\nsteps = 7", "utf-8")
    for given in (expected, str(path), path, {"sampling": {"steps": 7}}, {"sampling": expected.sampling}):
        assert Recipe.of(given) == expected
    assert Recipe.of(None) == Recipe.of({}) == Recipe()
    assert Recipe.of("fast") == Recipe.load("fast")


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (3, "a recipe cannot be 3"),
        ([], "a recipe cannot be []"),
        (Pipeline(()), "a recipe cannot be Pipeline"),
        ({1: 2}, "unknown section '1'"),
        ({"sampling": {1: 2}}, "unknown key '1'"),
        ({"sampling": {"steps": 10**5000}}, "a value of type int does not fit"),
        ({"sampling": None}, "is a section, not a value"),
        ({"\udcff": 1}, r"'\udcff' is no text"),
        ({"sampling": {"\udcff": 1}}, r"'\udcff' is no text"),
        ({"pipeline": {"passes": "\0"}}, r"'\x00' is no text"),
    ],
)
def test_what_is_no_recipe_is_refused(given: Any, what: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.of(given)
    assert what in caught.value.message
    assert caught.value.hint
