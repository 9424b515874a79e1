"""Measure the effect of forecasts on quantization noise: plain reuse, linear Taylor, and the fitted forecast.

    python tools/forecast_noise.py digits --bits w8a8 w6a6 --interval 4 --plot figure.png

An extrapolation by k steps multiplies independent noise of its two values by the root of (1 + k)^2 + k^2; plain reuse
passes the noise on. The actual noise is measured in two ways:

* Closed loop: the error of the latent after every step, in floating point and quantized, and the distance between these
  two runs, which is the effect of quantization alone under a forecast (fitted to each run separately).
* Open loop: on the trajectory of the model, the noise of a forecast from quantized values (its distance from the
  forecast from values in floating point) over the noise of the last value that it uses.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forecast_noise_report import markdown, save_figure

from qcgraph.capture.capture import capture
from qcgraph.compiler.default_pipeline import default_pipeline
from qcgraph.errors import QcgraphError
from qcgraph.export.targets import target_named
from qcgraph.facts import CachePlan, ForecastFit
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.ops import HALVES
from qcgraph.ir.program import Program
from qcgraph.models import load_model
from qcgraph.passes.caching._forecast import log_signal_to_noise, taylor_gain
from qcgraph.pipeline import Pipeline
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress, progress_for
from qcgraph.recipe import Recipe
from qcgraph.sampling.conditions import in_turn
from qcgraph.sampling.loop import TakenStep, sample
from qcgraph.sampling.runner import Array, Call, Runner

KINDS = ("reuse", "taylor", "affine")

Curve = list[float]


def main() -> int:
    """Measure all settings, print the tables, and draw the figure."""
    options = parse()
    progress = progress_for(sys.stderr)
    try:
        captured = capture_model(options)
        exact = fitted(captured, "off", options, progress)
        settings = [measure(exact, fitted(captured, bits, options, progress), bits, options) for bits in options.bits]
    except QcgraphError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    document = {
        "kind": "forecast-noise",
        "format": 1,
        **{key: getattr(options, key) for key in ("model", "scheduler", "steps", "guidance", "interval", "samples")},
        "settings": settings,
    }
    if options.plot:
        save_figure(document, options.plot)
    print(json.dumps(document, indent=1) if options.json else markdown(document))
    return 0


def capture_model(options: argparse.Namespace) -> Program:
    """Return the captured model with its step plan."""
    model = load_model(options.model)
    program = capture(model.module, model.spec, model.input_names)
    return program.with_facts(
        make_step_plan(
            options.scheduler, options.steps, options.guidance, model.spec.noise_schedule, program.constants_digest
        )
    )


def fitted(captured: Program, bits: str, options: argparse.Namespace, progress: Progress) -> dict[str, Program]:
    """Compile the model with every forecast; all other settings are the same."""
    progress.note(f"compiling {options.model}, {bits}")
    recipe = Recipe().override(bits=bits, cache=f"interval={options.interval}", forecast="affine")
    passes = default_pipeline(recipe, target_named(recipe.target.name)).passes
    end = [each.name for each in passes].index("fit-forecast")
    program = Pipeline(passes[:end]).run(captured, progress=progress)
    return {kind: Pipeline.parse(f"fit-forecast{{kind={kind}}}").run(program, progress=progress) for kind in KINDS}


def measure(exact: Mapping[str, Program], quantized: Mapping[str, Program], bits: str, options: Any) -> dict[str, Any]:
    """Measure all forecasts in one precision."""
    one, other = exact["reuse"], quantized["reuse"]
    every = one.facts[StepPlan].all_computing
    both = Both(one, other)
    reference = draw(both, every, one, options)
    alone = distances(draw(TorchRunner(other), other.facts[StepPlan].all_computing, other, options), reference)
    forecasts = []
    for kind in KINDS:
        runs = [
            draw(TorchRunner(each[kind]), each[kind].facts[StepPlan], each[kind], options)
            for each in (exact, quantized)
        ]
        forecasts.append(
            {
                "forecast": kind,
                "float": distances(runs[0], reference),
                "quantized": distances(runs[1], reference),
                "between": distances(runs[1], runs[0]),
                "noise": [asdict(probe) for probe in probes(quantized[kind], both)],
                "fit_float": closed_loop(exact[kind]),
                "fit_quantized": closed_loop(quantized[kind]),
            }
        )
    return {"bits": bits, "every_step": alone, "forecasts": forecasts}


class Both:
    """Runs a program, and another one on the same inputs; keeps the cached values of both.

    Attributes:
        values: for every step, the first cached value of each program, f32[B,...,C].
    """

    def __init__(self, one: Program, other: Program) -> None:
        self._name = one.facts[CachePlan].values[0].name
        self._runners = TorchRunner(one), TorchRunner(other)
        self.values: list[tuple[torch.Tensor, ...]] = []

    def run(self, call: Call) -> Array:
        """Run a computing variant of both programs."""
        states: tuple[dict[tuple[str, int], Any], ...] = ({}, {})
        predictions = [
            runner.run(replace(call, state=made)) for runner, made in zip(self._runners, states, strict=True)
        ]
        self.values.append(tuple(made[self._name, 0] for made in states))
        return predictions[0]


@dataclass(frozen=True)
class Probe:
    """A forecast at a step of the exact trajectory.

    Attributes:
        step: the index of the step.
        gap: steps since the last computing step.
        gain: k, the factor of the linear extrapolation.
        amplification: the noise of the forecast over that of the last computed value.
        noise: change of the forecast by quantization, relative to the forecast value.
        change: error of the forecast from values in floating point, relative to the forecast value.
    """

    step: int
    gap: int
    gain: float
    amplification: float
    noise: float
    change: float


def probes(program: Program, both: Both) -> list[Probe]:
    """Return the forecasts of a program at every reusing step, from values of both precisions."""
    plan, cache = program.facts[StepPlan], program.facts[CachePlan]
    table = program.constants[f"forecast.{cache.values[0].name}"]
    times = log_signal_to_noise(program.facts[ModelSpec].noise_schedule, plan.timesteps)
    halves = torch.arange(len(both.values[0][0])) * HALVES // len(both.values[0][0])
    found, computed = [], []
    for index, step in enumerate(plan.steps):
        if plan.computes(index):
            computed.insert(0, index)
            continue
        looked = [computed[min(age, len(computed) - 1)] for age in range(cache.history)]
        exact, noisy = (
            torch.ops.qcgraph.forecast([both.values[place][which] for place in looked], table[step.row], halves)
            for which in (0, 1)
        )
        goal, last = both.values[index][0], both.values[computed[0]]
        noise = float((noisy - exact).norm())
        found.append(
            Probe(
                step=index,
                gap=index - computed[0],
                gain=taylor_gain(times, index, computed),
                amplification=noise / float((last[1] - last[0]).norm()),
                noise=noise / float(goal.norm()),
                change=float((exact - goal).norm() / goal.norm()),
            )
        )
    return found


def draw(runner: Runner, plan: StepPlan, program: Program, options: argparse.Namespace) -> list[Array]:
    """Return the latents after every step, f32[N,C,H,W] each."""
    spec, latents = program.facts[ModelSpec], list[Array]()
    conditions = in_turn(options.samples, spec)

    def keep(taken: TakenStep) -> None:
        latents.append(taken.after)

    sample(runner, plan, spec, conditions, options.seed, batch=len(conditions), observe=keep)
    return latents


def distances(latents: Sequence[Array], reference: Sequence[Array]) -> Curve:
    """Return the relative L2 distance after every step."""
    pairs = zip(latents, reference, strict=True)
    return [float(np.linalg.norm(found - exact) / np.linalg.norm(exact)) for found, exact in pairs]


def closed_loop(program: Program) -> list[dict[str, Any]]:
    """Return the errors of forecasts when they were fitted, on their own trajectory."""
    return [{"step": step.step, "error": step.forecast} for step in program.facts[ForecastFit].steps]


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="digits", metavar="MODEL")
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w6a6"])
    parser.add_argument("--interval", type=int, default=4)
    parser.add_argument("--scheduler", default="ddim")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
