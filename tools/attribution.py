"""Measure the cost of quantization, caching and both, for several bits and intervals, to show whether they interact.

    python tools/attribution.py digits tools/models/digits-b --bits w8a8 w6a6 w4a8 --intervals 2 3 5

Every cell is compiled and judged as `qcgraph eval` does, against full precision from the same noise. Combinations that
`qcgraph compile` refuses as unsafe are compiled all the same, and marked.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qcgraph.benchmark.machine import read_machine, versions
from qcgraph.bundle import Bundle
from qcgraph.bundle.manifest import PACKAGES
from qcgraph.compiler.compilation import compile_model
from qcgraph.errors import QcgraphError
from qcgraph.evaluation.bootstrap import BootstrapEstimate
from qcgraph.evaluation.evaluate import Evaluation, Options, evaluate
from qcgraph.evaluation.settings import Subject
from qcgraph.progress import Progress, progress_for
from qcgraph.recipe import Recipe

SETTINGS = ("quantization", "cache", "both", "compiled", "fewer_steps", "solver")
COLUMNS = (
    "bits",
    "interval",
    "quantization only",
    "cache only",
    "both",
    "both + VC",
    "fewer steps",
    "DPM-Solver++",
    "interaction dB",
    "compensation dB",
    "edge SNR dB",
)


def main() -> int:
    """Compile and judge every cell, and print the tables."""
    options = parse()
    progress = progress_for(sys.stderr)
    models = []
    try:
        for model in options.models:
            cells = [
                measure(model, bits, interval, options, progress)
                for bits in options.bits
                for interval in options.intervals
            ]
            models.append({"model": model, "cells": cells})
            if not options.json:
                print(f"{markdown(model, cells)}\n", flush=True)
    except QcgraphError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.json:
        document = {
            "kind": "attribution",
            "format": 1,
            "steps": options.steps,
            "guidance": options.guidance,
            "samples": options.samples,
            "seeds": options.seeds,
            "machine": asdict(read_machine()),
            "versions": versions(PACKAGES),
            "models": models,
        }
        print(json.dumps(document, indent=2))
    return 0


def measure(model: str, bits: str, interval: int, options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Compile and judge one cell."""
    progress.note(f"{model}: {bits}, interval {interval}")
    recipe = Recipe().override(
        steps=options.steps,
        guidance=options.guidance,
        bits=bits,
        groups=options.groups,
        cache=f"interval={interval}",
        compensate="vc",
        allow_unsafe=True,
    )
    asked = Options(options.samples, options.seeds, options.seed, ("psnr",), sites=False)
    with tempfile.TemporaryDirectory(prefix="qcgraph-") as folder:
        result = compile_model(model, recipe, Path(folder) / "bundle")
        assert result.bundle is not None
        evaluation = evaluate(Subject.of_bundle(Bundle.open(result.bundle.path)), asked, Progress())
    (edge,) = result.report.cached_edges
    return {
        "bits": bits,
        "interval": interval,
        "psnr": {key: psnr(evaluation, key) for key in SETTINGS},
        "interaction_db": asdict(evaluation.interaction) if evaluation.interaction else None,
        "compensation_db": asdict(evaluation.compensation) if evaluation.compensation else None,
        "edge": edge.model_dump(),
        "faults": [asdict(fault) for fault in evaluation.faults],
    }


def psnr(evaluation: Evaluation, key: str) -> dict[str, float] | None:
    """Return the PSNR of a setting against full precision."""
    metrics = evaluation.row(key).metrics
    return asdict(metrics["psnr"]) if metrics else None


def markdown(model: str, cells: list[dict[str, Any]]) -> str:
    """Return the table of one model."""
    rows = [f"### {model}", "", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    return "\n".join([*rows, *(f"| {' | '.join(texts(cell))} |" for cell in cells)])


def texts(cell: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    edge = f"{cell['edge']['snr']:.1f}" + ("" if cell["edge"]["snr"] >= 0 else " (unsafe)")
    values = ["-" if cell["psnr"][key] is None else f"{cell['psnr'][key]['value']:.1f}" for key in SETTINGS]
    return [
        cell["bits"],
        str(cell["interval"]),
        *values,
        change(cell["interaction_db"], "absent: "),
        change(cell["compensation_db"], ""),
        edge,
    ]


def change(found: dict[str, float] | None, when_zero: str) -> str:
    """Return a change in dB with its interval, and a word in front if the interval includes zero."""
    if found is None:
        return "-"
    estimate = BootstrapEstimate(**found)
    word = "" if estimate.excludes_zero else when_zero
    return f"{word}{estimate.value:+.2f} ({estimate.low:+.2f} .. {estimate.high:+.2f})"


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["digits"], metavar="MODEL")
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w6a6", "w4a8"])
    parser.add_argument("--intervals", type=int, nargs="+", default=[2, 3, 5])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
