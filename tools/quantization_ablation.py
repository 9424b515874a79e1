"""Measure what each part of quantization is worth: parts added one after another, and each left out of the whole.

    python tools/quantization_ablation.py digits tools/models/digits-b --rows ladder leave-out
    python tools/quantization_ablation.py cifar10 --solvers fitted=13 as-is --steps 50 --samples 24 --seeds 1

Every setting is compiled for ONNX Runtime, with every step of a solver computing. Its samples are compared with those
of the same steps in full precision, from the same noise, which no calibration has seen: PSNR of the mean error with its
95 % interval, of the median sample and of the worst tenth; and the error over that of the whole quantizer, in dB, with
the interval of paired samples. The parts are those of ``--ablate``. Passes that two settings share run once.

Rows: ``ladder`` adds the parts one by one; ``leave-out`` takes each out of the whole, and adds variance compensation;
``attention`` also quantizes the products of attention.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from qcgraph.benchmark.machine import read_machine, versions
from qcgraph.bundle.manifest import PACKAGES
from qcgraph.capture.capture import capture
from qcgraph.compiler.default_pipeline import default_pipeline
from qcgraph.compiler.running import running_for
from qcgraph.errors import QcgraphError
from qcgraph.evaluation.bootstrap import Bootstrap
from qcgraph.evaluation.faults import error_ratio
from qcgraph.evaluation.metrics import peak, psnr, shown, spread
from qcgraph.evaluation.tally import Values, mean_squares
from qcgraph.export.targets import target_named
from qcgraph.ir.program import Program
from qcgraph.models import load_model
from qcgraph.pipeline import Pipeline
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress, progress_for
from qcgraph.recipe import Recipe
from qcgraph.sampling.conditions import in_turn
from qcgraph.sampling.loop import sample
from qcgraph.sampling.reference import RunStore
from qcgraph.sampling.runner import Array

LADDER = {  # the part that each row adds, in the order of the papers, and then the parts of qcgraph
    "tgq": "TGQ",
    "mrq": "MRQ",
    "ho": "HO",
    "tap": "TAP",
    "equalize": "equalized channels",
    "feedback": "rounding with feedback",
    "dec": "corrected results",
}
WHOLE = "all"
ROWS = ("ladder", "leave-out", "attention")
COLUMNS = ("bits", "solver", "setting", "PSNR dB", "median", "worst tenth", "error over that of all, dB")
TARGET = target_named("onnxruntime-cpu")
Cell = dict[str, Any]


def main() -> int:
    """Compile and judge every cell, and print the table."""
    options = parse()
    progress = progress_for(sys.stderr)
    cells: list[Cell] = []
    try:
        for name in options.models:
            for cell in Measuring(name, options, progress).cells():
                cells.append(cell)
                progress.note(" | ".join(texts(cell)))
    except QcgraphError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    document = {
        "kind": "quantization-ablation",
        "format": 2,
        **{key: getattr(options, key) for key in ("steps", "guidance", "samples", "seeds")},
        "machine": asdict(read_machine()),
        "versions": versions(PACKAGES),
        "cells": cells,
    }
    print(json.dumps(document, indent=2) if options.json else markdown(document))
    return 0


def settings(whole: Recipe, rows: Sequence[str]) -> Iterator[tuple[str, Recipe]]:
    """Yield recipes with their titles, the whole first."""
    yield WHOLE, whole
    parts = list(LADDER)
    if "ladder" in rows:
        yield "none", whole.ablated(parts)
        for count, title in enumerate(list(LADDER.values())[:-1], 1):
            yield f"+ {title}", whole.ablated(parts[count:])
    if "leave-out" in rows:
        for part, title in LADDER.items():
            yield f"all but {title}", whole.ablated([part])
        if not whole.is_fitted:
            yield "all and VC", whole.override(compensate="vc")
    if "attention" in rows:
        quantization = whole.quantization.model_copy(update={"attention": True})
        attended = whole.model_copy(update={"quantization": quantization})
        yield "all, and attention", attended
        yield "all, and attention in one region", attended.ablated(["mrq"])


def with_all_parts(recipe: Recipe) -> Recipe:
    """Return a recipe with the search for scales, which is off at 8 bits by default."""
    return recipe.model_copy(update={"quantization": recipe.quantization.model_copy(update={"scales": "fisher"})})


class Measuring:
    """Compiles settings of a model, and compares their samples with those of full precision.

    Args:
        name: the name of the model.
        options: the options of the command line.
        progress: reports the passes.
    """

    def __init__(self, name: str, options: argparse.Namespace, progress: Progress) -> None:
        self._name, self._options, self._progress = name, options, progress
        model = load_model(name)
        self._spec = model.spec
        program = capture(model.module, model.spec, model.input_names)
        mark = program.constants_digest
        plan = make_step_plan("auto", options.steps, options.guidance, model.spec.noise_schedule, mark)
        self._captured, self._runs = program.with_facts(plan), RunStore()
        self._made: dict[tuple[str, ...], Program] = {}
        self._conditions = in_turn(options.samples, self._spec)
        self._bootstrap = Bootstrap(options.seeds, self._conditions.labels(self._spec).tolist())

    def cells(self) -> Iterator[Cell]:
        """Yield the cells of the model."""
        asked = self._options
        for solver in asked.solvers:
            base = with_all_parts(
                Recipe().override(steps=asked.steps, guidance=asked.guidance, solver=solver, cache="off")
            )
            exact = self._drawn(self._made_by(base.override(bits="off")))
            for bits in asked.bits:
                whole: Values | None = None
                for title, recipe in settings(base.override(bits=bits), asked.rows):
                    errors = self._errors(self._drawn(self._made_by(recipe)), exact)
                    whole = errors if whole is None else whole
                    yield {"model": self._name, "bits": bits, "solver": solver, "setting": title} | self._judged(
                        errors, whole, peak(np.concatenate(exact), self._spec)
                    )

    def _judged(self, errors: Values, whole: Values, largest: float) -> Cell:
        """Return the figures of squared errors [seeds, samples]."""
        median, worst = spread(psnr(errors.reshape(-1), largest))
        return {
            "psnr": asdict(self._bootstrap.estimate(lambda error: psnr(error, largest), errors)),
            "median": median,
            "worst": worst,
            "behind_db": None if errors is whole else asdict(error_ratio(self._bootstrap, errors, whole)),
        }

    def _made_by(self, recipe: Recipe) -> Program:
        """Return the program of a recipe, before the passes that its target asks for."""
        lowering = {pass_.name for pass_ in Pipeline.parse(TARGET.legalize)}
        program, done = self._captured, tuple[str, ...]()
        for pass_ in default_pipeline(recipe, TARGET):
            if pass_.name in lowering:
                continue
            done = (*done, pass_.text)
            if done not in self._made:
                self._progress.note(f"{self._name}: {pass_.text}")
                self._made[done] = Pipeline((pass_,)).run(
                    program, origin=self._captured, runs=self._runs, running=running_for(TARGET)
                )
            program = self._made[done]
        return program

    def _drawn(self, program: Program) -> list[Array]:
        """Return the images of every seed."""
        plan = program.facts[StepPlan]
        with running_for(TARGET)(program) as runner:
            return [
                shown(sample(runner, plan, self._spec, self._conditions, seed, batch=self._options.batch), self._spec)
                for seed in range(self._options.seeds)
            ]

    def _errors(self, drawn: Sequence[Array], exact: Sequence[Array]) -> Values:
        """Return the squared errors of images, f64[seeds, samples]."""
        return np.stack([mean_squares(images, goal) for images, goal in zip(drawn, exact, strict=True)])


def markdown(document: dict[str, Any]) -> str:
    """Return a table for each model."""
    lines = []
    for name in dict.fromkeys(cell["model"] for cell in document["cells"]):
        lines += [f"### {name}", "", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
        lines += [f"| {' | '.join(texts(cell))} |" for cell in document["cells"] if cell["model"] == name]
        lines.append("")
    return "\n".join(lines).rstrip()


def texts(cell: Cell) -> list[str]:
    """Return a row of the table."""
    return [
        cell["bits"],
        cell["solver"],
        cell["setting"],
        interval(cell["psnr"]),
        f"{cell['median']:.1f}",
        f"{cell['worst']:.1f}",
        "-" if cell["behind_db"] is None else interval(cell["behind_db"]),
    ]


def interval(estimate: dict[str, float]) -> str:
    """Return an estimate with its interval."""
    return f"{estimate['value']:.1f} ({estimate['low']:.1f} .. {estimate['high']:.1f})"


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["digits"], metavar="MODEL")
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w6a6", "w4a8"])
    parser.add_argument("--solvers", nargs="+", default=["as-is", "fitted=13"], metavar="SOLVER")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["leave-out"], help="default %(default)s")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--samples", type=int, default=64, help="samples of each seed")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="samples that run together; fewer take less memory")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
