"""Checks of exported graphs: what ONNX Runtime makes of them, and that they compute what the program computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from qcgraph.cache_state import depths, remember
from qcgraph.errors import VerificationError
from qcgraph.export.quantized_sites import (
    CutSites,
    Parameters,
    QuantizedSite,
    multiplied_integers,
    parameters,
    quantized_products,
    quantized_sites,
    record,
)
from qcgraph.export.run_onnxruntime import OnnxRuntimeRunner, OptimizedGraph
from qcgraph.export.targets import Target
from qcgraph.facts import QuantPlan
from qcgraph.ir.ops import HALVES
from qcgraph.ir.program import Program
from qcgraph.ir.structure import find_sites, macs_by_variant
from qcgraph.progress import Progress
from qcgraph.spec import Interface, ModelSpec, preparation
from qcgraph.steps import Step, StepPlan

EXACT = 1e-5  # relative L2 that float32 arithmetic in another order stays below
ROUNDING_FACTOR = 1.5  # how far above its rounding floor a quantized graph may be
NO_NUMBER = float(np.finfo(np.float32).max)  # stands for a distance that is none, and unlike infinity exists in JSON
PERTURBATION = 1e-6  # relative noise on the latent, about what one operator in another order makes
STANDARD_ERRORS = 3.0  # how far above that it must be for certain, over the samples that were compared
STEPS = 4  # steps of the plan that a variant is compared at, two for large models
SAMPLES = 256  # samples a step, fewer for large models; in a small one a rounding flips in few of them
MACS = 10e9  # multiply-accumulates that running the samples of a step once may cost
TOGETHER = 16  # sites whose values are held at once to compare them
CONSTANT_SCALES = "constant scales"
KERNEL = "MatMulIntegerToFloat"
BIAS = 6  # its input
PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm")
VIEWS = ("Transpose", "Reshape", "Cast", "Identity", "Unsqueeze", "Squeeze")


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: what was checked.
        variant: the variant it was checked on.
        passed: whether it holds.
        value: the figure that was found.
        limit: what the figure must not exceed.
        detail: the figure in words, with the offenders by name.
    """

    name: str
    variant: str
    passed: bool
    value: float
    limit: float
    detail: str


def verify_export(
    program: Program, folder: Path, target: Target, interfaces: Mapping[str, Interface], progress: Progress
) -> tuple[Check, ...]:
    """Check the exported graphs of a program.

    Args:
        program: what was exported; it holds a step plan, whose steps give timesteps, groups and rows.
        folder: where the graphs and their weights are.
        target: what it was exported for.
        interfaces: inputs and outputs by variant.
        progress: reports the variants.

    Returns:
        Every check that was made, passed or not. None for a target without ONNX graphs.

    Raises:
        BundleError: ONNX Runtime cannot load a graph.
    """
    if not target.emits_onnx:
        return ()
    runner = OnnxRuntimeRunner(folder, interfaces, exact=target.may_saturate)
    checks: list[Check] = []
    for variant in progress.track(list(program.variants), "verifying"):
        path = folder / f"{variant}.onnx"
        sites = quantized_sites(program.variants[variant])
        checks.append(_check_kernels(program, variant, sites, path))
        if sites:
            found = list(_check_parameters(variant, parameters(path), target))
            checks += found
            if any(check.name == CONSTANT_SCALES and not check.passed for check in found):
                continue  # ONNX Runtime cannot run int8 activations with selected scales exactly
            checks.append(_check_sites(program, variant, sites, path, exact=target.may_saturate))
        checks += _check_outputs(program, variant, bool(sites), runner)
    return tuple(checks)


def _check_kernels(program: Program, variant: str, sites: Sequence[QuantizedSite], path: Path) -> Check:
    """Every planned linear runs in int8, its bias included where it can be; nothing dequantized is multiplied."""
    optimized, integers = OptimizedGraph.of(path), multiplied_integers(path)
    plan = program.facts.get(QuantPlan)
    planned = set(plan.sites) if plan else set()
    unquantized = {site.name for site in find_sites(program.variants[variant])} - {site.name for site in sites}
    kernels = [node for node in optimized.nodes if node.op == KERNEL]
    left = []
    for site in sites:
        kernel = next((node for node in kernels if node.inputs[1] == site.codes), None)
        if kernel is None:
            left.append(site.name)
            continue
        kernels.remove(kernel)
        if site.codes in integers and site.has_bias and not any(kernel.inputs[BIAS:]):
            left.append(f"the bias of {site.name}")
    products = quantized_products(program.variants[variant])
    missing = [f"{len(products) - len(kernels)} products of attention"] if len(kernels) < len(products) else []
    offenders = [*sorted(unquantized & planned), *left, *missing, *_dequantized_products(optimized)]
    what = ", ".join(offenders)
    ran = f"{len(sites)} linears" + (f" and {len(products)} products of attention" if products else "")
    return Check(
        name="int8 kernels",
        variant=variant,
        passed=not offenders,
        value=len(offenders),
        limit=0,
        detail=f"not in int8: {what}" if offenders else f"{ran} in int8, none of them left in float",
    )


