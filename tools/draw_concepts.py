"""Draw docs/concepts.svg: the steps of a trajectory, their cache schedule, and the timestep groups.

usage: python tools/draw_concepts.py [docs/concepts.svg]

The drawing has no background and uses colours that can be read on a light and on a dark page.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from html import escape
from itertools import groupby
from pathlib import Path

SCHEDULE = "FRRFRRRFRRFR"  # the cache schedule: F computes, R reuses
GROUPS = (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2)
TIMESTEPS = tuple(range(979, -1, -89))
LEFT, WIDTH, CELL = 196, 46, 34  # pixels: the width of the labels, of a step, of a square
STEPS, COMPUTING, REUSING, GROUP, ROW = 40, 86, 162, 226, 274  # pixels: the upper edge of every line of the drawing
TEXT, BLUE, ORANGE, GREEN = "#77808b", "#2f76c7", "#c2701a", "#2e8b57"
SIZE = (LEFT + WIDTH * len(SCHEDULE) + 16, 364)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, default=Path("docs/concepts.svg"))
    parser.parse_args().output.write_text(drawing(), "utf-8")


def drawing() -> str:
    """Return the drawing as SVG."""
    width, height = SIZE
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="DejaVu Sans, Helvetica, Arial, sans-serif" font-size="13" fill="{TEXT}" role="img">'
    )
    title = "<title>The step plan of a trajectory: each step runs one variant and belongs to one timestep group</title>"
    arrow = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{TEXT}"/></marker></defs>'
    )
    parts = (*labels(), *steps(), *caches(), *groups(), *rows())
    return "\n".join((head, title, arrow, *parts, "</svg>", ""))


def labels() -> Iterator[str]:
    """Yield the labels to the left of every line, and the direction of sampling above them."""
    yield text(LEFT, 18, "noise", anchor="start")
    yield text(x(len(SCHEDULE) - 1) + CELL, 18, "image", anchor="end")
    yield line(LEFT + 46, 14, x(len(SCHEDULE) - 1) + CELL - 46, 14)
    for top, first, second in (
        (STEPS, "step", "its timestep below"),
        (COMPUTING, "computing variant", "runs all stages, stores"),
        (REUSING, "reusing variant", "skips a range, forecasts"),
        (GROUP, "timestep group", "shares activation scales"),
        (ROW, "row", "of the coefficient tables"),
    ):
        yield text(8, top + 12, first, anchor="start", weight="bold")
        yield text(8, top + 28, second, anchor="start", size=11)


def steps() -> Iterator[str]:
    """Yield the number and timestep of every step, and a square on the line of the variant that it runs."""
    for index, (letter, timestep) in enumerate(zip(SCHEDULE, TIMESTEPS, strict=True)):
        middle, computes = x(index) + CELL / 2, letter == "F"
        yield text(middle, STEPS + 12, str(index), weight="bold")
        yield text(middle, STEPS + 27, str(timestep), size=11)
        yield box(x(index), COMPUTING if computes else REUSING, CELL, BLUE if computes else ORANGE, letter)


def caches() -> Iterator[str]:
    """Yield an arrow from every computing step to each step that reuses its cached value."""
    source = 0
    for index, letter in enumerate(SCHEDULE):
        if letter == "F":
            source = index
            continue
        yield line(x(source) + CELL / 2, COMPUTING + CELL, x(index) + CELL / 2, REUSING - 3)


def groups() -> Iterator[str]:
    """Yield a bar under the steps of every timestep group."""
    for group, members in groupby(range(len(GROUPS)), key=GROUPS.__getitem__):
        indices = list(members)
        width = x(indices[-1]) + CELL - x(indices[0])
        yield box(x(indices[0]), GROUP + 2, width, GREEN, f"group {group}", height=22)


def rows() -> Iterator[str]:
    """Yield the row of every step, and the legend."""
    for index in range(len(SCHEDULE)):
        yield text(x(index) + CELL / 2, ROW + 17, str(index))
    yield text(LEFT, ROW + 56, f"{SCHEDULE}: the cache schedule, F computes and R reuses", "start")
    yield text(LEFT, ROW + 76, "arrow: a cached value, from its computing step to a reusing step", "start")


def x(step: int) -> float:
    """Return the left edge of a step, in pixels."""
    return LEFT + WIDTH * step


def text(x: float, y: float, words: str, anchor: str = "middle", size: int = 13, weight: str = "normal") -> str:
    """Return words at a place as SVG."""
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}">'
        f"{escape(words)}</text>"
    )


def box(x: float, y: float, width: float, colour: str, words: str, height: float = CELL) -> str:
    """Return a filled box with words in it."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{colour}"/>'
        f'<text x="{x + width / 2:g}" y="{y + height / 2 + 4.5:g}" text-anchor="middle" fill="#ffffff">'
        f"{escape(words)}</text>"
    )


def line(x1: float, y1: float, x2: float, y2: float) -> str:
    """Return an arrow."""
    return f'<path d="M{x1:g},{y1:g} L{x2:g},{y2:g}" stroke="{TEXT}" stroke-width="1.4" marker-end="url(#arrow)"/>'


if __name__ == "__main__":
    main()
