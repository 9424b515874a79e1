"""Parity in 16 bits: graphs of reduced programs compute what these compute, and a fault is found all the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from qcgraph.capture.capture import capture
from qcgraph.export.check.check import Check, failure_text
from qcgraph.export.check.parity import FUNCTIONS, MAGNIFIED, ROUNDINGS, _Flips, _limit, check_outputs
from qcgraph.export.check.verify import verify_export
from qcgraph.export.onnx.emit import emit_onnx, tensor_places
from qcgraph.export.run.onnxruntime import OnnxRuntimeRunner
from qcgraph.export.targets import TARGETS
from qcgraph.ir.program import Program
from qcgraph.ir.serialize import WEIGHTS
from qcgraph.models.dit import DiT, initialize_random
from qcgraph.models.geometry import DiTConfig
from qcgraph.pipeline import Pipeline
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import ModelSpec
from qcgraph.progress import Progress

TARGET = TARGETS["tensorrt-rtx"]
CONSTANT_SCALES = (
    "plan-cache{interval=3},insert-cache,calibrate{trajectories=2},group-timesteps{groups=3},"
    "plan-quant{symmetric=true activation-bits=6},insert-qdq,lower-linear,reference-scales"
)
SITE = "blocks.1.mlp.fc1"


@pytest.fixture(scope="module")
def float16(constant_scales: Program, tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Path]:
    return exported(
        Pipeline.parse("plan-precision{dtype=float16},reduce-precision").run(constant_scales),
        tmp_path_factory.mktemp("f16"),
    )


@pytest.fixture
def copy(float16: tuple[Program, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(float16[1], tmp_path / "copy"))


def exported(program: Program, folder: Path) -> tuple[Program, Path]:
    emit_onnx(program, folder, TARGET.opset, Progress(), **TARGET.forms)
    return program, folder


def verified(program: Program, folder: Path) -> dict[tuple[str, str], Check]:
    checks = verify_export(program, folder, TARGET, program.interfaces, Progress())
    return {(check.variant, check.name): check for check in checks}


@pytest.mark.slow
def test_float16_graphs_pass(float16: tuple[Program, Path]) -> None:
    program, folder = float16
    checks = verified(program, folder)
    assert not failure_text(checks.values())
    compared = {name for _, name in checks if "parity" in name or "exactness" in name}
    assert compared == {"site exactness", "parity of noise_prediction", "parity of cache_0"}
    types = {item.data_type for item in onnx.load(folder / "full.onnx", load_external_data=False).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types


@pytest.mark.slow
def test_quotients_in_16_bits_pass(float16: tuple[Program, Path], copy: Path) -> None:
    """What ONNX Runtime 1.32 makes of a graph that does not say in what its quantizers divide; 1.31 divides wide."""
    model = onnx.load(copy / "full.onnx", load_external_data=False)
    quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantizers) == 8
    for node in quantizers:
        (precision,) = (attribute for attribute in node.attribute if attribute.name == "precision")
        assert precision.i == onnx.TensorProto.FLOAT
        node.attribute.remove(precision)
    onnx.save(model, copy / "full.onnx")
    checks = verified(float16[0], copy)
    assert not failure_text(checks.values())
    assert checks["full", "site exactness"].limit < 5e-3


@pytest.mark.slow
def test_float8_graphs_pass(captured: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "qcgraph.export.onnx.emit.INLINE_BYTES", 64
    )  # zero points stand in the weights file, as large ones do
    pipeline = CONSTANT_SCALES.replace("symmetric=true activation-bits=6", "format=fp8")
    program = Pipeline.parse(f"{pipeline},plan-precision{{dtype=float16}},reduce-precision").run(captured)
    exported(program, tmp_path)
    assert not failure_text(verified(program, tmp_path).values())
    types = {item.data_type for item in onnx.load(tmp_path / "full.onnx", load_external_data=False).graph.initializer}
    assert onnx.TensorProto.FLOAT8E4M3FN in types
    assert onnx.TensorProto.INT8 not in types


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor", "change", "dtype"),
    [
        ("weight_scale_f16", lambda values: values * np.float16(1.03), np.float16),
        ("input_scale_ratio_f16", lambda values: values[::-1], np.float16),
        ("weight_codes_t", lambda values: np.roll(values, 1), np.int8),
    ],
)
def test_a_fault_is_found_in_float16(
    float16: tuple[Program, Path], copy: Path, tensor: str, change: Callable[[np.ndarray], np.ndarray], dtype: type
) -> None:
    places = tensor_places(copy / WEIGHTS)
    (name,) = (name for name in places if name.startswith(SITE) and name.endswith(tensor))
    offset, length = places[name]
    content = bytearray((copy / WEIGHTS).read_bytes())
    values = np.frombuffer(bytes(content[offset : offset + length]), dtype)
    content[offset : offset + length] = change(values).astype(dtype).tobytes()
    (copy / WEIGHTS).write_bytes(content)
    text = failure_text(verified(float16[0], copy).values())
    assert f"too far: {SITE} " in text
    assert "at most" in text.splitlines()[0]


@pytest.fixture(scope="module")
def deep() -> Callable[[int], Program]:
    """Makes random models of four blocks, which are traced once: the graph depends on no weight."""
    config = DiTConfig(input_size=8, patch_size=2, channels=2, width=64, depth=4, heads=2, class_count=5)
    module = DiT(config).eval().requires_grad_(False)
    initialize_random(module, torch.Generator().manual_seed(0))
    spec = ModelSpec.class_conditional("random", (2, 8, 8), 5, 5, output_channels=4)
    traced = capture(module, spec, ("x", "t", "y"))

    def make(seed: int) -> Program:
        initialize_random(module, torch.Generator().manual_seed(seed))
        state = module.state_dict()
        program = replace(traced, constants={name: state[name].clone() for name in traced.constants})
        return program.with_facts(make_step_plan("ddim", 2, 1.0, spec.noise_schedule, program.constants_digest))

    return make


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_flipped_codes_are_no_fault(seed: int, deep: Callable[[int], Program], tmp_path: Path) -> None:
    """Of deep random models, in which one flipped code flips others, hardly a sample is alike in two runtimes."""
    program = deep(seed)
    quantize = "calibrate{trajectories=2},group-timesteps{groups=1},plan-quant{pair-high=128},insert-qdq,lower-linear"
    program = Pipeline.parse(quantize).run(program)
    emit_onnx(program, tmp_path, TARGET.opset, Progress(), integer_products=True)
    checks = list(check_outputs(program, "main", OnnxRuntimeRunner(tmp_path, program.interfaces)))
    assert not failure_text(checks)
    assert "flipped codes" in checks[0].detail
    assert checks[0].limit < 1e-2  # a wrong bias or a swapped axis of what is not quantized is far beyond


@pytest.mark.slow
def test_what_onnx_runtime_cannot_run_is_said_and_not_passed(constant_scales: Program, tmp_path: Path) -> None:
    program = Pipeline.parse("plan-precision{dtype=bfloat16},reduce-precision").run(constant_scales)
    checks = verified(*exported(program, tmp_path))
    parity = [check for (_, name), check in checks.items() if name == "parity"]
    assert [check.variant for check in parity] == ["full", "reuse"]
    assert all(check.passed is None and "bf16" in check.detail for check in parity)
    assert not [check for check in checks.values() if check.failed]


SAMPLES, ROUNDED, FLIPPED = 512, 2e-7, 1e-3


def limit(*, seen: int, seen_magnified: int) -> float:
    """The limit where so many samples see a flip, and so many with more noise."""
    flips = _Flips()
    flips.add([FLIPPED] * seen + [0.0] * (SAMPLES - seen), 1.0)
    flips.add([FLIPPED] * seen_magnified + [0.0] * (SAMPLES - seen_magnified), MAGNIFIED)
    return _limit([ROUNDED] * SAMPLES, flips)


def off_in(samples: int) -> float:
    """The root mean square where so many samples are off by a flip."""
    return FLIPPED * (samples / SAMPLES) ** 0.5


def test_a_flip_that_only_the_graph_makes_is_allowed() -> None:
    """The program saw none in its samples, but with more noise a few: one or two are what chance makes."""
    assert off_in(1) < limit(seen=0, seen_magnified=8) < off_in(8)
    assert off_in(2) < limit(seen=0, seen_magnified=32) < off_in(16)


def test_where_nothing_can_flip_only_roundings_are_allowed() -> None:
    assert limit(seen=0, seen_magnified=0) == pytest.approx(ROUNDINGS * ROUNDED + FUNCTIONS)


def test_frequent_flips_are_counted_as_they_come() -> None:
    """All samples flip with more noise, which says nothing about how many flip without."""
    assert off_in(100) < limit(seen=100, seen_magnified=SAMPLES) < off_in(300)
