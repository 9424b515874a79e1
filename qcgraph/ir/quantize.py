"""Quantizing a weight: codes and scales per output channel."""

from __future__ import annotations

import torch

from qcgraph.errors import ContractError
from qcgraph.facts import WeightQuant

ROWS = 64  # of a weight that are quantized together: temporaries as large as a weight, freed between its codes and the
# next one's, leave holes that the allocator does not fill again, at DiT-XL/2 of more memory than the model


def quantize_weight(weight: torch.Tensor, quant: WeightQuant) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [out, in] and scales f32[out] of a weight; a channel of zeros keeps the scale 1.

    Raises:
        ContractError: the weight is not a matrix.
    """
    if weight.dim() != 2:
        raise ContractError(f"weight of rank {weight.dim()}; a linear layer has a matrix")
    largest = torch.maximum(weight.amax(dim=1), -weight.amin(dim=1))
    scale = torch.where(largest > 0, largest / quant.high, torch.ones_like(largest))
    codes = torch.empty(weight.shape, dtype=torch.int8)
    for values, scales, part in zip(*(tensor.split(ROWS) for tensor in (weight, scale, codes)), strict=True):
        part.copy_((values / scales[:, None]).round_().clamp_(-quant.high, quant.high))
    return codes, scale
