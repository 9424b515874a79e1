"""8-bit floating point (E4M3): codes are the nearest of its numbers, in PyTorch and in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from qcgraph.facts import FLOAT8, LARGEST_FLOAT8, WeightQuant
from qcgraph.ir.ops import OPS
from qcgraph.ir.quantize import quantize_weight

ops = torch.ops.qcgraph
E4M3 = torch.float8_e4m3fn
ZERO = torch.zeros((), dtype=E4M3)
LIMITS = (-LARGEST_FLOAT8, LARGEST_FLOAT8)


def numbers() -> torch.Tensor:
    """All finite numbers of the type, rising."""
    values = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    return values[values.isfinite()].unique()


def test_the_type_is_what_its_standard_says() -> None:
    found = numbers()
    assert float(found[-1]) == LARGEST_FLOAT8
    assert float(found[found > 0][0]) == 2.0**-9
    assert len(found) == 253  # 256 less two that are no number and one of two zeros


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_codes_are_the_nearest_numbers_of_what_is_clamped(dtype: torch.dtype) -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)).mul(40).to(dtype)
    scale = torch.tensor(0.25, dtype=dtype)
    codes = ops.quantize(x, scale, ZERO, *LIMITS, 0)
    assert codes.dtype == E4M3
    divided = (x.float() / 0.25).clamp(*LIMITS)
    nearest = (divided[:, None] - numbers()).abs().amin(dim=1)
    assert torch.equal((codes.float() - divided).abs(), nearest)
    assert torch.equal(ops.dequantize(codes, scale, ZERO, 0), (codes.float() * 0.25).to(dtype))


def test_a_weight_has_relative_precision() -> None:
    weight = torch.randn(70, 96, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 2, 70)[:, None]
    codes, scale = quantize_weight(weight, WeightQuant(LARGEST_FLOAT8, FLOAT8))
    assert codes.dtype == E4M3
    torch.testing.assert_close(codes.float().abs().amax(dim=1), torch.full((70,), float(LARGEST_FLOAT8)))
    normal = (weight / scale[:, None]).abs() >= 2.0**-6
    error = ((codes.float() * scale[:, None] - weight) / weight)[normal].abs()
    assert float(error.max()) <= 2.0**-4 * (1 + 1e-5)


@pytest.mark.slow
def test_onnx_runtime_gives_the_same_codes() -> None:
    class Round(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale = torch.tensor(0.25)
            codes = ops.quantize(x, scale, ZERO, *LIMITS, 0)
            return torch.as_tensor(ops.dequantize(codes, scale, ZERO, 0))

    table = {op.target: op.to_onnx for op in OPS}
    x = torch.cat([torch.randn(1000, generator=torch.Generator().manual_seed(2)) * 60, torch.tensor([0.0, 1e9, -1e9])])
    program = torch.onnx.export(
        torch.export.export(Round(), (x,)), dynamo=True, opset_version=21, custom_translation_table=table, verbose=False
    )
    assert program is not None
    model = program.model_proto
    assert "QuantizeLinear" in {node.op_type for node in model.graph.node}
    types = {onnx.TensorProto.DataType.Name(item.data_type) for item in model.graph.initializer}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_array_equal(found, Round()(x).numpy())
    assert "INT8" not in types
