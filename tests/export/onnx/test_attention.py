"""Attention whose heads stay in place computes what it computed with transposes, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxscript import ir

from qcgraph.capture.capture import capture
from qcgraph.export.onnx.attention import expand_masks, keep_heads_in_place
from qcgraph.export.onnx.emit import emit_onnx
from qcgraph.export.run.onnxruntime import OnnxRuntimeRunner
from qcgraph.ir.program import Program
from qcgraph.plan.spec import ModelSpec
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


@pytest.mark.slow
def test_an_exported_denoiser_moves_no_heads(captured: Program, tmp_path: Path) -> None:
    emit_onnx(captured, tmp_path, 23, Progress(), integer_products=True)
    nodes = list(onnx.load(tmp_path / "main.onnx", load_external_data=False).graph.node)
    attentions = [node for node in nodes if node.op_type == "Attention"]
    assert len(attentions) == 2
    assert all({"q_num_heads", "kv_num_heads"} <= {item.name for item in node.attribute} for node in attentions)
    moves = [list(node.attribute[0].ints) for node in nodes if node.op_type == "Transpose"]
    assert [0, 2, 1, 3] not in moves
    assert [2, 0, 3, 1, 4] not in moves


MASKED = """
<ir_version: 10, opset_import: ["" : 23]>
graph (float[2,3,4,8] q, float[2,3,5,8] k, float[2,3,5,8] v, {type}[{shape}] mask) => (float[2,3,4,8] result) {{
  result = Attention <scale = 0.25> (q, k, v, mask)
}}
"""
MASKS = [
    (5,),
    (1, 5),
    (4, 5),
    (4, 1),
    (3, 4, 5),
    (3, 1, 5),
    (2, 1, 1, 5),
    (2, 3, 1, 5),
    (1, 1, 4, 5),
    (2, 3, 4, 5),
    (2, 1, 4, 1),
]


@pytest.mark.parametrize("kind", ["float", "bool"])
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_masks_mean_what_they_mean_in_pytorch(shape: tuple[int, ...], kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, length, 8, generator=generator) for length in (4, 5, 5))
    mask = torch.randn(shape, generator=generator)
    if kind == "bool":
        mask = mask > -1
        mask[..., 0] = True  # a query without any key has no defined result
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask.expand(2, 3, 4, 5), scale=0.25)
    model = ir.from_proto(onnx.parser.parse_model(MASKED.format(type=kind, shape=",".join(map(str, shape)))))
    model.graph[0].name = "attended"
    assert expand_masks(model) == (shape not in [(4, 5), (1, 1, 4, 5), (2, 3, 4, 5)])
    assert expand_masks(model) == 0
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"q": query.numpy(), "k": key.numpy(), "v": value.numpy(), "mask": mask.numpy()}
    np.testing.assert_allclose(session.run(None, feeds)[0], expected.numpy(), rtol=1e-5, atol=1e-6)


class Masked(torch.nn.Module):
    """Attention over 16 tokens, of which a sample may attend to as many as its class says, and to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(2, 8)
        self.project = torch.nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(x.flatten(2).transpose(1, 2)) + t[:, None, None] / 1000
        heads = tokens.unflatten(2, (2, 4)).transpose(1, 2)
        mask = (torch.arange(16) <= y[:, None])[:, None, None]  # [B,1,1,L]
        attended = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, mask)
        return self.project(attended.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, (4, 4))


def test_a_captured_mask_of_keys(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = ModelSpec.class_conditional("masked", (2, 4, 4), 5, 5, output_channels=2)
    program = capture(Masked().eval().requires_grad_(False), spec, ("x", "t", "y"))
    emit_onnx(program, tmp_path, 23, Progress(), integer_products=True)
    inputs = {
        "latent": torch.randn(3, 2, 4, 4),
        "timestep": torch.full((3,), 7.0),
        "class_label": torch.tensor([0, 2, 5]),
    }
    found = OnnxRuntimeRunner(tmp_path, program.interfaces).run_outputs(
        "main", {name: value.numpy() for name, value in inputs.items()}, {}
    )
    expected = program.run("main", inputs)["noise_prediction"]
    np.testing.assert_allclose(found["noise_prediction"].numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)
