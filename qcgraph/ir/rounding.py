"""Rounding a weight so that its layer's result, not the weight itself, changes least.

With inputs x the squared error of output j is d H d^T, d the error of row j and H = E[x x^T]. Rounding each entry to
the nearest code makes d small, but not d H d^T: entries whose inputs go together can make up for each other.

* ``search_scales`` finds the scale of each row by that error (the weight half of TQ-DiT's Hessian-guided search: a
  Fisher factor that belongs to an output is the same for all entries of its row, and drops out).
* ``round_with_feedback`` rounds column after column and lets the columns to come make up for the error (GPTQ, Frantar
  et al., 2023, arXiv 2210.17323, algorithm 1; order by falling diagonal of H).
"""

from __future__ import annotations

import torch

from qcgraph.ir.quantize import covering_scale

SHRINKS = torch.linspace(1.0, 0.4, 31)  # of the scale that covers a row's largest weight; the largest of equals
DAMPINGS = (0.003, 0.03, 0.3, 3.0)  # of the mean of H's diagonal, added to it: with 0.1 and 0.0001 images were worse
COLUMNS = 128  # that are rounded before the rest of the weight is touched, which is what takes the time


def search_scales(weight: torch.Tensor, second_moment: torch.Tensor, high: int) -> torch.Tensor:
    """The scale [out] of each row of a weight [out, in] whose nearest codes change the result least.

    Args:
        weight: the weight.
        second_moment: H, [in, in].
        high: the largest code.
    """
    covering = covering_scale(weight, high)
    best, found = torch.full_like(covering, torch.inf), covering
    for shrink in SHRINKS:
        scale = covering * shrink
        error = nearest(weight, scale, high) * scale[:, None] - weight
        cost = ((error @ second_moment) * error).sum(dim=1)
        found, best = torch.where(cost < best, scale, found), torch.minimum(cost, best)
    return found


def nearest(weight: torch.Tensor, scale: torch.Tensor, high: int) -> torch.Tensor:
    """The nearest codes of a weight [out, in], as numbers."""
    return (weight / scale[:, None]).round_().clamp_(-high, high)


def round_with_feedback(
    weight: torch.Tensor, second_moment: torch.Tensor, scale: torch.Tensor, high: int
) -> torch.Tensor:
    """Codes i8[out, in] of a weight for given scales, each column making up for the errors of those before it.

    Args:
        weight: the weight, [out, in].
        second_moment: H, [in, in]; inputs that are always zero may be among it.
        scale: [out].
        high: the largest code.
    """
    order = torch.argsort(second_moment.diagonal(), descending=True)
    feedback = _feedback(second_moment, order)
    left, codes = weight[:, order].clone(), torch.empty(weight.shape, dtype=torch.int8)
    for start in range(0, left.shape[1], COLUMNS):
        end = min(start + COLUMNS, left.shape[1])
        errors = torch.empty(len(left), end - start)
        for column in range(start, end):
            values = (left[:, column] / scale).round_().clamp_(-high, high)
            codes[:, order[column]] = values.to(torch.int8)
            error = (left[:, column] - values * scale) / feedback[column, column]
            left[:, column + 1 : end] -= torch.outer(error, feedback[column, column + 1 : end])
            errors[:, column - start] = error
        left[:, end:] -= errors @ feedback[start:end, end:]
    return codes


def _feedback(second_moment: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of H in an order, damped as much as it takes.

    Without any feedback where nothing helps. Every matrix is as large as H, and let go as soon as it can be.
    """
    smallest = torch.finfo(second_moment.dtype).tiny
    for damping in DAMPINGS:
        damped = second_moment[order][:, order]
        damped /= damped.diagonal().mean().clamp(min=smallest)  # codes do not depend on it, but float32 ends at 1e38
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
