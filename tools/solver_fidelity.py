"""Measure how close a few steps come to the converged run and to the whole run: fitted solvers, and plain ones.

    python tools/solver_fidelity.py digits --steps 17 13 8
    python tools/solver_fidelity.py cifar10 --steps 13 8 6 --halves --target converged --samples 32 --batch 8

Every solver samples the model in full precision, from the same noise, which no fit has seen. The whole run is that of
the first-order solver, DDIM for diffusion models, with --run-steps steps; the converged run takes 250 of its steps. The
squared error is averaged over all samples before PSNR is taken.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from qcgraph.capture.capture import capture
from qcgraph.errors import QcgraphError
from qcgraph.evaluation.metrics import peak, psnr, shown
from qcgraph.evaluation.settings import RIVAL
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.models import load_model
from qcgraph.passes.solver.plan_solver import PlanSolver
from qcgraph.pipeline import Pipeline
from qcgraph.plan.schedulers import first_order, make_step_plan
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress, progress_for
from qcgraph.sampling.conditions import in_turn
from qcgraph.sampling.loop import sample
from qcgraph.sampling.reference import CONVERGED_STEPS, RunStore
from qcgraph.sampling.runner import Array

CACHED = "plan-cache{solver=true blocks=guidance},insert-cache"
TARGETS = {"converged": "the converged run", "run": "the run"}

Row = dict[str, Any]


class Measuring:
    """The references of a model, and the distances of other plans from them.

    Attributes:
        program: the captured model, with the plan of the whole run.
    """

    def __init__(self, options: argparse.Namespace, progress: Progress) -> None:
        self._options, self._progress = options, progress
        model = load_model(options.model)
        captured = capture(model.module, model.spec, model.input_names)
        self.program = captured.with_facts(self.plain(model.spec, captured, options.run_steps))
        self._spec, self._runner, self._runs = model.spec, TorchRunner(self.program), RunStore()
        self._run = self._drawn(self.program.facts[StepPlan])
        self._converged = self._drawn(self.plain(model.spec, captured, CONVERGED_STEPS))

    def plain(self, spec: ModelSpec, captured: Program, steps: int, scheduler: str | None = None) -> StepPlan:
        """Return the plan of a scheduler with this many steps; None for the first-order solver."""
        name = scheduler or first_order(spec.noise_schedule)
        return make_step_plan(name, steps, self._options.guidance, spec.noise_schedule, captured.constants_digest)

    def rows(self) -> Iterator[Row]:
        """Yield the row of the whole run, then those of every number of steps."""
        name = first_order(self._spec.noise_schedule)
        yield self._row(name, self.program.facts[StepPlan])
        for steps in self._options.steps:
            for scheduler in (name, RIVAL):
                yield self._row(scheduler, self.plain(self._spec, self.program, steps, scheduler))
            for target in self._options.target:
                title = f"fitted to {TARGETS[target]}"
                yield self._row(title, self._fitted(steps, target).facts[StepPlan])
                if self._options.halves:
                    yield self._of_halves(steps, f"{title}, halves of guidance", target)

    def _of_halves(self, steps: int, title: str, target: str) -> Row:
        """Return the row of a fitted solver whose steps may compute one half of guidance."""
        program = Pipeline.parse(CACHED).run(self._fitted(steps, target, reuse="guidance"))
        plan = program.facts[StepPlan]
        return self._row(title, plan, runner=TorchRunner(program)) | {"steps": steps, "modes": plan.modes}

    def _fitted(self, steps: int, target: str, reuse: str = "off") -> Program:
        """Return the model with the plan of a fitted solver."""
        self._progress.note(f"{self._options.model}: {steps} steps, fitted to {TARGETS[target]}")
        asked = PlanSolver(steps=steps, target=target, reuse=reuse, trajectories=self._options.trajectories)
        return Pipeline((asked,)).run(self.program, progress=self._progress, runs=self._runs)

    def _row(self, title: str, plan: StepPlan, runner: TorchRunner | None = None) -> Row:
        drawn = self._drawn(plan, runner)
        return {
            "steps": len(plan),
            "solver": title,
            "converged_psnr": self._psnr(drawn, self._converged),
            "run_psnr": None if plan == self.program.facts[StepPlan] else self._psnr(drawn, self._run),
        }

    def _drawn(self, plan: StepPlan, runner: TorchRunner | None = None) -> Array:
        asked, runner = self._options, runner or self._runner
        conditions = in_turn(asked.samples, self._spec)
        drawn = sample(runner, plan, self._spec, conditions, asked.seed, batch=asked.batch, progress=self._progress)
        return shown(drawn, self._spec)

    def _psnr(self, drawn: Array, reference: Array) -> float:
        return float(psnr(((drawn - reference) ** 2).mean(dtype="float64"), peak(reference, self._spec)))


def main() -> int:
    """Measure all solvers, and print the table."""
    options = parse()
    settings = {key: getattr(options, key) for key in ("model", "run_steps", "guidance", "samples", "seed")}
    try:
        rows = list(Measuring(options, progress_for(sys.stderr)).rows())
    except QcgraphError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    document = {"kind": "solver-fidelity", "format": 1, **settings, "rows": rows}
    print(json.dumps(document, indent=1) if options.json else markdown(document))
    return 0


def markdown(document: Mapping[str, Any]) -> str:
    """Return a row for every solver and number of steps."""
    lines = [
        f"`{document['model']}`, guidance {document['guidance']:g}, {document['samples']} samples: PSNR, dB.",
        "",
        f"| steps | solver | to the converged run | to the run of {document['run_steps']} steps |",
        "|---|---|---|---|",
    ]
    for row in document["rows"]:
        to_run = "-" if row["run_psnr"] is None else f"{row['run_psnr']:.1f}"
        lines.append(f"| {row['steps']} | {row['solver']} | {row['converged_psnr']:.1f} | {to_run} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="digits", metavar="MODEL")
    parser.add_argument("--steps", type=int, nargs="+", default=[17, 13, 8], metavar="K")
    parser.add_argument(
        "--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="what solvers are fitted to"
    )
    parser.add_argument(
        "--halves", action="store_true", help="also measure solvers of as much work with steps of one half of guidance"
    )
    parser.add_argument("--run-steps", type=int, default=50, help="steps of the whole run")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--batch", type=int, default=16, help="samples that run together; fewer take less memory")
    parser.add_argument("--trajectories", type=int, help="that solvers are fitted to; by default as a compilation does")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
