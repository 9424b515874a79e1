"""Compare compiled bundles with all baselines that run a DiT on a CPU, and print one table for each model.

    pip install '.[peers]'    # OpenVINO and NNCF; without them their rows say that they are missing
    python tools/bench_peers.py dit-s-2:random dit-b-2:random

Each model is compiled twice with the options of the README (w8a8, 8 timestep groups, variance compensation): without a
cache, for comparison with other quantizers forward by forward, and with interval=3 in addition. Calibration takes the
fewest trajectories, two: random weights show nothing about quality, and latency does not depend on scales. Then
`qcgraph bench` measures both bundles beside all its baselines.

torch.compile needs a C++ compiler (g++). The tool installs nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from qcgraph.benchmark.baselines import parse_baselines
from qcgraph.benchmark.bench import BenchOptions, bench
from qcgraph.benchmark.report import BenchmarkResult, BenchReport
from qcgraph.benchmark.timing import Timing
from qcgraph.compiler.compilation import compile_model
from qcgraph.errors import QcgraphError
from qcgraph.progress import progress_for
from qcgraph.recipe import Recipe

TRAJECTORIES = 2
VARIATIONS = {"qcgraph, no cache": "off", "qcgraph, interval=3": "interval=3"}
COLUMNS = (
    "",
    "forward ms (min / median / max)",
    "speed-up",
    "error",
    "whole sampling s (min / median / max)",
    "speed-up (of rounds)",
    "MACs",
    "peak memory MB",
    "paired / alone",
)


def main() -> int:
    """Compile all models, measure them, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["dit-s-2:random", "dit-b-2:random"], metavar="MODEL")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--baselines", default="all")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="by default all cores")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    try:
        asked = BenchOptions(parse_baselines(options.baselines), options.samples, (), options.rounds, options.threads)
        reports = [compare(model, options.steps, options.guidance, asked) for model in options.models]
    except QcgraphError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps({"kind": "peers", "format": 1, "models": list(map(document, reports))}, indent=2))
    else:
        print("\n\n".join(markdown(report) for report in reports))
    return 0


def compare(model: str, steps: int, guidance: float, options: BenchOptions) -> BenchReport:
    """Compile a model with and without a cache, and measure both bundles beside the baselines."""
    progress = progress_for(sys.stderr)
    base = Recipe().override(
        steps=steps,
        guidance=guidance,
        bits="w8a8",
        groups=8,
        compensate="vc",
        target="onnxruntime-cpu",
        hoist_adaln=True,
    )
    few = base.calibration.model_copy(update={"trajectories": TRAJECTORIES})
    bundles = {}
    with tempfile.TemporaryDirectory(prefix="qcgraph-") as folder:
        for index, (name, cache) in enumerate(VARIATIONS.items()):
            progress.note(f"{model}: compiling {name}")
            recipe = base.override(cache=cache).model_copy(update={"calibration": few})
            bundle = compile_model(model, recipe, Path(folder) / str(index), progress=progress).bundle
            assert bundle is not None
            bundles[name] = bundle
        return bench(bundles, options, model, progress)


def document(report: BenchReport) -> dict[str, object]:
    """Return a report as JSON data, without the paths of bundles, which were temporary."""
    rows = [row.to_json() | {"bundle": None} for row in report.rows]
    return report.to_json() | {"bundle": None, "rows": rows}


def markdown(report: BenchReport) -> str:
    """Return a heading, the setting, a table, and the baselines that did not run."""
    machine = report.machine
    ran = [row for row in report.rows if row.forward is not None]
    setting = (
        f"{report.plan}; {report.samples} at once; {report.threads} threads of {machine.cpu} "
        f"({' '.join(machine.flags)}); {report.rounds} rounds, everyone in turn in each. "
    )
    notes = (
        "Speed-ups are against torch: medians, same steps. The error is of one noise prediction against torch, "
        f"relative L2. qcgraph was calibrated on {TRAJECTORIES} trajectories; it computes adaLN modulation ahead of "
        "the steps, which counts in whole sampling and not in a forward."
    )
    lines = [
        f"### {report.model}",
        "",
        setting + ", ".join(f"{name} {version}" for name, version in report.versions.items()) + ".",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *(f"| {' | '.join(cells(row))} |" for row in ran),
        "",
        notes,
    ]
    lines += [f"- {row.name} {row.status}: {row.problem}" for row in report.rows if row.problem]
    if machine.is_busy:
        lines.append(f"- the machine was busy (load average {machine.load}): do not trust these figures")
    return "\n".join(lines)


def cells(row: BenchmarkResult) -> tuple[str, ...]:
    """Return one row of the table."""
    peak = row.alone.peak_bytes if row.alone else None
    return (
        row.name if row.bundle else f"{row.name} ({row.description})",
        spread(row.forward, 1e3, 1),
        "-" if row.forward_speedup is None else f"{row.forward_speedup:.2f}x",
        "-" if row.error is None else f"{row.error:.1e}",
        spread(row.sampling, 1, 3),
        "-" if row.speedup is None else f"{row.speedup.value:.2f}x ({row.speedup.low:.2f} .. {row.speedup.high:.2f})",
        "-" if row.mac_ratio is None else f"{row.mac_ratio:.1%}",
        "-" if peak is None else f"{peak / 1e6:.0f}",
        "-" if row.paired_to_alone is None else f"{row.paired_to_alone:.2f}",
    )


def spread(timing: Timing | None, scale: float, digits: int) -> str:
    """Return minimum, median and maximum as text."""
    if timing is None:
        return "-"
    values = (timing.minimum, timing.median, timing.maximum)
    return " / ".join(f"{value * scale:.{digits}f}" for value in values)


if __name__ == "__main__":
    sys.exit(main())
