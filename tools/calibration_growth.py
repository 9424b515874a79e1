"""Measure how seconds and memory of quantization grow with the calibration samples, and with the sites.

    python tools/calibration_growth.py
    python tools/calibration_growth.py dit-s-4 --samples 64 128 256 --depths 3 6 12 --json

A DiT geometry with random weights is compiled up to insert-qdq: once for each number of samples, at the largest depth;
and once for each depth, which sets the number of sites, with the fewest samples. Each compilation has a process of its
own; one that belongs to both series runs once. The seconds are those of the passes after calibrate, which work on the
samples; calibrate depends on trajectories, and so does equalize. The memory is the largest of all stages, with Python
and its libraries, measured as in `bench_compile.py`. Below each table is a line fitted to it by least squares, and the
share of the variance that it explains, R^2. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context

import numpy as np
from bench_compile import CLEAR_REFS, FLOAT32_BYTES, Meter, where

from qcgraph.benchmark.machine import read_machine, usable_cores, versions
from qcgraph.bundle.manifest import PACKAGES
from qcgraph.models.geometry import GEOMETRIES
from qcgraph.recipe import Calibration, Recipe

FORMAT = 1
LAST = "insert-qdq"
BEFORE = "calibrate"  # the last pass that does not depend on the samples


@dataclass(frozen=True)
class Row:
    """One compilation.

    Attributes:
        samples: samples of the calibration set.
        depth: blocks of the model.
        sites: quantized layers of the model.
        weight_bytes: the size of the model's weights in float32.
        seconds: seconds of the passes after calibrate.
        all_seconds: seconds of all stages.
        peak_bytes: the largest resident size of all stages.
    """

    samples: int
    depth: int
    sites: int
    weight_bytes: int
    seconds: float
    all_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Line:
    """A line fitted by least squares: its slope, its value at zero, and the share of the variance that it explains."""

    slope: float
    intercept: float
    r_squared: float

    @classmethod
    def through(cls, places: Sequence[float], values: Sequence[float]) -> Line:
        """Fit a line through values at places, at least two of which differ."""
        slope, intercept = np.polyfit(places, values, 1)
        left = np.square(np.asarray(values) - (slope * np.asarray(places) + intercept)).sum()
        total = np.square(np.asarray(values) - np.mean(values)).sum()
        return cls(float(slope), float(intercept), float(1 - left / total) if total else 1.0)


@dataclass(frozen=True)
class Series:
    """Compilations that differ in one property.

    Attributes:
        by: the field of their rows with this property: ``samples`` or ``sites``.
        rows: the compilations.
        seconds: the line through their seconds.
        peak_bytes: the line through their memory.
    """

    by: str
    rows: tuple[Row, ...]
    seconds: Line
    peak_bytes: Line


def main() -> None:
    """Measure both series, and print them."""
    options = parse()
    if not os.access(CLEAR_REFS, os.W_OK):
        sys.exit(f"cannot write {CLEAR_REFS}, which measuring the memory of a stage needs")
    machine, series, measured = read_machine(), [], {}
    for by, settings in planned(options):
        new = [setting for setting in settings if setting not in measured]
        # Each setting has its own process, spawned rather than forked, so that it inherits no memory of another one.
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
            measured |= zip(new, pool.map(partial(measure, options), *zip(*new, strict=True)), strict=True)
        rows = tuple(measured[setting] for setting in settings)
        places = [getattr(row, by) for row in rows]
        lines = (Line.through(places, [getattr(row, of) for row in rows]) for of in ("seconds", "peak_bytes"))
        series.append(Series(by, rows, *lines))
        if not options.json:
            print(f"{markdown(series[-1], options)}\n", flush=True)
    document = {
        "kind": "calibration-growth",
        "format": FORMAT,
        **{key: getattr(options, key) for key in ("geometry", "bits", "steps", "guidance", "threads")},
        "machine": asdict(machine),
        "versions": versions(PACKAGES),
        "series": [asdict(item) for item in series],
    }
    print(json.dumps(document, indent=2) if options.json else where(machine))


def planned(options: argparse.Namespace) -> Iterator[tuple[str, list[tuple[int, int, int]]]]:
    """Yield the property that each series varies, and the samples, depth and trajectories of its compilations.

    All compilations of a series have the same trajectories, enough for its samples.
    """
    fewest, most = min(options.samples), max(options.samples)
    yield "samples", [(samples, max(options.depths), -(-most // options.steps)) for samples in options.samples]
    yield "sites", [(fewest, depth, -(-fewest // options.steps)) for depth in options.depths]


def measure(options: argparse.Namespace, samples: int, depth: int, trajectories: int) -> Row:
    """Compile up to insert-qdq in this process, and return the measurements."""
    import torch

    from qcgraph.compiler.compilation import compile_model

    torch.set_num_threads(options.threads)
    name = f"{options.geometry}-depth-{depth}"
    config = GEOMETRIES[name] = replace(options.config, depth=depth)  # of this process alone
    recipe = Recipe().override(steps=options.steps, guidance=options.guidance, bits=options.bits)
    recipe = recipe.model_copy(update={"calibration": Calibration(samples=samples, trajectories=trajectories)})
    meter = Meter()
    result = compile_model(f"{name}:random", recipe, None, stop_after=LAST, progress=meter)
    meter.end()
    first = [stage.name for stage in meter.stages].index(BEFORE) + 1
    return Row(
        samples=samples,
        depth=depth,
        sites=result.report.quantized_sites,
        weight_bytes=config.parameter_count * FLOAT32_BYTES,
        seconds=sum(stage.seconds for stage in meter.stages[first:]),
        all_seconds=sum(stage.seconds for stage in meter.stages),
        peak_bytes=max(stage.peak_bytes for stage in meter.stages),
    )


def markdown(series: Series, options: argparse.Namespace) -> str:
    """Return one series as a table, with its fitted lines."""
    cells = [
        f"| {row.samples} | {row.sites} | {row.seconds:.1f} | {row.all_seconds:.1f} "
        f"| {row.peak_bytes / 1e6:.0f} | {row.weight_bytes / 1e6:.0f} |"
        for row in series.rows
    ]
    lines = [
        f"### {options.geometry}, by {series.by}",
        "",
        f"{options.bits}, {options.steps} steps, guidance {options.guidance:g}, threads: {options.threads}.",
        "",
        "| samples | sites | seconds after calibrate | seconds in all | peak MB | weights MB |",
        "|---|---|---|---|---|---|",
        *cells,
        "",
        f"- {equation('seconds', series.seconds, 1, series.by)}",
        f"- {equation('peak MB', series.peak_bytes, 1e6, series.by)}",
    ]
    return "\n".join(lines)


def equation(name: str, line: Line, unit: float, by: str) -> str:
    """Return a fitted line as an equation."""
    return f"{name} = {line.intercept / unit:.4g} + {line.slope / unit:.3g} * {by}, R^2 = {line.r_squared:.4f}"


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("geometry", nargs="?", default="dit-s-2", help=f"of {', '.join(GEOMETRIES)}")
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--depths", type=int, nargs="+", default=[3, 6, 9, 12])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--bits", default="w6a6")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--json", action="store_true", help="print a JSON document instead of tables")
    options = parser.parse_args()
    if options.geometry not in GEOMETRIES:
        parser.error(f"no geometry {options.geometry!r}; there are: {', '.join(GEOMETRIES)}")
    for name in ("samples", "depths"):
        counts = getattr(options, name)
        if len(set(counts)) < 2 or min(counts) < 1:
            parser.error(f"--{name} takes two different counts or more, of at least 1")
    options.config = GEOMETRIES[options.geometry]
    return options


if __name__ == "__main__":
    main()
