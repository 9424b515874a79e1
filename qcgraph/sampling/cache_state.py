"""The cached values of one request, and how new values replace old ones. No torch, no NumPy.

A step that computes a cached value gives it as an output; the host carries it to the steps that reuse it. A variant
may also need the value from earlier computing steps: `TensorSpec.age` of its inputs says how many before. Age 0 is the
last computed value, age 1 the value before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping

from qcgraph.errors import BundleError
from qcgraph.plan.roles import TensorRole
from qcgraph.plan.spec import Interface, TensorSpec

State = MutableMapping[tuple[str, int], object]  # (cached value, age) -> the tensor, in the backend's own form


def depths(interfaces: Iterable[Interface]) -> dict[str, int]:
    """Return the largest age of each cached value that any variant takes as an input, without values of age 0."""
    found: dict[str, int] = {}
    for interface in interfaces:
        for spec in interface.taken(TensorRole.CACHE):
            if spec.age:
                found[spec.value] = max(found.get(spec.value, 0), spec.age)
    return found


def remember(state: State, computed: Mapping[str, object], depth: Mapping[str, int]) -> None:
    """Store the values that a step computed; stored values grow older by one, and the oldest is dropped.

    The first value of a trajectory also fills the places of older values, because there are none. The state changes
    at once or not at all, so that an interrupted step leaves it unchanged.

    Args:
        state: the cached values of the request.
        computed: the new values, by the name of the cached value.
        depth: the largest age to keep of each cached value (see `depths`).
    """
    changed: dict[tuple[str, int], object] = {}
    for name, value in computed.items():
        for age in range(depth.get(name, 0), 0, -1):
            changed[name, age] = state.get((name, age - 1), value)
        changed[name, 0] = value
    state.update(changed)


def cached(spec: TensorSpec, variant: str, state: Mapping[tuple[str, int], object]) -> object:
    """Return the cached value that an input of a variant takes, in the backend's own form.

    Raises:
        BundleError: no computing step has written the value, or the input is not a cached value.
    """
    if spec.role is not TensorRole.CACHE:
        raise BundleError(f"variant {variant!r} takes {spec.name!r}, which it was not given", hint="this is a bug")
    if (spec.value, spec.age) not in state:
        raise BundleError(
            f"variant {variant!r} reuses {spec.name!r} before any step computed it",
            hint="start the trajectory with the first timestep of the plan",
        )
    return state[spec.value, spec.age]
