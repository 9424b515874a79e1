"""The cache tensors of one request, and how old ones make room for new ones. No torch, no NumPy.

A step that computes a cached value gives it as an output; the host carries it to the steps that reuse it. A variant
may also want what the value was at the computing steps before: its inputs are then called by the value's name and an
age, ``cache_0`` (the last one computed), ``cache_0_age1`` (the one before), ``cache_0_age2``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, MutableMapping

from qcgraph.errors import BundleError
from qcgraph.plan.spec import Interface

State = MutableMapping[str, object]
_AGED = re.compile(r"(?P<name>.+)_age(?P<age>[1-9][0-9]*)")


def aged(name: str, age: int) -> str:
    """The name of a cached value as it was some computing steps ago; age 0 is the last one computed."""
    return f"{name}_age{age}" if age else name


def depths(interfaces: Iterable[Interface]) -> dict[str, int]:
    """The largest age of each cached value that any variant takes as an input; 0 is left out."""
    found: dict[str, int] = {}
    for interface in interfaces:
        for match in map(_AGED.fullmatch, interface.input_names):
            if match:
                found[match["name"]] = max(found.get(match["name"], 0), int(match["age"]))
    return found


def remember(state: State, outputs: Mapping[str, object], depth: Mapping[str, int]) -> None:
    """Store what a step computed; what was there grows older by one, and the oldest is forgotten.

    The first value of a trajectory stands for those before it, of which there are none. The state changes at once or
    not at all, so that a step which is interrupted leaves it as it was.

    Args:
        state: the cache tensors of the request by name.
        outputs: the new ones.
        depth: the ages that are wanted (see `depths`).
    """
    changed: dict[str, object] = {}
    for name, value in outputs.items():
        for age in range(depth.get(name, 0), 0, -1):
            changed[aged(name, age)] = state.get(aged(name, age - 1), value)
        changed[name] = value
    state.update(changed)


def cached(name: str, variant: str, state: Mapping[str, object]) -> object:
    """A cache tensor of the request, in the backend's own form.

    Raises:
        BundleError: no computing step has written it.
    """
    if name not in state:
        raise BundleError(
            f"variant {variant!r} reuses {name!r} before any step computed it",
            hint="start the trajectory with the first timestep of the plan",
        )
    return state[name]
