"""Show the cache of a compilation in a few lines, for `compile` and `inspect`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qcgraph.cli.output import count_text

if TYPE_CHECKING:
    from qcgraph.bundle.report import CacheReport, EdgeReport

NAMED = 2  # up to this many cached values are shown by name; above it, only their number


def cache_fields(report: CacheReport | None, edges: Sequence[EdgeReport] = ()) -> Iterator[tuple[str, str]]:
    """Yield the cached values, the cost of the schedule, and the errors of reusing steps, each with its name.

    Args:
        report: the cache of a compilation.
        edges: the cached edges of its report.
    """
    if report is None:
        return
    values = report.values
    named = ", ".join(values.values()) if len(values) <= NAMED else count_text(len(values), "value")
    kept = f", the last {report.history} computed" if report.history > 1 else ""
    yield "cache", f"{named}{kept}"
    if planned := report.planned:
        unit = f"milliseconds on {planned.measured_on}" if planned.measured_on else "multiply-accumulates"
        yield "budget", f"{planned.spent:.1%} of computing every step, in {unit} ({planned.strategy} schedule)"
    if forecast := report.forecast:
        found = f"off by {forecast.error:.1%} (at most {forecast.largest_error:.1%})"
        yield "forecast", f"{forecast.kind}, {found} where reuse is off by {forecast.reuse_error:.1%}"
    noisy = [(edge.snr, edge.name) for edge in edges if edge.snr is not None]
    if noisy:
        snr, name = min(noisy)
        yield "noise", f"{snr:.1f} dB from the change of {name} a step down to its quantization noise"
