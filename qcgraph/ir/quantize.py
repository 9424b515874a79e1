"""Quantizing weights and activations as the plan says: codes, scales, and the values that they stand for."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qcgraph.errors import ContractError
from qcgraph.facts import ActivationQuant, WeightQuant
from qcgraph.ir.ops import CODE_TYPES

ops = torch.ops.qcgraph
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in CODE_TYPES}

PARTS = 16  # in which an activation is quantized
ROWS = 64  # of a weight that are quantized together: temporaries as large as a weight, freed between its codes and the
# next one's, leave holes that the allocator does not fill again, at DiT-XL/2 of more memory than the model


def quantize_weight(weight: torch.Tensor, quant: WeightQuant) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [out, in] and scales f32[out] of a weight; a channel of zeros keeps the scale 1.

    Raises:
        ContractError: the weight is not a matrix.
    """
    if weight.dim() != 2:
        raise ContractError(f"weight of rank {weight.dim()}; a linear layer has a matrix")
    scale = covering_scale(weight, quant.high)
    codes = torch.empty(weight.shape, dtype=DTYPES[quant.dtype])
    for values, scales, part in zip(*(tensor.split(ROWS) for tensor in (weight, scale, codes)), strict=True):
        divided = values / scales[:, None]
        if not codes.is_floating_point():
            divided.round_()
        part.copy_(divided.clamp_(-quant.high, quant.high))
    return codes, scale


def covering_scale(weight: torch.Tensor, high: int) -> torch.Tensor:
    """The scale [out] of each row with which its largest weight has the largest code; 1 for a row of zeros."""
    largest = torch.maximum(weight.amax(dim=1), -weight.amin(dim=1))  # takes no copy of the weight
    return torch.where(largest > 0, largest / high, torch.ones_like(largest))


def rounded_names(weight: str) -> tuple[str, str]:
    """The constants in which round-weights leaves the codes and scales that it chose for a weight."""
    return f"{weight}_rounded", f"{weight}_rounded_scale"


def weight_codes(
    constants: Mapping[str, torch.Tensor], weight: str, quant: WeightQuant
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [out, in] and scales f32[out] of a weight: those that were chosen for it, else the nearest ones."""
    codes, scale = (constants.get(name) for name in rounded_names(weight))
    if codes is not None and scale is not None:
        return codes, scale
    return quantize_weight(constants[weight], quant)


def parameters(quant: ActivationQuant) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales f32[G] and zero points [G] of an activation; G is 1 where all timestep groups share them."""
    return torch.tensor(quant.scales), torch.tensor(quant.zero_points, dtype=DTYPES[quant.dtype])


def rounded_activation(value: torch.Tensor, groups: torch.Tensor, quant: ActivationQuant) -> torch.Tensor:
    """What an activation f32[R,...] becomes when it is quantized and dequantized.

    Part by part, because it takes several times the memory of what it quantizes.

    Args:
        value: the activation.
        groups: i64[R], the timestep group of each row.
        quant: how it is quantized.
    """
    result, size = torch.empty_like(value), max(1, -(-len(value) // PARTS))
    for rows, members, found in zip(*(tensor.split(size) for tensor in (value, groups, result)), strict=True):
        found.copy_(_rounded_rows(rows, members, quant))
    return result


def _rounded_rows(value: torch.Tensor, groups: torch.Tensor, quant: ActivationQuant) -> torch.Tensor:
    scales, zeros = (table.expand(int(groups.max()) + 1) if len(table) == 1 else table for table in parameters(quant))
    scale, zero = scales[groups], zeros[groups]
    if quant.bits:
        shape = (-1, *[1] * (value.dim() - 1))
        least, largest = (table[groups].reshape(shape) for table in clip_limits(quant))
        value = value.clamp(least, largest)
    return ops.dequantize(quantized(value, scale, zero, quant), scale, zero, 0)


def clip_limits(quant: ActivationQuant) -> tuple[torch.Tensor, torch.Tensor]:
    """The values f32[G] that the smallest and the largest code of each timestep group stand for."""
    scales, zeros = parameters(quant)
    limits = torch.tensor([(quant.at(group).low, quant.at(group).high) for group in range(len(quant.bits))])
    least, largest = ((limits - zeros[:, None].long()) * scales[:, None]).unbind(1)
    return least.contiguous(), largest.contiguous()


def quantized(value: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, quant: ActivationQuant) -> torch.Tensor:
    """Codes of an activation with these parameters, scalars or one a row."""
    if quant.shift:
        return ops.quantize_regions(value, scale, zero, quant.low, quant.high, quant.shift, 0)
    return ops.quantize(value, scale, zero, quant.low, quant.high, 0)
