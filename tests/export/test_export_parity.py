"""Parity in 16 bits: graphs of reduced programs compute what these compute, and a fault is found all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from qcgraph.export.check import Check
from qcgraph.export.emit import emit_onnx, tensor_places
from qcgraph.export.targets import TARGETS
from qcgraph.export.verify import verify_export
from qcgraph.ir.program import Program
from qcgraph.ir.serialize import WEIGHTS
from qcgraph.pipeline import Pipeline
from qcgraph.progress import Progress

TARGET = TARGETS["tensorrt-rtx"]
PIPELINE = (
    "plan-cache{interval=3},insert-cache,calibrate{trajectories=2},group-timesteps{groups=3},"
    "plan-quant{symmetric=true activation-bits=6},insert-qdq,lower-linear,reference-scales"
)
SITE = "blocks.1.mlp.fc1"
Export = Callable[[Program], tuple[Program, Path]]


@pytest.fixture(scope="module")
def quantized(captured: Program) -> Program:
    return Pipeline.parse(PIPELINE).run(captured)


@pytest.fixture
def export(quantized: Program, tmp_path: Path) -> Callable[[str], Program]:
    def write(dtype: str) -> Program:
        program = Pipeline.parse(f"reduce-precision{{dtype={dtype}}}").run(quantized)
        emit_onnx(program, tmp_path, TARGET.opset, Progress(), **TARGET.forms)
        return program

    return write


def verified(program: Program, folder: Path) -> dict[tuple[str, str], Check]:
    checks = verify_export(program, folder, TARGET, program.interfaces, Progress())
    return {(check.variant, check.name): check for check in checks}


def test_float16_graphs_pass(export: Callable[[str], Program], tmp_path: Path) -> None:
    checks = verified(export("float16"), tmp_path)
    assert not [key for key, check in checks.items() if check.failed]
    compared = {name for _, name in checks if "parity" in name or "exactness" in name}
    assert compared == {"site exactness", "parity of noise_prediction", "parity of cache_0"}
    types = {item.data_type for item in onnx.load(tmp_path / "full.onnx", load_external_data=False).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types


def test_float8_graphs_pass(captured: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "qcgraph.export.emit.INLINE_BYTES", 64
    )  # zero points stand in the weights file, as large ones do
    pipeline = PIPELINE.replace("symmetric=true activation-bits=6", "format=fp8")
    program = Pipeline.parse(f"{pipeline},reduce-precision{{dtype=float16}}").run(captured)
    emit_onnx(program, tmp_path, TARGET.opset, Progress(), **TARGET.forms)
    assert not [check for check in verified(program, tmp_path).values() if check.failed]
    types = {item.data_type for item in onnx.load(tmp_path / "full.onnx", load_external_data=False).graph.initializer}
    assert onnx.TensorProto.FLOAT8E4M3FN in types
    assert onnx.TensorProto.INT8 not in types


def test_altered_scale_is_found_in_float16(export: Callable[[str], Program], tmp_path: Path) -> None:
    program = export("float16")
    offset, length = tensor_places(tmp_path / WEIGHTS)[f"{SITE}.weight_scale_f16"]
    content = bytearray((tmp_path / WEIGHTS).read_bytes())
    content[offset + 1] ^= 4  # the exponent of the first channel's scale
    (tmp_path / WEIGHTS).write_bytes(content)
    failed = [check for check in verified(program, tmp_path).values() if check.failed]
    assert length > 2
    assert any(SITE in check.detail for check in failed)


def test_what_onnx_runtime_cannot_run_is_said_and_not_passed(export: Callable[[str], Program], tmp_path: Path) -> None:
    checks = verified(export("bfloat16"), tmp_path)
    parity = [check for (_, name), check in checks.items() if name == "parity"]
    assert [check.variant for check in parity] == ["full", "reuse"]
    assert all(check.passed is None and "bf16" in check.detail for check in parity)
    assert not [check for check in checks.values() if check.failed]