def _dequantized_products(optimized: OptimizedGraph) -> Iterator[str]:
    """Floating-point products of dequantized values."""
    makers = {name: node for node in optimized.nodes for name in node.outputs}
    for node in optimized.nodes:
        for name in node.inputs if node.op in PRODUCTS else ():
            maker = makers.get(name)
            while maker is not None and maker.op in VIEWS:
                maker = makers.get(maker.inputs[0])
            if maker is not None and maker.op == "DequantizeLinear":
                yield f"{node.op} {node.name}"
                break


def _check_parameters(variant: str, found: Parameters, target: Target) -> Iterator[Check]:
    """Weight codes that the kernels multiply exactly, and scales and zero points that mean something."""
    largest = {name: int(np.abs(codes.astype(np.int16)).max()) for name, codes in found.codes.items()}
    over = [name for name, value in largest.items() if value > target.weight_high]
    value = max(largest.values())
    yield Check(
        name="weight codes",
        variant=variant,
        passed=not over,
        value=value,
        limit=target.weight_high,
        detail=f"the largest code is {value}" + (f", in {', '.join(over)}" if over else ""),
    )
    wrong = [name for name, scale in found.scales.items() if not np.all(np.isfinite(scale) & (scale > 0))]
    symmetric = [
        name for name, zeros in found.zero_points.items() if zeros.dtype == np.int8 or target.activation == "symmetric"
    ]
    wrong += [name for name in symmetric if np.any(found.zero_points[name])]
    yield Check(
        name="scales and zero points",
        variant=variant,
        passed=not wrong,
        value=len(wrong),
        limit=0,
        detail=f"not finite, positive or symmetric: {', '.join(wrong)}" if wrong else f"{len(found.scales)} scales",
    )
    if target.constant_scales:
        selected = sorted(found.selected)
        yield Check(
            name=CONSTANT_SCALES,
            variant=variant,
            passed=not selected,
            value=len(selected),
            limit=0,
            detail=f"selected at run time: {', '.join(selected)}" if selected else "the same at every step",
        )


def _check_sites(program: Program, variant: str, sites: Sequence[QuantizedSite], path: Path, *, exact: bool) -> Check:
    """Each site on its own computes what it computes in the program, given the same values."""
    try:
        parts = [sites[start : start + TOGETHER] for start in range(0, len(sites), TOGETHER)]
        cuts = [CutSites(path, part, exact=exact) for part in parts]
    except VerificationError as missing:
        return Check("site exactness", variant, passed=False, value=NO_NUMBER, limit=EXACT, detail=str(missing))
    worst = dict.fromkeys((site.name for site in sites), 0.0)
    for index, step in enumerate(_steps(program, variant)):
        inputs = _inputs(program, variant, step, 1, np.random.default_rng(index))
        selectors = {name: inputs[name].numpy() for name in ("group", "row")}
        for position, values in record(program, variant, inputs, [cut.nodes for cut in cuts]):
            found = cuts[position].run(values, selectors)
            for site in cuts[position].sites:
                distances = _distances(found[site.name], values[site.leaving])
                worst[site.name] = max(*distances, worst[site.name])
    value = max(worst.values())
    over = [f"{name} {distance:.1e}" for name, distance in worst.items() if distance > EXACT]
    detail = f"relative L2 up to {value:.1e} over {len(sites)} sites"
    if over:
        detail += f"; too far: {', '.join(over)}"
    return Check("site exactness", variant, passed=not over, value=value, limit=EXACT, detail=detail)


