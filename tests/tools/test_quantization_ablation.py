"""The tool that leaves each part of quantization out in turn: a small run, and what it prints."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

TOOL = "quantization_ablation.py"
SMALL = ("--steps", 3, "--samples", 10, "--seeds", 1, "--bits", "w6a6")


@pytest.mark.slow
def test_parts_are_left_out_in_turn(run_tool: Any, small_digits: Path, tmp_path: Path) -> None:
    done = run_tool(TOOL, small_digits, *SMALL, "--solvers", "as-is", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {cell["setting"]: cell for cell in json.loads(done.stdout)["cells"]}
    assert {"all", "all but TGQ", "all but corrected results", "all and VC"} < set(found)
    worse = found["all but equalized channels"]
    assert worse["psnr"]["value"] < found["all"]["psnr"]["value"]
    assert worse["behind_db"]["value"] == pytest.approx(found["all"]["psnr"]["value"] - worse["psnr"]["value"])
    for cell in found.values():
        assert cell["worst"] <= cell["median"]
        assert 15 < cell["psnr"]["value"] < 80
    assert done.stderr.count(": calibrate") == 3  # passes that settings share run once
    assert list(tmp_path.iterdir()) == []


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "tools")
    estimate = {"value": 50.04, "low": 49.0, "high": 51.0}
    cell = {"model": "toy", "bits": "w8a8", "solver": "as-is", "setting": "all", "psnr": estimate, "median": 51.0}
    cells = [cell | {"worst": 48.96, "behind_db": None}]
    cells += [cell | {"worst": 48.0, "setting": "all but TGQ", "behind_db": {"value": 1.0, "low": -0.5, "high": 2.0}}]
    assert importlib.import_module("quantization_ablation").markdown({"cells": cells}).splitlines() == [
        "### toy",
        "",
        "| bits | solver | setting | PSNR dB | median | worst tenth | error over that of all, dB |",
        "|---|---|---|---|---|---|---|",
        "| w8a8 | as-is | all | 50.0 (49.0 .. 51.0) | 51.0 | 49.0 | - |",
        "| w8a8 | as-is | all but TGQ | 50.0 (49.0 .. 51.0) | 51.0 | 48.0 | 1.0 (-0.5 .. 2.0) |",
    ]


def test_refusals_are_printed(run_tool: Any, tmp_path: Path) -> None:
    done = run_tool(TOOL, "no-such-model", folder=tmp_path)
    assert done.returncode == 2
    assert "no-such-model" in done.stderr
