"""Parity: an exported graph computes what its program computes, site by site and as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from qcgraph.cache_state import depths, remember
from qcgraph.errors import VerificationError
from qcgraph.export.check import NO_NUMBER, Check
from qcgraph.export.exported_sites import CutSites
from qcgraph.export.run_onnxruntime import OnnxRuntimeRunner
from qcgraph.facts import Precision, precision_of
from qcgraph.ir.ops import HALVES
from qcgraph.ir.program import Program
from qcgraph.ir.quantized_sites import QuantizedSite, record
from qcgraph.ir.structure import macs_by_variant
from qcgraph.spec import ModelSpec, preparation
from qcgraph.steps import Step, StepPlan

ROUNDING_FACTOR = 1.5  # how far above its rounding floor a graph may be
STANDARD_ERRORS = 3.0  # how far above that it must be for certain, over the samples that were compared
STEPS = 4  # steps of the plan that a variant is compared at, two for large models
SAMPLES = 256  # samples a step, fewer for large models; in a small one a rounding flips in few of them
MACS = 10e9  # multiply-accumulates that running the samples of a step once may cost
TOGETHER = 16  # sites whose values are held at once to compare them


@dataclass(frozen=True)
class Arithmetic:
    """What may differ where the same is computed in another order.

    Attributes:
        exact: relative L2 that a few operators stay below.
        perturbation: relative noise on the latent, about what one operator makes.
        speed: of PyTorch on a CPU, about; where it is slow, fewer samples are compared.
    """

    exact: float
    perturbation: float
    speed: float = 1.0

    @classmethod
    def of(cls, program: Program) -> Arithmetic:
        """That of a program's floating-point type."""
        return ARITHMETIC[precision_of(program.facts)]


# In 16 bits a rounding between two operators may be left out, which is half of the spacing of numbers.
ARITHMETIC = {
    "f32": Arithmetic(1e-5, 1e-6),
    "f16": Arithmetic(2 * 2.0**-10, 2.0**-10, speed=0.125),
    "bf16": Arithmetic(2 * 2.0**-7, 2.0**-7),
}


def check_sites(program: Program, variant: str, sites: Sequence[QuantizedSite], path: Path, *, exact: bool) -> Check:
    """Each site on its own computes what it computes in the program, given the same values.

    Args:
        program: what was exported.
        variant: which of its variants.
        sites: its quantized sites.
        path: the exported graph.
        exact: see `qcgraph.export.run_onnxruntime.session_options`.
    """
    limit = Arithmetic.of(program).exact
    try:
        parts = [sites[start : start + TOGETHER] for start in range(0, len(sites), TOGETHER)]
        cuts = [CutSites(path, part, exact=exact) for part in parts]
    except VerificationError as missing:
        return Check("site exactness", variant, passed=False, value=NO_NUMBER, limit=limit, detail=str(missing))
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
    over = [f"{name} {distance:.1e}" for name, distance in worst.items() if distance > limit]
    detail = f"relative L2 up to {value:.1e} over {len(sites)} sites"
    if over:
        detail += f"; too far: {', '.join(over)}"
    return Check("site exactness", variant, passed=not over, value=value, limit=limit, detail=detail)


def check_outputs(program: Program, variant: str, quantized: bool, runner: OnnxRuntimeRunner) -> Iterator[Check]:
    """The whole graph computes what the program computes, up to the roundings that quantization amplifies.

    A difference of one part in a million flips roundings, in block after block, and so does a rounding to 16 bits; what
    a program so differs from *itself*, when its latent is perturbed by that much, is the floor that no backend can be
    expected to be below. In a small model few samples see a flip; the limit allows for what the root mean square of so
    few may be off by chance.

    Args:
        program: what was exported.
        variant: which of its variants.
        quantized: whether it has quantized sites.
        runner: runs the exported graphs.
    """
    arithmetic, rounds = Arithmetic.of(program), quantized or Precision in program.facts
    errors: dict[str, list[float]] = {}
    floors: dict[str, list[float]] = {}
    samples = int(np.clip(MACS * arithmetic.speed // _macs(program), 1, SAMPLES * arithmetic.speed))
    for index, step in enumerate(_steps(program, variant)):
        generator = np.random.default_rng(1000 + index)
        inputs = _inputs(program, variant, step, samples, generator)
        expected = program.run(variant, inputs)
        found = runner.run_outputs(variant, {name: value.numpy() for name, value in inputs.items()}, {})
        nearby = program.run(variant, _perturbed(inputs, arithmetic, generator)) if rounds else {}
        for name, tensor in expected.items():
            errors.setdefault(name, []).extend(_distances(found[name].numpy(), tensor.numpy()))
            if rounds:
                floors.setdefault(name, []).extend(_distances(nearby[name].numpy(), tensor.numpy()))
    for name, distances in errors.items():
        limit = _limit(distances, floors.get(name, []), arithmetic.exact)
        value = _root_mean_square(distances)
        text = f"relative L2 {value:.1e} over {len(distances)} samples"
        if rounds:
            text += f", rounding floor {_root_mean_square(floors[name]):.1e}"
        yield Check(f"parity of {name}", variant, passed=value <= limit, value=value, limit=limit, detail=text)


def _limit(distances: Sequence[float], floors: Sequence[float], exact: float) -> float:
    """What the root mean square of the distances must not exceed."""
    if not floors:
        return exact
    squares, floor_squares = np.square(distances), ROUNDING_FACTOR**2 * np.square(floors)
    chance = np.sqrt((np.var(squares) + np.var(floor_squares)) / len(squares))
    return float(np.sqrt(max(exact**2, floor_squares.mean()) + STANDARD_ERRORS * chance))


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


def _perturbed(
    inputs: Mapping[str, torch.Tensor], arithmetic: Arithmetic, generator: np.random.Generator
) -> dict[str, torch.Tensor]:
    """The inputs of a step, with the latent and the cache tensors a little different."""
    found = dict(inputs)
    for name, value in inputs.items():
        if value.is_floating_point() and name != "timestep":
            noise = torch.from_numpy(generator.standard_normal(tuple(value.shape), dtype=np.float32))
            found[name] = (value * (1 + arithmetic.perturbation * noise)).to(value.dtype)
    return found


def _distances(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> list[float]:
    """Relative L2 distance per sample."""
    wide = [values.astype(np.float64).reshape(len(values), -1) for values in (found, expected)]
    norms = np.maximum(np.linalg.norm(wide[1], axis=1), np.finfo(np.float32).tiny)
    distances = np.linalg.norm(wide[0] - wide[1], axis=1) / norms
    return [float(distance) for distance in np.nan_to_num(distances, nan=NO_NUMBER, posinf=NO_NUMBER)]


def _root_mean_square(distances: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(distances))))
