"""Progress of long work on stderr: a bar with an ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TextIO, TypeVar

Item = TypeVar("Item")

PLAIN_INTERVAL = 10.0  # seconds between two plain lines about the same work


class Progress:
    """Progress that reports nothing, the default of library calls."""

    def stage(self, name: str) -> None:
        """Report that a stage of a compilation begins, such as a pass; measurements of a compilation override this."""

    def note(self, text: str) -> None:
        """Report one line about the present work."""

    def track(self, items: Sequence[Item], label: str) -> Iterator[Item]:
        """Iterate over the items, and report how many are done."""
        return iter(items)


class PlainProgress(Progress):
    """Plain lines, for logs and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr

    def note(self, text: str) -> None:
        """Report one line about the present work."""
        print(text, file=self._stream, flush=True)

    def track(self, items: Sequence[Item], label: str) -> Iterator[Item]:
        """Iterate over the items, and report the time left in a line every few seconds."""
        start = reported = time.monotonic()
        for count, item in enumerate(items):
            now = time.monotonic()
            if count and now - reported >= PLAIN_INTERVAL:
                reported = now
                left = (now - start) / count * (len(items) - count)
                self.note(f"  {label}: {count} of {len(items)}, about {left:.0f} s left")
            yield item


class TerminalProgress(PlainProgress):
    """A bar with an ETA, for people."""

    def track(self, items: Sequence[Item], label: str) -> Iterator[Item]:
        """Iterate over the items under a bar that disappears at the end."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bar(*columns, console=Console(file=self._stream), transient=True) as bar:
            yield from bar.track(items, description=label)


def progress_for(stream: TextIO) -> Progress:
    """Return the progress that suits a stream."""
    return TerminalProgress(stream) if stream.isatty() else PlainProgress(stream)
