"""Cached values and how they age."""

from __future__ import annotations

from typing import Any

import pytest

from qcgraph.errors import BundleError
from qcgraph.plan.spec import Interface, TensorSpec
from qcgraph.sampling.cache_state import aged, cached, depths, remember


def takes(*names: str) -> Interface:
    return Interface(tuple(TensorSpec(name, "f32", ("B",)) for name in names), ())


def test_depths_are_the_largest_ages_that_any_variant_takes() -> None:
    interfaces = [takes("latent", "cache_0"), takes("cache_0", "cache_0_age1"), takes("cache_1_age2", "cache_1")]
    assert depths(interfaces) == {"cache_0": 1, "cache_1": 2}


def test_values_grow_older_and_the_oldest_is_forgotten() -> None:
    state: dict[str, Any] = {}
    for value in "abcd":
        remember(state, {"cache_0": value, "cache_1": value.upper()}, {"cache_0": 2})
    assert state == {"cache_0": "d", "cache_0_age1": "c", "cache_0_age2": "b", "cache_1": "D"}


def test_the_first_value_stands_for_those_before_it() -> None:
    state: dict[str, Any] = {}
    remember(state, {"cache_0": "a"}, {"cache_0": 2})
    assert [state[aged("cache_0", age)] for age in range(3)] == ["a", "a", "a"]
    remember(state, {"cache_0": "b"}, {"cache_0": 2})
    assert [state[aged("cache_0", age)] for age in range(3)] == ["b", "a", "a"]


def test_reuse_before_any_computing_step_is_an_error() -> None:
    with pytest.raises(BundleError, match="reuses 'cache_0_age1' before any step computed it"):
        cached("cache_0_age1", "reuse", {})


class Interrupted(dict[str, object]):
    """A state of which no single entry can be written."""

    def __setitem__(self, name: str, value: object) -> None:
        raise KeyboardInterrupt


def test_a_state_changes_at_once_or_not_at_all() -> None:
    state: dict[str, object] = {}
    for value in (1, 2, 3):
        remember(state, {"cache_0": value, "cache_1": -value}, {"cache_0": 2, "cache_1": 1})
    assert state == {"cache_0": 3, "cache_0_age1": 2, "cache_0_age2": 1, "cache_1": -3, "cache_1_age1": -2}
    whole = Interrupted(state)
    remember(whole, {"cache_0": 4}, {"cache_0": 2})
    assert (whole["cache_0"], whole["cache_0_age1"], whole["cache_0_age2"]) == (4, 3, 2)
