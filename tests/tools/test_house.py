"""The house: what must be cheap is, counted on patches that apply to the tree as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MOST = {"forecaster": 2, "option": 2, "pass": 4, "target": 1}  # files


def test_changes_that_must_be_cheap_are(run_tool: Any, tmp_path: Path) -> None:
    lines = run_tool("house.py", ROOT, folder=tmp_path).stdout.splitlines()
    assert "0 climbs between them" in lines[1]
    counted = dict(line.split(": ") for line in lines if line.split(": ")[0] in MOST)
    assert counted == {name: f"{count} files" for name, count in MOST.items()}
