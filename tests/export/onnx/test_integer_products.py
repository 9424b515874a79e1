"""Products of integers compute what products of dequantized values compute, with the bias inside the kernel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxscript import ir

from qcgraph.export.onnx.integer_products import multiply_integers
from qcgraph.export.run.onnxruntime import OptimizedGraph

TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
graph (float[B,4,16] x, int64 group) => (float[B,4,32] y) {{
  {scale}
  zero_point = Gather (zero_points, group)
  codes = QuantizeLinear (x, scale, zero_point)
  values = DequantizeLinear (codes, scale, zero_point)
  weight = DequantizeLinear <axis = {axis}> (weight_codes, weight_scale, weight_zero_point)
  product = MatMul ({values}, weight)
  y = Add (product, bias)
}}
"""
SELECTED = "scale = Gather (scales, group)"
CODES = np.random.default_rng(0).integers(-64, 65, (16, 32))
REST = {
    "scales": np.array([0.01, 0.03], np.float32),
    "zero_points": np.array([100, 131], np.uint8),
    "weight_scale": np.linspace(0.001, 0.02, 32, dtype=np.float32),
    "weight_zero_point": np.zeros(32, np.int8),
    "bias": np.linspace(-3, 3, 32, dtype=np.float32).reshape(1, 1, 32),
}


def model_of(
    scale: str = SELECTED, axis: int = 1, values: str = "values", text: str = TEXT, **changed: np.ndarray
) -> ir.Model:
    proto = onnx.parser.parse_model(text.format(scale=scale, axis=axis, values=values))
    tensors = {"weight_codes": CODES.astype(np.int8), **REST, **changed}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in tensors.items())
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True))


def run(model: ir.Model, group: int) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((2, 4, 16), dtype=np.float32)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    result = session.run(None, {"x": x, "group": np.array(group)})[0]
    assert isinstance(result, np.ndarray)
    return result


def kernels(model: ir.Model, folder: Path) -> list[tuple[str, tuple[str, ...]]]:
    """What ONNX Runtime makes of a model: nodes and their inputs."""
    onnx.save(ir.to_proto(model), str(folder / "model.onnx"))
    return [(node.op, node.inputs) for node in OptimizedGraph.of(folder / "model.onnx").nodes]


def test_the_bias_is_inside_the_kernel(tmp_path: Path) -> None:
    """Of the product of dequantized values it is outside."""
    inputs = ("codes", "weight_codes", "scale", "weight_scale", "zero_point")
    model = model_of()
    before = kernels(model, tmp_path)
    assert ("MatMulIntegerToFloat", (*inputs, "weight_zero_point")) in before
    assert "Add" in [op for op, _ in before]
    assert multiply_integers(model) == 1
    after = kernels(model, tmp_path)
    assert ("MatMulIntegerToFloat", (*inputs, "", "bias")) in after
    assert [op for op, _ in after] == ["Gather", "Gather", "QuantizeLinear", "MatMulIntegerToFloat"]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"bias": REST["bias"].reshape(32)},
        {"weight_scale": np.float32(0.01), "weight_zero_point": np.int8(0)},
        {"weight_zero_point": np.arange(32).astype(np.int8)},
    ],
    ids=["row", "vector", "one weight scale", "weight zero points"],
)
def test_the_result_is_the_same(changed: dict[str, np.ndarray], group: int) -> None:
    expected, model = run(model_of(**changed), group), model_of(**changed)
    assert multiply_integers(model) == 1
    assert np.linalg.norm(run(model, group) - expected) <= 1e-6 * np.linalg.norm(expected)


def test_values_that_remain_keep_their_names() -> None:
    model = model_of()
    multiply_integers(model)
    nodes = {node.outputs[0].name: node.op_type for node in model.graph}
    assert {"codes": "QuantizeLinear", "product": "Mul", "y": "Add"}.items() <= nodes.items()
    assert not {"values", "weight"} & nodes.keys()


@pytest.mark.parametrize(
    "options",
    [
        {"scale": "scale = Identity (one_scale)", "one_scale": np.float32(0.01)},
        {"axis": 0, "weight_scale": np.ones(16, np.float32), "weight_zero_point": np.zeros(16, np.int8)},
        {"values": "x"},
        {"zero_points": np.zeros(2, np.int8)},
    ],
    ids=["known scale", "scales of inputs", "one operand in float", "int8 activation"],
)
def test_another_form_is_left_as_it_is(options: dict[str, object]) -> None:
    model = model_of(**options)  # type: ignore[arg-type]
    if "one_scale" in options:  # as the exporter has it: the tensor itself
        identity = next(node for node in model.graph if node.op_type == "Identity")
        ir.convenience.replace_all_uses_with(identity.outputs[0], identity.inputs[0])
    before = [node.op_type for node in model.graph]
    assert multiply_integers(model) == 0
    assert [node.op_type for node in model.graph] == before


TWICE = TEXT.replace(
    "  y = Add (product, bias)",
    "  other_weight = DequantizeLinear <axis = 1> (other_codes, other_scale, weight_zero_point)\n"
    "  other = MatMul (values, other_weight)\n"
    "  sum = Add (product, other)\n"
    "  y = Add (sum, bias)",
)


@pytest.mark.parametrize(("factor", "count"), [(2, 2), (1, 1)], ids=["other scales", "equal scales"])
def test_equal_scales_keep_their_kernels(factor: int, count: int, tmp_path: Path) -> None:
    """ONNX Runtime would merge the products of equal scales, and find no kernel in what shares them."""
    scale = np.float32(factor) * REST["weight_scale"]
    tensors = {"other_codes": CODES[::-1].astype(np.int8), "other_scale": scale}
    expected, model = run(model_of(text=TWICE, **tensors), 1), model_of(text=TWICE, **tensors)
    assert multiply_integers(model) == count
    assert [op for op, _ in kernels(model, tmp_path)].count("MatMulIntegerToFloat") == 2
    np.testing.assert_allclose(run(model, 1), expected, rtol=1e-5, atol=1e-6)
