"""The documents tell the truth: commands run, links resolve, the pass table is the registry."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcgraph
from qcgraph.bundle import Bundle
from qcgraph.cli import run
from qcgraph.export.run.open import runner_of
from qcgraph.pipeline import registry
from qcgraph.recipe import Recipe
from qcgraph.sampling.loop import sample
from qcgraph.sampling.noise import Noise

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def console_commands(text: str) -> list[str]:
    """The lines after ``$`` in the blocks marked ``console``; blocks marked ``sh`` install or measure."""
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def python_examples(word: str) -> list[str]:
    """The blocks of Python that hold a word."""
    return [text for text in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if word in text]


def test_the_pass_table_is_the_registry() -> None:
    rows = [f"| `{name}` | {kind.summary()} |" for name, kind in registry().items()]
    table = "\n".join(["| pass | what it does |", "|---|---|", *rows])
    assert table in README, f"the table should be:\n{table}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=[path.name for path in DOCUMENTS])
def test_links_resolve(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", document.read_text("utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_there_are_commands_to_run() -> None:
    commands = console_commands(README)
    assert len(commands) >= 8
    assert all(command.startswith("qcgraph ") for command in commands)


@pytest.mark.slow
def test_every_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order of the README, in an empty folder, as a reader would type them, but in this process."""
    monkeypatch.chdir(tmp_path)
    for command in console_commands(README):
        code = run(shlex.split(command)[1:])
        done = capsys.readouterr()
        assert code == 0, f"{command}\n{done.err}"
        assert done.out.strip(), command
    assert (tmp_path / "out" / "grid.png").is_file()
    (example,) = python_examples("onnxruntime")  # of the model that a command exported
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    bundle = Bundle.open("out/digits")
    plan, spec = bundle.plan, bundle.spec
    noise = np.random.default_rng(0).standard_normal((2, *spec.latent_shape), np.float32)
    monkeypatch.setattr(Noise, "initial", lambda self: noise)
    np.testing.assert_allclose(names["latent"], sample(runner_of(bundle), plan, spec, [3, 7], seed=0), atol=1e-5)


def compile_sooner(compile_: Callable[..., Bundle], model: str, recipe: str, **options: Any) -> Bundle:
    """What the example asks for with fewer steps and samples, which change nothing but how long it takes."""
    asked = Recipe.load(recipe).override(steps=8)
    few = asked.calibration.model_copy(update={"trajectories": 4})
    return compile_(model, asked.model_copy(update={"calibration": few}), **options)


@pytest.mark.slow
def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = python_examples("qcgraph.compile")  # the one with diffusers: tests/test_diffusers_pipeline.py
    monkeypatch.setattr(qcgraph, "compile", partial(compile_sooner, qcgraph.compile))
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert getattr(names["prediction"], "shape", None) == (2, 1, 8, 8)
