"""The qcgraph ops against their formulas, and their rules against illegal uses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qcgraph.ir.ops import OPS

ops = torch.ops.qcgraph


def scalar(value: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype)


def test_quantize_rounds_half_to_even_and_clamps() -> None:
    x = torch.tensor([-9.0, -0.25, 0.0, 0.25, 0.75, 99.0])
    q = ops.quantize(x, scalar(0.5, torch.float32), scalar(3, torch.uint8), 0, 255, 0)
    assert q.dtype == torch.uint8
    assert q.tolist() == [0, 3, 3, 3, 5, 201]
    narrow = ops.quantize(x, scalar(0.5, torch.float32), scalar(3, torch.uint8), 0, 4, 0)
    assert narrow.tolist() == [0, 3, 3, 3, 4, 4]


def test_round_trip_error_is_at_most_half_a_step() -> None:
    x = torch.linspace(-1, 2, 1001)
    scale, zero = scalar(3 / 255, torch.float32), scalar(85, torch.uint8)
    back = ops.dequantize(ops.quantize(x, scale, zero, 0, 255, 0), scale, zero, 0)
    assert (back - x).abs().max() <= 0.5 * scale * (1 + 1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_scales_go_along_their_axis(axis: int) -> None:
    q = torch.ones(2, 3, dtype=torch.int8)
    scale = torch.arange(1.0, q.shape[axis] + 1)
    zero = torch.zeros(q.shape[axis], dtype=torch.int8)
    expected = scale[:, None].expand(2, 3) if axis == 0 else scale.expand(2, 3)
    assert torch.equal(ops.dequantize(q, scale, zero, axis), expected)


def test_select_takes_a_row() -> None:
    table = torch.arange(6.0).reshape(3, 2)
    assert ops.select(table, torch.tensor(1)).tolist() == [2.0, 3.0]


def test_compensate_leaves_the_learned_sigma_alone() -> None:
    prediction, latent = torch.randn(2, 4, 3, 3), torch.randn(2, 2, 3, 3)
    gain, slope, offset = torch.tensor([1.1, 0.9]), torch.tensor([0.2, 0.0]), torch.tensor([0.0, -0.3])
    fixed = ops.compensate(prediction, latent, gain, slope, offset)
    assert torch.equal(fixed[:, 2:], prediction[:, 2:])
    first = 1.1 * prediction[:, 0] + 0.2 * latent[:, 0]
    torch.testing.assert_close(fixed[:, 0], first)
    torch.testing.assert_close(fixed[:, 1], 0.9 * prediction[:, 1] - 0.3)


@pytest.mark.parametrize("channels", [2, 4])
def test_neutral_compensation_is_bit_identical(channels: int) -> None:
    prediction, latent = torch.randn(2, channels, 3, 3), torch.randn(2, 2, 3, 3)
    one, zero = torch.ones(2), torch.zeros(2)
    assert torch.equal(ops.compensate(prediction, latent, one, zero, zero), prediction)


def forecast_inputs(count: int, *middle: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Values [4, ..., 5], coefficients and the halves of four samples."""
    generator = torch.Generator().manual_seed(count)
    values = [torch.randn(4, *middle, 5, generator=generator) for _ in range(count)]
    return values, torch.randn(count + 1, 2, 5, generator=generator), torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize("middle", [(), (3,), (2, 3)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_forecast_is_an_affine_per_channel_and_half(count: int, middle: tuple[int, ...]) -> None:
    values, coefficients, half = forecast_inputs(count, *middle)
    found = ops.forecast(values, coefficients, half)
    for sample in range(4):
        chosen = coefficients[:, int(half[sample])]
        expected = sum((gain * value[sample] for gain, value in zip(chosen, values, strict=False)), chosen[-1])
        torch.testing.assert_close(found[sample], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_neutral_forecast_is_the_last_value_to_the_bit(count: int) -> None:
    values, coefficients, half = forecast_inputs(count, 3)
    coefficients.zero_()[0] = 1.0
    assert torch.equal(ops.forecast(values, coefficients, half), values[0])


class Forecasting(nn.Module):
    def forward(self, values: list[torch.Tensor], coefficients: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
        return ops.forecast(values, coefficients, half)


@pytest.mark.parametrize("middle", [(), (3,), (2, 3)])
@pytest.mark.parametrize("count", [1, 3])
def test_forecast_in_onnx_runtime(count: int, middle: tuple[int, ...]) -> None:
    import onnxruntime

    arguments = forecast_inputs(count, *middle)
    exported: Any = torch.onnx.export(
        torch.export.export(Forecasting(), arguments),
        dynamo=True,
        opset_version=23,
        custom_translation_table={op.target: op.to_onnx for op in OPS},
        verbose=False,
    )
    session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString())
    values, coefficients, half = arguments
    names = [item.name for item in session.get_inputs()]
    feed = dict(zip(names, [tensor.numpy() for tensor in (*values, coefficients, half)], strict=True))
    np.testing.assert_allclose(session.run(None, feed)[0], ops.forecast(*arguments).numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("quantize", (torch.randn(2, 3), scalar(0.1, torch.float32), scalar(0, torch.int8), -128, 127, 0)),
        ("dequantize", (torch.ones(2, 3, dtype=torch.int8), torch.ones(3), torch.zeros(3, dtype=torch.int8), 1)),
        (
            "dequantize",
            (torch.ones(2, 3, dtype=torch.int8), torch.ones(3).half(), torch.zeros(3, dtype=torch.int8), 1),
        ),
        ("select", (torch.randn(4, 2), torch.tensor(2))),
        ("forecast", forecast_inputs(1, 3)),
        ("forecast", forecast_inputs(3, 2, 3)),
        ("guidance_difference", (torch.randn(4, 2, 3, 5),)),
        ("conditional_half", (torch.randn(4, 2),)),
        ("restore_half", (torch.randn(2, 2, 3, 5), torch.randn(4, 3, 5, 2))),
        ("compensate", (torch.randn(2, 4, 3, 3), torch.randn(2, 2, 3, 3), torch.ones(2), torch.ones(2), torch.ones(2))),
    ],
)
def test_fake_rules_agree_with_the_kernels(op: str, arguments: tuple[object, ...]) -> None:
    torch.library.opcheck(
        getattr(ops, op).default, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static")
    )
