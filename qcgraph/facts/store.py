"""The facts of a program, at most one of each type, and their JSON form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from typing import Any, TypeVar, cast

from qcgraph.errors import QcgraphError
from qcgraph.facts.caching import CachePlan, ForecastFit, Rehearsed, SchedulePlan
from qcgraph.facts.calibration import CalibrationSet, Ranges, Reference
from qcgraph.facts.compensation import Compensation
from qcgraph.facts.precision import Precision
from qcgraph.facts.quantization import (
    AttentionPlan,
    Equalization,
    QuantizedSites,
    QuantPlan,
    Requantization,
    RoundedWeights,
    TimestepGroups,
)
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan

Fact = TypeVar("Fact")

FACT_TYPES: tuple[type, ...] = (
    ModelSpec,
    StepPlan,
    CachePlan,
    SchedulePlan,
    Rehearsed,
    Equalization,
    Ranges,
    Reference,
    CalibrationSet,
    TimestepGroups,
    QuantPlan,
    RoundedWeights,
    QuantizedSites,
    Requantization,
    AttentionPlan,
    ForecastFit,
    Compensation,
    Precision,
)


class Facts:
    """An immutable set of facts, at most one of each type, keyed by the type."""

    def __init__(self, facts: Iterable[object] = ()) -> None:
        self._facts: dict[type, object] = {type(fact): fact for fact in facts}

    def __contains__(self, kind: type) -> bool:
        return kind in self._facts

    def get(self, kind: type[Fact]) -> Fact | None:
        """The fact of this type, or None."""
        return cast("Fact | None", self._facts.get(kind))

    def __getitem__(self, kind: type[Fact]) -> Fact:
        fact = self.get(kind)
        if fact is None:
            raise QcgraphError(f"the program holds no {kind.__name__}", hint="run the pass that provides it before")
        return fact

    def with_(self, *facts: object) -> Facts:
        """These facts and the given ones, which replace those of the same type."""
        return Facts([*self._facts.values(), *facts])

    def without(self, kind: type) -> Facts:
        """These facts but the one of this type."""
        return Facts(fact for fact in self._facts.values() if type(fact) is not kind)

    @property
    def held_constants(self) -> frozenset[str]:
        """The constants that a program must hold for its facts, whether or not a graph refers to them."""
        rounded = self.get(RoundedWeights)
        return frozenset(rounded.held_constants if rounded else ())

    def encode(self) -> dict[str, Any]:
        """Plain JSON data, by type name."""
        return {
            kind.__name__: encode(self._facts[kind]) for kind in sorted(self._facts, key=lambda kind: kind.__name__)
        }

    @classmethod
    def decode(cls, data: dict[str, Any]) -> Facts:
        """The inverse of `encode`; raises pydantic's ValidationError on data of another shape."""
        kinds = {kind.__name__: kind for kind in FACT_TYPES}
        return cls(decode(kinds[name], value) for name, value in data.items())


def precision_of(facts: Facts) -> str:
    """The floating-point type of what is not quantized, ``f32`` unless it was reduced."""
    precision = facts.get(Precision)
    return precision.dtype if precision else "f32"


def encode(fact: Any) -> Any:
    """A fact (or any plain dataclass) as JSON data."""
    return asdict(fact)


def decode(kind: type[Fact], data: Any) -> Fact:
    """A dataclass from JSON data; raises pydantic's ValidationError on data of another shape."""
    return cast(Fact, _adapter(cast(Any, kind)).validate_python(data))


@cache
def _adapter(kind: type) -> Any:
    """What validates a dataclass; made once, which takes longer than most data of it."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
