"""Count the rooms of the house, how its imports run, and how many files a change touches.

    python tools/house.py [CHECKOUT]

A room is a folder of modules; loose modules stand in ``qcgraph/``, ``passes/`` or ``export/`` themselves. A climb is an
import of a room that, directly or through other rooms, imports the importer's room: the two know each other. A recipe's
way from the command line to the bundle is every room that the command line imports, directly or not, and that imports
the bundle's room. ``tools/changes`` holds a patch for each change that must be cheap; whether it applies is checked.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

CHANGES = Path(__file__).parent / "changes"
START, END = "qcgraph.cli", "qcgraph.bundle"
HOMES = {"qcgraph": "qcgraph", "qcgraph.passes": "passes", "qcgraph.export": "export"}


def modules(root: Path) -> dict[str, Path]:
    """Return the modules of a checkout, by the names they are imported as."""
    found = {}
    for package, home in HOMES.items():
        for path in (root / home).rglob("*.py"):
            parts = path.relative_to(root / home).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Return the modules of qcgraph that a file imports, including imports inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in whole}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known.keys()


def room_of(module: str, known: dict[str, Path]) -> str:
    """Return the room of a module: the folder that it stands in, or the module itself if it is loose."""
    if known[module].name == "__init__.py":
        return module
    parent = module.rpartition(".")[0]
    return module if parent in HOMES else parent


def reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    """Return the rooms that a room imports, directly or indirectly."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for room in edges[waiting.pop()] - found:
            found.add(room)
            waiting.append(room)
    return found


def main() -> None:
    """Count the rooms and climbs, and print them."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    known = modules(root)
    rooms = {module: room_of(module, known) for module in known}
    edges: dict[str, set[str]] = defaultdict(set)
    for module, path in known.items():
        edges[rooms[module]] |= {rooms[other] for other in imports(path, known)} - {rooms[module]}
    loose = [name for name in known if known[name].name not in ("__init__.py", "__main__.py") and rooms[name] == name]
    climbs = [(one, other) for one in sorted(edges) for other in sorted(edges[one]) if one in reachable(other, edges)]
    folders = {rooms[name] for name in known} - set(loose) - {"qcgraph.__main__"}
    print(f"{len(known)} modules in {len(folders)} folders, {len(loose)} of them loose")
    print(f"{len(loose) + len(folders)} places to look for something; {len(climbs)} climbs between them")
    for one, other in climbs:
        print(f"  {one} -> {other}")
    way = {room for room in reachable(START, edges) if END in reachable(room, edges)} | {START, END}
    on_way = [(one, other) for one, other in climbs if {one, other} <= way]
    print(f"a recipe's way from the command line to the bundle: {len(way)} rooms, {len(on_way)} climbs")
    for path in sorted(CHANGES.glob("*.patch")):
        failed = subprocess.run(
            ["git", "apply", "--check", str(path.resolve())], cwd=root, capture_output=True, check=False
        ).returncode
        print(f"{path.stem}: {files_of(path)} files{', does not apply' if failed else ''}")


def files_of(patch: Path) -> int:
    """Count the files that a patch touches."""
    return len(re.findall(r"^diff --git ", patch.read_text("utf-8"), re.MULTILINE))


if __name__ == "__main__":
    main()
