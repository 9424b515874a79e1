"""Record results as JSON files, and make the benchmark page from them.

    python tools/benchmarks.py record digits-eval -- qcgraph eval out/digits --json
    python tools/benchmarks.py page

``record`` runs a command that prints one JSON document and stores it under docs/benchmarks/ with the command and the
date; ``page`` writes docs/benchmarks.md from all stored documents, whether qcgraph wins or loses.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import attention_products
import attribution
import forecast_noise_report
import fused_steps
import pareto_report
import quantization_ablation

from qcgraph.benchmark.machine import read_machine, versions
from qcgraph.bundle.manifest import PACKAGES
from qcgraph.evaluation.metrics import METRICS

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS = "benchmarks"  # the folder of results, in the folder of documents
PAGE = "benchmarks.md"
HEADER = """# Benchmarks

Written by `python tools/benchmarks.py page` from the JSON files in [benchmarks/](benchmarks/). Every section names the
command that measured it, the machine, the versions and the date; rows that we lose are there like all others.
"""
WORST_SITES = 5

Result = dict[str, Any]


def main() -> int:
    """Record a command, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder of the page and of the results")
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run a command and store what it prints")
    recording.add_argument("name", help="of the file")
    recording.add_argument("words", nargs="+", metavar="WORD", help="the command, after --")
    recording.add_argument("--title", help="the heading of the section; the name by default")
    recording.add_argument("--figure", help="a picture that the command draws, from the folder of documents on")
    commands.add_parser("page", help="write docs/benchmarks.md")
    options = parser.parse_args()
    if options.command == "record":
        path = options.docs / RESULTS / f"{options.name}.json"
        return record(path, options.title or options.name, options.words, options.figure)
    written = options.docs / PAGE
    written.write_text(page(sorted((options.docs / RESULTS).glob("*.json"))), "utf-8")
    print(written)
    return 0


def record(path: Path, title: str, words: Sequence[str], figure: str | None = None) -> int:
    """Run a command and store the document that it prints, unchanged."""
    machine = asdict(read_machine())
    done = subprocess.run(words, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        print(f"{shlex.join(words)} exited with {done.returncode}; nothing was stored", file=sys.stderr)
        return done.returncode
    stored = {
        "title": title,
        "command": shlex.join(words),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine,
        "versions": versions(PACKAGES),
        "result": json.loads(done.stdout),
    }
    if figure is not None:
        stored["figure"] = figure
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stored, indent=1) + "\n", "utf-8")
    print(path)
    return 0


def page(paths: Iterable[Path]) -> str:
    """Return the page of some stored results, with one section for each."""
    sections = [section(json.loads(path.read_text("utf-8"))) for path in paths]
    return "\n".join([HEADER, *sections])


def section(stored: dict[str, Any]) -> str:
    """Return one section: heading, origin, tables."""
    machine, result = stored["machine"], stored["result"]
    flags = " ".join(machine["flags"])
    place = f"{machine['cpu']}, {machine['cores']} cores, {flags}"
    own = result["models"][0] if result["kind"] == "peers" else result
    packages = ", ".join(f"{name} {version}" for name, version in own.get("versions", stored["versions"]).items())
    lines = [
        f"## {stored['title']}",
        f"```sh\n{stored['command']}\n```",
        f"{stored['date']}; {place}; load average before: {machine['load']}; {packages}.",
        KINDS[result["kind"]](result),
    ]
    if "figure" in stored:
        lines.append(f"![{stored['title']}]({stored['figure']})")
    return "\n\n".join(lines) + "\n"


def evaluation(result: Result) -> str:
    """Return the quality of a bundle."""
    names = [name for name in METRICS if any(name in row.get("metrics", {}) for row in result["rows"])]
    rows = []
    for row in result["rows"]:
        metrics = row.get("metrics", {})
        values = [spread(metrics[name], "value", "low", "high") if name in metrics else "-" for name in names]
        converged = f"{row['converged_psnr']:.1f}" if "converged_psnr" in row else "-"
        if "converged_spread" in row:
            median, worst = row["converged_spread"]
            converged += f" ({median:.1f}, {worst:.1f})"
        cost = f"{row['cost']:.1f}" if "cost" in row else row["absent"]
        rows.append([row["title"], cost, *values, converged])
    titles = [f"{METRICS[name].title} {METRICS[name].unit}".strip() for name in names]
    samples = f"{result['samples']} samples of {len(result['seeds'])} seeds each"
    lines = [
        f"{result['model']}, {result['plan']}; {samples}. In brackets: where another run with other seeds is expected.",
        "",
        table(["setting", "steps of work", *titles, "PSNR to converged (median, worst tenth)"], rows),
    ]
    interaction = result["interaction_db"]
    if interaction:
        lines += ["", f"Interaction of quantization and cache, dB: {attribution.change(interaction, 'absent, ')}."]
    if result["compensation_db"]:
        lines[-1] += f" Compensation changes the error by {attribution.change(result['compensation_db'], '')} dB."
    if result["sites"]:
        worst = ", ".join(f"`{site['site']}` {site['effect']:.3%}" for site in result["sites"][:WORST_SITES])
        lines += ["", f"Layers whose quantization moves the latent of a step most: {worst}."]
    return "\n".join(lines)


def attributions(result: Result) -> str:
    """Return the tables of several bits and intervals."""
    tables = [attribution.markdown(entry["model"], entry["cells"]) for entry in result["models"]]
    setting = (
        f"PSNR dB against full precision from the same noise; {result['samples']} samples of {result['seeds']} seeds."
    )
    return "\n\n".join([setting, *tables])


