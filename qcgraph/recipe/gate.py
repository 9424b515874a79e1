"""Quality gates such as ``psnr>=28,accuracy_drop<=0.01``: their parser and their check. No torch."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qcgraph.errors import RefusedError, UsageError, closest, shown

# Terms of a gate -> the metrics that they need.
TERMS: Mapping[str, tuple[str, ...]] = {
    "psnr": ("psnr",),
    "ssim": ("ssim",),
    "latent_error": ("latent_error",),
    "fid_small": ("fid_small",),
    "fid_rise": ("fid_small",),  # FID of the compilation minus FID of full precision
    "kid": ("kid",),
    "accuracy": ("accuracy",),
    "accuracy_drop": ("accuracy",),  # accuracy of full precision minus accuracy of the compilation
}
_COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_TERM = re.compile(r"\s*(?P<name>[a-z_]+)\s*(?P<sign>>=|<=|>|<)\s*(?P<limit>[-+0-9.eE]+)\s*")
_FORM = 'write it as "psnr>=28,accuracy_drop<=0.01"'


@dataclass(frozen=True)
class Term:
    """One condition of a gate."""

    name: str
    sign: str
    limit: float

    @property
    def text(self) -> str:
        """The text of this condition; `Gate.parse` reads it."""
        return f"{self.name}{self.sign}{self.limit!r}".removesuffix(".0")

    def holds(self, value: float) -> bool:
        """Tell whether a value meets this condition; NaN meets none."""
        return _COMPARISONS[self.sign](value, self.limit)


@dataclass(frozen=True)
class Verdict:
    """A condition and the measured value."""

    term: str
    value: float
    passed: bool


def require(verdicts: Sequence[Verdict], *, where: str | None = None, hint: str) -> None:
    """Refuse a compilation that misses a condition of its gate.

    Raises:
        RefusedError: names the conditions that are not met, and the measured values.
    """
    missed = [f"{verdict.term} (it is {verdict.value:.4g})" for verdict in verdicts if not verdict.passed]
    if missed:
        raise RefusedError(f"the gate is not met: {', '.join(missed)}", where=where, hint=hint)


@dataclass(frozen=True)
class Gate:
    """Conditions that must all hold."""

    terms: tuple[Term, ...]

    @property
    def text(self) -> str:
        """The text of the gate; `parse` is the inverse."""
        return ",".join(term.text for term in self.terms)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that the gate needs."""
        return tuple(dict.fromkeys(metric for term in self.terms for metric in TERMS[term.name]))

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Return the gate of a text.

        Raises:
            UsageError: the text is not of the form ``name>=number,...``, or names an unknown term.
        """
        terms = []
        for part in text.split(","):
            match = _TERM.fullmatch(part)
            if match is None:
                raise UsageError(f"cannot read {shown(part.strip())}", where="gate", hint=_FORM)
            if match["name"] not in TERMS:
                raise UsageError(f"no term {shown(match['name'])}", where="gate", hint=closest(match["name"], TERMS))
            try:
                limit = float(match["limit"])
            except ValueError:
                raise UsageError(f"{shown(match['limit'])} is no number", where="gate", hint=_FORM) from None
            if not math.isfinite(limit):
                raise UsageError(f"{shown(match['limit'])} is no finite number", where="gate", hint=_FORM)
            terms.append(Term(match["name"], match["sign"], limit))
        return cls(tuple(terms))

    def check(self, values: Mapping[str, float]) -> tuple[Verdict, ...]:
        """Return every condition with its measured value.

        Args:
            values: the measured values by the names of the terms.
        """
        return tuple(Verdict(term.text, values[term.name], passed=term.holds(values[term.name])) for term in self.terms)
