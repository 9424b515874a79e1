"""The cache of a compilation in a few lines, for `compile` and `inspect`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qcgraph.cli.output import count_text

NAMED = 2  # cached values that are named; of more their number is given


def cache_fields(
    report: Mapping[str, Any] | None, edges: Sequence[Mapping[str, Any]] = ()
) -> Iterator[tuple[str, str]]:
    """What is cached, what the schedule costs, and how well what reuses does.

    Args:
        report: see `qcgraph.compiler.cache_report`.
        edges: the cached edges of the compilation's report.
    """
    if report is None:
        return
    values = report["values"]
    named = ", ".join(values.values()) if len(values) <= NAMED else count_text(len(values), "value")
    kept = f", the last {report['history']} computed" if report["history"] > 1 else ""
    yield "cache", f"{named}{kept}"
    if planned := report["planned"]:
        unit = f"milliseconds on {planned['measured_on']}" if planned["measured_on"] else "multiply-accumulates"
        yield "budget", f"{planned['spent']:.1%} of computing every step, in {unit} ({planned['strategy']} schedule)"
    if forecast := report["forecast"]:
        found = f"off by {forecast['error']:.1%} (at most {forecast['largest_error']:.1%})"
        yield "forecast", f"{forecast['kind']}, {found} where reuse is off by {forecast['reuse_error']:.1%}"
    if edges:
        worst = min(edges, key=lambda edge: edge["snr"])
        yield "noise", f"{worst['snr']:.1f} dB from the change of {worst['name']} a step down to its quantization noise"
