"""Compare quality at equal cost: the cache of qcgraph, other caches and fewer steps, with equal multiply-accumulates.

    python tools/pareto.py digits tools/models/digits-b --budgets 0.5 0.35 0.25 0.15
    python tools/pareto.py digits --scheduler dpmsolver++ --steps 20 --budgets 0.5 0.35
    python tools/pareto.py --stored quality.json latency.json --plot figure.png

A budget F stands for the interval N = ceil(1 / F): every method gets the ceil(steps / N) computing steps of a uniform
cache with this interval. All methods are compiled and run with ONNX Runtime; quality is judged as in `qcgraph eval`.
Latency is that of one whole image with guidance; the methods of a budget take turns in one process.

``--no-latency`` and ``--only-latency`` measure one of the two; ``--stored`` merges documents, so that latency can be
measured at another time. ``--bundles FOLDER`` keeps compiled bundles in a folder, and reuses them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pareto_judging import Judging, latencies
from pareto_report import Cell, Document, markdown, merged, save_figure

from qcgraph.benchmark.machine import read_machine, versions
from qcgraph.bundle import Bundle
from qcgraph.bundle.manifest import PACKAGES
from qcgraph.compiler.compilation import compile_model
from qcgraph.errors import QcgraphError
from qcgraph.evaluation.settings import RIVAL, Subject
from qcgraph.export.run.open import runner_of
from qcgraph.ir.serialize import load_program
from qcgraph.models import load_model
from qcgraph.passes.caching.plan_steps import rounded
from qcgraph.plan.schedule import uniform
from qcgraph.plan.steps import digest_of
from qcgraph.progress import Progress, progress_for
from qcgraph.recipe import Recipe


@dataclass(frozen=True)
class Method:
    """A way to spend fewer multiply-accumulates.

    Attributes:
        title: the title of its row.
        schedule: ``cache.schedule`` of its recipe, a template; ``off`` takes fewer steps instead.
        forecast: ``cache.forecast`` of its recipe.
        compensation: ``compensation.mode`` of its recipe.
        blocks: ``cache.blocks`` of its recipe.
        scheduler: a scheduler other than the requested one, or empty.
    """

    title: str
    schedule: str = "off"
    forecast: str = "reuse"
    compensation: str = "off"
    blocks: str = "all"
    scheduler: str = ""

    def recipe(self, base: Recipe, interval: int, share: float) -> Recipe:
        """Return the recipe of the method at a budget.

        Args:
            base: the recipe that all methods share, in which every step computes.
            interval: the interval of the uniform cache that the budget stands for.
            share: the cost of that cache relative to computing every step.
        """
        if self.schedule == "off":
            computing = sum(uniform(base.sampling.steps, interval))
            return base.override(steps=computing, scheduler=self.scheduler or None)
        schedule = self.schedule.format(interval=interval, share=f"{share:.6f}")
        recipe = base.override(cache=schedule, forecast=self.forecast, compensate=self.compensation)
        return recipe.model_copy(update={"cache": recipe.cache.model_copy(update={"blocks": self.blocks})})


METHODS = {
    "steps": Method("fewer steps"),
    "solver": Method("fewer steps of DPM-Solver++", scheduler=RIVAL),
    "reuse": Method("uniform, reuse", "interval={interval}"),
    "dps": Method("DPS, reuse", "dps={interval}"),
    "dec": Method("DPS, DEC", "dps={interval}", "dec"),
    "taylor": Method("uniform, Taylor", "interval={interval}", "taylor"),
    "affine": Method("uniform, affine", "interval={interval}", "affine"),
    "planned-taylor": Method("planned, Taylor", "budget={share}", "taylor"),
    "ours": Method("planned, affine (ours)", "budget={share}", "affine"),
    "ours-vc": Method("planned, affine, VC", "budget={share}", "affine", "vc"),
    "ours-guidance": Method("planned, affine, guidance difference", "budget={share}", "affine", blocks="all+guidance"),
}


class Model:
    """A model, and its compiled bundles.

    Attributes:
        name: the name of the model.
        options: the options of the command line.
        progress: receives progress messages.
        whole: the model without quantization, with all steps computing.
    """

    def __init__(self, name: str, options: argparse.Namespace, folder: Path, progress: Progress) -> None:
        self.name, self.options, self.progress, self._folder = name, options, progress, folder
        self._loaded = load_model(name)
        folder.mkdir(parents=True, exist_ok=True)
        self.whole = Subject.of_bundle(self.bundle(self.base("off")), name, options.threads)

    def base(self, bits: str) -> Recipe:
        """Return the recipe that all methods of a precision share, in which every step computes."""
        asked = self.options
        recipe = Recipe().override(
            steps=asked.steps, scheduler=asked.scheduler, guidance=asked.guidance, bits=bits, allow_unsafe=True
        )
        return recipe.model_copy(update={"cache": recipe.cache.model_copy(update={"cost": "macs"})})

    def bundle(self, recipe: Recipe) -> Bundle:
        """Return the bundle of a recipe."""
        path = self._folder / digest_of([self.name, recipe.model_dump()])
        if not path.is_dir():
            compile_model(self._loaded, recipe, path)
        return Bundle.open(path)

    def subject(self, recipe: Recipe) -> Subject:
        """Return the bundle of a recipe as a subject of evaluation."""
        bundle = self.bundle(recipe)
        if bundle.path == self.whole.folder:
            return self.whole
        runner = runner_of(bundle, None, self.options.threads)
        program = load_program(bundle.path)
        return replace(self.whole, program=program, plan=bundle.plan, runner=runner, folder=bundle.path)

    def recipes(self, bits: str, interval: int) -> dict[str, Recipe]:
        """Return the recipes of the requested methods at a budget."""
        base = self.base(bits)
        bundle = self.bundle(METHODS["reuse"].recipe(base, interval, 1.0))
        report, computing = bundle.report, bundle.plan.computing
        assert report is not None
        reuse = {name: rounded(entry.macs / report.variants[computing].macs) for name, entry in report.variants.items()}
        spent = sum(entry.steps * reuse[name] for name, entry in report.variants.items())
        share = math.ceil(1e6 * spent / self.options.steps) / 1e6
        return {key: METHODS[key].recipe(base, interval, share) for key in self.options.methods}


def measure(model: Model, judging: Judging | None) -> Iterator[Cell]:
    """Yield the cells of a model: for every precision the one with all steps computing, then each budget."""
    options, progress = model.options, model.progress
    for bits in options.bits:
        yield from compare(model, judging, bits, 1.0, {"every": model.base(bits)})
        for budget in options.budgets:
            progress.note(f"{model.name}, {bits}, budget {budget:g}")
            yield from compare(model, judging, bits, budget, model.recipes(bits, math.ceil(1 / budget - 1e-9)))


def compare(
    model: Model, judging: Judging | None, bits: str, budget: float, recipes: Mapping[str, Recipe]
) -> Iterator[Cell]:
    """Yield the cells of one budget."""
    options, progress = model.options, model.progress
    subjects = {key: model.subject(recipe) for key, recipe in progress.track(list(recipes.items()), "compiling")}
    found: dict[str, Cell] = {key: {} for key in subjects}
    if judging is not None:
        is_exact = bits == "off" and budget == 1
        found = {"every": dict(judging.exact)} if is_exact else judging.judge(subjects, progress)
    timed = latencies(subjects, model.whole, options.rounds, progress) if options.latency else {}
    for key, subject in subjects.items():
        yield {
            "model": model.name,
            "bits": bits,
            "budget": budget,
            "method": key,
            "title": METHODS[key].title if key in METHODS else "every step computes",
            "cost": subject.cost(subject.plan),
            "schedule": subject.plan.schedule(),
            **found[key],
            **timed.get(key, {}),
        }


def run(options: argparse.Namespace, progress: Progress) -> Document:
    """Measure all requested models, precisions, methods and budgets."""
    document: Document = {
        "kind": "pareto",
        "format": 1,
        **{key: getattr(options, key) for key in ("scheduler", "steps", "guidance", "samples", "seeds", "threads")},
        "machine": asdict(read_machine()),
        "versions": versions(PACKAGES),
        "converged_floors": {},
        "cells": [],
    }
    with tempfile.TemporaryDirectory(prefix="qcgraph-") as folder:
        for name in options.models:
            model = Model(name, options, options.bundles or Path(folder), progress)
            judging = Judging(model.whole, options.samples, options.seeds) if options.quality else None
            if judging is not None:
                document["converged_floors"][name] = judging.floor
            document["cells"] += measure(model, judging)
    return document


def main() -> int:
    """Measure or read the results, then print and draw them."""
    options = parse()
    try:
        if options.stored:
            document = merged([json.loads(path.read_text("utf-8")) for path in options.stored])
        else:
            document = run(options, progress_for(sys.stderr))
    except QcgraphError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.plot:
        save_figure(document, options.plot)
    print(json.dumps(document, indent=2) if options.json else markdown(document))
    return 0


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["digits"], metavar="MODEL")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.35, 0.25, 0.15])
    parser.add_argument("--bits", nargs="+", default=["off", "w8a8"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--scheduler", default="ddim", choices=("ddim", RIVAL), help="of the whole run")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=11, help="turns of everyone in which latency is measured")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-latency", dest="latency", action="store_false")
    parser.add_argument("--only-latency", dest="quality", action="store_false")
    parser.add_argument("--bundles", type=Path, metavar="FOLDER", help="keep what was compiled, take what is there")
    parser.add_argument("--stored", type=Path, nargs="+", metavar="FILE", help="measure nothing, read documents")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw quality against cost")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    if options.scheduler == RIVAL:  # the rival of itself
        options.methods = [key for key in options.methods if METHODS[key].scheduler != RIVAL]
    return options


if __name__ == "__main__":
    sys.exit(main())
