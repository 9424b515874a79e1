"""qcgraph bench: latency of a bundle against baselines."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcgraph.cli.output import (
    MOST_SAMPLES,
    MOST_THREADS,
    JsonOption,
    count_text,
    print_fields,
    print_heading,
    print_json,
    print_table,
    size_text,
)
from qcgraph.errors import UsageError, shown

if TYPE_CHECKING:
    from qcgraph.benchmark.report import BenchmarkResult, BenchReport, Ratio
    from qcgraph.benchmark.timing import Timing

NOTHING = "-"


def bench_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder that qcgraph compile wrote.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Where the model is that it was compiled from; by default where it was."),
    ] = None,
    baselines: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="What to compare with: torch, torch-compile, onnxruntime-fp32, onnxruntime-dynamic, "
            "onnxruntime-static, openvino-fp32, nncf-int8; or all.",
        ),
    ] = "torch,onnxruntime-fp32",
    samples: Annotated[
        int, typer.Option(metavar="N", max=MOST_SAMPLES, help="How many samples are drawn at once.")
    ] = 1,
    batches: Annotated[
        str, typer.Option(metavar="LIST", help="Samples at once to give the throughput at; '' for none.")
    ] = "1,4,16",
    rounds: Annotated[int, typer.Option(metavar="N", max=MOST_SAMPLES, help="How often everyone is timed.")] = 5,
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", max=MOST_THREADS, help="How many threads each may use; by default all cores."),
    ] = None,
    forward_only: Annotated[
        bool, typer.Option("--forward-only", help="Time a few steps instead of whole sampling.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Measure latency against baselines.

    Every candidate draws the same samples with the same number of steps and threads: warmed up, then in turn, round
    after round. Each also runs alone in a process of its own, for its memory and as a check of the pairing. The steps
    of a fitted solver stand for a longer run; the speed-up over this run is shown as well.
    """
    from qcgraph.benchmark.baselines import parse_baselines
    from qcgraph.benchmark.bench import OURS, BenchOptions, bench

    options = BenchOptions(
        baselines=parse_baselines(baselines),
        samples=samples,
        batches=parse_batches(batches),
        rounds=rounds,
        threads=threads,
        forward_only=forward_only,
    )
    from qcgraph.bundle import Bundle
    from qcgraph.bundle.watch import reading
    from qcgraph.progress import progress_for

    opened = Bundle.open(bundle)
    with reading(opened, done="measured"):
        report = bench({OURS: opened}, options, model, progress_for(sys.stderr))
    if json:
        print_json(report.to_json())
    else:
        print_report(report)


def parse_batches(text: str) -> tuple[int, ...]:
    """Return the numbers of a list such as ``1,4,16``.

    Raises:
        UsageError: an element is not a whole number, or is too large.
    """
    try:
        batches = tuple(int(part) for part in text.split(",") if part.strip())
        if max(batches, default=1) <= MOST_SAMPLES:
            return batches
        raise UsageError(f"{shown(text)} is too many", where="--batches", hint=f"{MOST_SAMPLES} at once at most")
    except ValueError:
        raise UsageError(
            f"{shown(text)} is not a list of whole numbers", where="--batches", hint="for example --batches 1,4,16"
        ) from None


def print_report(report: BenchReport) -> None:
    """Print the report as tables."""
    print_fields(_setting(report))
    timed = [row for row in report.rows if row.forward is not None]
    print_heading("latency")
    _print_latency(report, timed)
    for row in timed:
        if row.variants and len(row.variants) > 1:
            _print_variants(row)
    print_heading("cost")
    _print_cost(report, timed)
    if report.throughput:
        print_heading(f"throughput, samples a second{_each(report)}")
        _print_throughput(report)
    _print_problems(report)


def _setting(report: BenchReport) -> Iterable[tuple[str, object]]:
    machine = report.machine
    halves = "" if report.guidance == 1.0 else f" (the denoiser sees {2 * report.samples} latents: guidance)"
    flags = f", {' '.join(machine.flags)}" if machine.flags else ""
    yield "bundle", f"{report.bundle}, target {report.target}"
    yield "model", report.model
    yield "sampling", f"{report.plan}; {count_text(report.samples, 'sample')} at once{halves}"
    yield "threads", f"{report.threads} of {count_text(machine.cores, 'core')}"
    yield "machine", f"{machine.cpu}{flags}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())
    yield "rounds", f"{report.rounds}, everyone in turn in each"


