"""Plans on the command line: printed by inspect, followed by compile, refused with exit code 2 and nothing written."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcgraph.bundle.plan_file import read_plan

Command = Callable[..., Any]


def test_inspect_prints_what_compile_reads(qcgraph: Command, bundle: Path, tmp_path: Path) -> None:
    done = qcgraph("inspect", bundle, "--show", "plan")
    assert (done.code, done.err) == (0, "")
    (tmp_path / "my-plan.toml").write_text(done.out)
    written, own = read_plan(tmp_path / "my-plan.toml"), read_plan(bundle)
    assert written.schedule == own.schedule
    assert written.describe() == own.describe() == "ddim, 3 steps, guidance 1.5"
    data = qcgraph("inspect", bundle, "--show", "plan", "--json").json()
    assert data == tomllib.loads(done.out)
    assert list(data["timesteps"].values()) == ["full", "reuse", "full"]


@pytest.mark.slow
def test_a_dry_run_shows_what_becomes_of_a_plan(qcgraph: Command, small_digits: Path, tmp_path: Path) -> None:
    path = tmp_path / "my-plan.toml"
    path.write_text('guidance = 4.0\n[timesteps]\n900 = "full"\n600 = "reuse"\n300 = "reuse"\n0 = "full"\n')
    options = ("--plan", path, "--steps", "8", "--dry-run")
    done = qcgraph("compile", small_digits, *options)
    assert done.code == 0
    assert "plan       of 4 steps, guidance 4, carried over (made at another guidance than here:" in done.out
    assert "; 4 steps compute\n" in done.out
    assert "apply-plan{plan=900-300:FRRF}" in done.out
    data = qcgraph("compile", small_digits, *options, "--json").json()
    assert data["recipe"]["cache"]["schedule"] == "plan=900-300:FRRF"
    assert data["given_plan"]["is_retargeted"] is True
    assert (data["given_plan"]["computing"], data["variants"]["full"]["steps"]) == (4, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ('[timesteps]\n900 = "reuse"', [], "the first one, is to reuse"),
        ('[timesteps]\n900 = "full"\n600 = "reuse_1"', [], "in the mode reuse_1, which this compilation has not"),
        ('model = "0123456789abcdef"\n[timesteps]\n900 = "full"', [], "was made for another model"),
        ('[timesteps]\n900 = "full"', ["--cache", "interval=3"], "--cache and --plan both decide"),
        ('[timesteps]\n900 = "full"', ["--recipe", "own.toml"], "the recipe has a pipeline of its own"),
        ("[timesteps", [], "is not valid TOML"),
    ],
)
def test_refused(
    qcgraph: Command,
    small_digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-plan.toml").write_text(text)
    (tmp_path / "own.toml").write_text('[pipeline]\npasses = "plan-cache,insert-cache"')
    done = qcgraph("compile", small_digits, "-o", "out", "--steps", "4", "--plan", "my-plan.toml", *options)
    assert done.code == 2
    assert message in done.err
    assert "\n\nhint: " in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my-plan.toml", "own.toml"]


def test_no_such_plan(qcgraph: Command, tmp_path: Path) -> None:
    done = qcgraph("compile", "digits", "-o", tmp_path / "out", "--plan", tmp_path / "absent.toml")
    assert done.code == 2
    assert "there is no such plan" in done.err
    assert not list(tmp_path.iterdir())