def _check_outputs(program: Program, variant: str, quantized: bool, runner: OnnxRuntimeRunner) -> Iterator[Check]:
    """The whole graph computes what the program computes, up to the roundings that quantization amplifies.

    A difference of one part in a million flips roundings, in block after block; what a program so differs from
    *itself*, when its latent is perturbed by that much, is the floor that no backend can be expected to be below. In a
    small model few samples see a flip; the limit allows for what the root mean square of so few may be off by chance.
    """
    errors: dict[str, list[float]] = {}
    floors: dict[str, list[float]] = {}
    samples = int(np.clip(MACS // _macs(program), 1, SAMPLES))
    for index, step in enumerate(_steps(program, variant)):
        generator = np.random.default_rng(1000 + index)
        inputs = _inputs(program, variant, step, samples, generator)
        expected = program.run(variant, inputs)
        found = runner.run_outputs(variant, {name: value.numpy() for name, value in inputs.items()}, {})
        nearby = program.run(variant, inputs | {"latent": _perturbed(inputs["latent"], generator)}) if quantized else {}
        for name, tensor in expected.items():
            errors.setdefault(name, []).extend(_distances(found[name].numpy(), tensor.numpy()))
            if quantized:
                floors.setdefault(name, []).extend(_distances(nearby[name].numpy(), tensor.numpy()))
    for name, distances in errors.items():
        limit = _limit(distances, floors.get(name, []))
        value = _root_mean_square(distances)
        text = f"relative L2 {value:.1e} over {len(distances)} samples"
        if quantized:
            text += f", rounding floor {_root_mean_square(floors[name]):.1e}"
        yield Check(f"parity of {name}", variant, passed=value <= limit, value=value, limit=limit, detail=text)


def _limit(distances: Sequence[float], floors: Sequence[float]) -> float:
    """What the root mean square of the distances must not exceed."""
    if not floors:
        return EXACT
    squares, floor_squares = np.square(distances), ROUNDING_FACTOR**2 * np.square(floors)
    chance = np.sqrt((np.var(squares) + np.var(floor_squares)) / len(squares))
    return float(np.sqrt(max(EXACT**2, floor_squares.mean()) + STANDARD_ERRORS * chance))


def _steps(program: Program, variant: str) -> list[Step]:
    """Steps of the plan that run a variant or are prepared by it, spread over it."""
    steps = [step for step in program.facts[StepPlan].steps if variant in (step.variant, preparation(step.variant))]
    count = min(len(steps), STEPS if _macs(program) < MACS else STEPS // 2)
    return [steps[position] for position in np.linspace(0, len(steps) - 1, count).round().astype(int)]


def _macs(program: Program) -> int:
    """Multiply-accumulates of the largest variant for a batch of one; it is also what makes the others' caches."""
    return max(macs_by_variant(program.variants).values())


def _inputs(
    program: Program, variant: str, step: Step, samples: int, generator: np.random.Generator
) -> dict[str, torch.Tensor]:
    """Inputs of one step: noise as the latent, every class in turn, and caches that computing steps make of that.

    Where variants take both halves of guidance in one batch, the number of samples is even.
    """
    spec = program.facts[ModelSpec]
    if program.facts[StepPlan].paired:
        samples += samples % HALVES
    latent = torch.from_numpy(generator.standard_normal((samples, *spec.latent_shape), dtype=np.float32))
    inputs = _without_caches(program, variant, step, latent)
    missing = [name for name in program.variants[variant].interface.input_names if name not in inputs]
    if missing:
        caches = _caches(program, step, latent)
        inputs |= {name: caches[name] for name in missing}
    return inputs


def _without_caches(program: Program, variant: str, step: Step, latent: torch.Tensor) -> dict[str, torch.Tensor]:
    spec, samples = program.facts[ModelSpec], len(latent)
    labels = [spec.null_class, *range(spec.class_count)]
    inputs = {
        "latent": latent,
        "timestep": torch.full((samples,), step.timestep, dtype=torch.float32),
        "class_label": torch.tensor([labels[index % len(labels)] for index in range(samples)]),
        "group": torch.tensor(step.group),
        "row": torch.tensor(step.row),
    }
    return program.prepared(variant, inputs)


def _caches(program: Program, step: Step, latent: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the steps that computed last before a step leave in the state of a request."""
    plan, ages = program.facts[StepPlan], depths(program.interfaces.values())
    earlier = plan.steps[: plan.index_of(step.timestep)]
    writing = [other for other in earlier if len(program.variants[other.variant].interface.outputs) > 1]
    state: dict[str, object] = {}
    for other in writing[-1 - max(ages.values(), default=0) :]:
        outputs = program.run(other.variant, _without_caches(program, other.variant, other, latent))
        remember(state, outputs, ages)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _perturbed(latent: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    noise = generator.standard_normal(tuple(latent.shape), dtype=np.float32)
    return latent * (1 + PERTURBATION * torch.from_numpy(noise))


def _distances(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> list[float]:
    """Relative L2 distance per sample."""
    wide = [values.astype(np.float64).reshape(len(values), -1) for values in (found, expected)]
    norms = np.maximum(np.linalg.norm(wide[1], axis=1), np.finfo(np.float32).tiny)
    distances = np.linalg.norm(wide[0] - wide[1], axis=1) / norms
    return [float(distance) for distance in np.nan_to_num(distances, nan=NO_NUMBER, posinf=NO_NUMBER)]


def _root_mean_square(distances: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(distances))))
