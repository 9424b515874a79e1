"""Verification: sound exports pass with tight figures, and every fault that is put in is found and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qcgraph.export.check.check import Check
from qcgraph.export.check.exported_sites import parameters
from qcgraph.export.check.parity import ROUNDINGS, SAMPLES
from qcgraph.export.check.verify import verify_export
from qcgraph.export.onnx.emit import tensor_places
from qcgraph.export.targets import TARGETS, Target
from qcgraph.facts import QuantPlan
from qcgraph.ir.serialize import WEIGHTS
from qcgraph.progress import Progress

TARGET = TARGETS["onnxruntime-cpu"]
SITE = "blocks.1.mlp.fc1"
TOKENS = 16
INPUTS = 32  # of the site
TIGHT = 5e-6  # relative L2 of float32 arithmetic in a few dozen operators


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcgraph.export.check.parity.SAMPLES", 8)


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


@contextmanager
def altered(folder: Path) -> Iterator[onnx.GraphProto]:
    """The graph of the computing steps, to change; the weights stay as they are."""
    path = folder / "full.onnx"
    model = onnx.load(str(path), load_external_data=False)
    yield model.graph
    onnx.save(model, str(path))


def reader(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    """The one node that reads a value."""
    (node,) = (node for node in graph.node if name in node.input)
    return node


def test_unquantized_graphs_are_exact(unquantized: Any) -> None:
    checks = verify(unquantized)
    assert failed(checks) == []
    parity = {key: check for key, check in checks.items() if key[1].startswith("parity")}
    assert set(parity) == {
        ("full", "parity of noise_prediction"),
        ("full", "parity of cache_0"),
        ("reuse", "parity of noise_prediction"),
    }
    assert all(check.value <= check.limit < TIGHT for check in parity.values())
    assert all(f"{ROUNDINGS:g} times what the program rounds" in check.detail for check in parity.values())


def test_quantized_graphs_pass(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcgraph.export.check.parity.SAMPLES", SAMPLES)
    checks = verify(compiled)
    assert failed(checks) == []
    assert checks["full", "int8 kernels"].detail == "8 linears in int8, none of them left in float"
    assert checks["full", "site exactness"].value < 1e-6
    assert checks["full", "weight codes"].value <= TARGET.pair_high
    assert checks["full", "weight codes"].value > 64
    assert checks["reuse", "parity of noise_prediction"].limit < TIGHT  # nothing is quantized in it
    assert ("reuse", "site exactness") not in checks


def test_products_of_dequantized_values_pass(dequantizing: Any) -> None:
    checks = verify(dequantizing)
    assert failed(checks) == []
    assert checks["full", "int8 kernels"].detail == "8 linears in int8, none of them left in float"


def test_the_same_parameters_are_checked_in_both_forms(compiled: Any, dequantizing: Any) -> None:
    found, expected = (parameters(export.folder / "full.onnx") for export in (compiled, dequantizing))
    assert len(found.codes) == 8
    assert found.codes.keys() == expected.codes.keys()
    assert found.scales.keys() == expected.scales.keys()
    # Weight zero points are 0, and a product of integers does not read them.
    assert found.zero_points.keys() == {name for name in expected.zero_points if "weight" not in name}


def test_target_without_graphs_has_no_checks(compiled: Any) -> None:
    assert verify(compiled, target=TARGETS["torch"]) == {}


@pytest.mark.parametrize(
    ("rows", "codes", "passes"),
    [((4, 5), (127, 1), True), ((4, 5), (127, 2), False), ((4, 5), (-100, -29), False), ((4, 5), (127, -127), True)],
)
def test_a_large_sum_of_two_neighbours_is_found(
    compiled: Any, copy: Path, rows: tuple[int, int], codes: tuple[int, int], passes: bool
) -> None:
    def change(found: np.ndarray) -> np.ndarray:
        changed = found.reshape(INPUTS, -1).copy()
        changed[list(rows)] = np.array(codes)[:, None]
        return changed.ravel()

    change_tensor(copy, f"{SITE}.weight_codes_t", change, np.int8)
    check = verify(compiled, copy)["full", "weight codes"]
    assert check.passed is passes
    assert check.limit == TARGET.pair_high
    if not passes:
        assert check.value == 129
        assert check.detail == f"the largest sum of two codes is 129, in {SITE}.weight_codes_t"


def test_neighbours_of_different_pairs_may_both_be_large(compiled: Any, copy: Path) -> None:
    def change(found: np.ndarray) -> np.ndarray:
        changed = found.reshape(INPUTS, -1).copy()
        changed[4:8] = np.array([0, 127, 127, 0])[:, None]
        return changed.ravel()

    change_tensor(copy, f"{SITE}.weight_codes_t", change, np.int8)
    assert verify(compiled, copy)["full", "weight codes"].passed


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
    monkeypatch.setattr("qcgraph.export.check.parity.TOGETHER", together)
    with altered(copy) as graph:
        tensor = next(item for item in graph.initializer if item.name == f"{SITE}.weight_scale")
        scale = onnx.numpy_helper.to_array(tensor, str(copy)) * np.float32(1.001)
        tensor.CopyFrom(onnx.numpy_helper.from_array(scale, tensor.name))
    checks = verify(compiled, copy)
    assert ("full", "site exactness") in failed(checks)
    assert checks["full", "site exactness"].value == pytest.approx(1e-3, rel=0.1)
    assert f"too far: {SITE} 1.0e-03" in checks["full", "site exactness"].detail


def test_bias_outside_its_kernel_is_found(compiled: Any, copy: Path) -> None:
    """A bias of as many rows as there are tokens, which ONNX Runtime does not fuse: right, but not as fast."""
    with altered(copy) as graph:
        node = reader(graph, f"{SITE}.weight_codes_t")
        while node.op_type != "Add":
            node = reader(graph, node.output[0])
        bias = next(item for item in graph.initializer if item.name == node.input[1])
        rows = np.repeat(onnx.numpy_helper.to_array(bias, str(copy)), TOKENS, axis=1)
        graph.initializer.append(onnx.numpy_helper.from_array(rows, "rows"))
        node.input[1] = "rows"
    checks = verify(compiled, copy)
    assert failed(checks) == [("full", "int8 kernels")]
    assert checks["full", "int8 kernels"].detail == f"not in int8: the bias of {SITE}"


def test_product_of_integers_without_a_kernel_is_found(compiled: Any, copy: Path) -> None:
    """Of scales that are all known ONNX Runtime does not make a kernel."""
    with altered(copy) as graph:
        graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0.01), "known"))
        reader(graph, f"{SITE}.weight_scale").input[0] = "known"
    checks = verify(compiled, copy)
    assert checks["full", "int8 kernels"].detail == f"not in int8: {SITE}"
    assert f"too far: {SITE} " in checks["full", "site exactness"].detail


def test_wrong_zero_point_is_found_at_its_site(compiled: Any, copy: Path) -> None:
    with altered(copy) as graph:
        other = reader(graph, f"{SITE.replace('fc1', 'fc2')}.weight_codes_t")
        reader(graph, f"{SITE}.weight_codes_t").input[2] = other.input[2]
    check = verify(compiled, copy)["full", "site exactness"]
    assert not check.passed
    assert f"too far: {SITE} " in check.detail


def test_zero_point_of_a_weight_is_found(compiled: Any, copy: Path) -> None:
    with altered(copy) as graph:
        zero_points = np.ones(len(compiled.program.constants[f"{SITE}.weight_scale"]), np.int8)
        graph.initializer.append(onnx.numpy_helper.from_array(zero_points, "asymmetric"))
        reader(graph, f"{SITE}.weight_codes_t").input.append("asymmetric")
    checks = verify(compiled, copy)
    assert {("full", "scales and zero points"), ("full", "site exactness")} <= set(failed(checks))
    assert checks["full", "scales and zero points"].detail.endswith(": asymmetric")


def follow(graph: onnx.GraphProto, name: str, op_type: str) -> onnx.NodeProto:
    """The first node of a type that a value reaches through nodes that alone read each other."""
    node = reader(graph, name)
    while node.op_type != op_type:
        node = reader(graph, node.output[0])
    return node


def zero_point_of_product(graph: onnx.GraphProto) -> tuple[onnx.NodeProto, int]:
    """Let the product have a zero point of its own: one off in the quantizer as well would be none."""
    product = reader(graph, f"{SITE}.weight_codes_t")
    selection = onnx.NodeProto()
    selection.CopyFrom(next(node for node in graph.node if product.input[2] in node.output))
    selection.name = selection.output[0] = product.input[2] = "zero_point_of_product"
    graph.node.insert(list(graph.node).index(product), selection)
    return next(node for node in graph.node if node.name == selection.name), 0


Fault = tuple[Callable[[onnx.GraphProto], tuple[onnx.NodeProto, int]], Callable[[np.ndarray], np.ndarray]]
FAULTS: dict[str, Fault] = {
    "zero point off by one": (zero_point_of_product, lambda values: values + np.uint8(1)),
    "wrong bias": (lambda graph: (follow(graph, f"{SITE}.weight_codes_t", "Add"), 1), lambda values: values + 0.001),
    "codes of other outputs": (
        lambda graph: (reader(graph, f"{SITE}.weight_codes_t"), 1),
        lambda values: np.roll(values, 1, axis=1),
    ),
    "swapped axes": (
        lambda graph: (reader(graph, f"{SITE}.weight_codes_t"), 1),
        lambda values: values.T.reshape(values.shape),
    ),
    "scale": (lambda graph: (reader(graph, f"{SITE}.weight_scale"), 1), lambda values: values * np.float32(1.00001)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_at_its_site(compiled: Any, copy: Path, fault: str) -> None:
    find, change = FAULTS[fault]
    with altered(copy) as graph:
        node, position = find(graph)
        tensor = next(item for item in graph.initializer if item.name == node.input[position])
        values = onnx.numpy_helper.to_array(tensor, str(copy))
        graph.initializer.append(onnx.numpy_helper.from_array(change(values).astype(values.dtype), "faulty"))
        node.input[position] = "faulty"
        if fault.startswith(("codes", "swapped")):  # the site is found by them
            node.input[position] = f"{SITE}.weight_codes_t"
            graph.initializer[-1].name = node.input[position]
            graph.initializer.remove(tensor)
    check = verify(compiled, copy)["full", "site exactness"]
    assert not check.passed
    assert f" {SITE} " in check.detail.partition("too far:")[2]
    assert check.value > check.limit
    assert check.limit < TIGHT


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


@pytest.mark.slow
def test_forecasts_pass(forecasting: Any) -> None:
    """Variants that take what several computing steps left."""
    checks = verify(forecasting)
    assert failed(checks) == []
    assert {variant for variant, _ in checks} == {"full", "reuse", "reuse_1"}
    assert checks["reuse", "parity of noise_prediction"].value < TIGHT


@pytest.mark.slow
def test_a_forecast_of_another_step_is_found(forecasting: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(forecasting.folder, tmp_path / "copy"))
    change_tensor(folder, "forecast.cache_2", lambda table: np.roll(table, 1, axis=0), np.float32)
    assert ("reuse_1", "parity of noise_prediction") in failed(verify(forecasting, folder))


@pytest.mark.slow
def test_a_forecast_from_the_wrong_age_is_found(forecasting: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(forecasting.folder, tmp_path / "copy"))
    path = folder / "reuse.onnx"
    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        node.input[:] = ["cache_0" if name == "cache_0_age1" else name for name in node.input]
    onnx.save(model, str(path))
    assert failed(verify(forecasting, folder)) == [("reuse", "parity of noise_prediction")]