def _print_latency(report: BenchReport, timed: list[BenchmarkResult]) -> None:
    columns = ["", "forward ms (min / median / max)", "speed-up", "error"]
    if not report.forward_only:
        columns[1:1] = [f"{count_text(report.steps, 'step')} s (min / median / max)", *_speedup_columns(report)]
    rows = []
    for row in timed:
        cells = [row.name if row.status == "ok" else f"{row.name} ({row.status})"]
        if not report.forward_only:
            cells += [str(row.sampling), *_speedups(report, row)]
        cells += [_milliseconds(row.forward), _times(row.forward_speedup), _error(row.error)]
        rows.append(cells)
    print_table(columns, rows, right=columns[1:])
    print("\nspeed-up: against torch, medians, same steps; a forward is a step that computes")
    if _is_fitted(report) and not report.forward_only:
        steps, run = report.steps, report.run_steps
        print(f"over the run: against torch with {run} steps, which takes {run}/{steps} of its time with {steps}")
    print("error: of one noise prediction against torch, relative L2")


def _print_variants(row: BenchmarkResult) -> None:
    print_heading(f"steps of {row.name}")
    assert row.variants is not None
    print_table(
        ("variant", "ms (min / median / max)", "of a forward"),
        [
            (name, _milliseconds(timing), f"{timing.median / row.forward.median:.1%}" if row.forward else NOTHING)
            for name, timing in row.variants.items()
        ],
        right=("ms (min / median / max)", "of a forward"),
    )


def _print_cost(report: BenchReport, timed: list[BenchmarkResult]) -> None:
    columns = ("", "multiply-accumulates", "cache", "peak memory", "before loading", "paired / alone")
    rows = [
        (
            row.name,
            NOTHING if row.mac_ratio is None else f"{row.mac_ratio:.1%}",
            NOTHING if not row.cache_bytes else size_text(row.cache_bytes),
            NOTHING if row.alone is None or row.alone.peak_bytes is None else size_text(row.alone.peak_bytes),
            NOTHING if row.alone is None or row.alone.base_bytes is None else size_text(row.alone.base_bytes),
            NOTHING if row.paired_to_alone is None else f"{row.paired_to_alone:.2f}",
        )
        for row in timed
    ]
    print_table(columns, rows, right=columns[1:])
    if _is_fitted(report):
        print(f"\nmultiply-accumulates: of those of the model over the run of {report.run_steps} steps", end="")
    print("\nmemory: resident, of a process that loads and samples with this one alone")
    print("paired / alone: median time beside the others over the median in that process; 1 when pairing is free")


def _print_throughput(report: BenchReport) -> None:
    found = {(item.name, item.batch): item.samples_per_second for item in report.throughput}
    batches = list(dict.fromkeys(item.batch for item in report.throughput))
    names = list(dict.fromkeys(item.name for item in report.throughput))
    columns = [f"{batch} at once" for batch in batches]
    rows = [
        [name, *(f"{found[name, batch]:.3g}" if (name, batch) in found else NOTHING for batch in batches)]
        for name in names
    ]
    print_table(["", *columns], rows, right=columns)
    print("\nfrom the median times of the steps of a short section of the trajectory")


def _print_problems(report: BenchReport) -> None:
    problems = [(f"{row.name} {row.status}", row.problem) for row in report.rows if row.problem]
    if report.threads > report.machine.cores:
        problems.append(("too many threads", f"{report.threads} on {count_text(report.machine.cores, 'core')}"))
    if report.machine.is_busy:
        load = f"load average {report.machine.load} before measuring; do not trust figures of a busy machine"
        problems.append(("the machine was busy", load))
    if problems:
        print_heading("problems")
        print_fields(problems)


def _milliseconds(timing: Timing | None) -> str:
    if timing is None:
        return NOTHING
    return " / ".join(f"{value * 1e3:.3g}" for value in (timing.minimum, timing.median, timing.maximum))


def _is_fitted(report: BenchReport) -> bool:
    """Return whether the steps that were timed stand for a longer run."""
    return report.steps < report.run_steps


def _each(report: BenchReport) -> str:
    """Return how many steps of a fitted solver every candidate takes, for a heading."""
    return f", with {count_text(report.steps, 'step')} each" if _is_fitted(report) else ""


def _speedup_columns(report: BenchReport) -> tuple[str, ...]:
    """Return the headings of speed-ups: over the same steps, and over the run that they stand for."""
    if not _is_fitted(report):
        return ("speed-up (of rounds)",)
    return ("speed-up, same steps (of rounds)", f"over the run of {count_text(report.run_steps, 'step')}")


def _speedups(report: BenchReport, row: BenchmarkResult) -> tuple[str, ...]:
    ratios = (row.speedup, row.run_speedup) if _is_fitted(report) else (row.speedup,)
    return tuple(_ratio(ratio) for ratio in ratios)


def _ratio(ratio: Ratio | None) -> str:
    return NOTHING if ratio is None else f"{ratio.value:.2f}x ({ratio.low:.2f} .. {ratio.high:.2f})"


def _times(ratio: float | None) -> str:
    return NOTHING if ratio is None else f"{ratio:.2f}x"


def _error(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1e}"
