"""Rounding of a weight such that its layer's result, rather than the weight itself, changes least.

With inputs x the squared error of output j is d H d^T, d the error of row j and H = E[x x^T]. Rounding each entry to
the nearest code makes d small, but not d H d^T: errors of entries whose inputs are correlated can cancel.

* ``search_scales`` finds the scale of each row by that error (the weight half of TQ-DiT's Hessian-guided search: the
  Fisher factor of an output is the same for all entries of its row, and drops out).
* ``round_with_feedback`` rounds column after column, and later columns compensate for the error (GPTQ, Frantar
  et al., 2023, arXiv 2210.17323, algorithm 1; order by falling diagonal of H).
"""

from __future__ import annotations

import torch

from qcgraph.facts import WeightQuant
from qcgraph.ir.quantize import covering_scale, nearest

SHRINKS = torch.linspace(1.0, 0.4, 31)  # shares of the covering scale; the largest of equally good ones wins
DAMPINGS = (0.003, 0.03, 0.3, 3.0)  # shares of H's mean diagonal entry, added to it; 0.1 and 0.0001 gave worse images
COLUMNS = 128  # columns that are rounded before the rest of the weight is updated, which is the slow part


def search_scales(weight: torch.Tensor, second_moment: torch.Tensor, quant: WeightQuant) -> torch.Tensor:
    """Find the scale [out] of each row of a weight [out, in] whose nearest codes change the result least.

    Args:
        weight: the weight.
        second_moment: H, [in, in].
        quant: the allowed codes.
    """
    covering = covering_scale(weight, quant)
    best, found = torch.full_like(covering, torch.inf), covering
    for shrink in SHRINKS:
        scale = covering * shrink
        error = nearest(weight, scale, quant) * scale[:, None] - weight
        cost = ((error @ second_moment) * error).sum(dim=1)
        found, best = torch.where(cost < best, scale, found), torch.minimum(cost, best)
    return found


def round_with_feedback(
    weight: torch.Tensor, second_moment: torch.Tensor, scale: torch.Tensor, quant: WeightQuant
) -> torch.Tensor:
    """Return codes i8[out, in] of a weight for given scales; each column compensates for the errors of those before it.

    Args:
        weight: the weight, [out, in].
        second_moment: H, [in, in]; it may include inputs that are always zero.
        scale: [out].
        quant: the allowed codes.
    """
    order = torch.argsort(second_moment.diagonal(), descending=True)
    feedback = _feedback(second_moment, order)
    left, codes = weight[:, order].clone(), torch.zeros(weight.shape, dtype=torch.int8)
    for start in range(0, left.shape[1], COLUMNS):
        end = min(start + COLUMNS, left.shape[1])
        errors = torch.empty(len(left), end - start)
        for column in range(start, end):
            place = int(order[column])
            values = (left[:, column] / scale).round_().clamp_(*_limits(codes, place, quant))
            codes[:, place] = values.to(torch.int8)
            error = (left[:, column] - values * scale) / feedback[column, column]
            left[:, column + 1 : end] -= torch.outer(error, feedback[column, column + 1 : end])
            errors[:, column - start] = error
        left[:, end:] -= errors @ feedback[start:end, end:]
    return codes


def _limits(codes: torch.Tensor, place: int, quant: WeightQuant) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest and largest codes [out] that a column may take; columns that have none yet hold zeros."""
    high, partner = torch.tensor(float(quant.high)), place ^ 1  # of the inputs 2k and 2k + 1
    if quant.pair_high is None or partner == codes.shape[1]:
        return -high, high
    taken = codes[:, partner].float()
    least, largest = -quant.pair_high - taken.clamp(max=0), quant.pair_high - taken.clamp(min=0)
    return least.clamp_(min=-high), largest.clamp_(max=high)


def _feedback(second_moment: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of H in an order, with the smallest damping at which it exists.

    Return the identity, which means no feedback, where no damping suffices. Each matrix is as large as H, and is freed
    as soon as possible.
    """
    smallest = torch.finfo(second_moment.dtype).tiny
    for damping in DAMPINGS:
        damped = second_moment[order][:, order]
        damped /= damped.diagonal().mean().clamp(min=smallest)  # no effect on codes, but float32 ends at 1e38
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if failed:
            continue
        inverse = torch.cholesky_inverse(lower)
        del lower
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed:
            return upper
    return torch.eye(len(second_moment))
