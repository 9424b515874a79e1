"""Latency of whole sampling: a compiled bundle against PyTorch eager, paired in one run.

    qcgraph compile dit-s-2:random -o out/dit-s-2 --steps 50 --guidance 1.5 --bits w8a8 --groups 8 \
        --cache interval=3 --compensate vc --target onnxruntime-cpu
    python tools/bench_sampling.py dit-s-2:random out/dit-s-2 --samples 1

With guidance the denoiser sees twice as many samples as are drawn: ``--samples 1`` is batch 2.
"""

from __future__ import annotations

import argparse
import json
import platform

import torch
from measuring import EagerRunner, TimedRunner, Timing, paired

from qcgraph.bundle import Bundle
from qcgraph.models import load_model
from qcgraph.runtime import open_runner
from qcgraph.sampling import Runner, sample


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the model the bundle was compiled from")
    parser.add_argument("bundle")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bundle = Bundle.open(options.bundle)
    plan, spec = bundle.plan, bundle.spec
    labels = [index % spec.class_count for index in range(options.samples)]
    compiled = TimedRunner(open_runner(bundle, None, options.threads))
    eager = TimedRunner(EagerRunner(load_model(options.model)))

    def draw(runner: Runner) -> None:
        sample(runner, plan, spec, labels, seed=0, batch=options.samples)

    for runner in (eager, compiled):  # warm up; loading a graph is no step
        draw(runner)
        runner.seconds.clear()
    timings = paired({"eager": lambda: draw(eager), "compiled": lambda: draw(compiled)}, options.rounds)
    steps = {
        "eager step": [seconds for values in eager.seconds.values() for seconds in values],
        **{f"{variant} step": values for variant, values in compiled.seconds.items()},
    }
    measured = timings | {name: Timing.of(values) for name, values in steps.items()}
    ratios = {"speed-up of whole sampling": timings["eager"].median / timings["compiled"].median}
    if "reuse step" in measured:
        ratios["reuse step / full step"] = measured["reuse step"].median / measured["full step"].median
    if options.json:
        print(json.dumps({"seconds": {name: vars(value) for name, value in measured.items()}, "ratios": ratios}))
        return
    print(f"{options.model}, {plan.describe()}, {options.samples} samples, {options.threads} threads")
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}")
    for name, timing in measured.items():
        print(f"{name:28} {timing} s (min / median / max)")
    for name, ratio in ratios.items():
        print(f"{name:28} {ratio:.3f}")


if __name__ == "__main__":
    main()
