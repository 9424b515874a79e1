"""The qcgraph ops: eager reference, fake rule, verification rule and ONNX translation of each, side by side.

Scales and zero points are tensors, so that a timestep group can select them at run time. Formulas:

* quantize:    q = clamp(round_half_even(x / scale) + zero_point, low, high); in 8-bit floating point, q is the nearest
  such number of clamp(x / scale, low, high)
* quantize_regions:  as quantize below zero; above it, with c = 2^shift,
  q = clamp(round(x / (c * scale)), 0, (high - zero_point) / c) * c + zero_point
* region:      x where x < split (for the upper region: where x >= split), else 0
* dequantize:  x = (q - zero_point) * scale
* select:      table[index]
* forecast:    D = sum_a gain[a, half] * value[a] + offset[half], per channel (see passes/caching/insert_forecast)
* guidance_difference, conditional_half, restore_half:  see passes/caching/insert_cache
* compensate:  eps' = gain[row] * eps + slope[row] * latent + offset[row], per channel
               (see passes/compensation/insert_compensation)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcgraph.ir.graph import spec_of
from qcgraph.plan.spec import BATCH

CODE_TYPES = (torch.int8, torch.uint8, torch.float8_e4m3fn)
HALVES = 2  # number of halves of guidance: conditional, unconditional


def along(axis: int, values: Tensor, rank: int) -> Tensor:
    """Reshape values of one axis for broadcasting to a rank; scalars stay as they are."""
    if values.dim() == 0:
        return values
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


@torch.library.custom_op("qcgraph::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int) -> Tensor:
    """Quantize by an affine map; ``scale`` and ``zero_point`` are scalars or one value along ``axis``."""
    # In float32, so that codes do not depend on how a quotient would be rounded to 16 bits.
    codes = x.float() / along(axis, scale.float(), x.dim())
    if zero_point.is_floating_point():
        return codes.clamp_(low, high).to(zero_point.dtype)
    codes.round_()
    codes += along(axis, zero_point, x.dim()).float()
    return codes.clamp_(low, high).to(zero_point.dtype)


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.custom_op("qcgraph::quantize_regions", mutates_args=())
def quantize_regions(
    x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, shift: int, axis: int
) -> Tensor:
    """Quantize with step ``scale`` below zero and ``2^shift * scale`` above (TQ-DiT's MRQ, after GELU), as one integer.

    Each region has slightly fewer codes than ``low..high`` has. With a shift of 0 this op equals `quantize`.
    ``scale`` and ``zero_point`` are scalars or one value along ``axis``.
    """
    scale, zero = along(axis, scale, x.dim()), along(axis, zero_point, x.dim()).to(x.dtype)
    coarse = 2.0**shift
    above = (x / (scale * coarse)).round_().clamp_(min=0).minimum((high - zero) / coarse) * coarse
    below = (x / scale).round_().clamp_(max=0)
    return (above + below + zero).clamp_(min=low).to(zero_point.dtype)


@quantize_regions.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, shift: int, axis: int) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.custom_op("qcgraph::region", mutates_args=())
def region(x: Tensor, split: Tensor, upper: bool) -> Tensor:
    """Return the values of one region and zero elsewhere: below ``split``, a scalar, or from ``split`` on if ``upper``.

    The two regions of a tensor have no element in common, and their sum is the tensor.
    """
    return torch.where((x < split) != upper, x, 0.0)


@region.register_fake
def _(x: Tensor, split: Tensor, upper: bool) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("qcgraph::dequantize", mutates_args=())
def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """Apply the inverse affine map; ``scale`` and ``zero_point`` are scalars or one value along ``axis``."""
    if _is_16_bit_factor(q, scale, axis):
        # On CPUs PyTorch multiplies 16-bit floats by contiguous columns fifteen times as fast as by rows.
        return dequantize(q.t().contiguous(), scale, zero_point, 0).t()
    scale, zero_point = along(axis, scale, q.dim()), along(axis, zero_point, q.dim())
    return q.to(scale.dtype).sub_(zero_point.to(scale.dtype)).mul_(scale)


def _is_16_bit_factor(q: Tensor, scale: Tensor, axis: int) -> bool:
    """Tell whether codes are a weight [in, out] with one 16-bit scale for each column."""
    return q.dim() == 2 and axis == 1 and scale.dim() == 1 and scale.dtype != torch.float32


@dequantize.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    if _is_16_bit_factor(q, scale, axis):
        return q.new_empty(q.shape[1], q.shape[0], dtype=scale.dtype).t()
    return torch.empty_like(q, dtype=scale.dtype)


@torch.library.custom_op("qcgraph::select", mutates_args=())
def select(table: Tensor, index: Tensor) -> Tensor:
    """Return one row of a table, by a scalar index that the host gives at every step."""
    return table[index].clone()


@select.register_fake
def _(table: Tensor, index: Tensor) -> Tensor:
    return table.new_empty(table.shape[1:])


@torch.library.custom_op("qcgraph::forecast", mutates_args=())
def forecast(values: list[Tensor], coefficients: Tensor, half: Tensor) -> Tensor:
    """Forecast a cached tensor per channel, as an affine map of its last computed values for each half of guidance.

    Args:
        values: each [B, ..., C], the most recent one first.
        coefficients: [len(values) + 1, 2, C]; the last row is the offset. (1, 0, ..., 0) gives ``values[0]``.
        half: i64[B], 0 for a conditional sample, 1 for an unconditional one.
    """
    batch, *middle, channels = values[0].shape
    chosen = coefficients[:, half].reshape(len(values) + 1, batch, *[1] * len(middle), channels)
    result = chosen[0] * values[0]
    for gain, value in zip(chosen[1:-1], values[1:], strict=True):
        result += gain * value
    return result.add_(chosen[-1])


@forecast.register_fake
def _(values: list[Tensor], coefficients: Tensor, half: Tensor) -> Tensor:
    return torch.empty_like(values[0])


@torch.library.custom_op("qcgraph::guidance_difference", mutates_args=())
def guidance_difference(prediction: Tensor) -> Tensor:
    """Subtract from each half of guidance the other half, [B,H,W,C] for a noise prediction [B,C,H,W].

    The batch holds both halves in the same order: samples i and B/2 + i belong to the same latent. Channels are last,
    as in every cached tensor.
    """
    one, other = prediction.movedim(1, -1).chunk(HALVES)
    return torch.cat([one - other, other - one])


@guidance_difference.register_fake
def _(prediction: Tensor) -> Tensor:
    batch, channels, height, width = prediction.shape
    return prediction.new_empty(batch, height, width, channels)


@torch.library.custom_op("qcgraph::conditional_half", mutates_args=())
def conditional_half(x: Tensor) -> Tensor:
    """Return the first half of a batch, [B // 2, ...] of [B, ...]."""
    return x[: len(x) // HALVES].clone()


@conditional_half.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0] // HALVES, *x.shape[1:])


@torch.library.custom_op("qcgraph::restore_half", mutates_args=())
def restore_half(prediction: Tensor, difference: Tensor) -> Tensor:
    """Return a noise prediction [B,C,H,W] from its first half [B // 2,C,H,W] and the difference of halves [B,H,W,C]."""
    return torch.cat([prediction, prediction - difference[: len(prediction)].movedim(-1, 1)])


@restore_half.register_fake
def _(prediction: Tensor, difference: Tensor) -> Tensor:
    return prediction.new_empty(difference.shape[0], *prediction.shape[1:])


@torch.library.custom_op("qcgraph::compensate", mutates_args=())
def compensate(prediction: Tensor, latent: Tensor, gain: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """Correct the first channels of a noise prediction by a per-channel affine map of the prediction and the latent.

    Args:
        prediction: [B, C_out, H, W]; channels past C (a learned sigma) pass through.
        latent: [B, C, H, W].
        gain, slope, offset: [C].
    """
    channels = latent.shape[1]
    noise = prediction[:, :channels]
    fixed = along(1, gain, 4) * noise + (along(1, slope, 4) * latent + along(1, offset, 4))
    return fixed if prediction.shape[1] == channels else torch.cat([fixed, prediction[:, channels:]], dim=1)


@compensate.register_fake
def _(prediction: Tensor, latent: Tensor, gain: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    return torch.empty_like(prediction)


def _verify_quantize(node: fx.Node) -> str | None:
    x, scale, zero_point, low, high, axis = node.args
    return _verify_codes(node, x, scale, zero_point, low, high, axis)


def _verify_codes(node: fx.Node, x: Any, scale: Any, zero_point: Any, low: Any, high: Any, axis: Any) -> str | None:
    value, scales, zeros = x.meta["val"], scale.meta["val"], zero_point.meta["val"]
    if not value.dtype.is_floating_point:
        return f"quantizes {value.dtype}, which is not floating point"
    if reason := _verify_parameters(value, scales, zeros, axis):
        return reason
    limits = torch.finfo(zeros.dtype) if zeros.dtype.is_floating_point else torch.iinfo(zeros.dtype)
    if not limits.min <= low < high <= limits.max:
        return f"codes {low}..{high} do not fit {zeros.dtype}"
    strangers = [user.name for user in node.users if user.target is not torch.ops.qcgraph.dequantize.default]
    return f"integer codes reach {', '.join(strangers)} without a dequantize" if strangers else None


def _verify_regions(node: fx.Node) -> str | None:
    x, scale, zero_point, low, high, shift, axis = node.args
    if not isinstance(shift, int) or shift < 0:
        return f"a coarse step of 2^{shift} fine ones; 0 or more is legal"
    return _verify_codes(node, x, scale, zero_point, low, high, axis)


def _verify_region(node: fx.Node) -> str | None:
    value, split = (argument.meta["val"] for argument in node.args[:2])  # type: ignore[union-attr]
    if value.dtype != split.dtype or not value.dtype.is_floating_point:
        return f"splits {value.dtype} at {split.dtype}; one floating-point type is legal"
    return f"splits at {tuple(split.shape)} values; a scalar is legal" if split.dim() else None


def _verify_dequantize(node: fx.Node) -> str | None:
    q, scale, zero_point, axis = node.args
    value, scales, zeros = q.meta["val"], scale.meta["val"], zero_point.meta["val"]  # type: ignore[union-attr]
    if value.dtype != zeros.dtype:
        return f"codes are {value.dtype} but the zero point is {zeros.dtype}"
    return _verify_parameters(value, scales, zeros, axis)


def _verify_parameters(value: Tensor, scale: Tensor, zero_point: Tensor, axis: Any) -> str | None:
    if zero_point.dtype not in CODE_TYPES:
        return f"zero point is {zero_point.dtype}; {', '.join(map(str, CODE_TYPES))} are legal"
    if scale.shape != zero_point.shape:
        return f"scale {tuple(scale.shape)} and zero point {tuple(zero_point.shape)} differ in shape"
    if scale.dim() > 1:
        return f"scale has {scale.dim()} dimensions; a scalar or one axis is legal"
    if scale.dim() == 1 and scale.shape[0] != value.shape[axis]:
        return f"{scale.shape[0]} scales for an axis of {value.shape[axis]}"
    return None


def _verify_select(node: fx.Node) -> str | None:
    table, index = node.args
    if table.op != "get_attr":  # type: ignore[union-attr]
        return "selects from a computed value; a table must be a constant"
    value = index.meta["val"]  # type: ignore[union-attr]
    if value.dtype != torch.int64 or value.dim() != 0:
        return f"index is {value.dtype} of rank {value.dim()}; an int64 scalar is legal"
    return None


def _verify_forecast(node: fx.Node) -> str | None:
    values, coefficients, half = node.args
    metas = [value.meta["val"] for value in values]  # type: ignore[union-attr]
    shape, kind = tuple(coefficients.meta["val"].shape), half.meta["val"]  # type: ignore[union-attr]
    if any(spec_of("", meta) != spec_of("", metas[0]) for meta in metas):
        return "forecasts from values of different types"
    if shape != (len(metas) + 1, HALVES, metas[0].shape[-1]):
        return f"coefficients of shape {shape} for {len(metas)} values of {metas[0].shape[-1]} channels"
    return None if kind.dtype == torch.int64 and kind.dim() == 1 else "half is not an int64 vector"


def _verify_prediction(node: fx.Node) -> str | None:
    (prediction,) = node.args
    rank = prediction.meta["val"].dim()  # type: ignore[union-attr]
    return None if rank == 4 else f"a noise prediction of rank {rank}; [B,C,H,W] is legal"


def _verify_conditional_half(node: fx.Node) -> str | None:
    (value,) = node.args
    batch = spec_of("", value.meta["val"]).shape[:1]  # type: ignore[union-attr]
    return None if batch == (BATCH,) else f"halves {batch}, which is not the batch"


def _verify_restore_half(node: fx.Node) -> str | None:
    prediction, difference = (argument.meta["val"].shape[1:] for argument in node.args)  # type: ignore[union-attr]
    if tuple(difference) == (*prediction[1:], prediction[0]):
        return None
    return f"a difference {tuple(difference)} for a prediction {tuple(prediction)}"


def _verify_compensate(node: fx.Node) -> str | None:
    prediction, latent, *coefficients = (argument.meta["val"] for argument in node.args)  # type: ignore[union-attr]
    if prediction.shape[1] < latent.shape[1] or prediction.shape[2:] != latent.shape[2:]:
        return f"prediction {tuple(prediction.shape)} does not cover latent {tuple(latent.shape)}"
    wrong = [tuple(value.shape) for value in coefficients if tuple(value.shape) != (latent.shape[1],)]
    return f"coefficients of shape {wrong[0]} for {latent.shape[1]} channels" if wrong else None


def _onnx_quantize(x: Any, scale: Any, zero_point: Any, low: int, high: int, axis: int) -> Any:
    from onnxscript import opset21 as op

    if high - low < 255:
        # QuantizeLinear saturates at the limits of its type only. For fewer codes, values are clipped before it, in
        # floating point: an integer Clip after it would keep the int8 kernels from matching.
        zero = op.CastLike(zero_point, x)
        limits = ((op.CastLike(op.Constant(value_float=float(limit)), x) - zero) * scale for limit in (low, high))
        x = op.Clip(x, *limits)
    return op.QuantizeLinear(x, scale, zero_point, axis=axis)


def _onnx_quantize_regions(x: Any, scale: Any, zero_point: Any, low: int, high: int, shift: int, axis: int) -> Any:
    from onnxscript import opset21 as op

    # Above zero, values are rounded to the coarse step first, so that QuantizeLinear divides multiples of 2^shift fine
    # steps. Below zero, QuantizeLinear rounds, and its type or the clip saturates.
    coarse = op.Mul(scale, op.Constant(value_float=2.0**shift))
    largest = (op.Constant(value_float=float(high)) - op.CastLike(zero_point, x)) * op.Constant(value_float=2.0**-shift)
    above = op.Mul(op.Clip(op.Round(op.Div(x, coarse)), op.Constant(value_float=0.0), largest), coarse)
    least = (op.Constant(value_float=float(low)) - op.CastLike(zero_point, x)) * scale
    below = op.Clip(x, least, op.Constant(value_float=0.0))
    return op.QuantizeLinear(op.Add(above, below), scale, zero_point, axis=axis)


def _onnx_region(x: Any, split: Any, upper: bool) -> Any:
    from onnxscript import opset21 as op

    below, zero = op.Less(x, split), op.CastLike(op.Constant(value_float=0.0), x)
    return op.Where(below, zero, x) if upper else op.Where(below, x, zero)


def _onnx_dequantize(q: Any, scale: Any, zero_point: Any, axis: int) -> Any:
    from onnxscript import opset21 as op

    return op.DequantizeLinear(q, scale, zero_point, axis=axis)


def _onnx_select(table: Any, index: Any) -> Any:
    from onnxscript import opset21 as op

    return op.Gather(table, index, axis=0)


def _onnx_forecast(values: Sequence[Any], coefficients: Any, half: Any) -> Any:
    from onnxscript import opset21 as op

    middle = list(range(1, len(values[0].shape) - 1))
    chosen = [
        op.Unsqueeze(
            op.Gather(op.Gather(coefficients, op.Constant(value_int=row), axis=0), half, axis=0),
            op.Constant(value_ints=middle),
        )
        for row in range(len(values) + 1)
    ]
    result = op.Mul(chosen[0], values[0])
    for gain, value in zip(chosen[1:-1], values[1:], strict=True):
        result = op.Add(result, op.Mul(gain, value))
    return op.Add(result, chosen[-1])


def _onnx_guidance_difference(prediction: Any) -> Any:
    from onnxscript import opset21 as op

    one, other = op.Split(op.Transpose(prediction, perm=[0, 2, 3, 1]), num_outputs=HALVES, axis=0)
    return op.Concat(op.Sub(one, other), op.Sub(other, one), axis=0)


def _onnx_conditional_half(x: Any) -> Any:
    from onnxscript import opset21 as op

    half, _ = op.Split(x, num_outputs=HALVES, axis=0)
    return half


def _onnx_restore_half(prediction: Any, difference: Any) -> Any:
    from onnxscript import opset21 as op

    half, _ = op.Split(op.Transpose(difference, perm=[0, 3, 1, 2]), num_outputs=HALVES, axis=0)
    return op.Concat(prediction, op.Sub(prediction, half), axis=0)


def _onnx_compensate(prediction: Any, latent: Any, gain: Any, slope: Any, offset: Any) -> Any:
    from onnxscript import opset21 as op

    channels = op.Shape(latent, start=1, end=2)
    zero, one, axis = op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), op.Constant(value_ints=[1, 2])
    end = op.Constant(value_ints=[2**62])
    noise = op.Slice(prediction, zero, channels, one)
    rest = op.Slice(prediction, channels, end, one)
    gain, slope, offset = (op.Unsqueeze(value, axis) for value in (gain, slope, offset))
    fixed = op.Add(op.Mul(gain, noise), op.Add(op.Mul(slope, latent), offset))
    return op.Concat(fixed, rest, axis=1)


@dataclass(frozen=True)
class OpInfo:
    """One qcgraph op: its target, its rule and its translation.

    Attributes:
        target: the op overload.
        verify: returns why a node of this op is illegal, or None.
        to_onnx: the translation to onnxscript, which takes the op's positional arguments.
    """

    target: Any
    verify: Callable[[fx.Node], str | None]
    to_onnx: Callable[..., Any]


OPS: tuple[OpInfo, ...] = (
    OpInfo(torch.ops.qcgraph.quantize.default, _verify_quantize, _onnx_quantize),
    OpInfo(torch.ops.qcgraph.quantize_regions.default, _verify_regions, _onnx_quantize_regions),
    OpInfo(torch.ops.qcgraph.region.default, _verify_region, _onnx_region),
    OpInfo(torch.ops.qcgraph.dequantize.default, _verify_dequantize, _onnx_dequantize),
    OpInfo(torch.ops.qcgraph.select.default, _verify_select, _onnx_select),
    OpInfo(torch.ops.qcgraph.forecast.default, _verify_forecast, _onnx_forecast),
    OpInfo(torch.ops.qcgraph.guidance_difference.default, _verify_prediction, _onnx_guidance_difference),
    OpInfo(torch.ops.qcgraph.conditional_half.default, _verify_conditional_half, _onnx_conditional_half),
    OpInfo(torch.ops.qcgraph.restore_half.default, _verify_restore_half, _onnx_restore_half),
    OpInfo(torch.ops.qcgraph.compensate.default, _verify_compensate, _onnx_compensate),
)
