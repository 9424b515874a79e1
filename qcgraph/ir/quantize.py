"""Quantization of weights and activations as the plan says: codes, scales, and the values that codes represent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from qcgraph.errors import ContractError
from qcgraph.facts import ActivationQuant, QuantPlan, RoundedWeights, WeightQuant
from qcgraph.ir.ops import CODE_TYPES
from qcgraph.ir.program import Program, tensor_digest

ops = torch.ops.qcgraph
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in CODE_TYPES}

PARTS = 16  # number of parts in which an activation is quantized
ROWS = 64  # rows of a weight that are quantized together. Temporaries as large as a weight, freed between its codes and
# the next codes, leave holes that the allocator does not fill again: at DiT-XL/2 more memory than the model takes.


def quantize_weight(weight: torch.Tensor, quant: WeightQuant) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes [out, in] and scales f32[out] of a weight; a channel of zeros keeps the scale 1.

    Raises:
        ContractError: the weight is not a matrix.
    """
    if weight.dim() != 2:
        raise ContractError(f"weight of rank {weight.dim()}; a linear layer has a matrix")
    scale = covering_scale(weight, quant)
    codes = torch.empty(weight.shape, dtype=DTYPES[quant.dtype])
    for values, scales, part in zip(*(tensor.split(ROWS) for tensor in (weight, scale, codes)), strict=True):
        part.copy_(nearest(values, scales, quant))
    return codes, scale


def nearest(weight: torch.Tensor, scale: torch.Tensor, quant: WeightQuant) -> torch.Tensor:
    """Return the nearest allowed codes of a weight [out, in], as floating-point numbers.

    Two neighbours whose sum is too large are both made smaller, by half of the excess.
    """
    codes = weight / scale[:, None]
    if not DTYPES[quant.dtype].is_floating_point:
        codes.round_()
    codes.clamp_(-quant.high, quant.high)
    if quant.pair_high is not None:
        first, second = _pairs(codes).unbind(2)
        excess = first + second
        excess -= excess.clamp(-quant.pair_high, quant.pair_high)
        half = (excess / 2).trunc_()
        first -= half
        second -= excess.sub_(half)
    return codes


def covering_scale(weight: torch.Tensor, quant: WeightQuant) -> torch.Tensor:
    """Return the least scale [out] of each row at which no code and no pair is too large; 1 for a row of zeros."""
    scale = torch.maximum(weight.amax(dim=1), -weight.amin(dim=1)) / quant.high  # makes no copy of the weight
    if quant.pair_high is not None and weight.shape[1] > 1:
        for part, values in zip(scale.split(ROWS), weight.split(ROWS), strict=True):
            torch.maximum(part, _pairs(values).sum(dim=2).abs_().amax(dim=1) / quant.pair_high, out=part)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _pairs(values: torch.Tensor) -> torch.Tensor:
    """Return a view [out, in / 2, 2] of the inputs 2k and 2k + 1; a last input without a partner is left out."""
    return values[:, : values.shape[1] // 2 * 2].unflatten(1, (-1, 2))


def check_integers(plan: QuantPlan) -> None:
    """Refuse a plan of 8-bit floating point, on behalf of passes that choose integers.

    Raises:
        ContractError: names the first site.
    """
    if plan.floating:
        raise ContractError(
            "is planned to be fp8, and this pass chooses integers",
            where=plan.floating[0],
            hint="leave the pass out, or plan integers: plan-quant{format=int}",
        )


def weight_codes(program: Program, site: str, weight: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes [out, in] and scales f32[out] of a site's weight, according to the plan.

    Codes that a pass chose for this site are returned; without any, the nearest codes.

    Args:
        program: a program with a plan of the site.
        site: the name of the site.
        weight: the constant that the site multiplies with.

    Raises:
        ContractError: a pass chose codes, but for other sites, for another weight, or for another plan than the present
            one.
    """
    quant, rounded = program.facts[QuantPlan].sites[site].weight, program.facts.get(RoundedWeights)
    if rounded is None:
        return quantize_weight(program.constants[weight], quant)
    if site not in rounded.sites:
        raise ContractError(
            "no codes were chosen for its weight, and for others there were",
            where=site,
            hint="run round-weights after the pass that last changes which sites are quantized",
        )
    chosen = rounded.sites[site]
    if chosen is None:
        return quantize_weight(program.constants[weight], quant)
    if chosen.quant != quant:
        raise ContractError(
            f"the codes of its weight were chosen up to {chosen.quant.high}, and {quant.high} is planned",
            where=site,
            hint="run round-weights after the passes that plan how weights are quantized",
        )
    if chosen.weight != tensor_digest(program.constants[weight]):
        raise ContractError(
            "its weight has changed since codes were chosen for it",
            where=site,
            hint="run passes that change weights, such as equalize, before round-weights",
        )
    if missing := {chosen.codes, chosen.scale} - set(program.constants):
        raise ContractError(
            f"the codes that were chosen for its weight are gone: there is no constant {sorted(missing)[0]!r}",
            where=site,
            hint="run round-weights again, or drop the fact RoundedWeights to take the nearest codes",
        )
    return program.constants[chosen.codes], program.constants[chosen.scale]


def names_of_codes(weights: Mapping[str, str]) -> dict[str, str]:
    """Return a name for the codes of each site's weight: the weight's, after the site's where sites share the weight.

    Sites that share a weight may quantize it differently: with other bits, other activations, other corrections.

    Args:
        weights: for each site, the constant that it multiplies with.
    """
    readers = Counter(weights.values())
    return {site: weight if readers[weight] == 1 else f"{site}.{weight}" for site, weight in weights.items()}


def parameters(quant: ActivationQuant) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales f32[G] and zero points [G] of an activation; G is 1 where all timestep groups share them."""
    return torch.tensor(quant.scales), torch.tensor(quant.zero_points, dtype=DTYPES[quant.dtype])


def rounded_activation(value: torch.Tensor, groups: torch.Tensor, quant: ActivationQuant) -> torch.Tensor:
    """Quantize and dequantize an activation f32[R,...].

    This happens part by part, because it takes several times the memory of the quantized values.

    Args:
        value: the activation.
        groups: i64[R], the timestep group of each row.
        quant: the quantization of the activation.
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
    """Return the values f32[G] of the smallest and of the largest code of each timestep group."""
    scales, zeros = parameters(quant)
    limits = torch.tensor([(quant.at(group).low, quant.at(group).high) for group in range(len(quant.bits))])
    least, largest = ((limits - zeros[:, None].long()) * scales[:, None]).unbind(1)
    return least.contiguous(), largest.contiguous()


def quantized(value: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, quant: ActivationQuant) -> torch.Tensor:
    """Return codes of an activation for scales and zero points that are scalars or one value for each row."""
    if quant.shift:
        return ops.quantize_regions(value, scale, zero, quant.low, quant.high, quant.shift, 0)
    return ops.quantize(value, scale, zero, quant.low, quant.high, 0)
