"""Measure how well selected calibration samples represent all recorded ones: every selection, over seeds and counts.

    python tools/selection_coverage.py digits --counts 50 100 200 400 800 -o figure.png

The pool consists of the latents that the denoiser receives at every step of calibration trajectories. The distance of a
latent is the cosine distance to the nearest selected one of the same step or of the next steps, at most 1; see
`qcgraph.passes.calibration._selection.Coverage`. With --scaling, the tool measures seconds and memory of a selection
from growing pools instead.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tracemalloc
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from selection_coverage_report import markdown, save_figure, scaling_markdown

from qcgraph.capture.capture import capture
from qcgraph.errors import QcgraphError
from qcgraph.ir.execute import TorchRunner
from qcgraph.models import load_model
from qcgraph.passes.calibration._selection import METHODS, Method, Pool, coverage, select
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.progress import Progress, progress_for
from qcgraph.sampling.calibration import calibration_noise, sample_calibration
from qcgraph.sampling.loop import TakenStep

BATCH = 64
DOUBLINGS = 5  # doublings of the pool, under --scaling
MEGABYTE = 1e6


def main() -> int:
    """Measure all selections, print the tables, and draw the figure."""
    options = parse()
    progress = progress_for(sys.stderr)
    settings = {key: getattr(options, key) for key in ("model", "scheduler", "steps", "guidance", "trajectories")}
    try:
        if options.scaling:
            pool = record(options, options.trajectories << DOUBLINGS, progress)
            document = {"kind": "selection-scaling", "format": 1, **settings, "rows": scaling(pool, options)}
        else:
            pool = record(options, options.trajectories, progress)
            cells = [measure(pool, count, method, options) for count in options.counts for method in METHODS]
            document = {"kind": "selection-coverage", "format": 1, **settings, "seeds": options.seeds, "cells": cells}
    except QcgraphError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.output:
        save_figure(document, options.output)
    if options.json:
        print(json.dumps(document, indent=1))
    else:
        print(scaling_markdown(document) if options.scaling else markdown(document))
    return 0


def record(options: argparse.Namespace, trajectories: int, progress: Progress) -> Pool:
    """Record the denoiser's input at every step of a number of calibration trajectories, in full precision."""
    model = load_model(options.model)
    program = capture(model.module, model.spec, model.input_names)
    schedule = model.spec.noise_schedule
    plan = make_step_plan(options.scheduler, options.steps, options.guidance, schedule, program.constants_digest)
    parts = [(0, calibration_noise(trajectories, options.seed, model.spec).initial())]

    def keep(taken: TakenStep) -> None:
        if taken.index + 1 < len(plan):  # the final latents are no input of the denoiser
            parts.append((taken.index + 1, taken.after))

    runner = TorchRunner(program.with_facts(plan))
    seed = options.seed
    sample_calibration(runner, plan, model.spec, trajectories, seed, batch=BATCH, observe=keep, progress=progress)
    steps = np.concatenate([np.full(len(latents), index) for index, latents in parts])
    return Pool(np.concatenate([latents.reshape(len(latents), -1) for _, latents in parts]), steps)


def measure(pool: Pool, count: int, method: Method, options: argparse.Namespace) -> dict[str, Any]:
    """Return mean and standard deviation of the coverage of a selection over seeds."""
    chosen = [select(pool, count, method, seed) for seed in range(options.seeds)]
    found = [asdict(coverage(pool, indices)) for indices in chosen]
    values = {key: np.array([each[key] for each in found]) for key in found[0]}
    return {
        "count": count,
        "method": method,
        **{key: {"mean": float(each.mean()), "deviation": float(each.std())} for key, each in values.items()},
        "first_seed_steps": np.bincount(pool.steps[chosen[0]], minlength=options.steps).tolist(),
    }


def scaling(pool: Pool, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure seconds and peak memory of a selection from growing random parts of a pool.

    The memory is that of NumPy and scikit-learn during the selection, without the pool itself.
    """
    order, count = np.random.default_rng(options.seed).permutation(len(pool)), max(options.counts)
    for method in METHODS:
        select(pool, 1, method, 0)  # imports the libraries
    rows = []
    for doublings in range(DOUBLINGS + 1):
        items = np.sort(order[: len(pool) >> (DOUBLINGS - doublings)])
        part = Pool(pool.latents[items], pool.steps[items])
        for method in METHODS:
            begin = time.perf_counter()
            select(part, count, method, options.seed)
            seconds = time.perf_counter() - begin
            tracemalloc.start()  # slows the selection down, hence a run of its own
            select(part, count, method, options.seed)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            row = {"items": len(part), "count": count, "method": method}
            rows.append(row | {"seconds": seconds, "megabytes": peak / MEGABYTE})
    return rows


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="digits", metavar="MODEL")
    parser.add_argument("--trajectories", type=int, default=32)
    parser.add_argument("--counts", type=int, nargs="+", default=[50, 100, 200, 400, 800])
    parser.add_argument("--seeds", type=int, default=10, help="how many selections of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the trajectories")
    parser.add_argument("--scheduler", default="ddim")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=1.5)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("-o", "--output", type=Path, metavar="FILE.png", help="draw a figure")
    what.add_argument("--scaling", action="store_true", help=f"from {1 << DOUBLINGS} times as many trajectories")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
