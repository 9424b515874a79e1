"""qcgraph passes, models and targets; and what compile refuses before any work begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcgraph.pipeline import registry

Command = Callable[..., Any]


@pytest.mark.parametrize(("command", "row"), [("passes", "plan-cache"), ("models", "digits"), ("targets", "torch")])
def test_tables(qcgraph: Command, command: str, row: str) -> None:
    done = qcgraph(command)
    assert (done.code, done.err) == (0, "")
    assert any(line.startswith(f"{row} ") for line in done.out.splitlines())
    assert row in {item["name"] for item in qcgraph(command, "--json").json()}


@pytest.mark.parametrize("name", sorted(registry()))
def test_every_pass_is_described(qcgraph: Command, name: str) -> None:
    data = qcgraph("passes", name, "--json").json()
    assert data["summary"].endswith(".")
    assert [option["name"] for option in data["options"] if not option["description"]] == []
    assert qcgraph("passes", name).out.startswith(f"{name}\n\n{data['summary'][:20]}")


def test_options_of_a_pass(qcgraph: Command) -> None:
    data = qcgraph("passes", "plan-cache", "--json").json()
    assert (data["requires"], data["provides"]) == (["StepPlan"], ["CachePlan"])
    assert data["options"][0]["name"] == "interval"
    assert "in a pipeline: plan-cache{interval=" in qcgraph("passes", "plan-cache").out


def test_unknown_pass(qcgraph: Command) -> None:
    done = qcgraph("passes", "plan-cach")
    assert done.code == 2
    assert "did you mean 'plan-cache'?" in done.err


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--recipe", "fasst"], "did you mean 'fast'?"),
        (["--recipe", "absent.toml"], "there is no such file"),
        (["--bits", "w9a9"], "--bits: 'w9a9' does not fit"),
        (["--cache", "every-third"], "--cache: 'every-third' does not fit"),
        (["--steps", "0"], "--steps: 0 does not fit"),
        (["--seed", "-1"], "--seed: -1 does not fit"),
        (["--target", "onnxruntime"], "did you mean 'onnxruntime-cpu'?"),
        (["--scheduler", "dimm"], "did you mean 'ddim'?"),
        (["--print-after", "plan-cash"], "no pass 'plan-cash' in this pipeline"),
    ],
)
def test_compile_refuses(qcgraph: Command, tmp_path: Path, options: list[str], what: str) -> None:
    done = qcgraph("compile", "digits", "-o", tmp_path / "out", *options)
    assert (done.code, done.out) == (2, "")
    assert what in done.err
    assert "\n\nhint: " in done.err
    assert list(tmp_path.iterdir()) == []


def test_compile_does_not_overwrite(qcgraph: Command, bundle: Path) -> None:
    done = qcgraph("compile", "digits", "-o", bundle)
    assert done.code == 2
    assert "give --force to replace it" in done.err


def test_compile_does_not_replace_folders_of_others(qcgraph: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    done = qcgraph("compile", "digits", "-o", tmp_path, "--force")
    assert done.code == 2
    assert "exists and is not a bundle" in done.err
    assert (tmp_path / "mine.txt").exists()


def test_compile_into_a_file(qcgraph: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = qcgraph("compile", "digits", "-o", tmp_path / "file" / "out")
    assert done.code == 2
    assert "is a file" in done.err


def test_compile_needs_an_output(qcgraph: Command) -> None:
    done = qcgraph("compile", "digits")
    assert done.code == 2
    assert "-o FOLDER" in done.err


@pytest.mark.slow
def test_dry_run_writes_nothing(qcgraph: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ("compile", "digits", "--cache", "budget=0.35", "--dry-run")
    done = qcgraph(*asked)
    assert done.code == 0
    assert "plan-cache" in done.out
    assert "nothing was written" in done.out
    assert list(tmp_path.iterdir()) == []
    data = qcgraph(*asked, "--json").json()
    assert data["bundle"] is None
    assert data["recipe"]["cache"]["schedule"] == "budget=0.35"
    assert data["cache"]["planned"] is None
    assert [row["text"] for row in data["passes"]] == [
        "plan-cache{budget=0.35 history=3}",
        "insert-cache",
        "drop-variants",
        "insert-forecast",
        "lower-linear",
    ]
    assert "24 of 34 linear layers planned" in done.out


@pytest.mark.slow
def test_stop_after_prints_the_program(
    qcgraph: Command, small_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = qcgraph("compile", small_digits, "--cache", "interval=3", "--stop-after", "insert-cache")
    assert done.code == 0
    assert "\ngraph reuse(" in done.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_printed_programs_stay_out_of_the_json(qcgraph: Command, small_digits: Path) -> None:
    options = ("--cache", "interval=3", "--stop-after", "insert-cache", "--print-after", "insert-cache", "--json")
    done = qcgraph("compile", small_digits, *options)
    assert done.json()["bundle"] is None
    assert "\ngraph reuse(" in done.err
