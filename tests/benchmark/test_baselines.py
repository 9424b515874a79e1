"""The list of baselines, what they need, and the processes that they are built in."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qcgraph.benchmark.baselines import BASELINES, BUILDERS, DEFAULT, parse_baselines
from qcgraph.benchmark.worker import TaskError, attempt, build_file
from qcgraph.benchmark.workspace import Workspace
from qcgraph.cli.bench import bench_command
from qcgraph.errors import BundleError, UsageError


def test_a_list_of_baselines() -> None:
    assert [baseline.name for baseline in parse_baselines(" torch, nncf-int8 ")] == ["torch", "nncf-int8"]
    assert parse_baselines("") == ()
    assert parse_baselines("all") == tuple(BASELINES.values())


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("torhc", "unknown baseline 'torhc'\n\nhint: did you mean 'torch'?"),
        ("torch,onnxruntime-fp23", "did you mean 'onnxruntime-fp32'?"),
        ("torch,torch", "torch is named twice"),
    ],
)
def test_a_wrong_list_is_refused(text: str, what: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_baselines(text)
    assert what in str(caught.value)


def test_the_command_line_knows_the_baselines() -> None:
    """Its help lists them, and its default is the default, although it cannot import them."""
    parameter = inspect.signature(bench_command).parameters["baselines"]
    assert parameter.default == ",".join(DEFAULT)
    assert all(name in str(parameter.annotation) for name in BASELINES)


def test_every_file_of_a_baseline_can_be_built() -> None:
    assert {name for baseline in BASELINES.values() for name in baseline.files} == set(BUILDERS)


def test_a_missing_package_is_named_with_what_installs_it() -> None:
    baseline = replace(BASELINES["nncf-int8"], packages=("numpy", "no_such_package", "nor_this"))
    assert baseline.missing() == "not installed: no_such_package, nor_this; pip install no_such_package nor_this"
    assert replace(baseline, packages=("numpy",)).missing() == ""


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "needs a C++ compiler" in BASELINES["torch-compile"].missing()


def test_errors_of_peers_become_one_line() -> None:
    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(TaskError, match=r"^ValueError: first$"):
        attempt(lambda: fail(ValueError("\n first \n second")))
    with pytest.raises(TaskError, match=r"^KeyError$"):
        attempt(lambda: fail(KeyError()))
    with pytest.raises(TaskError, match=r"^is damaged$"):
        attempt(lambda: fail(BundleError("is damaged", hint="copy it")))
    assert attempt(lambda: 3) == 3


@pytest.mark.slow
def test_a_task_that_fails_says_why(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, tmp_path / "no-bundle", None, 1)
    with pytest.raises(TaskError, match="there is no such bundle"):
        build_file(workspace, "calibration.npz")


def test_a_process_that_dies_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "openvino.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TaskError, match=r"its process ended \(killed by SIGKILL\)"):
        build_file(Workspace(tmp_path, tmp_path, None, 1), "openvino.xml")


def test_a_workspace_travels_as_data(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, tmp_path / "bundle", "dit-s-2:random", 2)
    assert Workspace.decode(workspace.encode()) == workspace


def test_the_worker_itself_needs_no_runtime() -> None:
    """What a process holds besides the one candidate it runs would be counted as that one's memory."""
    code = (
        "import sys, qcgraph.benchmark.worker; "
        "print([name for name in ('torch', 'onnx', 'onnxruntime', 'openvino', 'diffusers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
