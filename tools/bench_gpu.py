"""Compare engines with PyTorch on a GPU: compile, build, check and measure in one command, and print a table per model.

    pip install '.[tensorrt-rtx]'    # beside a PyTorch with CUDA
    python tools/bench_gpu.py
    python tools/bench_gpu.py --bundle out/dit-xl --bundle out/dit-s --json > gpu.json

Models are compiled on the CPU: w8a8, 8 timestep groups, adaLN ahead of the steps, every third step computes. They are
calibrated on one trajectory, because random weights show nothing about quality. --bundle takes a bundle that was
compiled before, possibly on another machine. Engines are built for the GPU of this machine. Then the tool measures:

- predictions of engines against ONNX Runtime on the CPU and the program in PyTorch, step by step;
- a computing and a reusing step: CUDA events, after a warm-up, each as a CUDA graph if it can be captured;
- whole sampling, from latents to latents on the GPU, in turn with PyTorch eager and torch.compile on the same model.

PyTorch multiplies float32 as float32; engines of float32 graphs use TensorFloat32. A part that fails is reported, the
remaining parts run, and the command exits with 1. Without a GPU it exits with 2; --device cpu measures PyTorch alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_gpu_engines import compare, step_times
from bench_gpu_report import ModelReport, Row, document, markdown
from bench_gpu_sampling import Denoise, Values, condition_tensors, device_times, sampling_times, torch_denoiser

from qcgraph.benchmark.machine import read_machine, versions
from qcgraph.bundle import Bundle
from qcgraph.bundle.engines import Batch
from qcgraph.compiler.compilation import compile_model
from qcgraph.errors import QcgraphError, UsageError
from qcgraph.export.run.engines import EngineRunner
from qcgraph.export.run.open import runner_of
from qcgraph.export.run.open_engines import open_engines
from qcgraph.export.tensorrt.device import capability_of, require_device
from qcgraph.export.tensorrt.engines import build_engines
from qcgraph.models import LoadedModel, load_model
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress, progress_for
from qcgraph.recipe import Recipe
from qcgraph.sampling.denoiser import Denoiser

MODELS = ["dit-xl-2:random", "dit-s-2:random"]
PARTS = ("torch", "torch-compile", "engines")
TORCH: tuple[tuple[str, str, torch.dtype, str | None], ...] = (  # part, name, type, mode of torch.compile
    ("torch", "torch fp32", torch.float32, None),
    ("torch", "torch bf16", torch.bfloat16, None),
    ("torch-compile", "torch.compile fp32", torch.float32, "default"),
    ("torch-compile", "torch.compile bf16", torch.bfloat16, "default"),
    ("torch-compile", "torch.compile bf16, CUDA graphs", torch.bfloat16, "reduce-overhead"),
)
PACKAGES = ("qcgraph", "torch", "tensorrt-rtx", "tensorrt", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Options:
    """The options of a measurement."""

    steps: int
    guidance: float
    samples: tuple[int, ...]
    rounds: int
    parts: tuple[str, ...]
    provider: str
    device: torch.device
    folder: Path


def parsed() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"by default {' '.join(MODELS)}")
    parser.add_argument("--bundle", action="append", default=[], type=Path, help="measure this bundle and its model")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--samples", default="1,8", help="samples at once, such as 1,8")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--provider", default="tensorrt-rtx", choices=("tensorrt-rtx", "tensorrt"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("-o", "--output", type=Path, help="keep bundles and engines in this folder")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args()


def main() -> int:
    """Measure all models and bundles, and print the results."""
    given = parsed()
    progress = progress_for(sys.stderr)
    try:
        with tempfile.TemporaryDirectory(prefix="qcgraph-") as temporary:
            options = options_of(given, given.output or Path(temporary))
            models = given.models or ([] if given.bundle else MODELS)
            reports = [measure(model, None, options, progress) for model in models]
            reports += [measure(str(path), path, options, progress) for path in given.bundle]
    except QcgraphError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    machine = asdict(read_machine()) | device_facts(options.device)
    if given.json:
        print(json.dumps(document(machine, versions(PACKAGES), reports), indent=2))
    else:
        named = ", ".join(f"{name} {version}" for name, version in versions(PACKAGES).items())
        print("\n\n".join([f"{machine['device']}; {machine['cpu']}; {named}.", *map(markdown, reports)]))
    return 1 if any(report.failures for report in reports) else 0


def options_of(given: argparse.Namespace, folder: Path) -> Options:
    """Return the options of a command line.

    Raises:
        UsageError: an option has a wrong value, or there is no GPU.
    """
    parts = tuple(given.parts.split(","))
    if unknown := set(parts) - set(PARTS):
        raise UsageError(f"unknown part {min(unknown)!r}", where="--parts", hint=f"known: {', '.join(PARTS)}")
    try:
        samples = tuple(int(part) for part in given.samples.split(","))
    except ValueError:
        samples = (0,)
    if min(*samples, given.rounds, given.steps, 1) < 1:
        raise UsageError("samples, rounds and steps are whole numbers from 1", hint="for example --samples 1,8")
    device = torch.device("cpu")
    if given.device == "cuda":
        try:
            device = require_device()
        except UsageError as error:
            raise UsageError(
                error.message, hint="run it with an NVIDIA GPU, or --device cpu for PyTorch alone"
            ) from None
    else:
        parts = tuple(part for part in parts if part != "engines")
    return Options(given.steps, given.guidance, samples, given.rounds, parts, given.provider, device, folder)


def device_facts(device: torch.device) -> dict[str, object]:
    """Describe the properties of the GPU that decide its speed."""
    if device.type == "cpu":
        return {"device": "CPU alone"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "compute_capability": capability_of(device),
        "device_memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }


def measure(name: str, path: Path | None, options: Options, progress: Progress) -> ModelReport:
    """Measure one model, or one bundle and its model."""
    report = ModelReport(name)
    bundle = report.attempt("open the bundle", progress, partial(Bundle.open, path)) if path else None
    if path and bundle is None:
        return report
    model = report.attempt("load the model", progress, partial(load_model, bundle.manifest.model if bundle else name))
    if model is None and bundle is None:
        return report
    if model is not None:
        plan = bundle.plan if bundle else planned(model, options)
        report.plan = plan.describe()
        torch_rows(report, model, plan, options, progress)
    if "engines" in options.parts:
        if bundle is None:
            bundle = timed_part(report, "compile", progress, partial(compiled, name, options, progress))
        if bundle is not None:
            report.plan = bundle.plan.describe()
            engine_rows(report, bundle, options, progress)
    return report


def planned(model: LoadedModel, options: Options) -> StepPlan:
    """Return the step plan of a model without a bundle."""
    return make_step_plan("ddim", options.steps, options.guidance, model.spec.noise_schedule, "")


def compiled(name: str, options: Options, progress: Progress) -> Bundle:
    """Compile a model, and return its bundle."""
    recipe = Recipe().override(
        steps=options.steps,
        guidance=options.guidance,
        bits="w8a8",
        groups=8,
        cache="interval=3",
        compensate="vc",
        target=options.provider,
        hoist_adaln=True,
        allow_unsafe=True,
    )
    recipe = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"trajectories": 1})})
    place = options.folder / name.replace(":", "-").replace("/", "-")
    bundle = compile_model(name, recipe, place, force=True, progress=progress).bundle
    assert bundle is not None
    return bundle


def timed_part(report: ModelReport, part: str, progress: Progress, work: Callable[[], Any]) -> Any:
    """Attempt a part of making engines, and record its seconds."""
    start = time.perf_counter()
    result = report.attempt(part, progress, work)
    if result is not None:
        report.engines.setdefault("seconds", {})[part] = time.perf_counter() - start
    return result


def torch_rows(report: ModelReport, model: LoadedModel, plan: StepPlan, options: Options, progress: Progress) -> None:
    """Add the rows of PyTorch, eager and compiled."""
    for part, name, dtype, mode in TORCH:
        if part in options.parts:
            torch_kind(report, name, partial(torch_denoiser, model, dtype, mode), (model, plan), options, progress)
            if options.device.type == "cuda":
                torch.cuda.empty_cache()  # for the next row, and for engines, which allocate memory on their own


def torch_kind(
    report: ModelReport,
    name: str,
    make: Callable[[torch.device], Denoise],
    subject: tuple[LoadedModel, StepPlan],
    options: Options,
    progress: Progress,
) -> None:
    """Add the rows of one way to run a model in PyTorch."""
    denoise = report.attempt(name, progress, partial(make, options.device))
    if denoise is not None:
        for samples in options.samples:
            work = partial(torch_row, name, denoise, *subject, samples, options)
            row = report.attempt(f"{name}, {samples} at once", progress, work)
            report.rows += [row] if row else []


def torch_row(name: str, denoise: Denoise, model: LoadedModel, plan: StepPlan, samples: int, options: Options) -> Row:
    """Measure a model in PyTorch, with a number of samples at once."""
    sampling = sampling_times(denoise, plan, model.spec, samples, options.rounds, options.device)
    batch = samples * plan.halves
    latent = torch.randn((batch, *model.spec.latent_shape), device=options.device)
    work = partial(denoise, latent, plan.timesteps[0], condition_tensors(plan, model.spec, samples, options.device))
    with torch.no_grad():
        forward = device_times(work, options.rounds, options.device)
    return Row(name, samples, {"forward": forward}, "forward", sampling)


def engine_rows(report: ModelReport, bundle: Bundle, options: Options, progress: Progress) -> None:
    """Add the rows of engines, if they can be built and loaded on this machine."""
    most = max(options.samples) * bundle.plan.halves
    batch = Batch(minimum=bundle.plan.halves, optimum=bundle.plan.halves, maximum=most)
    place = options.folder / f"engines-{bundle.path.name}"
    build = partial(build_engines, bundle, (), place, batch, provider=options.provider, force=True, progress=progress)
    record = timed_part(report, "build engines", progress, build)
    if record is None:
        return
    report.engines["record"] = record.model_dump(mode="json")
    runner = timed_part(report, "load engines", progress, partial(open_engines, bundle, options.provider, place))
    if runner is None:
        return
    timed_part(report, "first step", progress, partial(first_step, runner, bundle))
    for reference in ("onnxruntime", "torch"):
        work = partial(compared, runner, bundle, reference)
        errors = report.attempt(f"compare with {reference}", progress, work)
        report.agreement |= {reference: errors} if errors else {}
    for samples in options.samples:
        for name, plan in (
            ("engines", bundle.plan.all_computing),
            ("cached", bundle.plan),
        ):
            title = "engines, every step computed" if name == "engines" else "engines, cached"
            row_of = partial(engine_row, title, runner, bundle, plan, samples, options)
            row = report.attempt(f"{title}, {samples} at once", progress, row_of)
            report.rows += [row] if row else []


def first_step(runner: EngineRunner, bundle: Bundle) -> bool:
    """Run one step, in which TensorRT-RTX compiles its kernels unless they are stored; return whether it is finite."""
    denoiser = Denoiser(runner, bundle.plan, bundle.spec)
    latent = torch.zeros((bundle.plan.halves, *bundle.spec.latent_shape), device=runner.device)
    conditions = condition_tensors(bundle.plan, bundle.spec, 1, runner.device)
    return bool(torch.isfinite(denoiser(latent, bundle.plan.timesteps[0], **conditions).sample).all())


def compared(runner: EngineRunner, bundle: Bundle, reference: str) -> dict[str, float]:
    """Return the errors of engines against another runtime of the same bundle, on the CPU."""
    return compare(runner, runner_of(bundle, reference), bundle)


def engine_row(name: str, runner: EngineRunner, bundle: Bundle, plan: StepPlan, samples: int, options: Options) -> Row:
    """Measure engines under a plan, with a number of samples at once."""
    denoiser = Denoiser(runner, plan, bundle.spec)

    def denoise(latent: torch.Tensor, timestep: float, conditions: Values) -> torch.Tensor:
        prediction: torch.Tensor = denoiser(latent, timestep, **conditions).sample
        return prediction

    sampling = sampling_times(denoise, plan, bundle.spec, samples, options.rounds, options.device)
    times, graphs = step_times(runner, bundle, samples, options.rounds)
    used = {variant: timing for variant, timing in times.items() if variant in plan.variants}
    return Row(name, samples, used, plan.computing, sampling, (graphs, len(times)))


if __name__ == "__main__":
    sys.exit(main())
