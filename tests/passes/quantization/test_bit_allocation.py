"""Bits for a budget of bit operations."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from qcgraph.errors import UsageError
from qcgraph.passes.quantization._bit_allocation import Bits, Layer, allocate

CHOICES = (4, 6, 8)


def random_layers(seed: int, count: int = 2, groups: int = 2) -> list[Layer]:
    """Layers whose errors fall by 16 for every two bits, as rounding does, with sensitivities of their own."""
    generator = np.random.default_rng(seed)
    falling = 16.0 ** -np.arange(len(CHOICES))
    return [
        Layer(
            macs=generator.uniform(1, 5, groups),
            weight_errors=generator.lognormal(0, 2) * falling,
            activation_errors=generator.lognormal(0, 2, (groups, 1)) * falling,
        )
        for _ in range(count)
    ]


def cost(layers: list[Layer], bits: list[Bits]) -> float:
    return sum(
        float(layer.macs @ (np.array(chosen.activation) * chosen.weight))
        for layer, chosen in zip(layers, bits, strict=True)
    )


def error(layers: list[Layer], bits: list[Bits]) -> float:
    return sum(
        layer.weight_errors[CHOICES.index(chosen.weight)]
        + sum(layer.activation_errors[group, CHOICES.index(a)] for group, a in enumerate(chosen.activation))
        for layer, chosen in zip(layers, bits, strict=True)
    )


def every_allocation(layers: list[Layer]) -> list[list[Bits]]:
    groups = len(layers[0].macs)
    one = [Bits(w, a) for w in CHOICES for a in product(CHOICES, repeat=groups)]
    return [list(bits) for bits in product(one, repeat=len(layers))]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [4.5, 6.0, 7.3])
def test_nothing_of_the_same_cost_has_less_error(seed: int, budget: float) -> None:
    layers = random_layers(seed)
    found = allocate(layers, CHOICES, CHOICES, budget)
    spent = cost(layers, found)
    assert spent <= budget**2 * sum(layer.macs.sum() for layer in layers) * (1 + 1e-12)
    rivals = [bits for bits in every_allocation(layers) if cost(layers, bits) <= spent * (1 + 1e-12)]
    assert error(layers, found) <= min(error(layers, bits) for bits in rivals) * (1 + 1e-9)


@pytest.mark.parametrize("budget", [4.5, 6.0, 7.3])
def test_as_one_group_nothing_with_the_same_bits_in_all_groups_has_less_error(budget: float) -> None:
    layers = random_layers(seed=0, groups=3)
    found = [Bits(bits.weight, bits.activation * 3) for bits in _as_one_group(layers, budget)]
    spent = cost(layers, found)
    assert spent <= budget**2 * sum(layer.macs.sum() for layer in layers) * (1 + 1e-12)
    rivals = [bits for bits in every_allocation(layers) if all(len(set(one.activation)) == 1 for one in bits)]
    affordable = [bits for bits in rivals if cost(layers, bits) <= spent * (1 + 1e-12)]
    assert error(layers, found) <= min(error(layers, bits) for bits in affordable) * (1 + 1e-9)


def _as_one_group(layers: list[Layer], budget: float) -> list[Bits]:
    return allocate([layer.as_one_group() for layer in layers], CHOICES, CHOICES, budget)


def test_budgets_at_both_ends() -> None:
    layers = random_layers(0)
    assert set(allocate(layers, CHOICES, CHOICES, 8.0)) == {Bits(8, (8, 8))}
    assert set(allocate(layers, CHOICES, CHOICES, 4.0)) == {Bits(4, (4, 4))}
    with pytest.raises(UsageError, match="less than the fewest"):
        allocate(layers, CHOICES, CHOICES, 3.9)


def test_error_falls_with_the_budget() -> None:
    layers = random_layers(1, count=4, groups=3)
    errors = [error(layers, allocate(layers, CHOICES, CHOICES, budget)) for budget in (4, 5, 6, 7, 8)]
    assert errors == sorted(errors, reverse=True)


def test_a_layer_that_does_not_matter_gives_its_bits_away() -> None:
    falling = 16.0 ** -np.arange(len(CHOICES))
    deaf = Layer(np.ones(1), 0 * falling, 0 * falling[None])
    keen = Layer(np.ones(1), falling, falling[None])
    assert allocate([deaf, keen], CHOICES, CHOICES, 6.4) == [Bits(4, (4,)), Bits(8, (8,))]
