"""reduce-precision: 16 bits where nothing is quantized, except where digits count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from qcgraph.errors import UsageError
from qcgraph.facts import Precision
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.ir.serialize import program_from_json, program_to_json
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.calibration import sample_calibration
from qcgraph.sampling.loop import Array

Run = Callable[[str, Program], Program]
QUANTIZED = "calibrate{trajectories=2},plan-quant{symmetric=true},insert-qdq,lower-linear,reference-scales"
WIDE = ("latent", "timestep", "noise_prediction")
HALVES = [("float16", "f16", 2.0**-10), ("bfloat16", "bf16", 2.0**-7)]


@pytest.fixture(scope="module")
def quantized(cached: Program, run: Run) -> Program:
    return run(f"{QUANTIZED},fit-compensation,insert-compensation", run("calibrate{trajectories=2}", cached))


@pytest.fixture(scope="module")
def reduced(quantized: Program, run: Run) -> Program:
    return run("reduce-precision", quantized)


def drawn(program: Program) -> Array:
    return sample_calibration(TorchRunner(program), program.facts[StepPlan], program.facts[ModelSpec], 4, 7)


def with_large_values(program: Program, factor: float) -> Program:
    """The program, its first embedding this much larger; nothing else of it overflows in float32."""
    constants = dict(program.constants)
    constants["pos_embed"] = constants["pos_embed"] + factor
    return replace(program, constants=constants)


def types(program: Program, *ops: str) -> set[str]:
    """The types of the values that nodes of these ops, in the full variant, have."""
    nodes = (node for node in program.variants["full"].graph.nodes if isinstance(node.target, torch._ops.OpOverload))
    values = (node.meta["val"] for node in nodes if node.target._schema.name.split("::")[-1] in ops)
    return {str(value.dtype).removeprefix("torch.") for value in values}


def distance(program: Program, other: Program) -> float:
    """Of what two programs draw, relative."""
    found, expected = drawn(program), drawn(other)
    assert found.dtype == expected.dtype
    return float(((found - expected) ** 2).mean() ** 0.5 / (expected**2).mean() ** 0.5)


@pytest.mark.slow
def test_golden(cached: Program, run: Run, golden_diff: Callable[..., None]) -> None:
    golden_diff("reduce-precision", cached, run("reduce-precision", cached))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "short", "spacing"), HALVES)
def test_samples_are_those_of_the_program_up_to_its_spacing(
    cached: Program, run: Run, dtype: str, short: str, spacing: float
) -> None:
    reduced = run(f"reduce-precision{{dtype={dtype}}}", cached)
    assert reduced.facts[Precision].dtype == short
    assert spacing / 50 < distance(reduced, cached) < 5 * spacing


def test_interfaces_keep_latent_timestep_and_prediction_in_float32(reduced: Program) -> None:
    floats = {
        (spec.name, spec.dtype)
        for interface in reduced.interfaces.values()
        for spec in (*interface.inputs, *interface.outputs)
        if spec.dtype[0] in "fb"
    }
    assert floats == {*((name, "f32") for name in WIDE), ("cache_0", "f16")}


def test_everything_but_the_sines_and_the_compensation_is_16_bits(reduced: Program) -> None:
    assert types(reduced, "linear", "matmul", "layer_norm", "scaled_dot_product_attention", "gelu") == {"float16"}
    assert types(reduced, "sin", "cos", "compensate") == {"float32"}
    assert types(reduced, "dequantize") == {"float16"}
    assert types(reduced, "quantize") == {"int8"}


def test_constants_are_16_bits_and_none_is_there_twice(reduced: Program) -> None:
    wide = {name for name, value in reduced.constants.items() if value.dtype == torch.float32}
    assert {name.split(".")[0] for name in wide} <= {"compensation"}
    names = {name.removesuffix("_f16") for name in reduced.constants}
    assert len(names) == len(reduced.constants)


@pytest.mark.slow
def test_modulation_is_16_bits(cached: Program, run: Run) -> None:
    reduced = run("hoist-adaln,reduce-precision", cached)
    specs = {spec.name: spec.dtype for spec in reduced.variants["prepare_full"].interface.outputs}
    assert specs == {"modulation": "f16"}
    assert torch.isfinite(torch.from_numpy(drawn(reduced))).all()


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["insert-forecast,fit-forecast", "plan-quant{symmetric=true},insert-qdq"])
def test_other_pipelines_are_reduced_too(cached: Program, run: Run, pipeline: str) -> None:
    program = run(f"calibrate{{trajectories=2}},{pipeline}", cached)
    assert 0 < distance(run("reduce-precision", program), program) < 0.01


@pytest.mark.slow
def test_auto_takes_the_type_that_can_hold_what_was_seen(cached: Program, run: Run) -> None:
    assert run("reduce-precision", cached).facts[Precision].dtype == "f16"
    large = run("reduce-precision", with_large_values(cached, 2e4))
    fact = large.facts[Precision]
    assert fact.dtype == "bf16"
    assert fact.largest >= 2e4
    (refusal,) = large.history[-1].refusals
    assert refusal.where == "float16"
    assert "2.01e+04" in refusal.reason
    assert large.variants["full"].interface.outputs[1].dtype == "bf16"


def test_float16_that_would_overflow_is_refused(cached: Program, run: Run) -> None:
    with pytest.raises(UsageError, match="values reach 2") as caught:
        run("reduce-precision{dtype=float16}", with_large_values(cached, 2e4))
    assert caught.value.hint == "give bfloat16, or auto"


@pytest.mark.parametrize(("options", "message"), [("dtype=float8", "float8"), ("trajectories=0", "trajectories 0")])
def test_wrong_options(cached: Program, run: Run, options: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(f"reduce-precision{{{options}}}", cached)


def test_it_is_read_back_as_it_was_written(reduced: Program) -> None:
    again = program_from_json(program_to_json(reduced), reduced.constants)
    assert again.text == reduced.text
