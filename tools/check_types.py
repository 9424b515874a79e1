"""Check the types of the installed package: build a wheel, unpack it, and run mypy on it.

The checkout itself can not be checked: passes/ and export/ become qcgraph.passes and qcgraph.export only in the built
package. On the checkout and on an editable install mypy skips them without a message, and a check that skips is green.
The script therefore also fails if wheel and checkout have different modules, or if mypy did not report on every one.

Run it with the interpreter of an environment that holds the dependencies::

    python tools/check_types.py [DIRECTORY]

With a directory, the checked wheel is kept there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def modules_under(directory: Path, package: str = "") -> set[str]:
    """Return the dotted names of the Python files under a directory that is installed as ``package``."""
    names = set()
    for path in directory.rglob("*.py"):
        parts = path.relative_to(directory).with_suffix("").parts
        names.add(".".join([*package.split("."), *parts]).strip(".").removesuffix(".__init__"))
    return names


def copy_sources(target: Path) -> set[str]:
    """Copy the sources of a wheel, and return its modules by the names that they are installed as.

    A build from the checkout itself would also pack files of earlier builds.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    target.mkdir()
    for path in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(path, target)
    modules: set[str] = set()
    for package, home in project["tool"]["setuptools"]["package-dir"].items():
        shutil.copytree(ROOT / home, target / home, ignore=shutil.ignore_patterns("__pycache__"))
        modules |= modules_under(target / home, package)
    return modules


def build_wheel(source: Path, scratch: Path) -> Path:
    """Build a wheel, and return its path."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", scratch, source]
    subprocess.run(command, check=True)
    return next(scratch.glob("*.whl"))


def run_mypy(site: Path, scratch: Path) -> tuple[int, set[str]]:
    """Run mypy on the unpacked wheel, outside of the checkout; return its exit code and the modules it reported."""
    report = scratch / "report"
    config = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", scratch / "cache"]
    command = [sys.executable, "-m", "mypy", *config, "--linecount-report", report, "--package", "qcgraph"]
    done = subprocess.run(command, cwd=scratch, env=os.environ | {"MYPYPATH": str(site)}, check=False)
    table = report / "linecount.txt"
    lines = table.read_text().splitlines()[1:] if table.exists() else []  # the first line is the total
    return done.returncode, {line.split()[-1] for line in lines}


def main() -> int:
    """Check the types, report the result, and return the exit code."""
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        source, site = scratch / "source", scratch / "site"
        expected = copy_sources(source)
        wheel = build_wheel(source, scratch)
        zipfile.ZipFile(wheel).extractall(site)
        code, checked = run_mypy(site, scratch)
        shipped = modules_under(site)
        if sys.argv[1:]:
            shutil.copy(wheel, sys.argv[1])
        typed = (site / "qcgraph" / "py.typed").exists()
    problems = {
        "in the checkout but not in the wheel": expected - shipped,
        "in the wheel but not in the checkout": shipped - expected,
        "not checked by mypy": shipped - checked,
        "not in the wheel": set() if typed else {"qcgraph/py.typed"},
    }
    for what, names in problems.items():
        for name in sorted(names):
            print(f"error: {what}: {name}", file=sys.stderr)
    mapped = sum(name.startswith(("qcgraph.passes", "qcgraph.export")) for name in checked)
    print(
        f"types: {len(checked & shipped)} of {len(expected)} modules checked, {mapped} of them in passes/ and export/"
    )
    return 1 if code or any(problems.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
