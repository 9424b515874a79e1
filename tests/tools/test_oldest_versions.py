"""The constraints that CI installs the oldest versions with are the lower bounds of pyproject.toml, all of them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

ROOT = Path(__file__).resolve().parents[2]
TOOL = "oldest_versions.py"


def written(folder: Path, dependencies: list[str], **extras: list[str]) -> Path:
    path = folder / "pyproject.toml"
    path.write_text(
        tomli_w.dumps({"project": {"name": "toy", "dependencies": dependencies, "optional-dependencies": extras}})
    )
    return path


def test_all_dependencies_are_pinned_to_their_lower_bounds(run_tool: Any, tmp_path: Path) -> None:
    done = run_tool(TOOL, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    pinned = dict(line.split("==") for line in done.stdout.splitlines())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    own = [re.split(r"[;\[]", text)[0] for text in texts]
    asked = dict(text.split(",")[0].split(">=") for text in own if text != project["name"])
    assert pinned == asked
    assert {"torch", "numpy", "onnxruntime", "pytest", "matplotlib", "tensorrt-rtx"} <= pinned.keys()


def test_markers_extras_and_upper_bounds(run_tool: Any, tmp_path: Path) -> None:
    here = written(
        tmp_path,
        ["one>=1.2,<2", "two~=3.4", "elsewhere>=1; sys_platform == 'no-such-system'"],
        more=["toy[other]", "three==5"],
        other=["one>=1.2"],
    )
    done = run_tool(TOOL, here, folder=tmp_path)
    assert (done.returncode, done.stdout.splitlines()) == (0, ["one==1.2", "three==5", "two==3.4"])


@pytest.mark.parametrize(
    ("dependencies", "message"),
    [
        (["one"], "'one' has 0 lower bounds"),
        (["one<3"], "'one<3' has 0 lower bounds"),
        (["one>=1,>=2"], "has 2 lower bounds"),
        (["one>=1", "one>=2"], "one has two lower bounds, 1 and 2"),
    ],
)
def test_what_has_no_oldest_version(run_tool: Any, tmp_path: Path, dependencies: list[str], message: str) -> None:
    done = run_tool(TOOL, written(tmp_path, dependencies), folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
