"""The developers' tools run, on small settings, and say what their documents claim they say."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qcgraph.benchmark.bench import BenchOptions
from qcgraph.benchmark.machine import Machine
from qcgraph.benchmark.report import BenchmarkResult, BenchReport, Ratio
from qcgraph.benchmark.timing import Timing
from qcgraph.benchmark.worker import Alone
from qcgraph.errors import QcgraphError
from qcgraph.ir.program import Program
from qcgraph.pipeline import Pipeline
from qcgraph.pipeline.instruments import Reproduce
from qcgraph.progress import Progress

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def test_replay_fails_as_the_compilation_did(
    captured: Program, run_tool: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    reproduce = Reproduce(lambda: tmp_path / "out.reproducer", Progress())
    with pytest.raises(Exception, match="needs QuantPlan"):
        Pipeline.parse("plan-cache,insert-cache,insert-qdq").run(captured, [reproduce])
    with pytest.raises(QcgraphError, match="needs QuantPlan"):  # it ends with the traceback
        run_tool("replay.py", "out.reproducer", folder=tmp_path)
    assert "replaying insert-qdq" in capsys.readouterr().err


@pytest.mark.slow
def test_attribution(run_tool: Any, small_digits: Path, tmp_path: Path) -> None:
    options = ["--bits", "w8a8", "--intervals", 2, "--steps", 6, "--groups", 2, "--samples", 8, "--seeds", 2, "--json"]
    done = run_tool("attribution.py", small_digits, *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["kind"] == "attribution"
    (cell,) = document["models"][0]["cells"]
    values = {key: estimate["value"] for key, estimate in cell["psnr"].items()}
    assert values["quantization"] > values["both"]
    assert cell["edge"]["snr"] > 0
    assert {fault["kind"] for fault in cell["faults"]} <= {"compensation"}  # which six steps may not be enough for
    (tmp_path / "stored.json").write_text(json.dumps(document))
    recorded = ["--docs", tmp_path, "record", "--title", "A title", "x", "--", "cat", "stored.json"]
    stored = run_tool("benchmarks.py", *recorded, folder=tmp_path)
    assert stored.returncode == 0, stored.stderr
    assert run_tool("benchmarks.py", "--docs", tmp_path, "page", folder=tmp_path).returncode == 0
    page = (tmp_path / "benchmarks.md").read_text()
    assert "## A title" in page
    assert "cat stored.json" in page
    assert f"| w8a8 | 2 | {values['quantization']:.1f} |" in page


def test_a_command_that_fails_is_not_recorded(run_tool: Any, tmp_path: Path) -> None:
    done = run_tool("benchmarks.py", "--docs", tmp_path, "record", "x", "--", "false", folder=tmp_path)
    assert done.returncode == 1
    assert "nothing was stored" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_benchmark_page_is_made_of_the_stored_results(run_tool: Any, tmp_path: Path) -> None:
    docs = TOOLS.parent / "docs"
    shutil.copytree(docs / "benchmarks", tmp_path / "benchmarks")
    assert run_tool("benchmarks.py", "--docs", tmp_path, "page", folder=tmp_path).returncode == 0
    assert (tmp_path / "benchmarks.md").read_text() == (docs / "benchmarks.md").read_text()


@pytest.mark.slow
def test_bench_peers(run_tool: Any, small_digits: Path, tmp_path: Path) -> None:
    options = ["--steps", 3, "--rounds", 1, "--threads", 1, "--baselines", "torch"]
    done = run_tool("bench_peers.py", small_digits, *options, "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["kind"], document["format"]) == ("peers", 1)
    (report,) = document["models"]
    assert (report["kind"], report["model"], report["steps"]) == ("bench", str(small_digits), 3)
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["torch", "qcgraph, no cache", "qcgraph, interval=3"]
    assert [row["status"] for row in rows.values()] == ["ok"] * 3
    assert list(rows["qcgraph, no cache"]["variants"]) == ["main"]
    assert list(rows["qcgraph, interval=3"]["variants"]) == ["full", "reuse"]
    assert rows["qcgraph, interval=3"]["mac_ratio"] < 0.5


def test_bench_peers_prints_a_table_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of what was measured, which another test does for real."""
    forward, sampling = Timing.of([0.002, 0.004, 0.012]), Timing.of([0.5, 0.25, 1.0])
    alone = Alone(sampling=(0.25,), forward=(0.004,), base_bytes=1, peak_bytes=321_000_000)
    reference = BenchmarkResult("torch", "PyTorch eager", None, "ok", sampling=sampling, forward=forward, alone=alone)
    ours = replace(
        reference,
        name="qcgraph, interval=3",
        bundle="0",
        speedup=Ratio(2.0, 1.5, 2.5),
        forward_speedup=3.0,
        error=0.0123,
        mac_ratio=0.4,
    )
    missing = BenchmarkResult("nncf-int8", "OpenVINO", None, "missing", "not installed: nncf")
    machine = Machine("a processor", 2, ("avx512f", "avx512_vnni"), "Linux", 8_000_000_000, 0.1)

    def measured(model: str, steps: int, guidance: float, options: BenchOptions) -> BenchReport:
        return BenchReport(
            bundle="0",
            model=model,
            plan=f"ddim, {steps} steps, guidance {guidance}",
            target="onnxruntime-cpu",
            steps=steps,
            run_steps=steps,
            guidance=guidance,
            threads=options.threads or 0,
            samples=options.samples,
            rounds=options.rounds,
            forward_only=options.forward_only,
            machine=machine,
            versions={"torch": "2.13.0"},
            rows=(reference, missing, ours),
            throughput=(),
        )

    monkeypatch.syspath_prepend(TOOLS)
    bench_peers = importlib.import_module("bench_peers")
    monkeypatch.setattr(bench_peers, "compare", measured)
    asked = ["one", "other", "--steps", "7", "--rounds", "3", "--threads", "1", "--baselines", "torch"]
    monkeypatch.setattr(sys, "argv", ["bench_peers.py", *asked])
    assert bench_peers.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("### ")] == ["### one", "### other"]
    setting = "ddim, 7 steps, guidance 1.5; 1 at once; 1 threads of a processor (avx512f avx512_vnni); 3 rounds"
    assert sum(line.startswith(setting) and line.endswith("torch 2.13.0.") for line in lines) == 2
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert len(table) == 2 * 4
    assert {len(row) for row in table} == {9}
    times, whole = "2.0 / 4.0 / 12.0", "0.250 / 0.500 / 1.000"
    assert table[2] == ["torch (PyTorch eager)", times, "-", "-", whole, "-", "-", "321", "2.00"]
    speedup = "2.00x (1.50 .. 2.50)"
    assert table[3] == ["qcgraph, interval=3", times, "3.00x", "1.2e-02", whole, speedup, "40.0%", "321", "2.00"]
    assert lines.count("- nncf-int8 missing: not installed: nncf") == 2


def test_bench_peers_refuses_what_cannot_be_measured(run_tool: Any, tmp_path: Path) -> None:
    failed = run_tool("bench_peers.py", "digits", "--rounds", 0, folder=tmp_path)
    assert failed.returncode == 2
    assert "--rounds: 0 is not positive" in failed.stderr
