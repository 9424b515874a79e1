"""Cached values and how they age."""

from __future__ import annotations

import pytest

from qcgraph.errors import BundleError
from qcgraph.plan.roles import TensorRole
from qcgraph.plan.spec import Interface, TensorSpec
from qcgraph.sampling.cache_state import State, cached, depths, remember

LATENT = TensorSpec("latent", "f32", ("B",), TensorRole.STATE)


def cache(value: str, age: int = 0) -> TensorSpec:
    """An input whose name tells nothing."""
    return TensorSpec(f"input_of_{value}_{10 - age}", "f32", ("B",), TensorRole.CACHE, value, age)


def takes(*specs: TensorSpec) -> Interface:
    return Interface(specs, ())


def test_depths_are_the_largest_ages_that_any_variant_takes() -> None:
    interfaces = [
        takes(LATENT, cache("a")),
        takes(cache("a"), cache("a", 1)),
        takes(cache("b", 2), cache("b")),
    ]
    assert depths(interfaces) == {"a": 1, "b": 2}


def test_values_grow_older_and_the_oldest_is_forgotten() -> None:
    state: State = {}
    for value in "abcd":
        remember(state, {"x": value, "y": value.upper()}, {"x": 2})
    assert state == {("x", 0): "d", ("x", 1): "c", ("x", 2): "b", ("y", 0): "D"}


def test_the_first_value_stands_for_those_before_it() -> None:
    state: State = {}
    remember(state, {"x": "a"}, {"x": 2})
    assert [state["x", age] for age in range(3)] == ["a", "a", "a"]
    remember(state, {"x": "b"}, {"x": 2})
    assert [state["x", age] for age in range(3)] == ["b", "a", "a"]


def test_reuse_before_any_computing_step_is_an_error() -> None:
    with pytest.raises(BundleError, match="reuses 'input_of_a_9' before any step computed it"):
        cached(cache("a", 1), "reuse", {("a", 0): 1})


def test_an_input_that_is_no_cached_value_is_not_looked_for() -> None:
    with pytest.raises(BundleError, match="takes 'latent', which it was not given"):
        cached(LATENT, "reuse", {})


class Interrupted(dict[tuple[str, int], object]):
    """A state of which no single entry can be written."""

    def __setitem__(self, name: tuple[str, int], value: object) -> None:
        raise KeyboardInterrupt


def test_a_state_changes_at_once_or_not_at_all() -> None:
    state: State = {}
    for value in (1, 2, 3):
        remember(state, {"x": value, "y": -value}, {"x": 2, "y": 1})
    assert state == {("x", 0): 3, ("x", 1): 2, ("x", 2): 1, ("y", 0): -3, ("y", 1): -2}
    whole = Interrupted(state)
    remember(whole, {"x": 4}, {"x": 2})
    assert [whole["x", age] for age in range(3)] == [4, 3, 2]
