"""Allocation of bits to layers: least expected error for a budget of bit operations. NumPy only.

A layer's product of a w-bit weight and an a-bit activation costs w * a bit operations for every multiply-accumulate.
The weight has the same bits at every step; the activation may have different bits in each timestep group. Errors of
layers are assumed to add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from qcgraph.errors import UsageError

Table = npt.NDArray[np.float64]
ROUNDS = 60  # of bisection, beyond the resolution of float64


@dataclass(frozen=True)
class Layer:
    """The cost and the error of a layer with each choice of bits.

    Attributes:
        macs: the multiply-accumulates of each timestep group over a whole trajectory, f64[G].
        weight_errors: the error of each choice of weight bits, over all groups, f64[W].
        activation_errors: the error of each choice of activation bits in each group, f64[G,A].
    """

    macs: Table
    weight_errors: Table
    activation_errors: Table

    def as_one_group(self) -> Layer:
        """Return the layer with all timestep groups merged, so that its activation has the same bits at every step."""
        return replace(
            self,
            macs=self.macs.sum(keepdims=True),
            activation_errors=self.activation_errors.sum(axis=0, keepdims=True),
        )


@dataclass(frozen=True)
class Bits:
    """The bits of a layer: of its weight, and of its activation in each timestep group."""

    weight: int
    activation: tuple[int, ...]


def allocate(layers: Sequence[Layer], weights: Sequence[int], activations: Sequence[int], budget: float) -> list[Bits]:
    """Return the bits of every layer with the least sum of expected errors within a budget.

    The method is Lagrange's multiplier: at a price for a bit operation every layer takes its own best choice, and the
    price is the lowest at which all layers stay within the budget. No allocation of the same cost has less error.

    Args:
        layers: the layers.
        weights: the choices of weight bits, rising.
        activations: the choices of activation bits, rising.
        budget: the average bits: the cost is at most the bit operations of all layers with weights and activations of
            ``budget`` bits.

    Raises:
        UsageError: even the fewest bits exceed the budget.
    """
    limit = budget**2 * sum(float(layer.macs.sum()) for layer in layers)

    def at(price: float) -> tuple[list[Bits], float]:
        chosen = [_best(layer, weights, activations, price) for layer in layers]
        return [bits for bits, _ in chosen], sum(cost for _, cost in chosen)

    least = weights[0] * activations[0]
    if least > budget**2:
        raise UsageError(
            f"{budget:g} bits on average are less than the fewest there are",
            hint=f"w{weights[0]}a{activations[0]} takes {least**0.5:.2g}",
        )
    free, cost = at(0.0)
    if cost <= limit:
        return free
    low, high = 0.0, 1.0
    while at(high)[1] > limit:
        low, high = high, high * 16
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[1] > limit else (low, middle)
    return at(high)[0]


def _best(layer: Layer, weights: Sequence[int], activations: Sequence[int], price: float) -> tuple[Bits, float]:
    """Return the best bits of a layer at a price, and their cost in bit operations."""
    costs = layer.macs[None, :, None] * np.multiply.outer(weights, activations)[:, None, :]  # [W,G,A]
    totals = layer.activation_errors[None] + price * costs
    choice = totals.argmin(axis=2)  # [W,G]; the fewest bits among equals
    chosen = np.take_along_axis(totals, choice[:, :, None], axis=2).sum(axis=(1, 2)) + layer.weight_errors
    weight = int(chosen.argmin())
    spent = np.take_along_axis(costs[weight], choice[weight][:, None], axis=1).sum()
    return Bits(weights[weight], tuple(activations[index] for index in choice[weight])), float(spent)
