"""Report the results of tools/bench_gpu.py: as JSON, and as one table for each model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from qcgraph.benchmark.timing import Timing
from qcgraph.errors import QcgraphError
from qcgraph.progress import Progress

Result = TypeVar("Result")
COLUMNS = (
    "",
    "samples",
    "computing step ms (min / median / max)",
    "reusing step ms (min / median / max)",
    "whole sampling s (min / median / max)",
    "against torch fp32",
    "against torch bf16",
)


@dataclass(frozen=True)
class Row:
    """The timings of one way to run a model, with a number of samples at once.

    Attributes:
        name: the way to run the model.
        samples: the number of samples at once; under guidance a denoiser sees each sample twice.
        steps: the seconds of a step, by variant; a model has the single variant ``forward``.
        computing: the computing variant.
        sampling: the seconds of whole sampling, from latents to latents.
        graphs: the number of variants that ran as CUDA graphs, and of all variants; None if it was not recorded.
    """

    name: str
    samples: int
    steps: Mapping[str, Timing]
    computing: str
    sampling: Timing
    graphs: tuple[int, int] | None = None

    @property
    def reusing(self) -> Timing | None:
        """The seconds of the cheapest other variant, if there is one."""
        others = [timing for variant, timing in self.steps.items() if variant != self.computing]
        return min(others, key=lambda timing: timing.median, default=None)


@dataclass(frozen=True)
class Failure:
    """A part that did not run, and the reason."""

    part: str
    problem: str


@dataclass
class ModelReport:
    """The report on one model or bundle.

    Attributes:
        model: the name of the model.
        plan: scheduler, steps and guidance.
        rows: the rows of the table.
        engines: the record of the engines, and the seconds of building and loading them.
        agreement: the relative L2 errors of predictions of engines, by reference and step.
        failures: the parts that did not run.
    """

    model: str
    plan: str = ""
    rows: list[Row] = field(default_factory=list)
    engines: dict[str, Any] = field(default_factory=dict)
    agreement: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def attempt(self, part: str, progress: Progress, work: Callable[[], Result]) -> Result | None:
        """Run one part; if it fails, record the reason and return None."""
        progress.note(f"{self.model}: {part}")
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - an error of one part must not stop the other parts
            said = error.message if isinstance(error, QcgraphError) else f"{type(error).__name__}: {error}"
            where = f"{error.where}: " if isinstance(error, QcgraphError) and error.where else ""
            self.failures.append(Failure(part, where + " ".join(said.split())[:500]))
            progress.note(f"  failed: {self.failures[-1].problem}")
            return None

    def speedup(self, row: Row, reference: str) -> float | None:
        """Return how much faster a row samples than a reference with as many samples."""
        found = [other for other in self.rows if (other.name, other.samples) == (reference, row.samples)]
        return found[0].sampling.median / row.sampling.median if found else None


def document(machine: Mapping[str, object], versions: Mapping[str, str], reports: list[ModelReport]) -> dict[str, Any]:
    """Return all reports as JSON data, with times in seconds."""
    return {
        "kind": "gpu",
        "format": 1,
        "machine": dict(machine),
        "versions": dict(versions),
        "models": [asdict(report) for report in reports],
    }


def markdown(report: ModelReport) -> str:
    """Return a heading, a table, the errors of predictions, and the parts that did not run."""
    lines = [f"### {report.model}", "", report.plan, ""]
    if report.rows:
        lines += [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
        lines += [f"| {' | '.join(cells(report, row))} |" for row in report.rows]
        lines += [""]
    for reference, errors in report.agreement.items():
        found = ", ".join(f"{step} {error:.1e}" for step, error in errors.items())
        lines.append(f"- engines against {reference}, relative L2 of a prediction: {found}")
    for part, seconds in report.engines.get("seconds", {}).items():
        lines.append(f"- {part}: {seconds:.1f} s")
    for row in report.rows:
        if row.graphs is not None and row.graphs[0] < row.graphs[1]:
            lines.append(f"- {row.name}, {row.samples} samples: {row.graphs[0]} of {row.graphs[1]} as CUDA graphs")
    lines += [f"- failed: {failure.part}: {failure.problem}" for failure in report.failures]
    return "\n".join(lines).rstrip()


def cells(report: ModelReport, row: Row) -> tuple[str, ...]:
    """Return one row of the table."""
    speedups = [report.speedup(row, reference) for reference in ("torch fp32", "torch bf16")]
    return (
        row.name,
        str(row.samples),
        spread(row.steps.get(row.computing), 1e3, 3),
        spread(row.reusing, 1e3, 3),
        spread(row.sampling, 1, 3),
        *("-" if value is None else f"{value:.2f}x" for value in speedups),
    )


def spread(timing: Timing | None, scale: float, digits: int) -> str:
    """Return minimum, median and maximum as text."""
    if timing is None:
        return "-"
    return " / ".join(f"{value * scale:.{digits}f}" for value in (timing.minimum, timing.median, timing.maximum))
