"""Read printed programs back into graphs and lines, so that bundles are inspected and compared without torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

_GRAPH = re.compile(r"graph (?P<name>[^(\s]+)\(.*\{$")
_PATH = re.compile(r"  ; (?P<path>.+)$")
_NODE = re.compile(r"  %(?P<name>[^:\s]+): .*? = (?P<op>[^\s(]+)\(")
TOP_LEVEL = "top level"


@dataclass(frozen=True)
class NodeLine:
    """One node: its name, its operation, its module path, and its line of text."""

    name: str
    op: str
    path: str
    line: str


@dataclass(frozen=True)
class GraphText:
    """One graph: its name, its text from ``graph`` to the closing brace, and its nodes."""

    name: str
    text: str
    nodes: tuple[NodeLine, ...]

    @property
    def ops(self) -> Counter[str]:
        """The number of nodes of each operation."""
        return Counter(node.op for node in self.nodes)


@dataclass(frozen=True)
class ProgramText:
    """One program: the lines about its facts, and its graphs by name."""

    facts: str
    graphs: Mapping[str, GraphText]


def read_program_text(text: str) -> ProgramText:
    """Read a program that `qcgraph.ir.printer` printed."""
    facts: list[str] = []
    graphs: dict[str, list[str]] = {}
    lines = facts
    for line in text.splitlines():
        if match := _GRAPH.match(line):
            lines = graphs.setdefault(match["name"], [])
        lines.append(line)
    return ProgramText("\n".join(facts).strip(), {name: _graph(name, body) for name, body in graphs.items()})


def _graph(name: str, lines: list[str]) -> GraphText:
    nodes: list[NodeLine] = []
    path = TOP_LEVEL
    for line in lines:
        if match := _PATH.match(line):
            path = match["path"]
        elif match := _NODE.match(line):
            nodes.append(NodeLine(match["name"], match["op"], path, line))
    return GraphText(name, "\n".join(lines).strip(), tuple(nodes))


def matching(graph: GraphText, pattern: str) -> tuple[NodeLine, ...]:
    """Return the nodes whose name or module path matches a glob; a path matches all paths below it, too."""
    return tuple(
        node
        for node in graph.nodes
        if fnmatchcase(node.name, pattern) or fnmatchcase(node.path, pattern) or fnmatchcase(node.path, f"{pattern}.*")
    )


def with_paths(nodes: tuple[NodeLine, ...]) -> Iterator[str]:
    """Yield the lines of nodes, with the module path above each run of nodes that share it."""
    path: str | None = None
    for node in nodes:
        if node.path != path:
            path = node.path
            yield f"  ; {path}"
        yield node.line


def op_changes(before: ProgramText, after: ProgramText) -> dict[str, tuple[Counter[str], Counter[str]]]:
    """Return, for every graph that differs, the numbers of added and removed nodes of each operation."""
    changes: dict[str, tuple[Counter[str], Counter[str]]] = {}
    for name in dict.fromkeys([*before.graphs, *after.graphs]):
        old, new = (program.graphs[name].ops if name in program.graphs else Counter() for program in (before, after))
        added, removed = new - old, old - new
        if added or removed or (name in before.graphs) != (name in after.graphs):
            changes[name] = (added, removed)
    return changes


def ops_text(ops: Counter[str], sign: str = "", most: int | None = None) -> str:
    """Return operations with their counts, the most frequent first: ``30 linear, 12 add.Tensor``."""
    shown = sorted(ops.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{sign}{count} {op}" for op, count in shown[:most]]
    if most is not None and len(shown) > most:
        parts.append(f"{sum(count for _, count in shown[most:])} others")
    return ", ".join(parts)
