"""Measuring how quantization grows with samples and sites: the lines are those through what was measured."""

from __future__ import annotations

import importlib
import json
from argparse import Namespace
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from qcgraph.models.geometry import GEOMETRIES, DiTConfig

TOOL = "calibration_growth.py"
SMALL = DiTConfig(input_size=8, patch_size=2, channels=2, width=32, depth=2, heads=2, class_count=5)
CLEAR_REFS = Path("/proc/self/clear_refs")


@pytest.fixture
def module(run_tool: Any) -> Any:
    """The tool as a module, which it is found as where tools are run."""
    return importlib.import_module("calibration_growth")


def test_lines(module: Any) -> None:
    through = module.Line.through
    assert astuple(through([1, 2, 4], [5.0, 7.0, 11.0])) == pytest.approx((2, 3, 1))
    assert astuple(through([0, 1, 2], [0.0, 1.0, 0.0])) == pytest.approx((0, 1 / 3, 0), abs=1e-12)
    assert through([1, 2, 3], [4.0, 4.0, 4.0]).r_squared == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["dit-m-2"], "no geometry 'dit-m-2'"), (["--samples", "8", "8"], "--samples takes two different counts")],
)
def test_what_is_refused(arguments: list[str], message: str, run_tool: Any, tmp_path: Path) -> None:
    done = run_tool(TOOL, *arguments, folder=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="only Linux resets the peak of a process")
def test_growth_is_measured(run_tool: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(GEOMETRIES, "small", SMALL)
    small = ["--samples", 1, 2, "--depths", 1, 2, "--steps", 2, "--threads", 1]
    done = run_tool(TOOL, "small", *small, "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["kind"], document["format"]) == ("calibration-growth", 1)
    by_samples, by_sites = document["series"]
    assert [(row["samples"], row["depth"]) for row in by_samples["rows"]] == [(1, 2), (2, 2)]
    assert [(row["samples"], row["depth"], row["sites"]) for row in by_sites["rows"]] == [(1, 1, 4), (1, 2, 8)]
    for series in (by_samples, by_sites):
        few, _ = series["rows"]
        assert all(0 < row["seconds"] < row["all_seconds"] for row in series["rows"])  # a part of the whole
        assert few["peak_bytes"] > few["weight_bytes"]
        for name in ("seconds", "peak_bytes"):
            line = series[name]
            assert line["r_squared"] == pytest.approx(1)  # two points are on a line
            assert line["intercept"] + line["slope"] * few[series["by"]] == pytest.approx(few[name])


def test_growth_is_printed(module: Any) -> None:
    rows = tuple(module.Row(samples, 2, 8, 1_000_000, samples / 2, samples, 3_000_000 * samples) for samples in (4, 8))
    fitted = (module.Line.through([4, 8], values) for values in ([2.0, 4.0], [12e6, 24e6]))
    options = Namespace(geometry="g", bits="w6a6", steps=2, guidance=1.0, threads=1)
    lines = module.markdown(module.Series("samples", rows, *fitted), options).splitlines()
    assert [line for line in lines if line.startswith("#")] == ["### g, by samples"]
    assert len([line for line in lines if line.startswith("| ")]) == 1 + 2
    assert len([line for line in lines if "R^2 = 1.0000" in line]) == 2
