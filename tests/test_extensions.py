"""What other distributions add: found without being imported, and what is wrong with them is said in words."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcgraph.errors import UsageError
from qcgraph.export.targets import target_named
from qcgraph.extensions import Extensions
from qcgraph.models import CodeError, list_models, load_model
from qcgraph.passes.caching.forecasters import forecaster_named, known_forecasters
from qcgraph.pipeline import Pipeline, make_pass, registry

Install = Callable[..., None]
GROUPS = ("passes", "targets", "models", "forecasters")
OWN = {"passes": "calibrate", "targets": "torch", "models": "digits", "forecasters": "affine"}
USE: dict[str, Callable[[str], Any]] = {
    "passes": lambda name: make_pass(name, {}),
    "targets": target_named,
    "models": load_model,
    "forecasters": forecaster_named,
}
every_group = pytest.mark.parametrize("group", GROUPS)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a distribution on the path, as an installer would."""
    monkeypatch.syspath_prepend(tmp_path)

    def installed(distribution: str, group: str, name: str, code: str) -> None:
        module = distribution.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[qcgraph.{group}]\n{name} = {module}:found\n")

    return installed


def refusal(group: str, name: str) -> str:
    with pytest.raises(UsageError) as caught:
        USE[group](name)
    assert caught.value.hint
    return f"{caught.value.where}: {caught.value.message}"


@every_group
def test_what_cannot_be_imported_names_its_distribution(install: Install, group: str) -> None:
    install(f"broken-{group}", group, "offered", "raise RuntimeError('no such device')")
    assert f"offered of broken-{group} 1.0: cannot be imported: RuntimeError: no such device" in refusal(
        group, "offered"
    )
    USE[group](OWN[group])  # what does not use it goes on


@every_group
def test_what_is_of_another_kind_names_its_distribution(install: Install, group: str) -> None:
    install(f"odd-{group}", group, "offered", "found = 3")
    said = refusal(group, "offered")
    assert f"offered of odd-{group} 1.0: is " in said
    assert "3" in said or "int" in said


@every_group
def test_a_name_that_two_distributions_offer_is_nobodys(install: Install, group: str) -> None:
    install(f"first-{group}", group, "offered", "raise SystemExit")
    install(f"second-{group}", group, "offered", "raise SystemExit")
    assert f"first-{group} 1.0 and second-{group} 1.0 both offer" in refusal(group, "offered")


@every_group
def test_names_of_qcgraph_cannot_be_taken(install: Install, group: str) -> None:
    before = registry()["calibrate"], target_named("torch"), forecaster_named("affine")
    install(f"taker-{group}", group, OWN[group], "raise SystemExit")
    USE[group](OWN[group])
    assert (registry()["calibrate"], target_named("torch"), forecaster_named("affine")) == before


def test_a_pass_of_another_name_is_refused(install: Install) -> None:
    install("misnamed", "passes", "offered", "from qcgraph.passes.caching.plan_cache import PlanCache as found")
    assert "offered of misnamed 1.0: is called 'plan-cache'" in refusal("passes", "offered")


def test_an_unfinished_pass_is_refused(install: Install) -> None:
    code = "from qcgraph.pipeline import Pass\n\nclass found(Pass):\n    name = 'offered'\n"
    install("unfinished", "passes", "offered", code)
    assert "is not a dataclass with a run method" in refusal("passes", "offered")


def test_a_model_that_fails_is_told_as_its_own(install: Install) -> None:
    install("failing", "models", "offered", "def found():\n    raise ValueError('no weights')\n")
    assert "the factory of offered raised ValueError: no weights" in refusal("models", "offered")


def test_names_are_known_without_an_import(install: Install) -> None:
    install("unseen-forecaster", "forecasters", "offered", "raise SystemExit")
    install("unseen-model", "models", "waves", "raise SystemExit")
    assert known_forecasters()["offered"] == "of unseen-forecaster 1.0"
    assert [model.distribution for model in list_models() if model.name == "waves"] == ["unseen-model 1.0"]
    assert Pipeline.parse("fit-forecast{kind=offered}").text == "fit-forecast{kind=offered}"
    with pytest.raises(UsageError, match=r"known: .*waves"):
        load_model("wave")


def test_a_model_that_a_file_names_is_not_imported(install: Install) -> None:
    install("stranger", "models", "offered", "raise SystemExit")
    with pytest.raises(CodeError, match="not imported"):
        load_model("offered", calls=False)


def test_problems_are_told_in_sentences(install: Install) -> None:
    extensions = Extensions("qcgraph.passes", "pass", lambda: ["calibrate"], lambda *_: "")
    install("taker", "passes", "calibrate", "")
    install("one", "passes", "twice", "")
    install("two", "passes", "twice", "")
    install("whole", "passes", "once", "")
    assert list(extensions.offers()) == ["once"]
    assert extensions.problems() == (
        "taker 1.0 offers the pass 'calibrate', which is qcgraph's",
        "one 1.0 and two 1.0 both offer the pass 'twice'",
    )
    assert extensions.load("absent") is None


@pytest.mark.parametrize("command", ["passes", "models", "targets"])
def test_lists_warn_of_what_is_broken(install: Install, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    from qcgraph.cli import run

    install("broken", command, "offered", "raise RuntimeError('no such device')")
    install("taker", command, OWN[command], "")
    assert run([command]) == 0
    done = capsys.readouterr()
    assert f"warning: taker 1.0 offers the {command[:-2] if command == 'passes' else command[:-1]} " in done.err
    assert OWN[command] in done.out
    if command != "models":  # which are not imported to be listed
        assert "offered of broken 1.0: cannot be imported: RuntimeError: no such device" in done.err


def test_help_imports_no_extension(install: Install, tmp_path: Path) -> None:
    for group in GROUPS:
        install(f"loud-{group}", group, "offered", "print('imported')")
    done = subprocess.run(
        [sys.executable, "-m", "qcgraph", "--help"],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "imported" not in done.stdout + done.stderr
