"""The tool that compares calibrations of several sizes: a small run, and what it prints."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

TOOL = "calibration_size.py"
SMALL = ("--steps", 4, "--samples", 6, "--batch", 6)


@pytest.mark.slow
def test_sizes_are_compared(run_tool: Any, small_digits: Path, tmp_path: Path) -> None:
    sizes = ("--trajectories", 1, 16, "--latents", 8)
    done = run_tool(TOOL, small_digits, *SMALL, *sizes, "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    few, enough = json.loads(done.stdout)["rows"]
    assert [(row["trajectories"], row["latents"]) for row in (few, enough)] == [(1, 8), (16, 8)]
    assert enough["psnr"] > few["psnr"]
    for row in (few, enough):
        assert row["worst"] <= row["psnr"] + 1e-9
        assert row["worst"] <= row["median"]
        assert 15 < row["psnr"] < 80
    assert list(tmp_path.iterdir()) == []


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "tools")
    row = {"trajectories": 16, "latents": "auto", "psnr": 50.04, "median": 51.0, "worst": 48.96, "seconds": 3.2}
    document = {"model": "toy", "bits": "w8a8", "steps": 13, "guidance": 1.5, "samples": 6, "rows": [row]}
    assert importlib.import_module("calibration_size").markdown(document).splitlines() == [
        "`toy`, w8a8, 13 steps, guidance 1.5, 6 samples: PSNR to full precision, dB.",
        "",
        "| trajectories | latents | of the mean error | median sample | worst tenth | seconds to compile |",
        "|---|---|---|---|---|---|",
        "| 16 | auto | 50.0 | 51.0 | 49.0 | 3 |",
    ]


def test_refusals_are_printed(run_tool: Any, tmp_path: Path) -> None:
    done = run_tool(TOOL, "no-such-model", folder=tmp_path)
    assert done.returncode == 2
    assert "no-such-model" in done.stderr
