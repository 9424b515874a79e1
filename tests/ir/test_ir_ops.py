"""The qcgraph ops against their formulas, and their rules against illegal uses."""

from __future__ import annotations

import pytest
import torch

import qcgraph.ir.ops  # noqa: F401 - registers the ops

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


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("quantize", (torch.randn(2, 3), scalar(0.1, torch.float32), scalar(0, torch.int8), -128, 127, 0)),
        ("dequantize", (torch.ones(2, 3, dtype=torch.int8), torch.ones(3), torch.zeros(3, dtype=torch.int8), 1)),
        ("select", (torch.randn(4, 2), torch.tensor(2))),
        ("compensate", (torch.randn(2, 4, 3, 3), torch.randn(2, 2, 3, 3), torch.ones(2), torch.ones(2), torch.ones(2))),
    ],
)
def test_fake_rules_agree_with_the_kernels(op: str, arguments: tuple[object, ...]) -> None:
    torch.library.opcheck(
        getattr(ops, op).default, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static")
    )
