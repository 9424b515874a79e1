"""qcgraph bench: what is refused, what it measures, and what becomes of baselines that are not there or do not run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcgraph.benchmark.bench import bench
from qcgraph.benchmark.report import BenchReport
from qcgraph.bundle import Bundle
from qcgraph.cli import run
from qcgraph.cli.bench import parse_batches
from qcgraph.errors import UsageError

Command = Callable[..., Any]
STEPS = 6


@pytest.fixture(scope="module")
def digits(small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of digits, quantized and cached."""
    folder = tmp_path_factory.mktemp("bench")
    recipe = folder / "recipe.toml"
    recipe.write_text(
        f'[sampling]\nsteps = {STEPS}\n[calibration]\ntrajectories = 4\n[cache]\nschedule = "interval=3"\n'
    )
    assert run(["compile", str(small_digits), "-o", str(folder / "digits"), "--recipe", str(recipe)]) == 0
    return folder / "digits"


@pytest.fixture
def measure_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first command of a test measures; those after it show what it measured in another way."""
    reports: list[BenchReport] = []

    def measure(*arguments: Any) -> BenchReport:
        if not reports:
            reports.append(bench(*arguments))
        return reports[0]

    monkeypatch.setattr("qcgraph.benchmark.bench.bench", measure)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--baselines", "torch,onnxruntime-fp23"], "did you mean 'onnxruntime-fp32'?"),
        (["--baselines", "torch,torch"], "torch is named twice"),
        (["--threads", "0"], "--threads: 0 is not positive"),
        (["--rounds", "0"], "--rounds: 0 is not positive"),
        (["--samples", "-1"], "--samples: -1 is not positive"),
        (["--batches", "1,0"], "--batches: 0 is not positive"),
        (["--batches", "1,many"], "is not a list of whole numbers"),
        (["--model", "digits"], "was compiled from another model"),
        (["--model", "digit"], "did you mean 'digits'?"),
        ([], "cannot load the model that the bundle was compiled from, 'toy'"),
    ],
)
def test_refused(qcgraph: Command, bundle: Path, options: list[str], what: str) -> None:
    done = qcgraph("bench", bundle, *options)
    assert (done.code, done.out) == (2, "")
    assert what in done.err
    assert "\n\nhint: " in done.err


def test_a_list_of_batches() -> None:
    assert parse_batches("1, 4,16") == (1, 4, 16)
    assert parse_batches("") == ()
    with pytest.raises(UsageError, match=r"'1\.5' is not a list of whole numbers"):
        parse_batches("1.5")


def test_help_imports_no_runtime() -> None:
    code = (
        "import sys; from qcgraph.cli import run; run(['bench', '--help']); "
        "print([name for name in ('torch', 'numpy', 'onnxruntime') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--forward-only" in done.stdout
    assert done.stderr.strip() == "[]"


@pytest.mark.slow
def test_rows_agree_with_their_seconds(qcgraph: Command, digits: Path, small_digits: Path) -> None:
    names = ["torch", "onnxruntime-static"]
    done = qcgraph(
        "bench", digits, "--baselines", ",".join(names), "--rounds", 2, "--threads", 1, "--batches", "1,2", "--json"
    )
    assert done.code == 0, done.err
    report = done.json()
    assert (report["kind"], report["format"], report["model"], report["target"]) == (
        "bench",
        1,
        str(small_digits),
        "onnxruntime-cpu",
    )
    assert (report["threads"], report["samples"], report["steps"], report["run_steps"]) == (1, 1, STEPS, STEPS)
    assert report["plan"] == f"ddim, {STEPS} steps, guidance 1.5"
    assert {"cpu", "cores", "flags", "memory_bytes", "load"} <= set(report["machine"])
    assert {"python", "torch", "onnxruntime", "qcgraph"} <= set(report["versions"])
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == [*names, "qcgraph"]
    assert [row["status"] for row in rows.values()] == ["ok"] * 3, [row["problem"] for row in rows.values()]
    for row in rows.values():
        check_row(row, rows["torch"])
    assert rows["torch"]["error"] < 1e-4
    for name in ("onnxruntime-static", "qcgraph"):
        assert 1e-4 < rows[name]["error"] < 0.2
    ours = rows["qcgraph"]
    assert ours["variants"].keys() == {"full", "reuse"}
    assert ours["variants"]["full"] == ours["forward"]
    assert [ours["variants"][name]["count"] for name in ("full", "reuse")] == [2 * 2, 2 * 4]
    assert rows["torch"]["forward"]["count"] == 2 * STEPS
    assert 0.3 < ours["mac_ratio"] < 0.4
    assert ours["cache_bytes"] == cache_bytes_of(Bundle.open(digits), latents=2)
    assert {(item["name"], item["batch"]) for item in report["throughput"]} == {
        (name, batch) for name in rows for batch in (1, 2)
    }
    assert all(item["samples_per_second"] > 0 for item in report["throughput"])


def check_row(row: dict[str, Any], torch_row: dict[str, Any]) -> None:
    """What a row says follows from the seconds that it gives."""
    sampling, rounds = row["sampling"], row["rounds"]
    assert (sampling["min"], sampling["max"]) == (min(rounds), max(rounds))
    assert sampling["median"] == pytest.approx(np.median(rounds))
    assert row["speedup"]["value"] == pytest.approx(torch_row["sampling"]["median"] / sampling["median"])
    ratios = [reference / own for reference, own in zip(torch_row["rounds"], rounds, strict=True)]
    assert row["run_speedup"] == row["speedup"]  # no candidate leaves steps out
    assert (row["speedup"]["low"], row["speedup"]["high"]) == pytest.approx((min(ratios), max(ratios)))
    assert row["forward_speedup"] == pytest.approx(torch_row["forward"]["median"] / row["forward"]["median"])
    assert row["forward"]["min"] <= row["forward"]["median"] <= row["forward"]["max"] < sampling["max"]
    assert row["paired_to_alone"] == pytest.approx(sampling["median"] / row["alone"]["sampling"]["median"])
    if row["peak_memory_bytes"] is not None:
        assert 1e7 < row["base_memory_bytes"] < row["peak_memory_bytes"]


def cache_bytes_of(bundle: Bundle, latents: int) -> int:
    """Of the one float32 tensor that ``full`` gives and ``reuse`` takes."""
    (spec,) = set(bundle.interfaces["full"].outputs) & set(bundle.interfaces["reuse"].inputs)
    return latents * 4 * int(np.prod(spec.shape[1:]))


@pytest.mark.slow
@pytest.mark.usefixtures("measure_once")
def test_forwards_only_and_tables_for_people(qcgraph: Command, digits: Path, small_digits: Path) -> None:
    options = ["--batches", "3", "--rounds", "1", "--threads", "1", "--forward-only"]
    done = qcgraph("bench", digits, *options)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert f"model     {small_digits}" in lines
    assert "whole" not in done.out
    header = next(line for line in lines if "forward ms" in line)
    assert "speed-up" in header
    assert f"{STEPS} steps s" not in header
    assert [line.split()[0] for line in lines if line.startswith(("torch ", "onnxruntime-fp32 ", "qcgraph "))] == [
        "torch",
        "onnxruntime-fp32",
        "qcgraph",
    ] * 3  # latency, cost, throughput
    assert any(line.startswith("reuse ") for line in lines)
    assert "3 at once" in done.out
    data = qcgraph("bench", digits, *options, "--json").json()
    assert [(row["sampling"], row["speedup"], row["run_speedup"]) for row in data["rows"]] == [(None, None, None)] * 3
    assert [row["forward"]["count"] for row in data["rows"]] == [1] * 3  # one a round
    assert all(row["error"] < 1e-4 for row in data["rows"][:2])
    assert {item["batch"] for item in data["throughput"]} == {3}


@pytest.mark.slow
@pytest.mark.usefixtures("measure_once")
def test_a_fitted_solver_is_compared_with_its_steps_and_with_the_run(qcgraph: Command, fitted_bundle: Path) -> None:
    """Four steps for eight: work and the second speed-up count from the eight."""
    options = ["--rounds", "1", "--threads", "1", "--batches", "1", "--baselines", "torch"]
    data = qcgraph("bench", fitted_bundle, *options, "--json").json()
    assert (data["steps"], data["run_steps"]) == (4, 8)
    rows = {row["name"]: row for row in data["rows"]}
    assert rows["qcgraph"]["mac_ratio"] == pytest.approx(0.5)
    assert rows["qcgraph"]["run_speedup"]["value"] == pytest.approx(2 * rows["qcgraph"]["speedup"]["value"])
    assert rows["torch"]["mac_ratio"] == 1  # it takes all steps of the run
    assert rows["torch"]["run_speedup"] == rows["torch"]["speedup"]
    lines = qcgraph("bench", fitted_bundle, *options).out.splitlines()
    header = next(line for line in lines if "forward ms" in line)
    assert "4 steps s" in header
    assert "speed-up, same steps" in header
    assert "over the run of 8 steps" in header
    assert "over the run: against torch with 8 steps, which takes 8/4 of its time with 4" in lines
    assert "multiply-accumulates: of those of the model over the run of 8 steps" in lines
    assert "throughput, samples a second, with 4 steps each" in lines


@pytest.mark.slow
@pytest.mark.usefixtures("measure_once")
def test_those_that_cannot_run_leave_the_others_alone(
    qcgraph: Command, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO crashes while it loads, NNCF is not installed."""
    (tmp_path / "openvino.py").write_text("raise RuntimeError('this build is broken\\nsecond line')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    monkeypatch.setitem(sys.modules, "nncf", None)
    options = ["--rounds", "1", "--threads", "1", "--batches", "", "--baselines"]
    options.append("openvino-fp32,nncf-int8")
    data = qcgraph("bench", digits, *options, "--json").json()
    assert data["throughput"] == []
    found = {row["name"]: (row["status"], row["problem"]) for row in data["rows"]}
    assert found["openvino-fp32"] == ("failed", "building openvino.xml: RuntimeError: this build is broken")
    assert found["nncf-int8"] == ("missing", "not installed: nncf; pip install nncf")
    assert found["qcgraph"] == ("ok", "")
    rows = {row["name"]: row for row in data["rows"]}
    assert rows["openvino-fp32"]["sampling"] is None
    assert rows["qcgraph"]["sampling"] is not None
    assert rows["qcgraph"]["speedup"] is None  # torch, which it would be against, was not asked for
    done = qcgraph("bench", digits, *options)
    assert done.code == 0
    assert "openvino-fp32 failed  building openvino.xml: RuntimeError: this build is broken" in done.out
    assert "nncf-int8 missing" in done.out


@pytest.mark.slow
@pytest.mark.usefixtures("measure_once")
def test_a_float_baseline_that_computes_something_else_is_wrong(
    qcgraph: Command, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for an OpenVINO that returns noise predictions which are 1 % too large."""
    (tmp_path / "openvino.py").write_text(BENT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    options = ["--rounds", "1", "--threads", "1", "--batches", "", "--baselines", "openvino-fp32"]
    (row, _) = qcgraph("bench", digits, *options, "--json").json()["rows"]
    assert row["status"] == "wrong"
    assert row["error"] == pytest.approx(0.01, rel=1e-3)
    assert row["problem"] == "does not compute the model: relative error 1.0e-02, limit 1e-04"
    assert row["sampling"] is not None
    done = qcgraph("bench", digits, *options)
    assert any(line.startswith("openvino-fp32 (wrong) ") for line in done.out.splitlines())


# ``convert_model`` keeps the exported program, and requests run it in PyTorch.
BENT = """
import torch

class Request:
    def __init__(self, module):
        self.module = module
    def infer(self, values):
        with torch.inference_mode():
            return [1.01 * self.module(*map(torch.from_numpy, values)).numpy()]

class Model:
    def __init__(self, path):
        self.path = path
    def reshape(self, shapes):
        assert sorted(shapes) == [0, 1, 2]
    def create_infer_request(self):
        return Request(torch.export.load(self.path).module())

class Core:
    def read_model(self, path):
        return Model(str(path))
    def compile_model(self, model, device, settings):
        assert settings["INFERENCE_NUM_THREADS"] == 1
        return model

def convert_model(exported):
    return exported

def save_model(exported, path, compress_to_fp16):
    torch.export.save(exported, str(path.with_suffix(".pt2")))
    path.with_suffix(".pt2").rename(path)
"""
