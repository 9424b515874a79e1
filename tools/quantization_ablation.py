"""Measure the effect of each part of quantization: parts added one after another, and each left out of the whole.

    python tools/quantization_ablation.py digits tools/models/digits-b --bits w8a8 w6a6 w4a8 --json

Every cell is compiled for ONNX Runtime and judged against full precision from the same noise, as `qcgraph eval` does:
PSNR, which single images can dominate, the PSNR of the median image, and FID-small. The parts are those of `--ablate`;
`--rows leave-out` leaves each part out of the whole, `--rows attention` also quantizes the products of attention.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pareto import Model
from pareto_judging import Judging

from qcgraph.benchmark.machine import read_machine, versions
from qcgraph.bundle.manifest import PACKAGES
from qcgraph.errors import QcgraphError
from qcgraph.progress import Progress, progress_for
from qcgraph.recipe import Recipe

LADDER = {  # the part that each row adds, in the order of the papers, and then the parts of qcgraph
    "tgq": "+ TGQ",
    "mrq": "+ MRQ",
    "ho": "+ HO",
    "tap": "+ TAP",
    "equalize": "+ equalized channels",
    "feedback": "+ rounding with feedback",
    "dec": "+ corrected results",
}
COLUMNS = ("bits", "cache", "setting", "PSNR dB", "median image dB", "FID-small", "seconds")


def main() -> int:
    """Compile and judge every cell, and print the table."""
    options = parse()
    progress = progress_for(sys.stderr)
    cells: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory(prefix="qcgraph-") as folder:
            for name in options.models:
                for cell in measure(Model(name, options, options.bundles or Path(folder), progress), options, progress):
                    cells.append(cell)
                    progress.note(" | ".join(texts(cell)))
    except QcgraphError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    document = {
        "kind": "quantization-ablation",
        "format": 1,
        **{key: getattr(options, key) for key in ("steps", "guidance", "samples", "seeds")},
        "machine": asdict(read_machine()),
        "versions": versions(PACKAGES),
        "cells": cells,
    }
    print(json.dumps(document, indent=2) if options.json else markdown(document))
    return 0


ROWS = ("ladder", "leave-out", "attention")


def settings(whole: Recipe, rows: Sequence[str]) -> Iterator[tuple[str, Recipe]]:
    """Yield recipes with their titles.

    The ladder starts with no part and adds one at a time; leave-out is the whole without each of its parts; attention
    is the whole with quantized products of attention, and probabilities in one region or in two.
    """
    parts = list(LADDER)
    if "ladder" in rows:
        yield "none", whole.ablated(parts)
        for count, title in enumerate(LADDER.values(), 1):
            yield title, whole.ablated(parts[count:])
    if "leave-out" in rows:
        for part in parts:
            yield f"all but {LADDER[part].removeprefix('+ ')}", whole.ablated([part])
    if "attention" in rows:
        quantization = whole.quantization.model_copy(update={"attention": True})
        attended = whole.model_copy(update={"quantization": quantization})
        yield "all", whole
        yield "all, and attention in one region", attended.ablated(["mrq"])
        yield "all, and attention", attended


def measure(model: Model, options: argparse.Namespace, progress: Progress) -> Iterator[dict[str, Any]]:
    """Yield the cells of a model."""
    judging = Judging(model.whole, options.samples, options.seeds)
    for bits in options.bits:
        for cache in options.caches:
            whole = model.base(bits).override(cache=cache)
            for title, recipe in settings(whole, options.rows):
                bundle = model.bundle(recipe)
                cell = judging.judge({title: model.subject(recipe)}, Progress())[title]
                yield {
                    "model": model.name,
                    "bits": bits,
                    "cache": cache,
                    "setting": title,
                    "seconds": sum(row.seconds for row in bundle.report.passes) if bundle.report else None,
                    **{name: cell[name] for name in ("psnr", "median_psnr", "fid_small") if name in cell},
                }


def markdown(document: dict[str, Any]) -> str:
    """Return a table for each model."""
    lines = []
    for name in dict.fromkeys(cell["model"] for cell in document["cells"]):
        lines += [f"### {name}", "", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
        lines += [f"| {' | '.join(texts(cell))} |" for cell in document["cells"] if cell["model"] == name]
        lines.append("")
    return "\n".join(lines).rstrip()


def texts(cell: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    psnr = cell["psnr"]
    fid = f"{cell['fid_small']['value']:.2f}" if "fid_small" in cell else "-"
    return [
        cell["bits"],
        cell["cache"],
        cell["setting"],
        f"{psnr['value']:.1f} ({psnr['low']:.1f} .. {psnr['high']:.1f})",
        f"{cell['median_psnr']:.1f}",
        fid,
        f"{cell['seconds']:.0f}",
    ]


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["digits"], metavar="MODEL")
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w6a6", "w4a8"])
    parser.add_argument("--caches", nargs="+", default=["off", "interval=3"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["ladder"], help="default %(default)s")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--scheduler", default="ddim")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bundles", type=Path, metavar="FOLDER", help="keep what was compiled, take what is there")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
