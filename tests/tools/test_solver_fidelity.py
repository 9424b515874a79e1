"""The tool that compares fitted solvers with plain ones: a small run, and what it prints."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

TOOL = "solver_fidelity.py"
SMALL = ("--run-steps", 8, "--samples", 6, "--batch", 4, "--trajectories", 4)


@pytest.mark.slow
def test_solvers_are_compared(run_tool: Any, small_digits: Path, tmp_path: Path) -> None:
    done = run_tool(TOOL, small_digits, *SMALL, "--steps", 8, 4, "--target", "run", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    solvers = ["ddim", "dpmsolver++", "fitted to the run"]
    assert [(row["steps"], row["solver"]) for row in rows] == [
        (8, "ddim"),
        *((8, name) for name in solvers),
        *((4, name) for name in solvers),
    ]
    assert rows[0]["run_psnr"] is rows[1]["run_psnr"] is None  # both are the run
    whole, few = rows[3], {row["solver"]: row["run_psnr"] for row in rows[4:]}
    assert whole["run_psnr"] > 100  # all steps, with the updates of the run
    assert few["fitted to the run"] > max(few["ddim"], few["dpmsolver++"])


@pytest.mark.slow
def test_steps_of_one_half_of_guidance_have_a_row(run_tool: Any, small_digits: Path, tmp_path: Path) -> None:
    done = run_tool(TOOL, small_digits, *SMALL, "--steps", 4, "--target", "run", "--halves", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    whole, halves = json.loads(done.stdout)["rows"][-2:]
    assert (halves["steps"], halves["solver"]) == (4, "fitted to the run, halves of guidance")
    assert len(halves["modes"]) >= 4
    if "conditional" not in halves["modes"]:
        assert halves["run_psnr"] == whole["run_psnr"]


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "tools")
    row = {"steps": 4, "solver": "fitted to the run", "converged_psnr": 40.04, "run_psnr": math.pi}
    whole = {"steps": 8, "solver": "ddim", "converged_psnr": 41.0, "run_psnr": None}
    document = {"model": "toy", "guidance": 1.5, "samples": 6, "run_steps": 8, "rows": [whole, row]}
    assert importlib.import_module("solver_fidelity").markdown(document).splitlines() == [
        "`toy`, guidance 1.5, 6 samples: PSNR, dB.",
        "",
        "| steps | solver | to the converged run | to the run of 8 steps |",
        "|---|---|---|---|",
        "| 8 | ddim | 41.0 | - |",
        "| 4 | fitted to the run | 40.0 | 3.1 |",
    ]


def test_refusals_are_printed(run_tool: Any, tmp_path: Path) -> None:
    done = run_tool(TOOL, "digitz", *SMALL, folder=tmp_path)
    assert done.returncode == 2
    assert "'digitz': unknown model" in done.stderr
    assert "hint: " in done.stderr
