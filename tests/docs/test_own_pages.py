"""docs/own-passes.md and docs/own-models.md: the package is installed, the commands run, the snippets are its files."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcgraph.bundle import Bundle
from qcgraph.cli import run
from qcgraph.export.targets import target_of

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "docs" / name for name in ("own-passes.md", "own-models.md")]
EXAMPLE = ROOT / "docs" / "examples" / "qcgraph-example"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the example package is installed to, from a copy: building leaves files beside the source."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, folder / "source")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        *options,
        "--target",
        str(folder / "site"),
        str(folder / "source"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture
def installed(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(place)
    yield
    forget()


def forget() -> None:
    """Forget what was imported of the package, so that importing it again would be seen."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "qcgraph_example"]:
        del sys.modules[name]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


def commands(page: Path) -> list[str]:
    lines = [line for block in blocks(page, "console") for line in block.splitlines()]
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_are_those_of_the_package(page: Path) -> None:
    sources = [path.read_text("utf-8") for path in [*EXAMPLE.rglob("*.py"), EXAMPLE / "pyproject.toml"]]
    snippets = [text for text in (*blocks(page, "python"), *blocks(page, "toml")) if not text.startswith("# ")]
    assert len(snippets) >= 3
    assert [text for text in snippets if not any(text in source for source in sources)] == []


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for text in blocks(page, "toml"):
        if match := re.match(r"# (\S+\.toml)\n", text):
            (tmp_path / match[1]).write_text(text)
    said = ""
    for command in commands(page):
        forget()
        code = run(shlex.split(command)[1:])
        done = capsys.readouterr()
        assert code == 0, f"{command}\n{done.err}"
        said += done.out
        if not command.startswith(("qcgraph compile", "qcgraph passes", "qcgraph targets")):
            assert "qcgraph_example" not in sys.modules, f"{command} imported what the bundle names"
    assert "qcgraph-example 0.1.0" in said
    if page.stem == "own-passes":
        assert "count-operators  full, aten.linear.default" in said
        bundle = Bundle.open("out/counted")
        assert (bundle.manifest.target, target_of(bundle).opset) == ("onnx-float", 21)
        texts = [path.read_text() for path in (tmp_path / "out" / "counted" / "ir").glob("*count-operators.txt")]
        assert any("\noperators of full: " in text for text in texts)
