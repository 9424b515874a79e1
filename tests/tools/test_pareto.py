"""The tools that compare methods at equal cost, and forecasts under quantization: small runs, and what they print."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcgraph.recipe import Recipe

TOOLS = Path(__file__).resolve().parents[2] / "tools"
PNG = b"\x89PNG"
SMALL = ("--steps", 6, "--samples", 16, "--seeds", 1, "--budgets", 0.5, "--rounds", 1, "--threads", 1, "--bits", "off")


@pytest.fixture
def printed(run_tool: Any, tmp_path: Path) -> Callable[..., str]:
    """What a tool prints that succeeds."""

    def call(name: str, *arguments: object) -> str:
        done = run_tool(name, *arguments, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    return call


def cell(method: str, budget: float, **values: Any) -> dict[str, Any]:
    return {
        "model": "digits",
        "bits": "w8a8",
        "budget": budget,
        "method": method,
        "title": f"the {method}",
        "cost": 50 * budget,
        "schedule": "",
        **values,
    }


def document(*cells: dict[str, Any]) -> dict[str, Any]:
    settings = {"scheduler": "ddim", "steps": 50, "guidance": 1.5, "samples": 128, "seeds": 3, "threads": 2}
    return {"kind": "pareto", "format": 1, **settings, "converged_floors": {"digits": 46.25}, "cells": list(cells)}


def decibels(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


def test_stored_documents_are_put_together_and_ranked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quality = document(
        cell("every", 1.0, psnr=decibels(48, 47, 49), behind_db=decibels(0, 0, 0), converged_psnr=40.0),
        cell("steps", 0.5, psnr=decibels(31, 30, 32), behind_db=decibels(5, 4, 6), converged_psnr=29.0),
        cell("dps", 0.5, psnr=decibels(35.5, 34, 37), behind_db=decibels(0.5, -1, 2), converged_psnr=33.0),
        cell("ours", 0.5, psnr=decibels(36, 35, 37), behind_db=decibels(0, 0, 0), converged_psnr=32.0),
    )
    speeds = {"every": 1.5, "steps": 3.25, "dps": 3.0, "ours": 2.75}
    latency = document(
        *(
            cell(key, 1.0 if key == "every" else 0.5, sampling_ms={"median": 30 / speed}, speedup=speed)
            for key, speed in speeds.items()
        )
    )
    monkeypatch.syspath_prepend(TOOLS)
    report = importlib.import_module("pareto_report")
    joined = report.merged([{"title": "recorded", "result": quality}, latency])
    assert joined["cells"][3] == quality["cells"][3] | latency["cells"][3]
    text = report.markdown(joined)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "digits 46.2 dB" in text
    assert {line.count("|") for line in rows} == {10}
    assert [line.split("|")[1].strip() for line in rows[2:]] == [
        "the every",
        "**budget 0.5**",
        "the ours",
        "the dps",
        "the steps",
    ]
    assert "| the ours | 25.0 | 36.0 | best | - | - | 32.0 | 10.9 | 2.75x |" in rows
    assert "| the dps | 25.0 | 35.5 | = 0.50 (-1.00 .. 2.00) | - | - | 33.0 | 10.0 | 3.00x |" in rows
    assert "| the steps | 25.0 | 31.0 | 5.00 (4.00 .. 6.00) | - | - | 29.0 | 9.2 | 3.25x |" in rows
    report.save_figure(joined, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG)


def test_every_method_has_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A uniform cache of every third step, or what costs as much: a share of 0.4, or the four steps of ten."""
    monkeypatch.syspath_prepend(TOOLS)
    methods = importlib.import_module("pareto").METHODS
    base = Recipe().override(steps=10, bits="w6a6")
    recipes = {key: method.recipe(base, 3, 0.4) for key, method in methods.items()}
    fewer = base.override(steps=4)
    ours = base.override(cache="budget=0.400000", forecast="affine")
    halved = ours.model_copy(update={"cache": ours.cache.model_copy(update={"blocks": "all+guidance"})})
    expected = {
        "steps": fewer,
        "solver": fewer.override(scheduler="dpmsolver++"),
        "reuse": base.override(cache="interval=3", forecast="reuse"),
        "dps": base.override(cache="dps=3", forecast="reuse"),
        "dec": base.override(cache="dps=3", forecast="dec"),
        "taylor": base.override(cache="interval=3", forecast="taylor"),
        "affine": base.override(cache="interval=3", forecast="affine"),
        "planned-taylor": base.override(cache="budget=0.400000", forecast="taylor"),
        "ours": ours,
        "ours-vc": ours.override(compensate="vc"),
        "ours-guidance": halved,
    }
    assert recipes == expected


