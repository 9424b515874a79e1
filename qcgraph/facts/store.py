"""The facts of a program, at most one of each type, and their JSON form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import cache
from types import ModuleType
from typing import Any, Protocol, TypeVar, cast

from qcgraph.errors import QcgraphError
from qcgraph.facts import caching, calibration, compensation, equalization, forecast, precision, quantization, solver
from qcgraph.facts.precision import ComputeType
from qcgraph.facts.quantization import RoundedWeights
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan

Data = TypeVar("Data")  # any plain dataclass


class Fact(Protocol):
    """A fact that passes leave for later passes: a frozen dataclass of numbers, strings and tuples, with its text."""

    def lines(self) -> list[str]:
        """Return the lines about the fact in the text of a program; none where the graphs show it."""
        ...


Kind = TypeVar("Kind", bound=Fact)

FAMILIES = (solver, caching, equalization, calibration, quantization, forecast, compensation, precision)


def _facts_of(family: ModuleType) -> Iterator[type[Fact]]:
    """Yield the facts of a family in the order of its file: the classes with lines; the rest are parts of facts."""
    for kind in vars(family).values():
        if isinstance(kind, type) and kind.__module__ == family.__name__ and hasattr(kind, "lines"):
            yield kind


# All facts of qcgraph that programs can hold, in the order in which their text shows them.
FACT_TYPES: tuple[type[Fact], ...] = (
    ModelSpec,
    StepPlan,
    *(kind for family in FAMILIES for kind in _facts_of(family)),
)
FOREIGN = ":"  # part of the key of a fact of another distribution, ``package.module:Fact``


class Facts:
    """An immutable set of facts, at most one of each type, keyed by the type."""

    def __init__(self, facts: Iterable[Fact] = ()) -> None:
        self._facts: dict[type, Fact] = {type(fact): fact for fact in facts}

    def __iter__(self) -> Iterator[Fact]:
        """Yield the facts in the order of the table, and after them the facts of other distributions."""
        yield from (self._facts[kind] for kind in FACT_TYPES if kind in self._facts)
        yield from (self._facts[kind] for kind in sorted(self._facts.keys() - set(FACT_TYPES), key=_key))

    def __contains__(self, kind: type) -> bool:
        return kind in self._facts

    def get(self, kind: type[Kind]) -> Kind | None:
        """Return the fact of this type, or None."""
        return cast("Kind | None", self._facts.get(kind))

    def __getitem__(self, kind: type[Kind]) -> Kind:
        fact = self.get(kind)
        if fact is None:
            raise QcgraphError(f"the program holds no {kind.__name__}", hint="run the pass that provides it before")
        return fact

    def with_(self, *facts: Fact) -> Facts:
        """Return these facts and the given ones, which replace facts of the same type."""
        return Facts([*self._facts.values(), *facts])

    def without(self, kind: type) -> Facts:
        """Return these facts without the fact of this type."""
        return Facts(fact for fact in self._facts.values() if type(fact) is not kind)

    @property
    def held_constants(self) -> frozenset[str]:
        """The constants that a program must hold for its facts, whether or not a graph refers to them."""
        rounded = self.get(RoundedWeights)
        return frozenset(rounded.held_constants if rounded else ())

    def encode(self) -> dict[str, Any]:
        """Return plain JSON data by type name; the name of a type of another distribution begins with its module."""
        named = {_key(kind): fact for kind, fact in self._facts.items()}
        return {name: encode(named[name]) for name in sorted(named)}

    @classmethod
    def decode(cls, data: dict[str, Any]) -> Facts:
        """Return the facts that `encode` wrote; data of another shape raises pydantic's ValidationError.

        Facts of other distributions are left out, because modules that a file names are not imported.
        """
        kinds = {kind.__name__: kind for kind in FACT_TYPES}
        return cls(decode(kinds[name], value) for name, value in data.items() if FOREIGN not in name)


def _key(kind: type) -> str:
    return kind.__name__ if kind in FACT_TYPES else f"{kind.__module__}{FOREIGN}{kind.__qualname__}"


def precision_of(facts: Facts) -> str:
    """Return the floating-point type of values that are not quantized, ``f32`` unless it was reduced."""
    computed = facts.get(ComputeType)
    return computed.dtype if computed else "f32"


def encode(fact: Any) -> Any:
    """Return a fact (or any plain dataclass) as JSON data."""
    return asdict(fact)


def decode(kind: type[Data], data: Any) -> Data:
    """Return a dataclass from JSON data; data of another shape raises pydantic's ValidationError."""
    return cast(Data, _adapter(cast(Any, kind)).validate_python(data))


@cache
def _adapter(kind: type) -> Any:
    """Return the validator of a dataclass; it is cached, because making it takes longer than most validations."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
