"""The conditions of some samples: the inputs that describe each sample, such as its class. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcgraph.errors import UsageError
from qcgraph.plan.spec import Condition, ModelSpec

Values = npt.NDArray[np.generic]
DTYPES: Mapping[str, type[np.generic]] = {"i64": np.int64, "f32": np.float32}


@dataclass(frozen=True, eq=False)
class Conditions:
    """A value of every condition of the model for each of N samples.

    Attributes:
        count: the number of samples N, which a model without conditions has no array to read from.
        values: the values by the name of the condition, each [N, *shape].
    """

    count: int
    values: Mapping[str, Values]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: slice | npt.NDArray[np.integer]) -> Conditions:
        count = len(np.arange(self.count)[index])
        return Conditions(count, {name: value[index] for name, value in self.values.items()})

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Conditions)
            and self.count == other.count
            and self.values.keys() == other.values.keys()
            and all(np.array_equal(value, other.values[name]) for name, value in self.values.items())
        )

    __hash__ = None  # type: ignore[assignment]  # arrays have no hash

    def copy(self) -> Conditions:
        """Return a copy with arrays of its own."""
        return Conditions(self.count, {name: value.copy() for name, value in self.values.items()})

    def repeated(self, times: int) -> Conditions:
        """Return all samples, repeated as a whole."""
        return joined([self] * times)

    def difference(self, other: Conditions) -> str:
        """Describe the first sample that differs from a batch of the same size; return an empty string if none does."""
        for name, value in self.values.items():
            wrong = [
                index for index in range(self.count) if not np.array_equal(value[index], other.values[name][index])
            ]
            if wrong:
                own, others = (f"{name} {values[wrong[0]]}" for values in (value, other.values[name]))
                return f"sample {wrong[0]} has {own}, this trajectory began with {others} there"
        return ""

    def distinct(self) -> tuple[Conditions, npt.NDArray[np.intp]]:
        """Return the distinct samples, sorted by their values, and the index of each sample among them, [N]."""
        columns = [np.asarray(value, dtype=np.float64).reshape(self.count, -1) for value in self.values.values()]
        rows = np.hstack(columns) if columns else np.zeros((self.count, 1))
        _, first, places = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        return self[first], places.reshape(-1)

    def unconditional(self, spec: ModelSpec) -> Conditions:
        """Return the conditions of the unconditional half of guidance: null values where a condition has one."""
        values = dict(self.values)
        for condition in spec.conditions:
            if condition.null is not None:
                values[condition.name] = np.full_like(values[condition.name], condition.null)
        return Conditions(self.count, values)

    def is_null(self, spec: ModelSpec) -> npt.NDArray[np.bool_]:
        """Return for each sample, bool[N], whether it is unconditional: all conditions with a null value have it."""
        nulls = [condition for condition in spec.conditions if condition.null is not None]
        flat = [self.values[item.name].reshape(self.count, -1) == item.null for item in nulls]
        found: npt.NDArray[np.bool_] = np.all(np.hstack(flat), axis=1) if flat else np.zeros(self.count, dtype=np.bool_)
        return found

    def labels(self, spec: ModelSpec) -> npt.NDArray[np.int64]:
        """Return the class of each sample, i64[N]; 0 where the model has no class label."""
        if spec.label is None:
            return np.zeros(self.count, dtype=np.int64)
        return self.values[spec.label.name].astype(np.int64)


def joined(parts: Sequence[Conditions]) -> Conditions:
    """Return the samples of several batches, one after the other."""
    values = {name: np.concatenate([part.values[name] for part in parts]) for name in parts[0].values}
    return Conditions(sum(len(part) for part in parts), values)


def of_labels(labels: Sequence[int] | npt.NDArray[np.integer], spec: ModelSpec) -> Conditions:
    """Return the conditions of samples of the given classes.

    Raises:
        UsageError: there is no sample, the model has no such class, or it has conditions besides a class label.
    """
    if not len(labels):
        raise UsageError("nothing to sample", hint="ask for at least one sample")
    if spec.label is None or len(spec.conditions) != 1:
        names = " and ".join(condition.name for condition in spec.conditions)
        hint = f"its conditions are {names}; without classes, all of their values are taken in turn"
        raise UsageError(
            f"{spec.name} takes no class alone", hint=hint if names else "it has no conditions: leave the classes out"
        )
    for label in labels:
        if not 0 <= label < (spec.label.count or 0):
            raise UsageError(
                f"class {label} is out of range",
                hint=f"{spec.name} knows the classes 0 to {(spec.label.count or 0) - 1}",
            )
    return Conditions(len(labels), {spec.label.name: np.asarray(labels, dtype=np.int64)})


def in_turn(count: int, spec: ModelSpec, *, with_null: bool = False) -> Conditions:
    """Return the conditions of samples that take every value of each condition in turn.

    Args:
        count: the number of samples.
        spec: the model.
        with_null: whether the null value is used too, as the first one.

    Raises:
        UsageError: a condition may have any value, so its values cannot be listed.
    """
    found: dict[str, Values] = {}
    for condition in spec.conditions:
        values: list[int | float] = list(range(_count(condition)))
        if with_null and condition.null is not None:
            values = [condition.null, *values]
        found[condition.name] = _filled([values[index % len(values)] for index in range(count)], condition)
    return Conditions(count, found)


def drawn(count: int, generator: np.random.Generator, spec: ModelSpec) -> Conditions:
    """Draw conditions in random order, every value of each condition equally often if the count allows.

    Raises:
        UsageError: a condition may have any value, so its values cannot be listed.
    """
    found: dict[str, Values] = {}
    for condition in spec.conditions:
        rounds = -(-count // _count(condition))
        values = np.concatenate([generator.permutation(_count(condition)) for _ in range(rounds)])
        found[condition.name] = _filled(values[:count].tolist(), condition)
    return Conditions(count, found)


def _count(condition: Condition) -> int:
    """Return the number of values of a condition."""
    if condition.count is None:
        raise UsageError(
            f"the condition {condition.name} may have any value, and none is known to calibrate with",
            hint="give it a count: its values are then 0 to count - 1",
        )
    return condition.count


def _filled(values: Sequence[int | float], condition: Condition) -> Values:
    """Return values [N, *shape], with one value for all elements of a sample."""
    column = np.asarray(values, dtype=DTYPES[condition.dtype]).reshape(-1, *[1] * len(condition.shape))
    return np.array(np.broadcast_to(column, (len(values), *condition.shape)))  # a copy, which may be written to
