"""The developers' tools run, on small settings, and say what their documents claim they say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qcgraph.instruments import Reproduce
from qcgraph.ir.program import Program
from qcgraph.pipeline import Pipeline
from qcgraph.progress import Progress

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def tool(name: str, *arguments: object, folder: Path, docs: Path | None = None) -> subprocess.CompletedProcess[str]:
    where = ["--docs", str(docs)] if docs else []
    command = [sys.executable, str(TOOLS / name), *where, *map(str, arguments)]
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
def test_attribution(tmp_path: Path) -> None:
    options = ["--bits", "w8a8", "--intervals", 2, "--steps", 6, "--groups", 2, "--samples", 8, "--seeds", 2, "--json"]
    done = tool("attribution.py", "digits", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["kind"] == "attribution"
    (cell,) = document["models"][0]["cells"]
    values = {key: estimate["value"] for key, estimate in cell["psnr"].items()}
    assert values["quantization"] > values["both"]
    assert cell["edge"]["snr"] > 0
    assert cell["faults"] == []
    (tmp_path / "stored.json").write_text(json.dumps(document))
    stored = tool(
        "benchmarks.py", "record", "--title", "A title", "x", "--", "cat", "stored.json", folder=tmp_path, docs=tmp_path
    )
    assert stored.returncode == 0, stored.stderr
    assert tool("benchmarks.py", "page", folder=tmp_path, docs=tmp_path).returncode == 0
    page = (tmp_path / "benchmarks.md").read_text()
    assert "## A title" in page
    assert "cat stored.json" in page
    assert f"| w8a8 | 2 | {values['quantization']:.1f} |" in page


def test_a_command_that_fails_is_not_recorded(tmp_path: Path) -> None:
    done = tool("benchmarks.py", "record", "x", "--", "false", folder=tmp_path, docs=tmp_path)
    assert done.returncode == 1
    assert "nothing was stored" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_benchmark_page_is_made_of_the_stored_results(tmp_path: Path) -> None:
    docs = TOOLS.parent / "docs"
    shutil.copytree(docs / "benchmarks", tmp_path / "benchmarks")
    assert tool("benchmarks.py", "page", folder=tmp_path, docs=tmp_path).returncode == 0
    assert (tmp_path / "benchmarks.md").read_text() == (docs / "benchmarks.md").read_text()


@pytest.mark.slow
def test_bench_peers(tmp_path: Path) -> None:
    options = ["--steps", 3, "--rounds", 1, "--threads", 1, "--baselines", "torch,onnxruntime-dynamic"]
    done = tool("bench_peers.py", "digits", *options, "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["kind"], document["format"]) == ("peers", 1)
    (report,) = document["models"]
    assert (report["kind"], report["model"], report["steps"]) == ("bench", "digits", 3)
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["torch", "onnxruntime-dynamic", "qcgraph, no cache", "qcgraph, interval=3"]
    assert [row["status"] for row in rows.values()] == ["ok"] * 4
    assert list(rows["qcgraph, no cache"]["variants"]) == ["main"]
    assert list(rows["qcgraph, interval=3"]["variants"]) == ["full", "reuse"]
    assert rows["qcgraph, interval=3"]["mac_ratio"] < 0.5


@pytest.mark.slow
def test_bench_peers_prints_a_table_a_model(tmp_path: Path) -> None:
    options = ["--steps", 3, "--rounds", 1, "--threads", 1, "--baselines", "torch"]
    done = tool("bench_peers.py", "digits", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "### digits" in done.stdout.splitlines()
    table = [line.strip("|").split("|") for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in table[2:]] == [
        "torch (PyTorch eager, float32)",
        "qcgraph, no cache",
        "qcgraph, interval=3",
    ]
    assert {len(row) for row in table} == {9}
    failed = tool("bench_peers.py", "digits", "--rounds", 0, folder=tmp_path)
    assert failed.returncode == 2
    assert "--rounds: 0 is not positive" in failed.stderr
