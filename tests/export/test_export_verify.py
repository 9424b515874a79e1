"""Verification: sound exports pass with tight figures, and every fault that is put in is found and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qcgraph.export.emit import tensor_places
from qcgraph.export.targets import TARGETS, Target
from qcgraph.export.verify import EXACT, SAMPLES, Check, verify_export
from qcgraph.facts import QuantPlan
from qcgraph.ir.serialize import WEIGHTS
from qcgraph.progress import Progress

TARGET = TARGETS["onnxruntime-cpu"]
SITE = "blocks.1.mlp.fc1"


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcgraph.export.verify.SAMPLES", 8)


def verify(export: Any, folder: Path | None = None, target: Target = TARGET) -> dict[tuple[str, str], Check]:
    checks = verify_export(export.program, folder or export.folder, target, export.interfaces, Progress())
    return {(check.variant, check.name): check for check in checks}


def failed(checks: dict[tuple[str, str], Check]) -> list[tuple[str, str]]:
    return [key for key, check in checks.items() if not check.passed]


@pytest.fixture
def copy(compiled: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compiled.folder, tmp_path / "copy"))


def change_tensor(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray], dtype: type) -> None:
    """Change a tensor in the weights file, where all graphs read it."""
    offset, length = tensor_places(folder / WEIGHTS)[name]
    with (folder / WEIGHTS).open("r+b") as stream:
        stream.seek(offset)
        values = change(np.frombuffer(stream.read(length), dtype))
        stream.seek(offset)
        stream.write(values.astype(dtype).tobytes())


def test_unquantized_graphs_are_exact(unquantized: Any) -> None:
    checks = verify(unquantized)
    assert failed(checks) == []
    parity = {key: check for key, check in checks.items() if key[1].startswith("parity")}
    assert set(parity) == {
        ("full", "parity of noise_prediction"),
        ("full", "parity of cache_0"),
        ("reuse", "parity of noise_prediction"),
    }
    assert all(check.value <= check.limit == EXACT for check in parity.values())


def test_quantized_graphs_pass(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcgraph.export.verify.SAMPLES", SAMPLES)
    checks = verify(compiled)
    assert failed(checks) == []
    assert checks["full", "int8 kernels"].detail == "8 linears in int8, none of them left in float"
    assert checks["full", "site exactness"].value < 1e-6
    assert checks["full", "weight codes"].value == TARGET.weight_high
    assert checks["reuse", "parity of noise_prediction"].limit == EXACT  # nothing is quantized in it
    assert ("reuse", "site exactness") not in checks


def test_target_without_graphs_has_no_checks(compiled: Any) -> None:
    assert verify(compiled, target=TARGETS["torch"]) == {}


def test_large_weight_code_is_found(compiled: Any, copy: Path) -> None:
    def change(codes: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(codes)) == 5, 127, codes)

    change_tensor(copy, f"{SITE}.weight_codes_t", change, np.int8)
    check = verify(compiled, copy)["full", "weight codes"]
    assert not check.passed
    assert (check.value, check.limit) == (127, TARGET.weight_high)
    assert check.detail == f"the largest code is 127, in {SITE}.weight_codes_t"


def test_scale_that_is_not_positive_is_found(compiled: Any, copy: Path) -> None:
    change_tensor(copy, f"{SITE}.weight_scale", lambda scale: -scale, np.float32)
    checks = verify(compiled, copy)
    assert checks["full", "scales and zero points"].detail.endswith(f"{SITE}.weight_scale")
    assert ("full", "scales and zero points") in failed(checks)


def test_asymmetric_codes_are_found_where_the_target_is_symmetric(compiled: Any) -> None:
    checks = verify(compiled, target=replace(TARGET, activation="symmetric"))
    assert failed(checks) == [("full", "scales and zero points")]
    assert f"{SITE}.input_zero_point" in checks["full", "scales and zero points"].detail


@pytest.mark.parametrize("together", [1, 3, 16])
def test_altered_scale_is_found_at_its_site(
    compiled: Any, copy: Path, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph alone is altered: one scale, by a thousandth. However many sites are compared at once."""
    monkeypatch.setattr("qcgraph.export.verify.TOGETHER", together)
    path = copy / "full.onnx"
    model = onnx.load(str(path), load_external_data=False)
    tensor = next(item for item in model.graph.initializer if item.name == f"{SITE}.weight_scale")
    scale = onnx.numpy_helper.to_array(tensor, str(copy)) * np.float32(1.001)
    tensor.CopyFrom(onnx.numpy_helper.from_array(scale, tensor.name))
    onnx.save(model, str(path))
    checks = verify(compiled, copy)
    assert ("full", "site exactness") in failed(checks)
    assert checks["full", "site exactness"].value == pytest.approx(1e-3, rel=0.1)
    assert f"too far: {SITE} 1.0e-03" in checks["full", "site exactness"].detail


def test_wrong_group_is_found(compiled: Any, copy: Path) -> None:
    """Scales of the groups in another order: every site is still a sound int8 linear, of another step."""
    change_tensor(copy, f"{SITE}.input_scale", lambda table: table[::-1], np.float32)
    assert ("full", "site exactness") in failed(verify(compiled, copy))


def test_linear_that_stays_in_float_is_found(unquantized: Any, compiled: Any) -> None:
    """The plan quantizes eight linears; the graph has them in floating point."""
    program = unquantized.program.with_facts(compiled.program.facts[QuantPlan])
    check = verify(replace(unquantized, program=program))["full", "int8 kernels"]
    assert not check.passed
    assert check.value == 8
    assert SITE in check.detail


def test_lost_kernel_is_found(not_lowered: Any) -> None:
    """Without the legalization, ONNX Runtime multiplies dequantized values in floating point."""
    checks = verify(not_lowered)
    assert not checks["main", "int8 kernels"].passed
    assert SITE in checks["main", "int8 kernels"].detail
    assert not checks["main", "site exactness"].passed
