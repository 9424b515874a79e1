"""Finds what the arguments of ``inspect`` and ``diff`` name in a bundle: the program after a pass, and its graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcgraph.errors import UsageError, closest

if TYPE_CHECKING:
    from qcgraph.bundle import Bundle, IrText
    from qcgraph.cli.ir_text import GraphText, ProgramText


def pass_text(bundle: Bundle, asked: str | None) -> IrText:
    """The program after a pass, given by its name or its number; the last one when nothing is asked for.

    Raises:
        UsageError: there is no such pass, or it ran several times.
    """
    texts = bundle.ir_texts
    if not texts:
        raise UsageError("the bundle holds no program texts", where=str(bundle.path), hint="compile it again")
    if asked is None:
        return texts[-1]
    if asked.isdecimal():
        found = [text for text in texts if text.index == int(asked)]
    else:
        found = [text for text in texts if text.name == asked]
    if not found:
        names = ", ".join(f"{text.index:03d} {text.name}" for text in texts)
        raise UsageError(f"no pass {asked!r}", where=str(bundle.path), hint=f"there are: {names}")
    if len(found) > 1:
        numbers = ", ".join(f"{text.index:03d}" for text in found)
        raise UsageError(f"pass {asked!r} ran several times", where=str(bundle.path), hint=f"give a number: {numbers}")
    return found[0]


def graphs_of(program: ProgramText, asked: str | None) -> tuple[GraphText, ...]:
    """All graphs of a program, or the one that is asked for.

    Raises:
        UsageError: there is no such graph.
    """
    if asked is None:
        return tuple(program.graphs.values())
    if asked not in program.graphs:
        raise UsageError(f"no graph {asked!r}", hint=closest(asked, program.graphs))
    return (program.graphs[asked],)
