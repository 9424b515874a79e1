"""Types and ranges of the options of passes, checked as soon as a pass is made and before any pass runs.

The type of an option is the annotation of its field; `option` adds its range. Even without a range, whole numbers are
never negative, numbers are finite, and texts have a limited length.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from qcgraph.errors import UsageError, closest, shown
from qcgraph.files.documents import is_text

Value = TypeVar("Value")
MOST = 10**9  # largest number: more than there are steps, samples, or seconds to wait for them
MOST_TRAJECTORIES = 100_000  # largest number whose noise and latents a machine still holds
MOST_SEED = 2**62  # passes draw from twice a seed, which PyTorch takes up to 2^64
AUTO_HINT = "null takes as many as a fixed amount of arithmetic allows"
LONGEST = 4096  # characters of a text
SHOWN = 60  # characters of a wrong value that an error repeats
_BOUNDS = "bounds"
_WORDS: dict[object, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Bounds:
    """The range of an option.

    Attributes:
        least: the smallest number.
        most: the largest number.
        above: a number that the option has to exceed.
        below: a number that the option must not reach.
        longest: the largest number of characters of a text.
        hint: advice for a wrong value.
        among: returns the allowed texts, each with its meaning; None where any text is allowed.
    """

    least: float = 0
    most: float = MOST
    above: float = -math.inf
    below: float = math.inf
    longest: int = LONGEST
    hint: str = ""
    among: Callable[[], Mapping[str, str]] | None = None

    def holds(self, value: object) -> bool:
        """Return whether a value of the right type is in range; a text must also be one that files can hold."""
        if isinstance(value, str):
            is_known = self.among is None or value in self.among()
            return is_known and len(value) <= self.longest and is_text(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return True
        return self.least <= value <= self.most and self.above < value < self.below

    @property
    def words(self) -> str:
        """The range of a number in words."""
        low = f"above {self.above:g}" if self.above >= self.least else f"from {self.least:g}"
        high = f"below {self.below:g}" if self.below <= self.most else f"to {self.most:g}"
        return f"{low} {high}" if low.startswith("from") and high.startswith("to") else f"{low} and {_and(high)}"


def _and(high: str) -> str:
    return high.replace("to ", "at most ") if high.startswith("to") else high


def option(default: Value, **bounds: Any) -> Value:
    """Return a field of a pass with a range.

    Args:
        default: the default of the field.
        bounds: the fields of `Bounds`.
    """
    made: Value = field(default=default, metadata={_BOUNDS: Bounds(**bounds)})
    return made


def choices_of(item: Any) -> Mapping[str, str]:
    """Return the texts that an option may be, each with its meaning; nothing where any text is allowed.

    Args:
        item: a field of a pass.
    """
    bounds = item.metadata.get(_BOUNDS, Bounds())
    return bounds.among() if bounds.among else {}


def check_options(pass_: Any) -> None:
    """Check the type and the range of every option of a pass.

    Args:
        pass_: an instance of a dataclass with a ``name``.

    Raises:
        UsageError: names the pass and the option, its value, and the values that it may have.
    """
    own: type = type(pass_)
    kinds = _kinds(own)
    for item in fields(pass_):
        value, bounds, kind = getattr(pass_, item.name), item.metadata.get(_BOUNDS, Bounds()), kinds[item.name]
        if _is_of(value, kind) and bounds.holds(value):
            continue
        choices = [str(choice) for choice in _choices(kind)] or list(bounds.among() if bounds.among else ())
        guess = closest(value, choices) if choices and isinstance(value, str) and len(value) <= SHOWN else ""
        hints = [hint for hint in (bounds.hint, guess, f"see qcgraph passes {pass_.name}") if hint]
        option_name = item.name.replace("_", "-")
        raise UsageError(
            f"{option_name} {shown(value)} is not {_wanted(kind, bounds)}",
            where=f"pass {pass_.name}, option {option_name}",
            hint="; ".join(hints),
        )


def converted(kind: type, name: str, value: object) -> object:
    """Return a value in the type of its option: a whole number becomes a float where the option is a float.

    Args:
        kind: the class of the pass.
        name: the name of the field.
        value: the value as it was written.
    """
    wants_float = float in _members(_kinds(kind)[name])
    is_whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MOST
    return float(value) if wants_float and is_whole else value  # type: ignore[arg-type]


@cache
def _kinds(kind: type) -> dict[str, Any]:
    """Return the types of the fields of a pass."""
    return get_type_hints(kind)


def _members(kind: Any) -> tuple[Any, ...]:
    """Return the types of a union, else the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _choices(kind: Any) -> list[Any]:
    """Return the values of the literal types among those of an option."""
    return [value for member in _members(kind) if get_origin(member) is Literal for value in get_args(member)]


def _is_of(value: object, kind: Any) -> bool:
    """Tell whether a value has the type of an option; a truth value is not a number."""
    if any(type(value) is type(choice) and value == choice for choice in _choices(kind)):
        return True
    members = set(_members(kind))
    if value is None:
        return type(None) in members
    if isinstance(value, bool):
        return bool in members
    if isinstance(value, int):
        return bool(members & {int, float})
    return any(isinstance(value, member) for member in members & {float, str})


def _wanted(kind: Any, bounds: Bounds) -> str:
    """Return the types and ranges of an option in words."""
    parts = [", ".join(map(str, choices))] if (choices := _choices(kind)) else []
    for member in _members(kind):
        if member in (int, float):
            parts.append(f"{_WORDS[member]} {bounds.words}")
        elif member is str and bounds.among is not None:
            parts.append(", ".join(bounds.among()))
        elif member is str:
            parts.append(f"text of at most {bounds.longest} characters")
        elif member is bool:
            parts.append(_WORDS[member])
    if type(None) in _members(kind):
        parts.append("null")
    return " or ".join(parts)
