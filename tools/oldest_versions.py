"""Print the oldest versions that pyproject.toml allows, as constraints for pip: CI runs the fast tests with them.

    python tools/oldest_versions.py > oldest.txt
    pip install --constraint oldest.txt --editable '.[dev]'

The output has a line for each package that the project or one of its extras requires on this machine: its lower bound,
pinned. Dependencies of these packages are not pinned, as in any later installation.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
LOWER_BOUNDS = (">=", "==", "~=")


class BoundError(ValueError):
    """A requirement that states no oldest version."""


def main() -> int:
    """Print the constraints."""
    options = parse()
    try:
        lines = list(constraints(tomllib.loads(options.pyproject.read_text("utf-8"))["project"]))
    except BoundError as error:
        print(f"error: {options.pyproject}: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


def constraints(project: Mapping[str, Any]) -> Iterator[str]:
    """Yield ``name==oldest`` for every requirement of a project that applies here, sorted by name.

    Args:
        project: the table ``[project]`` of a pyproject.toml.

    Raises:
        BoundError: a requirement has no lower bound, or two different ones.
    """
    oldest: dict[str, Version] = {}
    extras: Mapping[str, list[str]] = project.get("optional-dependencies", {})
    texts = [*project.get("dependencies", ()), *chain.from_iterable(extras.values())]
    for requirement in applying(texts):
        if requirement.name == project["name"]:  # an extra that includes another one, which is read anyway
            continue
        bound = lower_bound(requirement)
        if oldest.setdefault(requirement.name, bound) != bound:
            raise BoundError(f"{requirement.name} has two lower bounds, {oldest[requirement.name]} and {bound}")
    yield from (f"{name}=={oldest[name]}" for name in sorted(oldest))


def applying(texts: Iterable[str]) -> Iterator[Requirement]:
    """Yield the requirements whose markers hold on this machine."""
    for requirement in map(Requirement, texts):
        if requirement.marker is None or requirement.marker.evaluate():
            yield requirement


def lower_bound(requirement: Requirement) -> Version:
    """Return the oldest version that a requirement allows."""
    bounds = [Version(each.version) for each in requirement.specifier if each.operator in LOWER_BOUNDS]
    if len(bounds) != 1:
        raise BoundError(f"{str(requirement)!r} has {len(bounds)} lower bounds, not one")
    return bounds[0]


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pyproject", nargs="?", type=Path, default=ROOT / "pyproject.toml", help="by default ours")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
