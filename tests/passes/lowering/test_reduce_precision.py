"""reduce-precision: 16 bits where nothing is quantized, except where digits count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from qcgraph.errors import ContractError
from qcgraph.facts import Precision, precision_of
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.ir.serialize import program_from_json, program_to_json
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.calibration import sample_calibration
from qcgraph.sampling.runner import Array

Run = Callable[[str, Program], Program]
QUANTIZED = "calibrate{trajectories=2},plan-quant{symmetric=true},insert-qdq,lower-linear,reference-scales"
WIDE = ("latent", "timestep", "noise_prediction")
LINEAR = torch.ops.aten.linear.default
HALVES = [("float16", "f16", 2.0**-10), ("bfloat16", "bf16", 2.0**-7)]


@pytest.fixture(scope="module")
def quantized(cached: Program, run: Run) -> Program:
    return run(f"{QUANTIZED},fit-compensation,insert-compensation", run("calibrate{trajectories=2}", cached))


@pytest.fixture(scope="module")
def reduced(quantized: Program, run: Run) -> Program:
    return run("plan-precision,reduce-precision", quantized)


def drawn(program: Program) -> Array:
    return sample_calibration(TorchRunner(program), program.facts[StepPlan], program.facts[ModelSpec], 4, 7)


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
    golden_diff("reduce-precision", cached, run("plan-precision,reduce-precision", cached))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "short", "spacing"), HALVES)
def test_samples_are_those_of_the_program_up_to_its_spacing(
    cached: Program, run: Run, dtype: str, short: str, spacing: float
) -> None:
    reduced = run(f"plan-precision{{dtype={dtype}}},reduce-precision", cached)
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
    reduced = run("hoist-adaln,plan-precision,reduce-precision", cached)
    specs = {spec.name: spec.dtype for spec in reduced.variants["prepare_full"].interface.outputs}
    assert specs == {"modulation": "f16"}
    assert torch.isfinite(torch.from_numpy(drawn(reduced))).all()


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["insert-forecast,fit-forecast", "plan-quant{symmetric=true},insert-qdq"])
def test_other_pipelines_are_reduced_too(cached: Program, run: Run, pipeline: str) -> None:
    program = run(f"calibrate{{trajectories=2}},{pipeline}", cached)
    assert 0 < distance(run("plan-precision,reduce-precision", program), program) < 0.01


def planned(program: Program, dtype: str, **other: tuple[str, ...]) -> Program:
    """The program with a hand-written plan in which these nodes alone stay in float32."""
    return program.with_facts(Precision(dtype, 1.0, dict.fromkeys(program.variants, ()) | other))


def test_float32_is_exact(cached: Program, run: Run) -> None:
    program = run("reduce-precision", planned(cached, "f32"))
    assert program.variants == cached.variants
    assert program.constants == cached.constants
    assert precision_of(program.facts) == "f32"


def test_only_a_program_that_was_reduced_is_said_to_be(cached: Program, run: Run) -> None:
    program = run("plan-precision{dtype=bfloat16}", cached)
    assert precision_of(program.facts) == "f32"
    assert precision_of(run("reduce-precision", program).facts) == "bf16"


def test_the_plan_decides_what_stays_in_float32(cached: Program, run: Run) -> None:
    program = run("plan-precision{dtype=bfloat16}", cached)
    plan = program.facts[Precision]
    linear = next(node.name for node in cached.variants["full"].graph.nodes if node.target is LINEAR)
    widened = replace(plan, wide=plan.wide | {"full": (*plan.wide["full"], linear)})
    reduced = run("reduce-precision", program.with_facts(widened))
    nodes = (node for node in reduced.variants["full"].graph.nodes if node.target is LINEAR)
    assert [node.name for node in nodes if node.meta["val"].dtype is torch.float32] == [linear]


@pytest.mark.parametrize(
    ("other", "where", "says"),
    [
        ({"full": ("gone",)}, "%gone of full", "planned to stay in float32 and not in the graph"),
        ({"elsewhere": ()}, "elsewhere", "is planned and not in the program"),
    ],
    ids=["node", "variant"],
)
def test_a_plan_that_does_not_fit_is_refused(
    cached: Program, run: Run, other: dict[str, tuple[str, ...]], where: str, says: str
) -> None:
    with pytest.raises(ContractError, match=says) as caught:
        run("reduce-precision", planned(cached, "f16", **other))
    assert str(caught.value.where).endswith(where)
    assert "plan-precision" in str(caught.value.hint)


def test_a_variant_without_a_plan_is_refused(cached: Program, run: Run) -> None:
    with pytest.raises(ContractError, match="is not in the plan") as caught:
        run("reduce-precision", cached.with_facts(Precision("f16", 1.0, {"full": ()})))
    assert str(caught.value.where).endswith("reuse")


def test_it_is_read_back_as_it_was_written(reduced: Program) -> None:
    again = program_from_json(program_to_json(reduced), reduced.constants)
    assert again.text == reduced.text
