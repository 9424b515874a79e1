"""The tool that measures what selections of calibration samples cover: small runs, and what they print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

TOOL = "selection_coverage.py"
PNG = b"\x89PNG"


@pytest.mark.slow
def test_coverage(run_tool: Any, small_digits: Path, tmp_path: Path) -> None:
    small = ["--trajectories", 8, "--steps", 6, "--counts", 6, 48, "--seeds", 2]
    done = run_tool(TOOL, small_digits, *small, "--json", "-o", "figure.png", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG)
    cells = json.loads(done.stdout)["cells"]
    assert [cell["count"] for cell in cells] == [6] * 4 + [48] * 4
    uniform = next(cell for cell in cells if cell["method"] == "uniform")
    assert uniform["first_seed_steps"] == [1] * 6
    assert uniform["steps"] == {"mean": 1.0, "deviation": 0.0}
    for cell in cells:
        assert (cell["mean_distance"]["mean"] == 0) == (cell["count"] == 48)  # nothing is left out then


@pytest.mark.slow
def test_scaling(run_tool: Any, small_digits: Path, tmp_path: Path) -> None:
    asked = [small_digits, "--trajectories", 1, "--steps", 4, "--counts", 3, "--scaling"]
    done = run_tool(TOOL, *asked, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {14}
    assert [line.split("|")[1].strip() for line in rows[2:]] == ["4", "8", "16", "32", "64", "128"]


@pytest.mark.parametrize(
    ("option", "value", "message"), [("--counts", 0, "0 calibration samples"), ("--scheduler", "magic", "magic")]
)
def test_refusals_are_printed(
    option: str, value: object, message: str, run_tool: Any, small_digits: Path, tmp_path: Path
) -> None:
    done = run_tool(TOOL, small_digits, "--trajectories", 1, "--steps", 2, option, value, folder=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "hint: " in done.stderr
