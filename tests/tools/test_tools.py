"""The developers' tools run, on small settings, and say what their documents claim they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qcgraph.instruments import Reproduce
from qcgraph.ir.program import Program
from qcgraph.pipeline import Pipeline
from qcgraph.progress import Progress

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def tool(name: str, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / name), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_replay_fails_as_the_compilation_did(captured: Program, tmp_path: Path) -> None:
    reproduce = Reproduce(lambda: tmp_path / "out.reproducer", Progress())
    with pytest.raises(Exception, match="needs QuantPlan"):
        Pipeline.parse("plan-cache,insert-cache,insert-qdq").run(captured, [reproduce])
    done = tool("replay.py", "out.reproducer", folder=tmp_path)
    assert done.returncode != 0
    assert "replaying insert-qdq" in done.stderr
    assert "needs QuantPlan" in done.stderr


@pytest.mark.slow
def test_quality_table(tmp_path: Path) -> None:
    done = tool(
        "quality_table.py",
        "digits",
        "--steps",
        6,
        "--samples",
        10,
        "--seeds",
        1,
        2,
        "--rounds",
        1,
        "--grid",
        "a.png",
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 8  # a heading and seven settings
    exact = next(row for row in rows if row.startswith("| full precision |"))
    assert float(exact.split("|")[2].split()[0]) > 100  # dB: float32 in another order
    assert (tmp_path / "a.png").is_file()


@pytest.mark.slow
def test_bench_sampling(tmp_path: Path) -> None:
    from qcgraph import compile as compile_bundle
    from qcgraph.recipe import Recipe

    compile_bundle("digits", Recipe().override(steps=4, cache="interval=2"), output=tmp_path / "bundle")
    done = tool("bench_sampling.py", "digits", "bundle", "--rounds", 1, "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {"eager", "compiled", "full step", "reuse step"} <= set(report["seconds"])
    assert set(report["ratios"]) == {"speed-up of whole sampling", "reuse step / full step"}
