"""Ranges that calibration has not seen: what is added to those that it has, and how well that foretells them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qcgraph.passes.calibration._extremes import ROWS, Extremes


def added(values: Tensor, parts: int = 1) -> Extremes:
    found = Extremes()
    for part in values.tensor_split(parts):
        found.add(part)
    return found


def test_the_formula() -> None:
    values = torch.tensor([1.0, 3.0, 2.0, 6.0])
    scale = math.sqrt(6) / math.pi * math.sqrt(3.5)  # their variance is 3.5
    assert float(added(values).expected) == pytest.approx(6 + scale * math.log(ROWS / 4))
    assert float(added(values).largest) == 6


@pytest.mark.parametrize("shape", [(9,), (9, 5)])
def test_it_does_not_depend_on_how_rows_are_added(shape: tuple[int, ...]) -> None:
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    whole, parts = added(values), added(values, 4)
    assert whole.expected.shape == shape[1:]
    torch.testing.assert_close(parts.expected, whole.expected, rtol=1e-6, atol=0)
    assert torch.equal(parts.largest, whole.largest)


def test_enough_rows_show_their_range_themselves() -> None:
    values = torch.rand(ROWS, generator=torch.Generator().manual_seed(0))
    assert added(values).expected == added(values).largest == values.max()


@pytest.mark.parametrize("values", [torch.ones(1), torch.full((7,), -2.0)])
def test_rows_that_do_not_differ_are_not_extended(values: Tensor) -> None:
    """One row alone tells nothing of others either."""
    assert added(values).expected == values[0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_visible(value: float) -> None:
    assert not torch.isfinite(added(torch.tensor([1.0, value, 2.0])).expected)


@pytest.mark.parametrize("rows", [8, 32])
def test_the_largest_of_many_rows_is_foretold(rows: int) -> None:
    """Largest values of 1000 normal numbers a row, on average over many draws: to half of what the seen ones lack."""
    generator = torch.Generator().manual_seed(1)
    draws, seen = [], []
    for _ in range(40):
        largest = torch.randn(ROWS, 1000, generator=generator).amax(dim=1)
        draws.append(float(largest.max() - added(largest[:rows]).expected))
        seen.append(float(largest.max() - largest[:rows].max()))
    assert abs(sum(draws)) < 0.5 * sum(seen)