@pytest.mark.parametrize(
    ("scheduler", "kept"),
    [("ddim", ["solver", "steps", "ours-vc", "ours"]), ("dpmsolver++", ["steps", "ours-vc", "ours"])],
)
def test_a_multistep_solver_is_its_own_rival(monkeypatch: pytest.MonkeyPatch, scheduler: str, kept: list[str]) -> None:
    monkeypatch.syspath_prepend(TOOLS)
    asked = ["digits", "--scheduler", scheduler, "--methods", "solver", "steps", "ours-vc", "ours"]
    monkeypatch.setattr(sys, "argv", ["pareto.py", *asked])
    assert importlib.import_module("pareto").parse().methods == kept


@pytest.mark.slow
def test_methods_are_compared_at_equal_cost(printed: Callable[..., str], small_digits: Path, tmp_path: Path) -> None:
    asked = [small_digits, *SMALL, "--methods", "steps", "ours", "solver", "--scheduler", "dpmsolver++"]
    asked += ["--bundles", "bundles", "--json"]
    found = json.loads(printed("pareto.py", *asked, "--no-latency"))
    assert found["scheduler"] == "dpmsolver++"
    cells = {cell["method"]: cell for cell in found["cells"]}
    assert list(cells) == ["every", "steps", "ours"]
    assert (cells["every"]["budget"], cells["every"]["cost"]) == (1.0, 6.0)
    assert cells["every"]["converged_psnr"] > cells["steps"]["converged_psnr"]
    assert cells["steps"]["cost"] == 3.0
    assert cells["ours"]["schedule"].split()[0].count("F") == 3
    assert cells["ours"]["cost"] == pytest.approx(3, rel=0.015)  # a reusing step costs 1.5 % of one of two blocks
    behind = {key: cell["behind_db"]["value"] for key, cell in cells.items() if key != "every"}
    assert min(behind.values()) == 0
    for key, value in behind.items():
        best = max(cell["psnr"]["value"] for cell in cells.values() if "psnr" in cell)
        assert value == pytest.approx(best - cells[key]["psnr"]["value"], abs=1e-6)
    compiled = {path: path.stat().st_mtime_ns for path in (tmp_path / "bundles").rglob("*") if path.is_file()}
    timed = json.loads(printed("pareto.py", *asked, "--only-latency"))
    assert {path: path.stat().st_mtime_ns for path in compiled} == compiled
    assert [cell["schedule"] for cell in timed["cells"]] == [cell["schedule"] for cell in found["cells"]]
    assert all(cell["sampling_ms"]["median"] > 0 and "psnr" not in cell for cell in timed["cells"])


@pytest.mark.slow
def test_forecasts_under_quantization(printed: Callable[..., str], small_digits: Path, tmp_path: Path) -> None:
    asked = [small_digits, "--bits", "w6a6", "--steps", 8, "--interval", 3, "--samples", 4]
    found = json.loads(printed("forecast_noise.py", *asked, "--json", "--plot", "figure.png"))
    (setting,) = found["settings"]
    forecasts = {each["forecast"]: each for each in setting["forecasts"]}
    assert list(forecasts) == ["reuse", "taylor", "affine"]
    assert {len(each[key]) for each in forecasts.values() for key in ("float", "quantized", "between")} == {8}
    assert all(probe["amplification"] == pytest.approx(1, abs=1e-5) for probe in forecasts["reuse"]["noise"])
    grown = [probe for probe in forecasts["taylor"]["noise"] if probe["gain"] > 0]
    assert grown
    assert all(probe["amplification"] > 1 for probe in grown)
    for name, each in forecasts.items():
        assert each["quantized"][0] == pytest.approx(setting["every_step"][0])  # the first step computes
        assert math.isclose(each["float"][0], 0, abs_tol=1e-6), name
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG)
