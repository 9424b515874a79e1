"""qcgraph build: what is refused, with and without TensorRT-RTX, and what it prints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qcgraph.bundle import Bundle, write_plan, writing
from qcgraph.cli import run
from qcgraph.errors import UsageError
from qcgraph.export.tensorrt import provider as tensorrt
from qcgraph.recipe import Recipe

Command = Callable[..., Any]


@pytest.fixture
def with_graphs(bundle: Path, tmp_path: Path) -> Path:
    """A bundle whose graphs are none: enough for all that is refused before they are read."""
    old, path = Bundle.open(bundle), tmp_path / "with-graphs"
    with writing(path, model="toy", target="onnxruntime-cpu") as folder:
        write_plan(folder, old.spec, old.plan, old.interfaces)
        (folder / "recipe.lock.toml").write_text(Recipe().to_toml())
        for variant in old.interfaces:
            (folder / f"{variant}.onnx").write_bytes(b"no graph")
    return path


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise UsageError("TensorRT-RTX is not installed", hint=tensorrt.LIBRARIES[name].install)

    monkeypatch.setattr(tensorrt, "load_provider", missing)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--target", "tensorrt-xl"], "has no full.onnx"),
        (["--compute-capability", "8.9", "--batch", "4,2,8"], "--batch: '4,2,8' does not rise"),
        (["--compute-capability", "8.9", "--batch", "two"], "--batch: 'two' is not three whole numbers"),
        (["--compute-capability", "8.9", "--batch", "0,2,4"], "--batch: the smallest batch is 1, not 0"),
        (["--compute-capability", "8.9"], "has no full.onnx: it was compiled for onnxruntime-cpu"),
    ],
)
def test_refused(qcgraph: Command, bundle: Path, options: list[str], what: str) -> None:
    done = qcgraph("build", bundle, *options)
    assert (done.code, done.out) == (2, "")
    assert what in done.err
    assert "\n\nhint: " in done.err


def test_no_such_bundle(qcgraph: Command, tmp_path: Path) -> None:
    done = qcgraph("build", tmp_path / "nothing", "--compute-capability", "8.9")
    assert (done.code, done.out) == (2, "")
    assert "there is no such bundle" in done.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_compute_capability_and_no_gpu(qcgraph: Command, with_graphs: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    done = qcgraph("build", with_graphs)
    assert (done.code, done.out) == (2, "")
    assert "--compute-capability: none is given, and " in done.err
    assert "\n\nhint: known: 7.5, 8.0" in done.err


def test_an_unknown_target(qcgraph: Command, with_graphs: Path) -> None:
    done = qcgraph("build", with_graphs, "--target", "tensorrt-rt")
    assert done.code == 2
    assert done.err.startswith("error: unknown provider 'tensorrt-rt'\n\nhint: did you mean 'tensorrt-rtx'")


@pytest.mark.usefixtures("not_installed")
def test_without_the_library(qcgraph: Command, with_graphs: Path) -> None:
    done = qcgraph("build", with_graphs, "--compute-capability", "8.9")
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: TensorRT-RTX is not installed\n\nhint: pip install qcgraph[tensorrt-rtx]\n"


def test_an_unknown_compute_capability(qcgraph: Command, with_graphs: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    done = qcgraph("build", with_graphs, "--compute-capability", "8.9", "--compute-capability", "9.0")
    assert done.code == 2
    assert "does not build for '9.0'" in done.err
    assert "\n\nhint: known: 7.5, 8.0" in done.err


def test_something_is_there(qcgraph: Command, with_graphs: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    done = qcgraph("build", with_graphs, "--compute-capability", "8.9", "-o", tmp_path / "mine", "--force")
    assert done.code == 2
    assert "mine: exists and holds no engines" in done.err


def test_a_graph_that_cannot_be_read(qcgraph: Command, with_graphs: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    done = qcgraph("build", with_graphs, "--compute-capability", "8.9")
    assert (done.code, done.out) == (2, "")
    assert "full.onnx" in done.err
    assert "reuse.onnx" in done.err
    assert not (with_graphs / "engines").exists()


@pytest.mark.slow
def test_engines_of_digits(qcgraph: Command, small_digits: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    options = ["--bits", "off", "--steps", "2", "--cache", "interval=2", "--target", "onnxruntime-cpu"]
    assert run(["compile", str(small_digits), "-o", str(tmp_path / "digits"), *options]) == 0
    qcgraph("models")  # takes what the compilation printed
    done = qcgraph("build", tmp_path / "digits", "--compute-capability", "8.9", "--batch", "2,2,4")
    assert done.code == 0
    heading, *rows = done.out.splitlines()
    assert heading.split()[:3] == ["engine", "size", "seconds"]
    assert [row.split()[0] for row in rows] == ["full.sm89.engine", "reuse.sm89.engine"]
    assert done.err == "building full for 8.9\nbuilding reuse for 8.9\n"
    again = qcgraph("build", tmp_path / "digits", "--compute-capability", "8.9", "--json", "--force")
    assert [engine["variant"] for engine in again.json()["engines"]] == ["full", "reuse"]
