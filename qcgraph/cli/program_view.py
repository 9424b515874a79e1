"""Print programs as text on the command line: select a program, and print all or a part of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qcgraph.cli.ir_text import GraphText, NodeLine, ProgramText, matching, read_program_text, with_paths
from qcgraph.cli.output import print_json
from qcgraph.errors import UsageError, closest, shown

if TYPE_CHECKING:
    from qcgraph.bundle import Bundle, IrText

_LONGEST_NUMBER = 9  # digits of a pass number; Python refuses to read numbers of thousands of digits


def pass_text(bundle: Bundle, asked: str | None) -> IrText:
    """Return the text of the program after a pass, given by name or number; by default after the last pass.

    Raises:
        UsageError: there is no such pass, or it ran several times.
    """
    texts = bundle.ir_texts
    if not texts:
        raise UsageError("the bundle holds no program texts", where=str(bundle.path), hint="compile it again")
    if asked is None:
        return texts[-1]
    if asked.isdecimal() and len(asked) <= _LONGEST_NUMBER:
        found = [text for text in texts if text.index == int(asked)]
    else:
        found = [text for text in texts if text.name == asked]
    if not found:
        names = ", ".join(f"{text.index:03d} {text.name}" for text in texts)
        raise UsageError(f"no pass {shown(asked)}", where=str(bundle.path), hint=f"there are: {names}")
    if len(found) > 1:
        numbers = ", ".join(f"{text.index:03d}" for text in found)
        raise UsageError(f"pass {asked!r} ran several times", where=str(bundle.path), hint=f"give a number: {numbers}")
    return found[0]


def graphs_of(program: ProgramText, asked: str | None) -> tuple[GraphText, ...]:
    """Return the graph with a given name, or all graphs of a program if no name is given.

    Raises:
        UsageError: there is no such graph.
    """
    if asked is None:
        return tuple(program.graphs.values())
    if asked not in program.graphs:
        raise UsageError(f"no graph {asked!r}", hint=closest(asked, program.graphs))
    return (program.graphs[asked],)


def print_program(text: str, graph: str | None, node: str | None, *, about: Mapping[str, Any], json: bool) -> None:
    """Print a program: all of it, one graph, or the nodes that match a glob.

    Args:
        text: the program.
        graph: the name of the graph to print, or None for all graphs.
        node: a glob on node names and module paths.
        about: further fields of the JSON document.
        json: whether to print a JSON document.

    Raises:
        UsageError: there is no such graph, or no node matches.
    """
    graphs = graphs_of(read_program_text(text), graph)
    found = {item.name: matching(item, node or "*") for item in graphs}
    if not any(found.values()):
        raise UsageError(f"no node matches {node!r}", where="--node", hint="a glob such as 'blocks.0.*' or 'linear_*'")
    if json:
        nodes = {name: [asdict(line) | {"line": line.line.strip()} for line in lines] for name, lines in found.items()}
        print_json({**about, "graphs": nodes})
    elif node is not None:
        _print_matches(found)
    elif graph is not None:
        print(graphs[0].text)
    else:
        print(text.rstrip())


def _print_matches(found: Mapping[str, tuple[NodeLine, ...]]) -> None:
    for name, lines in found.items():
        if lines:
            print("\n".join([f"graph {name}", *with_paths(lines)]))
