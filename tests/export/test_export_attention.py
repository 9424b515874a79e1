"""Attention whose heads stay in place computes what it computed with transposes, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxscript import ir

from qcgraph.export.attention import keep_heads_in_place
from qcgraph.export.emit import emit_onnx
from qcgraph.ir.program import Program
from qcgraph.progress import Progress

TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
graph (float[B,4,18] projection) => (float[B,4,6] result) {{
  axes = Constant <value_ints = [0]> ()
  zero = Constant <value_ints = [{q}]> ()
  one = Constant <value_ints = [1]> ()
  two = Constant <value_ints = [2]> ()
  three = Constant <value_ints = [3]> ()
  after_zero = Constant <value_ints = [{after_q}]> ()
  split_shape = Constant <value_ints = [-1, 4, 3, 2, 3]> ()
  flat_shape = Constant <value_ints = [-1, 4, 6]> ()
  split = Reshape (projection, split_shape)
  moved = Transpose <perm = [2, 0, 3, 1, 4]> (split)
  q_part = Slice (moved, zero, after_zero, axes)
  q = Squeeze (q_part, axes)
  k_part = Slice (moved, one, two, axes)
  k = Squeeze (k_part, axes)
  v_part = Slice (moved, two, three, axes)
  v = Squeeze (v_part, axes)
  attended = Attention <scale = 0.25> (q, k, v)
  back = Transpose <perm = {perm}> (attended)
  result = Reshape (back, flat_shape)
}}
"""


def model_of(q: int = 0, perm: str = "[0, 2, 1, 3]") -> ir.Model:
    proto = onnx.parser.parse_model(TEXT.format(q=q, after_q=q + 1, perm=perm))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def run(model: ir.Model) -> np.ndarray:
    projection = np.random.default_rng(0).standard_normal((2, 4, 18), dtype=np.float32)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    result = session.run(None, {"projection": projection})[0]
    assert isinstance(result, np.ndarray)
    return result


def test_heads_stay_in_place() -> None:
    expected, model = run(model_of()), model_of()
    assert keep_heads_in_place(model) == 1
    assert [node.op_type for node in model.graph if node.op_type != "Constant"] == ["Split", "Attention"]
    assert [value.name for value in model.graph.outputs] == ["result"]
    np.testing.assert_allclose(run(model), expected, atol=1e-6)


@pytest.mark.parametrize("options", [{"q": 2}, {"perm": "[0, 1, 2, 3]"}])
def test_another_form_is_left_as_it_is(options: dict[str, object]) -> None:
    model = model_of(**options)  # type: ignore[arg-type]
    before = [node.op_type for node in model.graph]
    assert keep_heads_in_place(model) == 0
    assert [node.op_type for node in model.graph] == before


def test_an_exported_denoiser_moves_no_heads(captured: Program, tmp_path: Path) -> None:
    emit_onnx(captured, tmp_path, 23, Progress(), integer_products=True)
    nodes = list(onnx.load(tmp_path / "main.onnx", load_external_data=False).graph.node)
    attentions = [node for node in nodes if node.op_type == "Attention"]
    assert len(attentions) == 2
    assert all({"q_num_heads", "kv_num_heads"} <= {item.name for item in node.attribute} for node in attentions)
    moves = [list(node.attribute[0].ints) for node in nodes if node.op_type == "Transpose"]
    assert [0, 2, 1, 3] not in moves
    assert [2, 0, 3, 1, 4] not in moves
