"""Print results of commands: tables and fields for people, JSON for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 1000  # columns of output to a pipe or file, so that no line is wrapped or cut

MOST_SAMPLES = 1_000_000  # the largest count that any option accepts
MOST_SEED = 2**63 - 1  # the largest seed that a file of samples can hold
MOST_THREADS = 4096

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def console() -> Console:
    """Return a console on stdout that prints text without markup."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(file=sys.stdout, width=width, markup=False, highlight=False, emoji=False)


def print_json(value: Any) -> None:
    """Print one JSON document to stdout (see `finite`)."""
    print(json.dumps(finite(value), indent=2, allow_nan=False))


def finite(value: Any) -> Any:
    """Return a value that JSON can hold: NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[str] = ()) -> None:
    """Print a table to stdout.

    Args:
        columns: the headings.
        rows: for every row, one cell for each column.
        right: the columns that are aligned right, such as numbers.
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    numbers = set(right)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    _print_without_padding(table)


def print_fields(fields: Iterable[tuple[str, object]]) -> None:
    """Print names and values to stdout, one pair on each line."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in fields:
        table.add_row(name, str(value))
    _print_without_padding(table)


def print_heading(text: str) -> None:
    """Print an empty line and a heading to stdout."""
    from rich.text import Text

    print()
    console().print(Text(text, style="bold"))


def _print_without_padding(table: Any) -> None:
    """Print a table without the blanks with which rich fills its lines; copied text and diffs would contain them."""
    screen = console()
    with screen.capture() as captured:
        screen.print(table)
    for line in captured.get().splitlines():
        print(line.rstrip())


def size_text(count: int) -> str:
    """Return a number of bytes as text: ``4.2 MB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def duration_text(seconds: float) -> str:
    """Return a number of seconds as text: ``40 s``, ``3 min``, ``2.5 h``."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 100 else f"{seconds:.0f} s"


def count_text(count: int, word: str) -> str:
    """Return a number and a word, in the plural where needed: ``1 step``, ``50 steps``."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
