"""The layout: two directories at the top that are installed inside the package, and what ships in it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
CODE = ("qcgraph", "passes", "export", "tests", "tools", ".ci")

TEXT = {"", ".json", ".md", ".py", ".toml", ".txt"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|tmp|Users|work)/\w")


def package_directories() -> dict[str, Path]:
    """The directories that hold Python files, by the name they are installed as."""
    found = {}
    for package, home in SETUPTOOLS["package-dir"].items():
        for path in (ROOT / home).rglob("*.py"):
            found[".".join([package, *path.parent.relative_to(ROOT / home).parts])] = path.parent
    return found


@pytest.mark.parametrize("name", ["passes", "export"])
def test_bare_import_is_refused(name: str) -> None:
    code = f"import {name}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"ImportError: this directory is the package qcgraph.{name}" in done.stderr
    assert "hint: " in done.stderr
    assert f"import qcgraph.{name}" in done.stderr


@pytest.mark.parametrize("name", ["passes", "export"])
def test_mapped_package_is_importable(name: str, tmp_path: Path) -> None:
    code = f"import qcgraph.{name} as package; print(package.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == f"qcgraph.{name}\n", done.stderr


def test_every_package_is_listed() -> None:
    """A directory that pyproject.toml does not list works here and is missing from the wheel."""
    assert sorted(SETUPTOOLS["packages"]) == sorted(package_directories())


def test_every_package_has_an_init() -> None:
    directories = package_directories()
    assert [name for name, path in directories.items() if not (path / "__init__.py").is_file()] == []


def test_package_data_patterns_match() -> None:
    """A pattern that matches nothing ships nothing, and nobody notices."""
    for package, patterns in SETUPTOOLS["package-data"].items():
        home = ROOT / SETUPTOOLS["package-dir"][package]
        unmatched = [pattern for pattern in patterns if not any(home.glob(pattern))]
        assert not unmatched, package


def test_every_data_file_ships() -> None:
    for package, home in SETUPTOOLS["package-dir"].items():
        patterns = SETUPTOOLS["package-data"][package]
        shipped = {path for pattern in patterns for path in (ROOT / home).glob(pattern)}
        files = {path for path in (ROOT / home).rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"}}
        assert files == shipped, package


def test_one_trained_model_ships() -> None:
    """The others, in tools/models, are for judging methods on a checkout."""
    shipped = {
        str(path.relative_to(ROOT))
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in (ROOT / SETUPTOOLS["package-dir"][package]).glob(pattern)
        if path.suffix == ".safetensors"
    }
    assert shipped == {f"qcgraph/models/digits/{name}.safetensors" for name in ("classifier", "digits")}


def test_tests_are_no_package() -> None:
    """Test modules are imported by path; a package would make ``tests`` importable and its order matter."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_no_machine_paths() -> None:
    files = [path for name in CODE for path in (ROOT / name).rglob("*")] + list(ROOT.iterdir())
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        if path.is_file() and path.suffix in TEXT and path.name != ".git"  # a file in a second working tree
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []
