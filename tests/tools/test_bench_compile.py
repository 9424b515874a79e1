"""Measuring what compiling costs: every stage is there, and its memory is what the kernel saw during it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qcgraph.compiler.default_pipeline import default_pipeline
from qcgraph.export.targets import TARGETS
from qcgraph.models.geometry import GEOMETRIES, DiTConfig
from qcgraph.recipe import Recipe

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_compile.py"
SMALL = DiTConfig(input_size=8, patch_size=2, channels=2, width=32, depth=1, heads=2, class_count=5)
RECIPE = Recipe().override(cache="interval=3", compensate="vc")  # the defaults of the tool
PASSES = [pass_.name for pass_ in default_pipeline(RECIPE, TARGETS["onnxruntime-cpu"])]
CLEAR_REFS = Path("/proc/self/clear_refs")

METER = """
import torch
from bench_compile import Meter, peak_bytes
meter, start = Meter(), peak_bytes()
meter.stage("large")
values = torch.ones(50_000_000)
del values
meter.stage("small")
values = torch.ones(5_000_000)
meter.end()
print(start, *(stage.peak_bytes for stage in meter.stages), *(stage.name for stage in meter.stages))
"""


@pytest.mark.slow
@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="only Linux resets the peak of a process")
def test_a_stage_has_the_peak_of_its_own() -> None:
    command = [sys.executable, "-c", METER]
    done = subprocess.run(command, cwd=TOOL.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *sizes, first, second = done.stdout.split()
    start, large, small = map(int, sizes)
    assert (first, second) == ("large", "small")
    assert large - start > 0.95 * 200e6
    assert 0.95 * 20e6 < small - start < 60e6


def test_an_unknown_geometry_is_refused(run_tool: Any, tmp_path: Path) -> None:
    done = run_tool(TOOL.name, "dit-s-2", "dit-m-2", folder=tmp_path)
    assert done.returncode == 2
    assert "no geometry 'dit-m-2'" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="only Linux resets the peak of a process")
def test_a_compilation_is_measured(run_tool: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(GEOMETRIES, "small", SMALL)
    done = run_tool(TOOL.name, "small", "--threads", 1, "-o", "out.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "out.json").read_text())
    assert (document["kind"], document["format"]) == ("compile", 1)
    assert document["machine"]["cores"] > 0
    assert "torch" in document["versions"]
    (row,) = document["rows"]
    names = [stage["name"] for stage in row["stages"]]
    assert names[:2] == ["load", "capture"]
    assert names[2 : 2 + len(PASSES)] == PASSES
    assert names[-3:] == ["verify", "comparison", "write"]
    assert row["weight_bytes"] == 4 * SMALL.parameter_count
    assert row["peak_bytes"] == max(stage["peak_bytes"] for stage in row["stages"])
    assert row["ratio"] == row["peak_bytes"] / row["weight_bytes"] > 1
    assert row["seconds"] == pytest.approx(sum(stage["seconds"] for stage in row["stages"]))
    lines = done.stdout.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines if line.startswith("| ")] == ["stage", *names, "all"]
    assert "Most time: " in done.stdout