def benchmark(result: Result) -> str:
    """Return the latency of bundles against baselines."""
    batch = result["samples"] * (1 if result["guidance"] == 1 else 2)
    rows = [bench_row(row) for row in result["rows"]]
    columns = ["", "forward ms", "speed-up", "error", "whole sampling s", "speed-up", "MACs", "cache", "peak memory"]
    setting = (
        f"{result['samples']} at once (batch {batch}), {result['threads']} threads, {result['rounds']} rounds in turn"
    )
    how = "Least / median / largest; speed-ups are of medians, against torch eager. Errors are of a noise prediction."
    lines = [
        f"{result['model']}, {result['plan']}; {setting}. {how}",
        "",
        table(columns, rows),
    ]
    problems = [f"- {row['name']} {row['status']}: {row['problem']}" for row in result["rows"] if row["problem"]]
    steps = [step_line(row) for row in result["rows"] if len(row["variants"]) > 1]
    if problems or steps:
        lines += ["", *steps, *problems]
    if result["throughput"]:
        lines += ["", throughput(result["throughput"])]
    return "\n".join(lines)


def step_line(row: Result) -> str:
    """Return the medians of a bundle's variants."""
    steps = ", ".join(f"{name} {1000 * timing['median']:.3g} ms" for name, timing in row["variants"].items())
    return f"- steps of {row['name']} (medians): {steps}"


def bench_row(row: Result) -> list[str]:
    """Return the row of one candidate."""
    forward, sampling, speedup = row["forward"], row["sampling"], row["speedup"]
    return [
        row["name"],
        spread({key: 1000 * value for key, value in forward.items()}, "min", "median", "max") if forward else "-",
        f"{row['forward_speedup']:.2f}x" if row["forward_speedup"] else "-",
        "-" if row["error"] is None else f"{row['error']:.1e}",
        spread(sampling, "min", "median", "max") if sampling else "-",
        f"{speedup['value']:.2f}x" if speedup else "-",
        "-" if row["mac_ratio"] is None else f"{row['mac_ratio']:.1%}",
        f"{row['cache_bytes'] / 1e6:.2f} MB" if row["cache_bytes"] else "-",
        f"{row['peak_memory_bytes'] / 1e6:.0f} MB" if row["peak_memory_bytes"] else "-",
    ]


def throughput(items: list[Result]) -> str:
    """Return the samples per second by batch."""
    batches = sorted({item["batch"] for item in items})
    found = {(item["name"], item["batch"]): item["samples_per_second"] for item in items}
    names = dict.fromkeys(item["name"] for item in items)
    rows = [
        [name, *(f"{found[name, batch]:.3g}" if (name, batch) in found else "-" for batch in batches)] for name in names
    ]
    return table(["samples a second, at once:", *map(str, batches)], rows)


def peers(result: Result) -> str:
    """Return the tables of all baselines, model by model."""
    return "\n\n".join(f"### {entry['model']}\n\n{benchmark(entry)}" for entry in result["models"])


def compilation(result: Result) -> str:
    """Return the cost of compilations."""
    rows = []
    for row in result["rows"]:
        slowest = max(row["stages"], key=lambda stage: stage["seconds"])
        largest = max(row["stages"], key=lambda stage: stage["peak_bytes"])
        rows.append(
            [
                row["model"],
                f"{row['parameters'] / 1e6:.0f} M",
                f"{row['seconds']:.0f}",
                f"{slowest['name']} ({slowest['seconds'] / row['seconds']:.0%})",
                f"{row['peak_bytes'] / 1e6:.0f} MB",
                f"{row['ratio']:.2f}x",
                largest["name"],
            ]
        )
    first = result["rows"][0]
    columns = ["model", "parameters", "seconds", "of which most", "peak memory", "of the weights", "at"]
    return f"{first['steps']} steps, {first['trajectories']} trajectories.\n\n{table(columns, rows)}"


def growth(result: Result) -> str:
    """Return how the cost of calibration grows: its rows, and the fitted lines."""
    tables = []
    for series in result["series"]:
        rows = [
            [
                str(row[series["by"]]),
                f"{row['seconds']:.1f}",
                f"{row['peak_bytes'] / 1e6:.0f} MB",
                f"{row['peak_bytes'] / row['weight_bytes']:.2f}x",
            ]
            for row in series["rows"]
        ]
        fits = [
            f"{name} {series[of]['r_squared']:.3f}" for name, of in (("seconds", "seconds"), ("memory", "peak_bytes"))
        ]
        columns = [series["by"], "seconds", "peak memory", "of the weights"]
        tables.append(f"{table(columns, rows)}\n\nR^2 of a line: {', '.join(fits)}.")
    return "\n\n".join([f"{result['geometry']}, {result['bits']}, {result['steps']} steps.", *tables])


KINDS: dict[str, Callable[[Result], str]] = {
    "attention-products": attention_products.markdown,
    "attribution": attributions,
    "bench": benchmark,
    "calibration-growth": growth,
    "compile": compilation,
    "eval": evaluation,
    "forecast-noise": forecast_noise_report.markdown,
    "fused-steps": fused_steps.markdown,
    "pareto": pareto_report.markdown,
    "quantization-ablation": quantization_ablation.markdown,
    "peers": peers,
}


def spread(values: dict[str, float], *keys: str) -> str:
    """Return three figures in one cell: ``value (low .. high)`` or ``least / median / largest``."""
    found = [f"{values[key]:.4g}" for key in keys]
    return f"{found[0]} ({found[1]} .. {found[2]})" if keys[0] == "value" else " / ".join(found)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


if __name__ == "__main__":
    sys.exit(main())
